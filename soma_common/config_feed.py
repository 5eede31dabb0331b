"""What a service knows of tenants and agents: a copy in memory, fed by the control plane.

The hot path asks this copy, never the control plane. While the control plane is away the last copy stays in use; it
is replaced as a whole, at once, when the next complete copy has arrived.
"""

import asyncio
import random
import time
from collections.abc import Callable, Iterable

import grpc
import structlog
from soma.controlplane.v1 import config_service_pb2, config_service_pb2_grpc
from soma.controlplane.v1.agent_service_pb2 import Agent
from soma.controlplane.v1.tenant_service_pb2 import Tenant

from soma_common.errors import SomaError, from_rpc_error
from soma_common.telemetry.metrics import counter, gauge

SILENCE_LIMIT_S = 15.0
"""A feed that sends nothing for so long, not even its heartbeat (every 2 s), is opened anew."""
RETRY_MIN_S, RETRY_MAX_S = 0.1, 2.0

_version = gauge("soma_config_version", "Version of the configuration in use.")
_reconnects = counter("soma_config_feed_restarts_total", "Times the configuration feed had to be opened again.")
_log = structlog.get_logger(__name__)

_Copy = tuple[dict[str, Tenant], dict[str, Agent]]


class ConfigFeed:
    """The copy and the task that keeps it (`run`). Messages it returns are shared: do not change them."""

    def __init__(self, channel: grpc.aio.Channel, instance: str, *, silence_limit_s: float = SILENCE_LIMIT_S) -> None:
        self._silence_limit_s = silence_limit_s
        self._stub = config_service_pb2_grpc.ConfigServiceStub(channel)
        self._instance = instance
        self._tenants: dict[str, Tenant] = {}
        self._agents: dict[str, Agent] = {}
        self._listeners: list[Callable[[], None]] = []
        self.version = 0
        """Version of the copy; two watchers at the same version know the same."""
        self.ready = asyncio.Event()
        """Set when the first complete copy has arrived, and from then on."""

    def tenant(self, tenant: str) -> Tenant | None:
        """Return the tenant with this id, or None."""
        return self._tenants.get(f"tenants/{tenant}")

    def agent(self, tenant: str, agent: str) -> Agent | None:
        """Return the agent with these ids, or None."""
        return self._agents.get(f"tenants/{tenant}/agents/{agent}")

    def tenants(self) -> Iterable[Tenant]:
        """Return all tenants."""
        return self._tenants.values()

    def agents(self) -> Iterable[Agent]:
        """Return all agents."""
        return self._agents.values()

    def on_change(self, listener: Callable[[], None]) -> None:
        """Call `listener` after every change of the copy, the first copy included."""
        self._listeners.append(listener)

    async def run(self) -> None:
        """Keep the copy up to date until cancelled; connects again by itself."""
        delay_s = RETRY_MIN_S
        while True:
            opened = time.monotonic()
            try:
                await self._watch()
                why = "the control plane closed the feed"
            except TimeoutError:
                why = f"nothing was heard for {self._silence_limit_s:g} s"
            except grpc.aio.AioRpcError as error:
                why = str(from_rpc_error(error))
            except SomaError as error:
                why = str(error)
            if time.monotonic() - opened > RETRY_MAX_S:
                delay_s = RETRY_MIN_S  # It had worked: start over with short waits.
            _reconnects.inc()
            _log.warning("config_feed.interrupted", why=why, retry_s=round(delay_s, 2), version=self.version)
            await asyncio.sleep(delay_s * random.uniform(0.5, 1.0))
            delay_s = min(delay_s * 2, RETRY_MAX_S)

    async def _watch(self) -> None:
        call = self._stub.WatchConfig(config_service_pb2.WatchConfigRequest(instance=self._instance))
        arriving: _Copy | None = ({}, {})
        try:
            while True:
                async with asyncio.timeout(self._silence_limit_s):
                    frame = await call.read()
                if frame is grpc.aio.EOF:
                    return
                assert isinstance(frame, config_service_pb2.WatchConfigResponse)
                if arriving is None:
                    if not frame.heartbeat:
                        _apply(frame, self._tenants, self._agents)
                        self._changed(frame.version)
                    continue
                _apply(frame, *arriving)
                if frame.complete:
                    self._tenants, self._agents = arriving
                    arriving = None
                    self._changed(frame.version)
                    self.ready.set()
        finally:
            call.cancel()  # A stream that is only dropped is never ended by gRPC.

    def _changed(self, version: int) -> None:
        self.version = version
        _version.set(version)
        for listener in self._listeners:
            listener()


def _apply(frame: config_service_pb2.WatchConfigResponse, tenants: dict[str, Tenant], agents: dict[str, Agent]) -> None:
    for tenant in frame.tenants:
        tenants[tenant.name] = tenant
    for agent in frame.agents:
        agents[agent.name] = agent
    for name in frame.deleted:
        tenants.pop(name, None)
        agents.pop(name, None)
