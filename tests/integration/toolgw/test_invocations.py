"""At most once per key: replays, races, tombstones, bounds. Real PostgreSQL, real sockets, an endpoint that counts."""

from __future__ import annotations

import asyncio

import asyncpg
import pytest
from google.protobuf.json_format import MessageToDict
from soma.common.v1.message_pb2 import SessionKey
from soma.toolgw.v1.tool_service_pb2 import InvocationState, InvokeToolResponse
from structlog.testing import capture_logs

from soma_common.failpoints import arm_failpoints
from soma_common.testing.eventually import eventually
from tests.integration.toolgw.conftest import (
    DEMO,
    Gateway,
    Surroundings,
    failure_of,
    refused,
    result_of,
    running_gateway,
)

CANCELLED = InvocationState.INVOCATION_STATE_CANCELLED
DONE = InvocationState.INVOCATION_STATE_DONE
UNKNOWN = InvocationState.INVOCATION_STATE_OUTCOME_UNKNOWN


async def test_a_retry_gets_the_stored_result(gateway: Gateway, surroundings: Surroundings) -> None:
    first = await gateway.invoke("pay", "k1", {"n": 1})
    again = await gateway.invoke("pay", "k1", {"n": 1})
    assert result_of(first) == result_of(again) == {"echo": {"n": 1.0}}
    assert (first.replayed, again.replayed) == (False, True)
    assert surroundings.http.calls == {"k1": 1}


async def test_a_stored_failure_is_replayed_too(surroundings: Surroundings) -> None:
    surroundings.describe(pay="/error")
    async with running_gateway(surroundings) as gateway:
        answers = [failure_of(await gateway.invoke("pay", "k1")) for _ in range(3)]
    assert answers[0] == answers[1] == answers[2]
    assert surroundings.http.calls == {"k1": 1}


async def test_a_key_belongs_to_one_call(gateway: Gateway) -> None:
    await gateway.invoke("calculate", "k1", {"expression": "1"})
    async with refused("IDEMPOTENCY_KEY_REUSED"):
        await gateway.invoke("calculate", "k1", {"expression": "2"})
    async with refused("IDEMPOTENCY_KEY_REUSED"):
        await gateway.invoke("current_time", "k1")
    other = SessionKey(tenant="demo", agent="helper", channel="chat", session="s-2")
    async with refused("IDEMPOTENCY_KEY_REUSED"):
        await gateway.invoke("calculate", "k1", {"expression": "1"}, other)
    async with refused("IDEMPOTENCY_KEY_REUSED"):
        await gateway.cancel("k1", other)
    foreign = SessionKey(tenant="acme", agent="helper", channel="chat", session="s-1")
    assert not (await gateway.invoke("calculate", "k1", {"expression": "5"}, foreign)).replayed


async def test_racing_calls_of_two_instances_run_once(surroundings: Surroundings) -> None:
    surroundings.describe(pay="/hold")
    async with (
        running_gateway(surroundings, "toolgw-0") as one,
        running_gateway(surroundings, "toolgw-1") as two,
    ):
        calls = [asyncio.create_task(gateway.invoke("pay", "k1")) for gateway in (one, two) for _ in range(10)]
        await eventually(lambda: surroundings.http.calls["k1"])
        await asyncio.sleep(0.3)
        surroundings.http.release.set()
        answers = await asyncio.gather(*calls)
    assert all(result_of(answer) == {"held": True} for answer in answers)
    assert sum(not answer.replayed for answer in answers) == 1
    assert surroundings.http.calls == {"k1": 1}


async def test_a_caller_that_leaves_stops_nothing(surroundings: Surroundings) -> None:
    surroundings.describe(pay="/hold")
    async with running_gateway(surroundings) as gateway:
        async with refused("DEADLINE_EXCEEDED"):
            await gateway.invoke("pay", "k1", timeout=0.4)
        surroundings.http.release.set()
        assert result_of(await gateway.invoke("pay", "k1")) == {"held": True}
    assert surroundings.http.calls == {"k1": 1}


