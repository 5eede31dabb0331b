"""Further inputs of a running turn over a real stream: read before the next model call, never missed by a final."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest
from soma.cognition.v1 import cognition_service_pb2 as cognition
from soma.common.v1 import error_reason_pb2 as reasons
from soma.common.v1 import message_pb2, turn_pb2
from soma.toolgw.v1 import tool_service_pb2 as toolgw

from soma_common.testing.eventually import eventually
from soma_common.testing.model_server import CallTools, ModelServer, Say, ToolRequest
from tests.integration.cognition.conftest import RunningBrain, StartBrain
from tests.integration.cognition.counterparts import ScriptedRouter, ToolGateway, routers
from tests.integration.cognition.test_run_turns import MODEL
from tests.unit.cognition import stories

SLOW = "echo/delay-700-700"
"""Long enough for a frame to arrive before the answer."""
CALL = CallTools(ToolRequest("calculate", {"expression": "17*23"}))
ONE, TWO, THREE = (stories.user(text) for text in ("one", "two", "three"))


def parts_of(final: cognition.Proposal) -> list[str]:
    assert final.kind == cognition.STEP_KIND_FINAL
    return [part.text for part in message_pb2.Message.FromString(final.answer).parts]


def reply_of(interim: cognition.Proposal) -> turn_pb2.ModelReply:
    assert interim.kind == cognition.STEP_KIND_INTERIM_REPLY
    return turn_pb2.StepBody.FromString(interim.body).model_reply


def said_to(model_server: ModelServer) -> list[tuple[str, str | None]]:
    """The messages of the newest call, in short."""
    return [(message["role"], message["content"]) for message in model_server.calls[-1].messages]


@pytest.fixture
async def router(brain: RunningBrain) -> AsyncIterator[ScriptedRouter]:
    """A router that confirms when the test says so."""
    async with brain.router(confirming=False) as connected:
        yield connected


async def test_an_input_that_comes_before_the_answer_makes_it_an_interim_reply(
    brain: RunningBrain, router: ScriptedRouter
) -> None:
    await router.start(stories.start("one", model=SLOW))
    await router.add_inputs(TWO, first=1)
    interim = await router.proposal()
    assert (interim.step, reply_of(interim).text, reply_of(interim).inputs_seen) == (1, "one", 1)
    await router.confirm(interim)
    final = await router.proposal(2)
    assert (final.step, final.inputs_seen, parts_of(final)) == (2, 2, ["one", "two"])
    assert turn_pb2.StepBody.FromString(final.body).final.inputs_seen == 2
    await router.confirm(final)
    await eventually(lambda: not brain.brain.turns)


async def test_an_input_that_comes_after_the_final_was_proposed_takes_it_back(
    brain: RunningBrain, router: ScriptedRouter
) -> None:
    await router.start(stories.start("one"))
    refused = await router.proposal()
    assert parts_of(refused) == ["one"]
    assert set(brain.brain.turns) == {stories.TURN}, "until its final is confirmed a turn may go on"
    await router.add_inputs(TWO, THREE, first=1)
    interim = await router.proposal(2)
    assert (interim.step, reply_of(interim).text) == (refused.step, "one")
    await router.confirm(interim)
    final = await router.proposal(3)
    assert (final.step, final.inputs_seen, parts_of(final)) == (2, 3, ["one", "two\nthree"])
    await router.confirm(final)
    await eventually(lambda: not brain.brain.turns)


async def test_a_confirmed_final_is_the_end_and_an_input_after_it_is_not_of_this_turn(
    brain: RunningBrain, router: ScriptedRouter
) -> None:
    await router.start(stories.start("one"))
    await router.confirm(await router.proposal())
    await router.add_inputs(TWO, first=1)
    await router.until(lambda: bool(router.declined))
    assert (router.declined[0].turn_id, router.declined[0].dispatch) == (stories.TURN, 1)
    assert len(router.proposals) == 1
    assert brain.brain.turns == {}


async def test_inputs_told_again_count_once(brain: RunningBrain, router: ScriptedRouter) -> None:
    await router.start(stories.start("one", model=SLOW))
    for _ in range(3):
        await router.add_inputs(ONE, TWO, first=0)
    await router.confirm(await router.proposal())
    final = await router.proposal(2)
    assert (final.inputs_seen, parts_of(final)) == (2, ["one", "two"])
    await router.add_inputs(TWO, first=1)
    await router.add_inputs(first=2)
    await router.confirm(final)
    await eventually(lambda: not brain.brain.turns)
    assert len(router.proposals) == 2, "what it had read already must not take its final back"
    assert router.declined == []


async def test_inputs_of_another_dispatch_are_not_this_turns(brain: RunningBrain, router: ScriptedRouter) -> None:
    await router.start(stories.start("one", dispatch=2, model=SLOW))
    await router.add_inputs(TWO, first=1, dispatch=1)
    final = await router.proposal()
    assert (final.inputs_seen, parts_of(final)) == (1, ["one"])
    assert router.declined == []
    await router.add_inputs(TWO, first=1, dispatch=3)
    await router.until(lambda: bool(router.declined))
    assert router.declined[0].dispatch == 3, "a start that never came is asked for"
    assert brain.brain.turns[stories.TURN].dispatch == 2


async def test_a_gap_hands_the_turn_back_and_its_next_dispatch_answers_all(
    brain: RunningBrain, router: ScriptedRouter
) -> None:
    await router.start(stories.start("one", model=SLOW))
    await router.add_inputs(THREE, first=2)
    await router.until(lambda: bool(router.declined))
    assert router.declined[0].error.reason == reasons.ERROR_REASON_PROTOCOL_ORDER
    assert dict(router.declined[0].error.metadata) == {"first": "2", "known": "1"}
    assert brain.brain.turns == {}
    again = stories.start("one", dispatch=2)
    again.inputs.extend(message.SerializeToString() for message in (TWO, THREE))
    await router.start(again)
    final = await router.proposal()
    assert (final.dispatch, final.inputs_seen, parts_of(final)) == (2, 3, ["one\ntwo\nthree"])


async def test_inputs_may_come_in_the_frame_of_their_start(router: ScriptedRouter) -> None:
    more = cognition.AddInputs(turn_id=stories.TURN, dispatch=1, first=1, inputs=[TWO.SerializeToString()])
    await router.send(cognition.RunTurnsRequest(starts=[stories.start("one")], add_inputs=[more]))
    assert parts_of(await router.proposal()) == ["one\ntwo"]


async def test_the_live_text_of_an_interim_reply_stays_with_its_step(router: ScriptedRouter) -> None:
    router.confirming = True
    await router.start(stories.start("a b c", model="echo/words-60x10ms"))
    await router.until(lambda: len(router.texts) >= 2)
    await router.add_inputs(TWO, first=1)
    final = await router.ending()
    spoken = parts_of(final)
    assert [router.text(stories.TURN, step) for step in (1, 2)] == spoken
    assert spoken[0].startswith("a b c a b c")
    assert spoken[1].startswith("two two")


async def test_an_input_that_comes_while_a_tool_runs_is_read_behind_its_result(
    router: ScriptedRouter, model_server: ModelServer, tool_gateway: ToolGateway
) -> None:
    running, done = asyncio.Event(), asyncio.Event()

    async def wait(_: toolgw.InvokeToolRequest) -> toolgw.InvokeToolResponse:
        running.set()
        await done.wait()
        response = toolgw.InvokeToolResponse()
        response.result.number_value = 391
        return response

    router.confirming = True
    tool_gateway.behaviour = wait
    model_server.script(CALL, CALL, Say("both"))
    await router.start(stories.start("one", **MODEL))
    await running.wait()
    await router.add_inputs(TWO, first=1)
    done.set()  # the confirmation that has the model called again is behind the input on the stream
    final = await router.ending()
    assert (final.step, final.inputs_seen, parts_of(final)) == (5, 2, ["both"])
    assert said_to(model_server) == [
        ("user", "one"),
        ("assistant", None),
        ("tool", "391"),
        ("user", "two"),
        ("assistant", None),
        ("tool", "391"),
    ]
    replies = [turn_pb2.StepBody.FromString(p.body).model_reply.inputs_seen for p in router.proposals[:-1]]
    assert replies == [1, 0, 2, 0]


async def test_what_an_interim_reply_said_is_in_the_answer_of_the_brain_that_goes_on(
    brain: RunningBrain, model_server: ModelServer, router: ScriptedRouter
) -> None:
    """The brain dies with its last look; the next one has the journal alone."""
    model_server.script(Say("first answer"), Say("second answer"))
    await router.start(stories.start("one", **MODEL))
    await router.proposal()
    await router.add_inputs(TWO, first=1)
    interim = await router.proposal(2)
    again = stories.start("one", dispatch=2, **MODEL)
    again.inputs.append(TWO.SerializeToString())
    again.journal.append(interim.body)
    await router.start(again)
    final = await router.proposal(3)
    assert (final.dispatch, final.step, parts_of(final)) == (2, 2, ["first answer", "second answer"])
    assert said_to(model_server) == [("user", "one"), ("assistant", "first answer"), ("user", "two")]


async def test_interim_replies_do_not_use_up_the_steps_of_the_agent(router: ScriptedRouter) -> None:
    await router.start(stories.start("one", max_steps=1))
    for count, message in enumerate((TWO, THREE), start=1):
        await router.proposal(2 * count - 1)
        await router.add_inputs(message, first=count)
        await router.confirm(await router.proposal(2 * count))
    assert parts_of(await router.proposal(5)) == ["one", "two", "three"]


async def test_an_answer_that_grows_too_long_over_its_interim_replies_is_refused(start_brain: StartBrain) -> None:
    brain = await start_brain(max_reply_bytes=1500)
    async with routers(brain.router(confirming=False)) as (router,):
        await router.connect()
        await router.start(stories.start("a" * 1000))
        await router.proposal()
        await router.add_inputs(stories.user("b" * 1000), first=1)
        await router.confirm(await router.proposal(2))
        failure = message_pb2.Error.FromString((await router.proposal(3)).answer)
        assert failure.reason == reasons.ERROR_REASON_MODEL_REJECTED


async def test_a_journal_that_read_more_than_the_turn_has_is_corrupt(router: ScriptedRouter) -> None:
    await router.start(stories.start("one", journal=[stories.interim(seen=2)]))
    failure = await router.proposal()
    assert message_pb2.Error.FromString(failure.answer).reason == reasons.ERROR_REASON_ITEM_CORRUPT
    assert failure.step == 2


async def test_a_turn_that_waits_for_its_final_can_be_stopped(brain: RunningBrain, router: ScriptedRouter) -> None:
    await router.start(stories.start("one"))
    await router.proposal()
    await router.stop(stories.TURN, 1)
    await eventually(lambda: not brain.brain.turns)
    assert len(router.proposals) == 1
    assert router.declined == []


async def test_a_brain_that_stops_hands_back_a_turn_whose_final_is_not_confirmed(start_brain: StartBrain) -> None:
    brain = await start_brain(drain_grace_s=0.1)
    async with routers(brain.router(confirming=False)) as (router,):
        await router.connect()
        await router.start(stories.start("one"))
        await router.proposal()
        await brain.lifecycle.stop()
        await router.over.wait()
        assert [(d.turn_id, d.error.reason) for d in router.declined] == [(stories.TURN, reasons.ERROR_REASON_DRAINING)]
