"""What a message waits for, from what the services say."""

from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import grpc
import pytest
from soma.common.v1.turn_pb2 import ArrivalPolicy, LiveEvent, QueueState, WaitingMessage
from soma.controlplane.v1.agent_service_pb2 import Agent, AgentSpec, GetAgentResponse
from soma.controlplane.v1.tenant_service_pb2 import GetTenantResponse, Tenant
from soma.router.v1.session_service_pb2 import GetSessionResponse, Session, WatchSessionResponse

from soma_common.errors import SomaError
from soma_common.ids import SessionName
from somastack import waiting
from somastack.home import Home
from somastack.remote import Remote
from somastack.waiting import what_holds

OURS = bytes(15) + b"o"
NAME = SessionName("demo", "slow", "cli", "s")
ENQUEUE, ACCUMULATE = ArrivalPolicy.ARRIVAL_POLICY_ENQUEUE, ArrivalPolicy.ARRIVAL_POLICY_ACCUMULATE


def queue(place: int, count: int | None = None) -> QueueState:
    """A queue in which ours has that place; 0: none."""
    messages = [WaitingMessage(message_id=bytes(15) + bytes([number]), place=number) for number in range(1, place)]
    if place:
        messages.append(WaitingMessage(message_id=OURS, place=place))
    return QueueState(messages=messages, count=len(messages) if count is None else count)


class Watch:
    """A watch that shows the queue and goes on."""

    def __init__(self, queued: QueueState) -> None:
        self._queued, self.left = queued, False

    async def __aiter__(self) -> AsyncIterator[WatchSessionResponse]:
        yield WatchSessionResponse(event=LiveEvent(queued=self._queued))
        raise AssertionError("more than the queue was read")

    def cancel(self) -> None:
        self.left = True


@dataclass
class Services:
    """A stack that says this; at once the stubs of all its services."""

    home: Home
    queued: QueueState = field(default_factory=lambda: queue(1))
    tenant: Tenant = field(default_factory=Tenant)
    agent: Agent = field(default_factory=Agent)
    session: Session | None = field(default_factory=Session)
    failure: grpc.StatusCode | None = None

    def tenants(self) -> "AbstractAsyncContextManager[Services]":
        return nullcontext(self)

    agents = tenants

    def sessions(self, _tenant: str) -> "AbstractAsyncContextManager[Services]":
        return nullcontext(self)

    async def GetTenant(self, _request: object) -> GetTenantResponse:
        return GetTenantResponse(tenant=self.tenant)

    async def GetAgent(self, _request: object) -> GetAgentResponse:
        return GetAgentResponse(agent=self.agent)

    async def GetSession(self, _request: object) -> GetSessionResponse:
        if self.failure is not None or self.session is None:
            code = self.failure or grpc.StatusCode.NOT_FOUND
            raise grpc.aio.AioRpcError(code, grpc.aio.Metadata(), grpc.aio.Metadata(), "no")
        return GetSessionResponse(session=self.session)

    def WatchSession(self, _request: object) -> Watch:
        return Watch(self.queued)

    async def hold(self, name: SessionName = NAME, policy: ArrivalPolicy.ValueType = ENQUEUE) -> str:
        """What they say our message waits for, with the commands as they are in the home of a person."""
        return (await what_holds(cast(Remote, self), name, OURS, policy)).replace(f" --home {self.home.path}", "")


@pytest.fixture
def services(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Services:
    monkeypatch.setattr("somastack.home.callable_name", lambda name: name)
    return Services(Home(tmp_path))


async def test_a_message_that_was_taken_waits_for_nothing(services: Services) -> None:
    services.queued = queue(0)
    services.agent.paused = True
    assert await services.hold() == ""


async def test_every_pause_is_named_with_what_ends_it(services: Services) -> None:
    services.agent.paused = True
    assert await services.hold() == "agent slow is paused (somastack agents resume slow)"
    services.tenant.paused = True
    services.session = Session(paused=True, running_turn="a turn")
    assert await services.hold(SessionName("acme", "slow", "cli", "s")) == (
        "tenant acme is paused (somastack tenants resume acme) "
        "and agent slow is paused (somastack agents resume slow --tenant acme) "
        "and the session is paused (somastack sessions resume slow/cli/s --tenant acme)"
    )
    services.session = None  # A pause also explains why no router has the session.
    assert (await services.hold()).startswith("tenant demo is paused")


@pytest.mark.parametrize(
    ("queued", "running", "said"),
    [
        (queue(1), "a turn", "behind the running turn"),
        (queue(2), "a turn", "behind the running turn and 1 message"),
        (queue(3), "", "behind 2 messages"),
        (queue(0, count=70), "", "behind 69 messages"),
    ],
)
async def test_who_was_first_is_counted(services: Services, queued: QueueState, running: str, said: str) -> None:
    services.queued, services.session = queued, Session(running_turn=running)
    assert await services.hold() == said


async def test_a_message_that_gathers_says_so(services: Services) -> None:
    assert await services.hold(policy=ACCUMULATE) == "further messages may join it (policy accumulate)"
    services.agent = Agent(spec=AgentSpec(arrival_policy=ACCUMULATE))
    assert "accumulate" in await services.hold(policy=ArrivalPolicy.ARRIVAL_POLICY_UNSPECIFIED)
    assert await services.hold() == "no turn has begun yet (somastack sessions get slow/cli/s --waiting)"


async def test_a_message_that_no_router_has_points_to_the_stack(services: Services) -> None:
    services.session = None
    assert await services.hold() == "no router has it yet (somastack status)"


async def test_services_that_do_not_answer_are_not_waited_for(
    services: Services, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def never(_request: object) -> Any:
        raise TimeoutError

    monkeypatch.setattr(waiting, "LOOK_S", 0.1)
    monkeypatch.setattr(services, "GetAgent", never)
    assert await services.hold() == "no answer from the services yet (somastack status)"


async def test_a_refusal_is_an_error_of_ours(services: Services) -> None:
    services.failure = grpc.StatusCode.PERMISSION_DENIED
    with pytest.raises(SomaError):
        await services.hold()
