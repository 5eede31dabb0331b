"""Spans of sampled messages and turns on their way through group commits: how long they wait for their group, how long
it takes to be put together, and how long until it is known to be durable.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable

from services.router.application.group import CommitItem, Group, GroupResult
from services.router.application.items import IngestItem, StartItem, StepItem
from services.router.application.outcomes import EndItem
from services.router.application.ports import GroupWriter
from soma_common.telemetry import spans


class TracedGroups:
    """Stands between the committer and what it uses: notes the times of the group that is composed and written next."""

    def __init__(
        self,
        compose: Callable[[list[CommitItem]], None],
        look_ahead: Callable[[list[IngestItem]], list[StartItem]],
        writer: GroupWriter,
    ) -> None:
        self._compose = compose
        self._look_ahead = look_ahead
        self._writer = writer
        self._taken: list[spans.Followed] = []
        self._away: list[spans.Followed] = []
        """Of the group's turns, those that a brain has already."""

    def look_ahead(self, items: list[IngestItem]) -> list[StartItem]:
        """Starts turns of messages that go with the next group."""
        if spans.watched:
            spans.stage("router.gather", _keys(items))
        return self._look_ahead(items)

    def compose(self, items: list[CommitItem]) -> None:
        """Composes a group."""
        if not spans.watched:
            self._compose(items)
            return
        came = len(items)
        # Whose turns were started by `look_ahead`.
        ahead = {item.turn.inputs[0].message_id for item in items if isinstance(item, StartItem)}
        taken = spans.stage("router.gather", _keys(items, ahead))
        self._compose(items)
        waited = [item for item in spans.found(_keys(items[came:])) if item not in taken]
        self._taken = spans.end_stage("router.compose", taken) + spans.end_stage("router.line", waited)
        self._away = [item for item in spans.found(ahead) if item not in taken]

    async def commit(self, group: Group) -> GroupResult:
        """Writes the group."""
        taken, self._taken = self._taken, []
        away, self._away = self._away, []
        if not taken and not away:
            return await self._writer.commit(group)
        spans.end_stage("router.columns", taken)
        began_ns = time.monotonic_ns()
        left = [(followed, followed.since_ns) for followed in taken]
        result = await self._writer.commit(group)
        # Turns that were given to a brain meanwhile have gone on: for them the commit is beside their way.
        spans.end_stage("router.commit", [followed for followed, since in left if followed.since_ns == since])
        ahead = [entry for entry in left if entry[0].since_ns != entry[1]]
        spans.beside("router.commit_ahead", ahead + [(followed, began_ns) for followed in away])
        return result


def _keys(items: Iterable[CommitItem], without: Collection[bytes] = ()) -> Iterable[bytes]:
    for item in items:
        if isinstance(item, IngestItem):
            yield from (entry.message.message_id for entry in item.entries if entry.message.message_id not in without)
        elif isinstance(item, StartItem):
            if item.turn.inputs[0].message_id not in without:
                yield item.turn.id
        elif isinstance(item, (StepItem, EndItem)):
            yield item.turn.id
