"""Conversations that go on whatever happens to the stack, and what their adapters see of it.

Each session sends its next message when the one before is answered (`ahead=1`) or up to so many earlier (`ahead`).
Session names are chosen so that the sessions of each kind lie on all partitions in turn. Everything that is said begins
with the names of its tenant and session, so that whoever reads it elsewhere is noticed.
"""

from __future__ import annotations

import asyncio
import random
import time
import uuid
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass, field
from itertools import count, cycle, islice, pairwise
from types import TracebackType
from typing import TYPE_CHECKING, Final, Self

from soma.common.v1.turn_pb2 import ArrivalPolicy as Policy
from soma.common.v1.turn_pb2 import Delivery, LiveEvent, Outcome
from soma.gateway.v1.channel_service_pb2 import Receipt
from soma.router.v1.turn_service_pb2 import ListStepsRequest
from soma.router.v1.turn_service_pb2_grpc import TurnServiceStub

from soma_common import ids
from soma_common.client.channel_client import ChannelClient, ClientClosed
from soma_common.errors import ResourceExhausted, Unavailable
from soma_common.grpc.channel import open_channel
from soma_common.ids import SessionName
from soma_common.testing.checker import (
    Journal,
    Story,
    effects_out_of_turn,
    journal_violations,
    mixed_up,
    unread_inputs,
)
from soma_common.testing.eventually import eventually
from soma_common.testing.model_server import RecordedCall
from soma_common.testing.watched import watched_violations
from tests.chaos.controls import Controls
from tests.chaos.stack import CHARGE, CLERK, ECHO, SLOW, TENANTS, FaultyStack
from tests.chaos.watchers import Watchers
from tests.stalls import Stalls

if TYPE_CHECKING:
    from soma.router.v1.turn_service_pb2_grpc import TurnServiceAsyncStub

ENQUEUE: Final = Policy.ARRIVAL_POLICY_ENQUEUE
PARTITIONS: Final = 8
PATIENCE_S: Final = 60.0
ANSWERED_WITHIN_S: Final = 30.0
CANCEL_WITHIN_S: Final = 0.15
READ_AT_ONCE: Final = 16


@dataclass(frozen=True)
class Mix:
    """How many sessions talk to each agent in each tenant, and how fast."""

    echo: int = 8
    slow: int = 4
    clerk: int = 2
    pause_s: float = 0.15
    """Mean pause of a session after an answer."""
    ahead: int = 1
    """Messages of a session that may be unanswered."""
    repeat: float = 0.05
    """Part of the messages that are sent twice, under the same key."""
    cancel: float = 0.0
    """Part of the messages that are followed by a cancel."""
    policies: tuple[Policy.ValueType, ...] = (Policy.ARRIVAL_POLICY_UNSPECIFIED,)
    """Arrival policies, one of which each message has by chance; unspecified is the agent's own, which is enqueue."""
    interrupt: float = 0.0
    """Part of the messages after which somebody interrupts their session by hand."""
    pause: float = 0.0
    """Part of the messages after which somebody pauses their session for a moment."""
    nack: float = 0.0
    """Part of the deliveries that their adapter gives back once before it takes them."""
    watch: float = 0.0
    """Part of the messages whose turn somebody watches."""


class NotNow(Exception):
    """An adapter cannot take a delivery just now."""


