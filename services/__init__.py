"""The five services. Each folder is one process; none imports another."""

import soma_common as soma_common  # before anything imports gRPC or structlog: it says how they are to work
