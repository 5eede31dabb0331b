"""Ingest takes whatever a lane holds: nothing in a message may stop a partition."""

from types import SimpleNamespace
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st
from soma.common.v1.error_reason_pb2 import ErrorReason
from soma.router.v1.inbound_pb2 import InBatch, Inbound

from services.router.application.group import CommitItem, Group, GroupResult, SessionFacts
from services.router.application.ingest_messages import Ingest
from services.router.application.items import KEY_REUSED, CursorItem, DeadItem, IngestItem
from services.router.application.state import RouterState
from services.router.domain.partition import Cursor, Partition
from services.router.domain.session import QueuedMessage, Session
from soma_common import ids
from soma_common.layout import BATCH_FORMAT, LaneLayout
from tests.unit.router.builders import PARTITIONS, TENANT, a_partition, cancel, inbound, names_in
from tests.unit.router.engine import Directory

NEW = SessionFacts(0, 0, 0)


class World:
    """Ingest with some partitions, and a committer that keeps what it is given."""

    def __init__(self, *numbers: int, partitions: int = PARTITIONS, lanes: int = 1) -> None:
        self.state = RouterState(LaneLayout(partitions, lanes), cast(Any, Directory()), 10, 10)
        for number in numbers:
            self.own(number)
        self.put_items: list[CommitItem] = []
        self.nudges = 0
        self.cancels: list[tuple[bytes | None, int]] = []
        runner = SimpleNamespace(
            starter=self, arrivals=self, controls=self, starts_ahead=False, give_next=lambda _: None
        )
        self.ingest = Ingest(self.state, cast(Any, runner))
        self.ingest.committer = cast(Any, self)

    def was_known(self, session: Session | None, message: QueuedMessage) -> None:
        """No turn starts here that would have to be dropped."""

    def own(self, number: int) -> Partition:
        partition = self.state.partitions[number] = a_partition(number)
        partition.attached = True
        return partition

    def put(self, item: CommitItem) -> None:
        self.put_items.append(item)

    def nudge(self) -> None:
        self.nudges += 1

    def apply(self, session: Session, kind: int, position: int, target: bytes | None) -> None:
        self.cancels.append((target, position))

    def arrive(self, session: Session, message: QueuedMessage) -> None:
        self.state.enqueue(session, message)

    def message(self, seq: int, *items: Inbound, format_: int = BATCH_FORMAT, lane: int = 0) -> None:
        self.raw(seq, InBatch(format=format_, tenant=TENANT, items=items).SerializeToString(), lane)

    def raw(self, seq: int, data: bytes, lane: int = 0) -> None:
        self.ingest.on_message(lane, TENANT, "stream", seq, f"batch-{seq}", data)

    def of(self, kind: type[Any]) -> list[Any]:
        return [item for item in self.put_items if isinstance(item, kind)]

    @property
    def mail(self) -> list[IngestItem]:
        return self.of(IngestItem)

    @property
    def dead(self) -> list[DeadItem]:
        return self.of(DeadItem)

    def committed(self, item: IngestItem, *, reused: bool = False, duplicates: int = 0) -> None:
        """The item is written; its first `duplicates` entries were known."""
        item.write(Group())
        places = [(item.partition.id, entry.message.position) for entry in item.entries]
        facts = {entry.inbound.session_id: NEW for entry in item.entries}
        inserted = frozenset(places[duplicates:])
        item.committed(GroupResult(inserted, inserted if reused else frozenset(), facts, frozenset()))


A, B = names_in(0, 1)[0], names_in(1, 1)[0]


def test_items_go_to_their_partitions_in_order_and_those_of_others_are_left_to_them() -> None:
    world = World(0, 1)
    other = names_in(2, 1)[0]
    world.message(5, inbound(A, "1"), inbound(B, "1"), inbound(other, "1"), inbound(A, "2"))
    assert [(item.partition.id, len(item.entries)) for item in world.mail] == [(0, 2), (1, 1)]
    first = world.mail[0]
    assert [entry.inbound.message_id for entry in first.entries] == [inbound(A, k).message_id for k in "12"]
    assert first.cursor == Cursor("stream", 5, "batch-5")
    assert world.ingest.backlog == 2


def test_what_was_read_before_is_skipped() -> None:
    world = World(0, 1)
    world.message(5, inbound(A))
    world.message(5, inbound(A), inbound(B))
    world.message(4, inbound(A))
    assert [item.partition.id for item in world.mail] == [0, 1]


def test_a_partition_that_is_not_attached_gets_nothing() -> None:
    world = World(0)
    world.state.partitions[0].attached = False
    world.message(5, inbound(A))
    world.raw(6, b"\xff")
    assert world.put_items == []
    assert world.state.partitions[0].read_seq == 0


def test_a_format_of_another_release_is_set_aside_and_the_partition_goes_on() -> None:
    world = World(0, 1)
    world.message(5, inbound(A), format_=99)
    [dead] = world.dead
    assert (dead.reason, dead.tenant, dead.ref) == (ErrorReason.ERROR_REASON_SCHEMA_UNKNOWN, TENANT, b"batch-5")
    assert "99" in dead.message
    assert InBatch.FromString(dead.payload).items[0] == inbound(A)
    assert [item.cursor.seq for item in world.of(CursorItem)] == [5]
    world.message(6, inbound(A))
    assert len(world.mail) == 1


