"""The port GroupWriter: PostgreSQL and the memory store of the engine's tests do the same with the same groups."""

from collections.abc import AsyncIterator

import pytest
from soma.common.v1.turn_pb2 import Delivery

from services.router.application.group import CommitItem, GroupResult
from services.router.application.outcomes import EndItem
from services.router.application.ports import GroupWriter
from services.router.domain.partition import Partition
from services.router.domain.turn import Outcome
from tests.integration.router.store import Store, end, start, step
from tests.unit.router.builders import a_partition, a_session, a_turn, cancel, group_of, inbound, ingest
from tests.unit.router.engine import MemoryStore


class Held:
    """A writer and a partition that it may write."""

    def __init__(self, writer: GroupWriter, partition: Partition) -> None:
        self.writer = writer
        self.partition = partition

    async def commit(self, *items: CommitItem) -> GroupResult:
        group = group_of(*items)
        result = await self.writer.commit(group)
        group.settle()
        return result


@pytest.fixture(params=["postgres", "memory"])
async def held(request: pytest.FixtureRequest, store: Store) -> AsyncIterator[Held]:
    if request.param == "postgres":
        yield Held(store.writer, await store.take(0))
    else:
        yield Held(MemoryStore(), a_partition())


async def test_new_messages_are_named_and_known_ones_are_not(held: Held) -> None:
    p = held.partition
    first = await held.commit(ingest(p, 1, inbound(), inbound(), inbound(key="k2")))
    assert first.inserted == {(0, 1), (0, 3)}
    assert set(first.sessions) == {inbound().session_id}
    again = await held.commit(ingest(p, 2, inbound(), inbound(key="k3"), cancel()))
    assert again.inserted == {(0, 5), (0, 6)}
    nothing = await held.commit(ingest(p, 3, inbound()))
    assert nothing == GroupResult(frozenset(), frozenset(), {}, frozenset())


async def test_a_reused_key_is_named(held: Held) -> None:
    p = held.partition
    together = await held.commit(ingest(p, 1, inbound(content=b"one"), inbound(content=b"two")))
    assert together.reused == {(0, 2)}
    later = await held.commit(ingest(p, 2, inbound(content=b"three"), inbound(content=b"two")))
    assert later.inserted == later.reused == {(0, 3)}


async def test_a_fresh_turn_starts_if_its_message_is_new(held: Held) -> None:
    p = held.partition
    session = a_session(p)
    mail = ingest(p, 1, inbound(content=b"one"))
    turn = a_turn(session, mail.entries[0].message)
    assert (await held.commit(mail, start(turn))).started == {turn.id}
    for seq, content in ((2, b"one"), (3, b"two")):
        mail = ingest(p, seq, inbound(content=content))
        session.turn_count = 1
        assert (await held.commit(mail, start(a_turn(session, mail.entries[0].message)))).started == frozenset()


async def test_a_turn_of_a_waiting_message_starts_whatever_else_is_in_the_group(held: Held) -> None:
    p = held.partition
    mail = ingest(p, 1, inbound())
    await held.commit(mail)
    turn = a_turn(a_session(p), mail.entries[0].message)
    result = await held.commit(ingest(p, 2, inbound(), inbound("other")), start(turn, fresh=False))
    assert result.started == {turn.id}


async def test_steps_and_ends_are_written_once(held: Held) -> None:
    p = held.partition
    mail = ingest(p, 1, inbound())
    turn = a_turn(a_session(p), mail.entries[0].message)
    await held.commit(mail, start(turn), step(turn))
    with pytest.raises(Exception):  # noqa: B017, PT011 - the store's own refusal, the memory's assertion
        await held.commit(step(turn))
    turn.journal.append(b"body")
    await held.commit(end(turn))
    with pytest.raises(Exception):  # noqa: B017, PT011
        await held.commit(EndItem(p, turn, Outcome.ERROR, [], Delivery(), lambda _: None))
