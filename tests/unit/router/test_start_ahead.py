"""Turns that a brain is given while their start is on its way to the store: nothing counts before it is durable."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest
from google.protobuf.message import Message as ProtoMessage
from soma.cognition.v1.cognition_service_pb2 import StartTurn, StopTurn, TurnText
from soma.common.v1.message_pb2 import Message, Part
from soma.router.v1.inbound_pb2 import Inbound

from services.router.application.group import Group, GroupResult
from services.router.domain.turn import Outcome, StepKind
from soma_common import ids
from soma_common.testing.eventually import eventually
from tests.unit.router.builders import AGENT, CHANNEL, TENANT, inbound, names_in
from tests.unit.router.engine import Brain, Engine, running_engine

HERE, THERE = names_in(0, 1)[0], names_in(1, 1)[0]
"""Sessions of two partitions."""
REMEMBERED = 16


@pytest.fixture
async def engine() -> AsyncIterator[Engine]:
    async with running_engine() as engine:
        await warm(engine, HERE, THERE)
        yield engine


async def warm(engine: Engine, *sessions: str) -> None:
    """Sessions with a past, all of it in memory."""
    for session in sessions:
        await answered(engine, inbound(session, "warm"))
    forget(engine)


def forget(engine: Engine) -> None:
    for past in (engine.brain.starts, engine.brain.confirms, engine.brain.stops, engine.ended, engine.live.events):
        past.clear()
    engine.store.steps.clear()


async def answered(engine: Engine, item: Inbound) -> None:
    starts, ended = len(engine.brain.starts), len(engine.ended)
    engine.accept(item)
    engine.answer((await engine.started(starts + 1))[-1], "ok")
    await engine.outcomes(ended + 1)


async def ahead(engine: Engine, *items: Inbound, count: int = 1) -> list[StartTurn]:
    """These messages come; their group does not get further than to the store's door."""
    engine.store.gate = asyncio.Event()
    engine.accept(*(items or [inbound(HERE)]))
    return await engine.started(count)


def goes_on(engine: Engine) -> None:
    assert engine.store.gate is not None
    engine.store.gate.set()


def hold_starts(engine: Engine) -> asyncio.Event:
    """Groups that start turns wait at the door, the others do not."""
    durable, commit = asyncio.Event(), engine.store.commit

    async def slow(group: Group) -> GroupResult:
        if group.turns:
            await durable.wait()
        return await commit(group)

    engine.store.commit = slow  # type: ignore[method-assign]
    return durable


async def rounds() -> None:
    """Everything that can happen without the store happens."""
    for _ in range(100):
        await asyncio.sleep(0)


async def has_begun(engine: Engine) -> None:
    await eventually(lambda: engine.state.running or engine.ended, what="start")


def speak(engine: Engine, start: StartTurn, *texts: str) -> None:
    offset = 0
    for text in texts:
        said = TurnText(turn_id=start.turn_id, dispatch=start.dispatch, step=1, offset=offset, text=text)
        engine.runner.on_texts(engine.brain, [said])
        offset += len(text)


async def at_rest(engine: Engine, *brains: Brain) -> None:
    """Nothing is left, and every brain can take as much as at first."""
    await rounds()
    assert engine.state.running == {}
    assert engine.state.scheduler.running == engine.state.scheduler.waiting == 0
    assert [brain.credit for brain in brains or [engine.brain]] == [100] * max(1, len(brains))
    assert not any(partition.pending for partition in engine.state.partitions.values())


def turn_of(session: str, key: str) -> bytes:
    return ids.turn_id(ids.session_id(TENANT, AGENT, CHANNEL, session), inbound(session, key).message_id)


def nothing_counts(engine: Engine) -> None:
    assert engine.store.steps == {}
    assert (engine.brain.confirms, engine.live.events, engine.ended) == ([], [], [])


# ---- when a turn is given ahead


async def test_a_brain_works_while_the_start_of_its_turn_is_written(engine: Engine) -> None:
    [start] = await ahead(engine, inbound(HERE, content=b"hi"))
    assert start.turn_id not in engine.store.turns
    assert (start.dispatch, list(start.inputs), start.context[0]) == (1, [b"hi"], b"hi")
    engine.answer(start, "hello")
    goes_on(engine)
    [(outcome, delivery)] = await engine.outcomes(1)
    assert (outcome, delivery.message.parts[0].text) == (Outcome.FINAL, "hello")
    await at_rest(engine)
    assert len(engine.brain.starts) == 1


async def waits_for_its_start(engine: Engine, session: str = HERE) -> None:
    """A message's turn is given to a brain, but not before it is durable."""
    engine.store.gate = asyncio.Event()
    engine.accept(inbound(session))
    await rounds()
    assert engine.brain.starts == []
    goes_on(engine)


