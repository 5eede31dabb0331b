"""The control plane as a process of its own: stopped, killed, started again, cleared up."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import asyncpg
from soma.controlplane.v1.config_service_pb2 import WatchConfigRequest
from soma.controlplane.v1.tenant_service_pb2 import GetTenantRequest

from services.controlplane.adapters.store_postgres import PostgresConfigStore
from soma_common.config_feed import ConfigFeed
from soma_common.embedded.process import ChildProcess
from soma_common.grpc.channel import open_channel
from soma_common.postgres.connect import create_pool
from soma_common.testing.auth import Identities
from soma_common.testing.embedded import Database
from soma_common.testing.eventually import eventually
from tests.integration.controlplane.conftest import Caller, Plane, refused
from tests.stalls import Stalls

ROOT = Path(__file__).parents[3]


@asynccontextmanager
async def running_process(
    folder: Path, database: Database, identities: Identities, listen: str = "127.0.0.1:0"
) -> AsyncIterator[tuple[Plane, ChildProcess]]:
    """A control plane in a process of its own."""
    output = folder / f"controlplane-{os.urandom(4).hex()}.log"
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "gen")]),
        "SOMA_SERVICE_INSTANCE": "controlplane-0",
        "SOMA_LISTEN": listen,
        "SOMA_POSTGRES_DSN": database.dsn("controlplane"),
        "SOMA_POSTGRES_OWNER_DSN": database.owner_dsn("controlplane"),
        "SOMA_AUTH_KEYS_FILE": str(identities.keys_file),
    }
    command = [sys.executable, "-m", "services.controlplane.main"]
    process = ChildProcess.start(command, output=output, environment=environment)
    try:

        def port() -> int:
            assert process.exit_code is None, process.output_tail()
            lines = [json.loads(line) for line in output.read_text().splitlines() if line.startswith("{")]
            return next((line["port"] for line in lines if line["event"] == "service.ready"), 0)

        yield Plane(f"127.0.0.1:{await eventually(port, 20.0)}", identities, database), process
    finally:
        process.send(signal.SIGKILL)
        await process.ended()


async def test_a_stop_sends_watchers_elsewhere_and_is_quick(tmp_path: Path, postgres: Database) -> None:
    identities = Identities(tmp_path)
    async with (
        Stalls() as stalls,
        running_process(tmp_path, postgres, identities) as (plane, process),
        plane.caller() as admin,
    ):
        await admin.tenant()
        call = admin.config.WatchConfig(WatchConfigRequest(instance="x-0"))
        async for frame in call:
            if frame.complete:
                break
        asked_at = time.monotonic()
        process.send(signal.SIGTERM)
        async with refused("DRAINING"):
            async for _ in call:
                pass
        assert await process.ended() == 0
        assert time.monotonic() - asked_at < 3.0 + stalls.since(asked_at)


async def test_the_runtime_survives_a_killed_control_plane(tmp_path: Path, postgres: Database) -> None:
    """Its copy stays in use, and follows again after the restart on the same address."""
    identities = Identities(tmp_path)
    async with running_process(tmp_path, postgres, identities) as (plane, process):
        async with plane.caller() as admin:
            await admin.tenant()
        async with open_channel(plane.target, token=identities.bearer(), service="controlplane") as channel:
            feed = ConfigFeed(channel, "router-0")
            task = asyncio.create_task(feed.run())
            try:
                await feed.ready.wait()
                process.send(signal.SIGKILL)
                assert await process.ended() == -signal.SIGKILL
                assert feed.tenant("demo") is not None
                async with (
                    running_process(tmp_path, postgres, identities, plane.target) as (again, _),
                    again.caller() as admin,
                ):
                    await admin.tenant("acme")
                    await eventually(lambda: feed.tenant("acme") is not None, 5.0)
                    assert feed.tenant("demo") is not None
            finally:
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)


async def test_old_answers_and_old_lines_of_the_log_go(admin: Caller, plane: Plane) -> None:
    await admin.tenant()
    await admin.tenant("acme")
    connection = await asyncpg.connect(plane.database.superuser_dsn)
    await connection.execute(
        "UPDATE controlplane.config_changes SET change_time = change_time - interval '2 h' WHERE version = 1"
    )
    await connection.execute(
        "INSERT INTO controlplane.answered_requests VALUES ('*', 'old', '', '', clock_timestamp() - interval '25 h')"
    )
    pool = await create_pool(plane.database.dsn("controlplane"))
    await PostgresConfigStore(pool).forget()
    await pool.close()
    assert await connection.fetchval("SELECT array_agg(version) FROM controlplane.config_changes") == [2]
    assert await connection.fetchval("SELECT count(*) FROM controlplane.answered_requests") == 0
    assert await connection.fetchval("SELECT count(*) FROM controlplane.audit_log") == 2
    await connection.close()
    await admin.tenants.GetTenant(GetTenantRequest(name="tenants/demo"))
