"""Runs a service without one guard of the turn protocol, to see that the soak notices (`make soak-guards`).

    python -m tests.chaos.unguarded tombstone services.toolgw.main
    UNGUARDED=tombstone SOMA_SERVICE_INSTANCE=toolgw-0 python -m tests.chaos.unguarded      # as the chaos stack does it

The product has no switch for any of this: functions of the service are replaced before its main runs, and rules that
the database keeps are taken out of its functions (`unguard_database`, as superuser, once the stack is up). A guard is
named as in `tests/model/guards.py`. Where a replacement does not find what it replaces it fails, so that a guard that
moved is not taken for one that nobody misses.
"""

from __future__ import annotations

import asyncio
import os
import random
import runpy
import sys
from collections.abc import Callable, Iterable, Sequence
from importlib import import_module
from typing import Any, Final

import asyncpg
from soma.cognition.v1.cognition_service_pb2 import StepKind

VARIABLE: Final = "UNGUARDED"
MODULE: Final = "tests.chaos.unguarded"
SLOW_TAKEOVER_S: Final = 1.5
SLOW_COMMIT_S: Final = 4.5
"""For so long a commit waits behind its fence, in the database, of a router that is named in `witness.slow`."""

_ROUTER: Final = "services.router.application"
_MOVE: Final = """UPDATE router.partitions p
    SET head = f.head, mail_head = f.mail, mail_floor = f.floor, cursor_stream = f.stream, cursor_seq = f.seq, \
cursor_batch = f.batch
    FROM unnest(p_fence) f"""
_LAST: Final = "IF cardinality(p_dead) > 0 THEN"


def replace(place: str, make: Callable[[Any], Any]) -> None:
    """Puts `make(what is there)` at `module:name` or `module:Class.name`."""
    module, _, path = place.partition(":")
    owner: Any = import_module(module)
    *outer, name = path.split(".")
    for part in outer:
        owner = getattr(owner, part)
    setattr(owner, name, make(getattr(owner, name)))


# ---- router


def _confirm() -> None:
    """A reply is confirmed when it is proposed, not when it is journaled."""

    def make(take: Any) -> Any:
        def early(self: Any, turn: Any, proposal: Any) -> None:
            if proposal.kind == StepKind.STEP_KIND_MODEL_REPLY and turn.link is not None:
                turn.link.confirm(turn.id, turn.dispatch, proposal.step)
            take(self, turn, proposal)

        return early

    replace(f"{_ROUTER}.run_turns:TurnRunner._take", make)


def _inputs_seen() -> None:
    """A final is taken whatever it has read."""

    def make(take: Any) -> Any:
        def any_final(self: Any, turn: Any, proposal: Any) -> None:
            proposal.inputs_seen = len(turn.inputs)
            take(self, turn, proposal)

        return any_final

    replace(f"{_ROUTER}.run_turns:TurnRunner._take", make)


def _dispatch_id() -> None:
    """A proposal counts, of whichever dispatch, link and step it is."""

    def make(_: Any) -> Any:
        def everybody(self: Any, _link: Any, proposals: Iterable[Any]) -> None:
            for proposal in proposals:
                turn = self._state.running.get(proposal.turn_id)
                if turn is not None and turn.status == 1:
                    self._take(turn, proposal)

        return everybody

    replace(f"{_ROUTER}.run_turns:TurnRunner.on_proposals", make)


def _load_after() -> None:
    """A new owner loads the partition, and then takes it; the time between the two is long enough to be met."""
    leases = "services.router.adapters.store_postgres:PostgresLeases"
    early: dict[int, Any] = {}

    def make_acquire(acquire: Any) -> Any:
        async def load_first(self: Any, partition: int, term: Any, seen: Any) -> Any:
            present = await self._line.use(
                lambda c: c.fetchval("SELECT term FROM router.partitions WHERE id = $1", partition)
            )
            early[partition] = []
            if present:
                await load(self, partition, present, True, early[partition].extend)
            await asyncio.sleep(SLOW_TAKEOVER_S)
            return await acquire(self, partition, term, seen)

        return load_first

    load: Any = None

    def make_load(original: Any) -> Any:
        nonlocal load
        load = original

        async def loaded(_self: Any, partition: int, _term: Any, _strike: bool, found: Any) -> None:
            found(early.pop(partition))

        return loaded

    replace(f"{leases}.load", make_load)
    replace(f"{leases}.acquire", make_acquire)


