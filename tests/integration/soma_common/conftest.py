"""A real server with small servicers of our contracts, and channels to it."""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
from soma.cognition.v1 import cognition_service_pb2, cognition_service_pb2_grpc
from soma.common.v1 import error_reason_pb2
from soma.router.v1 import turn_service_pb2, turn_service_pb2_grpc
from soma.toolgw.v1 import tool_service_pb2, tool_service_pb2_grpc

from soma_common.authz.tokens import Caller
from soma_common.errors import ResourceExhausted
from soma_common.grpc.call_context import caller, time_left_s
from soma_common.grpc.channel import open_channel
from soma_common.grpc.server import GrpcServer
from soma_common.settings import ServiceSettings
from soma_common.telemetry.trace import TraceContext, current_trace
from soma_common.testing.auth import Identities

TURN = "tenants/demo/agents/a/channels/c/sessions/s/turns/" + "0" * 32


class Tools(tool_service_pb2_grpc.ToolServiceServicer):
    """Records what it is called with; `behave` says what to do."""

    def __init__(self) -> None:
        self.requests: list[tool_service_pb2.ListToolsRequest] = []
        self.callers: list[Caller] = []
        self.peers: list[str] = []
        self.traces: list[TraceContext | None] = []
        self.time_left: list[float | None] = []
        self.behave: Callable[[], Any] = lambda: None

    async def ListTools(
        self, request: tool_service_pb2.ListToolsRequest, context: Any
    ) -> tool_service_pb2.ListToolsResponse:
        self.requests.append(request)
        self.callers.append(caller())
        self.peers.append(context.peer())
        self.traces.append(current_trace())
        self.time_left.append(time_left_s())
        done = self.behave()
        if asyncio.iscoroutine(done):
            await done
        return tool_service_pb2.ListToolsResponse()


class Brain(cognition_service_pb2_grpc.CognitionServiceServicer):
    """Answers each frame with one that grants as much credit as the frame has starts."""

    def __init__(self) -> None:
        self.frames = 0

    async def RunTurns(
        self, request_iterator: AsyncIterator[cognition_service_pb2.RunTurnsRequest], context: Any
    ) -> AsyncIterator[cognition_service_pb2.RunTurnsResponse]:
        async for frame in request_iterator:
            self.frames += 1
            yield cognition_service_pb2.RunTurnsResponse(credit=len(frame.starts))


class Turns(turn_service_pb2_grpc.TurnServiceServicer):
    """Watches end after three frames, or in an error after one when the request asks to resume."""

    async def WatchTurn(
        self, request: turn_service_pb2.WatchTurnRequest, context: Any
    ) -> AsyncIterator[turn_service_pb2.WatchTurnResponse]:
        for number in range(3):
            yield turn_service_pb2.WatchTurnResponse()
            if number == 0 and request.name.endswith("1"):
                raise ResourceExhausted(error_reason_pb2.ERROR_REASON_QUEUE_FULL, "too slow", retry_delay_s=1)


class Stack:
    """The running server and what it serves."""

    def __init__(self, identities: Identities, settings: ServiceSettings, **options: Any) -> None:
        self.identities, self.brain = identities, Brain()
        self.tools = Tools()  # type: ignore[abstract] # what is not called is not written
        self.turns = Turns()  # type: ignore[abstract]
        self.server = GrpcServer(
            settings,
            identities.authorizer(),
            services=[
                (
                    tool_service_pb2_grpc.add_ToolServiceServicer_to_server,
                    self.tools,
                    "soma.toolgw.v1.ToolService",
                ),
                (
                    cognition_service_pb2_grpc.add_CognitionServiceServicer_to_server,
                    self.brain,
                    "soma.cognition.v1.CognitionService",
                ),
                (
                    turn_service_pb2_grpc.add_TurnServiceServicer_to_server,
                    self.turns,
                    "soma.router.v1.TurnService",
                ),
            ],
            **options,
        )

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.server.port}"

    @asynccontextmanager
    async def channel(
        self, tenant: str = "*", roles: Sequence[str] = ("admin",), subject: str = "tester"
    ) -> AsyncIterator[grpc.aio.Channel]:
        token = self.identities.bearer(subject, tenant, roles)
        async with open_channel(self.address, token=token, service="toolgw") as channel:
            yield channel


@pytest.fixture
def identities(tmp_path: Path) -> Identities:
    return Identities(tmp_path / "auth")


@pytest.fixture
async def stack(identities: Identities) -> AsyncIterator[Stack]:
    running = Stack(identities, ServiceSettings(service_instance="toolgw-0"))
    await running.server.start()
    await running.server.set_serving(True)
    yield running
    await running.server.stop(0.1)
