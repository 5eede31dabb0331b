"""PostgreSQL is away for longer than a tenant's bound lasts: accepts go on up to it, then they are refused and nobody
else is; what was accepted is answered, in order, once it is back.
"""

from collections.abc import AsyncIterator

import pytest
import pytest_asyncio
from soma.common.v1.error_reason_pb2 import ErrorReason
from soma.common.v1.turn_pb2 import Delivery

from soma_common.client.channel_client import ChannelClient
from soma_common.errors import ResourceExhausted
from soma_common.testing.eventually import eventually
from tests.chaos.stack import ECHO, FaultyStack, faulty_stack

BOUND = 100
"""Batches of a tenant that a lane takes; one item each here, as every send waits for its receipt."""
READ_AHEAD = 16
"""Batches that the router has read and not committed leave the lane only once they are committed."""


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def bounded() -> AsyncIterator[FaultyStack]:
    """A stack whose lanes hold little."""
    bound = {"SOMA_TENANT_LANE_BATCHES": str(BOUND)}
    # Nothing that is taken in stays in the lanes: the whole bound is for what is not.
    at_once = {"SOMA_PURGE_EVERY_S": "0.5", "SOMA_LANE_PURGE_LAG_S": "0"}
    router = {**bound, "SOMA_LANE_BACKLOG": str(READ_AHEAD), **at_once}
    async with faulty_stack(environment={"gateway": bound, "router": router}) as running:
        yield running


async def test_accepts_go_on_to_the_bound_and_all_is_answered_after(bounded: FaultyStack) -> None:
    answers: list[Delivery] = []
    async with (
        _adapter(bounded, "demo", answers) as adapter,
        _adapter(bounded, "acme", []) as neighbour,
    ):
        await adapter.send(ECHO, "warm", "up")
        await eventually(lambda: answers, 15, "the first answer")
        bounded.hold_down("postgres")
        await bounded.kill9("postgres")
        accepted: list[bytes] = []
        with pytest.raises(ResourceExhausted) as refused:
            await _send_until_refused(adapter, accepted)
        assert refused.value.reason == ErrorReason.ERROR_REASON_QUEUE_FULL
        assert refused.value.retry_delay_s
        assert refused.value.metadata["bound"] == "lane.tenant_batches"
        assert BOUND - 2 <= len(accepted) <= BOUND, "up to the bound, but for what is kept as an anchor"
        await neighbour.send(ECHO, "s", "the other tenant is not at its bound")
        bounded.let_up("postgres")
        await bounded.is_up("postgres")
        await eventually(lambda: len(answers) > len(accepted), 30, "everything is answered")
        late = await adapter.send(ECHO, "s0", "after it")
        await eventually(lambda: len(answers) > len(accepted) + 1, 30, "the session goes on")
    answered = [message_id for delivery in answers[1:] for message_id in delivery.message_ids]
    assert sorted(answered) == sorted([*accepted, late.message_id]), "each exactly once"
    for session in range(5):
        of_session = [d for d in answers if d.session == f"s{session}"]
        assert [d.position for d in of_session] == list(range(1, len(of_session) + 1))
        order = [message_id for d in of_session for message_id in d.message_ids]
        expected = accepted[session::5] + ([late.message_id] if session == 0 else [])
        assert order == expected, "in the order accepted"
    assert not bounded.deaths


async def _send_until_refused(adapter: ChannelClient, accepted: list[bytes]) -> None:
    for number in range(2 * BOUND):
        receipt = await adapter.send(ECHO, f"s{number % 5}", f"message {number}", patience_s=0)
        accepted.append(receipt.message_id)


def _adapter(stack: FaultyStack, tenant: str, answers: list[Delivery]) -> ChannelClient:
    return ChannelClient(
        stack.gateways,
        token=stack.token(tenant),
        tenant=tenant,
        channel="bound",
        instance=f"{tenant}-1",
        on_delivery=answers.append,
    )
