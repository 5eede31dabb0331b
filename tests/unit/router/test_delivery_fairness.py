"""Memory for deliveries that somebody holds and does not need keeps nobody else's out."""

from __future__ import annotations

import asyncio

import pytest
from soma.router.v1.outbound_pb2 import AckBatch, Presence

from services.router.application.deliver_outcomes import GATEWAY_GRACE_S
from tests.unit.router.test_deliver_outcomes import World


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> World:
    return World(monkeypatch)


def leave(world: World, tenant: str, gateway: str) -> None:
    world.desk.on_presence(tenant, Presence(gateway=gateway))


@pytest.mark.parametrize("window", [None, 0])
async def test_what_adapters_left_behind_that_are_gone_keeps_nobody_out(world: World, window: int | None) -> None:
    """Tenants fill the memory, then their adapters leave for good, or stay and take nothing."""
    world.bound(640)
    for number in range(1, 101):
        tenant = f"t{number}"
        world.adapter(number, gateway=tenant, tenant=tenant, window=1)
        for n in range(20):
            world.outcome(world.session(f"s{n}", tenant=tenant))
    assert world.room.items == 640
    for number in range(1, 101):
        tenant = f"t{number}"
        world.desk.on_acks(tenant, AckBatch())
        if window is None:
            leave(world, tenant, tenant)
        else:
            world.desk.on_acks(tenant, AckBatch(acks=[d for s, d, _ in world.sent if s == number]))
            world.adapter(number, gateway=tenant, tenant=tenant, window=0)
    one = world.outcome(world.session("one", tenant="one"))
    world.adapter(900, gateway="one", tenant="one")
    for _ in range(10 if window is None else 100):  # the first of each is late before it is left
        world.sweep_after(1, "one", *(f"t{n}" for n in range(101)))
        await world.settle()
    assert (900, one, 1) in world.sent
    assert world.room.items == 1


async def test_what_was_left_to_the_table_comes_again_in_order_with_its_tries(world: World) -> None:
    world.adapter(1)
    session, other = world.session(), world.session("other", partition=1)
    one, two, three = (world.outcome(session) for _ in range(3))
    four = world.outcome(other)
    world.nack(one, 60_000)
    world.gone()
    for _ in range(12):
        world.sweep_after(0.5)
        await world.settle()
    assert (world.room.items, world.room.size, world.desk._by_id) == (0, 0, {})
    five = world.outcome(session)
    world.sent.clear()
    world.adapter(2, "b")
    await world.settle()
    assert world.sent == [(2, four, 1)], "the other one is to wait a minute"
    world.sweep_after(60, "g")
    assert world.sent == [(2, four, 1), (2, one, 2)]
    for each in (four, one, two, three, five):
        world.ack(each)
        await world.settle()
    assert world.ids == [four, one, two, three, five]
    assert world.table == {}
    assert world.room.items == 0


async def test_a_channel_that_gets_no_room_is_before_those_that_give_some_and_want_it_back(world: World) -> None:
    """Outcomes so large that with each acknowledgement there is room for just the next."""
    world.bound(size=1 << 20)
    channels = [f"c{n}" for n in range(12)]
    for number, channel in enumerate(channels, 1):
        world.adapter(number, gateway=channel, channel=channel, tenant=channel)
        session = world.session(channel=channel, tenant=channel)
        for _ in range(40):
            world.outcome(session, 100 << 10)
    await world.settle()
    seen = 0
    for _ in range(60):
        if {stream for stream, _, _ in world.sent} == set(range(1, 13)):
            break
        taken, seen = world.sent[seen:], len(world.sent)
        for stream, delivery, _ in taken:
            world.desk.on_acks(f"c{stream - 1}", AckBatch(acks=[delivery]))
        await world.settle()
    assert {stream for stream, _, _ in world.sent} == set(range(1, 13))
    assert len(world.sent) < 60


async def test_a_channel_that_was_read_from_the_table_is_forgotten_with_the_rest(world: World) -> None:
    one = world.outcome(world.session())
    world.adapter()
    await world.settle()
    world.ack(one)
    world.gone()
    world.sweep_after(1)
    assert world.desk._channels == {}
    assert world.room._tenants == {}
    two = world.outcome(world.session())
    world.adapter()
    await world.settle()
    assert world.ids == [one, two]


async def test_a_channel_is_kept_while_the_desk_is_yet_to_be_told_of_what_was_read(world: World) -> None:
    """Else an outcome that a page brought before its group's answer would be delivered again."""
    session = world.session()
    one = world.outcome(session)
    item = world.store(session)
    world.partitions[0].head -= 1
    world.adapter()
    await world.settle()
    world.ack(one, item.turn.id)
    world.ack(item.turn.id)
    world.gone()
    world.sweep_after(GATEWAY_GRACE_S + 1)
    world.sweep_after(GATEWAY_GRACE_S + 1)
    world.adapter()
    world.partitions[0].head += 1
    world.desk.add(item)
    await world.settle()
    assert world.ids == [one, item.turn.id]


async def test_a_page_that_comes_when_what_is_before_it_was_left_to_the_table_is_not_taken(world: World) -> None:
    world.bound(channel_items=4)
    world.adapter()
    session = world.session()
    expected = [world.outcome(session) for _ in range(9)]
    world.ack(*expected[:3])
    await asyncio.sleep(0)  # the next four are being read
    assert world.reading
    world.gone()
    for _ in range(12):
        world.sweep_after(0.5)
    assert world.desk._by_id == {}
    await world.settle()
    assert world.room.items == 0
    world.adapter()
    for one in expected[3:]:
        await world.settle()
        world.ack(one)
    assert [one for n, one in enumerate(world.ids) if one not in world.ids[:n]] == expected
    assert world.table == {}


async def test_what_an_adapter_took_that_has_no_credit_for_a_moment_stays_in_memory(world: World) -> None:
    """A kit that grants one by one has none in hand between an acknowledgement and the next credit."""
    world.adapter(window=1)
    session = world.session()
    one = world.outcome(session)
    world.ack(one)
    world.adapter(window=0)
    world.sweep_after(0.5, "g")
    two = world.outcome(session)
    assert not world.tasks, "nothing has to be read"
    world.adapter(window=1)
    assert world.ids == [one, two]


async def test_what_waits_for_an_instance_that_is_back_and_takes_nothing_goes_to_another(world: World) -> None:
    world.adapter(1, "a")
    one = world.outcome(world.session())
    world.adapter(2, "a", window=0)
    world.adapter(3, "b", gateway="g2")
    world.sweep_after(1.1, "g", "g2")
    assert world.sent == [(1, one, 1), (3, one, 1)]
