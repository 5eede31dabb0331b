"""What stands on a lane that no gateway of this release would put there costs nobody else anything."""

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from uuid import uuid4

import asyncpg
import pytest
from nats.js import JetStreamContext
from soma.common.v1.error_reason_pb2 import ErrorReason
from soma.common.v1.turn_pb2 import Outcome
from soma.router.v1.inbound_pb2 import InBatch, Inbound, InboundKind
from soma.router.v1.session_service_pb2 import ListMessagesRequest
from soma.router.v1.turn_service_pb2 import ListTurnsRequest

from soma_common import ids
from soma_common.client.channel_client import text_message
from soma_common.clock import now_ms
from soma_common.ids import SessionName
from soma_common.layout import BATCH_FORMAT
from soma_common.nats import subjects
from soma_common.nats.connection import connect_nats
from soma_common.testing.eventually import eventually
from somastack.parts import NatsPart, PostgresPart
from tests.e2e.record import Record, answer
from tests.e2e.stack import ECHO, OFFLINE, Stack

TENANT = "demo"
REASON = ErrorReason


def not_a_message(item: Inbound) -> None:
    item.content = b"\xff\xff\xff"
    item.content_hash = ids.content_hash(item.content)


def of_a_later_kind(item: Inbound) -> None:
    item.kind = 77  # type: ignore[assignment] # what a newer release may send


def for_nobody(item: Inbound) -> None:
    _address(item, "never-there", item.channel, item.session, "poison")


POISON: dict[str, tuple[Callable[[Inbound], None], "ErrorReason.ValueType"]] = {
    "content that is no message": (not_a_message, REASON.ERROR_REASON_ITEM_CORRUPT),
    "a kind of a later release": (of_a_later_kind, REASON.ERROR_REASON_SCHEMA_UNKNOWN),
    "an agent that is gone": (for_nobody, REASON.ERROR_REASON_AGENT_GONE),
}


@pytest.mark.parametrize("case", POISON)
async def test_one_poison_item_in_a_batch_of_64(stack: Stack, channel: str, case: str) -> None:
    """63 are answered, in order; one ends with a typed error."""
    spoil, reason = POISON[case]
    items = [_item(channel, f"s{number % 4}", f"item {number}") for number in range(64)]
    spoil(items[31])
    seen = Record()
    async with stack.adapter(channel, on_delivery=seen.on_delivery), _lane(stack) as lane:
        await _publish(lane, *items)
        await seen.all_answered([item.message_id for item in items])
    wrong = await seen.outcome_of(items[31].message_id)
    assert (wrong.outcome, wrong.error.reason) == (Outcome.OUTCOME_ERROR, reason)
    assert wrong.error.message
    for number, item in enumerate(items):
        if number != 31:
            assert answer(await seen.outcome_of(item.message_id)).endswith(f"item {number}")


async def test_a_session_goes_on_after_content_that_no_model_can_read(stack: Stack, channel: str) -> None:
    poison, after = _item(channel, "s", "poison"), _item(channel, "s", "what is 2+3")
    for item, key in ((poison, "one"), (after, "two")):
        _address(item, OFFLINE, channel, "s", key)
    not_a_message(poison)
    seen = Record()
    async with stack.adapter(channel, on_delivery=seen.on_delivery), _lane(stack) as lane:
        await _publish(lane, poison, after)
        await seen.all_answered([poison.message_id, after.message_id])
    assert (await seen.outcome_of(poison.message_id)).error.reason == ErrorReason.ERROR_REASON_ITEM_CORRUPT
    assert "5" in answer(await seen.outcome_of(after.message_id))
    name = str(SessionName(TENANT, OFFLINE, channel, "s"))
    async with stack.sessions(TENANT) as sessions, stack.turns(TENANT) as turns:
        messages = (await sessions.ListMessages(ListMessagesRequest(parent=name), timeout=10)).messages
        told = (await turns.ListTurns(ListTurnsRequest(parent=name), timeout=10)).turns
    assert [m.message_id for m in messages] == [poison.message_id.hex(), after.message_id.hex()]
    assert [len(m.message.parts) for m in messages] == [0, 1]
    assert [turn.outcome for turn in told] == [Outcome.OUTCOME_ERROR, Outcome.OUTCOME_FINAL]


