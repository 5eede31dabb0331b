"""Messages that wait in the mailboxes: over the bound of a session or tenant they are refused and nobody else's are,
whoever died in between; what was accepted is answered.
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

SESSION_BOUND = 5
ON_THE_WAY = 300
"""Messages that may be accepted after the bound is reached and before the gateway hears of it."""
TENANT_BOUND = SESSION_BOUND + ON_THE_WAY + 1
"""Out of reach of what one session is let have, so that the bound that refuses is known."""


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def bounded() -> AsyncIterator[FaultyStack]:
    """A stack in whose mailboxes little may wait."""
    bounds = {"SOMA_MAX_QUEUED_PER_SESSION": str(SESSION_BOUND), "SOMA_MAX_QUEUED_PER_TENANT": str(TENANT_BOUND)}
    async with faulty_stack(environment={"gateway": bounds, "router": bounds}) as running:
        yield running


async def test_sessions_and_tenants_at_their_bound_are_refused_and_nobody_else_is(bounded: FaultyStack) -> None:
    answers: list[Delivery] = []
    async with _adapter(bounded, "demo", answers) as adapter, _adapter(bounded, "acme", []) as neighbour:
        await adapter.send(ECHO, "warm", "up")
        await eventually(lambda: answers, 15, "the first answer")
        bounded.freeze("cognition-0")
        accepted = await _send_until_refused(adapter, ["full"], "session.queued_messages")
        assert SESSION_BOUND < accepted <= SESSION_BOUND + ON_THE_WAY
        await adapter.send(ECHO, "other", "is not at its bound", patience_s=0)
        await adapter.cancel(ECHO, "full", patience_s=0)
        many = [f"s{number}" for number in range(TENANT_BOUND)]
        accepted += await _send_until_refused(adapter, many, "tenant.queued_messages")
        assert accepted <= TENANT_BOUND + TENANT_BOUND + ON_THE_WAY, "each session has one message that does not wait"
        await neighbour.send(ECHO, "s", "the other tenant is not at its bound", patience_s=0)

        # All that the router and the gateway knew is gone: the next owner counts what is in the table.
        await bounded.kill9("router-0")
        await bounded.kill9("gateway-0")
        await bounded.is_up("router-0")
        await bounded.is_up("gateway-0")
        after_restart = await _send_until_refused(adapter, many, "tenant.queued_messages")
        assert after_restart <= ON_THE_WAY, "the bound was already reached by what is in the table"
        accepted += after_restart

        bounded.thaw("cognition-0")
        await eventually(lambda: len(answers) == accepted + 2, 60, "everything that was accepted is answered")
        await adapter.send(ECHO, "full", "once more")
        await eventually(lambda: len(answers) == accepted + 3, 30, "there is room again")
    assert not bounded.deaths


async def _send_until_refused(adapter: ChannelClient, sessions: list[str], bound: str) -> int:
    """Sends to sessions in turn until the bound refuses; returns how many were accepted."""
    for number in range(10 * TENANT_BOUND):
        try:
            await adapter.send(ECHO, sessions[number % len(sessions)], f"message {number}", patience_s=0)
        except ResourceExhausted as error:
            refusal, accepted = error, number
            break
    else:
        pytest.fail("never refused")
    assert refusal.reason == ErrorReason.ERROR_REASON_QUEUE_FULL
    assert refusal.metadata["bound"] == bound
    assert refusal.retry_delay_s
    return accepted


def _adapter(stack: FaultyStack, tenant: str, answers: list[Delivery]) -> ChannelClient:
    return ChannelClient(
        stack.gateways,
        token=stack.token(tenant),
        tenant=tenant,
        channel="bounds",
        instance=f"{tenant}-1",
        on_delivery=answers.append,
    )
