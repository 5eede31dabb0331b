"""The gRPC server of every service: our services behind the guard, and gRPC's health, reflection and channelz
beside them.
"""

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

import grpc
import structlog
from grpc_channelz.v1 import channelz
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from soma_common.authz.authorizer import Authorizer
from soma_common.grpc.guard import FIRST_MESSAGE_TIMEOUT_S, Guard
from soma_common.grpc.method import PUBLIC_SERVICES, Method, describe_service
from soma_common.settings import ServiceSettings

Service = tuple[Callable[[Any, Any], None], object, str]
"""Generated `add_XServicer_to_server`, the servicer, and the service's full name."""

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING

_log = structlog.get_logger(__name__)


class AddressInUse(RuntimeError):
    """The address to listen on is taken."""


class GrpcServer:
    """Serves `services` on `settings.listen`. Health answers NOT_SERVING until `set_serving(True)`."""

    def __init__(
        self,
        settings: ServiceSettings,
        authorizer: Authorizer,
        *,
        services: Sequence[Service],
        interceptors: Sequence[grpc.aio.ServerInterceptor] = (),
        first_message_timeout_s: float = FIRST_MESSAGE_TIMEOUT_S,
    ) -> None:
        """Raises MissingAuthzRule naming the first method whose contract does not say who may call it."""
        self._settings = settings
        self._names = [name for _, _, name in services]
        self._methods = {name: describe_service(name) for name in self._names if name not in PUBLIC_SERVICES}
        self._guard = Guard(authorizer, first_message_timeout_s)
        self._services = services
        self._interceptors = interceptors
        self._health = _Health()
        self._server: grpc.aio.Server | None = None
        self._channelz: grpc.aio.Server | None = None
        self.port = 0
        """The port served on; 0 until started."""
        self.channelz_port = 0
        """The port that channelz is served on; 0 unless the settings ask for it."""

    async def start(self) -> int:
        """Start serving and return the port; raises AddressInUse."""
        server = grpc.aio.server(
            interceptors=list(self._interceptors), options=_server_options(self._settings.grpc_max_message_bytes)
        )
        for add, servicer, name in self._services:
            add(servicer, _Registrar(server, self._guard, self._methods.get(name)))
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        reflection.enable_server_reflection([*self._names, health.SERVICE_NAME, reflection.SERVICE_NAME], server)
        await self.set_serving(False)
        self.port = _bind(server, self._settings.listen)
        await server.start()
        self._server = server
        if self._settings.channelz_listen is not None:
            self._channelz = grpc.aio.server()
            channelz.add_channelz_servicer(self._channelz)
            self.channelz_port = _bind(self._channelz, self._settings.channelz_listen)
            await self._channelz.start()
            _log.info("grpc.channelz", port=self.channelz_port)
        return self.port

    async def set_serving(self, serving: bool) -> None:
        """Tell health watchers and load balancers whether calls may come. After `stop` has begun it has no effect."""
        status = SERVING if serving else NOT_SERVING
        for name in ("", *self._names):
            await self._health.set(name, status)

    async def stop(self, grace_s: float) -> None:
        """Refuse new calls, give running ones `grace_s` seconds, then cancel them."""
        await self._health.enter_graceful_shutdown()
        for server in (self._server, self._channelz):
            if server is not None:
                await server.stop(grace_s)


class _Registrar:
    """Takes the place of the server in the generated `add_..._to_server`, and wraps each handler on its way there."""

    def __init__(self, server: grpc.aio.Server, guard: Guard, methods: dict[str, Method] | None) -> None:
        self._server, self._guard, self._methods = server, guard, methods

    def add_generic_rpc_handlers(self, _handlers: object) -> None:
        """The same handlers come again, by method, in `add_registered_method_handlers`."""

    def add_registered_method_handlers(
        self, service: str, handlers: "dict[str, grpc.RpcMethodHandler[Any, Any]]"
    ) -> None:
        """Register the handlers, wrapped unless the service is one of gRPC's own."""
        if self._methods is not None:
            methods = self._methods
            handlers = {name: self._guard.wrap(methods[name], handler) for name, handler in handlers.items()}
        self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, handlers),))
        self._server.add_registered_method_handlers(service, handlers)


class _Health(health.aio.HealthServicer):
    """gRPC's health service, whose watch streams end with the server instead of holding up its stop."""

    def __init__(self) -> None:
        super().__init__()
        self._over = asyncio.Event()

    async def Watch(self, request: health_pb2.HealthCheckRequest, context: Any) -> None:
        """Stream the state of a service until the server stops."""
        watch = asyncio.ensure_future(super().Watch(request, context))
        over = asyncio.ensure_future(self._over.wait())
        try:
            await asyncio.wait({watch, over}, return_when=asyncio.FIRST_COMPLETED)
            if watch.done():
                watch.result()
        finally:
            watch.cancel()
            over.cancel()

    async def enter_graceful_shutdown(self) -> None:
        """Tell every watcher NOT_SERVING, then end the watch streams."""
        await super().enter_graceful_shutdown()
        await asyncio.sleep(0)  # Watchers are woken and write before they are ended.
        self._over.set()


def _bind(server: grpc.aio.Server, address: str) -> int:
    try:
        port = server.add_insecure_port(address)
    except RuntimeError as error:
        raise AddressInUse(f"cannot listen on {address}: {error}") from error
    if port == 0:
        raise AddressInUse(f"cannot listen on {address}: it is taken or not an address of this machine")
    return port


def _server_options(max_message_bytes: int) -> list[tuple[str, Any]]:
    return [
        ("grpc.so_reuseport", 0),  # A second process on the same port is a mistake to be told about.
        ("grpc.max_receive_message_length", max_message_bytes),
        ("grpc.max_send_message_length", max_message_bytes),
        ("grpc.keepalive_time_ms", 10_000),
        ("grpc.keepalive_timeout_ms", 5_000),
        # Without this a frozen peer is never noticed: keepalive alone does not close the connection.
        ("grpc.http2.ping_timeout_ms", 5_000),
        ("grpc.keepalive_permit_without_calls", 1),
        # Must be below the clients' keepalive time, or they are sent away with "too many pings".
        ("grpc.http2.min_ping_interval_without_data_ms", 1_000),
    ]
