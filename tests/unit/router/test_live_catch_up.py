"""Adapter streams that arrive are shown where running turns stand, within a bound."""

from __future__ import annotations

from collections import defaultdict
from typing import Any, cast

import pytest
from google.protobuf.struct_pb2 import Value
from hypothesis import given
from hypothesis import strategies as st
from soma.common.v1.turn_pb2 import LiveEvent, ModelReply, StepBody, ToolCall, ToolResult, ToolResults

from services.router.application import watch_turns
from services.router.application.live_newest import newest_that_fit
from services.router.application.state import RouterState
from services.router.application.step_events import StepContent
from services.router.application.watch_pages import origin_of, running_state
from services.router.application.watch_turns import CATCH_UP_BYTES, CATCH_UP_S, LiveDesk
from services.router.domain.session import Turn
from soma_common.layout import LaneLayout
from tests.unit.router.builders import CHANNEL, TENANT, a_partition, a_session, a_turn, entry, inbound

STREAM = 7


class Outbox:
    """Keeps what goes to adapters, by turn."""

    losses = 0

    def __init__(self) -> None:
        self._told: list[LiveEvent] = []

    def for_adapter(self, tenant: str, gateway: str, stream: int) -> LiveEvent:
        assert (gateway, stream) == ("g", STREAM)
        self._told.append(LiveEvent())
        return self._told[-1]

    def take(self) -> dict[bytes, list[LiveEvent]]:
        told: dict[bytes, list[LiveEvent]] = defaultdict(list)
        for event in self._told:
            told[event.turn_id].append(event)
        self._told = []
        return told


