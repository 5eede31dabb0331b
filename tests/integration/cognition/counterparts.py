"""The brain's neighbours as tests play them, over real sockets: a router and a tool gateway."""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any

import grpc
from google.protobuf import struct_pb2
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_status import rpc_status
from soma.cognition.v1 import cognition_service_pb2 as cognition
from soma.cognition.v1 import cognition_service_pb2_grpc as cognition_grpc
from soma.common.v1 import error_reason_pb2 as reasons
from soma.common.v1 import message_pb2
from soma.toolgw.v1 import tool_service_pb2 as toolgw
from soma.toolgw.v1 import tool_service_pb2_grpc as toolgw_grpc

from soma_common.errors import SomaError, to_status
from tests.streams import write

WAIT_S = 10.0


class ScriptedRouter:
    """A router on one RunTurns stream: sends what the test says, keeps everything the brain answers.

    With `confirming` it confirms each proposal at once, as a router with a very fast journal would; without it the
    test confirms. Heartbeats go by themselves until `frozen` is set.
    """

    def __init__(self, target: str, token: str, *, name: str = "router-0", confirming: bool = True) -> None:
        self.name = name
        self.confirming = confirming
        self.frozen = False
        self.frames: list[cognition.RunTurnsResponse] = []
        self.proposals: list[cognition.Proposal] = []
        self.texts: list[cognition.TurnText] = []
        self.declined: list[cognition.StopTurn] = []
        self.error: grpc.aio.AioRpcError | None = None
        self.over = asyncio.Event()
        self._news = asyncio.Event()
        self._channel = grpc.aio.insecure_channel(target)
        self._metadata = (("authorization", f"Bearer {token}"),)
        self._call: Any = None
        self._writing = asyncio.Lock()
        self._tasks: list[asyncio.Task[None]] = []

    async def connect(self, *, protocol: int = 1) -> ScriptedRouter:
        """Opens the stream, says hello and waits for the welcome."""
        self.open()
        hello = cognition.RouterHello(router=self.name, protocol=protocol)
        await self.send(cognition.RunTurnsRequest(hello=hello))
        await self.until(lambda: bool(self.frames) or self.over.is_set())
        self._tasks.append(asyncio.create_task(self._beat()))
        return self

    def open(self) -> None:
        """Opens the stream without a word."""
        self._call = cognition_grpc.CognitionServiceStub(self._channel).RunTurns(metadata=self._metadata)
        self._tasks.append(asyncio.create_task(self._read()))

    async def close(self) -> None:
        """Drops the stream, as a killed router would."""
        for task in self._tasks:
            task.cancel()
        if self._call is not None:
            self._call.cancel()
        await self._channel.close()

    async def __aenter__(self) -> ScriptedRouter:
        return await self.connect()

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    @property
    def welcome(self) -> cognition.BrainWelcome:
        return self.frames[0].welcome

    async def send(self, frame: cognition.RunTurnsRequest) -> None:
        """Sends a frame, unless the brain has ended the stream: `error` says why it did."""
        async with self._writing:  # a gRPC stream takes one write at a time
            await write(self._call, frame)

    async def start(self, *starts: cognition.StartTurn) -> None:
        await self.send(cognition.RunTurnsRequest(starts=starts))

    async def confirm(self, proposal: cognition.Proposal, *, dispatch: int | None = None) -> None:
        given = proposal.dispatch if dispatch is None else dispatch
        confirm = cognition.Confirm(turn_id=proposal.turn_id, dispatch=given, step=proposal.step)
        await self.send(cognition.RunTurnsRequest(confirms=[confirm]))

    async def add_inputs(
        self, *inputs: message_pb2.Message, first: int, turn_id: bytes = bytes(range(16)), dispatch: int = 1
    ) -> None:
        """Gives a turn further inputs, the first of them being number `first` from 0."""
        stored = [message.SerializeToString() for message in inputs]
        more = cognition.AddInputs(turn_id=turn_id, dispatch=dispatch, first=first, inputs=stored)
        await self.send(cognition.RunTurnsRequest(add_inputs=[more]))

    async def stop(self, turn_id: bytes, dispatch: int) -> None:
        await self.send(cognition.RunTurnsRequest(stops=[cognition.StopTurn(turn_id=turn_id, dispatch=dispatch)]))

    async def until(self, condition: Callable[[], bool], within_s: float = WAIT_S) -> None:
        """Waits for news until the condition holds. Fails the test with what has come so far."""
        try:
            async with asyncio.timeout(within_s):
                while not condition():
                    self._news.clear()
                    await self._news.wait()
        except TimeoutError:
            kinds = [(p.step, cognition.StepKind.Name(p.kind)) for p in self.proposals]
            raise AssertionError(f"not within {within_s} s; proposals {kinds}, declined {self.declined}") from None

    async def proposal(self, count: int = 1) -> cognition.Proposal:
        """Waits for the `count`-th proposal of the stream."""
        await self.until(lambda: len(self.proposals) >= count)
        return self.proposals[count - 1]

    async def ending(self, turn_id: bytes | None = None) -> cognition.Proposal:
        """Waits for the last step of a turn (of any, if none is named)."""

        def ends() -> list[cognition.Proposal]:
            kinds = (cognition.STEP_KIND_FINAL, cognition.STEP_KIND_FAILURE)
            return [p for p in self.proposals if p.kind in kinds and turn_id in (None, p.turn_id)]

        await self.until(lambda: bool(ends()))
        return ends()[0]

    def text(self, turn_id: bytes, step: int) -> str:
        """The live text of a step, put together by offsets; fails on a gap."""
        whole = ""
        for piece in self.texts:
            if piece.turn_id == turn_id and piece.step == step:
                assert piece.offset == len(whole), "live text has a gap or repeats"
                whole += piece.text
        return whole

    async def _beat(self) -> None:
        while not self.over.is_set():
            await asyncio.sleep(self.welcome.heartbeat_ms / 1000)
            if not self.frozen:
                await self.send(cognition.RunTurnsRequest(heartbeat=True))

    async def _read(self) -> None:
        try:
            async for frame in self._call:
                self.frames.append(frame)
                self.proposals.extend(frame.proposals)
                self.texts.extend(frame.texts)
                self.declined.extend(frame.declined)
                self._news.set()
                if self.confirming and not self.frozen:
                    for proposal in frame.proposals:
                        await self.confirm(proposal)
        except grpc.aio.AioRpcError as error:
            self.error = error
        finally:
            self.over.set()
            self._news.set()


