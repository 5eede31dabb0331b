"""Which tools an agent may use, as the control plane's feed tells it.

A tool taken from an agent is refused from the next call on, also in turns that began before. An agent that was just
given a tool may be ahead of the feed, so a refusal waits a moment for the feed to catch up.
"""

from __future__ import annotations

import asyncio
from typing import Final

from services.toolgw.domain.refusals import access_unknown
from soma_common.config_feed import ConfigFeed

CATCH_UP_S: Final = 1.0
"""How long a refusal waits for a change of the configuration."""


class ConfigFeedAccess:
    """Asks the copy of the configuration in memory."""

    def __init__(self, feed: ConfigFeed, catch_up_s: float = CATCH_UP_S) -> None:
        self._feed = feed
        self._catch_up_s = catch_up_s
        self._changed = asyncio.Event()
        feed.on_change(self._notice)

    async def allows(self, tenant: str, agent: str, tool: str) -> bool:
        """Whether the agent exists and its spec names the tool.

        Raises:
            Unavailable: no complete copy of the configuration has arrived yet.
        """
        try:
            async with asyncio.timeout(self._catch_up_s):
                while not self._names(tenant, agent, tool):
                    self._changed.clear()
                    await self._changed.wait()
                return True
        except TimeoutError:
            if not self._feed.ready.is_set():
                raise access_unknown() from None
            return False

    def _names(self, tenant: str, agent: str, tool: str) -> bool:
        known = self._feed.agent(tenant, agent)
        return known is not None and self._feed.tenant(tenant) is not None and tool in known.spec.tools

    def _notice(self) -> None:
        self._changed.set()
