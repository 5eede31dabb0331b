"""The command line and the standalone stack: NATS, PostgreSQL and the five services on one machine."""
