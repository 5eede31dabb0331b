"""Policies and controls in the real tables: refusals, further inputs, stops, pauses, and what a new owner learns."""

from __future__ import annotations

import pytest
from soma.common.v1.turn_pb2 import Delivery
from soma.router.v1.inbound_pb2 import InboundKind

from services.router.application.group import FenceLost
from services.router.application.items import ControlItem, DispatchItem, InputItem
from services.router.application.outcomes import RefusalItem
from services.router.domain.arrival import Policy, replacement
from services.router.domain.session import Session, Turn
from services.router.domain.turn import Outcome
from soma_common import ids
from tests.integration.router.store import Store, end, start
from tests.unit.router.builders import a_turn, inbound, ingest, names_in

MINE = "demo"


def refusal(session: Session, position: int, key: str) -> RefusalItem:
    item = inbound(session.key.session, key)
    mail = ingest(session.partition, 9, item)
    message = mail.entries[0].message
    message.position = position
    turn = Turn(ids.turn_id(session.id, message.message_id), session, 0, [message], "", True)
    return RefusalItem(session.partition, turn, b"body", Delivery(), lambda _: None)


async def arrives(store: Store, session: Session, key: str, seq: int, policy: Policy = Policy.ENQUEUE) -> int:
    """A further message of the session is stored; its position."""
    mail = ingest(session.partition, seq, inbound(session.key.session, key))
    message = mail.entries[0].message
    message.policy, message.debounce_s, message.debounce_max_s = policy, 0.25, 2.0
    await store.commit(mail)
    return message.position


async def test_a_refused_message_ends_before_those_that_were_there_first(store: Store) -> None:
    p = await store.take(0)
    session, turn = await store.started(p, inbound("s", "1"), 1)
    position = await arrives(store, session, "2", 2, Policy.REJECT)
    item = refusal(session, position, "2")
    await store.commit(item)
    assert [row.position for row in await store.load(p)] == [1]
    assert (session.delivery_count, item.answer.position) == (1, 1)
    assert int(item.answer.outcome) == Outcome.REJECTED
    await store.commit(end(turn))
    assert session.delivery_count == 2
    rows = await store.rows("turns", "number, first_position, last_position, status, outcome")
    assert rows == [(-2, 2, 2, 3, 3), (1, 1, 1, 3, 1)]
    assert await store.load(p) == []
    refused = await store.history.turn(MINE, item.turn.id)
    assert refused is not None
    assert (refused.number, list(refused.message_ids)) == (0, [inbound("s", "2").message_id])
    [first, second] = await store.history.messages(MINE, session.id, 0, 10)
    assert (first.turn_id, first.outcome, second.turn_id, second.outcome) == (turn.id, 1, item.turn.id, 3)
    assert [row.number for row in await store.history.session_turns(MINE, session.id, None, 0, 10)] == [1]


async def test_an_end_and_a_refusal_of_one_group_number_their_deliveries_in_order(store: Store) -> None:
    p = await store.take(0)
    session, turn = await store.started(p, inbound("s", "1"), 1)
    position = await arrives(store, session, "2", 2, Policy.REJECT)
    item, ended = refusal(session, position, "2"), end(turn)
    await store.commit(item, ended)
    assert (item.answer.position, ended.answer.position) == (1, 2)
    [(count, _)] = await store.rows("sessions", "delivery_count, session_id")
    assert count == session.delivery_count == 2


async def test_a_refused_message_inside_a_later_turn_is_none_of_its_inputs(store: Store) -> None:
    p = await store.take(0)
    session, turn = await store.started(p, inbound("s", "1"), 1)
    refused = await arrives(store, session, "2", 2, Policy.REJECT)
    await store.commit(refusal(session, refused, "2"))
    steering = await arrives(store, session, "3", 3, Policy.STEER)
    await store.commit(InputItem(p, turn, steering, lambda _: None))
    row = await store.history.turn(MINE, turn.id)
    assert row is not None
    assert list(row.message_ids) == [inbound("s", key).message_id for key in "13"]
    loaded = await store.load(p)
    assert [(each.position, each.first_position, each.last_position) for each in loaded] == [(1, 1, 3), (3, 1, 3)]
    await store.commit(end(turn))
    assert len(await store.history.context(MINE, session.id, 10)) == 3, "two inputs and the answer"


async def test_further_inputs_of_one_group_all_count(store: Store) -> None:
    p = await store.take(0)
    session, turn = await store.started(p, inbound("s", "1"), 1)
    positions = [await arrives(store, session, str(n), n, Policy.STEER) for n in (2, 3)]
    await store.commit(*(InputItem(p, turn, position, lambda _: None) for position in reversed(positions)))
    assert {row.last_position for row in await store.load(p)} == {3}


