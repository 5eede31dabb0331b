"""The parts a supervisor keeps running, all with the same four verbs: start, check, stop, kill.

A part's `start` returns when it is ready for work and may be called again after it ended; ports and data remain.
"""

import asyncio
import os
import re
import signal
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import grpc.aio
from grpc_health.v1 import health_pb2

from soma_common.embedded.nats import NatsConfig, NatsServer
from soma_common.embedded.postgres import SERVICE_ROLES, UNREACHABLE, PostgresConfig, PostgresServer
from soma_common.embedded.process import ChildProcess, PartFailed
from soma_common.settings import EXIT_BAD_SETTINGS
from somastack.auth_material import AuthMaterial
from somastack.home import Home
from somastack.layout import HOST, SERVERS, SERVERS_STOP_RANK, Instance, Layout
from somastack.story import Line, Tail, sources

READY_TIMEOUT_S = 60.0
"""From the start of a service to its health being SERVING."""
READY_POLL_S = 0.05
CHECK_TIMEOUT_S = 5.0
_MODULE_PATH = re.compile(r"^(?:\w+\.)+(?=\w+: )")


class Part(Protocol):
    """What the supervisor needs of a part."""

    @property
    def name(self) -> str:
        """Unique in the stack."""

    @property
    def start_after(self) -> tuple[str, ...]:
        """Names (of parts or of services) that must be ready before its first start."""

    @property
    def stop_rank(self) -> int:
        """Lower ranks stop first."""

    @property
    def process(self) -> ChildProcess | None:
        """The process of its last start."""

    @property
    def addresses(self) -> dict[str, str]:
        """Where it can be reached, by purpose."""

    @property
    def log(self) -> str:
        """Its log file, or the directory of its log files."""

    async def start(self) -> None:
        """Start it and wait until it is ready; raises PartFailed."""

    async def check(self) -> None:
        """Return when it answers; raises Unresponsive."""

    async def stop(self) -> None:
        """End it cleanly, or by force when that takes too long. Nothing happens when it does not run."""


class Unresponsive(Exception):
    """A part that runs does not answer; the message says what was seen."""


class NatsPart:
    """The message bus."""

    name = "nats"
    start_after: tuple[str, ...] = ()
    stop_rank = SERVERS_STOP_RANK

    def __init__(self, home: Home, layout: Layout) -> None:
        self.server = NatsServer(NatsConfig(home.nats, port=layout.nats_port, monitor_port=layout.nats_monitor_port))
        self.addresses = {
            "nats": f"nats://{HOST}:{layout.nats_port}",
            "monitoring": f"http://{HOST}:{layout.nats_monitor_port}",
        }
        self.log = str(self.server.log_file)

    @property
    def process(self) -> ChildProcess | None:
        """The server's process."""
        return self.server.last_process

    async def start(self) -> None:
        """Start the server."""
        await self.server.start()

    async def check(self) -> None:
        """Ask JetStream."""
        try:
            await self.server.check()
        except OSError as error:
            raise Unresponsive(_described(error)) from error

    async def stop(self) -> None:
        """Stop the server: it has everything on disk already."""
        if self.process is not None:
            await self.server.stop()


class PostgresPart:
    """The database."""

    name = "postgres"
    start_after: tuple[str, ...] = ()
    stop_rank = SERVERS_STOP_RANK

    def __init__(self, home: Home, *, durable: bool = True) -> None:
        self.server = PostgresServer(PostgresConfig(home.postgres, durable=durable))
        self.addresses = {"dsn": self.server.dsn()}
        self.log = str(self.server.log_directory)

    @property
    def process(self) -> ChildProcess | None:
        """The postmaster."""
        return self.server.last_process

    async def start(self) -> None:
        """Start the server and see to roles, database and schemas."""
        await self.server.start()
        try:
            await self.server.provision()
        except UNREACHABLE as error:
            message = f"PostgreSQL cannot be provisioned: {_described(error)}"
            raise PartFailed(message, f"read the log in {self.log}") from error

    async def check(self) -> None:
        """Ask for a row."""
        try:
            await self.server.check()
        except UNREACHABLE as error:
            raise Unresponsive(_described(error)) from error

    async def stop(self) -> None:
        """Fast shutdown."""
        if self.process is not None:
            await self.server.stop()


@dataclass(frozen=True)
class Surroundings:
    """What the environment of every service is made of."""

    home: Home
    layout: Layout
    nats: NatsServer
    postgres: PostgresServer
    auth: AuthMaterial
    module: str
    """The Python module that runs a service, with `{service}` in place of its name."""
    overrides: Mapping[str, Mapping[str, str]]
    """Further variables by instance (`router-0`) or service (`router`); these win."""

    def environment(self, instance: Instance) -> dict[str, str]:
        """The settings of one service (see `soma_common.settings`), over the environment of the supervisor."""
        service, layout = instance.service, self.layout
        ours = {
            "SOMA_SERVICE_INSTANCE": instance.name,
            "SOMA_HOME": str(self.home.path),
            "SOMA_LISTEN": f"{HOST}:{layout.grpc_port(instance)}",
            "SOMA_ADMIN_LISTEN": f"{HOST}:{layout.admin_port(instance)}",
            "SOMA_NATS_URL": self.nats.url,
            "SOMA_NATS_TOKEN_FILE": str(self.nats.token_file),
            "SOMA_CONTROLPLANE_TARGET": layout.targets("controlplane"),
            "SOMA_ROUTER_TARGETS": layout.targets("router"),
            "SOMA_COGNITION_TARGETS": layout.targets("cognition"),
            "SOMA_TOOLGW_TARGET": layout.targets("toolgw"),
            "SOMA_GATEWAY_TARGET": layout.targets("gateway"),
            "SOMA_AUTH_KEYS_FILE": str(self.auth.keys_file),
            "SOMA_AUTH_SERVICE_TOKEN_FILE": str(self.auth.service_token_file(service.name)),
            "SOMA_LOG_FILE": str(self.home.logs / f"{instance.name}.log"),
            "SOMA_STOP_TIMEOUT_S": f"{service.stop_timeout_s:.1f}",
            # What is left between the two is for flushing and closing.
            "SOMA_DRAIN_TIMEOUT_S": f"{service.stop_timeout_s * 0.6:.1f}",
        }
        for role in SERVICE_ROLES:
            if role.service == service.name and role.schema is not None:
                ours["SOMA_POSTGRES_DSN"] = self.postgres.dsn(role.user)
                ours["SOMA_POSTGRES_OWNER_DSN"] = self.postgres.dsn(role.owner)
        extra = {**self.overrides.get(service.name, {}), **self.overrides.get(instance.name, {})}
        return {**os.environ, **ours, **extra}


