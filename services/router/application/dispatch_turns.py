"""Gives turns to brains, and tells them what they need: the agent, the context, the inputs and the journal so far."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Collection, Coroutine
from typing import TYPE_CHECKING, Any, Final

import structlog
from soma.cognition.v1.cognition_service_pb2 import StartTurn
from soma.controlplane.v1.agent_service_pb2 import AgentSpec

from services.router.application.group import StoreLost
from services.router.application.items import DispatchItem
from services.router.domain.session import Turn
from services.router.domain.turn import TurnStatus, replay
from soma_common.clock import monotonic

if TYPE_CHECKING:
    from services.router.application.brains import BrainPool
    from services.router.application.commit_group import GroupCommitter
    from services.router.application.ports import BrainLink, HistoryStore
    from services.router.application.state import RouterState
    from services.router.application.watch_turns import LiveDesk

DEFAULT_CONTEXT: Final = 100
DEFAULT_STEP_TIMEOUT_MS: Final = 60_000
SUSPECT_STRIKES: Final = 2
"""From so many deaths on a turn is a suspect. One may be chance: it was there when something else went wrong."""
MAX_CONTEXT_BYTES: Final = 1024 * 1024
RETRY_S: Final = 0.5

log = structlog.get_logger(__name__)


class Dispatcher:
    """Turns that wait for a brain, and how they get one.

    `on_agent_gone(turn, dispatch)` is told of a turn whose agent's revision nobody knows any more. A turn of which
    nothing is heard for its agent's step timeout and `stuck_margin_s` is to be restarted.
    """

    def __init__(
        self,
        state: RouterState,
        brains: BrainPool,
        history: HistoryStore,
        live: LiveDesk,
        spawn: Callable[[Coroutine[Any, Any, None]], None],
        on_agent_gone: Callable[[Turn, int], None],
        stuck_margin_s: float,
    ) -> None:
        self._state = state
        self._brains = brains
        self._history = history
        self._live = live
        self._spawn = spawn
        self._on_agent_gone = on_agent_gone
        self._stuck_margin_s = stuck_margin_s
        self._orphans: deque[Turn] = deque()
        self._suspects: deque[Turn] = deque()
        self._alone: Turn | None = None
        """The suspect that may run."""
        self.committer: GroupCommitter

    @property
    def room(self) -> int:
        """How many turns could be started now, beside those that wait already."""
        return self._brains.room() - len(self._orphans)

    @property
    def waiting(self) -> bool:
        """Whether turns wait for a brain, or for their turn to run alone."""
        return bool(self._orphans or self._suspects)

    def assign(self) -> None:
        """Gives waiting turns to brains: called whenever a brain may have room, or a turn has ended."""
        self._next_suspect()
        while self._orphans:
            turn = self._orphans[0]
            if not self._wants_brain(turn):
                self._orphans.popleft()
                continue
            link = self._brains.take()
            if link is None:
                return
            self._orphans.popleft()
            self._begin(turn, link)
        if self._state.scheduler.startable and self._brains.room() > 0:
            self.committer.nudge()

    def begin_ahead(self, turn: Turn) -> bool:
        """Gives a brain a turn whose start is on its way to the store; False if that has to wait for something: other
        turns for a brain, what the brain is to know for the store, or what became of a brain that had the turn before.
        """
        session = turn.session
        if self._orphans or session.turn is not turn or session.partition.lost or self._state.runs(turn):
            return False
        if turn.status is not TurnStatus.RUNNING or turn.dispatch != 1:
            return False
        spec = self._spec_if_ready(turn)
        link = self._brains.take() if spec is not None else None
        if spec is None or link is None:
            return False
        self._take_up(turn, link)
        try:
            self._send_start(turn, link, spec, session.context or ())
        except BaseException:
            turn.let_go()
            raise
        return True

    def _wants_brain(self, turn: Turn) -> bool:
        """Whether a turn that waited is still to be run. One that was stopped meanwhile is not: the word to stop is
        said, and a brain that was given it now would wait for ever for its first step to be taken.
        """
        return self._state.runs(turn) and turn.status is TurnStatus.RUNNING and not turn.ending

    def dispatch(self, turn: Turn) -> None:
        """Has a turn that is durable run by a brain, after those that wait for one already.

        A suspect, a turn with which brains or routers died before, runs while no other suspect does: a poison turn
        then kills without company that would be blamed with it. Turns above suspicion run beside it.
        """
        if turn.strikes >= SUSPECT_STRIKES:
            if self._alone is turn:
                self._alone = None  # it died again: the others are let before it
            self._suspects.append(turn)
            self._next_suspect()
        else:
            self._give(turn)

    def _next_suspect(self) -> None:
        while self._suspects and (self._alone is None or not self._state.runs(self._alone)):
            turn = self._suspects.popleft()
            if self._wants_brain(turn):
                self._alone = turn
                # Durably: a new owner has to know which of the suspects ran when this router died.
                trial = DispatchItem(turn.session.partition, turn, self._on_trial, turn.dispatch, on_trial=True)
                self.committer.put(trial)

    def _on_trial(self, turn: Turn) -> None:
        if self._wants_brain(turn) and turn.link is None and self._alone is turn:
            self._give(turn)

    def _give(self, turn: Turn) -> None:
        link = self._brains.take()
        if link is None or self._orphans:
            if link is not None:
                link.credit += 1
            self._orphans.append(turn)
            if link is not None:
                self.assign()
            return
        self._begin(turn, link)

    def _begin(self, turn: Turn, link: BrainLink) -> None:
        self._take_up(turn, link)
        spec = self._spec_if_ready(turn)
        if spec is not None:
            self.announce(turn)
            self._send_start(turn, link, spec, turn.session.context or ())
        else:
            self._spawn(self._load_and_start(turn, link, turn.dispatch))

    def _take_up(self, turn: Turn, link: BrainLink) -> None:
        turn.link = link
        turn.inputs_told = 0
        turn.started_at = turn.progress_at = monotonic()

    def _spec_if_ready(self, turn: Turn) -> AgentSpec | None:
        """The turn's agent, if that and everything else that its brain is to know is in memory."""
        session = turn.session
        if not turn.journal_loaded or session.context is None or any(m.content is None for m in turn.inputs):
            return None
        agent = self._state.directory.agent(session.key.tenant, session.key.agent)
        return agent.spec if agent is not None and agent.revision == turn.revision else None

    async def _load_and_start(self, turn: Turn, link: BrainLink, dispatch: int) -> None:
        """Reads from the store what memory does not hold, then starts the turn."""
        session, key = turn.session, turn.session.key
        try:
            if not turn.journal_loaded:
                await self._load_journal(turn)
            missing = [m.position for m in turn.inputs if m.content is None]
            if missing:
                contents = await self._history.contents(key.tenant, session.partition.id, missing)
                if not self._state.runs(turn):
                    return  # rolled back, its inputs wait again and are counted without content
                for message in turn.inputs:
                    if message.content is None:
                        message.content = contents.get(message.position)
            spec = await self._spec(turn)
            if spec is None:
                self._on_agent_gone(turn, dispatch)
                return
            if session.context is None:
                limit = spec.context_messages or DEFAULT_CONTEXT
                context = await self._history.context(key.tenant, session.id, limit)
                if self._state.runs(turn):  # else it lacks what was said since: it is not the next turn's
                    session.recall(context)
            else:
                context = list(session.context)
        except StoreLost:
            log.warning("router.load_failed", turn=turn.id.hex())
            self._spawn(self._retry_later(turn, link, dispatch))
            return
        if not self._wants_brain(turn) or turn.dispatch != dispatch or turn.link is not link:
            return
        if any(message.content is None for message in turn.inputs):
            # One more has come while all this was read, and its content is in the store only.
            self._spawn(self._load_and_start(turn, link, dispatch))
            return
        self.announce(turn)
        self._send_start(turn, link, spec, context)

    async def _retry_later(self, turn: Turn, link: BrainLink, dispatch: int) -> None:
        await asyncio.sleep(RETRY_S)
        if self._state.runs(turn) and turn.dispatch == dispatch and turn.link is link:
            await self._load_and_start(turn, link, dispatch)

    async def _spec(self, turn: Turn) -> AgentSpec | None:
        key = turn.session.key
        agent = self._state.directory.agent(key.tenant, key.agent)
        if agent is not None and agent.revision == turn.revision:
            return agent.spec
        stored = await self._history.agent_spec(key.tenant, key.agent, turn.revision)
        return AgentSpec.FromString(stored) if stored is not None else None

    def _send_start(self, turn: Turn, link: BrainLink, spec: AgentSpec, context: Collection[bytes]) -> None:
        key = turn.session.key
        turn.patience_s = self._stuck_margin_s + (spec.step_timeout_ms or DEFAULT_STEP_TIMEOUT_MS) / 1000
        turn.context_limit = spec.context_messages or DEFAULT_CONTEXT
        start = StartTurn(
            turn_id=turn.id,
            dispatch=turn.dispatch,
            agent_revision=turn.revision,
            agent_spec=spec.SerializeToString(),
            context=_newest(context, turn.context_limit),
            inputs=[message.content or b"" for message in turn.inputs],
            journal=turn.journal,
            traceparent=turn.inputs[0].traceparent,
        )
        session = start.session
        session.tenant, session.agent = key.tenant, key.agent
        session.channel, session.session = key.channel, key.session
        turn.inputs_told = len(turn.inputs)
        turn.progress_at = monotonic()
        link.start(start)

    def announce(self, turn: Turn) -> None:
        """Shows whoever watches that the turn runs, or runs again."""
        if turn.dispatch > 1:
            self._live.restarted(turn)
        self._live.state(turn)

    async def _load_journal(self, turn: Turn) -> None:
        steps = await self._history.journal(turn.session.key.tenant, turn.id)
        turn.journal = [body for _, body in steps]
        turn.state = replay([kind for kind, _ in steps])
        turn.journal_loaded = True

    async def ensure_journal(self, turn: Turn) -> bool:
        """Has the turn's journal in memory; False if the turn does not run here any more."""
        while not turn.journal_loaded and self._state.runs(turn):
            try:
                await self._load_journal(turn)
            except StoreLost:
                await asyncio.sleep(RETRY_S)
        return self._state.runs(turn)


def _newest(context: Collection[bytes], limit: int) -> Collection[bytes]:
    """The newest messages of a context: at most `limit`, and no more bytes than fit a frame beside other turns."""
    if len(context) <= limit and sum(map(len, context)) <= MAX_CONTEXT_BYTES:
        return context
    kept = list(context)
    size = 0
    for count, message in enumerate(reversed(kept)):
        size += len(message)
        if count == limit or size > MAX_CONTEXT_BYTES:
            return kept[len(kept) - count :]
    return kept
