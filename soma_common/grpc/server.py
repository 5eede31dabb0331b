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
from grpc_reflection.v1alpha import reflection, reflection_pb2_grpc

from soma_common.authz.authorizer import Authorizer
from soma_common.grpc.guard import FIRST_MESSAGE_TIMEOUT_S, Guard
from soma_common.grpc.listener import AddressInUse as AddressInUse
from soma_common.grpc.listener import Listener
from soma_common.grpc.method import PUBLIC_SERVICES, Method, describe_service
from soma_common.settings import ServiceSettings

Service = tuple[Callable[[Any, Any], None], object, str]
"""Generated `add_XServicer_to_server`, the servicer, and the service's full name."""

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING

_log = structlog.get_logger(__name__)


class GrpcServer:
    """Serves `services` on `settings.listen`. Health answers NOT_SERVING until `set_serving(True)`."""

    def __init__(
        self,
        settings: ServiceSettings,
        authorizer: Authorizer,
        *,
        services: Sequence[Service],
        first_message_timeout_s: float = FIRST_MESSAGE_TIMEOUT_S,
    ) -> None:
        """Raises MissingAuthzRule naming the first method whose contract does not say who may call it."""
        self._settings = settings
        self._names = [name for _, _, name in services]
        self._methods = {name: describe_service(name) for name in self._names if name not in PUBLIC_SERVICES}
        self._guard = Guard(authorizer, first_message_timeout_s)
        self._services = services
        self._health = _Health()
        self._listener = Listener(settings.grpc_max_message_bytes)
        self._channelz: grpc.aio.Server | None = None
        self.port = 0
        """The port served on; 0 until started."""
        self.channelz_port = 0
        """The port that channelz is served on; 0 unless the settings ask for it."""

    async def start(self) -> int:
        """Start serving and return the port; raises AddressInUse."""
        for add, servicer, name in self._services:
            methods = self._methods.get(name)
            guard = self._guard if methods is not None else None
            add(servicer, _Registrar(self._listener, guard, methods or {}))
        own: Any = _Registrar(self._listener, None, {})
        health_pb2_grpc.add_HealthServicer_to_server(self._health, own)
        names = [*self._names, health.SERVICE_NAME, reflection.SERVICE_NAME]
        add_reflection: Any = reflection_pb2_grpc.add_ServerReflectionServicer_to_server
        add_reflection(reflection.aio.ReflectionServicer(names), own)
        await self.set_serving(False)
        self.port = await self._listener.start(self._settings.listen)
        if self._settings.channelz_listen is not None:
            self._channelz = grpc.aio.server()
            channelz.add_channelz_servicer(self._channelz)
            self.channelz_port = self._channelz.add_insecure_port(self._settings.channelz_listen)
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
        await self._listener.stop(grace_s)
        if self._channelz is not None:
            await self._channelz.stop(grace_s)


class _Registrar:
    """Takes the place of gRPC's server in the generated `add_..._to_server`, and wraps handlers on the way to ours."""

    def __init__(self, listener: Listener, guard: Guard | None, methods: dict[str, Method]) -> None:
        """Without a guard the service is one of gRPC's own, and public."""
        self._listener, self._guard, self._methods = listener, guard, methods

    def add_generic_rpc_handlers(self, _handlers: object) -> None:
        """The same handlers come again, by method, in `add_registered_method_handlers`."""

    def add_registered_method_handlers(
        self, service: str, handlers: "dict[str, grpc.RpcMethodHandler[Any, Any]]"
    ) -> None:
        """Register the handlers, wrapped unless the service is one of gRPC's own."""
        if self._guard is not None:
            guard, methods = self._guard, self._methods
            handlers = {name: guard.wrap(methods[name], handler) for name, handler in handlers.items()}
        self._listener.add(service, handlers)


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