Behaviour = Callable[[toolgw.InvokeToolRequest], Awaitable[toolgw.InvokeToolResponse]]


class ToolGateway(toolgw_grpc.ToolServiceServicer):
    """A tool gateway that keeps its promise (at most once per key) and counts: `asked` calls, `effects` runs.

    `behaviour` is what a tool does; `statuses` are answered, in order, instead of serving a call: a code alone as gRPC
    or a proxy would send it, an error as the gateway does. `time_left` are the deadlines of the calls, in seconds.
    """

    def __init__(self) -> None:
        self.asked: Counter[str] = Counter()
        self.effects: Counter[str] = Counter()
        self.requests: list[toolgw.InvokeToolRequest] = []
        self.lists = 0
        self.behaviour: Behaviour = answer_with(391.0)
        self.statuses: list[grpc.StatusCode | SomaError] = []
        self.time_left: list[float | None] = []
        self.list_statuses: list[grpc.StatusCode] = []
        self._stored: dict[str, toolgw.InvokeToolResponse] = {}
        self._server: grpc.aio.Server | None = None
        self.port = 0

    async def start(self) -> None:
        self._server = grpc.aio.server()
        toolgw_grpc.add_ToolServiceServicer_to_server(self, self._server)
        checks = health.aio.HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(checks, self._server)
        await checks.set("", health_pb2.HealthCheckResponse.SERVING)
        self.port = self._server.add_insecure_port(f"127.0.0.1:{self.port}")
        await self._server.start()

    async def stop(self) -> None:
        if self._server is not None:
            await self._server.stop(None)
            self._server = None

    async def ListTools(self, request: toolgw.ListToolsRequest, context: Any) -> toolgw.ListToolsResponse:
        self.lists += 1
        if self.list_statuses:
            await context.abort(self.list_statuses.pop(0), "scripted")
        page = int(request.page_token or 0)
        names = [("calculate", "expression"), ("current_time", ""), ("remember_note", "note"), ("recall_notes", "")]
        tool = toolgw.Tool(name=f"{request.parent}/tools/{names[page][0]}", tool=names[page][0], description="a tool")
        properties = {names[page][1]: {"type": "string"}} if names[page][1] else {}
        tool.parameters.update({"type": "object", "properties": properties, "required": list(properties)})
        after = str(page + 1) if page + 1 < len(names) else ""
        return toolgw.ListToolsResponse(tools=[tool], next_page_token=after)

    async def InvokeTool(self, request: toolgw.InvokeToolRequest, context: Any) -> toolgw.InvokeToolResponse:
        key = request.idempotency_key
        self.asked[key] += 1
        self.requests.append(request)
        self.time_left.append(context.time_remaining())
        if self.statuses:
            status = self.statuses.pop(0)
            if isinstance(status, SomaError):
                await context.abort_with_status(rpc_status.to_status(to_status(status)))
            await context.abort(status, "scripted")
        if key not in self._stored:
            self.effects[key] += 1
            self._stored[key] = await self.behaviour(request)
        return self._stored[key]

    async def CancelInvocation(self, request: Any, context: Any) -> Any:
        await context.abort(grpc.StatusCode.UNIMPLEMENTED, "a brain never cancels")

    async def RevertTurn(self, request: Any, context: Any) -> Any:
        await context.abort(grpc.StatusCode.UNIMPLEMENTED, "a brain never takes back")


def answer_with(value: float | str) -> Behaviour:
    async def behave(_: toolgw.InvokeToolRequest) -> toolgw.InvokeToolResponse:
        if isinstance(value, str):
            return toolgw.InvokeToolResponse(result=struct_pb2.Value(string_value=value))
        return toolgw.InvokeToolResponse(result=struct_pb2.Value(number_value=value))

    return behave


def fail_with(reason: reasons.ErrorReason.ValueType, message: str) -> Behaviour:
    async def behave(_: toolgw.InvokeToolRequest) -> toolgw.InvokeToolResponse:
        return toolgw.InvokeToolResponse(error=message_pb2.Error(reason=reason, message=message))

    return behave


@contextlib.asynccontextmanager
async def routers(*made: ScriptedRouter) -> AsyncIterator[Sequence[ScriptedRouter]]:
    """Closes routers at the end of a block, connected or not."""
    try:
        yield made
    finally:
        for router in made:
            await router.close()