@pytest.mark.parametrize("outcome", [Outcome.CANCELLED, Outcome.INTERRUPTED, Outcome.ABSORBED])
async def test_a_new_owner_learns_how_a_turn_was_stopped(store: Store, outcome: Outcome) -> None:
    p = await store.take(0)
    session, turn = await store.started(p, inbound("s", "1"), 1)
    await store.commit(ControlItem(p, session.id, MINE, [], lambda _: None, turn=turn, stop_as=outcome))
    [row] = await store.load(p)
    assert (row.status, row.stop) == (2, outcome)
    assert row.stop_age_ms is not None
    assert 0 <= row.stop_age_ms < 60_000
    shown = await store.history.turn(MINE, turn.id)
    assert shown is not None
    assert shown.stopping == outcome


@pytest.mark.parametrize(
    ("first", "second", "stays"),
    [
        (Outcome.INTERRUPTED, Outcome.CANCELLED, Outcome.INTERRUPTED),
        (Outcome.CANCELLED, Outcome.ABSORBED, Outcome.CANCELLED),
        (Outcome.ABSORBED, Outcome.INTERRUPTED, Outcome.ABSORBED),
        (Outcome.ABSORBED, Outcome.CANCELLED, Outcome.CANCELLED),
    ],
)
@pytest.mark.parametrize("together", [True, False])
async def test_the_first_stop_counts_except_before_a_rollback(
    store: Store, first: Outcome, second: Outcome, stays: Outcome, together: bool
) -> None:
    p = await store.take(0)
    session, turn = await store.started(p, inbound("s", "1"), 1)
    items = [
        ControlItem(p, session.id, MINE, [], lambda _: None, turn=turn, stop_as=outcome) for outcome in (first, second)
    ]
    if together:
        await store.commit(*items)
    else:
        for item in items:
            await store.commit(item)
    assert [row.stop for row in await store.load(p)] == [stays]


async def test_what_was_rolled_back_waits_again_and_is_known_as_such(store: Store) -> None:
    p = await store.take(0)
    session, turn = await store.started(p, inbound("s", "1"), 1)
    await arrives(store, session, "2", 2, Policy.ROLLBACK)
    dropped = end(turn, Outcome.ABSORBED)
    await store.commit(dropped)
    session.turn_count, session.turn = 1, None
    assert session.delivery_count == 0
    assert await store.rows("deliveries") == []
    loaded = await store.load(p)
    assert [(row.position, row.turn_id, row.rolled_back) for row in loaded] == [(1, None, True), (2, None, False)]
    message = turn.inputs[0]
    again = a_turn(session, message)
    again.id, again.number = ids.turn_id(session.id, message.message_id, replacement(2)), 2
    await store.commit(start(again, fresh=False))
    assert await store.history.turn_answering(MINE, message.message_id, inbound("s", "1").content_hash) == again.id
    outcome = await store.history.ended_turn(MINE, turn.id)
    assert outcome is not None
    assert outcome[0].absorbed_into == again.id, "who comes late is told what answers the messages"
    await store.commit(end(again))
    session.turn_count = 2
    assert len(await store.history.context(MINE, session.id, 10)) == 2, "said once, and answered"


async def test_a_group_that_gathers_is_due_by_the_clock_of_the_database(store: Store) -> None:
    p = await store.take(0)
    session, turn = await store.started(p, inbound("s", "1"), 1)
    await store.commit(end(turn))
    await arrives(store, session, "2", 2, Policy.ACCUMULATE)
    await store.eye.execute("UPDATE router.messages SET ingest_time = ingest_time - interval '10 s'")
    [row] = await store.load(p)
    assert (row.policy, row.debounce_ms, row.debounce_max_ms) == (Policy.ACCUMULATE, 250, 2000)
    assert 10_000 <= row.age_ms < 60_000


async def test_a_new_owner_knows_what_came_after_the_running_turn_began(store: Store) -> None:
    p = await store.take(0)
    session, _ = await store.started(p, inbound("s", "1"), 1)
    await arrives(store, session, "2", 2, Policy.INTERRUPT)
    assert [row.came_later for row in await store.load(p)] == [True, True]
    assert [row.size for row in await store.load(p)] == [len(inbound().content)] * 2
    await store.eye.execute("UPDATE router.turns SET create_time = create_time + interval '1 s'")
    assert [row.came_later for row in await store.load(p)] == [False, False]


