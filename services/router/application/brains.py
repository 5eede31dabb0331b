"""The brains this router can reach, and which of them takes the next turn."""

from __future__ import annotations

from services.router.application.ports import BrainLink


class BrainPool:
    """Links that are up. Credits are the brains' backpressure: no credit, no turn."""

    def __init__(self) -> None:
        self._links: list[BrainLink] = []

    def add(self, link: BrainLink) -> None:
        """A link is up."""
        self._links.append(link)

    def remove(self, link: BrainLink) -> None:
        """A link is down or drains: it gets no more turns."""
        if link in self._links:
            self._links.remove(link)

    def room(self) -> int:
        """How many turns could be started now."""
        return sum(link.credit for link in self._links if link.credit > 0)

    def take(self) -> BrainLink | None:
        """The link with the most credit, one credit counted down; None if there is none."""
        best = max(self._links, key=lambda link: link.credit, default=None)
        if best is None or best.credit <= 0:
            return None
        best.credit -= 1
        return best

    def __contains__(self, link: object) -> bool:
        return link in self._links