async def test_a_tombstone_keeps_a_call_from_ever_running(gateway: Gateway, surroundings: Surroundings) -> None:
    for _ in range(2):
        settled = await gateway.cancel("k1")
        assert settled.state == CANCELLED
    async with refused("TOOL_CANCELLED"):
        await gateway.invoke("pay", "k1")
    assert surroundings.http.calls == {}


async def test_cancelling_what_has_run_returns_its_end(surroundings: Surroundings) -> None:
    surroundings.describe(put="/error")
    async with running_gateway(surroundings) as gateway:
        await gateway.invoke("pay", "k1", {"n": 4})
        await gateway.invoke("put", "k2")
        paid, put = await gateway.cancel("k1"), await gateway.cancel("k2")
    assert paid.state == put.state == DONE
    assert MessageToDict(paid.result) == {"echo": {"n": 4.0}}
    assert not put.HasField("result")
    assert "503" in put.error.message


async def test_cancelling_what_runs_waits_for_its_end(surroundings: Surroundings) -> None:
    surroundings.describe(pay="/hold")
    async with running_gateway(surroundings, "toolgw-0") as one, running_gateway(surroundings, "toolgw-1") as two:
        running = asyncio.create_task(one.invoke("pay", "k1"))
        await eventually(lambda: surroundings.http.calls["k1"])
        cancels = [asyncio.create_task(gateway.cancel("k1")) for gateway in (one, two)]
        async with refused("DEADLINE_EXCEEDED"):
            await two.cancel("k1", timeout=0.3)
        assert not any(cancel.done() for cancel in cancels)
        surroundings.http.release.set()
        assert all(settled.state == DONE for settled in await asyncio.gather(*cancels))
        assert result_of(await running) == {"held": True}


@pytest.mark.parametrize("seed", range(5))
async def test_of_a_call_and_its_cancel_one_wins(surroundings: Surroundings, seed: int) -> None:
    """Either the tool ran and both say so, or it did not and both say so."""
    keys = [f"{seed}-{n}" for n in range(20)]
    async with running_gateway(surroundings, "toolgw-0") as one, running_gateway(surroundings, "toolgw-1") as two:
        calls = [asyncio.create_task(one.invoke("pay", key)) for key in keys]
        settled = await asyncio.gather(*(two.cancel(key) for key in keys))
        answers = await asyncio.gather(*calls, return_exceptions=True)
    for key, cancel, answer in zip(keys, settled, answers, strict=True):
        ran = isinstance(answer, InvokeToolResponse)
        assert cancel.state == (DONE if ran else CANCELLED)
        assert surroundings.http.calls[key] == int(ran)


async def test_a_note_is_written_once_however_often_it_is_asked_for(gateway: Gateway) -> None:
    await asyncio.gather(*(gateway.invoke("remember_note", "k1", {"note": "once"}) for _ in range(10)))
    assert result_of(await gateway.invoke("recall_notes", "k2")) == {"notes": ["once"]}


async def test_a_note_and_its_result_are_one(gateway: Gateway, surroundings: Surroundings) -> None:
    """A result that cannot be stored leaves no note: the insert of the note fails, the whole transaction with it."""
    connection = await asyncpg.connect(surroundings.database.superuser_dsn)
    await connection.execute("ALTER TABLE toolgw.notes ADD CONSTRAINT no_notes CHECK (note <> 'bad')")
    with capture_logs() as logs:  # Not written: to draw the traceback takes long on a busy machine.
        call = asyncio.create_task(gateway.invoke("remember_note", "k1", {"note": "bad"}))
        left = "SELECT true FROM toolgw.invocations WHERE state = 'running' AND runner IS NULL"
        await eventually(lambda: connection.fetchval(left))
    assert "toolgw.run.broken" in {line["event"] for line in logs}
    assert await connection.fetchval("SELECT count(*) FROM toolgw.notes") == 0
    await connection.execute("ALTER TABLE toolgw.notes DROP CONSTRAINT no_notes")
    await connection.close()
    assert result_of(await call) == {"remembered": "bad"}  # The next attempt, by the same waiting caller.
    assert result_of(await gateway.invoke("recall_notes", "k2")) == {"notes": ["bad"]}


