"""What is known of tenants and agents, from the control plane's feed. Never asks: the hot path looks into memory."""

from __future__ import annotations

from soma.common.v1.error_reason_pb2 import ErrorReason

from services.gateway.domain.refusal import Refused, starting
from soma_common.config_feed import ConfigFeed


class FeedDirectory:
    """Port `Directory`. Refuses everything until the first copy is complete; works on the last copy while the feed
    is away.
    """

    def __init__(self, feed: ConfigFeed) -> None:
        self._feed = feed

    def check_tenant(self, tenant: str) -> None:
        """Raises Refused when the tenant is unknown or suspended, or when nothing is known yet."""
        if not self._feed.ready.is_set():
            raise starting()
        known = self._feed.tenant(tenant)
        if known is None:
            raise Refused(
                ErrorReason.ERROR_REASON_TENANT_NOT_FOUND,
                f"tenant {tenant!r} does not exist: create it or check the name",
            )
        if known.suspended:
            raise Refused(ErrorReason.ERROR_REASON_SUSPENDED, f"tenant {tenant!r} is suspended: ask its operator")

    def check_agent(self, tenant: str, agent: str) -> None:
        """Raises Refused when tenant or agent is unknown or suspended, or when nothing is known yet."""
        self.check_tenant(tenant)
        known = self._feed.agent(tenant, agent)
        if known is None:
            raise Refused(
                ErrorReason.ERROR_REASON_AGENT_NOT_FOUND,
                f"tenant {tenant!r} has no agent {agent!r}: create it or check the name",
            )
        if known.spec.suspended:
            raise Refused(ErrorReason.ERROR_REASON_SUSPENDED, f"agent {agent!r} is suspended: ask its operator")
