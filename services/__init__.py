"""The five services. Each folder is one process; none imports another."""

import soma_common as soma_common  # before anything imports gRPC: it says how gRPC is to work
