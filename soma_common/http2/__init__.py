"""HTTP/2 (RFC 9113) on the event loop: what the gRPC server and the long streams between services run on."""
