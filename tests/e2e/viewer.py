"""A client that watches a session and renders what it is told, strictly: a gap, a repetition or disorder fails."""

import asyncio
from collections.abc import AsyncIterable
from contextlib import suppress
from dataclasses import dataclass, field

from soma.common.v1.turn_pb2 import Delivery, LiveEvent, QueueState, WatchPosition

from soma_common.live_merge import Watched

Content = dict[int, str]
"""Of a turn: by step its text, and behind it the names of its calls or results."""


@dataclass
class Viewer:
    """What was shown, by turn in order."""

    turns: dict[bytes, Content] = field(default_factory=dict)
    outcomes: dict[bytes, Delivery] = field(default_factory=dict)
    queues: list[QueueState] = field(default_factory=list)
    position: WatchPosition | None = None
    taken_back: int = 0
    """Steps of which something was shown and taken back."""

    async def watch(self, events: AsyncIterable[Watched]) -> None:
        """Show events until they end."""
        async for event, position in events:
            self.show(event)
            self.position = position

    def text(self, turn: bytes) -> str:
        """All text of a turn."""
        return "".join(text for _, text in sorted(self.turns.get(turn, {}).items()))

    @property
    def shown(self) -> str:
        """All text of all turns."""
        return "".join(map(self.text, self.turns))

    def show(self, event: LiveEvent) -> None:
        """Render one event."""
        if event.HasField("queued"):
            self.queues.append(event.queued)
            return
        assert event.turn_id not in self.outcomes, "a turn that has ended"
        assert all(turn in self.outcomes for turn in self.turns if turn != event.turn_id), "two turns at once"
        steps = self.turns.setdefault(event.turn_id, {})
        so_far = steps.get(event.step, "")
        match event.WhichOneof("event"):
            case "text":
                assert event.text.offset == len(so_far), f"text with a gap or a repetition: {event}"
                assert max(steps, default=0) <= event.step, "text of a step that is over"
                steps[event.step] = so_far + event.text.text
            case "tool_call":
                steps[event.step] = f"{so_far}[{event.tool_call.tool}#{event.tool_call.index}]"
            case "tool_result":
                steps[event.step] = f"{so_far}({event.tool_result.tool}#{event.tool_result.index})"
            case "restarted":
                gone = [step for step in steps if step >= event.restarted.from_step]
                self.taken_back += len(gone)
                for step in gone:
                    del steps[step]
            case "ended":
                self.outcomes[event.turn_id] = event.ended


class Watching:
    """Shows events in the background until the end of the block."""

    def __init__(self, viewer: Viewer, events: AsyncIterable[Watched]) -> None:
        self._task = asyncio.ensure_future(viewer.watch(events))

    async def __aenter__(self) -> None:
        await asyncio.sleep(0)

    async def __aexit__(self, *_: object) -> None:
        if not self._task.done():
            self._task.cancel()
        with suppress(asyncio.CancelledError):
            await self._task
