"""Who runs what, over random frames of two routers: at most one dispatch of a turn runs, and credits always add up."""

import asyncio
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from soma.cognition.v1 import cognition_service_pb2 as cognition
from soma.common.v1 import error_reason_pb2 as reasons

from services.cognition.adapters.models.echo import EchoModel
from services.cognition.adapters.models.registry import ModelRegistry
from services.cognition.adapters.tools_grpc import NoTools
from services.cognition.application.ports import Outgoing
from services.cognition.application.run_turn import RunPolicy, TurnRunner
from services.cognition.application.serve_routers import SILENT_INTERVALS, Brain, RouterSession
from soma_common.errors import SomaError
from soma_common.gather import Gather
from tests.unit.cognition import stories

MAX_TURNS = 3


def make_brain(max_turns: int = MAX_TURNS) -> Brain:
    runner = TurnRunner(ModelRegistry({"echo": EchoModel()}, {}), NoTools(), RunPolicy())
    return Brain("cognition-0", runner, max_turns=max_turns)


def connect(brain: Brain, name: str, bound: int = 1000) -> tuple[RouterSession, Gather[Outgoing]]:
    outbox: Gather[Outgoing] = Gather(bound)
    return brain.connect(name, 1, outbox), outbox


@dataclass(frozen=True)
class Event:
    """One frame: a start, a stop or a further input of a turn, by one of two routers; or the end of its stream."""

    router: int
    kind: str
    turn: int
    dispatch: int
    first: int


events = st.builds(
    Event,
    st.integers(0, 1),
    st.sampled_from(["start", "start", "start", "inputs", "inputs", "stop", "close"]),
    st.integers(1, 4),
    st.integers(1, 4),
    st.integers(0, 3),
)


def check_input_given(brain: Brain, session: RouterSession, outbox: Gather[Outgoing], event: Event) -> None:
    """Gives a turn one further input and looks what became of it: taken, known already, ignored or declined."""
    turn = bytes([event.turn]) * 16
    running = brain.turns.get(turn)
    known = len(running.inputs) if running is not None else 0
    outbox.take_now(10_000)
    more = cognition.AddInputs(turn_id=turn, dispatch=event.dispatch, first=event.first, inputs=[b""])
    session.take(cognition.RunTurnsRequest(add_inputs=[more]))
    declined = [(item.turn_id, item.dispatch) for item in outbox.take_now() if isinstance(item, cognition.StopTurn)]
    if running is None or running.session is not session or running.dispatch < event.dispatch:
        assert declined == [(turn, event.dispatch)], "what does not run here is said to be started again"
        assert brain.turns.get(turn) is running
    elif running.dispatch > event.dispatch:
        assert declined == []
        assert len(running.inputs) == known
    elif event.first > known:
        assert declined == [(turn, event.dispatch)], "with a gap it cannot be answered"
        assert turn not in brain.turns
    else:
        assert declined == []
        assert len(running.inputs) == max(known, event.first + 1)


@settings(max_examples=150, deadline=None)
@given(st.lists(events, max_size=25))
def test_the_highest_dispatch_runs_and_credits_add_up(story: list[Event]) -> None:
    async def play() -> None:
        brain = make_brain()
        streams = [connect(brain, "router-0", 10_000), connect(brain, "router-1", 10_000)]
        for event in story:
            session, outbox = streams[event.router]
            turn = bytes([event.turn]) * 16
            before = brain.turns[turn].dispatch if turn in brain.turns else 0
            if event.kind == "start":
                start = stories.start(turn_id=turn, dispatch=event.dispatch, model="echo/delay-60000-60000")
                session.take(cognition.RunTurnsRequest(starts=[start]))
                if before:
                    assert brain.turns[turn].dispatch == max(before, event.dispatch)
            elif event.kind == "stop":
                stop = cognition.StopTurn(turn_id=turn, dispatch=event.dispatch)
                session.take(cognition.RunTurnsRequest(stops=[stop]))
            elif event.kind == "inputs":
                check_input_given(brain, session, outbox, event)
            else:
                session.close(None)
                streams[event.router] = connect(brain, session.router, 10_000)
            assert len(brain.turns) <= MAX_TURNS
            for other, _ in streams:
                assert other.running == sum(turn.session is other for turn in brain.turns.values())
            if event.kind != "start":
                await asyncio.sleep(0)
        for session, _ in streams:
            session.close(None)
        assert brain.turns == {}
        if brain.unwinding:
            await asyncio.wait(brain.unwinding)

    asyncio.run(play())


async def proposal_of(outbox: Gather[Outgoing]) -> cognition.Proposal:
    """Waits for the one thing that the brain says next."""
    async with asyncio.timeout(5):
        (proposal,) = await outbox.take()
    assert isinstance(proposal, cognition.Proposal)
    return proposal


async def test_a_confirmed_final_makes_room_for_a_start_in_the_same_frame() -> None:
    brain = make_brain(max_turns=1)
    session, outbox = connect(brain, "router-0")
    one, two = bytes([1]) * 16, bytes([2]) * 16
    session.take(cognition.RunTurnsRequest(starts=[stories.start("first", turn_id=one)]))
    final = await proposal_of(outbox)
    assert session.running == 1, "until it is confirmed the turn may get further inputs"
    confirm = cognition.Confirm(turn_id=one, dispatch=1, step=final.step)
    session.take(cognition.RunTurnsRequest(confirms=[confirm], starts=[stories.start("second", turn_id=two)]))
    assert set(brain.turns) == {two}
    assert session.running == 1
    answer = await proposal_of(outbox)
    assert (answer.turn_id, answer.kind) == (two, cognition.STEP_KIND_FINAL)
    session.close(None)