async def test_the_last_pause_of_a_group_counts_and_is_found_by_a_new_owner(store: Store) -> None:
    p = await store.take(0)
    session, _ = await store.started(p, inbound("s", "1"), 1)

    def pause(position: int, paused: bool) -> ControlItem:
        return ControlItem(p, session.id, MINE, [position], lambda _: None, paused=paused)

    await store.commit(pause(2, False), pause(3, True))
    [row] = await store.load(p)
    assert row.paused
    shown = await store.history.session(MINE, session.id)
    assert shown is not None
    assert shown.paused
    result = await store.commit(ingest(p, 2, inbound("s", "2")))
    assert result.sessions[session.id].paused
    await store.commit(pause(4, True), pause(5, False))
    assert [row.paused for row in await store.load(p)] == [False, False]
    # A pause behind a cancel that is not done with names no position yet: it came later all the same.
    waits = ControlItem(p, session.id, MINE, [], lambda _: None, paused=True)
    await store.commit(pause(6, False), waits)
    assert [row.paused for row in await store.load(p)] == [True, True]


async def test_a_control_is_seen_when_it_is_stored_and_when_it_is_done_with(store: Store) -> None:
    p = await store.take(0)
    session, _ = await store.started(p, inbound("s", "1"), 1)
    item = inbound("s", "control")
    item.kind = InboundKind.INBOUND_KIND_PAUSE
    assert await store.history.control_done(MINE, item.message_id) is None
    mail = ingest(p, 2, item)
    await store.commit(mail)
    assert await store.history.control_done(MINE, item.message_id) is False
    await store.commit(ControlItem(p, session.id, MINE, [mail.entries[0].message.position], lambda _: None))
    assert await store.history.control_done(MINE, item.message_id) is True


async def test_waiting_messages_are_shown_with_their_place_and_age(store: Store) -> None:
    p = await store.take(0)
    session, turn = await store.started(p, inbound("s", "1"), 1)
    for number in (2, 3):
        await arrives(store, session, str(number), number)
    rows = await store.history.messages(MINE, session.id, 0, 10)
    assert [row.queue_position for row in rows] == [0, 1, 2]
    turns = [ids.turn_id(session.id, row.message_id) for row in rows]
    assert [await store.history.waits(MINE, session.id, each) for each in turns] == [False, True, True]
    assert all(row.age_ms >= 0 for row in rows)
    shown = await store.history.session(MINE, session.id)
    assert shown is not None
    assert (shown.queued_count, shown.running_turn) == (2, turn.id)
    assert shown.oldest_queued_time is not None


@pytest.mark.parametrize("parameters", [81, 95])
async def test_a_router_of_a_release_before_still_writes(store: Store, parameters: int) -> None:
    """Its function takes a parameter for each column and stays beside this one."""
    count = await store.eye.fetchval("SELECT count(*) FROM pg_proc WHERE proname = 'commit_group'")
    assert count == 3
    columns = ", ".join(["$1"] + ["'{}'"] * (parameters - 1))
    row = await store.eye.fetchrow(f"SELECT * FROM router.commit_group({columns})", MINE)
    assert row is not None
    assert row["inserted"] is None


async def test_nothing_of_it_passes_a_lost_fence(store: Store) -> None:
    p = await store.take(0)
    session, turn = await store.started(p, inbound("s", "1"), 1)
    position = await arrives(store, session, "2", 2, Policy.REJECT)
    await store.take(0)
    for item in (
        refusal(session, position, "2"),
        InputItem(p, turn, position, lambda _: None),
        ControlItem(p, session.id, MINE, [], lambda _: None, turn=turn, paused=True),
    ):
        with pytest.raises(FenceLost):
            await store.commit(item)
    assert await store.rows("turns", "number, last_position, status") == [(1, 1, 1)]


async def test_of_several_suspects_only_the_one_on_trial_is_blamed(store: Store) -> None:
    """The others waited for their turn to run alone when their router died."""
    p = await store.take(0)
    turns = {name: (await store.started(p, inbound(name), n))[1] for n, name in enumerate(names_in(0, 3), 1)}
    fresh, waits, runs = turns.values()
    for turn in (waits, runs):
        turn.strikes = 2
        await store.commit(DispatchItem(p, turn, lambda _: None, turn.dispatch, on_trial=turn is runs))
    await store.load(p, strike=True)
    await store.load(p, strike=True)
    strikes = {row[0]: row[1] for row in await store.rows("turns", "turn_id, strikes")}
    assert strikes == {fresh.id: 2, waits.id: 2, runs.id: 3}, "a load ends the trial"
