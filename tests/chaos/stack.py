"""The whole stack under fault: every part can be killed, frozen, held down and started with armed failpoints.

Like the standalone supervisor it starts each part again shortly after it died, but always after the same short pause,
and not while a test holds it down. Model and tools are servers of the test run, outside of what is hurt.

With `links=True` every connection between two processes, and from clients to gateways, goes through a proxy of its own
(`tests/chaos/fault_proxy.py`): `stack.link("router-0", "postgres").blackhole()`.
"""

from __future__ import annotations

import asyncio
import json
import random
import signal
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Final

import asyncpg
from soma.controlplane.v1.agent_service_pb2 import AgentSpec

from soma_common.embedded.postgres import DATABASE, PORT, SERVICE_ROLES
from soma_common.embedded.process import ChildProcess, PartFailed, descendants
from soma_common.testing.eventually import eventually
from soma_common.testing.model_server import CallTools, ModelServer, RecordedCall, Reply, Say, ToolRequest
from soma_common.testing.tool_server import RecordedToolCall, ToolAnswer, ToolServer, WitnessTool, give_back
from somastack.auth_material import AuthMaterial
from somastack.home import Home
from somastack.layout import SERVICES, Instance, Layout, is_taken
from somastack.parts import NatsPart, Part, PostgresPart, parts_of
from somastack.provision import provision
from tests.chaos.fault_proxy import Address, FaultLink, FaultProxy

TENANTS: Final = ("demo", "acme")
ECHO, SLOW, CLERK = "echo", "slow", "clerk"
MODELS: Final = {ECHO: "echo/echo", SLOW: "echo/words-6x25ms", CLERK: "openai/witness-1"}
BOOK = WitnessTool("book", "idempotent")
CHARGE = WitnessTool("charge", "side_effectful")
RESTART_AFTER_S: Final = 0.2
READY_TIMEOUT_S: Final = 30.0
START_TIMEOUT_S: Final = 60.0
FAILPOINTS: Final = "SOMA_FAILPOINTS"
MODULE: Final = "services.{service}.main"
CLIENT: Final = "client"
"""What links from the test's own clients to gateways are named by."""
STORES: Final = {
    "gateway": ("nats",),
    "router": ("nats", "postgres"),
    "cognition": (),
    "toolgw": ("postgres",),
    "controlplane": ("postgres",),
}
TARGETS: Final = {
    "gateway": {"SOMA_CONTROLPLANE_TARGET": "controlplane"},
    "router": {
        "SOMA_CONTROLPLANE_TARGET": "controlplane",
        "SOMA_TOOLGW_TARGET": "toolgw",
        "SOMA_COGNITION_TARGETS": "cognition",
    },
    "cognition": {"SOMA_TOOLGW_TARGET": "toolgw"},
    "toolgw": {"SOMA_CONTROLPLANE_TARGET": "controlplane"},
    "controlplane": {},
}
"""Whom each service talks to, and the setting that says where that is."""


def errand(call: RecordedCall) -> Reply:
    """What the clerk's model does: books and charges for what it is told, then says that it is done."""
    told = next(m["content"] for m in reversed(call.messages) if m.get("role") == "user")
    if call.messages[-1].get("role") == "tool":
        return Say(f"done: {told}")
    return CallTools(ToolRequest("book", {"what": told}), ToolRequest("charge", {"what": told}))


