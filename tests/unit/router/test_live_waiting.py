"""A watch of a turn that waits is answered without making the ids of the whole line for each question."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st
from soma.common.v1.turn_pb2 import WatchPosition
from soma.router.v1.outbound_pb2 import WatchQuery, WatchSnapshot

from services.router.application import watch_turns
from services.router.application.live_waiting import WaitingTurns
from services.router.application.state import RouterState
from services.router.application.watch_turns import INTEREST_S, LiveDesk
from services.router.domain.session import QueuedMessage, Session
from soma_common import ids
from soma_common.layout import LaneLayout
from tests.unit.router.builders import TENANT, a_partition, a_session, entry, inbound

WAITING = 200
MADE_UP = b"m" * 16


class Empty:
    """A WatchStore in which nothing has begun."""

    async def turn(self, tenant: str, turn_id: bytes) -> None:
        return None

    async def ended_turn(self, tenant: str, turn_id: bytes) -> None:
        return None


class Line:
    """A session in which messages wait."""

    def __init__(self) -> None:
        self.state = RouterState(LaneLayout(8, 1), cast(Any, None), 100, 100)
        partition = a_partition(ids.partition_of(inbound().session_id, 8))
        self.state.partitions[partition.id] = partition
        self.session = a_session(partition)
        self.desk = LiveDesk(self.state, cast(Any, Empty()), cast(Any, None), lambda _: None)

    def comes(self, *keys: str) -> None:
        for key in keys:
            self.state.enqueue(self.session, entry(inbound(key=key)).message)

    async def ask(self, turn_id: bytes, *, paged: bool) -> WatchSnapshot:
        query = WatchQuery(session_id=self.session.id, turn_id=turn_id)
        if paged:
            query.after.CopyFrom(WatchPosition(turn_id=turn_id))
        answer = await self.desk.query(TENANT, self.session.partition.id, query)
        assert answer is not None
        return answer


def turn_of(session: Session, key: str) -> bytes:
    return ids.turn_id(session.id, inbound(key=key).message_id)


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    """Says how many turns' ids were made since it was asked last."""
    calls: list[bytes] = []
    turn_id = ids.turn_id

    def counted(session: bytes, message: bytes, generation: int = 0) -> bytes:
        calls.append(message)
        return turn_id(session, message, generation)

    def since() -> int:
        count = len(calls)
        calls.clear()
        return count

    monkeypatch.setattr(ids, "turn_id", counted)
    return since


@pytest.mark.parametrize("paged", [True, False], ids=["paged", "whole"])
async def test_ids_of_a_line_are_made_once_however_many_watch(made: Callable[[], int], paged: bool) -> None:
    line = Line()
    line.comes(*map(str, range(WAITING)))
    turns = [turn_of(line.session, str(n)) for n in range(WAITING)]
    made()
    for ahead, turn_id in enumerate(turns):
        answer = await line.ask(turn_id, paged=paged)
        assert (answer.known, answer.queued, answer.ahead) == (True, True, ahead)
    for _ in range(3):
        assert not (await line.ask(MADE_UP, paged=paged)).known
    assert made() == WAITING


async def test_only_what_has_come_since_is_looked_at(made: Callable[[], int]) -> None:
    line = Line()
    line.comes(*map(str, range(WAITING)))
    assert not (await line.ask(MADE_UP, paged=True)).known
    line.comes("new", "newer")
    newer = turn_of(line.session, "newer")
    made()
    assert (await line.ask(newer, paged=True)).ahead == WAITING + 1
    assert made() == 2


async def test_a_message_that_was_taken_and_comes_back_is_found(made: Callable[[], int]) -> None:
    line = Line()
    line.comes("first", "second")
    taken = line.state.dequeue(line.session)
    turn_id = turn_of(line.session, "first")
    assert not (await line.ask(turn_id, paged=True)).known
    line.state.requeue(line.session, taken)
    answer = await line.ask(turn_id, paged=True)
    assert (answer.queued, answer.ahead) == (True, 0)


@pytest.mark.parametrize("query", [WatchQuery(message_id=b"x" * 16), WatchQuery()], ids=["message", "anything"])
async def test_no_ids_are_made_for_who_does_not_ask_about_a_turn(made: Callable[[], int], query: WatchQuery) -> None:
    line = Line()
    line.comes(*map(str, range(WAITING)))
    query.session_id = line.session.id
    made()
    await line.desk.query(TENANT, line.session.partition.id, query)
    assert made() <= 1  # of the message that is asked about


async def test_ids_are_forgotten_with_the_interest(made: Callable[[], int], monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(watch_turns, "monotonic", lambda: now)
    line = Line()
    line.comes(*map(str, range(WAITING)))
    await line.ask(MADE_UP, paged=True)
    now += INTEREST_S
    line.desk.forget_old()
    made()
    await line.ask(MADE_UP, paged=True)
    assert made() == WAITING


def test_ids_kept_are_bounded_and_those_asked_about_last_stay(made: Callable[[], int]) -> None:
    waiting = WaitingTurns(most=25)
    sessions = [a_session(a_partition(), name) for name in "abc"]
    for session in sessions:
        session.queue.extend(entry(inbound(key=str(n))).message for n in range(10))
    for session in sessions:
        waiting.ahead(session, MADE_UP)
    made()
    for session in reversed(sessions):
        waiting.ahead(session, MADE_UP)
    assert made() == 10  # of the first one again
    assert sum(map(len, waiting._turns.values())) == waiting._kept <= 25


def test_ids_of_messages_that_wait_no_more_are_dropped() -> None:
    waiting = WaitingTurns()
    session = a_session(a_partition())
    for n in range(1000):
        session.queue.append(entry(inbound(key=str(n))).message)
        waiting.ahead(session, MADE_UP)
        if len(session.queue) > 3:
            session.queue.popleft()
    assert sum(map(len, waiting._turns.values())) == waiting._kept < 100


moves = st.lists(st.tuples(st.sampled_from(["comes", "taken", "back", "asked", "forgotten"]), st.integers(0, 7)))


@given(moves, st.integers(1, 6))
def test_answers_are_those_of_a_search_of_the_whole_line(steps: list[tuple[str, int]], most: int) -> None:
    waiting = WaitingTurns(most)
    sessions = [a_session(a_partition(), name) for name in "ab"]
    taken: dict[bytes, list[QueuedMessage]] = {session.id: [] for session in sessions}
    for move, number in steps:
        session = sessions[number % 2]
        match move:
            case "comes":  # a key may be used again
                session.queue.append(entry(inbound(key=str(number // 2))).message)
            case "taken" if session.queue:
                taken[session.id].append(session.queue.popleft())
            case "back" if taken[session.id]:
                session.queue.appendleft(taken[session.id].pop())
            case "forgotten":
                waiting.forget(session.id)
        turn_id = turn_of(session, str(number // 2))
        line = [ids.turn_id(session.id, message.message_id) for message in session.queue]
        assert waiting.ahead(session, turn_id) == (line.index(turn_id) if turn_id in line else None)
        assert sum(map(len, waiting._turns.values())) == waiting._kept <= most