@dataclass
class Load:
    """Running conversations; an async context manager. Call `finish` before its end to hold them to the promises."""

    stack: FaultyStack
    mix: Mix = field(default_factory=Mix)
    seed: int = 1
    tenants: tuple[str, ...] = TENANTS
    story: Story = field(default_factory=Story)
    late_labels: bool = False
    """A router of release 0.1 may write: it journals a step under the dispatch that its turn has by the time that it is
    written, which may be a later one than that which proposed it.
    """

    def __post_init__(self) -> None:
        self.channel = f"chaos-{uuid.uuid4().hex[:12]}"
        self.arrivals: dict[int, list[float]] = defaultdict(list)
        """By partition: when an outcome reached its adapter (monotonic)."""
        self.session_arrivals: dict[SessionName, list[float]] = {}
        """The same by session."""
        self.receipts: list[float] = []
        """When receipts came (monotonic)."""
        self.drain_s = 0.0
        """How long the last open message took to be answered after the last was sent."""
        self.drain_stalled_s = 0.0
        """How much of that the machine stood still."""
        self.stalls = Stalls()
        self.repeated = 0
        """Deliveries that came to a second adapter instance after the first one had them."""
        self.resent = 0
        """Messages that were sent again under their key."""
        self.watchers = Watchers(self.stack, self.channel)
        self.controls = Controls(self.stack)
        self.patience_s = PATIENCE_S
        """How long a sender tries to get a message stored."""
        self._shown: dict[bytes, str] = {}
        self._given_back: set[bytes] = set()
        self._random = random.Random(self.seed)
        self._clients: dict[str, ChannelClient] = {}
        self._helpers: dict[str, list[ChannelClient]] = defaultdict(list)
        self._waiting: dict[bytes, asyncio.Event] = {}
        self._stopping = asyncio.Event()
        self._may_speak = asyncio.Event()
        self._may_speak.set()
        self._sessions: list[asyncio.Task[None]] = []
        self._exit = AsyncExitStack()

    async def __aenter__(self) -> Self:
        await self._exit.enter_async_context(self.stalls)
        for tenant in self.tenants:
            await self.connect(tenant)
        for name in self._names():
            self.session_arrivals[name] = []
            self._sessions.append(asyncio.create_task(self._converse(name), name=str(name)))
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stopping.set()
        for session in self._sessions:
            session.cancel()
        await asyncio.gather(*self._sessions, return_exceptions=True)
        await self.controls.stop()
        await self.watchers.stop()
        await self._exit.aclose()

    async def connect(self, tenant: str) -> None:
        """Connect the tenant's adapter, again if it was disconnected."""
        await self._use(tenant, credit=256)

    async def disconnect(self, tenant: str) -> None:
        """Leave the tenant without an adapter: what is sent from here on goes over a stream that takes no answers."""
        await self._use(tenant, credit=0)

    def client(self, tenant: str) -> ChannelClient:
        """The stream over which the tenant's messages go."""
        return self._clients[tenant]

    async def join(self, tenant: str) -> None:
        """A further adapter instance of the tenant takes answers."""
        self._helpers[tenant].append(await self._new_client(tenant, credit=64))

    async def leave(self, tenant: str) -> None:
        """The adapter instance that joined first leaves; its sessions go to the others."""
        if self._helpers[tenant]:
            await self._helpers[tenant].pop(0).close()

    async def _use(self, tenant: str, credit: int) -> None:
        former = self._clients.get(tenant)
        self._clients[tenant] = await self._new_client(tenant, credit)
        if former is not None:
            await former.close()

    async def _new_client(self, tenant: str, credit: int) -> ChannelClient:
        instance = f"{tenant}-{uuid.uuid4().hex[:8]}"

        def on_live(event: LiveEvent) -> None:
            self.story.live(event, f"{instance} stream {client.streams}")

        client = ChannelClient(
            self.stack.gateways,
            token=self.stack.token(tenant),
            tenant=tenant,
            channel=self.channel,
            instance=instance,
            credit=credit,
            on_delivery=lambda delivery: self._arrived(tenant, instance, delivery),
            on_live=on_live,
        )
        return await self._exit.enter_async_context(client)

    # ---- watching

    async def flows(self, each: int = 3, timeout_s: float = 45.0) -> None:
        """Wait until every partition has had so many more outcomes from now on."""
        before = {partition: len(self.arrivals[partition]) for partition in self.partitions}

        def more() -> bool:
            return all(len(self.arrivals[p]) >= before[p] + each for p in self.partitions)

        await eventually(more, timeout_s, f"{each} outcomes on each partition")

    @property
    def partitions(self) -> range:
        """Partitions that have sessions."""
        return range(min(PARTITIONS, max(self.mix.echo, self.mix.slow, self.mix.clerk) * len(self.tenants)))

    @property
    def last_arrival(self) -> float:
        """When the newest outcome reached its adapter (monotonic)."""
        return max((moments[-1] for moments in self.arrivals.values() if moments), default=0.0)

    def silence(self, since: float) -> float:
        """The longest time from `since` (monotonic) on without an outcome on one partition, in seconds; the worst
        partition counts. It begins with the fault, so it is no shorter than the time to the first new outcome, and it
        counts a stall that follows.
        """
        return max(_longest_gap(since, self.arrivals[partition]) for partition in self.partitions)

    def session_silence(self, since: float) -> float:
        """The same, of the worst session: what a turn feels whose brain is gone while others answer for its
        partition.
        """
        return max(_longest_gap(since, moments) for moments in self.session_arrivals.values())

    # ---- pauses

    async def hush(self) -> None:
        """Nobody says anything until `speak`; returns when everything is answered."""
        self._may_speak.clear()
        await asyncio.sleep(0.3)
        await eventually(lambda: not self.story.unanswered(), ANSWERED_WITHIN_S, "everything is answered")

    def speak(self) -> None:
        """Conversations go on."""
        self._may_speak.set()

    # ---- the end

    async def finish(self) -> dict[str, int]:
        """Send nothing more, wait for what is open, and assert every promise; returns what was counted."""
        problems = await self.settle()
        assert not problems, f"{len(problems)} promises broken:\n" + "\n".join(problems[:20])
        return self.story.counts()

    async def settle(self, answered_within_s: float = ANSWERED_WITHIN_S) -> list[str]:
        """Send nothing more, wait for what is open, and return every promise that was broken."""
        self._stopping.set()
        self._may_speak.set()
        stopped_at = time.monotonic()
        for answered in list(self._waiting.values()):
            answered.set()  # Who waits for an answer need not: the story does.
        await asyncio.wait(self._sessions, timeout=self.patience_s)
        for session in self._sessions:
            if session.done():
                session.result()
        await self.controls.finish()
        with suppress(AssertionError):  # The checker names what is not answered.
            await eventually(lambda: not self.story.unanswered(), answered_within_s)
        self.drain_s = time.monotonic() - stopped_at
        self.drain_stalled_s = self.stalls.since(stopped_at)
        await self.watchers.finish()
        await asyncio.sleep(0.3)  # What comes twice or too late comes now.
        return self.story.violations() + await self._journal_problems()

    async def journals(self, agent: str) -> dict[str, Journal]:
        """The journals of all answered turns of an agent, by turn in hex, as the router's API gives them."""
        names = [name for name, _ in self.story.turns() if name.session.agent == agent]
        journals: dict[str, Journal] = {}
        room = asyncio.Semaphore(READ_AT_ONCE)
        token = self.stack.admin_token

        async def read(stub: TurnServiceAsyncStub, name: ids.TurnName) -> None:
            async with room:
                page = await stub.ListSteps(ListStepsRequest(parent=str(name), page_size=1000), timeout=10)
                journals[name.turn_id.hex()] = list(page.steps)

        async with open_channel(
            self.stack.routers, token=lambda: token, service="router", wait_for_ready=True
        ) as channel:
            stub = TurnServiceStub(channel)
            await asyncio.gather(*(read(stub, name) for name in names))
        return journals

    async def _journal_problems(self) -> list[str]:
        journals = await self.journals(CLERK)
        calls = [call for call in self.stack.model.calls if call.turn in journals]
        tool_calls = [call for call in self.stack.tools.calls if call.turn in journals]
        problems = journal_violations(
            journals, [(call.turn, call.step) for call in calls], tool_calls, frozenset({CHARGE.name})
        )
        ours = [call for call in self.stack.tools.calls if call.session.get("channel") == self.channel]
        answered = [name.turn_id.hex() for name, _ in self.story.turns()]
        problems += effects_out_of_turn(ours, frozenset({CHARGE.name}), answered)
        finals = [
            (name.turn_id.hex(), self.story.texts(delivery, name.session))
            for name, delivery in self.story.turns()
            if name.session.agent == CLERK and delivery.outcome == Outcome.OUTCOME_FINAL
        ]
        read: dict[tuple[str, int, int], Sequence[str]] = {
            (call.turn, call.step, call.dispatch): _read_by(call) for call in calls
        }
        if self.late_labels:
            read |= _under_later_labels(read, journals)
        owners = {name.turn_id.hex(): _opening(name.session) for name, _ in self.story.turns()}
        problems += unread_inputs(finals, journals, read)
        problems += mixed_up(((call.turn, _read_by(call)) for call in calls), owners)
        if self.watchers.watched:
            journals |= await self.journals(SLOW)
            answers = {name.turn_id.hex(): delivery for name, delivery in self.story.turns()}
            problems += watched_violations(self.watchers.watched, journals, answers)
        return problems

    # ---- conversations

    def _names(self) -> Iterator[SessionName]:
        for agent, sessions in ((ECHO, self.mix.echo), (SLOW, self.mix.slow), (CLERK, self.mix.clerk)):
            for number in range(sessions * len(self.tenants)):
                tenant = self.tenants[number % len(self.tenants)]
                yield _name_in(number % PARTITIONS, tenant, agent, self.channel)

    async def _converse(self, name: SessionName) -> None:
        open_answers: list[asyncio.Event] = []
        for number in count(1):
            await asyncio.sleep(self.mix.pause_s * self._random.uniform(0.5, 1.5))
            while len(open_answers) >= self.mix.ahead and not self._stopping.is_set():
                await open_answers.pop(0).wait()
            await self._may_speak.wait()
            if self._stopping.is_set():
                return
            open_answers.append(await self._say(name, f"k{number}", f"{_opening(name)} says {number}"))

    async def _say(self, name: SessionName, key: str, text: str) -> asyncio.Event:
        """Send one message; returns what is set when it is answered."""
        policy = self._random.choice(self.mix.policies)
        right = _right_answer(name.agent, text)
        ending = None if name.agent == SLOW else right
        message_id = self.story.sent(name, key, text, right, policy or ENQUEUE, ending)
        answered = self._waiting[message_id] = asyncio.Event()
        try:
            receipt = await self._send(name, key, text, policy)
        except ResourceExhausted:
            answered.set()  # It is not stored.
        except Unavailable:
            self.story.not_known(message_id, name)
            answered.set()
        else:
            self.receipts.append(time.monotonic())
            self.story.accepted(name, key, receipt.message_id)
            if self._random.random() < self.mix.watch:
                self.watchers.watch(name, key, text, policy, self._random.uniform(0.1, 3.0))
            if self._random.random() < self.mix.repeat:
                self.resent += 1
                again = await self._send(name, key, text, policy)
                assert again.message_id == receipt.message_id, "the same key and content is the same message"
            if self.session_arrivals[name] and self._random.random() < self.mix.interrupt:
                self.story.interrupted(name)
                self.controls.interrupt(name, key)
            if self.session_arrivals[name] and self._random.random() < self.mix.pause:
                self.controls.pause(name, key)
            if self._random.random() < self.mix.cancel:
                await asyncio.sleep(self._random.uniform(0, CANCEL_WITHIN_S))
                self.story.cancelled(name)
                await self._cancel(name, f"cancel-{key}")
        return answered

    async def _send(self, name: SessionName, key: str, text: str, policy: Policy.ValueType) -> Receipt:
        while True:
            try:
                return await self._clients[name.tenant].send(
                    name.agent, name.session, text, idempotency_key=key, policy=policy, patience_s=self.patience_s
                )
            except ClientClosed:  # Another stream has taken its place.
                await asyncio.sleep(0.05)

    async def _cancel(self, name: SessionName, key: str) -> None:
        while True:
            try:
                await self._clients[name.tenant].cancel(
                    name.agent, name.session, idempotency_key=key, patience_s=self.patience_s
                )
                return
            except ClientClosed:
                await asyncio.sleep(0.05)

    def _arrived(self, tenant: str, instance: str, delivery: Delivery) -> None:
        if self._random.random() < self.mix.nack and delivery.delivery_id not in self._given_back:
            self._given_back.add(delivery.delivery_id)
            raise NotNow
        if self._shown.setdefault(delivery.delivery_id, instance) != instance:
            # Another adapter had it before, and its acknowledgement was lost: as the contract says, the application
            # drops what it knows. What comes twice to one adapter is for the checker.
            self.repeated += 1
            return
        self.story.delivered(tenant, self.channel, delivery)
        name = SessionName(tenant, delivery.agent, self.channel, delivery.session)
        now = time.monotonic()
        self.arrivals[ids.partition_of(name.id, PARTITIONS)].append(now)
        self.session_arrivals.setdefault(name, []).append(now)
        for message_id in delivery.message_ids:
            if message_id in self._waiting:
                self._waiting.pop(message_id).set()