class FaultyStack:
    """A running stack. Made by `faulty_stack`; `model` and `tools` are the outside witnesses."""

    def __init__(
        self,
        home: Home,
        layout: Layout,
        model: ModelServer,
        tools: ToolServer,
        environment: Mapping[str, Mapping[str, str]],
        *,
        tenants: Sequence[str] = TENANTS,
        module: str = MODULE,
        links: bool = False,
        step_timeout_ms: int = 0,
    ) -> None:
        self.home, self.layout, self.model, self.tools = home, layout, model, tools
        self.auth = AuthMaterial(home)
        self.tenants = tuple(tenants)
        self._step_timeout_ms = step_timeout_ms
        self.proxy = FaultProxy() if links else None
        # Read at each start of a part: what is written here holds for its next life.
        self._environment = {name: dict(variables) for name, variables in environment.items()}
        for instance in layout.instances():
            own = self._environment.setdefault(instance.name, {})
            own.update(self._environment.get(instance.service.name, {}))
        self.parts: dict[str, Part] = {
            part.name: part for part in parts_of(home, layout, self.auth, module, self._environment)
        }
        self._up = {name: asyncio.Event() for name in self.parts}
        self._may_start = {name: asyncio.Event() for name in self.parts}
        self._keepers: list[asyncio.Task[None]] = []
        self._expected: set[int] = set()
        self.deaths: list[str] = []
        """Parts that ended although nobody hurt them, each with its last words."""
        self.failed_starts: list[str] = []

    # ---- for clients

    @property
    def gateways(self) -> str:
        """Addresses of the gateways, separated by commas."""
        if self.proxy is None:
            return self.layout.targets("gateway")
        return ",".join(self.link(CLIENT, i.name).address for i in self.layout.instances("gateway"))

    def link(self, source: str, server: str) -> FaultLink:
        """The connections of a process (or of `CLIENT`) to another; only of a stack with links."""
        assert self.proxy is not None, "this stack was made without links"
        return self.proxy.link(source, server)

    @property
    def routers(self) -> str:
        """Addresses of the routers, separated by commas."""
        return self.layout.targets("router")

    def token(self, tenant: str) -> str:
        """The token of a tenant's channels."""
        return self.auth.tenant_token_file(tenant).read_text().strip()

    @property
    def admin_token(self) -> str:
        """The administrator's token."""
        return self.auth.admin_token_file.read_text().strip()

    def process(self, part: str) -> ChildProcess:
        """The process of a part's present or last life."""
        process = self.parts[part].process
        assert process is not None, f"{part} was never started"
        return process

    async def metrics(self, part: str) -> dict[str, float]:
        """What a service says at /metrics: by name, or by name{labels}."""
        reader, writer = await asyncio.open_connection(*self.parts[part].addresses["admin"][7:].split(":"))
        writer.write(b"GET /metrics HTTP/1.1\r\nhost: here\r\nconnection: close\r\n\r\n")
        text = (await reader.read()).decode()
        writer.close()
        rows = (line.rpartition(" ") for line in text.partition("\r\n\r\n")[2].splitlines() if not line.startswith("#"))
        return {name: float(value) for name, _, value in rows if name}

    def logged(self, part: str, event: str) -> list[dict[str, object]]:
        """The lines of a service's log with this event."""
        log = Path(self.parts[part].log)
        if not log.exists():
            return []
        lines = (json.loads(line) for line in log.read_text().splitlines() if f'"{event}"' in line)
        return [line for line in lines if line.get("event") == event]

    async def database(self) -> asyncpg.Connection[asyncpg.Record]:
        """A connection as superuser, for looking in from outside; the caller closes it."""
        postgres = self.parts["postgres"]
        assert isinstance(postgres, PostgresPart)
        return await asyncpg.connect(postgres.server.dsn())

    # ---- faults

    async def kill9(self, part: str) -> float:
        """Kill a part with all its processes; returns the moment (monotonic). It starts again by itself."""
        process = self.process(part)
        children = descendants(process.pid)
        self.expect_death(part)
        self._up[part].clear()
        killed_at = time.monotonic()
        process.send(signal.SIGKILL)
        for child in children:
            child.send(signal.SIGKILL)
        await process.ended()
        return killed_at

    async def terminate(self, part: str) -> tuple[float, float]:
        """Ask a part to stop (SIGTERM), as a rolling restart does; returns the moment (monotonic) and how long it took.

        It starts again by itself. Asserts that it ended as one that was asked to.
        """
        process = self.process(part)
        self.expect_death(part)
        self._up[part].clear()
        asked_at = time.monotonic()
        process.send(signal.SIGTERM)
        code = await process.ended()
        assert code == 0, f"{part} was asked to stop and ended with {code}: {process.output_tail()}"
        return asked_at, time.monotonic() - asked_at

    def freeze(self, part: str) -> float:
        """Stop a part with all its processes, connections stay open; returns the moment (monotonic)."""
        process = self.process(part)
        process.send(signal.SIGSTOP)
        for child in descendants(process.pid):
            child.send(signal.SIGSTOP)
        return time.monotonic()

    def thaw(self, part: str) -> float:
        """Wake a frozen part; returns the moment (monotonic)."""
        process = self.process(part)
        for child in descendants(process.pid):
            child.send(signal.SIGCONT)
        process.send(signal.SIGCONT)
        return time.monotonic()

    def hold_down(self, part: str) -> None:
        """Once it dies, the part is not started again until `let_up`."""
        self._may_start[part].clear()

    def let_up(self, part: str) -> float:
        """The part may start again; returns the moment (monotonic)."""
        self._may_start[part].set()
        return time.monotonic()

    async def is_up(self, part: str) -> None:
        """Wait until a part is ready."""
        async with asyncio.timeout(READY_TIMEOUT_S):
            await self._up[part].wait()

    def next_life(self, part: str) -> dict[str, str]:
        """The environment variables with which a service starts the next time; to be changed."""
        return self._environment[part]

    async def arm(self, part: str, failpoints: str) -> None:
        """Start a service anew with failpoints armed; they hold for this one life."""
        self._environment[part][FAILPOINTS] = failpoints
        await self.kill9(part)
        await self.is_up(part)

    def expect_death(self, part: str) -> None:
        """The end of the part's present life is nobody's defect."""
        self._expected.add(self.process(part).pid)

    async def hit(self, part: str, point: str) -> float:
        """Wait until a service has reached an armed failpoint that ends its life; returns the moment (monotonic)."""
        before = len(self.logged(part, "failpoint.hit"))
        process = self.process(part)
        self.expect_death(part)
        async with asyncio.timeout(READY_TIMEOUT_S):
            await process.ended()
        died_at = time.monotonic()
        await eventually(
            lambda: len(self.logged(part, "failpoint.hit")) > before, 10, f"{part} says it reached {point}"
        )
        return died_at

    # ---- life

    async def start(self) -> None:
        """Start every part, each after those it needs."""
        self.home.make()
        self.auth.make([service.name for service in SERVICES], self.tenants)
        if self.proxy is not None:
            await self._open_links(self.proxy)
        self.tools.write_tools_file(Path(self._environment["toolgw-0"]["SOMA_TOOLGW_HTTP_TOOLS_FILE"]))
        for event in self._may_start.values():
            event.set()
        self._keepers = [
            asyncio.create_task(self._keep(part), name=f"keep {part.name}") for part in self.parts.values()
        ]
        try:
            async with asyncio.timeout(START_TIMEOUT_S):
                for event in self._up.values():
                    await event.wait()
        except TimeoutError:
            late = [name for name, event in self._up.items() if not event.is_set()]
            raise AssertionError(f"these parts did not start: {late}; {self.failed_starts}") from None
        for tenant in self.tenants:
            for agent, model in MODELS.items():
                tools = [tool.name for tool in self.tools.tools] if agent == CLERK else []
                spec = AgentSpec(instructions="Do what you are told.", model=model, tools=tools)
                spec.step_timeout_ms = self._step_timeout_ms
                await provision(self.layout.targets("controlplane"), self.admin_token, tenant, agent, spec)

    async def _open_links(self, proxy: FaultProxy) -> None:
        """Puts a link between every two processes that talk to each other."""
        for instance in self.layout.instances():
            own, service = self._environment[instance.name], instance.service.name
            for store in STORES[service]:
                await self._open_store(proxy, instance, store, own)
            for variable, target in TARGETS[service].items():
                addresses = [
                    (await proxy.open(instance.name, peer.name, Address(self.layout.grpc_port(peer)))).address
                    for peer in self.layout.instances(target)
                ]
                own[variable] = ",".join(addresses)
            if service == "gateway":
                await proxy.open(CLIENT, instance.name, Address(self.layout.grpc_port(instance)))

    async def _open_store(self, proxy: FaultProxy, instance: Instance, store: str, own: dict[str, str]) -> None:
        part = self.parts[store]
        if isinstance(part, NatsPart):
            link = await proxy.open(instance.name, store, Address(self.layout.nats_port))
            own["SOMA_NATS_URL"] = f"nats://{link.address}"
            return
        assert isinstance(part, PostgresPart)
        socket_path = part.server.socket_directory / f".s.PGSQL.{PORT}"
        link = await proxy.open(instance.name, store, Address(path=str(socket_path)))
        role = next(role for role in SERVICE_ROLES if role.service == instance.service.name)
        for variable, user in (("SOMA_POSTGRES_DSN", role.user), ("SOMA_POSTGRES_OWNER_DSN", role.owner)):
            own[variable] = f"postgresql://{user}@{link.address}/{DATABASE}?sslmode=disable"

    async def stop(self) -> None:
        """End every part, whatever state a test has left it in."""
        if self.proxy is not None:
            self.proxy.heal()
        for keeper in self._keepers:
            keeper.cancel()
        await asyncio.gather(*self._keepers, return_exceptions=True)
        running = [name for name, part in self.parts.items() if part.process and part.process.exit_code is None]
        for name in running:
            self.thaw(name)
        for rank in sorted({self.parts[name].stop_rank for name in running}):
            await asyncio.gather(*(self.parts[name].stop() for name in running if self.parts[name].stop_rank == rank))
        if self.proxy is not None:
            await self.proxy.stop()

    async def _keep(self, part: Part) -> None:
        needed = [n for n in self.parts if {n, n.rpartition("-")[0]} & set(part.start_after)]
        await asyncio.gather(*(self._up[name].wait() for name in needed))
        while True:
            await self._may_start[part.name].wait()
            try:
                await part.start()
            except PartFailed as failure:
                if part.process is None:
                    raise
                # What it needs may be away just now: it is tried again, as by the supervisor.
                self.failed_starts.append(f"{part.name} did not start: {failure}")
                self._expected.add(part.process.pid)
                part.process.send(signal.SIGKILL)
            else:
                self._up[part.name].set()
            self._environment.get(part.name, {}).pop(FAILPOINTS, None)
            assert part.process is not None
            code = await part.process.ended()
            self._up[part.name].clear()
            if part.process.pid not in self._expected:
                self.deaths.append(f"{part.name} ended with {code}: {part.process.output_tail()}")
            await asyncio.sleep(RESTART_AFTER_S)


