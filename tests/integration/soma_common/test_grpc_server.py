"""The guard around every handler, seen from a client over a real connection."""

import asyncio
import gzip
import time
from dataclasses import replace
from typing import Any

import grpc
import pytest
from google.protobuf import descriptor_pb2, descriptor_pool
from google.rpc import status_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from soma.cognition.v1.cognition_service_pb2 import RunTurnsRequest, RunTurnsResponse, StartTurn
from soma.cognition.v1.cognition_service_pb2_grpc import CognitionServiceStub
from soma.common.v1 import authz_pb2, error_reason_pb2
from soma.common.v1.message_pb2 import SessionKey
from soma.router.v1.turn_service_pb2 import WatchTurnRequest
from soma.router.v1.turn_service_pb2_grpc import TurnServiceStub
from soma.toolgw.v1.tool_service_pb2 import InvokeToolRequest, ListToolsRequest
from soma.toolgw.v1.tool_service_pb2_grpc import ToolServiceStub
from structlog.testing import capture_logs

from soma_common.errors import STATUS_DETAILS_KEY, NotFound, SomaError, Unavailable, from_rpc_error, reason_name
from soma_common.grpc.channel import open_channel
from soma_common.grpc.guard import Guard
from soma_common.grpc.method import MissingAuthzRule, describe_service
from soma_common.grpc.server import PUBLIC_REQUEST_BYTES, AddressInUse, GrpcServer
from soma_common.settings import ServiceSettings
from soma_common.telemetry.metrics import REGISTRY
from soma_common.testing.auth import Identities
from soma_common.testing.eventually import eventually
from tests.integration.soma_common.conftest import TURN, Stack
from tests.integration.soma_common.h2_peer import message, peer, request
from tests.streams import write

DEMO = ListToolsRequest(parent="tenants/demo")


async def refused(call: Any) -> SomaError:
    """Return the error that `call` (a unary call or a coroutine) ends in."""
    with pytest.raises(grpc.aio.AioRpcError) as failed:
        await call
    return from_rpc_error(failed.value)


async def test_an_allowed_call_reaches_the_handler_with_its_caller(stack: Stack) -> None:
    async with stack.channel("demo", ["channel"], "adapter") as channel:
        await ToolServiceStub(channel).ListTools(DEMO)
    (seen,) = stack.tools.callers
    assert (seen.subject, seen.tenant, seen.roles) == ("adapter", "demo", ("channel",))
    assert stack.tools.traces[0] is not None


async def test_without_a_token_nothing_is_served(stack: Stack) -> None:
    async with open_channel(stack.address, token=None, service="toolgw") as channel:
        error = await refused(ToolServiceStub(channel).ListTools(DEMO))
        assert reason_name(error.reason) == "UNAUTHENTICATED"
        call = CognitionServiceStub(channel).RunTurns()
        assert reason_name((await refused(call.read())).reason) == "UNAUTHENTICATED"
    assert stack.tools.requests == []


@pytest.mark.parametrize(
    ("path", "payload"),
    [
        pytest.param("/soma.toolgw.v1.ToolService/ListTools", DEMO.SerializeToString(), id="unary"),
        pytest.param(
            "/soma.cognition.v1.CognitionService/RunTurns", RunTurnsRequest().SerializeToString(), id="stream"
        ),
    ],
)
async def test_with_two_tokens_nothing_is_served(
    stack: Stack, identities: Identities, path: str, payload: bytes
) -> None:
    """Whichever was verified, somebody else might go by the other."""
    tokens = [("authorization", identities.bearer("tester", "*", ["admin", "service"])()) for _ in range(2)]
    async with peer(stack.server.port) as connection:
        answer = await connection.call(request(path, *tokens), payload)
    assert answer.status == grpc.StatusCode.UNAUTHENTICATED.value[0]
    assert "more than one" in answer.status_message
    assert stack.tools.requests == []


@pytest.mark.parametrize(
    "path", ["/soma.toolgw.v1.ToolService/ListTools", "/soma.cognition.v1.CognitionService/RunTurns"]
)
async def test_what_a_stranger_sends_is_not_unpacked(stack: Stack, path: str) -> None:
    """Kilobytes may be megabytes when they are expanded: who is not known does not even learn that these are none."""
    async with peer(stack.server.port) as connection:
        number = await connection.open(request(path, ("grpc-encoding", "gzip")))
        await connection.write(number, message(b"not compressed", compressed=True), end=True)
        answer = await connection.end_of(number)
    assert answer.status == grpc.StatusCode.UNAUTHENTICATED.value[0]


