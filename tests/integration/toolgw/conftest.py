from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc
import pytest
from google.protobuf.json_format import MessageToDict
from google.protobuf.struct_pb2 import Struct
from soma.common.v1.message_pb2 import SessionKey
from soma.toolgw.v1.tool_service_pb2 import (
    CancelInvocationRequest,
    CancelInvocationResponse,
    InvokeToolRequest,
    InvokeToolResponse,
    RevertTurnRequest,
    RevertTurnResponse,
)
from soma.toolgw.v1.tool_service_pb2_grpc import ToolServiceStub

from services.toolgw.main import start
from services.toolgw.settings import ToolgwSettings
from soma_common.embedded.process import ChildProcess
from soma_common.errors import SomaError, from_rpc_error, reason_name
from soma_common.grpc.channel import open_channel
from soma_common.lifecycle import Lifecycle
from soma_common.testing.auth import Identities
from soma_common.testing.embedded import Database
from soma_common.testing.eventually import eventually
from tests.integration.toolgw.counterparts import ConfigWitness, HttpWitness, running_config, running_http

if TYPE_CHECKING:
    from soma.toolgw.v1.tool_service_pb2_grpc import ToolServiceAsyncStub

DEMO = SessionKey(tenant="demo", agent="helper", channel="chat", session="s-1")
TURN = "0123456789abcdef" * 2


@dataclass(frozen=True)
class Surroundings:
    """What tool gateways of a test share."""

    folder: Path
    database: Database
    identities: Identities
    config: ConfigWitness
    http: HttpWitness

    def environment(self, instance: str) -> dict[str, str]:
        """The settings of an instance as environment variables."""
        return {
            "SOMA_SERVICE_INSTANCE": instance,
            "SOMA_POSTGRES_DSN": self.database.dsn("toolgw"),
            "SOMA_POSTGRES_OWNER_DSN": self.database.owner_dsn("toolgw"),
            "SOMA_CONTROLPLANE_TARGET": self.config.target,
            "SOMA_AUTH_KEYS_FILE": str(self.identities.keys_file),
            "SOMA_AUTH_SERVICE_TOKEN_FILE": str(self.identities.service_token_file("toolgw")),
            "SOMA_TOOLGW_HTTP_TOOLS_FILE": str(self.folder / "tools.json"),
            "SOMA_DRAIN_TIMEOUT_S": "0.2",
        }

    def describe(self, **paths: str) -> None:
        """Write the file of HTTP tools: each tool at its path of the witness. Without: `look`, `put` and `pay`."""
        effects = {"look": "read_only", "put": "idempotent", "pay": "side_effectful"}
        entries = [
            {
                "tool": tool,
                "description": tool,
                "parameters": {"type": "object", "properties": {"n": {"type": "integer"}}},
                "side_effect": effect,
                "timeout_ms": 20_000,
                "url": self.http.url + paths.get(tool, "/ok"),
            }
            for tool, effect in effects.items()
        ]
        entries.append({**entries[0], "tool": "secret", "tenants": ["acme"]})
        (self.folder / "tools.json").write_text(json.dumps(entries), encoding="utf-8")


@dataclass(frozen=True)
class Gateway:
    """A tool gateway as a caller sees it over a real socket."""

    stub: ToolServiceAsyncStub
    target: str
    process: ChildProcess | None = None

    async def invoke(
        self,
        tool: str,
        key: str,
        arguments: Mapping[str, Any] | None = None,
        session: SessionKey = DEMO,
        timeout: float = 20.0,
        step: int = 2,
        turn_id: str = TURN,
    ) -> InvokeToolResponse:
        """InvokeTool."""
        struct = Struct()
        struct.update(dict(arguments or {}))
        request = InvokeToolRequest(
            session=session, tool=tool, arguments=struct, idempotency_key=key, turn_id=turn_id, step=step
        )
        return await self.stub.InvokeTool(request, timeout=timeout)

    async def cancel(
        self, key: str, session: SessionKey = DEMO, timeout: float = 20.0, timeout_ms: int = 0
    ) -> CancelInvocationResponse:
        """CancelInvocation."""
        request = CancelInvocationRequest(session=session, idempotency_key=key, timeout_ms=timeout_ms)
        return await self.stub.CancelInvocation(request, timeout=timeout)

    async def revert(
        self, session: SessionKey = DEMO, turn_id: str = TURN, timeout: float = 20.0
    ) -> RevertTurnResponse:
        """RevertTurn."""
        return await self.stub.RevertTurn(RevertTurnRequest(session=session, turn_id=turn_id), timeout=timeout)


