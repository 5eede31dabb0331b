"""Tool gateway processes killed at their failpoints and in the middle of a tool: what becomes of the call."""

from __future__ import annotations

import asyncio
import signal
import time
from dataclasses import replace

import grpc
import pytest
from soma.toolgw.v1.tool_service_pb2 import InvocationState

from soma_common.testing.embedded import FaultyPostgres, soma_database
from soma_common.testing.eventually import eventually
from tests.integration.toolgw.conftest import (
    DEMO,
    Gateway,
    Surroundings,
    refused,
    result_of,
    running_gateway,
    running_process,
)
from tests.stalls import Stalls

KILLED_AT = ("toolgw.before_run", "toolgw.after_run_before_store", "toolgw.after_store_before_answer")


async def die_with(gateway: Gateway, tool: str, arguments: dict[str, object]) -> None:
    """Call a gateway that is killed by the call."""
    with pytest.raises(grpc.aio.AioRpcError):
        await gateway.invoke(tool, "k1", arguments)
    assert gateway.process is not None
    assert await gateway.process.ended() == -9


@pytest.mark.parametrize("failpoint", KILLED_AT)
async def test_an_idempotent_call_goes_on(surroundings: Surroundings, failpoint: str) -> None:
    async with running_process(surroundings, failpoints=f"{failpoint}=kill") as doomed:
        await die_with(doomed, "put", {"n": 1})
    async with running_gateway(surroundings, "toolgw-0") as successor:
        assert result_of(await successor.invoke("put", "k1", {"n": 1})) == {"echo": {"n": 1.0}}
    assert surroundings.http.calls["k1"] == (2 if failpoint == "toolgw.after_run_before_store" else 1)


@pytest.mark.parametrize("failpoint", KILLED_AT)
async def test_a_side_effect_happens_at_most_once(surroundings: Surroundings, failpoint: str) -> None:
    async with running_process(surroundings, failpoints=f"{failpoint}=kill") as doomed:
        await die_with(doomed, "pay", {"n": 1})
    async with running_gateway(surroundings, "toolgw-0") as successor:
        if failpoint == "toolgw.after_store_before_answer":
            assert (await successor.invoke("pay", "k1", {"n": 1})).replayed
        else:
            for _ in range(2):
                async with refused("TOOL_OUTCOME_UNKNOWN"):
                    await successor.invoke("pay", "k1", {"n": 1})
            settled = await successor.cancel("k1")
            assert settled.state == InvocationState.INVOCATION_STATE_OUTCOME_UNKNOWN
    assert surroundings.http.calls["k1"] == (0 if failpoint == "toolgw.before_run" else 1)


@pytest.mark.parametrize("failpoint", KILLED_AT)
async def test_a_note_is_written_exactly_once(surroundings: Surroundings, failpoint: str) -> None:
    async with running_process(surroundings, failpoints=f"{failpoint}=kill") as doomed:
        await die_with(doomed, "remember_note", {"note": "once"})
    async with running_gateway(surroundings, "toolgw-0") as successor:
        await successor.invoke("remember_note", "k1", {"note": "once"})
        assert result_of(await successor.invoke("recall_notes", "k2")) == {"notes": ["once"]}