async def test_grpcs_own_services_take_names_and_nothing_larger(stack: Stack) -> None:
    health = "/grpc.health.v1.Health/Check"
    question = health_pb2.HealthCheckRequest(service="x" * PUBLIC_REQUEST_BYTES).SerializeToString()
    async with peer(stack.server.port) as connection:
        number = await connection.open(request(health, ("grpc-encoding", "gzip")))
        await connection.write(number, message(gzip.compress(question), compressed=True), end=True)
        assert (await connection.end_of(number)).status == grpc.StatusCode.RESOURCE_EXHAUSTED.value[0]
        assert (await connection.call(request(health))).status == 0


async def test_another_tenants_data_is_denied_before_it_is_looked_for(stack: Stack) -> None:
    async with stack.channel("demo", ["channel"]) as channel:
        error = await refused(ToolServiceStub(channel).ListTools(ListToolsRequest(parent="tenants/other")))
        assert reason_name(error.reason) == "PERMISSION_DENIED"
        assert error.metadata["policy_reasons"] == "tenant_mismatch"
        assert error.metadata["permission"] == "tools.read"
    assert stack.tools.requests == []


@pytest.mark.parametrize("parent", ["", "demo/x", "tenants/", "tenants/UPPER", "tenants//x", "tenant/demo", "*", "a\n"])
async def test_a_field_that_names_no_tenant_is_an_invalid_request(stack: Stack, parent: str) -> None:
    async with stack.channel() as channel:
        error = await refused(ToolServiceStub(channel).ListTools(ListToolsRequest(parent=parent)))
    assert reason_name(error.reason) == "INVALID_REQUEST"
    assert [violation.field for violation in error.field_violations] == ["parent"]


async def test_a_call_that_touches_no_tenant_needs_a_subject_of_all(stack: Stack) -> None:
    async with stack.channel("demo", ["service"]) as channel:
        call = CognitionServiceStub(channel).RunTurns()
        await write(call, RunTurnsRequest())
        error = await refused(call.read())
    assert error.metadata["policy_reasons"] == "all_tenants_required"


async def test_the_contracts_rules_are_checked_and_every_field_is_named(stack: Stack) -> None:
    request = InvokeToolRequest(tool="", idempotency_key="x" * 129)
    request.session.tenant = "demo"
    async with stack.channel() as channel:
        error = await refused(ToolServiceStub(channel).InvokeTool(request))
    fields = {violation.field for violation in error.field_violations}
    assert {"session.agent", "session.channel", "session.session", "tool", "idempotency_key"} <= fields


async def test_bytes_that_are_no_message_are_an_invalid_request(stack: Stack) -> None:
    async with stack.channel() as channel:
        call: Any = channel.unary_unary("/soma.toolgw.v1.ToolService/ListTools")
        for garbage in (b"\x0a\x02\xff\xfe", b"\x0a\xff", b"\xff\xff\xff"):
            error = await refused(call(garbage))
            assert reason_name(error.reason) == "INVALID_REQUEST"
        stream: Any = channel.stream_stream("/soma.cognition.v1.CognitionService/RunTurns")()
        await stream.write(b"")
        await stream.read()
        await stream.write(b"\xff\xff")
        assert reason_name((await refused(stream.read())).reason) == "INVALID_REQUEST"


async def test_a_known_error_keeps_its_code_and_details(stack: Stack) -> None:
    def fail() -> None:
        raise NotFound(error_reason_pb2.ERROR_REASON_TENANT_NOT_FOUND, "no tenant demo", {"tenant": "demo"})

    stack.tools.behave = fail
    async with stack.channel() as channel:
        with pytest.raises(grpc.aio.AioRpcError) as failed:
            await ToolServiceStub(channel).ListTools(DEMO)
    assert failed.value.code() == grpc.StatusCode.NOT_FOUND
    error = from_rpc_error(failed.value)
    assert (error.message, error.metadata) == ("no tenant demo", {"tenant": "demo"})


async def test_an_unknown_error_is_counted_and_tells_the_caller_nothing(stack: Stack) -> None:
    def fail() -> None:
        raise RuntimeError("the password is hunter2")

    stack.tools.behave = fail
    labels = {"method": "/soma.toolgw.v1.ToolService/ListTools"}
    before = REGISTRY.get_sample_value("soma_rpc_server_defects_total", labels) or 0
    async with stack.channel() as channel:
        error = await refused(ToolServiceStub(channel).ListTools(DEMO))
    assert reason_name(error.reason) == "INTERNAL"
    assert "hunter2" not in error.message
    assert REGISTRY.get_sample_value("soma_rpc_server_defects_total", labels) == before + 1