def result_of(response: InvokeToolResponse) -> Any:
    """The result as plain JSON; the call must have succeeded."""
    assert not response.HasField("error"), response.error
    return MessageToDict(response)["result"]


def failure_of(response: InvokeToolResponse) -> tuple[str, str]:
    """Reason and message of a tool's own failure."""
    assert response.HasField("error"), response
    return reason_name(response.error.reason), response.error.message


@pytest.fixture
async def surroundings(tmp_path: Path, postgres: Database) -> AsyncIterator[Surroundings]:
    """A database, a control plane and an endpoint, with the default file of HTTP tools."""
    async with running_config() as config, running_http() as http:
        around = Surroundings(tmp_path, postgres, Identities(tmp_path), config, http)
        around.describe()
        yield around


@asynccontextmanager
async def caller_of(
    around: Surroundings, target: str, process: ChildProcess | None = None, tenant: str = "*", role: str = "service"
) -> AsyncIterator[Gateway]:
    """Somebody who calls the gateway at `target`. Without the retries of the service config: tests count calls."""
    token = around.identities.bearer("cognition-0", tenant, [role])
    async with open_channel(target, token=token, service="none") as channel:
        # Channels of a process share what they know of an address: of a port that a gateway had which was killed, they
        # take its next user for dead too, for up to a second.
        await asyncio.wait_for(channel.channel_ready(), 20.0)
        yield Gateway(ToolServiceStub(channel), target, process)


@asynccontextmanager
async def running_gateway(around: Surroundings, instance: str = "toolgw-0", **settings: Any) -> AsyncIterator[Gateway]:
    """A tool gateway in this process."""
    base = {name.removeprefix("SOMA_").lower(): value for name, value in around.environment(instance).items()}
    lifecycle = Lifecycle()
    try:
        port, _ = await start(lifecycle, ToolgwSettings(**{**base, **settings}))
        async with caller_of(around, f"127.0.0.1:{port}") as gateway:
            yield gateway
    finally:
        await lifecycle.stop()


@asynccontextmanager
async def running_process(
    around: Surroundings, instance: str = "toolgw-0", failpoints: str = ""
) -> AsyncIterator[Gateway]:
    """A tool gateway in a process of its own, to be killed; a second one of the same name continues for the first."""
    output = around.folder / f"{instance}-{os.urandom(4).hex()}.log"
    environment = {**os.environ, **around.environment(instance), "SOMA_FAILPOINTS": failpoints}
    root = str(Path(__file__).parents[3])
    environment["PYTHONPATH"] = os.pathsep.join([root, f"{root}/gen"])
    process = ChildProcess.start([sys.executable, "-m", "services.toolgw.main"], output=output, environment=environment)
    try:

        def port() -> int:
            assert process.exit_code is None, process.output_tail()
            lines = [json.loads(line) for line in output.read_text().splitlines() if line.startswith("{")]
            return next((line["port"] for line in lines if line["event"] == "service.ready"), 0)

        target = f"127.0.0.1:{await eventually(port, 20.0)}"
        async with caller_of(around, target, process) as gateway:
            yield gateway
    finally:
        process.send(signal.SIGKILL)
        await process.ended()


@pytest.fixture
async def gateway(surroundings: Surroundings) -> AsyncIterator[Gateway]:
    """A tool gateway of this test alone."""
    async with running_gateway(surroundings) as gateway:
        yield gateway


@asynccontextmanager
async def refused(reason: str) -> AsyncIterator[None]:
    """The block fails with a status whose ErrorInfo has `reason`."""
    found: SomaError | None = None
    try:
        yield
    except grpc.aio.AioRpcError as error:
        found = from_rpc_error(error)
    assert found is not None, f"nothing was refused; {reason} was expected"
    assert reason_name(found.reason) == reason, str(found)
