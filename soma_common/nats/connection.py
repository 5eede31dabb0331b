"""One way to connect to NATS: fast to notice a dead server, never giving up, bounded while it is away."""

import asyncio
from contextlib import suppress
from pathlib import Path

import nats.errors
import structlog
from nats.aio.client import Client
from soma.common.v1 import error_reason_pb2

from soma_common.errors import Unavailable
from soma_common.telemetry.metrics import counter, gauge

CONNECT_TIMEOUT_S = 2
RECONNECT_WAIT_S = 0.1
"""Between two tries to reach a server that went away; endless."""
PING_INTERVAL_S = 2
MAX_OUTSTANDING_PINGS = 2
"""A server that answers none of so many pings is taken for dead."""
PENDING_BYTES = 8 * 1024 * 1024
"""What may wait to be sent, reconnecting included; over it a publish fails at once."""
FLUSHER_QUEUE = 4096

_connected = gauge("soma_nats_connected", "1 while connected to the message bus.", ["name"])
_reconnects = counter("soma_nats_reconnects_total", "Connections to the message bus made again.", ["name"])
_errors = counter("soma_nats_errors_total", "Errors the message bus reported outside of a request.", ["name"])
_log = structlog.get_logger(__name__)


async def connect_nats(url: str, token_file: Path | None, name: str) -> Client:
    """Return a client connected to `url` (several servers separated by commas) under the connection name `name`.

    `token_file` holds the token the servers want. The first connection has to succeed: raises Unavailable when no
    server answers within `CONNECT_TIMEOUT_S`. From then on a lost connection is made again for as long as the
    client lives; what happens is logged and counted. Close it with `close()`, or with `drain()` to handle first
    what was received.
    """
    connected, reconnects, errors = _connected.labels(name), _reconnects.labels(name), _errors.labels(name)
    client = Client()

    async def lost() -> None:
        connected.set(0)
        if not client.is_closed:  # nats-py calls this for a close of our own, too.
            _log.warning("nats.disconnected", name=name)

    async def back() -> None:
        connected.set(1)
        reconnects.inc()
        _log.info("nats.reconnected", name=name, server=_server_of(client))

    async def closed() -> None:
        connected.set(0)
        _log.info("nats.closed", name=name)

    async def failed(error: Exception) -> None:
        # Also the only sign of a refused publish or subscription: those calls themselves just time out.
        errors.inc()
        if client.is_reconnecting:
            return  # Each try of ten a second would say the same; `nats.disconnected` said it once.
        _log.warning("nats.error", name=name, error=str(error) or type(error).__name__)

    try:
        # nats-py would try its first connection for ever as well, hence the limit around it.
        async with asyncio.timeout(CONNECT_TIMEOUT_S):
            await client.connect(
                servers=[server.strip() for server in url.split(",")],
                name=name,
                token=_read_token(token_file),
                connect_timeout=CONNECT_TIMEOUT_S,
                allow_reconnect=True,
                max_reconnect_attempts=-1,
                reconnect_time_wait=RECONNECT_WAIT_S,  # type: ignore[arg-type] # seconds; fractions work
                ping_interval=PING_INTERVAL_S,
                max_outstanding_pings=MAX_OUTSTANDING_PINGS,
                pending_size=PENDING_BYTES,
                flusher_queue_size=FLUSHER_QUEUE,
                disconnected_cb=lost,
                reconnected_cb=back,
                closed_cb=closed,
                error_cb=failed,
            )
    except (OSError, TimeoutError, nats.errors.Error) as error:
        with suppress(OSError):
            await client.close()
        raise Unavailable(
            error_reason_pb2.ERROR_REASON_BUS_UNAVAILABLE,
            f"the message bus does not answer at {url} ({str(error) or type(error).__name__}): "
            "is it running, is the token right?",
        ) from error
    connected.set(1)
    _log.info("nats.connected", name=name, server=_server_of(client))
    return client


def _read_token(token_file: Path | None) -> str | None:
    return token_file.read_text(encoding="utf-8").strip() if token_file is not None else None


def _server_of(client: Client) -> str:
    return client.connected_url.netloc.rpartition("@")[2] if client.connected_url is not None else ""
