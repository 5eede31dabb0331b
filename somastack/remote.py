"""The services of the stack in a home, called with the tokens that the home has."""

import asyncio
import uuid
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import grpc
from soma.controlplane.v1.agent_service_pb2_grpc import AgentServiceStub
from soma.controlplane.v1.tenant_service_pb2_grpc import TenantServiceStub
from soma.router.v1.session_service_pb2_grpc import SessionServiceStub
from soma.router.v1.turn_service_pb2_grpc import TurnServiceStub

from soma_common.errors import from_rpc_error
from soma_common.grpc.channel import open_channel
from somastack.auth_material import AuthMaterial
from somastack.chat import token_for
from somastack.control import needed_state
from somastack.home import Home
from somastack.refusals import in_commands
from somastack.state import StackState

if TYPE_CHECKING:
    from soma.controlplane.v1.agent_service_pb2_grpc import AgentServiceAsyncStub
    from soma.controlplane.v1.tenant_service_pb2_grpc import TenantServiceAsyncStub
    from soma.router.v1.session_service_pb2_grpc import SessionServiceAsyncStub
    from soma.router.v1.turn_service_pb2_grpc import TurnServiceAsyncStub


class _PageRequest(Protocol):
    page_size: int
    page_token: str


class _Page(Protocol):
    @property
    def next_page_token(self) -> str: ...


Asked = TypeVar("Asked", bound=_PageRequest)
Page = TypeVar("Page", bound=_Page)
T = TypeVar("T")


@dataclass(frozen=True)
class Remote:
    """Stubs of the services of one home's running stack. Sessions and turns are reached as the channels of their tenant
    are, tenants and agents as the administrator.
    """

    home: Home
    routers: str
    controlplanes: str

    @classmethod
    def of(cls, given: Path | None) -> "Remote":
        """The stack that runs in the home that `given` chooses.

        Raises:
            PartFailed: none does.
        """
        home = Home.chosen(given)
        return cls.at(home, needed_state(home))

    @classmethod
    def at(cls, home: Home, state: StackState) -> "Remote":
        """The stack in `home` that is in this state."""
        return cls(home, state.targets("router"), state.targets("controlplane"))

    @asynccontextmanager
    async def sessions(self, tenant: str) -> AsyncIterator["SessionServiceAsyncStub"]:
        """The router's sessions."""
        async with _open(self.routers, "router", token_for(self.home, tenant)) as channel:
            yield SessionServiceStub(channel)

    @asynccontextmanager
    async def turns(self, tenant: str) -> AsyncIterator["TurnServiceAsyncStub"]:
        """The router's turns."""
        async with _open(self.routers, "router", token_for(self.home, tenant)) as channel:
            yield TurnServiceStub(channel)

    @asynccontextmanager
    async def agents(self) -> AsyncIterator["AgentServiceAsyncStub"]:
        """The control plane's agents. A call that is refused raises SomaError."""
        async with self._controlplane() as channel:
            yield AgentServiceStub(channel)

    @asynccontextmanager
    async def tenants(self) -> AsyncIterator["TenantServiceAsyncStub"]:
        """The control plane's tenants. A call that is refused raises SomaError."""
        async with self._controlplane() as channel:
            yield TenantServiceStub(channel)

    @asynccontextmanager
    async def _controlplane(self) -> AsyncIterator[grpc.aio.Channel]:
        admin = AuthMaterial(self.home).admin_token_file.read_text(encoding="utf-8").strip()
        async with _open(self.controlplanes, "controlplane", admin) as channel:
            try:
                yield channel
            except grpc.aio.AioRpcError as error:
                raise in_commands(from_rpc_error(error), self.home) from error


def run(work: Coroutine[Any, Any, T]) -> T:
    """Do `work` to its end.

    Raises:
        SomaError: a service refused, or does not answer.
    """
    try:
        return asyncio.run(work)
    except grpc.aio.AioRpcError as error:
        raise from_rpc_error(error) from error


async def every(
    call: Callable[[Asked], Awaitable[Page]], request: Asked, items: Callable[[Page], Iterable[T]]
) -> AsyncIterator[T]:
    """Everything in a list, page after page; pages that are too large for one call are asked for in smaller ones."""
    while True:
        try:
            page = await call(request)
        except grpc.aio.AioRpcError as error:
            if error.code() is not grpc.StatusCode.RESOURCE_EXHAUSTED or request.page_size <= 1:
                raise
            request.page_size = max(1, request.page_size // 8)
            continue
        for item in items(page):
            yield item
        if not page.next_page_token:
            return
        request.page_token = page.next_page_token


async def first(count: int, found: AsyncIterator[T]) -> list[T]:
    """The first `count` of what is found, at most; no page is asked for that is not needed."""
    taken: list[T] = []
    async for item in found:
        taken.append(item)
        if len(taken) == count:
            break
    return taken


async def newest(count: int, found: AsyncIterator[T]) -> list[T]:
    """The last `count` of what is found, at most."""
    kept: deque[T] = deque(maxlen=count)
    async for item in found:
        kept.append(item)
    return list(kept)


def request_id(given: str | None) -> str:
    """The id of one request: the channel's own retries of the call repeat it."""
    return given or f"somastack-{uuid.uuid4().hex}"


def _open(targets: str, service: str, token: str) -> grpc.aio.Channel:
    # Waiting for a service that is being started again is what a person would do.
    return open_channel(targets, token=lambda: token, service=service, wait_for_ready=True)
