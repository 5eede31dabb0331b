"""For each guard the fault that it is there for, aimed so that its absence shows within a minute or two."""

from __future__ import annotations

import asyncio
import random
import shutil
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Final

from soma.common.v1.error_reason_pb2 import ErrorReason
from soma.common.v1.turn_pb2 import ArrivalPolicy as Policy
from soma.common.v1.turn_pb2 import Outcome

from soma_common.testing.eventually import eventually
from soma_common.testing.model_server import CallTools, Hang, RecordedCall, Reply, Say, ToolRequest
from soma_common.testing.tool_server import Give, RecordedToolCall, ToolAnswer, give_back
from tests.chaos.load import Load, Mix
from tests.chaos.stack import CLIENT, FaultyStack, errand

ANSWERED_WITHIN_S: Final = 12.0
"""After the last fault is over; beyond it a message counts as never answered."""
FLOWS_WITHIN_S: Final = 30.0
SET_ASIDE_WITHIN_S: Final = 40.0
POISON: Final[list[Callable[[str], bool]]] = []
"""Which messages kill, while some do."""
PAIR: Final = {"router": 2}
TWO_PARTITIONS: Final = {"gateway": {"SOMA_PARTITIONS": "2"}, "router": {"SOMA_PARTITIONS": "2"}}
"""One for each of two routers: whatever a frozen one has in hand is of the partition that the other one takes."""
ECHOES: Final = Mix(echo=8, slow=0, clerk=0, pause_s=0.1)
ERRANDS: Final = Mix(echo=0, slow=0, clerk=6, pause_s=0.1)
MANY_ERRANDS: Final = Mix(echo=0, slow=0, clerk=48, pause_s=2.0)
"""Not in step: at any moment some of them begin."""

Hurt = Callable[[FaultyStack, Load, random.Random], Awaitable[None]]


@dataclass(frozen=True)
class Experiment:
    """How a guard's absence is to show."""

    guards: str
    """Taken away together, separated by blanks."""
    fault: str
    hurt: Hurt
    """The fault, once, while conversations go on; all of it healed at the end."""
    mix: Mix = ECHOES
    replicas: Mapping[str, int] = field(default_factory=dict)
    environment: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    rule: Callable[[RecordedCall], Reply] = errand
    tool_rule: Callable[[RecordedToolCall], ToolAnswer] = give_back
    step_timeout_ms: int = 0
    slow_commits: bool = False
    one_adapter_only: bool = False
    """Nothing may be shown at two adapters: none of them leaves."""
    within_s: float = 120.0

    async def strike(self, stack: FaultyStack, seed: int) -> list[str]:
        """One try; returns what the checker says."""
        async with Load(stack, self.mix, seed=seed, tenants=("demo",)) as load:
            load.patience_s = ANSWERED_WITHIN_S
            try:
                await load.flows(each=1, timeout_s=FLOWS_WITHIN_S)
                await self.hurt(stack, load, random.Random(seed))
            except (AssertionError, TimeoutError) as stuck:
                return [f"nothing goes on: {stuck!r}"]
            assert stack.proxy is not None
            stack.proxy.heal()
            problems = await load.settle(ANSWERED_WITHIN_S)
            if self.one_adapter_only and load.repeated:
                problems.append(f"{load.repeated} deliveries were shown at two adapters, and none had left")
        for part in stack.parts:
            stack.let_up(part)
            await stack.is_up(part)
        return problems


# ---- what processes can die of


async def _brain_dies_after_the_tool(stack: FaultyStack, _: Load, drawn: random.Random) -> None:
    await stack.arm("cognition-0", f"cognition.after_tool_before_result=kill@{drawn.randint(2, 6)}")
    await stack.hit("cognition-0", "cognition.after_tool_before_result")
    await stack.is_up("cognition-0")


async def _brains_die(stack: FaultyStack, load: Load, drawn: random.Random) -> None:
    for brain in ("cognition-0", "cognition-1"):
        await asyncio.sleep(drawn.uniform(0.3, 0.6))
        await stack.kill9(brain)
        await stack.is_up(brain)
    await asyncio.sleep(0.5)


async def _router_dies(stack: FaultyStack, load: Load, drawn: random.Random) -> None:
    for _ in range(2):
        await asyncio.sleep(drawn.uniform(0.2, 0.6))
        await stack.kill9("router-0")
        await stack.is_up("router-0")
        await load.flows(each=1, timeout_s=FLOWS_WITHIN_S)


