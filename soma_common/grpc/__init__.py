"""gRPC as every service serves and calls it: one server with all checks, one way to open a channel."""
