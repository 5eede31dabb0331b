"""The whole standalone stack under test, seen from outside: addresses, tokens, stubs, and a hand to hurt its parts.

Two gateways, so that an adapter can meet another one; one of everything else. Models of three kinds: `echo/echo` says
back what it was told, `offline/assistant` calls tools, `openai/witness-1` is a server of this test run that records
who called.
"""

import random
import signal
import uuid
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import grpc
from soma.common.v1.error_reason_pb2 import ErrorReason
from soma.common.v1.message_pb2 import SessionKey
from soma.common.v1.turn_pb2 import ArrivalPolicy, Delivery, LiveEvent, Outcome
from soma.controlplane.v1.agent_service_pb2 import AgentSpec, DeleteAgentRequest
from soma.controlplane.v1.agent_service_pb2_grpc import AgentServiceStub
from soma.gateway.v1.channel_service_pb2 import StreamTurnRequest
from soma.gateway.v1.channel_service_pb2_grpc import ChannelServiceStub
from soma.router.v1.session_service_pb2_grpc import SessionServiceStub
from soma.router.v1.turn_service_pb2_grpc import TurnServiceStub
from soma.toolgw.v1.tool_service_pb2 import ListToolsRequest
from soma.toolgw.v1.tool_service_pb2_grpc import ToolServiceStub

from soma_common.client.channel_client import ChannelClient, text_message
from soma_common.errors import from_rpc_error
from soma_common.grpc.channel import open_channel
from soma_common.testing.eventually import eventually
from soma_common.testing.model_server import Fail, ModelServer, RecordedCall, Reply, Say, obliging
from somastack.auth_material import AuthMaterial
from somastack.home import Home
from somastack.layout import Layout, is_taken
from somastack.provision import provision
from somastack.state import Phase
from somastack.supervisor import StackOptions, Supervisor, running_stack

if TYPE_CHECKING:
    from soma.gateway.v1.channel_service_pb2_grpc import ChannelServiceAsyncStub
    from soma.router.v1.session_service_pb2_grpc import SessionServiceAsyncStub
    from soma.router.v1.turn_service_pb2_grpc import TurnServiceAsyncStub

TENANTS = ("demo", "acme")
ECHO, OFFLINE, WITNESS = "echo", "offline", "witness"
MODELS = {OFFLINE: "offline/assistant", WITNESS: "openai/witness-1", ECHO: "echo/echo"}
RESTART_TIMEOUT_S = 30.0