async def _routers_die_far_from_the_store(stack: FaultyStack, load: Load, drawn: random.Random) -> None:
    """What they have sent to the database and not heard of is lost with them."""
    for router in ("router-0", "router-1"):
        link = stack.link(router, "postgres")
        link.delay(120)
        await asyncio.sleep(drawn.uniform(1.0, 1.5))
        link.cut(refuse=True)
        await stack.kill9(router)
        link.heal()
        await stack.is_up(router)


# ---- late and lost


async def _calls_come_late(stack: FaultyStack, load: Load, drawn: random.Random) -> None:
    stack.link("cognition-0", "toolgw-0").delay(drawn.uniform(150, 400))
    await asyncio.sleep(4.0)


async def _nothing(_stack: FaultyStack, _load: Load, _drawn: random.Random) -> None:
    await asyncio.sleep(3.0)


async def _a_commit_comes_late(stack: FaultyStack, load: Load, drawn: random.Random) -> None:
    """One router is cut off from the database for about a lease; what it had sent arrives when the other one, whose
    lane is slow, has just taken over. Then it dies, so that nothing makes the other one look again.
    """
    frozen, other = drawn.choice((("router-0", "router-1"), ("router-1", "router-0")))
    stack.link(other, "nats").delay(700)
    await asyncio.sleep(1.0)
    stack.link(frozen, "postgres").blackhole()
    await _taken_over(stack, other, drawn.uniform(0.0, 0.4))
    stack.link(frozen, "postgres").heal()
    await _ended_for_good(stack, frozen)


async def _a_commit_comes_between_load_and_term(stack: FaultyStack, load: Load, drawn: random.Random) -> None:
    frozen, _ = drawn.choice((("router-0", "router-1"), ("router-1", "router-0")))
    await asyncio.sleep(0.5)
    stack.link(frozen, "postgres").blackhole()
    await asyncio.sleep(drawn.uniform(3.3, 5.5))
    stack.link(frozen, "postgres").heal()
    await _ended_for_good(stack, frozen)


async def _a_frozen_router_has_a_slow_commit(stack: FaultyStack, load: Load, drawn: random.Random) -> None:
    """The database works on a commit for longer than a lease, while its router stands still."""
    frozen, _ = drawn.choice((("router-0", "router-1"), ("router-1", "router-0")))
    database = await stack.database()
    try:
        await database.execute("INSERT INTO witness.slow VALUES ($1)", f"{frozen}%")
        await asyncio.sleep(drawn.uniform(0.2, 0.4))
        stack.freeze(frozen)
        await database.execute("DELETE FROM witness.slow")
    finally:
        await database.close()
    await asyncio.sleep(6.0)
    stack.thaw(frozen)
    await _ended_for_good(stack, frozen)


async def _taken_over(stack: FaultyStack, router: str, later_s: float) -> None:
    """Wait until a router has all partitions, and a little longer."""
    async with asyncio.timeout(15):
        while (await stack.metrics(router)).get("soma_router_partitions_owned") != 2:
            await asyncio.sleep(0.02)
    await asyncio.sleep(later_s)


async def _ended_for_good(stack: FaultyStack, router: str) -> None:
    """What arrived late has been done; its sender takes no partition back before the try is over."""
    await asyncio.sleep(0.3)
    stack.hold_down(router)
    await stack.kill9(router)


async def _store_is_cut_off(stack: FaultyStack, _load: Load, _drawn: random.Random) -> None:
    """What is on its way to the database never arrives."""
    link = stack.link("router-0", "postgres")
    for _ in range(4):
        link.blackhole()
        await asyncio.sleep(0.3)
        link.cut()
        link.heal()
        await asyncio.sleep(0.5)


async def _starts_are_lost_far_from_brains(stack: FaultyStack, _load: Load, drawn: random.Random) -> None:
    """Commits take their time, so that a brain is at work on turns whose start is lost; what it says arrives later."""
    store, brain = stack.link("router-0", "postgres"), stack.link("router-0", "cognition-0")
    brain.delay(drawn.uniform(400, 700))
    for _ in range(4):
        store.delay(150)
        await asyncio.sleep(drawn.uniform(1.5, 2.5))
        store.cut()
        store.heal()
        await asyncio.sleep(1.0)
    brain.heal()
    await asyncio.sleep(1.0)


