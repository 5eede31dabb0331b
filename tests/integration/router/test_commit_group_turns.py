"""Steps, ends, stops and deliveries: journaled once, ended once, gone once acknowledged."""

import pytest
from soma.common.v1.turn_pb2 import Delivery

from services.router.application.group import FenceLost, GroupRejected
from services.router.application.items import ControlItem, DeadItem, DispatchItem
from services.router.application.outcomes import AckItem, EndItem
from services.router.domain.turn import Outcome, StepKind
from tests.integration.router.store import Store, end, start, step
from tests.unit.router.builders import a_session, a_turn, inbound, ingest


async def test_steps_are_numbered_from_one_and_read_back_in_order(store: Store) -> None:
    p = await store.take(0)
    _, turn = await store.started(p, inbound(), 1)
    for kind, body in ((StepKind.MODEL_REPLY, b"call\0"), (StepKind.TOOL_RESULTS, b"\xff")):
        await store.commit(step(turn, kind, body))
        turn.journal.append(body)
    await store.commit(end(turn, body=b"final"))
    assert await store.history.journal("demo", turn.id) == [(1, b"call\0"), (2, b"\xff"), (3, b"final")]
    assert await store.rows("turns", "status, outcome, step_count") == [(3, 1, 3)]


async def test_a_step_that_is_journaled_already_is_refused_with_all_that_came_with_it(store: Store) -> None:
    """Memory that does not know of a journaled step is wrong: the item is found, and its partition's term ends."""
    p = await store.take(0)
    _, turn = await store.started(p, inbound(), 1)
    await store.commit(step(turn, body=b"first"))
    with pytest.raises(GroupRejected):
        await store.commit(ingest(p, 2, inbound("other")), step(turn, body=b"second"))
    assert await store.history.journal("demo", turn.id) == [(1, b"first")]
    assert len(await store.rows("messages")) == 1


async def test_a_turn_ends_once(store: Store) -> None:
    p = await store.take(0)
    _, turn = await store.started(p, inbound(), 1)
    await store.commit(end(turn, body=b"answer"))
    with pytest.raises(FenceLost) as lost:
        await store.commit(EndItem(p, turn, Outcome.ERROR, [], Delivery(), lambda _: None))
    assert lost.value.partitions == {0}
    assert await store.rows("turns", "status, outcome") == [(3, 1)]
    assert len(await store.rows("deliveries")) == 1


async def test_only_the_partition_of_the_turn_that_has_ended_is_named(store: Store) -> None:
    zero, three = await store.take(0), await store.take(3)
    _, ended = await store.started(zero, inbound("a"), 1)
    _, open_ = await store.started(three, inbound("b"), 1)
    await store.commit(end(ended))
    again = EndItem(zero, ended, Outcome.ERROR, [], Delivery(), lambda _: None)
    with pytest.raises(FenceLost) as lost:
        await store.commit(again, end(open_))
    assert lost.value.partitions == {0}
    await store.commit(end(open_))


async def test_a_turn_that_ends_twice_in_one_group_does_not_end(store: Store) -> None:
    p = await store.take(0)
    _, turn = await store.started(p, inbound(), 1)
    with pytest.raises((FenceLost, GroupRejected)):
        await store.commit(end(turn), EndItem(p, turn, Outcome.ERROR, [], Delivery(), lambda _: None))
    assert await store.rows("turns", "status, outcome") == [(1, 0)]


async def test_a_turn_id_is_used_once(store: Store) -> None:
    p = await store.take(0)
    session, turn = await store.started(p, inbound(), 1)
    await store.commit(end(turn))
    session.turn_count = 1
    with pytest.raises(GroupRejected):
        await store.commit(start(a_turn(session, turn.inputs[0]), fresh=False))


async def test_a_session_has_one_turn_per_number(store: Store) -> None:
    p = await store.take(0)
    session, _ = await store.started(p, inbound(), 1)
    mail = ingest(p, 2, inbound(key="k2"))
    second = a_turn(session, mail.entries[0].message)  # its number is the running turn's
    with pytest.raises(GroupRejected):
        await store.commit(mail, start(second))


async def test_the_end_moves_the_session_and_the_head(store: Store) -> None:
    p = await store.take(0)
    session, turn = await store.started(p, inbound(), 1)
    await store.commit(end(turn))
    assert (await store.partition_row(0))[0] == p.head == 1
    assert await store.rows("sessions", "done_position, turn_count, delivery_count") == [(1, 1, 1)]
    [(position, session_id, tenant, channel, payload)] = await store.rows(
        "deliveries", "position, session_id, tenant, channel, payload"
    )
    assert (position, session_id, tenant, channel) == (1, session.id, "demo", "line")
    delivery = Delivery.FromString(payload)
    assert (delivery.turn_id, delivery.position, list(delivery.message_ids)) == (
        turn.id,
        1,
        [turn.inputs[0].message_id],
    )


