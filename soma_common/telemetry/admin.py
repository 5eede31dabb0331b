"""The admin port: metrics and health over plain HTTP, for scrapers and supervisors.

    GET /metrics         Prometheus' text format
    GET /health/live     200 while the event loop answers
    GET /health/ready    200 when every component is well, else 503
    GET /health          the same as JSON with one entry per component
    GET /tracez          spans of sampled turns as JSON (spans.py)

It asks for no identity, so it listens on loopback unless the settings say otherwise.
"""

import asyncio
from collections.abc import Callable, Mapping
from http import HTTPStatus

import orjson

from soma_common.settings import ServiceSettings, split_address
from soma_common.telemetry import spans
from soma_common.telemetry.metrics import CONTENT_TYPE, render

REQUEST_TIMEOUT_S = 5.0
"""A connection that has not sent its request by then is closed."""
MAX_HEADER_LINES = 100
_TRY = b"try /metrics, /tracez, /health, /health/live or /health/ready\n"

Health = Callable[[], bool | Mapping[str, bool]]
"""Returns whether the service is ready, or the same per component."""

_Answer = tuple[HTTPStatus, str, bytes]


class AdminServer:
    """A running admin port."""

    def __init__(self, server: asyncio.Server) -> None:
        self._server = server
        self.port: int = server.sockets[0].getsockname()[1]
        """The port listened on."""

    async def stop(self) -> None:
        """Close the port; requests in progress are dropped."""
        self._server.close()


async def serve_admin(settings: ServiceSettings, health: Health) -> AdminServer:
    """Serve on `settings.admin_listen` and return the running server; `health` is asked at each request."""
    host, port = split_address(settings.admin_listen)

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await _serve_one(reader, writer, lambda path: _answer(path, health, settings))

    return AdminServer(await asyncio.start_server(serve, host, port))


def _answer(path: str, health: Health, settings: ServiceSettings) -> _Answer:
    match path:
        case "/metrics":
            return HTTPStatus.OK, CONTENT_TYPE, render()
        case "/health/live":
            return HTTPStatus.OK, "text/plain; charset=utf-8", b"live\n"
        case "/health/ready":
            status = _status(_ready(health))
            return status, "text/plain; charset=utf-8", b"ready\n" if status == HTTPStatus.OK else b"not ready\n"
        case "/health":
            components = _ready(health)
            body = {
                "service": settings.service,
                "instance": settings.service_instance,
                "ready": all(components.values()),
                "components": components,
            }
            return _status(components), "application/json", orjson.dumps(body, option=orjson.OPT_APPEND_NEWLINE)
        case "/tracez":
            return HTTPStatus.OK, "application/json", spans.render(settings.service, settings.service_instance)
    return HTTPStatus.NOT_FOUND, "text/plain; charset=utf-8", _TRY


def _ready(health: Health) -> Mapping[str, bool]:
    state = health()
    return {"service": state} if isinstance(state, bool) else state


def _status(components: Mapping[str, bool]) -> HTTPStatus:
    return HTTPStatus.OK if all(components.values()) else HTTPStatus.SERVICE_UNAVAILABLE


async def _serve_one(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, answer: Callable[[str], _Answer]
) -> None:
    """Answer one request and close the connection: scrapers come seldom, so keeping it open gains nothing."""
    try:
        async with asyncio.timeout(REQUEST_TIMEOUT_S):
            method, _, rest = (await reader.readline()).decode("latin-1").partition(" ")
            for _line in range(MAX_HEADER_LINES):
                if (await reader.readline()).strip() == b"":
                    break
            path = rest.partition(" ")[0].partition("?")[0]
            if method in {"GET", "HEAD"}:
                status, kind, body = answer(path)
            else:
                status, kind, body = HTTPStatus.METHOD_NOT_ALLOWED, "text/plain; charset=utf-8", b"only GET\n"
            head = (
                f"HTTP/1.1 {status.value} {status.phrase}\r\nContent-Type: {kind}\r\n"
                f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n"
            )
            writer.write(head.encode("latin-1") + (b"" if method == "HEAD" else body))
            await writer.drain()
    except (TimeoutError, ConnectionError, ValueError):
        pass  # The peer went away, was too slow or sent no HTTP: nobody is left to tell.
    finally:
        writer.close()