async def test_an_error_of_a_call_made_on_the_way_is_passed_on(stack: Stack) -> None:
    async with stack.channel() as channel:
        stub = ToolServiceStub(channel)

        async def call_on() -> None:
            stack.tools.behave = lambda: None
            await stub.ListTools(ListToolsRequest(parent="tenants/demo", page_size=9999))

        stack.tools.behave = call_on
        error = await refused(stub.ListTools(DEMO))
    assert reason_name(error.reason) == "INVALID_REQUEST"


async def test_where_a_call_made_on_the_way_did_not_arrive_is_for_the_log_only(stack: Stack) -> None:
    async with stack.channel() as channel, open_channel("127.0.0.1:1", token=None, service="toolgw") as nowhere:

        async def call_on() -> None:
            await ToolServiceStub(nowhere).ListTools(DEMO)

        stack.tools.behave = call_on
        with capture_logs() as logs:
            error = await refused(ToolServiceStub(channel).ListTools(DEMO))
    assert (reason_name(error.reason), error.message) == (
        "SERVICE_UNAVAILABLE",
        "calling a service that this one needs failed (UNAVAILABLE)",
    )
    line = next(line for line in logs if line["event"] == "rpc.inner_call_failed")
    assert "127.0.0.1:1" in line["error"]


async def test_a_method_that_nobody_wrote_is_unimplemented(stack: Stack) -> None:
    request = InvokeToolRequest(tool="now", idempotency_key="k")
    request.session.CopyFrom(SessionKey(tenant="demo", agent="a", channel="c", session="s"))
    async with stack.channel() as channel:
        error = await refused(ToolServiceStub(channel).InvokeTool(request))
    assert reason_name(error.reason) == "UNIMPLEMENTED"


async def test_that_the_services_own_token_was_refused_elsewhere_is_not_the_callers_business(stack: Stack) -> None:
    async with stack.channel() as channel, open_channel(stack.address, token=None, service="toolgw") as nameless:

        async def call_on() -> None:
            await ToolServiceStub(nameless).ListTools(DEMO)

        stack.tools.behave = call_on
        error = await refused(ToolServiceStub(channel).ListTools(DEMO))
    assert reason_name(error.reason) == "INTERNAL"


async def test_the_deadline_ends_the_handler(stack: Stack) -> None:
    ended = asyncio.Event()

    async def linger() -> None:
        try:
            await asyncio.sleep(30)
        finally:
            ended.set()

    stack.tools.behave = linger
    async with stack.channel() as channel:
        error = await refused(ToolServiceStub(channel).ListTools(DEMO, timeout=0.2))
        assert reason_name(error.reason) == "DEADLINE_EXCEEDED"
        await asyncio.wait_for(ended.wait(), 15)


async def test_the_methods_own_timeout_holds_where_the_caller_gives_none(stack: Stack) -> None:
    async with stack.channel() as channel:
        await ToolServiceStub(channel).ListTools(DEMO)
    left = stack.tools.time_left[0]
    assert left is not None
    assert 4 < left <= 5  # toolgw.json


async def test_a_call_that_outlasts_the_methods_own_timeout_is_told_so(identities: Identities) -> None:
    """A caller without a deadline gets the server's answer, with one reason; its own deadline would come without."""

    async def linger(_request: ListToolsRequest, _context: object) -> None:
        await asyncio.sleep(30)

    method = replace(describe_service("soma.toolgw.v1.ToolService")["ListTools"], default_timeout_s=0.1)
    handler: Any = grpc.unary_unary_rpc_method_handler(linger, ListToolsRequest.FromString)
    guarded = Guard(identities.authorizer()).wrap(method, handler)
    server = grpc.aio.server()
    server.add_generic_rpc_handlers(
        [grpc.method_handlers_generic_handler("soma.toolgw.v1.ToolService", {"ListTools": guarded})]
    )
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    metadata = [("authorization", f"Bearer {identities.token('tester', '*', ['admin'], 60)}")]
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        call: Any = channel.unary_unary(method.path, request_serializer=ListToolsRequest.SerializeToString)
        with pytest.raises(grpc.aio.AioRpcError) as failed:
            await call(DEMO, metadata=metadata)
    await server.stop(None)
    assert failed.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED
    packed = dict(failed.value.trailing_metadata() or ())[STATUS_DETAILS_KEY]
    assert isinstance(packed, bytes)
    details = status_pb2.Status.FromString(packed).details
    assert [detail.type_url.rpartition(".")[2] for detail in details] == ["ErrorInfo"]
    assert reason_name(from_rpc_error(failed.value).reason) == "DEADLINE_EXCEEDED"