class ServicePart:
    """One replica of one of the five services."""

    def __init__(self, instance: Instance, surroundings: Surroundings) -> None:
        self._instance, self._surroundings = instance, surroundings
        home, layout = surroundings.home, surroundings.layout
        self.name = instance.name
        self.start_after = instance.service.start_after
        self.stop_rank = instance.service.stop_rank
        self.process: ChildProcess | None = None
        self.addresses = {
            "grpc": f"{HOST}:{layout.grpc_port(instance)}",
            "admin": f"http://{HOST}:{layout.admin_port(instance)}",
        }
        self.log = str(home.logs / f"{instance.name}.log")
        self._output = home.logs / f"{instance.name}.out"

    async def start(self) -> None:
        """Start the process and wait until its health is SERVING."""
        log = Tail(sources(self._surroundings.home, [self.name])[0])
        process = ChildProcess.start(
            # -P: what happens to lie in the working directory is not importable.
            [sys.executable, "-P", "-m", self._surroundings.module.format(service=self._instance.service.name)],
            output=self._output,
            environment=self._surroundings.environment(self._instance),
        )
        self.process = process
        try:
            async with asyncio.timeout(READY_TIMEOUT_S):
                while not await self._serving():
                    if process.exit_code is not None:
                        raise self._ended_early(process, log)
                    await asyncio.sleep(READY_POLL_S)
        except TimeoutError:
            process.send(signal.SIGKILL)
            raise PartFailed(
                f"{self.name} was not ready within {READY_TIMEOUT_S:.0f} s", f"read {self.log} and {self._output}"
            ) from None

    async def check(self) -> None:
        """Ask for its health. Only silence is a failure: who says NOT_SERVING works on becoming SERVING again."""
        try:
            await self._health()
        except grpc.aio.AioRpcError as error:
            raise Unresponsive(f"health: {error.code().name} {error.details()}") from error

    async def stop(self) -> None:
        """Ask it to drain and end; after its time is over, kill it."""
        if self.process is not None:
            await self.process.stop(signal.SIGTERM, self._instance.service.stop_timeout_s)

    async def _serving(self) -> bool:
        try:
            return await self._health() == health_pb2.HealthCheckResponse.SERVING
        except grpc.aio.AioRpcError:
            return False

    async def _health(self) -> int:
        # A channel of its own for each question: a kept one would wait in its reconnect backoff after a restart.
        options = [("grpc.use_local_subchannel_pool", 1), ("grpc.enable_http_proxy", 0)]
        async with grpc.aio.insecure_channel(self.addresses["grpc"], options=options) as channel:
            ask: grpc.aio.UnaryUnaryMultiCallable[health_pb2.HealthCheckRequest, health_pb2.HealthCheckResponse]
            ask = channel.unary_unary(
                "/grpc.health.v1.Health/Check",
                request_serializer=health_pb2.HealthCheckRequest.SerializeToString,
                response_deserializer=health_pb2.HealthCheckResponse.FromString,
            )
            answer = await ask(health_pb2.HealthCheckRequest(), timeout=CHECK_TIMEOUT_S)
            return int(answer.status)

    def _ended_early(self, process: ChildProcess, log: Tail) -> PartFailed:
        """Why it ended: what it printed, or else the first error that it logged since its start."""
        logged = [_reason(line) for line in log.read() if line.level == "error"]
        said = process.output_tail() or "".join(logged[:1])
        advice = f"read {self.log} and {self._output}"
        if process.exit_code == EXIT_BAD_SETTINGS:
            advice = "change the variables it names, or unset them"
        return PartFailed(f"{self.name} ended with exit code {process.exit_code}{': ' if said else ''}{said}", advice)


def parts_of(
    home: Home,
    layout: Layout,
    auth: AuthMaterial,
    module: str,
    overrides: Mapping[str, Mapping[str, str]],
    *,
    durable: bool = True,
) -> list[Part]:
    """Every part of the stack, in the order of their start; the parameters are explained in `StackOptions`."""
    nats, postgres = NatsPart(home, layout), PostgresPart(home, durable=durable)
    surroundings = Surroundings(home, layout, nats.server, postgres.server, auth, module, overrides)
    services: list[Part] = [ServicePart(instance, surroundings) for instance in layout.instances()]
    servers: list[Part] = [nats, postgres]
    assert [part.name for part in servers] == list(SERVERS)
    return [*servers, *services]


def _reason(line: Line) -> str:
    """Why a service says it failed: the message of its exception, whole, or else the line."""
    exception = line.facts.get("exception", "").strip()
    return _MODULE_PATH.sub("", exception.splitlines()[-1]) if exception else line.told


def _described(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