async def test_full_places_refuse_and_come_free(surroundings: Surroundings) -> None:
    surroundings.describe(pay="/hold")
    acme = SessionKey(tenant="acme", agent="helper", channel="chat", session="s-1")
    async with running_gateway(surroundings, toolgw_max_runs=3, toolgw_max_runs_per_tenant=2) as gateway:
        held = [asyncio.create_task(gateway.invoke("pay", f"k{n}")) for n in range(2)]
        await eventually(lambda: len(surroundings.http.calls) == 2)
        async with refused("QUEUE_FULL"):
            await gateway.invoke("calculate", "c1", {"expression": "1"})
        held.append(asyncio.create_task(gateway.invoke("pay", "k2", session=acme)))
        await eventually(lambda: len(surroundings.http.calls) == 3)
        async with refused("QUEUE_FULL"):
            await gateway.invoke("calculate", "c1", {"expression": "1"}, acme)
        surroundings.http.release.set()
        await asyncio.gather(*held)
        assert result_of(await gateway.invoke("calculate", "c1", {"expression": "1"})) == "1"


async def test_a_tool_that_takes_too_long(surroundings: Surroundings) -> None:
    """For a side effect nobody knows the end, everything else has simply failed."""
    surroundings.describe(pay="/hold", put="/hold")
    file = surroundings.folder / "tools.json"
    file.write_text(file.read_text().replace("20000", "300"))
    async with running_gateway(surroundings) as gateway:
        assert failure_of(await gateway.invoke("put", "k1"))[0] == "TOOL_FAILED"
        async with refused("TOOL_OUTCOME_UNKNOWN"):
            await gateway.invoke("pay", "k2")
        assert (await gateway.cancel("k2")).state == UNKNOWN
        async with refused("TOOL_OUTCOME_UNKNOWN"):
            await gateway.invoke("pay", "k2")
    assert surroundings.http.calls == {"k1": 1, "k2": 1}


async def test_a_defect_leaves_nobody_waiting(gateway: Gateway, surroundings: Surroundings) -> None:
    """What breaks between the run and the storing of its end is run again where it may be, and settled where not."""
    try:
        arm_failpoints("toolgw.after_run_before_store=raise@1")
        assert result_of(await gateway.invoke("put", "k1")) == {"echo": {}}
        arm_failpoints("toolgw.after_run_before_store=raise@1")
        async with refused("TOOL_OUTCOME_UNKNOWN"):
            await gateway.invoke("pay", "k2")
    finally:
        arm_failpoints("")
    assert surroundings.http.calls == {"k1": 2, "k2": 1}


async def test_rows_of_other_tenants_are_out_of_reach(gateway: Gateway, surroundings: Surroundings) -> None:
    foreign = SessionKey(tenant="acme", agent="helper", channel="chat", session="s-1")
    for session in (DEMO, foreign):
        await gateway.invoke("remember_note", "k1", {"note": "mine"}, session)
    connection = await asyncpg.connect(surroundings.database.dsn("toolgw"))
    for table in ("invocations", "notes"):
        assert await connection.fetchval(f"SELECT count(*) FROM toolgw.{table}") == 0
        await connection.execute("SELECT set_config('soma.tenants', 'acme', false)")
        assert [row["tenant"] for row in await connection.fetch(f"SELECT tenant FROM toolgw.{table}")] == ["acme"]
        await connection.execute("SELECT set_config('soma.tenants', '', false)")
    with pytest.raises(asyncpg.InsufficientPrivilegeError):
        await connection.execute("INSERT INTO toolgw.notes VALUES ('acme', 'k9', '', 'spied', now())")
    await connection.close()