async def test_an_item_that_names_no_session_is_set_aside(stack: Stack, channel: str) -> None:
    items = [_item(channel, "s", f"item {number}") for number in range(64)]
    poison = items.pop(31)
    poison.agent = "not what its session id says"
    seen = Record()
    async with stack.adapter(channel, on_delivery=seen.on_delivery), _lane(stack) as lane:
        await _publish(lane, *items[:31], poison, *items[31:])
        await seen.all_answered([item.message_id for item in items])
    [(reason, payload)] = await _dead_letters(stack, poison.message_id)
    assert reason == ErrorReason.ERROR_REASON_ITEM_CORRUPT
    assert Inbound.FromString(payload) == poison


@pytest.mark.parametrize(
    ("spoilt", "reason"),
    [
        (lambda batch: InBatch(format=99, tenant=TENANT, items=batch.items).SerializeToString(), "SCHEMA_UNKNOWN"),
        (lambda _: b"\xff\xff\xff", "ITEM_CORRUPT"),
    ],
    ids=["schema of a later release", "no batch at all"],
)
async def test_a_batch_that_cannot_be_read_is_set_aside_and_the_partitions_go_on(
    stack: Stack, channel: str, spoilt: Callable[[InBatch], bytes], reason: str
) -> None:
    """One item of every partition behind it: all partitions of the lane read on."""
    sessions = {ids.partition_of(_item(channel, f"s{n}", "").session_id, 8): f"s{n}" for n in range(200)}
    assert len(sessions) == 8
    items = [_item(channel, session, "behind it") for session in sessions.values()]
    payload = spoilt(_batch(*items))
    batch_id = uuid4().hex
    seen = Record()
    async with stack.adapter(channel, on_delivery=seen.on_delivery), _lane(stack) as lane:
        await lane.publish(subjects.inbound(TENANT, 0), payload, headers={"Nats-Msg-Id": batch_id})
        await _publish(lane, *items)
        await seen.all_answered([item.message_id for item in items])
        letters = await eventually(lambda: _dead_letters(stack, batch_id.encode()), what="a dead letter")
    assert letters == [(ErrorReason.Value(f"ERROR_REASON_{reason}"), payload)], "set aside once, with its bytes"


def _item(channel: str, session: str, text: str) -> Inbound:
    """A message as a gateway stores it."""
    content = text_message(text).SerializeToString(deterministic=True)
    item = Inbound(
        content=content,
        content_hash=ids.content_hash(content),
        accept_time_ms=now_ms(),
        deliver=True,
        kind=InboundKind.INBOUND_KIND_MESSAGE,
    )
    _address(item, ECHO, channel, session, f"key of {text}")
    return item


def _address(item: Inbound, agent: str, channel: str, session: str, key: str) -> None:
    item.agent, item.channel, item.session = agent, channel, session
    item.session_id = ids.session_id(TENANT, agent, channel, session)
    item.message_id = ids.message_id(TENANT, agent, channel, session, key)


def _batch(*items: Inbound) -> InBatch:
    return InBatch(format=BATCH_FORMAT, tenant=TENANT, items=items)


async def _publish(lane: JetStreamContext, *items: Inbound) -> None:
    await lane.publish(
        subjects.inbound(TENANT, 0), _batch(*items).SerializeToString(), headers={"Nats-Msg-Id": uuid4().hex}
    )


@asynccontextmanager
async def _lane(stack: Stack) -> AsyncIterator[JetStreamContext]:
    """The stack's message bus, as its services reach it."""
    part = stack.supervisor.parts["nats"]
    assert isinstance(part, NatsPart)
    client = await connect_nats(part.server.url, part.server.token_file, "test")
    try:
        yield client.jetstream()
    finally:
        await client.close()


async def _dead_letters(stack: Stack, ref: bytes) -> list[tuple[int, bytes]]:
    """Reason and bytes of what was set aside under a reference."""
    part = stack.supervisor.parts["postgres"]
    assert isinstance(part, PostgresPart)
    connection = await asyncpg.connect(part.server.dsn())
    try:
        rows = await connection.fetch("SELECT reason, payload FROM router.dead_letters WHERE ref = $1", ref)
    finally:
        await connection.close()
    return [(row["reason"], row["payload"]) for row in rows]