async def _one_router_cannot_commit(stack: FaultyStack, load: Load, drawn: random.Random) -> None:
    frozen = drawn.choice(("router-0", "router-1"))
    stack.link(frozen, "postgres").blackhole()
    await asyncio.sleep(5.0)
    stack.link(frozen, "postgres").heal()


async def _the_lane_goes_back(stack: FaultyStack, load: Load, _: random.Random) -> None:
    """NATS comes back from a copy that is a little older. Nothing is lost by that, as everything had been ingested."""
    store, copy = stack.home.nats, stack.home.path / "nats-copy"
    await load.hush()
    await _without_nats(stack, lambda: shutil.copytree(store, copy, dirs_exist_ok=True))
    load.speak()
    await load.flows(each=4, timeout_s=FLOWS_WITHIN_S)
    await load.hush()

    def back() -> None:
        shutil.rmtree(store / "data")
        shutil.copytree(copy / "data", store / "data")

    stack.link("router-0", "nats").blackhole()
    await _without_nats(stack, back)
    load.speak()
    await asyncio.sleep(2.0)
    stack.link("router-0", "nats").heal()
    await asyncio.sleep(2.0)


async def _without_nats(stack: FaultyStack, work: Callable[[], object]) -> None:
    stack.hold_down("nats")
    await stack.kill9("nats")
    await asyncio.to_thread(work)
    stack.let_up("nats")
    await stack.is_up("nats")


# ---- deliveries


async def _nobody_takes_answers_of_a_dying_router(stack: FaultyStack, load: Load, _: random.Random) -> None:
    await load.disconnect("demo")
    await asyncio.sleep(1.5)
    await stack.kill9("router-0")
    await stack.is_up("router-0")
    await load.connect("demo")


async def _answers_are_on_their_way_when_all_die(stack: FaultyStack, load: Load, _: random.Random) -> None:
    stack.link(CLIENT, "gateway-0").blackhole(there=False)
    await asyncio.sleep(0.7)
    await asyncio.gather(stack.kill9("router-0"), stack.kill9("gateway-0"))
    stack.link(CLIENT, "gateway-0").cut()
    stack.link(CLIENT, "gateway-0").heal()
    await asyncio.gather(stack.is_up("router-0"), stack.is_up("gateway-0"))


async def _two_adapters_and_a_dying_router(stack: FaultyStack, load: Load, drawn: random.Random) -> None:
    await load.join("demo")
    await load.join("demo")
    await load.flows(each=2, timeout_s=FLOWS_WITHIN_S)
    await _router_dies(stack, load, drawn)


# ---- turns


async def _brains_are_far_away(stack: FaultyStack, load: Load, _: random.Random) -> None:
    for brain in ("cognition-0", "cognition-1"):
        stack.link("router-0", brain).delay(700)
    await asyncio.sleep(2.5)
    for brain in ("cognition-0", "cognition-1"):
        stack.link("router-0", brain).heal()
    await asyncio.sleep(1.0)


async def _a_message_kills_its_router(stack: FaultyStack, load: Load, _: random.Random) -> None:
    """Whenever a brain asks the model about it, until it is set aside."""
    load.story.tolerated = frozenset({ErrorReason.ERROR_REASON_TURN_POISONED})
    kills: list[asyncio.Task[float]] = []
    texts: list[str] = []

    def is_poison(told: str) -> bool:
        if not texts:
            texts.append(told)
        if told == texts[0]:
            kills.append(asyncio.create_task(stack.kill9("router-0")))
        return told == texts[0]

    def set_aside() -> bool:
        return any(delivery.outcome == Outcome.OUTCOME_ERROR for _, delivery in load.story.turns())

    POISON.append(is_poison)
    try:
        await eventually(set_aside, SET_ASIDE_WITHIN_S, "the message that kills is set aside")
    finally:
        POISON.clear()
    await asyncio.gather(*kills)
    await stack.is_up("router-0")


async def _news_comes_late(stack: FaultyStack, load: Load, drawn: random.Random) -> None:
    stack.link("router-0", "cognition-0").delay(drawn.uniform(50, 200))
    await asyncio.sleep(4.0)


def fickle(call: RecordedCall) -> Reply:
    """An errand that is done in another way whenever the model is asked again."""
    reply = errand(call)
    if isinstance(reply, Say):
        return reply
    told = next(m["content"] for m in reversed(call.messages) if m.get("role") == "user")
    return CallTools(*(ToolRequest(tool, {"what": told, "how": call.number}) for tool in ("book", "charge")))


