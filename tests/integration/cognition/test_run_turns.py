"""The RunTurns protocol against a real brain: what a router may do, what a broken one does, and what comes back."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import grpc
import pytest
from soma.cognition.v1 import cognition_service_pb2 as cognition
from soma.common.v1 import error_reason_pb2 as reasons
from soma.common.v1 import message_pb2, turn_pb2

from soma_common.errors import from_rpc_error
from soma_common.ids import call_key
from soma_common.testing.eventually import eventually
from soma_common.testing.model_server import CallTools, Hang, ModelServer, Say, ToolRequest
from tests.integration.cognition.conftest import RunningBrain, StartBrain
from tests.integration.cognition.counterparts import ScriptedRouter, ToolGateway, routers
from tests.stalls import Stalls
from tests.unit.cognition import stories

ADD = CallTools(ToolRequest("calculate", {"expression": "17*23"}), ToolRequest("current_time", {}), text="Let me see.")
MODEL: dict[str, Any] = {"model": "openai/witness-1", "tools": ["calculate", "current_time"]}


def reason_of(router: ScriptedRouter) -> reasons.ErrorReason.ValueType:
    assert router.error is not None
    return from_rpc_error(router.error).reason


def failure_of(proposal: cognition.Proposal) -> message_pb2.Error:
    assert proposal.kind == cognition.STEP_KIND_FAILURE
    return message_pb2.Error.FromString(proposal.answer)


def answer_of(proposal: cognition.Proposal) -> str:
    assert proposal.kind == cognition.STEP_KIND_FINAL, proposal
    return message_pb2.Message.FromString(proposal.answer).parts[0].text


def turn_ids(count: int) -> list[bytes]:
    return [i.to_bytes(16, "big") for i in range(1, count + 1)]


# --- the stream ---------------------------------------------------------------------------------------------------


async def test_welcome_says_who_thinks_how_much_and_how_often(start_brain: StartBrain) -> None:
    first, second = await start_brain(max_turns=7), await start_brain(max_turns=7)
    async with first.router() as a, second.router() as b:
        assert (a.welcome.protocol, a.welcome.credit, a.welcome.heartbeat_ms) == (1, 7, 100)
        assert a.welcome.brain.startswith("cognition-0-")
        assert a.welcome.brain != b.welcome.brain, "a brain that was restarted must not look like the old one"


async def test_a_turn_is_answered(router: ScriptedRouter) -> None:
    await router.start(stories.start("hello there"))
    proposal = await router.ending()
    assert answer_of(proposal) == "hello there"
    assert (proposal.step, proposal.dispatch, proposal.inputs_seen) == (1, 1, 1)
    body = turn_pb2.StepBody.FromString(proposal.body)
    assert body.format == 1
    assert body.final.message.SerializeToString() == proposal.answer


async def test_hello_must_come_first_and_only_there(brain: RunningBrain) -> None:
    async with routers(brain.router("early"), brain.router("twice")) as (early, twice):
        early.open()
        await early.send(cognition.RunTurnsRequest(starts=[stories.start()]))
        await early.over.wait()
        assert reason_of(early) == reasons.ERROR_REASON_PROTOCOL_ORDER
        await twice.connect()
        await twice.send(cognition.RunTurnsRequest(hello=cognition.RouterHello(router="twice", protocol=1)))
        await twice.over.wait()
        assert reason_of(twice) == reasons.ERROR_REASON_PROTOCOL_ORDER


async def test_a_router_of_no_common_version_is_told(brain: RunningBrain) -> None:
    async with routers(brain.router()) as (old,):
        await old.connect(protocol=0)
        assert reason_of(old) == reasons.ERROR_REASON_PROTOCOL_VERSION
    async with routers(brain.router()) as (newer,):
        await newer.connect(protocol=9)
        assert newer.welcome.protocol == 1


async def test_strangers_get_no_turns(brain: RunningBrain) -> None:
    async with routers(brain.router(token="no-such-token")) as (stranger,):
        await stranger.connect()
        assert reason_of(stranger) == reasons.ERROR_REASON_UNAUTHENTICATED


async def test_heartbeats_come_while_nothing_happens(router: ScriptedRouter) -> None:
    await router.until(lambda: sum(frame.heartbeat for frame in router.frames) >= 5)
    assert not router.over.is_set()


async def test_a_frozen_router_is_taken_for_dead_and_its_turns_end(brain: RunningBrain) -> None:
    async with Stalls() as stalls, routers(brain.router("frozen"), brain.router("alive")) as (frozen, alive):
        await frozen.connect()
        await alive.connect()
        await frozen.start(stories.start(model="echo/delay-60000-60000"))
        await frozen.until(lambda: len(brain.brain.turns) == 1)
        began = time.monotonic()
        frozen.frozen = True
        await frozen.over.wait()
        stalled_s = stalls.since(began)
        assert reason_of(frozen) == reasons.ERROR_REASON_SERVICE_UNAVAILABLE
        assert 0.3 < time.monotonic() - began < 2.0 + stalled_s, "four intervals of 100 ms, give or take a slow machine"
        assert brain.brain.turns == {}
        assert not alive.over.is_set()


async def test_a_router_that_vanishes_takes_its_turns_along(brain: RunningBrain) -> None:
    router = await brain.router().connect()
    await router.start(stories.start(model="echo/delay-60000-60000"))
    await router.until(lambda: len(brain.brain.turns) == 1)
    await router.close()
    async with asyncio.timeout(5):
        while brain.brain.turns:
            await asyncio.sleep(0.01)


async def test_a_router_that_connects_again_replaces_its_old_stream(brain: RunningBrain) -> None:
    async with routers(brain.router(), brain.router()) as (old, new):
        await old.connect()
        await old.start(stories.start(model="echo/delay-60000-60000"))
        await old.until(lambda: len(brain.brain.turns) == 1)
        await new.connect()
        await old.over.wait()
        assert brain.brain.turns == {}
        assert new.welcome.credit == old.welcome.credit
        await new.start(stories.start("again", dispatch=2))
        assert answer_of(await new.ending()) == "again"


# --- credits ------------------------------------------------------------------------------------------------------


async def test_a_start_over_the_credit_is_declined_and_an_ended_turn_gives_its_credit_back(
    start_brain: StartBrain,
) -> None:
    brain = await start_brain(max_turns=2)
    one, two, three = turn_ids(3)
    async with brain.router() as router:
        await router.start(*(stories.start(turn_id=t, model="echo/delay-60000-60000") for t in (one, two, three)))
        await router.until(lambda: bool(router.declined))
        assert [d.turn_id for d in router.declined] == [three]
        assert router.declined[0].error.reason == reasons.ERROR_REASON_QUEUE_FULL
        assert router.declined[0].error.retry_delay_ms > 0
        await router.stop(one, 1)
        await router.start(stories.start("now", turn_id=three, dispatch=2))
        assert answer_of(await router.ending(three)) == "now"
        await eventually(lambda: set(brain.brain.turns) == {two})


async def test_routers_share_the_credits_and_the_bound_holds_for_all(start_brain: StartBrain) -> None:
    brain = await start_brain(max_turns=4, router_targets="127.0.0.1:1,127.0.0.1:2")
    async with routers(*(brain.router(f"router-{i}") for i in range(3))) as (a, b, unexpected):
        for number, router in enumerate((a, b, unexpected)):
            await router.connect()
            assert router.welcome.credit == 2
            ids = [bytes([number, i]) * 8 for i in range(2)]
            await router.start(*(stories.start(turn_id=t, model="echo/delay-60000-60000") for t in ids))
        await unexpected.until(lambda: len(unexpected.declined) == 2)
        assert len(brain.brain.turns) == 4
        await a.close()
        await b.until(lambda: len(brain.brain.turns) == 2)
        await unexpected.start(stories.start("room again"))
        assert answer_of(await unexpected.ending()) == "room again"


# --- dispatches ---------------------------------------------------------------------------------------------------


async def test_the_same_start_twice_runs_once(router: ScriptedRouter, model_server: ModelServer) -> None:
    begin = stories.start("hi", **MODEL)
    model_server.script(Say("hello", delay_s=0.2))
    await router.start(begin, begin)
    await router.start(begin)
    await router.ending()
    await asyncio.sleep(0.1)
    assert list(model_server.calls_by_step().values()) == [1]
    assert len(router.proposals) == 1
    assert router.declined == []


async def test_a_newer_dispatch_takes_over_and_an_older_one_is_ignored(
    brain: RunningBrain, model_server: ModelServer
) -> None:
    model_server.script(Hang())
    async with brain.router() as router:
        await router.start(stories.start("hi", dispatch=2, **MODEL))
        await router.until(lambda: len(model_server.calls) == 1)
        await router.start(stories.start("hi", dispatch=1, **MODEL))
        await router.start(stories.start("hi", dispatch=3, **MODEL))
        proposal = await router.ending()
    assert proposal.dispatch == 3
    assert [call.dispatch for call in model_server.calls] == [2, 3]
    assert [p.dispatch for p in router.proposals] == [3]


async def test_a_turn_that_moved_to_another_router_stops_for_the_old_one(brain: RunningBrain) -> None:
    async with routers(brain.router("router-0"), brain.router("router-1")) as (zombie, owner):
        await zombie.connect()
        await owner.connect()
        await zombie.start(stories.start(model="echo/delay-60000-60000"))
        await zombie.until(lambda: len(brain.brain.turns) == 1)
        await owner.start(stories.start(model="echo/delay-60000-60000", dispatch=2))
        await owner.until(lambda: brain.brain.turns[stories.TURN].dispatch == 2)
        await zombie.start(stories.start("mine", dispatch=1))
        await zombie.until(lambda: bool(zombie.declined))
        assert zombie.declined[0].error.reason == reasons.ERROR_REASON_LEASE_LOST
        assert brain.brain.turns[stories.TURN].dispatch == 2
        assert zombie.proposals == []


async def test_confirmations_of_other_dispatches_and_steps_are_ignored(
    brain: RunningBrain, model_server: ModelServer, tool_gateway: ToolGateway
) -> None:
    model_server.script(ADD)
    async with routers(brain.router(confirming=False)) as (router,):
        await router.connect()
        await router.start(stories.start("hi", dispatch=2, **MODEL))
        proposal = await router.proposal()
        await router.confirm(proposal, dispatch=1)
        await router.confirm(proposal, dispatch=3)
        wrong = cognition.Confirm(turn_id=proposal.turn_id, dispatch=2, step=7)
        await router.send(cognition.RunTurnsRequest(confirms=[wrong]))
        await asyncio.sleep(0.2)
        assert not tool_gateway.asked
        await router.confirm(proposal)
        await router.proposal(2)


# --- steps --------------------------------------------------------------------------------------------------------


async def test_no_tool_runs_before_its_step_is_confirmed(
    brain: RunningBrain, model_server: ModelServer, tool_gateway: ToolGateway
) -> None:
    model_server.script(ADD, Say("It is 391."))
    async with routers(brain.router(confirming=False)) as (router,):
        await router.connect()
        await router.start(stories.start("what is 17*23?", **MODEL))
        first = await router.proposal()
        assert (first.kind, first.step, first.call_count) == (cognition.STEP_KIND_MODEL_REPLY, 1, 2)
        assert router.text(stories.TURN, 1) == "Let me see."
        await asyncio.sleep(0.3)
        assert not tool_gateway.asked, "a tool ran before its step was journaled"
        assert len(router.proposals) == 1, "the brain went on before its step was journaled"

        await router.confirm(first)
        second = await router.proposal(2)
        assert (second.kind, second.step) == (cognition.STEP_KIND_TOOL_RESULTS, 2)
        assert tool_gateway.effects == {call_key(stories.TURN, 1, 0): 1, call_key(stories.TURN, 1, 1): 1}
        assert {request.turn_id for request in tool_gateway.requests} == {stories.TURN.hex()}
        await asyncio.sleep(0.2)
        assert len(model_server.calls) == 1

        await router.confirm(second)
        last = await router.proposal(3)
        assert answer_of(last) == "It is 391."
        assert router.text(stories.TURN, 3) == "It is 391."
    assert model_server.calls_by_step() == {(stories.TURN.hex(), 1, 1): 1, (stories.TURN.hex(), 3, 1): 1}


async def test_replay_from_every_prefix_ends_the_same_and_repeats_no_effect(
    brain: RunningBrain, model_server: ModelServer, tool_gateway: ToolGateway
) -> None:
    """Whatever was journaled when a brain died, the next one goes on from there: calls of journaled steps are not
    made again, and tools run under the same keys."""

    def rule(call: object) -> CallTools | Say:
        step = getattr(call, "step", 0)
        return ADD if step in (1, 3) else Say(f"done at {step}")

    model_server.rule = rule
    async with brain.router() as whole:
        await whole.start(stories.start("go", **MODEL))
        await whole.ending()
    journal = [turn_pb2.StepBody.FromString(p.body) for p in whole.proposals]
    assert [p.step for p in whole.proposals] == [1, 2, 3, 4, 5]

    for length in range(len(journal)):
        model_server.calls.clear()
        async with brain.router() as router:
            await router.start(stories.start("go", dispatch=length + 2, journal=journal[:length], **MODEL))
            end = await router.ending()
        assert end.body == whole.proposals[-1].body
        assert [p.step for p in router.proposals] == list(range(length + 1, 6))
        assert [call.step for call in model_server.calls] == [step for step in (1, 3, 5) if step > length]
        assert model_server.calls[-1].messages[-1]["role"] == "tool"
    assert set(tool_gateway.effects.values()) == {1}
    assert len(tool_gateway.effects) == 4


async def test_a_journal_that_has_ended_is_not_run_again(brain: RunningBrain) -> None:
    async with brain.router() as router:
        await router.start(stories.start(journal=[stories.final()]))
        await router.start(stories.start("next", turn_id=bytes(16)))
        assert answer_of(await router.ending()) == "next"
        assert len(router.proposals) == 1
        assert router.declined == []
        await eventually(lambda: not brain.brain.turns)


@pytest.mark.parametrize(
    ("journal", "reason"),
    [
        ([turn_pb2.StepBody(format=7, final=stories.final().final)], reasons.ERROR_REASON_SCHEMA_UNKNOWN),
        ([turn_pb2.StepBody(format=1)], reasons.ERROR_REASON_ITEM_CORRUPT),
        ([stories.results(1)], reasons.ERROR_REASON_INVALID_TRANSITION),
    ],
)
async def test_a_journal_no_brain_of_this_release_wrote_ends_with_a_typed_error(
    router: ScriptedRouter, journal: list[turn_pb2.StepBody], reason: reasons.ErrorReason.ValueType
) -> None:
    await router.start(stories.start(journal=journal))
    proposal = await router.ending()
    assert failure_of(proposal).reason == reason
    assert proposal.step == 2


async def test_a_corrupt_context_ends_its_own_turn_only(router: ScriptedRouter) -> None:
    bad, good = turn_ids(2)
    broken = stories.start(turn_id=bad)
    broken.inputs[0] = b"\xff\xff"
    await router.start(broken, stories.start("fine", turn_id=good))
    assert failure_of(await router.ending(bad)).reason == reasons.ERROR_REASON_ITEM_CORRUPT
    assert answer_of(await router.ending(good)) == "fine"


async def test_a_turn_that_is_started_and_stopped_in_one_frame_does_not_run(router: ScriptedRouter) -> None:
    one, two = turn_ids(2)
    await router.send(
        cognition.RunTurnsRequest(
            starts=[stories.start("no", turn_id=one), stories.start("yes", turn_id=two)],
            stops=[cognition.StopTurn(turn_id=one, dispatch=1)],
        )
    )
    assert answer_of(await router.ending()) == "yes"
    assert [p.turn_id for p in router.proposals] == [two]


async def test_a_stop_in_the_middle_ends_without_a_word(brain: RunningBrain) -> None:
    async with brain.router() as router:
        await router.start(stories.start("one two", model="echo/words-1000x10ms"))
        await router.until(lambda: len(router.texts) >= 3)
        await router.stop(stories.TURN, 1)
        await router.until(lambda: not brain.brain.turns)
        await asyncio.sleep(0.1)
        said = len(router.texts)
        await asyncio.sleep(0.2)
        assert len(router.texts) == said
        assert router.proposals == []
        assert router.declined == []


async def test_a_stop_while_a_tool_runs(
    brain: RunningBrain, model_server: ModelServer, tool_gateway: ToolGateway
) -> None:
    reached = asyncio.Event()

    async def hang(_: object) -> object:
        reached.set()
        await asyncio.sleep(60)
        raise AssertionError("unreachable")

    tool_gateway.behaviour = hang  # type: ignore[assignment]
    model_server.script(ADD)
    async with brain.router() as router:
        await router.start(stories.start("hi", **MODEL))
        await reached.wait()
        await router.stop(stories.TURN, 1)
        await router.until(lambda: not brain.brain.turns)
        await asyncio.sleep(0.1)
        assert len(router.proposals) == 1


# --- text ---------------------------------------------------------------------------------------------------------


async def test_live_text_is_complete_and_coalesced(router: ScriptedRouter) -> None:
    await router.start(stories.start("a bc def", model="echo/words-200x1ms"))
    end = await router.ending()
    assert router.text(stories.TURN, 1) == answer_of(end)
    assert len(router.texts) < 150, "at most one text per 20 ms, not one per word"
    assert router.texts[0].text == "a", "the first piece goes at once"


async def test_offsets_count_code_points(router: ScriptedRouter) -> None:
    await router.start(stories.start("\N{GRINNING FACE} ü \N{MUSICAL SYMBOL G CLEF}", model="echo/words-30x5ms"))
    end = await router.ending()
    assert router.text(stories.TURN, 1) == answer_of(end)


# --- the end ------------------------------------------------------------------------------------------------------


async def test_draining_finishes_what_it_can_and_hands_back_the_rest(start_brain: StartBrain) -> None:
    brain = await start_brain(drain_grace_s=0.5)
    quick, slow, new = turn_ids(3)
    async with brain.router() as router:
        await router.start(
            stories.start("soon", turn_id=quick, model="echo/delay-200-200"),
            stories.start("never", turn_id=slow, model="echo/delay-60000-60000"),
        )
        await router.until(lambda: len(brain.brain.turns) == 2)
        stopping = asyncio.create_task(brain.lifecycle.stop())
        await router.until(lambda: any(frame.draining for frame in router.frames))
        await router.start(stories.start("late", turn_id=new))
        await router.over.wait()
        await stopping
        assert router.error is None, "the stream ends in order"
        assert answer_of(await router.ending(quick)) == "soon"
        assert {d.turn_id for d in router.declined} == {slow, new}
        assert {d.error.reason for d in router.declined} == {reasons.ERROR_REASON_DRAINING}


async def test_a_brain_without_turns_stops_at_once(brain: RunningBrain) -> None:
    async with Stalls() as stalls, brain.router() as router:
        began = time.monotonic()
        await brain.lifecycle.stop()
        await router.over.wait()
        assert time.monotonic() - began < 1.0 + stalls.since(began)
        assert router.error is None or router.error.code() is not grpc.StatusCode.INTERNAL