def test_a_message_that_is_no_batch_is_set_aside_with_its_bytes() -> None:
    world = World(0)
    world.raw(5, b"\xff\xff\xff")
    [dead] = world.dead
    assert (dead.reason, dead.payload) == (ErrorReason.ERROR_REASON_ITEM_CORRUPT, b"\xff\xff\xff")


def test_an_unreadable_message_is_set_aside_once_and_not_again_when_it_is_read_again() -> None:
    world = World(0, 1)
    world.raw(5, b"\xff")
    world.raw(5, b"\xff")
    assert len(world.dead) == 2, "one per partition that reads it again: the second has not had it"
    world.raw(5, b"\xff")
    assert len(world.dead) == 2


def test_an_unreadable_message_moves_no_cursor_of_another_lane() -> None:
    world = World(0, 1, lanes=2)
    world.raw(50, b"\xff", lane=1)
    assert [item.partition.id for item in world.put_items] == [1, 1]
    assert world.state.partitions[0].read_seq == 0
    world.message(3, inbound(A), lane=0)
    assert len(world.mail) == 1


@pytest.mark.parametrize(
    "spoil",
    [
        {"session_id": b""},
        {"session_id": b"short"},
        {"session_id": ids.session_id("other", "echo", "line", "s")},
        {"message_id": b""},
        {"message_id": b"x" * 17},
        {"content_hash": b""},
        {"content_hash": b"x" * 100_000},
        {"agent": ""},
        {"agent": "Not A Slug"},
        {"channel": "a/b"},
        {"session": "a\0b"},
        {"session": "x" * 129},
        {"traceparent": "\0"},
    ],
    ids=str,
)
def test_one_bad_item_among_64_is_set_aside_and_63_are_taken(spoil: dict[str, Any]) -> None:
    world = World(*range(PARTITIONS))
    items = [inbound(f"s{n}", f"k{n}") for n in range(64)]
    for field, value in spoil.items():
        setattr(items[17], field, value)
    world.message(5, *items)
    taken = [entry.inbound.session for item in world.mail for entry in item.entries]
    assert sorted(taken) == sorted(f"s{n}" for n in range(64) if n != 17)
    [dead] = world.dead
    assert dead.reason == ErrorReason.ERROR_REASON_ITEM_CORRUPT
    assert Inbound.FromString(dead.payload) == items[17]


def test_a_partition_whose_only_item_is_bad_moves_on() -> None:
    world = World(0)
    item = inbound(A)
    item.agent = "?"
    world.message(5, item)
    assert [(mail.cursor, mail.entries) for mail in world.mail] == [(Cursor("stream", 5, "batch-5"), [])]
    assert world.state.partitions[0].read_seq == 5


@pytest.mark.parametrize(("field", "value"), [("kind", 77), ("kind", 0), ("policy", 99), ("policy", -3)])
def test_what_a_later_release_may_say_is_answered_with_a_typed_error(field: str, value: int) -> None:
    world = World(0)
    item = inbound(A)
    setattr(item, field, value)
    world.message(5, item)
    [entry] = world.mail[0].entries
    assert entry.message.fault == ErrorReason.ERROR_REASON_SCHEMA_UNKNOWN
    assert not entry.is_control


@given(st.binary(max_size=200))
def test_any_bytes_are_taken_in_some_way(data: bytes) -> None:
    world = World(*range(PARTITIONS))
    world.raw(1, data)
    world.message(2, *(inbound(f"s{n}") for n in range(30)))
    second = Cursor("stream", 2, "batch-2")
    assert sum(len(item.entries) for item in world.mail if item.cursor == second) == 30


# ---- once it is written


def test_a_new_message_is_handed_to_its_session() -> None:
    world = World(0)
    world.message(5, inbound(A))
    world.committed(world.mail[0])
    session = world.state.partitions[0].sessions[inbound(A).session_id]
    assert [message.message_id for message in session.queue] == [inbound(A).message_id]
    assert list(world.state.partitions[0].pending) == [1]
    assert world.ingest.backlog == 0


def test_duplicates_change_nothing() -> None:
    world = World(0)
    world.message(5, inbound(A), inbound(A, "new"))
    world.committed(world.mail[0], duplicates=1)
    session = world.state.partitions[0].sessions[inbound(A).session_id]
    assert [message.message_id for message in session.queue] == [inbound(A, "new").message_id]
    assert list(world.state.partitions[0].pending) == [2]


def test_nothing_but_duplicates_makes_no_session() -> None:
    world = World(0)
    world.message(5, inbound(A))
    world.committed(world.mail[0], duplicates=1)
    assert world.state.partitions[0].sessions == {}
    assert world.ingest.backlog == 0


def test_a_reused_key_is_a_fault_of_the_message() -> None:
    world = World(0)
    world.message(5, inbound(A))
    world.committed(world.mail[0], reused=True)
    session = world.state.partitions[0].sessions[inbound(A).session_id]
    assert session.queue[0].fault == KEY_REUSED


def test_what_is_abandoned_leaves_no_trace_and_no_backlog() -> None:
    world = World(0)
    world.message(5, inbound(A))
    world.mail[0].abandoned()
    assert world.ingest.backlog == 0
    assert not list(world.state.partitions[0].pending)


def test_a_cancel_comes_after_the_messages_before_it() -> None:
    world = World(0)
    world.message(5, inbound(A), cancel(A, target=b"t" * 16))
    world.committed(world.mail[0])
    assert world.cancels == [(b"t" * 16, 2)]
    session = world.state.partitions[0].sessions[inbound(A).session_id]
    assert len(session.queue) == 1
