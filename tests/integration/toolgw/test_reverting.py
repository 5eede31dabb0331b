"""RevertTurn: which calls of a turn are taken back, how often, and by whom. Real PostgreSQL, a real endpoint that
remembers who called."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from typing import Any, Literal

import asyncpg
import pytest
from soma.common.v1.message_pb2 import SessionKey
from soma.toolgw.v1.tool_service_pb2 import InvocationState, ListToolsRequest, Reversal, RevertTurnResponse

from services.toolgw.adapters.reversal_claims_postgres import PostgresReversalClaims
from services.toolgw.application import revert_turn
from services.toolgw.application.hold_lease import LEASE_S
from services.toolgw.application.run_tool import Bounds
from services.toolgw.domain.reversal import PastCall, StoppedTurn, Undoing
from services.toolgw.domain.reversal import Reversal as State
from soma_common.postgres.connect import create_pool
from soma_common.telemetry.metrics import REGISTRY
from soma_common.testing.eventually import eventually
from soma_common.testing.tool_server import CutOff, Give, RecordedToolCall, Refuse, Rule, ToolServer, WitnessTool
from soma_common.testing.tool_server import give_back as gives_back
from tests.integration.toolgw.conftest import (
    DEMO,
    TURN,
    Gateway,
    Surroundings,
    caller_of,
    failure_of,
    refused,
    result_of,
    running_gateway,
    running_process,
)

REVERTED = RevertTurnResponse(reversal=Reversal.REVERSAL_REVERTED)
OTHER = SessionKey(tenant="demo", agent="helper", channel="chat", session="s-2")
FOREIGN = SessionKey(tenant="acme", agent="helper", channel="chat", session="s-1")
TAKES_A_CALL = {"type": "object", "properties": {"arguments": {"type": "object"}, "result": {}}}


def kept(*keys: str) -> RevertTurnResponse:
    return RevertTurnResponse(reversal=Reversal.REVERSAL_KEPT, kept=keys)


@asynccontextmanager
async def witness(
    around: Surroundings,
    rule: Rule = gives_back,
    compensations: Literal["idempotent", "side_effectful"] = "idempotent",
    look: Literal["read_only", "side_effectful"] = "read_only",
) -> AsyncIterator[ToolServer]:
    """`put` and `pay` can be taken back; `look` cannot."""
    tools = (
        WitnessTool("put", "idempotent", compensation="unput"),
        WitnessTool("pay", "side_effectful", compensation="unpay"),
        WitnessTool("look", look),
        WitnessTool("unput", compensations, TAKES_A_CALL),
        WitnessTool("unpay", compensations, TAKES_A_CALL),
    )
    async with ToolServer(tools, rule) as server:
        server.write_tools_file(around.folder / "tools.json")
        yield server


def compensated(server: ToolServer) -> list[tuple[str, str]]:
    """Which compensations were called, in order: tool and key."""
    return [(call.tool, call.key) for call in server.calls if call.tool.startswith("un")]


async def work(gateway: Gateway) -> None:
    """A turn of three steps, each with an effect."""
    result_of(await gateway.invoke("put", "t/1", {"n": 1}, step=1))
    result_of(await gateway.invoke("remember_note", "t/2", {"note": "paid"}, step=2))
    result_of(await gateway.invoke("pay", "t/3", {"n": 3}, step=3))


async def notes(gateway: Gateway, key: str, session: SessionKey = DEMO) -> list[str]:
    found: list[str] = result_of(await gateway.invoke("recall_notes", key, session=session))["notes"]
    return found


async def test_the_calls_of_a_turn_are_taken_back_the_last_first(surroundings: Surroundings) -> None:
    def answers(call: RecordedToolCall) -> Give:
        return Give({"booking": call.number})

    before = REGISTRY.get_sample_value("soma_toolgw_reversals_total", {"result": "REVERTED"}) or 0
    async with (
        witness(surroundings, answers) as server,
        running_gateway(surroundings, "toolgw-0") as one,
        running_gateway(surroundings, "toolgw-1") as two,
    ):
        await work(one)
        assert await notes(one, "n1") == ["paid"]
        assert await one.revert() == REVERTED
        assert await notes(one, "n2") == []
        assert compensated(server) == [("unpay", "t/3/compensation"), ("unput", "t/1/compensation")]
        assert [call.arguments for call in server.calls[2:]] == [
            {"arguments": {"n": 3}, "result": {"booking": 2}},
            {"arguments": {"n": 1}, "result": {"booking": 1}},
        ]
        assert [(call.turn, call.step) for call in server.calls[2:]] == [(TURN, 3), (TURN, 1)]
        for gateway in (two, one):
            assert await gateway.revert() == REVERTED
        assert len(server.calls) == 4
        assert (await two.invoke("pay", "t/3", {"n": 3}, step=3)).replayed  # What was stored of the calls stays.
    assert REGISTRY.get_sample_value("soma_toolgw_reversals_total", {"result": "REVERTED"}) == before + 1


async def test_what_has_no_effect_needs_no_compensation(surroundings: Surroundings) -> None:
    """Reading, tombstones, arguments that do not fit, an endpoint that was never reached."""
    surroundings.http.url = "http://127.0.0.1:1"
    surroundings.describe()
    async with running_gateway(surroundings) as gateway:
        assert await gateway.revert(turn_id="e" * 32) == REVERTED  # A turn without calls.
        result_of(await gateway.invoke("calculate", "k1", {"expression": "1"}))
        await gateway.cancel("k2")
        async with refused("TOOL_CANCELLED"):
            await gateway.invoke("pay", "k2")
        assert failure_of(await gateway.invoke("pay", "k3", {"n": "one"}))[0] == "TOOL_ARGUMENTS_INVALID"
        assert failure_of(await gateway.invoke("pay", "k4"))[1] == "pay cannot be reached"
        assert failure_of(await gateway.invoke("look", "k5"))[0] == "TOOL_FAILED"
        assert failure_of(await gateway.invoke("remember_note", "k6", {"note": ""}))[0] == "TOOL_ARGUMENTS_INVALID"
        assert await gateway.revert() == REVERTED


async def test_one_effect_that_stays_keeps_all(surroundings: Surroundings) -> None:
    async with witness(surroundings, look="side_effectful") as server, running_gateway(surroundings) as gateway:
        await work(gateway)
        result_of(await gateway.invoke("look", "t/4", step=4))
        for _ in range(2):
            assert await gateway.revert() == kept("t/4", "t/3", "t/2", "t/1")
        assert compensated(server) == []
        assert await notes(gateway, "n1") == ["paid"]


@pytest.mark.parametrize("trouble", ["refused", "cut off", "given up", "older release"])
async def test_every_doubt_is_an_effect_that_stays(surroundings: Surroundings, trouble: str) -> None:
    def rule(call: RecordedToolCall) -> Refuse | CutOff | Give:
        if call.tool != "pay":
            return Give(None)
        troubles: dict[str, Refuse | CutOff | Give] = {
            "refused": Refuse(500),
            "cut off": CutOff(),
            "given up": Give(None, delay_s=0.6),
            "older release": Give(None),
        }
        return troubles[trouble]

    async with witness(surroundings, rule) as server, running_gateway(surroundings) as gateway:
        result_of(await gateway.invoke("put", "t/1", step=1))
        call = asyncio.create_task(gateway.invoke("pay", "t/2", step=2))
        await eventually(lambda: len(server.calls) == 2)
        if trouble == "given up":
            cancelled = await gateway.cancel("t/2", timeout_ms=50)
            assert cancelled.state == InvocationState.INVOCATION_STATE_OUTCOME_UNKNOWN
            assert await gateway.revert() == kept("t/2", "t/1")
        await asyncio.gather(call, return_exceptions=True)
        if trouble == "older release":
            await as_an_older_release_wrote_it(surroundings, "t/2")
        assert await gateway.revert() == kept("t/2", "t/1")
        assert compensated(server) == []


async def as_an_older_release_wrote_it(around: Surroundings, key: str) -> None:
    connection = await asyncpg.connect(around.database.superuser_dsn)
    changed = "UPDATE toolgw.invocations SET compensation = NULL, arguments = NULL WHERE key = $1 RETURNING true"
    assert await connection.fetchval(changed, key)
    await connection.close()


async def test_what_an_earlier_attempt_did_is_not_known(surroundings: Surroundings) -> None:
    """The endpoint was asked, the process died, and the next attempt finds nobody there: no proof of no effect."""
    async with witness(surroundings) as server:
        async with (
            running_process(surroundings, "toolgw-0", "toolgw.after_run_before_store=kill") as doomed,
            refused("SERVICE_UNAVAILABLE"),
        ):
            await doomed.invoke("put", "t/1", step=1)
        assert server.calls_by_key() == {"t/1": 1}
        await server.stop()
        async with running_gateway(surroundings, "toolgw-0") as successor:
            assert failure_of(await successor.invoke("put", "t/1", step=1))[1] == "put cannot be reached"
            assert await successor.revert() == kept("t/1")


async def test_notes_that_were_given_up_are_no_effect(surroundings: Surroundings) -> None:
    """A note that was not stored when its call was given up is never stored, so it need not be taken back."""
    async with (
        running_gateway(surroundings, "toolgw-1") as other,
        running_process(surroundings, "toolgw-0", "toolgw.after_run_before_store=stop") as frozen,
    ):
        call = asyncio.create_task(frozen.invoke("remember_note", "k1", {"note": "late"}))
        connection = await asyncpg.connect(surroundings.database.superuser_dsn)
        await eventually(lambda: connection.fetchval("SELECT true FROM toolgw.invocations"))
        await connection.close()
        await other.cancel("k1", timeout_ms=100)
        assert await other.revert() == REVERTED
        call.cancel()


@pytest.mark.parametrize("trouble", [Refuse(500), CutOff()], ids=["refused", "cut off"])
@pytest.mark.parametrize("failing", ["unpay", "unput"])
async def test_a_compensation_that_fails_ends_it(
    surroundings: Surroundings, failing: str, trouble: Refuse | CutOff
) -> None:
    def rule(call: RecordedToolCall) -> Refuse | CutOff | Give:
        return trouble if call.tool == failing else Give(None)

    expected = kept("t/3", "t/2", "t/1") if failing == "unpay" else kept("t/1")
    async with (
        witness(surroundings, rule, compensations="side_effectful") as server,
        running_gateway(surroundings, "toolgw-0") as one,
        running_gateway(surroundings, "toolgw-1") as two,
    ):
        await work(one)
        for gateway in (one, two, one):
            assert await gateway.revert() == expected
        assert await notes(one, "n1") == (["paid"] if failing == "unpay" else [])
        assert set(server.calls_by_key().values()) == {1}
        assert [tool for tool, _ in compensated(server)] == (["unpay"] if failing == "unpay" else ["unpay", "unput"])


async def test_reverts_from_all_sides_are_one(surroundings: Surroundings) -> None:
    def slow(call: RecordedToolCall) -> Give:
        return Give(None, delay_s=0.2 if call.tool.startswith("un") else 0.0)

    async with (
        witness(surroundings, slow, compensations="side_effectful") as server,
        running_gateway(surroundings, "toolgw-0") as one,
        running_gateway(surroundings, "toolgw-1") as two,
    ):
        await work(one)
        answers = await asyncio.gather(*(gateway.revert() for gateway in (one, two) for _ in range(5)))
        assert answers == [REVERTED] * 10
        assert set(server.calls_by_key().values()) == {1}
        assert len(compensated(server)) == 2


async def test_a_caller_that_leaves_and_comes_back(surroundings: Surroundings) -> None:
    def slow(call: RecordedToolCall) -> Give:
        return Give(None, delay_s=0.5 if call.tool == "unpay" else 0.0)

    async with (
        witness(surroundings, slow, compensations="side_effectful") as server,
        running_gateway(surroundings) as gateway,
    ):
        await work(gateway)
        async with refused("DEADLINE_EXCEEDED"):
            await gateway.revert(timeout=0.3)
        assert await gateway.revert() == REVERTED
        assert set(server.calls_by_key().values()) == {1}


async def stored(around: Surroundings, column: str = "state") -> Any:
    """What is stored of the only reversal."""
    connection = await asyncpg.connect(around.database.superuser_dsn)
    value = await connection.fetchval(f"SELECT {column} FROM toolgw.reversals")
    await connection.close()
    return value


async def is_reverted(around: Surroundings) -> bool:
    return bool(await stored(around) == "reverted")


def slow_to_give_back(call: RecordedToolCall) -> Give:
    return Give(None, delay_s=0.5 if call.tool.startswith("un") else 0.0)


async def test_a_caller_that_leaves_for_good_leaves_no_turn_half_undone(surroundings: Surroundings) -> None:
    async with (
        witness(surroundings, slow_to_give_back, compensations="side_effectful") as server,
        running_gateway(surroundings) as gateway,
    ):
        await work(gateway)
        async with refused("DEADLINE_EXCEEDED"):
            await gateway.revert(timeout=0.3)
        assert await stored(surroundings) == "undoing"

        await eventually(partial(is_reverted, surroundings), what="the end of what nobody waits for")
        assert [tool for tool, _ in compensated(server)] == ["unpay", "unput"]
        assert set(server.calls_by_key().values()) == {1}


async def test_whoever_finds_no_place_to_wait_stops_nothing(
    surroundings: Surroundings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(revert_turn, "MAX_WAITING_PER_TENANT", 1)
    async with witness(surroundings, slow_to_give_back) as server, running_gateway(surroundings) as gateway:
        await work(gateway)
        waits = asyncio.create_task(gateway.revert())
        await eventually(lambda: compensated(server), what="the first compensation")
        async with refused("QUEUE_FULL"):
            await gateway.revert()
        assert await gateway.revert(turn_id="e" * 32) == REVERTED, "there is nothing to wait for"
        assert await gateway.revert(FOREIGN) == REVERTED
        assert await waits == REVERTED
        assert await gateway.revert() == REVERTED
        assert set(server.calls_by_key().values()) == {1}


@pytest.mark.parametrize("who", ["its successor", "another"])
async def test_what_a_dead_process_left_half_undone_is_taken_over_unasked(
    surroundings: Surroundings, monkeypatch: pytest.MonkeyPatch, who: str
) -> None:
    """A process that starts looks at once; one that runs already looks every now and then."""
    monkeypatch.setattr(revert_turn, "TAKE_OVER_EVERY_S", 0.1 if who == "another" else 60.0)

    async with witness(surroundings) as server, AsyncExitStack() as gateways:
        if who == "another":
            await gateways.enter_async_context(running_gateway(surroundings, "toolgw-1"))
        failpoint = "toolgw.before_run=kill@5"  # `unpay` has run, the note is still there.
        async with running_process(surroundings, "toolgw-0", failpoint) as doomed:
            await work(doomed)
            async with refused("SERVICE_UNAVAILABLE"):
                await doomed.revert()
            assert doomed.process is not None
            assert await doomed.process.ended() == -9
        assert [tool for tool, _ in compensated(server)] == ["unpay"]
        if who == "its successor":
            await gateways.enter_async_context(running_gateway(surroundings, "toolgw-0"))
        await eventually(
            partial(is_reverted, surroundings), LEASE_S + 10.0, what="the end of what the dead process began"
        )
        assert [tool for tool, _ in compensated(server)] == ["unpay", "unput"]
        assert set(server.calls_by_key().values()) == {1}


async def test_a_process_that_stops_hands_over_in_bounded_time(
    surroundings: Surroundings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(revert_turn, "TAKE_OVER_EVERY_S", 0.1)

    def rule(call: RecordedToolCall) -> Give:
        return Give(None, delay_s=4.0 if call.tool == "unpay" else 0.0)

    async with witness(surroundings, rule) as server, running_gateway(surroundings, "toolgw-1"):
        async with running_gateway(surroundings, "toolgw-0") as one:
            await work(one)
            async with refused("DEADLINE_EXCEEDED"):
                await one.revert(timeout=0.2)
            assert server.calls[-1].number == 3
            stopping_at = time.monotonic()
        assert time.monotonic() - stopping_at < 2.0
        await eventually(partial(is_reverted, surroundings), what="the end of what a stopped process began")
        assert server.calls_by_key() == {"t/1": 1, "t/3": 1, "t/3/compensation": 2, "t/1/compensation": 1}


async def test_one_process_at_a_time_undoes_a_turn(surroundings: Surroundings) -> None:
    """The claim of a turn that is being undone, as processes of other instances see it."""
    async with running_gateway(surroundings):
        """The schema is there, and nobody takes anything over."""
    turn = StoppedTurn("demo", "helper", "chat", "s-9", "9" * 32)

    def look(calls: Sequence[PastCall]) -> Undoing:
        return Undoing(State.UNDOING, ("k1",))

    pool = await create_pool(surroundings.database.dsn("toolgw"))
    one, two = (PostgresReversalClaims(pool, name) for name in ("one", "two"))
    bounds = Bounds(of_process=10, of_tenant=10)
    for store in (one, two):
        await store.renew(LEASE_S)
    assert not await one.claim_reversal(turn), "nothing is decided yet"
    await one.begin_reversal(turn, look)
    assert await two.left_reversals(bounds) == [], "nothing was undone, and its session has no name yet"
    assert await one.claim_reversal(turn)
    assert await one.claim_reversal(turn), "a claim may be repeated"
    assert not await two.claim_reversal(turn)
    await two.release_reversal(turn)
    assert await two.left_reversals(bounds) == []
    await one.release()
    assert await two.left_reversals(bounds) == [turn]
    assert await two.claim_reversal(turn)
    assert not await one.claim_reversal(turn), "it was held dead and wakes"
    await two.release_reversal(turn)
    assert await one.left_reversals(bounds) == [turn]
    assert await one.claim_reversal(turn)
    await one.end_reversal(turn, Undoing(State.REVERTED, ("k1",)))
    assert not await two.claim_reversal(turn)
    assert await two.left_reversals(bounds) == []
    await pool.close()


async def test_what_is_taken_over_at_once_is_bounded_for_each_tenant(surroundings: Surroundings) -> None:
    async with running_gateway(surroundings):
        """The schema is there, and nobody takes anything over."""
    connection = await asyncpg.connect(surroundings.database.superuser_dsn)
    await connection.execute(
        "INSERT INTO toolgw.reversals"
        " (tenant, session_id, turn_id, state, effects, kept, runner, agent, channel, session, create_time)"
        " SELECT tenant, '', tenant || n, 'undoing', '{k}', '{}', gen_random_uuid(), 'a', 'c', 's',"
        " clock_timestamp() + make_interval(secs => n)"
        " FROM (VALUES ('acme', 9), ('demo', 1)) AS given (tenant, many), generate_series(1, many) AS n"
    )
    pool = await create_pool(surroundings.database.dsn("toolgw"))
    store = PostgresReversalClaims(pool, "one")

    async def left(of_process: int, of_tenant: int) -> list[str]:
        return sorted(turn.turn_id for turn in await store.left_reversals(Bounds(of_process, of_tenant)))

    assert await left(10, 3) == ["acme1", "acme2", "acme3", "demo1"]
    assert await left(2, 9) == ["acme1", "demo1"]
    await pool.close()
    await connection.close()


async def test_after_the_first_look_no_call_of_the_turn_begins(surroundings: Surroundings) -> None:
    """A brain that was held dead wakes and goes on with a turn that was taken back."""
    async with witness(surroundings) as server, running_gateway(surroundings) as gateway:
        await work(gateway)
        assert await gateway.revert() == REVERTED
        for _ in range(2):
            for tool, key in (("pay", "t/9"), ("put", "t/10"), ("remember_note", "t/11")):
                async with refused("TOOL_CANCELLED"):
                    await gateway.invoke(tool, key, {"note": "late"} if tool == "remember_note" else {})
        result_of(await gateway.invoke("look", "t/12"))
        result_of(await gateway.invoke("put", "u/1", turn_id="f" * 32))
        result_of(await gateway.invoke("put", "u/2", session=OTHER))
        assert (await gateway.cancel("t/9")).state == InvocationState.INVOCATION_STATE_CANCELLED
        assert await gateway.revert() == REVERTED
        assert [tool for tool, _ in compensated(server)] == ["unpay", "unput"]
        assert {"t/9", "t/10"}.isdisjoint(server.calls_by_key())
        assert await notes(gateway, "n1") == []


@pytest.mark.parametrize("seed", range(3))
async def test_of_a_call_and_the_first_look_one_is_first(surroundings: Surroundings, seed: int) -> None:
    """A call that races the first look is seen by it, or never runs."""
    turns = [f"{seed:016x}{n:016x}" for n in range(12)]
    async with (
        witness(surroundings) as server,
        running_gateway(surroundings, "toolgw-0") as one,
        running_gateway(surroundings, "toolgw-1") as two,
    ):
        calls = [asyncio.create_task(one.invoke("pay", f"{turn}/1/0", turn_id=turn)) for turn in turns]
        told = await asyncio.gather(*(two.revert(turn_id=turn) for turn in turns))
        await asyncio.gather(*calls, return_exceptions=True)
    ran = server.calls_by_key()
    for turn, answer in zip(turns, told, strict=True):
        key = f"{turn}/1/0"
        is_left = ran[key] > ran[f"{key}/compensation"]
        assert answer == (kept(key) if is_left else REVERTED)


async def test_other_sessions_and_tenants_are_not_touched(surroundings: Surroundings) -> None:
    """The same turn id and the same keys, of three owners: each has its own answer and its own effects."""
    async with witness(surroundings) as server, running_gateway(surroundings) as gateway:
        result_of(await gateway.invoke("remember_note", "k1", {"note": "mine"}))
        result_of(await gateway.invoke("remember_note", "k2", {"note": "of another session"}, OTHER))
        result_of(await gateway.invoke("remember_note", "k1", {"note": "of another tenant"}, FOREIGN))
        result_of(await gateway.invoke("put", "k3", {}, FOREIGN))
        assert await gateway.revert(OTHER) == REVERTED
        assert await notes(gateway, "n1", OTHER) == []
        assert await notes(gateway, "n2") == ["mine"]
        assert await gateway.revert() == REVERTED
        assert await notes(gateway, "n3") == []
        assert await notes(gateway, "n4", FOREIGN) == ["of another tenant"]
        assert compensated(server) == []
    connection = await asyncpg.connect(surroundings.database.dsn("toolgw"))
    assert await connection.fetchval("SELECT count(*) FROM toolgw.reversals") == 0
    await connection.execute("SELECT set_config('soma.tenants', 'acme', false)")
    assert await connection.fetchval("SELECT count(*) FROM toolgw.reversals") == 0
    await connection.execute("SELECT set_config('soma.tenants', 'demo', false)")
    assert await connection.fetchval("SELECT count(*) FROM toolgw.reversals") == 2
    await connection.close()


async def test_who_may_revert(surroundings: Surroundings) -> None:
    async with (
        running_gateway(surroundings) as gateway,
        caller_of(surroundings, gateway.target, tenant="demo", role="channel") as channel,
        caller_of(surroundings, gateway.target, tenant="acme") as foreign,
    ):
        assert await foreign.revert(FOREIGN) == REVERTED
        for caller in (foreign, channel):
            async with refused("PERMISSION_DENIED"):
                await caller.revert()


@pytest.mark.parametrize("turn_id", ["", "x" * 32, TURN.upper(), TURN[:-1], f"{TURN}0", f"{TURN}\n"])
async def test_a_turn_has_32_hex_digits(gateway: Gateway, turn_id: str) -> None:
    async with refused("INVALID_REQUEST"):
        await gateway.revert(turn_id=turn_id)


async def test_nobody_else_may_use_the_key_of_a_compensation(surroundings: Surroundings) -> None:
    async with witness(surroundings) as server, running_gateway(surroundings) as gateway:
        await work(gateway)
        for call in (gateway.cancel("t/3/compensation"), gateway.invoke("put", "t/3/compensation")):
            async with refused("INVALID_REQUEST"):
                await call
        assert await gateway.revert() == REVERTED
        assert len(compensated(server)) == 2


async def test_the_compensation_of_notes_is_offered_to_nobody(gateway: Gateway, surroundings: Surroundings) -> None:
    listed = (await gateway.stub.ListTools(ListToolsRequest(parent="tenants/demo"))).tools
    assert {tool.tool: tool.compensation for tool in listed if tool.compensation} == {"remember_note": "forget_note"}
    assert "forget_note" not in {tool.tool for tool in listed}
    await surroundings.config.give("helper", "remember_note", "forget_note")
    result_of(await gateway.invoke("remember_note", "k1", {"note": "kept"}))
    async with refused("TOOL_NOT_FOUND"):
        await gateway.invoke("forget_note", "k2", {"arguments": {}, "result": {}})


async def test_a_compensation_that_is_gone_since_the_first_look_never_runs(surroundings: Surroundings) -> None:
    """The file of tools is changed while a turn is half undone; what was decided stays, also when the tool is back."""
    async with witness(surroundings) as server:
        failpoint = "toolgw.after_first_look_before_compensation=kill"
        async with running_process(surroundings, "toolgw-0", failpoint) as doomed:
            await work(doomed)
            async with refused("SERVICE_UNAVAILABLE"):
                await doomed.revert()
        described = (surroundings.folder / "tools.json").read_bytes()
        surroundings.describe()
        async with running_gateway(surroundings, "toolgw-0") as successor:
            assert await successor.revert() == kept("t/3", "t/2", "t/1")
        (surroundings.folder / "tools.json").write_bytes(described)
        async with running_gateway(surroundings, "toolgw-0") as successor:
            assert await successor.revert() == kept("t/3", "t/2", "t/1")
        assert compensated(server) == []


KILLED_AT = {
    "toolgw.after_first_look_before_compensation=kill": (0, 0),
    "toolgw.before_run=kill@4": (0, 0),  # The three calls of the turn come before.
    "toolgw.after_run_before_store=kill@4": (1, 0),
    "toolgw.before_run=kill@5": (1, 0),  # The note's own compensation: nothing is sent.
    "toolgw.after_run_before_store=kill@6": (1, 1),
    "toolgw.after_compensations_before_record=kill": (1, 1),
}
"""Where the process dies, and how often `unpay` and `unput` were sent before."""


@pytest.mark.parametrize("compensations", ["idempotent", "side_effectful"])
@pytest.mark.parametrize("failpoint", KILLED_AT)
async def test_killed_while_it_undoes(
    surroundings: Surroundings, failpoint: str, compensations: Literal["idempotent", "side_effectful"]
) -> None:
    """Another instance goes on: what ended is not run again, what was cut off only if it may be."""
    async with (
        witness(surroundings, compensations=compensations) as server,
        running_gateway(surroundings, "toolgw-1") as other,
    ):
        async with running_process(surroundings, "toolgw-0", failpoint) as doomed:
            await work(doomed)
            async with refused("SERVICE_UNAVAILABLE"):
                await doomed.revert()
            assert doomed.process is not None
            assert await doomed.process.ended() == -9
        sent = tuple(sum(tool == name for tool, _ in compensated(server)) for name in ("unpay", "unput"))
        assert sent == KILLED_AT[failpoint]
        async with running_gateway(surroundings, "toolgw-0") as successor:  # So nobody waits for the lease to run out.
            answers = await asyncio.gather(*(gateway.revert() for gateway in (other, successor, other)))
        answers.append(await other.revert())
        undone = await notes(other, "n1") == []
    cut_off = {"toolgw.before_run=kill@4": "unpay", "toolgw.after_run_before_store=kill@4": "unpay"}
    cut_off["toolgw.after_run_before_store=kill@6"] = "unput"
    stays = cut_off.get(failpoint) if compensations == "side_effectful" else None
    expected = {None: REVERTED, "unpay": kept("t/3", "t/2", "t/1"), "unput": kept("t/1")}[stays]
    assert answers == [expected] * 4
    assert undone == (stays != "unpay")
    check_calls(server, failpoint, compensations)


def check_calls(server: ToolServer, failpoint: str, compensations: str) -> None:
    """Each effect once; a key is called a second time only where the first call's end was lost and it may be."""
    by_key: dict[str, Any] = dict(server.calls_by_key())
    assert by_key.keys() == server.effects.keys()
    repeated = [key for key, times in by_key.items() if times > 1]
    lost = {"toolgw.after_run_before_store=kill@4": "t/3", "toolgw.after_run_before_store=kill@6": "t/1"}
    may_repeat = compensations == "idempotent" and failpoint in lost
    assert repeated == ([f"{lost[failpoint]}/compensation"] if may_repeat else [])