class World:
    """Running turns whose sessions are all served by one stream."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        monkeypatch.setattr(watch_turns, "monotonic", lambda: self.now)
        self.outbox = Outbox()
        self.state = RouterState(LaneLayout(8, 1), cast(Any, None), 100, 100)
        self.desk = LiveDesk(self.state, cast(Any, None), cast(Any, self.outbox), lambda _: ("g", STREAM))

    def runs(self, name: str, *journal: StepBody, text: str = "", tenant: str = TENANT) -> Turn:
        session = a_session(a_partition(), name, tenant=tenant)
        turn = a_turn(session, entry(inbound(name)).message)
        turn.journal = [body.SerializeToString() for body in journal]
        say(turn, text)
        self.state.running[turn.id] = turn
        return turn

    def arrives(self, tenant: str = TENANT) -> dict[bytes, list[LiveEvent]]:
        self.desk.catch_up(tenant, CHANNEL, {STREAM})
        return self.outbox.take()


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> World:
    return World(monkeypatch)


def say(turn: Turn, text: str) -> None:
    turn.text.append(text)
    turn.text_length += len(text)


def reply(text: str, calls: int = 1) -> StepBody:
    tools = [ToolCall(index=n, tool=f"t{n}") for n in range(calls)]
    return StepBody(format=1, model_reply=ModelReply(text=text, tool_calls=tools))


def results(size: int, count: int = 1) -> StepBody:
    answers = [ToolResult(index=n, result=Value(string_value="x" * size)) for n in range(count)]
    return StepBody(format=1, tool_results=ToolResults(results=answers))


def bytes_of(told: dict[bytes, list[LiveEvent]]) -> int:
    return sum(event.ByteSize() for events in told.values() for event in events)


def everything(turn: Turn) -> list[LiveEvent]:
    """All of a turn, as it is told to who misses nothing."""
    origin = origin_of(turn)
    events = [running_state(turn)]
    for number, body in enumerate(turn.journal, 1):
        events.extend(StepContent.of(body).events(origin, turn.dispatch, number))
    events.extend(origin.texts(turn.dispatch, turn.step_count + 1, "".join(turn.text)))
    return events


def test_turns_that_hold_little_are_shown_whole(world: World) -> None:
    turns = [world.runs(f"s{n}", reply("one"), results(100), text="so far") for n in range(40)]
    assert world.arrives() == {turn.id: everything(turn) for turn in turns}


def test_an_arrival_is_bounded_however_much_the_running_turns_hold(world: World) -> None:
    turns = [world.runs(f"s{n}", *[reply("x" * 50_000), results(50_000)] * 10) for n in range(40)]
    told = world.arrives()
    assert bytes_of(told) <= CATCH_UP_BYTES
    for turn in turns:
        state, *newest = told[turn.id]
        assert state == running_state(turn)
        assert newest == everything(turn)[1:][len(everything(turn)) - 1 - len(newest) :]
    assert sum(len(events) > 1 for events in told.values()) > 1


def test_nothing_is_read_of_journals_that_is_not_shown(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[int] = []
    of = StepContent.of

    def counted(body: bytes, said: Any = ()) -> StepContent:
        read.append(len(body))
        return of(body, said)

    for n in range(40):
        world.runs(f"s{n}", *[reply("x" * 100_000)] * 10)
    monkeypatch.setattr(StepContent, "of", counted)
    world.arrives()
    assert sum(read) <= 2 * CATCH_UP_BYTES


def test_what_small_turns_do_not_need_is_a_large_ones(world: World) -> None:
    large = world.runs("large", *[reply("x" * 40_000)] * 10)
    small = [world.runs(f"small{n}", reply("one"), results(1000)) for n in range(9)]
    assert world.arrives() == {turn.id: everything(turn) for turn in (large, *small)}


def test_of_a_long_text_the_end_is_shown_with_its_offset(world: World) -> None:
    text = "".join(f"{n} é🎈" for n in range(200_000))
    turn = world.runs("s", results(10), text=text[:1000])
    say(turn, text[1000:])
    [state, *pieces] = world.arrives()[turn.id]
    assert state == running_state(turn)
    begin = pieces[0].text.offset
    assert "".join(piece.text.text for piece in pieces) == text[begin:]
    shown = sum(event.ByteSize() for event in (state, *pieces))
    assert CATCH_UP_BYTES - 4096 < shown <= CATCH_UP_BYTES


def test_streams_that_come_again_and_again_share_what_is_shown_in_a_second(world: World) -> None:
    turns = [world.runs(f"s{n}", reply("x" * 100_000)) for n in range(10)]
    other = world.runs("other", reply("y"), tenant="other")
    first = world.arrives()
    again = [world.arrives() for _ in range(5)]
    assert bytes_of(first) + sum(map(bytes_of, again)) <= CATCH_UP_BYTES + 5 * 10 * 200
    for told in again:
        assert {turn.id: told[turn.id][0] for turn in turns} == {turn.id: running_state(turn) for turn in turns}
    assert world.arrives("other") == {other.id: everything(other)}
    world.now += CATCH_UP_S
    assert world.arrives() == first


def test_what_was_shown_to_tenants_is_forgotten(world: World) -> None:
    world.runs("s", reply("x"))
    world.arrives()
    world.now += CATCH_UP_S
    world.desk.forget_old()
    assert not world.desk._caught_up


def test_nobody_is_shown_anything_when_no_stream_is_new(world: World) -> None:
    world.runs("s", reply("x"))
    world.desk.catch_up(TENANT, CHANNEL, set())
    assert not world.outbox.take()


steps = st.lists(
    st.one_of(
        st.builds(reply, st.text("aé🎈", max_size=80), st.integers(0, 4)),
        st.builds(results, st.integers(0, 80), st.integers(0, 4)),
    ),
    max_size=4,
)


@given(steps, st.lists(st.text("aé🎈", max_size=60), max_size=4), st.integers(0, 1500))
def test_what_fits_is_the_end_of_everything(journal: list[StepBody], said: list[str], room: int) -> None:
    turn = a_turn(a_session(a_partition()), entry(inbound()).message)
    turn.journal = [body.SerializeToString() for body in journal]
    for text in said:
        say(turn, text)
    [state, *newest] = newest_that_fit(turn, room)
    whole = everything(turn)
    assert state == whole[0]
    assert not newest or state.ByteSize() + sum(event.ByteSize() for event in newest) <= room
    if newest and newest[0].HasField("text") and newest[0].text.offset:  # the text of the running step is cut
        assert len(newest) == 1
        rest = newest[0].text
        assert "".join(said)[rest.offset :] == rest.text
        assert newest[0].step == turn.step_count + 1
        return
    assert newest == whole[len(whole) - len(newest) :]
    if sum(event.ByteSize() for event in whole) + 400 <= room:
        assert len(newest) == len(whole) - 1