async def test_a_turn_that_starts_and_ends_in_one_group(store: Store) -> None:
    p = await store.take(0)
    mail = ingest(p, 1, inbound())
    turn = a_turn(a_session(p), mail.entries[0].message)
    await store.commit(mail, start(turn), EndItem(p, turn, Outcome.CANCELLED, [], Delivery(), lambda _: None))
    assert await store.rows("turns", "status, outcome") == [(3, 4)]


async def test_a_step_follows_the_one_before_it_in_an_open_turn(store: Store) -> None:
    p = await store.take(0)
    _, turn = await store.started(p, inbound(), 1)
    ahead = step(turn)
    turn.journal.append(b"never committed")
    with pytest.raises(FenceLost) as lost:
        await store.commit(step(turn))
    assert lost.value.partitions == {0}
    turn.journal.clear()
    await store.commit(ahead)
    assert await store.rows("turns", "step_count, status") == [(1, 1)]
    with pytest.raises((FenceLost, GroupRejected)):
        await store.commit(end(turn))  # made without the step that is in the journal


async def test_nothing_is_delivered_for_channels_without_adapters(store: Store) -> None:
    p = await store.take(0)
    item = inbound()
    item.deliver = False
    _, turn = await store.started(p, item, 1)
    await store.commit(end(turn))
    assert await store.rows("deliveries") == []
    assert await store.rows("sessions", "turn_count, delivery_count") == [(1, 0)]


async def test_a_cancel_makes_the_turn_converge_and_moves_the_control_position(store: Store) -> None:
    p = await store.take(0)
    session, turn = await store.started(p, inbound(), 1)
    await store.commit(ControlItem(p, session.id, "demo", [2], lambda _: None, turn=turn))
    assert await store.rows("turns", "status, outcome") == [(2, 0)]
    assert await store.rows("sessions", "control_position, done_position") == [(2, 0)]


async def test_a_cancel_after_the_final_changes_nothing(store: Store) -> None:
    p = await store.take(0)
    session, turn = await store.started(p, inbound(), 1)
    await store.commit(end(turn))
    await store.commit(ControlItem(p, session.id, "demo", [2], lambda _: None, turn=turn))
    assert await store.rows("turns", "status, outcome") == [(3, 1)]


async def test_a_dispatch_is_raised_durably(store: Store) -> None:
    p = await store.take(0)
    _, turn = await store.started(p, inbound(), 1)
    turn.dispatch, turn.strikes = 4, 2
    await store.commit(DispatchItem(p, turn, lambda _: None, turn.dispatch))
    assert await store.rows("turns", "dispatch, strikes") == [(4, 2)]


# ---- deliveries


async def outcomes(store: Store, count: int) -> list[EndItem]:
    p = await store.take(0)
    ends = []
    for n in range(count):
        _, turn = await store.started(p, inbound(f"s{n}"), n + 1)
        item = end(turn)
        await store.commit(item)
        ends.append(item)
    return ends


async def test_what_is_acknowledged_is_gone_and_only_that(store: Store) -> None:
    ends = await outcomes(store, 3)
    p = ends[0].partition
    await store.commit(AckItem(p, ends[1].position, "demo"))
    waiting = await store.history.deliveries("demo", 0, "line", 0, 10)
    assert [d.position for d in waiting] == [1, 3]
    assert [d.position for d in await store.history.deliveries("demo", 0, "line", 1, 10)] == [3]
    assert [d.position for d in await store.history.deliveries("demo", 0, "line", 0, 1)] == [1]
    assert await store.history.deliveries("demo", 0, "other", 0, 10) == []
    assert await store.leases.undelivered_channels(0) == [("demo", "line")]
    await store.commit(AckItem(p, ends[1].position, "demo"))  # twice is once


async def test_a_delivery_that_is_set_aside_is_kept_as_a_dead_letter(store: Store) -> None:
    [item] = await outcomes(store, 1)
    await store.commit(AckItem(item.partition, item.position, "demo", item.answer, "tried too often"))
    assert await store.rows("deliveries") == []
    assert await store.leases.undelivered_channels(0) == []
    [(kind, ref, reason, message, payload)] = await store.rows("dead_letters", "kind, ref, reason, message, payload")
    assert (kind, ref, reason, message) == ("delivery", item.turn.id, 46, "tried too often")
    assert Delivery.FromString(payload) == item.answer


async def test_an_adapters_words_cannot_keep_a_delivery_from_being_set_aside(store: Store) -> None:
    """The database takes no NUL in a text; an adapter says why it returns a delivery in words of its own."""
    [item] = await outcomes(store, 1)
    await store.commit(AckItem(item.partition, item.position, "demo", item.answer, "not\0today"))
    assert await store.rows("deliveries") == []
    assert await store.rows("dead_letters", "kind, message") == [("delivery", "not\N{REPLACEMENT CHARACTER}today")]


async def test_an_unreadable_item_is_set_aside_with_its_bytes(store: Store) -> None:
    p = await store.take(0)
    await store.commit(DeadItem(p, "demo", b"ref", 29, "cannot be read", b"\0\xff"))
    assert await store.rows("dead_letters", "tenant, kind, payload") == [("demo", "inbound", b"\0\xff")]
