"""What is read of a session for a turn that is over by the time that it comes is nobody's."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest
from soma.router.v1.inbound_pb2 import InboundKind

from services.router.domain.arrival import Policy
from services.router.domain.turn import Outcome
from soma_common.testing.eventually import eventually
from tests.unit.router.builders import TENANT
from tests.unit.router.engine import Engine, running_engine
from tests.unit.router.test_policies import control, message


@pytest.fixture
async def engine() -> AsyncIterator[Engine]:
    async with running_engine() as engine:
        yield engine


async def test_a_context_that_comes_when_its_turn_is_over_is_not_the_next_ones(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine.accept(message("1"))
    [first] = await engine.started(1)
    engine.answer(first, "one")
    await engine.outcomes(1)
    await engine.quiet()
    session = next(s for p in engine.state.partitions.values() for s in p.sessions.values())
    session.forget_context()
    said, reads = [b"before"], [asyncio.Event()]

    async def context(tenant: str, session_id: bytes, limit: int) -> list[bytes]:
        read = list(said)
        if reads:
            await reads.pop().wait()
        return read

    slow = reads[0]
    monkeypatch.setattr(engine, "context", context)
    engine.accept(message("2"))
    await engine.quiet()
    engine.accept(control(InboundKind.INBOUND_KIND_CANCEL_ALL))
    assert [outcome for outcome, _ in await engine.outcomes(2)] == [Outcome.FINAL, Outcome.CANCELLED]
    said.append(b"cancelled")
    slow.set()
    await engine.quiet()
    assert session.context is None
    engine.accept(message("3"))
    [_, third] = await engine.started(2)
    assert list(third.context) == [b"before", b"cancelled"]


async def test_content_that_comes_when_its_turn_was_rolled_back_is_not_counted_twice(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its messages wait again by then, and are counted without content."""
    gate, reads = asyncio.Event(), 0

    async def contents(tenant: str, partition: int, positions: list[int]) -> dict[int, bytes]:
        nonlocal reads
        reads += 1
        if reads == 1:
            await gate.wait()
        return dict.fromkeys(positions, b"loaded")

    monkeypatch.setattr(engine, "contents", contents)
    engine.accept(message("0"))
    [before] = await engine.started(1)
    monkeypatch.setattr(engine.state, "_has_room", lambda *_: False)
    engine.accept(message("1"))
    await engine.quiet()
    engine.answer(before, "zero")
    await eventually(lambda: reads == 1, what="the content is being read")
    engine.brain.credit = -10
    engine.accept(message("2", Policy.ROLLBACK))
    await eventually(lambda: engine.state.mailbox.tenant(TENANT).waiting == 2, what="both wait")
    gate.set()
    await engine.quiet()
    engine.brain.credit = 10
    engine.runner.assign()
    [_, again] = await engine.started(2)
    assert list(again.inputs) == [b"loaded", b"loaded"]
    engine.answer(again, "both")
    await engine.quiet()
    assert (engine.state._queued_bytes, engine.state._tenant_bytes) == (0, {})