async def test_a_failure_is_not_waited_for() -> None:
    """The router takes it whatever was read; further inputs that crossed it on the way have the turn started again."""
    brain = make_brain()
    session, outbox = connect(brain, "router-0")
    session.take(cognition.RunTurnsRequest(starts=[stories.start(model="echo/no-such")]))
    failure = await proposal_of(outbox)
    assert failure.kind == cognition.STEP_KIND_FAILURE
    assert session.running == 0
    more = cognition.AddInputs(turn_id=stories.TURN, dispatch=1, first=1, inputs=[b""])
    session.take(cognition.RunTurnsRequest(add_inputs=[more]))
    (declined,) = outbox.take_now()
    assert isinstance(declined, cognition.StopTurn)
    assert declined.error.reason == reasons.ERROR_REASON_PROTOCOL_ORDER


async def test_a_router_that_does_not_read_is_cut_off_and_its_turns_end() -> None:
    brain = make_brain(max_turns=100)
    session, outbox = connect(brain, "router-0", bound=5)
    for number in range(10):
        start = stories.start(turn_id=bytes([number]) * 16)
        session.take(cognition.RunTurnsRequest(starts=[start]))
    await asyncio.sleep(0.01)
    assert session.closed.is_set()
    assert session.failure is not None
    assert session.failure.reason == reasons.ERROR_REASON_QUEUE_FULL
    assert len(outbox) == 5
    assert brain.turns == {}


async def test_silence_is_counted_in_intervals_and_any_frame_ends_it() -> None:
    session, _ = connect(make_brain(), "router-0")
    for _ in range(SILENT_INTERVALS):
        session.tick()
    session.take(cognition.RunTurnsRequest(heartbeat=True))
    for _ in range(SILENT_INTERVALS):
        session.tick()
    assert not session.closed.is_set()
    session.tick()
    assert session.closed.is_set()


async def test_text_waits_while_the_router_is_behind() -> None:
    brain = make_brain(max_turns=1)
    session, outbox = connect(brain, "router-0")
    session.take(cognition.RunTurnsRequest(starts=[stories.start("a b c", model="echo/words-100x1ms")]))
    session.tick()
    session.tick()
    assert session.behind
    await asyncio.sleep(0.08)
    assert not any(isinstance(item, cognition.TurnText) for item in outbox.take_now())
    await asyncio.sleep(0.2)
    texts = [item for item in outbox.take_now() if isinstance(item, cognition.TurnText)]
    assert texts[0].offset == 0
    assert len(texts[0].text) > 20
    session.close(None)


async def test_a_nameless_router_and_a_draining_brain_are_refusals() -> None:
    brain = make_brain()
    with pytest.raises(SomaError) as nameless:
        connect(brain, "")
    assert nameless.value.reason == reasons.ERROR_REASON_PROTOCOL_ORDER
    await brain.drain(0.0)
    with pytest.raises(SomaError) as draining:
        connect(brain, "router-0")
    assert draining.value.reason == reasons.ERROR_REASON_DRAINING


async def test_a_final_that_waits_for_its_confirmation_keeps_no_task() -> None:
    brain = make_brain()
    session, outbox = connect(brain, "router-0")
    session.take(cognition.RunTurnsRequest(starts=[stories.start()]))
    [final] = await outbox.take()
    assert isinstance(final, cognition.Proposal)
    await asyncio.sleep(0)
    assert asyncio.all_tasks() == {asyncio.current_task()}
    assert brain.turns, "the turn is not over"

    further = cognition.AddInputs(
        turn_id=final.turn_id, dispatch=1, first=1, inputs=[stories.user("more").SerializeToString()]
    )
    session.take(cognition.RunTurnsRequest(add_inputs=[further]))
    [interim] = await outbox.take()
    assert isinstance(interim, cognition.Proposal)
    assert (interim.kind, interim.step) == (cognition.STEP_KIND_INTERIM_REPLY, 1)
    stop = cognition.StopTurn(turn_id=final.turn_id, dispatch=1)
    session.take(cognition.RunTurnsRequest(stops=[stop]))
    assert not brain.turns
    assert session.running == 0
    await asyncio.sleep(0)
    assert asyncio.all_tasks() == {asyncio.current_task()}


async def test_a_turn_that_is_stopped_while_its_final_waits_is_over_once() -> None:
    brain = make_brain()
    session, outbox = connect(brain, "router-0")
    session.take(cognition.RunTurnsRequest(starts=[stories.start()]))
    await outbox.take()
    confirm = cognition.Confirm(turn_id=stories.TURN, dispatch=1, step=1)
    stop = cognition.StopTurn(turn_id=stories.TURN, dispatch=1)
    session.take(cognition.RunTurnsRequest(confirms=[confirm, confirm], stops=[stop]))
    session.take(cognition.RunTurnsRequest(confirms=[confirm]))
    assert (len(brain.turns), session.running) == (0, 0)
