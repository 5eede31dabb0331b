"""A watcher that asks about a message is told of the turn that takes this very message."""

from typing import Any, cast

from google.protobuf.struct_pb2 import Value
from soma.common.v1.turn_pb2 import Delivery, ModelReply, Outcome, StepBody, ToolCall, ToolResult, ToolResults
from soma.router.v1.inbound_pb2 import Inbound
from soma.router.v1.outbound_pb2 import WatchQuery

from services.router.application.state import RouterState
from services.router.application.watch_turns import LiveDesk
from services.router.domain.session import Session
from soma_common import ids
from soma_common.layout import LaneLayout
from tests.unit.router.builders import TENANT, a_partition, a_session, a_turn, entry, inbound

FIRST, OTHER = inbound(content=b"first"), inbound(content=b"other")
REFUSAL = ids.turn_id(FIRST.session_id, FIRST.message_id, 2)


class History:
    """Knows the turn of the other content, once it has ended."""

    def __init__(self) -> None:
        self.ended: dict[bytes, bytes] = {}

    async def turn_answering(self, tenant: str, message_id: bytes, content_hash: bytes) -> bytes | None:
        return self.ended.get(content_hash)

    async def ended_turn(self, tenant: str, turn_id: bytes) -> tuple[Delivery, int, int] | None:
        return Delivery(turn_id=turn_id, outcome=Outcome.OUTCOME_ERROR), 1, 1


def desk() -> tuple[LiveDesk, History, Session]:
    state = RouterState(LaneLayout(8, 1), cast(Any, None), 100, 100)
    history = History()
    partition = state.partitions[ids.partition_of(FIRST.session_id, 8)] = a_partition(
        ids.partition_of(FIRST.session_id, 8)
    )
    return LiveDesk(state, history, cast(Any, None), lambda _: None), history, a_session(partition)  # type: ignore[arg-type]


def about(item: Inbound) -> WatchQuery:
    return WatchQuery(session_id=item.session_id, message_id=item.message_id, content_hash=item.content_hash)


async def test_a_running_turn_is_shown_to_who_sent_its_message_only() -> None:
    live, _, session = desk()
    turn = a_turn(session, entry(FIRST).message)
    number = session.partition.id
    snapshot = await live.query(TENANT, number, about(FIRST))
    assert snapshot is not None
    assert [event.turn_id for event in snapshot.events] == [turn.id]
    other = await live.query(TENANT, number, about(OTHER))
    assert other is not None
    assert not other.known


async def test_while_a_partition_is_put_back_nobody_is_told_that_there_is_nothing() -> None:
    live, _, session = desk()
    session.partition.restoring = True
    assert await live.query(TENANT, session.partition.id, about(FIRST)) is None


async def test_waiting_messages_under_one_key_are_told_apart() -> None:
    live, _, session = desk()
    session.queue.extend([entry(FIRST).message, entry(inbound(key="k2")).message, entry(OTHER).message])
    snapshot = await live.query(TENANT, session.partition.id, about(OTHER))
    assert snapshot is not None
    assert (snapshot.known, snapshot.queued, snapshot.ahead) == (True, True, 2)


async def test_an_ended_turn_is_found_by_content() -> None:
    live, history, session = desk()
    history.ended = {FIRST.content_hash: ids.turn_id(session.id, FIRST.message_id), OTHER.content_hash: REFUSAL}
    snapshot = await live.query(TENANT, session.partition.id, about(OTHER))
    assert snapshot is not None
    assert [event.turn_id for event in snapshot.events] == [REFUSAL]


async def test_a_turn_that_holds_more_than_the_bus_takes_is_shown_from_its_newest_steps_on() -> None:
    live, _, session = desk()
    turn = a_turn(session, entry(FIRST).message)
    for _ in range(10):
        turn.journal.append(StepBody(model_reply=ModelReply(tool_calls=[ToolCall(tool="t")])).SerializeToString())
        result = ToolResult(result=Value(string_value="x" * 200_000))
        turn.journal.append(StepBody(tool_results=ToolResults(results=[result])).SerializeToString())
    snapshot = await live.query(TENANT, session.partition.id, about(FIRST))
    assert snapshot is not None
    assert snapshot.ByteSize() < 1024 * 1024
    assert snapshot.events[0].message_ids == [FIRST.message_id]
    assert [event.step for event in snapshot.events[1:]] == list(range(17, 21))
