"""The gRPC server of every service: our services behind the guard, and gRPC's health, reflection and channelz
beside them.
"""

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

import grpc
import structlog
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

PUBLIC_REQUEST_BYTES = 16 * 1024
"""Largest message, expanded, to gRPC's own services: names, from callers whom nobody knows."""

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
            from grpc_channelz.v1 import channelz  # half a megabyte of each process that does not serve it

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
            self._health.set(name, status)

    async def stop(self, grace_s: float) -> None:
        """Refuse new calls, give running ones `grace_s` seconds, then cancel them."""
        self._health.end()
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
        for name, handler in handlers.items():
            path = f"/{service}/{name}"
            if self._guard is None:
                self._listener.add(path, handler, max_request_bytes=PUBLIC_REQUEST_BYTES)
            else:
                method = self._methods[name]
                self._listener.add(path, self._guard.wrap(method, handler), admission=self._guard.admission(method))


class _Health(health_pb2_grpc.HealthServicer):
    """gRPC's health service. Its library's own holds a lock while it writes to a watcher: one that does not read stops
    all others, and the server's end.
    """

    def __init__(self) -> None:
        self._states: dict[str, int] = {}
        self._changed = asyncio.Event()
        self._over = False

    def set(self, name: str, status: int) -> None:
        """Tell everybody the state of a service; without effect after the end has begun."""
        if not self._over:
            self._states[name] = status
            self._tell()

    def end(self) -> None:
        """Tell every watcher NOT_SERVING, then end the watch streams."""
        self._states = dict.fromkeys(self._states, NOT_SERVING)
        self._over = True
        self._tell()

    def _tell(self) -> None:
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    async def Check(self, request: health_pb2.HealthCheckRequest, context: Any) -> health_pb2.HealthCheckResponse:
        """The state of a service; NOT_FOUND for one that is not here."""
        state = self._states.get(request.service)
        if state is None:
            await context.abort(grpc.StatusCode.NOT_FOUND, "no such service here")
        return health_pb2.HealthCheckResponse(status=state)

    async def Watch(self, request: health_pb2.HealthCheckRequest, context: Any) -> None:
        """Stream the state of a service until the server stops."""
        sent = None
        while True:
            changed = self._changed
            state = self._states.get(request.service, health_pb2.HealthCheckResponse.SERVICE_UNKNOWN)
            if state != sent:
                await context.write(health_pb2.HealthCheckResponse(status=state))
                sent = state
            if self._over:
                return
            await changed.wait()