@asynccontextmanager
async def faulty_stack(
    replicas: Mapping[str, int] | None = None,
    environment: Mapping[str, Mapping[str, str]] | None = None,
    tools: Sequence[WitnessTool] = (BOOK, CHARGE),
    *,
    rule: Callable[[RecordedCall], Reply] = errand,
    tool_rule: Callable[[RecordedToolCall], ToolAnswer] = give_back,
    tenants: Sequence[str] = TENANTS,
    module: str = MODULE,
    links: bool = False,
    step_timeout_ms: int = 0,
) -> AsyncIterator[FaultyStack]:
    """A stack in a directory of its own with tenants and agents; `environment` by service or instance.

    `rule` and `tool_rule` are how the clerk's model and tools answer, `module` is the Python module that runs a
    service, with `{service}` in place of its name, `step_timeout_ms` that of every agent (0: the product's own). With
    `links` everything that processes say to each other goes through proxies.
    """
    with tempfile.TemporaryDirectory(prefix="soma-chaos-", ignore_cleanup_errors=True) as folder:
        layout = Layout(_free_base(replicas or {}), replicas or {})
        async with ModelServer(rule) as model, ToolServer(tools, tool_rule) as tool_server:
            ours = {
                "cognition": {"SOMA_OPENAI_BASE_URL": model.base_url, "SOMA_OPENAI_API_KEY": "not-checked"},
                "toolgw": {"SOMA_TOOLGW_HTTP_TOOLS_FILE": f"{folder}/tools.json"},
            }
            for name, variables in (environment or {}).items():
                ours[name] = {**ours.get(name, {}), **variables}
            stack = FaultyStack(
                Home(Path(folder) / "home"), layout, model, tool_server, ours,
                tenants=tenants, module=module, links=links, step_timeout_ms=step_timeout_ms,
            )  # fmt: skip
            try:
                await stack.start()
                yield stack
            finally:
                await stack.stop()


def link_names(layout: Layout) -> list[tuple[str, str]]:
    """The links that a stack of this layout has, as (source, server)."""
    names = [(CLIENT, instance.name) for instance in layout.instances("gateway")]
    for instance in layout.instances():
        names += ((instance.name, store) for store in STORES[instance.service.name])
        for target in TARGETS[instance.service.name].values():
            names += ((instance.name, peer.name) for peer in layout.instances(target))
    return names


def _free_base(replicas: Mapping[str, int]) -> int:
    """A base whose ports are free, below those that the system gives to outgoing connections."""
    bases = list(range(12000, 30000, 200))
    random.shuffle(bases)
    return next(base for base in bases if not any(is_taken(port) for port, _ in Layout(base, replicas).ports()))