def _term_ends() -> None:
    """The terms go on although the connection to the database was lost."""

    def make(end_all: Any) -> Any:
        def some(self: Any, cause: str) -> None:
            if cause != "store_lost":
                end_all(self, cause)

        return some

    replace(f"{_ROUTER}.own_partitions:OwnPartitions.end_all", make)


def _purge_committed() -> None:
    """The lane is purged of everything, committed or not."""

    def make(_: Any) -> Any:
        async def everything(self: Any, *_: Any) -> None:
            info = await self._js.stream_info(self._stream)
            await self._js.purge_stream(self._stream, seq=info.state.last_seq)

        return everything

    replace("services.router.adapters.inbound_nats:LaneReader.tend", make)


def _anchor() -> None:
    """A cursor is a number, and whatever has a higher one comes after it."""

    def make(_: Any) -> Any:
        async def numbers_only(self: Any) -> int:
            info = await self._js.stream_info(self._stream)
            self._created = str(info.created)
            for partition in self.partitions():
                partition.known_seq = info.state.last_seq if partition.known_seq is None else partition.known_seq
            start = min((p.read_seq for p in self.partitions()), default=0) + 1
            self.last_seq = start - 1
            return max(start, 1)

        return numbers_only

    replace("services.router.adapters.inbound_nats:LaneReader._check_cursors", make)


def _floor_durable() -> None:
    """A new owner delivers what ends from now on."""
    replace(f"{_ROUTER}.deliver_outcomes:DeliveryDesk.adopt", lambda _: lambda *_: None)


def _floor_acked() -> None:
    """What was sent counts as acknowledged."""
    ack_item = import_module(f"{_ROUTER}.outcomes").AckItem

    def make(send: Any) -> Any:
        def sent_is_acked(self: Any, line: Any) -> None:
            send(self, line)
            first = line.items[0]
            if first.stream is not None:
                self.committer.put_later(ack_item(first.partition, first.position, first.key[0]))

        return sent_is_acked

    replace(f"{_ROUTER}.deliver_outcomes:DeliveryDesk._send", make)


def _one_unacked() -> None:
    """Each delivery is handed over at once, whatever came of the one before."""

    def make(append: Any) -> Any:
        def a_line_of_its_own(self: Any, pending: Any) -> None:
            pending.session_id += pending.position.to_bytes(8)
            append(self, pending)

        return a_line_of_its_own

    replace(f"{_ROUTER}.deliver_outcomes:DeliveryDesk._append", make)


def _rendezvous() -> None:
    """Any adapter that is there gets a delivery."""

    def make(_: Any) -> Any:
        def anybody(self: Any, _session_id: bytes, key: Any) -> Any:
            streams = [s for s in self._streams.get(key, {}).values() if s.window > 0]
            return random.choice(streams) if streams else None

        return anybody

    replace(f"{_ROUTER}.deliver_outcomes:DeliveryDesk._choose", make)


def _withdrawn() -> None:
    """A turn that a brain was given in vain is given again as if none had had it."""

    def make(withdraw: Any) -> Any:
        def forgotten(self: Any, turn: Any) -> None:
            withdraw(self, turn)
            self._withdrawn.clear()

        return forgotten

    replace(f"{_ROUTER}.start_ahead:StartsAhead.withdraw", make)


# ---- brain and tool gateway


def _replay() -> None:
    """A brain begins every turn anew."""

    def make(run: Any) -> Any:
        async def from_the_beginning(self: Any, start: Any, *rest: Any) -> None:
            del start.journal[:]
            await run(self, start, *rest)

        return from_the_beginning

    replace("services.cognition.application.run_turn:TurnRunner.run", make)