def _longest_gap(since: float, moments: list[float]) -> float:
    points = [since, *(at for at in moments if at > since), time.monotonic()]
    return max(b - a for a, b in pairwise(points))


def _name_in(partition: int, tenant: str, agent: str, channel: str) -> SessionName:
    """A session name that lies on the partition."""
    while True:
        name = SessionName(tenant, agent, channel, f"s{partition}-{uuid.uuid4().hex[:6]}")
        if ids.partition_of(name.id, PARTITIONS) == partition:
            return name


def _opening(name: SessionName) -> str:
    """How everything begins that is said in a session."""
    return f"{name.tenant}/{name.session}"


def _read_by(call: RecordedCall) -> list[str]:
    """What the model was given of the users' messages."""
    return [str(message["content"]) for message in call.messages if message.get("role") == "user"]


def _right_answer(agent: str, text: str) -> str:
    rules: dict[str, Callable[[str], str]] = {
        ECHO: lambda said: said,
        SLOW: lambda said: " ".join(islice(cycle(said.split()), 6)),
        CLERK: lambda said: f"done: {said}",
    }
    return rules[agent](text)


def _under_later_labels(
    read: Mapping[tuple[str, int, int], Sequence[str]], journals: Mapping[str, Journal]
) -> dict[tuple[str, int, int], Sequence[str]]:
    """What the model read for last steps of whose own dispatch it was not called, by the newest dispatch before."""
    found = {}
    for turn, journal in journals.items():
        for last in journal[-1:]:
            if (turn, last.number, last.dispatch) in read:
                continue
            before = [d for d in range(1, last.dispatch) if (turn, last.number, d) in read]
            if before:
                found[turn, last.number, last.dispatch] = read[turn, last.number, before[-1]]
    return found
