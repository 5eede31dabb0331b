"""The command line and the standalone stack: NATS, PostgreSQL and the five services on one machine."""

import soma_common as soma_common  # before anything imports gRPC or structlog: it says how they are to work
