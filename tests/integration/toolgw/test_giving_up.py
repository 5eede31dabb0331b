"""A cancel that no longer waits: one decision between result and giving up, which nothing that comes later changes."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import asyncpg
import grpc
import orjson
import pytest
from google.protobuf.json_format import MessageToDict
from soma.toolgw.v1.tool_service_pb2 import InvocationState, InvokeToolResponse

from soma_common.telemetry.metrics import REGISTRY
from soma_common.testing.eventually import eventually
from tests.integration.toolgw.conftest import (
    Gateway,
    Surroundings,
    refused,
    result_of,
    running_gateway,
    running_process,
)

CANCELLED = InvocationState.INVOCATION_STATE_CANCELLED
DONE = InvocationState.INVOCATION_STATE_DONE
UNKNOWN = InvocationState.INVOCATION_STATE_OUTCOME_UNKNOWN


@asynccontextmanager
async def looking(around: Surroundings) -> AsyncIterator[asyncpg.Connection[asyncpg.Record]]:
    """A connection that sees every tenant."""
    connection = await asyncpg.connect(around.database.superuser_dsn)
    try:
        yield connection
    finally:
        await connection.close()


async def late_result(around: Surroundings, key: str) -> Any:
    """The result that came after the end of a call, once it has come."""
    async with looking(around) as connection:
        late = await eventually(
            lambda: connection.fetchval(
                "SELECT late_result FROM toolgw.invocations WHERE key = $1 AND late_time IS NOT NULL", key
            )
        )
    return orjson.loads(late)


async def stays_unknown(gateway: Gateway, tool: str, key: str) -> None:
    """Whoever asks for a call is told that its outcome is unknown."""
    assert (await gateway.cancel(key, timeout_ms=1)).state == UNKNOWN
    async with refused("TOOL_OUTCOME_UNKNOWN"):
        await gateway.invoke(tool, key)


@pytest.mark.parametrize("tool", ["pay", "put", "look"])
async def test_a_late_result_is_kept_and_changes_nothing(surroundings: Surroundings, tool: str) -> None:
    surroundings.describe(**{tool: "/hold"})
    before = counted("soma_toolgw_given_up_total"), counted("soma_toolgw_late_results_total")
    async with running_gateway(surroundings, "toolgw-0") as one, running_gateway(surroundings, "toolgw-1") as two:
        waiting = [asyncio.create_task(gateway.invoke(tool, "k1")) for gateway in (one, two)]
        await eventually(lambda: surroundings.http.calls["k1"])
        answers = await asyncio.gather(*(gateway.cancel("k1", timeout_ms=200) for gateway in (one, two, one)))
        assert [answer.state for answer in answers] == [UNKNOWN] * 3
        await stays_unknown(two, tool, "k1")
        surroundings.http.release.set()
        assert await late_result(surroundings, "k1") == {"held": True}
        for gateway in (one, two):
            await stays_unknown(gateway, tool, "k1")
        for call in waiting:
            with pytest.raises(grpc.aio.AioRpcError, match="its end is not known"):
                await call
    assert surroundings.http.calls == {"k1": 1}
    after = counted("soma_toolgw_given_up_total"), counted("soma_toolgw_late_results_total")
    assert after == (before[0] + 1, before[1] + 1)


def counted(name: str) -> float:
    return REGISTRY.get_sample_value(name) or 0


async def test_what_ends_in_time_is_told(surroundings: Surroundings) -> None:
    surroundings.describe(pay="/hold")
    async with running_gateway(surroundings) as gateway:
        call = asyncio.create_task(gateway.invoke("pay", "k1"))
        await eventually(lambda: surroundings.http.calls["k1"])
        cancel = asyncio.create_task(gateway.cancel("k1", timeout_ms=60_000))
        async with looking(surroundings) as connection:
            await eventually(
                lambda: connection.fetchval("SELECT true FROM toolgw.invocations WHERE cancel_time IS NOT NULL")
            )
        surroundings.http.release.set()
        settled = await cancel
        assert settled.state == DONE
        assert MessageToDict(settled.result) == result_of(await call) == {"held": True}
        assert (await gateway.cancel("k1", timeout_ms=1)).state == DONE


async def test_of_what_has_not_come_nothing_is_waited_for(gateway: Gateway, surroundings: Surroundings) -> None:
    assert (await gateway.cancel("k1", timeout_ms=86_400_000)).state == CANCELLED
    async with refused("TOOL_CANCELLED"):
        await gateway.invoke("pay", "k1")
    assert surroundings.http.calls == {}


async def test_a_retry_does_not_begin_the_wait_anew(surroundings: Surroundings) -> None:
    """Callers whose own time is shorter than the wait: the time of all of them counts together, at every instance."""
    surroundings.describe(pay="/hold")
    async with running_gateway(surroundings, "toolgw-0") as one, running_gateway(surroundings, "toolgw-1") as two:
        call = asyncio.create_task(one.invoke("pay", "k1"))
        await eventually(lambda: surroundings.http.calls["k1"])
        async with refused("DEADLINE_EXCEEDED"):
            await one.cancel("k1", timeout=0.4, timeout_ms=60_000)
        async with looking(surroundings) as connection:
            first = await connection.fetchval(
                "UPDATE toolgw.invocations SET cancel_time = cancel_time - interval '59 s' RETURNING cancel_time"
            )
            async with refused("DEADLINE_EXCEEDED"):
                await two.cancel("k1", timeout=0.4, timeout_ms=120_000)
            assert (await two.cancel("k1", timeout=15.0, timeout_ms=60_000)).state == UNKNOWN
            assert await connection.fetchval("SELECT cancel_time FROM toolgw.invocations") == first
        surroundings.http.release.set()
        await asyncio.gather(call, return_exceptions=True)


async def test_without_a_time_the_platforms_counts(surroundings: Surroundings) -> None:
    surroundings.describe(pay="/hold")
    async with running_gateway(surroundings, toolgw_cancel_timeout_s=0.3) as gateway:
        call = asyncio.create_task(gateway.invoke("pay", "k1"))
        await eventually(lambda: surroundings.http.calls["k1"])
        assert (await gateway.cancel("k1")).state == UNKNOWN
        surroundings.http.release.set()
        await asyncio.gather(call, return_exceptions=True)


@pytest.mark.parametrize("first", ["result", "giving up"])
async def test_of_result_and_giving_up_the_first_wins(surroundings: Surroundings, first: str) -> None:
    """Both are held back by a lock on the row, in the one order and in the other."""
    surroundings.describe(pay="/hold")
    async with (
        running_gateway(surroundings, "toolgw-0") as one,
        running_gateway(surroundings, "toolgw-1") as two,
        looking(surroundings) as watcher,
        looking(surroundings) as holder,
    ):

        async def queued(number: int) -> None:
            waiting = (
                "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND query LIKE '%claim = $3%'"
            )
            await eventually(lambda: _equals(watcher.fetchval(waiting), number))

        call = asyncio.create_task(one.invoke("pay", "k1"))
        await eventually(lambda: surroundings.http.calls["k1"])
        async with refused("DEADLINE_EXCEEDED"):
            await two.cancel("k1", timeout=0.3)  # From here on the time counts.
        async with holder.transaction():
            await holder.execute("SELECT FROM toolgw.invocations WHERE key = 'k1' FOR UPDATE")
            if first == "result":
                surroundings.http.release.set()
                await queued(1)
            cancel = asyncio.create_task(two.cancel("k1", timeout_ms=1))
            await queued(2 if first == "result" else 1)
            surroundings.http.release.set()
            await queued(2)
        state = (await cancel).state
        if first == "result":
            assert state == DONE
            assert result_of(await call) == {"held": True}
            assert await watcher.fetchval("SELECT late_time FROM toolgw.invocations") is None
        else:
            assert state == UNKNOWN
            assert await late_result(surroundings, "k1") == {"held": True}
            with pytest.raises(grpc.aio.AioRpcError, match="its end is not known"):
                await call
            await stays_unknown(one, "pay", "k1")


async def _equals(found: Any, number: int) -> bool:
    return bool(await found == number)


@pytest.mark.parametrize("seed", range(3))
async def test_whoever_is_asked_tells_the_same(surroundings: Surroundings, seed: int) -> None:
    """Calls that end about when they are given up: call, cancels and retries agree, for ever."""
    surroundings.describe(pay="/slow")
    keys = [f"{seed}-{n}" for n in range(20)]
    async with running_gateway(surroundings, "toolgw-0") as one, running_gateway(surroundings, "toolgw-1") as two:
        calls = [asyncio.create_task(one.invoke("pay", key)) for key in keys]
        await eventually(lambda: all(surroundings.http.calls[key] for key in keys))
        cancels = await asyncio.gather(*(two.cancel(key, timeout_ms=200 + 10 * n) for n, key in enumerate(keys)))
        answers = await asyncio.gather(*calls, return_exceptions=True)
        again = await asyncio.gather(*(one.cancel(key, timeout_ms=1) for key in keys))
        for key, cancel, answer, later in zip(keys, cancels, answers, again, strict=True):
            has_result = isinstance(answer, InvokeToolResponse)
            assert cancel.state == later.state == (DONE if has_result else UNKNOWN), key
            if not has_result:
                assert await late_result(surroundings, key) == {"slow": True}
    assert set(surroundings.http.calls.values()) == {1}


async def test_a_note_that_comes_late_is_not_written(surroundings: Surroundings) -> None:
    async with (
        running_gateway(surroundings, "toolgw-1") as other,
        running_process(surroundings, "toolgw-0", "toolgw.after_run_before_store=stop") as frozen,
        looking(surroundings) as connection,
    ):
        assert frozen.process is not None
        call = asyncio.create_task(frozen.invoke("remember_note", "k1", {"note": "late"}))
        await eventually(lambda: connection.fetchval("SELECT true FROM toolgw.invocations"))
        assert (await other.cancel("k1", timeout_ms=300)).state == UNKNOWN
        frozen.process.send(signal.SIGCONT)
        assert await late_result(surroundings, "k1") == {"remembered": "late"}
        assert result_of(await other.invoke("recall_notes", "k2")) == {"notes": []}
        await asyncio.gather(call, return_exceptions=True)