def _tool_key() -> None:
    """What was called under a key is not known any more when it is called again."""
    store = "services.toolgw.adapters.store_postgres:PostgresToolStore"

    def make(claim: Any) -> Any:
        async def forgetful(self: Any, call: Any, tool: Any, token: str, _dead: Any) -> Any:
            async with self._transaction(call.tenant) as connection:
                await connection.execute(
                    "DELETE FROM toolgw.invocations WHERE tenant = $1 AND key = $2", call.tenant, call.key
                )
            return await claim(self, call, tool, token, None)

        return forgetful

    def make_find(_: Any) -> Any:
        async def nothing(*_: Any) -> None:
            return None

        return nothing

    replace(f"{store}.claim", make)
    replace(f"{store}.find", make_find)


def _tombstone() -> None:
    """A call that has not come is not kept from coming."""

    def make(_: Any) -> Any:
        async def look_only(self: Any, tenant: str, _session_id: bytes, key: str) -> Any:
            return await self.find(tenant, key)

        return look_only

    replace("services.toolgw.adapters.store_postgres:PostgresToolStore.cancel", make)


# ---- client


def _client_dedupe() -> None:
    """An adapter shows whatever comes."""
    new = import_module("soma_common.client.inbox").Arrival.NEW
    replace("soma_common.client.inbox:Inbox.arrive", lambda _: lambda *_: new)


def _ack_again() -> None:
    """An adapter says nothing of what it has had before."""
    processed = import_module("soma_common.client.inbox").Arrival.PROCESSED

    def make(show: Any) -> Any:
        def silent(self: Any, delivery: Any) -> None:
            if self._inbox.arrive(delivery, self._stream.number) is not processed:
                show(self, delivery)

        return silent

    replace("soma_common.client.channel_client:ChannelClient._show", make)


def _resume() -> None:
    """An adapter that reconnects does not name what it has processed."""
    replace("soma_common.client.inbox:Inbox.processed", lambda _: lambda _self: [])


IN_SERVICES: Final[dict[str, dict[str, Callable[[], None]]]] = {
    "router": {
        "confirm": _confirm,
        "inputs_seen": _inputs_seen,
        "dispatch_id": _dispatch_id,
        "withdrawn": _withdrawn,
        "load_after": _load_after,
        "term_ends": _term_ends,
        "purge_committed": _purge_committed,
        "anchor": _anchor,
        "floor_durable": _floor_durable,
        "floor_acked": _floor_acked,
        "one_unacked": _one_unacked,
        "rendezvous": _rendezvous,
    },
    "cognition": {"replay": _replay},
    "toolgw": {"tool_key": _tool_key, "tombstone": _tombstone},
}
"""By service and guard: how it is taken away before the service's main runs."""

IN_CLIENTS: Final[dict[str, Callable[[], None]]] = {
    "client_dedupe": _client_dedupe,
    "ack_again": _ack_again,
    "resume": _resume,
}
"""The same for clients, which run in the process of the soak."""

IN_DATABASE: Final[dict[str, tuple[tuple[str, str, str], ...]]] = {
    "fence": (("commit_group", " AND p.term = f.term", ""),),
    "cursor_cas": (
        (
            "commit_group",
            " AND p.head = f.head_old AND p.mail_head = f.mail_old AND p.cursor_seq = f.seq_old",
            "",
        ),
    ),
    "fence_lock": (
        # Looks first and writes last: another owner may come between.
        ("commit_group", _MOVE, "PERFORM p.id FROM router.partitions p, unnest(p_fence) f"),
        ("commit_group", _LAST, f"{_MOVE} WHERE p.id = f.id;\n    {_LAST}"),
    ),
    "dedupe": (("commit_group", "IF found_count <> cardinality(p_messages) THEN", "IF false THEN"),),
    "strikes_durable": (("load_partition", "THEN p_strike ELSE 0", "THEN 0 ELSE 0"),),
    "step_cas": (
        ("commit_group", "AND t.status <> 3 AND t.step_count = j.step - 1", "AND t.status <> 3"),
        ("commit_group", "AND t.status <> 3 AND t.step_count = e.base", "AND t.status <> 3"),
        ("commit_group", "IF found_count <> cardinality(p_journaled) THEN", "IF false THEN"),
    ),
}
"""By guard: (function of the router's schema, what is there, what is put in its place)."""

