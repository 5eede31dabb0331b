"""Spans of sampled messages and turns on their way through group commits: how long they wait for their group, how long
it takes to be put together, and how long until it is known to be durable.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from services.router.application.group import CommitItem, Group, GroupResult
from services.router.application.items import IngestItem, StartItem, StepItem
from services.router.application.outcomes import EndItem
from services.router.application.ports import GroupWriter
from soma_common.telemetry import spans


class TracedGroups:
    """Stands between the committer and what it uses: notes the times of the group that is composed and written next."""

    def __init__(self, compose: Callable[[list[CommitItem]], None], writer: GroupWriter) -> None:
        self._compose = compose
        self._writer = writer
        self._taken: list[spans.Followed] = []

    def compose(self, items: list[CommitItem]) -> None:
        """Composes a group."""
        if not spans.watched:
            self._compose(items)
            return
        came = len(items)
        taken = spans.stage("router.gather", _keys(items))
        self._compose(items)
        waited = [item for item in spans.found(_keys(items[came:])) if item not in taken]
        self._taken = spans.end_stage("router.compose", taken) + spans.end_stage("router.line", waited)

    async def commit(self, group: Group) -> GroupResult:
        """Writes the group."""
        taken, self._taken = self._taken, []
        if not taken:
            return await self._writer.commit(group)
        spans.end_stage("router.columns", taken)
        left = [(followed, followed.since_ns) for followed in taken]
        result = await self._writer.commit(group)
        # Turns that were given to a brain meanwhile have gone on: for them the commit is beside their way.
        spans.end_stage("router.commit", [followed for followed, since in left if followed.since_ns == since])
        spans.beside("router.commit_ahead", [entry for entry in left if entry[0].since_ns != entry[1]])
        return result


def _keys(items: Iterable[CommitItem]) -> Iterable[bytes]:
    for item in items:
        if isinstance(item, IngestItem):
            for entry in item.entries:
                yield entry.message.message_id
        elif isinstance(item, (StartItem, StepItem, EndItem)):
            yield item.turn.id