@pytest.mark.parametrize("warmed", [True, False])
async def test_it_can_be_turned_off(warmed: bool) -> None:
    async with running_engine(start_ahead=False) as engine:
        if warmed:
            await warm(engine, HERE)
        await waits_for_its_start(engine)
        [start] = await engine.started(1)
        assert (start.turn_id in engine.store.turns, start.dispatch) == (True, 1)


async def test_a_session_that_is_not_in_memory_waits(engine: Engine) -> None:
    """Whether it has a past is known when the group is written."""
    await waits_for_its_start(engine, "stranger")
    await engine.started(1)


async def test_a_session_whose_past_is_not_in_memory_waits(engine: Engine) -> None:
    [session] = engine.state.partitions[0].sessions.values()
    session.forget_context()
    await waits_for_its_start(engine)
    await engine.started(1)


async def test_an_agent_that_is_not_known_waits(engine: Engine) -> None:
    engine.directory.has_agent = False
    await waits_for_its_start(engine)
    engine.directory.has_agent = True
    await engine.started(1)


async def test_an_agent_of_another_revision_is_read_first(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """The revision is that of the moment in which the turn is made; by the time it is sent there may be another."""
    known, asked = engine.directory.agent, 0

    def changing(tenant: str, agent: str) -> object:
        nonlocal asked
        found, asked = known(tenant, agent), asked + 1
        assert found is not None
        found.revision = f"r{asked}"
        return found

    async def spec(tenant: str, agent: str, revision: str) -> bytes:
        return engine.directory.spec.SerializeToString()

    monkeypatch.setattr(engine.directory, "agent", changing)
    monkeypatch.setattr(engine, "agent_spec", spec, raising=False)
    await waits_for_its_start(engine)
    await engine.started(1)


async def test_no_more_turns_are_given_ahead_than_a_brain_takes(engine: Engine) -> None:
    engine.brain.credit = 1
    [first] = await ahead(engine, inbound(HERE), inbound(THERE))
    await rounds()
    assert len(engine.brain.starts) == 1
    assert engine.brain.credit == 0
    goes_on(engine)
    engine.answer(first, "one")
    _, second = await engine.started(2)
    assert second.turn_id in engine.store.turns
    engine.answer(second, "two")
    await engine.outcomes(2)
    assert engine.brain.credit == 1


async def test_a_queued_message_is_started_with_all_that_was_said_before_it() -> None:
    """What the brain gets is the same, sooner or later."""
    starts: dict[bool, bytes] = {}
    for start_ahead in (True, False):
        async with running_engine(start_ahead=start_ahead) as engine:
            await warm(engine, HERE)
            engine.accept(inbound(HERE, "1", b"one"), inbound(HERE, "2", b"two"))
            [first] = await engine.started(1)
            durable = hold_starts(engine)
            engine.answer(first, "to one")
            await rounds()
            assert len(engine.brain.starts) == (2 if start_ahead else 1)
            durable.set()
            _, second = await engine.started(2)
            assert Message.FromString(second.context[-1]).parts[0].text == "to one"
            starts[start_ahead] = second.SerializeToString(deterministic=True)
            engine.answer(second, "to two")
            await engine.outcomes(2)
            await at_rest(engine)
    assert starts[True] == starts[False]


# ---- nothing counts before

CALL = (StepKind.MODEL_REPLY, None)
INTERIM = (StepKind.INTERIM_REPLY, None)
WRONG = (StepKind.TOOL_RESULTS, None)
FINAL = (StepKind.FINAL, Message(parts=[Part(text="Hello")]))
STORIES: dict[str, list[list[str] | tuple[StepKind, ProtoMessage | None]]] = {
    "an answer": [["Hel", "lo"], FINAL],
    "text only": [["Hel", "lo", " there"]],
    "text after a step": [["Hel"], CALL, ["lo"]],
    "a tool call, twice": [CALL, CALL],
    "an interim reply": [["so far"], INTERIM],
    "what cannot be": [["Hel"], WRONG],
}


@pytest.mark.parametrize("story", STORIES)
async def test_what_was_said_ahead_counts_as_if_it_was_said_now(story: str) -> None:
    """The same said to a router that starts nothing ahead, the moment the turn is given."""
    seen: list[object] = []
    for start_ahead in (True, False):
        async with running_engine(start_ahead=start_ahead) as engine:
            await warm(engine, HERE)
            if start_ahead:
                [start] = await ahead(engine)
            else:
                engine.accept(inbound(HERE))
                [start] = await engine.started(1)
            for part in STORIES[story]:
                if isinstance(part, list):
                    speak(engine, start, *part)
                else:
                    engine.propose(start, part[0], 1, answer=part[1])
            await rounds()
            if start_ahead:
                nothing_counts(engine)
                goes_on(engine)
            await has_begun(engine)
            await engine.quiet()
            ended = [(int(item.answer.outcome), item.answer.message) for item in engine.ended]
            live = [event[:2] if event[0] == "ended" else event for event in engine.live.events]
            seen.append([live, engine.store.steps, engine.brain.confirms, engine.brain.stops, ended])
    assert seen[0] == seen[1]


async def test_a_decline_ahead_is_heard_when_the_start_is_durable(engine: Engine) -> None:
    [start] = await ahead(engine)
    other = Brain(name="other")
    engine.connect(other)
    speak(engine, start, "Hel")
    engine.runner.on_declined(engine.brain, [StopTurn(turn_id=start.turn_id, dispatch=1)])
    await rounds()
    assert (engine.brain.starts, other.starts) == ([start], [])
    nothing_counts(engine)
    goes_on(engine)
    await eventually(lambda: len(engine.brain.starts) + len(other.starts) == 2, what="another start")
    again, brain = (other.starts[0], other) if other.starts else (engine.brain.starts[1], engine.brain)
    assert (again.turn_id, again.dispatch) == (start.turn_id, 2)
    assert engine.state.running[start.turn_id].strikes == 0
    engine.answer(start, "from nobody")
    engine.answer(again, "ok", brain=brain)
    [(_, delivery)] = await engine.outcomes(1)
    assert delivery.message.parts[0].text == "ok"
    await at_rest(engine, engine.brain, other)


async def test_only_the_brain_that_has_the_turn_is_heard(engine: Engine) -> None:
    [start] = await ahead(engine)
    other = Brain(name="other")
    engine.connect(other)
    engine.answer(start, "from a stranger", brain=other)
    goes_on(engine)
    await eventually(lambda: start.turn_id in engine.state.running, what="start")
    engine.answer(start, "ok")
    [(_, delivery)] = await engine.outcomes(1)
    assert delivery.message.parts[0].text == "ok"
    await at_rest(engine, engine.brain, other)


async def test_a_commit_that_takes_long_is_not_the_brains_silence(engine: Engine) -> None:
    [start] = await ahead(engine)
    [turn] = [s.turn for s in engine.state.partitions[0].sessions.values() if s.turn is not None]
    turn.progress_at -= 1000.0
    engine.runner.restart_stuck()
    goes_on(engine)
    await eventually(lambda: start.turn_id in engine.state.running, what="start")
    engine.runner.restart_stuck()
    await rounds()
    assert (engine.brain.starts, turn.dispatch, turn.strikes) == ([start], 1, 0)


@pytest.mark.parametrize("back", [True, False])
async def test_a_brain_lost_ahead_is_a_strike_once_the_start_is_durable(engine: Engine, back: bool) -> None:
    dispatches: list[tuple[object, ...]] = []

    def watch(group: Group) -> None:
        dispatches.extend(row[:2] for row in group.dispatches)

    engine.store.refuse = watch
    [start] = await ahead(engine)
    lost = engine.brain
    speak(engine, start, "Hel")
    engine.answer(start, "from the dead")
    engine.disconnect(lost)
    other = lost if back else Brain(name="other")
    if back:
        lost.credit = 100
    engine.connect(other)
    await rounds()
    assert dispatches == []
    assert len(other.starts) == back
    nothing_counts(engine)
    goes_on(engine)
    again = (await engine.started(1 + back, other))[-1]
    assert (again.turn_id, again.dispatch, len(again.journal)) == (start.turn_id, 2, 0)
    assert dispatches == [(start.turn_id, 2)]
    assert engine.state.running[start.turn_id].strikes == 1
    engine.answer(start, "again from the dead", brain=lost)
    engine.answer(again, "ok", brain=other)
    [(_, delivery)] = await engine.outcomes(1)
    assert delivery.message.parts[0].text == "ok"
    assert not any(event[0] == "text" for event in engine.live.events)
    await at_rest(engine, other)


async def test_a_brain_lost_ahead_while_there_is_no_other(engine: Engine) -> None:
    [start] = await ahead(engine)
    engine.disconnect(engine.brain)
    goes_on(engine)
    await eventually(lambda: start.turn_id in engine.store.turns, what="start")
    await rounds()
    other = Brain(name="other")
    engine.connect(other)
    [again] = await engine.started(1, other)
    assert (again.turn_id, again.dispatch) == (start.turn_id, 2)
    engine.answer(again, "ok", brain=other)
    await engine.outcomes(1)
    await at_rest(engine, other)