ALSO_IN_DATABASE: Final = {
    "dedupe": (
        "DROP INDEX router.messages_idempotency;"
        " CREATE INDEX messages_idempotency ON router.messages (message_id, content_hash)"
    ),
    "step_cas": (
        "ALTER TABLE router.steps DROP CONSTRAINT steps_pkey; CREATE INDEX steps_pkey ON router.steps (turn_id, step)"
    ),
}


def guards() -> frozenset[str]:
    """Every guard that can be taken away."""
    named = {name for of_service in IN_SERVICES.values() for name in of_service}
    return frozenset(named | set(IN_CLIENTS) | set(IN_DATABASE))


def unguard_service(names: Iterable[str], service: str) -> None:
    """Takes guards away in this process, which is going to be this service."""
    for name in names:
        take_away = IN_SERVICES.get(service, {}).get(name)
        if take_away is not None:
            take_away()


async def unguard_database(names: Iterable[str], connection: asyncpg.Connection[asyncpg.Record]) -> None:
    """Takes guards away that the router's functions keep."""
    for name in names:
        changes: dict[str, list[tuple[str, str]]] = {}
        for function, there, instead in IN_DATABASE.get(name, ()):
            changes.setdefault(function, []).append((there, instead))
        for function, of_function in changes.items():
            await rewrite(connection, function, of_function)
        if name in ALSO_IN_DATABASE:
            await connection.execute(ALSO_IN_DATABASE[name])


async def make_commits_slow(connection: asyncpg.Connection[asyncpg.Record]) -> None:
    """Lets a commit wait behind its fence while its writer's name is in `witness.slow`; no guard is taken away."""
    await connection.execute(
        "CREATE SCHEMA IF NOT EXISTS witness; CREATE UNLOGGED TABLE IF NOT EXISTS witness.slow (writer text);"
        " GRANT USAGE ON SCHEMA witness TO soma_router; GRANT SELECT ON witness.slow TO soma_router"
    )
    checked = "IF found_count <> cardinality(p_fence) THEN"
    slow = (
        "IF EXISTS (SELECT FROM witness.slow s WHERE current_setting('application_name') LIKE s.writer) THEN"
        f" PERFORM pg_sleep({SLOW_COMMIT_S}); END IF;\n    {checked}"
    )
    await rewrite(connection, "commit_group", [(checked, slow)])


async def rewrite(
    connection: asyncpg.Connection[asyncpg.Record], function: str, changes: Sequence[tuple[str, str]]
) -> None:
    """Puts other texts into the newest function of this name in the router's schema: each (what is there, instead)."""
    text = await connection.fetchval(
        "SELECT pg_get_functiondef(oid) FROM pg_proc WHERE pronamespace = 'router'::regnamespace AND proname = $1"
        " ORDER BY oid DESC LIMIT 1",
        function,
    )
    for there, instead in changes:
        assert there in text, f"router.{function} has no {there!r}"
        text = text.replace(there, instead)
    await connection.execute(text)


def main() -> None:
    """The command."""
    if len(sys.argv) > 1:
        names, module = sys.argv[1].split(","), sys.argv[2]
    else:
        names = os.environ[VARIABLE].split(",")
        module = f"services.{os.environ['SOMA_SERVICE_INSTANCE'].rpartition('-')[0]}.main"
    unknown = set(names) - guards()
    if unknown:
        raise SystemExit(f"no such guard: {', '.join(sorted(unknown))}; there are {', '.join(sorted(guards()))}")
    unguard_service(names, module.split(".")[1])
    sys.argv = [module]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
