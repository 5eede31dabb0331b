"""The tool gateway over gRPC (port `Tools`), with a short memory of what tools there are."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Mapping
from typing import Final

import structlog
from google.protobuf import struct_pb2
from grpc import aio
from soma.common.v1 import error_reason_pb2 as reasons
from soma.common.v1 import message_pb2
from soma.toolgw.v1 import tool_service_pb2 as toolgw
from soma.toolgw.v1 import tool_service_pb2_grpc as toolgw_grpc

from services.cognition.application.ports import Invocation, NotBegun, ToolDescription
from services.cognition.domain.conversation import to_dict
from soma_common.errors import (
    DeadlineExceeded,
    ResourceExhausted,
    SomaError,
    Unavailable,
    from_inner_call,
    from_rpc_error,
    told_by_peer,
)

PAGE_SIZE: Final = 200
LIST_TIMEOUT_S: Final = 5.0
MEMORY_S: Final = 30.0
"""How long a tenant's tools are taken from memory."""
AGAIN_S: Final = 5.0
"""How long an old memory is used before a gateway that did not answer is asked again: not every turn waits for it."""
MEMORY_TENANTS: Final = 1024

_NOT_SENT: Final = ("connections to all backends failing", "errors resolving ")
"""How gRPC begins what it says of a call for which it had no connection. It has no code for that; with other words from
another release a call counts as one that may have begun, which is never wrong. It speaks of the last try only, so that
InvokeTool must not be retried by gRPC (soma_common/grpc/service_config/toolgw.json)."""

_GATEWAY: Final = "the tool gateway"

_KEY_METADATA: Final = "idempotency_key"
"""Names the call in the errors of the tool gateway that speak of one it knows."""

_log = structlog.get_logger(__name__)


class GrpcTools:
    """Asks the tool gateway on `channel`. For one event loop."""

    def __init__(
        self, channel: aio.Channel, *, memory_s: float = MEMORY_S, list_timeout_s: float = LIST_TIMEOUT_S
    ) -> None:
        self._stub = toolgw_grpc.ToolServiceStub(channel)
        self._memory_s = memory_s
        self._list_timeout_s = list_timeout_s
        self._known: OrderedDict[str, tuple[float, Mapping[str, ToolDescription]]] = OrderedDict()
        self._asking: dict[str, asyncio.Task[Mapping[str, ToolDescription]]] = {}
        self._trouble = ""
        """Why the last call got no answer, as the log has it; empty: it got one."""

    async def describe(self, tenant: str) -> Mapping[str, ToolDescription]:
        """The tenant's tools by name, from memory if it is fresh; many turns that ask at once make one call.

        A gateway that does not answer is not noticed while there is a memory, even an old one: descriptions change
        rarely, and a tool that is gone is refused when it is called. Raises SomaError.
        """
        entry = self._known.get(tenant)
        if entry is not None and entry[0] > asyncio.get_running_loop().time():
            self._known.move_to_end(tenant)
            return entry[1]
        asking = self._asking.get(tenant)
        if asking is None:
            asking = asyncio.create_task(self._list(tenant), name=f"list tools of {tenant}")
            self._asking[tenant] = asking
            asking.add_done_callback(lambda _: self._asking.pop(tenant, None))
        try:
            return await asyncio.shield(asking)  # one turn's stop must not take the answer from the others
        except Unavailable:
            if entry is None:
                raise
            self._known[tenant] = (asyncio.get_running_loop().time() + AGAIN_S, entry[1])
            return entry[1]

    async def invoke(
        self, invocation: Invocation, timeout_s: float
    ) -> tuple[struct_pb2.Value, message_pb2.Error | None]:
        """Runs a tool under its key. Raises SomaError if the gateway gave no answer, NotBegun if it never got the
        call."""
        request = toolgw.InvokeToolRequest(
            session=invocation.session,
            tool=invocation.tool,
            arguments=invocation.arguments,
            idempotency_key=invocation.key,
            turn_id=invocation.turn_id.hex(),
            step=invocation.step,
        )
        try:
            response = await self._stub.InvokeTool(request, timeout=timeout_s)
        except aio.AioRpcError as error:
            self._note(error)
            raise _no_answer(error) from error
        self._trouble = ""
        return response.result, response.error if response.HasField("error") else None

    async def _list(self, tenant: str) -> Mapping[str, ToolDescription]:
        tools: dict[str, ToolDescription] = {}
        token = ""
        while True:
            request = toolgw.ListToolsRequest(parent=f"tenants/{tenant}", page_size=PAGE_SIZE, page_token=token)
            try:
                page = await self._stub.ListTools(request, timeout=self._list_timeout_s)
            except aio.AioRpcError as error:
                self._note(error)
                failed = from_inner_call(error, _GATEWAY)
                if isinstance(failed, DeadlineExceeded):  # our own limit, not the turn's
                    text = f"{_GATEWAY} did not answer within {self._list_timeout_s:g} s"
                    failed = Unavailable(reasons.ERROR_REASON_SERVICE_UNAVAILABLE, text)
                raise failed from error
            for tool in page.tools:
                tools[tool.tool] = ToolDescription(tool.tool, tool.description, to_dict(tool.parameters))
            token = page.next_page_token
            if not token:
                break
        self._trouble = ""
        self._known[tenant] = (asyncio.get_running_loop().time() + self._memory_s, tools)
        self._known.move_to_end(tenant)
        if len(self._known) > MEMORY_TENANTS:
            self._known.popitem(last=False)
        return tools

    def _note(self, error: aio.AioRpcError) -> None:
        """Logs what gRPC says of a call without an answer, addresses included: turns show tenants what they fail of, so
        their errors say less. The same is said once until a call is answered.
        """
        trouble = str(from_rpc_error(error))
        if told_by_peer(error) is None and trouble != self._trouble:
            self._trouble = trouble
            _log.warning("tool_gateway.no_answer", error=trouble)


def _no_answer(error: aio.AioRpcError) -> SomaError:
    """The error of a call that brought no answer; NotBegun if that is known."""
    failed = from_inner_call(error, _GATEWAY)
    is_of_gateway = told_by_peer(error) is not None
    if isinstance(failed, ResourceExhausted) and (not is_of_gateway or _KEY_METADATA in failed.metadata):
        # gRPC's own, also of a call that was cut off; or there is no place to wait for a call that was begun.
        return Unavailable(
            reasons.ERROR_REASON_SERVICE_UNAVAILABLE, failed.message, failed.metadata, failed.retry_delay_s
        )
    if not isinstance(failed, Unavailable):
        return failed
    is_refused = is_of_gateway and failed.reason == reasons.ERROR_REASON_DRAINING
    is_not_sent = not is_of_gateway and (error.details() or "").startswith(_NOT_SENT)
    if is_refused or is_not_sent:
        return NotBegun(failed.reason, failed.message, failed.metadata, failed.retry_delay_s)
    return failed


class NoTools:
    """Stands in where no tool gateway is configured: there are no tools, and a call of one fails."""

    async def describe(self, tenant: str) -> Mapping[str, ToolDescription]:
        """No tools."""
        return {}

    async def invoke(
        self, invocation: Invocation, timeout_s: float
    ) -> tuple[struct_pb2.Value, message_pb2.Error | None]:
        """Always the error SERVICE_UNAVAILABLE, at once."""
        return struct_pb2.Value(), message_pb2.Error(
            reason=reasons.ERROR_REASON_SERVICE_UNAVAILABLE,
            message="this brain has no tool gateway; set SOMA_TOOLGW_TARGET",
        )