def poisonous(call: RecordedCall) -> Reply:
    """An errand, unless the message is one that kills."""
    told = next(m["content"] for m in reversed(call.messages) if m.get("role") == "user")
    return Hang() if any(is_poison(told) for is_poison in POISON) else errand(call)


def slowly(call: RecordedToolCall) -> ToolAnswer:
    """A tool that takes longer than a commit."""
    return Give(call.arguments, delay_s=1.0)


STEERED: Final = Mix(echo=0, slow=0, clerk=8, pause_s=0.1, ahead=4, policies=(Policy.ARRIVAL_POLICY_STEER,))
QUEUED: Final = Mix(echo=8, slow=0, clerk=0, pause_s=0.03, ahead=30)

EXPERIMENTS: Final = (
    Experiment("tool_key", "brain dies between a tool's effect and its result", _brain_dies_after_the_tool, ERRANDS),
    Experiment(
        "tombstone", "cancels, while calls are late on their way to the tools", _calls_come_late,
        Mix(echo=0, slow=0, clerk=8, pause_s=0.1, cancel=0.8),
    ),
    Experiment(
        "confirm", "routers die far from the database; a model that changes its mind", _routers_die_far_from_the_store,
        ERRANDS, PAIR, rule=fickle, tool_rule=slowly,
    ),
    Experiment("replay", "brains die in the middle of turns", _brains_die, ERRANDS, {"cognition": 2}),
    Experiment(
        "step_cas dispatch_id", "a brain is so far away that its turns count as stuck", _brains_are_far_away,
        ERRANDS, {"cognition": 2}, {"router": {"SOMA_STUCK_MARGIN_S": "0.1"}}, step_timeout_ms=1000,
    ),
    Experiment(
        "withdrawn", "connections to a slow database are cut, brains far away", _starts_are_lost_far_from_brains,
        MANY_ERRANDS, rule=fickle,
    ),
    Experiment("inputs_seen", "steered messages, late on their way to the brain", _news_comes_late, STEERED),
    Experiment(
        "strikes_durable", "a message whose turn kills its router, each time", _a_message_kills_its_router, ERRANDS,
        environment={"router": {"SOMA_MAX_STRIKES": "3"}}, rule=poisonous,
    ),
    Experiment("dedupe", "messages are sent twice under one key", _nothing, Mix(8, 0, 0, repeat=0.5)),
    Experiment(
        "fence cursor_cas", "a commit in the network while another router takes over", _a_commit_comes_late,
        ECHOES, PAIR, TWO_PARTITIONS, within_s=180,
    ),
    Experiment(
        "fence_lock", "router frozen while the database works on its commit", _a_frozen_router_has_a_slow_commit,
        ECHOES, PAIR, TWO_PARTITIONS, slow_commits=True, within_s=180,
    ),
    Experiment(
        "load_after", "a commit in the network while another router takes over", _a_commit_comes_between_load_and_term,
        ECHOES, PAIR, TWO_PARTITIONS, within_s=180,
    ),
    Experiment("term_ends", "connections to the database are cut, again and again", _store_is_cut_off),
    Experiment(
        "purge_committed", "one of two routers cannot reach the database", _one_router_cannot_commit, ECHOES, PAIR,
        {"router": {"SOMA_PURGE_EVERY_S": "0.3"}},
    ),
    Experiment("anchor", "NATS comes back from an older copy of its store", _the_lane_goes_back, within_s=150),
    Experiment(
        "floor_durable", "router dies while nobody takes answers", _nobody_takes_answers_of_a_dying_router,
        Mix(8, 0, 0, 0.1, ahead=100),
    ),
    Experiment(
        "floor_acked", "router and gateway die, answers on their way", _answers_are_on_their_way_when_all_die, QUEUED
    ),
    Experiment("one_unacked", "adapters give deliveries back", _nothing, Mix(8, 0, 0, 0.03, ahead=30, nack=0.1)),
    Experiment(
        "rendezvous", "router dies, and with it acknowledgements; three adapters", _two_adapters_and_a_dying_router,
        QUEUED, one_adapter_only=True,
    ),
    Experiment("client_dedupe", "router dies, and with it acknowledgements", _router_dies, QUEUED),
    Experiment("ack_again", "router dies, and with it acknowledgements", _router_dies, QUEUED),
)  # fmt: skip