async def test_another_instance_notices_within_the_lease(surroundings: Surroundings) -> None:
    """Callers and cancels that wait at a second instance while the first is killed in the middle of its tools."""
    surroundings.describe(pay="/hold", put="/hold", look="/hold")
    async with Stalls() as stalls, running_gateway(surroundings, "toolgw-1") as other:
        async with running_process(surroundings, "toolgw-0") as doomed:
            first = [
                asyncio.create_task(doomed.invoke(tool, key))
                for tool, key in (("pay", "p1"), ("put", "i1"), ("look", "l1"), ("look", "l2"), ("pay", "p2"))
            ]
            await eventually(lambda: len(surroundings.http.calls) == 5)
            calls = (("pay", "p1"), ("put", "i1"), ("look", "l1"))
            waiting = [asyncio.create_task(other.invoke(tool, key)) for tool, key in calls]
            cancels = [asyncio.create_task(other.cancel(key)) for key in ("l2", "p2")]
            await asyncio.sleep(0.3)
            assert doomed.process is not None
            doomed.process.send(signal.SIGKILL)
            killed_at = time.monotonic()
            await asyncio.gather(*first, return_exceptions=True)
        await eventually(lambda: surroundings.http.calls["i1"] == 2 and surroundings.http.calls["l1"] == 2, 12.0)
        surroundings.http.release.set()
        paid, put, looked = await asyncio.gather(*waiting, return_exceptions=True)
        look_cancelled, pay_cancelled = await asyncio.gather(*cancels)
        took_s = time.monotonic() - killed_at
        stalled_s = stalls.since(killed_at)
    assert isinstance(paid, grpc.aio.AioRpcError)
    assert paid.code() is grpc.StatusCode.ABORTED
    assert not isinstance(put, BaseException)
    assert not isinstance(looked, BaseException)
    assert result_of(put) == result_of(looked) == {"held": True}
    assert look_cancelled.state == InvocationState.INVOCATION_STATE_CANCELLED
    assert pay_cancelled.state == InvocationState.INVOCATION_STATE_OUTCOME_UNKNOWN
    assert surroundings.http.calls == {"p1": 1, "i1": 2, "l1": 2, "l2": 1, "p2": 1}
    assert 4.0 < took_s < 9.0 + stalled_s


async def test_a_frozen_runner_that_wakes_changes_nothing(surroundings: Surroundings) -> None:
    async with (
        running_gateway(surroundings, "toolgw-1") as other,
        running_process(surroundings, "toolgw-0", "toolgw.after_run_before_store=stop") as frozen,
    ):
        call = asyncio.create_task(frozen.invoke("pay", "k1"))
        await eventually(lambda: surroundings.http.calls["k1"])
        async with refused("TOOL_OUTCOME_UNKNOWN"):
            await other.invoke("pay", "k1")
        assert frozen.process is not None
        frozen.process.send(signal.SIGCONT)
        with pytest.raises(grpc.aio.AioRpcError):
            await call
        async with refused("TOOL_OUTCOME_UNKNOWN"):
            await other.invoke("pay", "k1")
    assert surroundings.http.calls == {"k1": 1}


async def test_a_clean_stop_hands_over_at_once(surroundings: Surroundings) -> None:
    surroundings.describe(put="/hold")
    async with running_gateway(surroundings, "toolgw-1") as other:
        async with running_gateway(surroundings, "toolgw-0") as leaving:
            first = asyncio.create_task(leaving.invoke("put", "k1"))
            await eventually(lambda: surroundings.http.calls["k1"] == 1)
            second = asyncio.create_task(other.invoke("put", "k1"))
        await eventually(lambda: surroundings.http.calls["k1"] == 2, 4.0)
        surroundings.http.release.set()
        assert result_of(await second) == {"held": True}
        await asyncio.gather(first, return_exceptions=True)


async def test_a_result_outlives_a_pause_of_the_database(
    surroundings: Surroundings, own_postgres: FaultyPostgres
) -> None:
    """The tool has run and the database is gone: the result is stored when it is back, the tool is not run again."""
    around = replace(surroundings, database=soma_database(own_postgres))
    around.describe(pay="/hold")
    async with running_gateway(around) as gateway:
        call = asyncio.create_task(gateway.invoke("pay", "k1", session=DEMO))
        await eventually(lambda: around.http.calls["k1"])
        await own_postgres.kill9()
        around.http.release.set()
        async with refused("STORE_UNAVAILABLE"):
            await gateway.invoke("calculate", "k2", {"expression": "1"})
        await own_postgres.restart()
        assert result_of(await call) == {"held": True}
        await eventually(lambda: _answers(gateway), 5.0)
        assert (await gateway.invoke("pay", "k1")).replayed
    assert around.http.calls == {"k1": 1}


async def _answers(gateway: Gateway) -> bool:
    try:
        return bool(result_of(await gateway.invoke("calculate", "k2", {"expression": "1"})))
    except grpc.aio.AioRpcError as error:
        raise AssertionError(str(error)) from error
