"""Shows what running turns do to whoever watches: adapters that asked for live events, and watchers that registered
interest.

Nothing is sent for a session nobody watches. The owner of the partition is the only one who speaks, so all watchers
see the same order.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from soma.common.v1.turn_pb2 import Delivery, LiveEvent, TextDelta, TurnRestarted
from soma.router.v1.outbound_pb2 import WatchQuery, WatchSnapshot

from services.router.application.group import StoreLost
from services.router.application.live_newest import content_bytes, newest_that_fit
from services.router.application.live_waiting import WaitingTurns
from services.router.application.step_events import StepContent
from services.router.application.watch_pages import (
    PAGE_BYTES,
    WatchPages,
    is_meant,
    origin_of,
    queue_event,
    running_state,
)
from soma_common import ids
from soma_common.clock import monotonic

if TYPE_CHECKING:
    from collections.abc import Callable

    from services.router.application.ports import Outbox
    from services.router.application.state import RouterState
    from services.router.application.watch_pages import WatchStore
    from services.router.domain.partition import Partition
    from services.router.domain.session import Session, Turn

INTEREST_S: Final = 10.0
CATCH_UP_BYTES: Final = 512 * 1024
"""Most that a tenant's adapter streams are shown of running turns when they arrive, in bytes: together, if they come
within `CATCH_UP_S`, on whatever channels. Others' deliveries wait behind it, and a gateway drops what an adapter does
not read at once. Only the turns' states are told whether there is room or not.
"""
CATCH_UP_S: Final = 1.0
_MAX_INTERESTS: Final = 100_000
_SNAPSHOT_BYTES: Final = 512 * 1024
"""About how much of a turn goes in one answer that is not paged: the bus takes 1 MiB."""


class LiveDesk:
    """Who watches what, and the events for them.

    `adapter_of(session)` names the adapter stream (gateway, stream) that wants the session's live events, or None.
    """

    def __init__(
        self,
        state: RouterState,
        store: WatchStore,
        outbox: Outbox,
        adapter_of: Callable[[Session], tuple[str, int] | None],
        page_bytes: int = PAGE_BYTES,
    ) -> None:
        self._state = state
        self._store = store
        self._waiting = WaitingTurns()
        self._pages = WatchPages(state, store, self._waiting, page_bytes)
        self._outbox = outbox
        self._adapter_of = adapter_of
        self._interest: dict[bytes, float] = {}
        self._queues: dict[bytes, tuple[Partition, tuple[bytes, ...]]] = {}
        """Watched sessions, and the waiting messages that were told of last."""
        self._caught_up: dict[str, tuple[float, int]] = {}
        """By tenant, when what its new streams may be shown counts anew, monotonic in seconds, and how much is left of
        it until then, in bytes."""

    # ---- events of running turns

    def state(self, turn: Turn) -> None:
        """The turn is in a state, or has got further messages."""
        targets = self._targets(turn)
        if targets[0] or targets[1]:
            self._send(turn, running_state(turn), targets)

    def restarted(self, turn: Turn) -> None:
        """A new dispatch goes on from the journal: text shown beyond it never happened.

        Told even where no interest is known: watchers of a partition that changed its owner register it with the new
        one by asking, and this has them ask at once.
        """
        event = _event(turn, restarted=TurnRestarted(from_step=turn.step_count + 1))
        self._send(turn, event, (True, self._targets(turn)[1]))

    def text(self, turn: Turn, offset: int, text: str) -> None:
        """Text of the running step."""
        # The busiest line of live watching: the event is made where it is sent from, without a copy.
        session = turn.session
        if self._interest and self._watched(session.id):
            _fill_text(self._outbox.for_watchers(session.key.tenant, session.id), turn, offset, text)
        adapter = self._adapter_of(session) if turn.deliver else None
        if adapter is not None:
            _fill_text(self._outbox.for_adapter(session.key.tenant, *adapter), turn, offset, text)

    def step(self, turn: Turn, body: bytes) -> None:
        """A step was journaled: its calls or results, and the state it leads to."""
        targets = self._targets(turn)
        if targets[0] or targets[1]:
            content, origin = StepContent.of(body), origin_of(turn)
            for event in content.events(origin, turn.dispatch, turn.step_count):
                self._send(turn, event, targets)
            state = running_state(turn)
            state.step_size = content.size
            self._send(turn, state, targets)

    def ended(self, turn: Turn, delivery: Delivery) -> None:
        """The turn has ended: watchers get the outcome here, the channel's adapter gets it as a delivery."""
        session = turn.session
        watched = self._watched(session.id) or turn.dispatch > 1
        self._pages.note_rest(turn, watched)
        if watched:
            event = _event(turn, ended=delivery)
            event.turn_number = max(turn.number, 0)
            self._outbox.for_watchers(session.key.tenant, session.id).CopyFrom(event)

    def catch_up(self, tenant: str, channel: str, streams: set[int]) -> None:
        """Shows adapter streams that are new where the running turns of their sessions stand: the state of each turn,
        and of what it has said and done the newest that fits its share of `CATCH_UP_BYTES`.
        """
        if not streams:
            return
        shown: list[tuple[Turn, tuple[str, int]]] = []
        for turn in self._state.running.values():
            key = turn.session.key
            if key.tenant != tenant or key.channel != channel or not turn.deliver:
                continue
            adapter = self._adapter_of(turn.session)
            if adapter is not None and adapter[1] in streams:
                shown.append((turn, adapter))
        if not shown:
            return
        now = monotonic()
        until, room = self._caught_up.get(tenant, (now, 0))
        if until <= now:
            until, room = now + CATCH_UP_S, CATCH_UP_BYTES
        # The smallest first: what they do not need is the larger ones'.
        shown.sort(key=lambda each: content_bytes(each[0]))
        for place, (turn, adapter) in enumerate(shown):
            events = newest_that_fit(turn, room // (len(shown) - place))
            for event in events:
                room = max(room - event.ByteSize(), 0)
                self._outbox.for_adapter(tenant, *adapter).CopyFrom(event)
        self._caught_up[tenant] = until, room

    def _targets(self, turn: Turn) -> tuple[bool, tuple[str, int] | None]:
        return self._watched(turn.session.id), self._adapter_of(turn.session) if turn.deliver else None

    def _send(self, turn: Turn, event: LiveEvent, targets: tuple[bool, tuple[str, int] | None]) -> None:
        tenant = turn.session.key.tenant
        if targets[0]:
            self._outbox.for_watchers(tenant, turn.session.id).CopyFrom(event)
        if targets[1]:
            self._outbox.for_adapter(tenant, *targets[1]).CopyFrom(event)

    def _watched(self, session_id: bytes) -> bool:
        until = self._interest.get(session_id)
        return until is not None and until > monotonic()

    def forget_old(self) -> None:
        """Drops interest that was not renewed, and tells watchers of sessions which messages wait now."""
        now = monotonic()
        self._caught_up = {tenant: shown for tenant, shown in self._caught_up.items() if shown[0] > now}
        for session_id in [key for key, until in self._interest.items() if until <= now]:
            del self._interest[session_id]
            self._queues.pop(session_id, None)
            self._waiting.forget(session_id)
        for session_id, (partition, told) in self._queues.items():
            session = partition.sessions.get(session_id)
            waiting = tuple(message.message_id for message in session.queue) if session is not None else ()
            if waiting != told and session is not None and not partition.lost:
                self._queues[session_id] = partition, waiting
                self._outbox.for_watchers(session.key.tenant, session_id).CopyFrom(queue_event(session))

    # ---- questions of watchers

    async def query(self, tenant: str, partition: int, query: WatchQuery) -> WatchSnapshot | None:
        """Registers interest and says what the watcher has not seen; None if it is not ours to say, or not now."""
        held = self._state.partitions.get(partition)
        if held is None or held.lost or held.restoring:
            return None
        if len(self._interest) < _MAX_INTERESTS:
            self._interest[query.session_id] = monotonic() + INTEREST_S
        if query.session and self._queues.get(query.session_id, (None,))[0] is not held:
            self._queues[query.session_id] = held, ()
        if query.HasField("after"):
            return await self._pages.page(tenant, held, query)
        return await self._whole(tenant, held, query)

    async def _whole(self, tenant: str, held: Partition, query: WatchQuery) -> WatchSnapshot | None:
        """As much of the turn as fits one answer, for gateways of the release before."""
        session = held.sessions.get(query.session_id)
        if session is not None and session.key.tenant != tenant:
            return WatchSnapshot()
        if session is not None:
            snapshot = self._in_memory(session, query)
            if snapshot is not None:
                return snapshot
        try:
            turn_id = await self._turn_asked_for(tenant, query)
            if not turn_id:
                return WatchSnapshot()
            running = self._state.running.get(turn_id)
            if running is not None and running.session.key.tenant == tenant:  # its content was not in memory
                return WatchSnapshot(known=True, events=newest_that_fit(running, _SNAPSHOT_BYTES))
            ended = await self._store.ended_turn(tenant, turn_id)
        except StoreLost:
            return None
        if ended is None:
            return WatchSnapshot()
        delivery, dispatch, steps = ended
        event = LiveEvent(
            agent=delivery.agent, session=delivery.session, turn_id=turn_id, dispatch=dispatch, step=steps
        )
        event.ended.CopyFrom(delivery)
        return WatchSnapshot(known=True, events=[event])

    async def _turn_asked_for(self, tenant: str, query: WatchQuery) -> bytes | None:
        if query.turn_id or not query.message_id:
            return query.turn_id
        if query.content_hash:
            return await self._store.turn_answering(tenant, query.message_id, query.content_hash)
        return ids.turn_id(query.session_id, query.message_id)

    def _in_memory(self, session: Session, query: WatchQuery) -> WatchSnapshot | None:
        turn = session.turn
        anything = not query.message_id and not query.turn_id
        if turn is not None and (
            anything or turn.id == query.turn_id or any(is_meant(message, query) for message in turn.inputs)
        ):
            return WatchSnapshot(known=True, events=newest_that_fit(turn, _SNAPSHOT_BYTES))
        places = (ahead for ahead, message in enumerate(session.queue) if is_meant(message, query))
        ahead = next(places, None)
        if ahead is None:
            ahead = self._waiting.ahead(session, query.turn_id)
        if ahead is None:
            return None
        return WatchSnapshot(known=True, queued=True, ahead=ahead + (turn is not None))


def _event(
    turn: Turn,
    *,
    text: TextDelta | None = None,
    restarted: TurnRestarted | None = None,
    ended: Delivery | None = None,
) -> LiveEvent:
    key = turn.session.key
    return LiveEvent(
        agent=key.agent,
        session=key.session,
        turn_id=turn.id,
        dispatch=turn.dispatch,
        step=turn.step_count + 1,
        text=text,
        restarted=restarted,
        ended=ended,
    )


def _fill_text(event: LiveEvent, turn: Turn, offset: int, text: str) -> None:
    key = turn.session.key
    event.agent, event.session, event.turn_id = key.agent, key.session, turn.id
    event.dispatch, event.step = turn.dispatch, turn.step_count + 1
    delta = event.text
    delta.offset, delta.text = offset, text