@dataclass(frozen=True)
class Stack:
    """A running stack with the agents `echo`, `offline` and `witness` in each of its tenants."""

    supervisor: Supervisor
    layout: Layout
    auth: AuthMaterial
    model: ModelServer

    @property
    def gateways(self) -> list[str]:
        """Addresses of the gateways."""
        return self.layout.targets("gateway").split(",")

    def token(self, tenant: str) -> str:
        """Return the token of a tenant's channels."""
        return self.auth.tenant_token_file(tenant).read_text().strip()

    @property
    def admin_token(self) -> str:
        """The administrator's token."""
        return self.auth.admin_token_file.read_text().strip()

    def adapter(
        self,
        channel: str,
        *,
        tenant: str = "demo",
        instance: str = "",
        gateway: int | None = None,
        credit: int = 256,
        on_delivery: Callable[[Delivery], None] | None = None,
        on_live: Callable[[LiveEvent], None] | None = None,
    ) -> ChannelClient:
        """Return an adapter of `channel`, to be entered; it uses one gateway or, by default, any."""
        return ChannelClient(
            ",".join(self.gateways) if gateway is None else self.gateways[gateway],
            token=self.token(tenant),
            tenant=tenant,
            channel=channel,
            instance=instance or f"{channel}-{uuid.uuid4().hex[:8]}",
            credit=credit,
            on_delivery=on_delivery,
            on_live=on_live,
        )

    @asynccontextmanager
    async def channels(self, tenant: str = "demo", gateway: int = 0) -> AsyncIterator["ChannelServiceAsyncStub"]:
        """The bare contract of one gateway."""
        async with self._open(self.gateways[gateway], "gateway", self.token(tenant)) as channel:
            yield ChannelServiceStub(channel)

    @asynccontextmanager
    async def sessions(self, tenant: str = "demo") -> AsyncIterator["SessionServiceAsyncStub"]:
        """The router's sessions, with a tenant's token."""
        async with self._open(self.layout.targets("router"), "router", self.token(tenant)) as channel:
            yield SessionServiceStub(channel)

    @asynccontextmanager
    async def turns(self, tenant: str = "demo") -> AsyncIterator["TurnServiceAsyncStub"]:
        """The router's turns, with a tenant's token."""
        async with self._open(self.layout.targets("router"), "router", self.token(tenant)) as channel:
            yield TurnServiceStub(channel)

    async def add_agent(
        self, tenant: str, agent: str, model: str, tools: Sequence[str] = (), **more: int | ArrivalPolicy.ValueType
    ) -> None:
        """Create an agent, or the tenant too, as an administrator does; `more` are further fields of its spec."""
        spec = AgentSpec(instructions="Answer in one sentence.", model=model, tools=tools, **more)  # type: ignore[arg-type]
        await provision(self.layout.targets("controlplane"), self.admin_token, tenant, agent, spec)

    async def agent_is_known(self, tenant: str, agent: str) -> None:
        """Wait until the agent answers at every gateway: configuration reaches each service by itself."""
        for gateway in range(len(self.gateways)):
            answers = partial(self._answers, tenant, agent, gateway)
            await eventually(answers, 15.0, f"{agent} of {tenant} answers at gateway {gateway}")

    async def _answers(self, tenant: str, agent: str, gateway: int) -> bool:
        key = SessionKey(tenant=tenant, agent=agent, channel="probe", session=uuid.uuid4().hex)
        request = StreamTurnRequest(session=key, idempotency_key="probe", message=text_message("are you there?"))
        async with self.channels(tenant, gateway) as gateways:
            try:
                events = [event async for event in gateways.StreamTurn(request, timeout=10)]
            except grpc.aio.AioRpcError as error:
                if from_rpc_error(error).reason != ErrorReason.ERROR_REASON_AGENT_NOT_FOUND:
                    raise
                return False
        return events[-1].outcome.outcome == Outcome.OUTCOME_FINAL

    async def delete_agent(self, tenant: str, agent: str) -> None:
        """Delete an agent."""
        async with self._open(self.layout.targets("controlplane"), "controlplane", self.admin_token) as channel:
            name = f"tenants/{tenant}/agents/{agent}"
            await AgentServiceStub(channel).DeleteAgent(DeleteAgentRequest(name=name), timeout=10)

    async def tools(self) -> list[str]:
        """Return the names of the tools that the stack comes with."""
        async with self._open(self.layout.targets("toolgw"), "toolgw", self.admin_token) as channel:
            page = await ToolServiceStub(channel).ListTools(
                ListToolsRequest(parent=f"tenants/{TENANTS[0]}"), timeout=10
            )
            return [tool.tool for tool in page.tools]

    def was_asked(self, text: str) -> bool:
        """Tell whether the witness was ever asked something that contains `text`."""
        return any(text in call.last_text for call in self.model.calls)

    async def kill(self, part: str) -> None:
        """Kill -9 a part and wait until the supervisor has started it again."""
        process = self.supervisor.parts[part].process
        assert process is not None
        process.send(signal.SIGKILL)
        await process.ended()
        await eventually(lambda: self._ready_again(part, process.pid), RESTART_TIMEOUT_S, f"{part} is ready again")

    def _ready_again(self, part: str, killed_pid: int) -> bool:
        state = next(state for state in self.supervisor.state.parts if state.name == part)
        return state.phase is Phase.READY and state.process is not None and state.process.pid != killed_pid

    def _open(self, target: str, service: str, token: str) -> grpc.aio.Channel:
        return open_channel(target, token=lambda: token, service=service, wait_for_ready=True)


@asynccontextmanager
async def standing_stack(folder: Path) -> AsyncIterator[Stack]:
    """A stack in `folder` with its tenants and agents, stopped at the end of the block."""
    layout = Layout(_free_base(), replicas={"gateway": 2})
    async with ModelServer(witness) as model:
        options = StackOptions(
            Home(folder),
            layout,
            TENANTS,
            overrides={
                "cognition": {
                    "SOMA_OPENAI_BASE_URL": model.base_url,
                    "SOMA_OPENAI_API_KEY": "not-checked",
                    "SOMA_OFFLINE_WORD_DELAY_MS": "2",
                }
            },
        )
        async with running_stack(options) as supervisor:
            stack = Stack(supervisor, layout, AuthMaterial(options.home), model)
            tools = await stack.tools()
            for tenant in TENANTS:
                for agent, name in MODELS.items():
                    await stack.add_agent(tenant, agent, name, () if agent == ECHO else tools)
                await stack.agent_is_known(tenant, list(MODELS)[-1])  # changes come in order
            yield stack


def witness(call: RecordedCall) -> Reply:
    """How the witness answers: as the user asks it to (`slowly`, `for ever`, `refuse`), else obligingly."""
    match call.last_text.split(":")[0]:
        case "slowly":
            return Say("word " * 30, delay_s=0.1)
        case "for ever":
            return Say("word " * 3000, delay_s=0.1)
        case "refuse":
            return Fail(400, "this model does not like you")
        case _:
            return obliging(call)


def _free_base() -> int:
    """Return a base whose ports are free, below those that the system gives to outgoing connections."""
    bases = list(range(12000, 30000, 200))
    random.shuffle(bases)
    return next(base for base in bases if not any(is_taken(port) for port, _ in Layout(base, {"gateway": 2}).ports()))
