"""Items write themselves into a group: dense positions, fences in order, the same again when a group is tried again."""

from collections.abc import Sequence

from soma.common.v1.message_pb2 import Message
from soma.common.v1.turn_pb2 import Delivery

from services.router.application.group import CommitItem, Group
from services.router.application.items import KEY_REUSED, CursorItem, DeadItem
from services.router.application.outcomes import AckItem, EndItem
from services.router.domain.partition import Cursor, Partition
from services.router.domain.turn import Outcome, StepKind
from tests.unit.router.builders import STREAM, a_partition, a_session, a_turn, group_of, inbound, ingest

POSITION, FAULT = 1, 9
"""Columns of the messages."""


def an_end(partition: Partition, name: str) -> EndItem:
    mail = ingest(partition, 1, inbound(name))
    mail.entries[0].message.position = 1
    turn = a_turn(a_session(partition, name), mail.entries[0].message)
    return EndItem(partition, turn, Outcome.FINAL, [(StepKind.FINAL, b"body")], Delivery(), lambda _: None)


def positions(group: Group, partition: int) -> list[object]:
    return [row[POSITION] for row in group.messages if row[0] == partition]


def test_positions_are_dense_over_items_and_partitions() -> None:
    zero, one = a_partition(0), a_partition(1)
    zero.mail_head = 10
    group = group_of(
        ingest(zero, 1, inbound("a"), inbound("b")), ingest(one, 1, inbound("c")), ingest(zero, 2, inbound("d"))
    )
    assert positions(group, 0) == [11, 12, 13]
    assert positions(group, 1) == [1]


def test_nothing_moves_before_the_group_is_written() -> None:
    p = a_partition()
    group = group_of(ingest(p, 7, inbound()), an_end(p, "x"))
    assert (p.mail_head, p.head, p.cursor) == (0, 0, Cursor())
    group.settle()
    assert (p.mail_head, p.head, p.cursor) == (1, 1, Cursor(STREAM, 7, "batch-7"))


def test_a_second_try_gives_the_positions_of_its_own_group() -> None:
    """The first try held items of a partition that was lost: the rest closes up and stays dense."""
    p, lost = a_partition(0), a_partition(1)
    first, second = ingest(p, 1, inbound("a")), ingest(p, 2, inbound("b"), inbound("c"))
    ends = [an_end(p, "x"), an_end(p, "y")]
    every: Sequence[CommitItem] = [first, ingest(lost, 1, inbound("l")), second, *ends]
    group_of(*every)
    assert [end.position for end in ends] == [1, 2]
    again = group_of(second, ends[1])
    assert positions(again, 0) == [1, 2]
    assert [entry.message.position for entry in second.entries] == [1, 2]
    assert ends[1].position == 1
    assert again.moves.keys() == {0}


def test_fences_go_in_order_of_partition_whatever_the_items_order() -> None:
    partitions = [a_partition(number) for number in (5, 0, 3)]
    group = group_of(*(ingest(p, 1, inbound(f"s{p.id}")) for p in partitions))
    fence = group.fence()
    assert [row[:2] for row in fence] == [(p.id, p.term) for p in (partitions[1], partitions[2], partitions[0])]


def test_every_item_fences_its_partition() -> None:
    """Also those that write no rows under positions: an acknowledgement of a zombie must not pass."""
    p = a_partition(2)
    for item in (AckItem(p, 1, "demo"), DeadItem(p, "demo", b"", 1, "", b""), CursorItem(p, Cursor(STREAM, 1, "b"))):
        assert [row[0] for row in group_of(item).fence()] == [2]


def test_the_floor_is_the_oldest_message_without_outcome_and_never_beyond_what_was_written() -> None:
    p = a_partition()
    floor = 6
    assert group_of(ingest(p, 1, inbound())).fence()[0][floor] == 1
    p.mail_head = 9
    assert group_of(ingest(p, 1, inbound())).fence()[0][floor] == 10
    p.pending.add(4)
    p.pending.add(8)
    assert group_of(ingest(p, 1, inbound())).fence()[0][floor] == 4


def test_a_key_used_twice_in_a_group_for_different_content_is_a_fault_of_the_second() -> None:
    p = a_partition()
    group = group_of(
        ingest(p, 1, inbound(content=b"one"), inbound(content=b"one")), ingest(p, 2, inbound(content=b"2"))
    )
    assert [row[FAULT] for row in group.messages] == [0, 0, KEY_REUSED]


def test_the_fault_is_found_again_when_the_group_is_tried_again() -> None:
    p, lost = a_partition(0), a_partition(1)
    items = [ingest(p, 1, inbound(content=b"one")), ingest(p, 2, inbound(content=b"2"))]
    group_of(*items, ingest(lost, 1, inbound("other")))
    assert [row[FAULT] for row in group_of(*items).messages] == [0, KEY_REUSED]


def test_tenants_of_all_items_are_named() -> None:
    p = a_partition()
    group = group_of(
        ingest(p, 1, inbound(tenant="a"), tenant="a"), AckItem(p, 1, "b"), DeadItem(p, "c", b"", 1, "", b"")
    )
    assert group.tenants == {"a", "b", "c"}


def test_an_idle_cursor_never_goes_back_behind_an_ingest_of_its_group() -> None:
    p = a_partition()
    group = group_of(ingest(p, 9, inbound()), CursorItem(p, Cursor(STREAM, 5, "b5")))
    assert group.moves[0].cursor.seq == 9
    group = group_of(CursorItem(p, Cursor(STREAM, 12, "b12")))
    assert group.moves[0].cursor == Cursor(STREAM, 12, "b12")


def test_an_idle_cursor_comes_over_to_another_stream_with_a_lower_sequence() -> None:
    p = a_partition()
    p.cursor = Cursor("old", 100, "b")
    assert group_of(CursorItem(p, Cursor("new", 3, "b3"))).moves[0].cursor == Cursor("new", 3, "b3")


def test_an_end_says_all_that_the_channel_needs() -> None:
    p = a_partition()
    end = an_end(p, "x")
    end.answer.message.CopyFrom(Message())
    session = end.turn.session
    session.delivery_count = 4
    group = group_of(end)
    delivery = Delivery.FromString(group.deliveries[0][5])
    assert delivery == end.answer
    assert (delivery.delivery_id, delivery.turn_id) == (end.turn.id, end.turn.id)
    assert (delivery.position, delivery.attempt, int(delivery.outcome)) == (5, 1, Outcome.FINAL.value)
    assert (delivery.agent, delivery.session) == ("echo", "x")
    assert list(delivery.message_ids) == [end.turn.inputs[0].message_id]


def test_an_end_written_twice_says_the_same() -> None:
    end = an_end(a_partition(), "x")
    group_of(end)
    before = end.answer.SerializeToString()
    group_of(end)
    end.answer.create_time_ms = Delivery.FromString(before).create_time_ms
    assert end.answer.SerializeToString() == before


def test_an_end_without_delivery_takes_no_delivery_number() -> None:
    end = an_end(a_partition(), "x")
    end.turn.deliver = False
    group = group_of(end)
    assert group.deliveries == []
    assert [row[8] for row in group.ends] == [0]


def test_several_last_steps_are_numbered_on() -> None:
    end = an_end(a_partition(), "x")
    end.turn.journal = [b"1", b"2"]
    end.steps = [(StepKind.TOOL_RESULTS, b"3"), (StepKind.FAILURE, b"4")]
    group = group_of(end)
    assert [row[1] for row in group.steps] == [3, 4]
    assert [row[4:6] for row in group.ends] == [(2, 4)]