async def test_the_deadline_and_the_trace_go_on_to_the_next_call(stack: Stack) -> None:
    async with stack.channel() as channel:
        stub = ToolServiceStub(channel)

        async def call_on() -> None:
            stack.tools.behave = lambda: None
            await stub.ListTools(DEMO)
            # A task may outlive the call that started it: it is not bound by that call's deadline.
            await asyncio.create_task(unbound())

        async def unbound() -> None:
            await stub.ListTools(DEMO)

        stack.tools.behave = call_on
        await stub.ListTools(DEMO, timeout=1)
    first, second, third = (left or 0 for left in stack.tools.time_left)
    assert first <= 1.01
    assert second <= first + 0.01  # gRPC rounds what it sends
    assert third > 4
    traces = [trace.trace_id for trace in stack.tools.traces if trace is not None]
    assert len(traces) == 3
    assert len(set(traces)) == 1
    assert len({trace.span_id for trace in stack.tools.traces if trace is not None}) == 3


async def test_streams_pass_frames_in_order_after_the_first_was_checked(stack: Stack) -> None:
    async with stack.channel("*", ["service"]) as channel:
        call = CognitionServiceStub(channel).RunTurns()
        for count in range(50):
            await call.write(RunTurnsRequest(starts=[StartTurn() for _ in range(count)]))
            frame = await call.read()
            assert isinstance(frame, RunTurnsResponse)
            assert frame.credit == count
        await call.done_writing()
        assert await call.read() is grpc.aio.EOF
        assert await call.code() == grpc.StatusCode.OK
    assert stack.brain.frames == 50


async def test_a_stream_without_a_first_message_is_a_protocol_error(identities: Identities) -> None:
    settings = ServiceSettings(service_instance="toolgw-0")
    impatient = Stack(identities, settings, first_message_timeout_s=0.1)
    await impatient.server.start()
    await impatient.server.set_serving(True)
    async with impatient.channel() as channel:
        closed = CognitionServiceStub(channel).RunTurns()
        await closed.done_writing()
        assert reason_name((await refused(closed.read())).reason) == "PROTOCOL_ORDER"
        silent = CognitionServiceStub(channel).RunTurns()
        assert reason_name((await refused(silent.read())).reason) == "PROTOCOL_ORDER"
    await impatient.server.stop(0)


async def test_a_server_stream_ends_well_or_in_its_error(stack: Stack) -> None:
    async with stack.channel() as channel:
        stub = TurnServiceStub(channel)
        assert len([frame async for frame in stub.WatchTurn(WatchTurnRequest(name=TURN))]) == 3
        failing = stub.WatchTurn(WatchTurnRequest(name=TURN[:-1] + "1"))
        await failing.read()
        error = await refused(failing.read())
    assert (reason_name(error.reason), error.retry_delay_s) == ("QUEUE_FULL", 1)


async def test_calls_are_counted_by_code(stack: Stack) -> None:
    def count(code: str) -> float:
        labels = {"method": "/soma.toolgw.v1.ToolService/ListTools", "code": code}
        return REGISTRY.get_sample_value("soma_rpc_server_handled_total", labels) or 0

    ok, bad = count("OK"), count("INVALID_ARGUMENT")
    async with stack.channel() as channel:
        await ToolServiceStub(channel).ListTools(DEMO)
        await refused(ToolServiceStub(channel).ListTools(ListToolsRequest()))
    # The client has its answer before the server's handler has returned.
    await eventually(lambda: (count("OK"), count("INVALID_ARGUMENT")) == (ok + 1, bad + 1))
    method = {"method": "/soma.toolgw.v1.ToolService/ListTools"}
    await eventually(lambda: REGISTRY.get_sample_value("soma_rpc_server_running", method) == 0)


async def test_channels_to_one_address_share_no_connection(stack: Stack) -> None:
    """Those that share one share the watcher of its health: gRPC dies of SIGSEGV if two start it at once."""
    async with stack.channel() as first, stack.channel() as second:
        for channel in (first, second, first):
            await ToolServiceStub(channel).ListTools(DEMO)
    assert len(set(stack.tools.peers)) == 2


async def test_health_is_public_and_watchers_see_the_stop(stack: Stack) -> None:
    seen: list[int] = []
    async with grpc.aio.insecure_channel(stack.address) as channel:
        stub: Any = health_pb2_grpc.HealthStub(channel)
        for name in ("", "soma.toolgw.v1.ToolService"):
            answer = await stub.Check(health_pb2.HealthCheckRequest(service=name))
            assert answer.status == health_pb2.HealthCheckResponse.SERVING
        watch = stub.Watch(health_pb2.HealthCheckRequest(service=""))

        async def follow() -> None:
            async for frame in watch:
                seen.append(frame.status)  # noqa: PERF401 - read while the stream is still open

        following = asyncio.create_task(follow())
        await eventually(lambda: seen, what="the first state")
        started = time.monotonic()
        await stack.server.stop(30)
        assert time.monotonic() - started < 10, "a watcher must not hold up the stop"
        await asyncio.wait([following])
        following.exception()
    assert seen == [health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING]


async def test_reflection_is_public_and_complete(stack: Stack) -> None:
    async with grpc.aio.insecure_channel(stack.address) as channel:
        stub: Any = reflection_pb2_grpc.ServerReflectionStub(channel)  # type: ignore[arg-type] # takes both kinds
        call = stub.ServerReflectionInfo(iter([reflection_pb2.ServerReflectionRequest(list_services="")]))
        answer = await call.read()
        call.cancel()
    names = {service.name for service in answer.list_services_response.service}
    assert {"soma.toolgw.v1.ToolService", "grpc.health.v1.Health"} <= names


async def test_a_running_call_may_finish_after_the_stop_began(stack: Stack) -> None:
    release = asyncio.Event()
    stack.tools.behave = release.wait
    async with stack.channel() as channel:
        stub = ToolServiceStub(channel)
        running = asyncio.ensure_future(stub.ListTools(DEMO))
        await eventually(lambda: stack.tools.requests, what="the call arrived")
        stopping = asyncio.create_task(stack.server.stop(5))
        await asyncio.sleep(0.05)
        error = await refused(stub.ListTools(DEMO, timeout=1))
        assert isinstance(error, Unavailable) or reason_name(error.reason) == "DEADLINE_EXCEEDED"
        release.set()
        await running
        await stopping


async def test_a_taken_port_is_told(stack: Stack, identities: Identities) -> None:
    settings = ServiceSettings(service_instance="toolgw-1", listen=stack.address)
    second = Stack(identities, settings)
    with pytest.raises(AddressInUse, match=stack.address):
        await second.server.start()


async def test_channelz_is_served_only_where_it_was_asked_for(identities: Identities) -> None:
    settings = ServiceSettings(service_instance="toolgw-0", channelz_listen="127.0.0.1:0")
    running = Stack(identities, settings)
    await running.server.start()
    try:
        async with grpc.aio.insecure_channel(running.address) as channel:
            method: Any = channel.unary_unary("/grpc.channelz.v1.Channelz/GetServers")
            with pytest.raises(grpc.aio.AioRpcError) as failed:
                await method(b"")
            assert failed.value.code() == grpc.StatusCode.UNIMPLEMENTED
        async with grpc.aio.insecure_channel(f"127.0.0.1:{running.server.channelz_port}") as channel:
            method = channel.unary_unary("/grpc.channelz.v1.Channelz/GetServers")
            assert await method(b"")
    finally:
        await running.server.stop(0)


def _service_without_rule(name: str, rule: authz_pb2.AuthzRule | None) -> str:
    file = descriptor_pb2.FileDescriptorProto(
        name=f"tests/{name}.proto", package="tests.v1", syntax="proto3", dependency=["soma/common/v1/authz.proto"]
    )
    file.message_type.add(name=f"{name}Request").field.add(
        name="count", number=1, type=descriptor_pb2.FieldDescriptorProto.TYPE_INT32
    )
    method = file.service.add(name=name).method.add(
        name="Do", input_type=f".tests.v1.{name}Request", output_type=f".tests.v1.{name}Request"
    )
    if rule is not None:
        method.options.Extensions[authz_pb2.authz].CopyFrom(rule)
    descriptor_pool.Default().Add(file)
    return f"tests.v1.{name}"


@pytest.mark.parametrize(
    ("name", "rule"),
    [
        ("Unguarded", None),
        ("Empty", authz_pb2.AuthzRule()),
        ("WrongField", authz_pb2.AuthzRule(permission="x.y", tenant_field="tenant")),
        ("NoText", authz_pb2.AuthzRule(permission="x.y", tenant_field="count")),
    ],
)
def test_a_method_without_a_fitting_rule_keeps_the_server_from_starting(
    identities: Identities, name: str, rule: authz_pb2.AuthzRule | None
) -> None:
    full_name = _service_without_rule(name, rule)
    with pytest.raises(MissingAuthzRule, match=f"/{full_name}/Do"):
        GrpcServer(
            ServiceSettings(service_instance="toolgw-0"),
            identities.authorizer(),
            services=[(lambda _servicer, _server: None, object(), full_name)],
        )
