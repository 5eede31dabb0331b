"""Serves the routers' streams: who may run how many turns here, which dispatch of a turn counts, what ends what.

    Brain                all streams and all running turns of this process
      RouterSession      one stream: its outbox, its credits, its turns
        RunningTurn      one turn (running_turn.py)

A turn runs at most once in a brain, whichever stream it came by: the highest dispatch wins. A turn ends here when its
final is confirmed or its failure proposed; a stop, a newer dispatch, the end of its stream or of the process cancel it
without a word.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from secrets import token_hex
from typing import Final

import structlog
from soma.cognition.v1 import cognition_service_pb2 as cognition
from soma.common.v1 import error_reason_pb2 as reasons

from services.cognition.application.ports import Outbox, Outgoing
from services.cognition.application.run_turn import TurnRunner
from services.cognition.application.running_turn import RunningTurn
from soma_common.errors import (
    Conflict,
    FailedPrecondition,
    ResourceExhausted,
    SomaError,
    Unavailable,
    reason_name,
    to_proto,
)
from soma_common.gather import GatherClosed, GatherFull

PROTOCOL: Final = 1
"""The newest version of the RunTurns protocol this release speaks; it speaks no older one."""

SILENT_INTERVALS: Final = 4
"""A router that is silent for so many heartbeat intervals is taken for dead."""

_log = structlog.get_logger(__name__)


class Brain:
    """All streams and turns of this process.

    `max_turns` bounds the turns that run at once. Each router gets an equal share of it as credit, for as many
    `routers` as are expected; if more come, as in a rolling update, none is starved, and the bound itself declines
    what is too much. Made on the event loop it runs on.
    """

    def __init__(self, instance: str, runner: TurnRunner, *, max_turns: int, routers: int = 1) -> None:
        # A brain that was restarted is another brain: what a router remembers of the old one does not hold for it.
        self.name = f"{instance}-{token_hex(4)}"
        self.runner = runner
        self.loop = asyncio.get_running_loop()
        self.max_turns = max_turns
        self.draining = False
        self.turns: dict[bytes, RunningTurn] = {}
        self.unwinding: set[asyncio.Task[None]] = set()
        self._share = max(1, max_turns // max(1, routers))
        self._sessions: dict[str, RouterSession] = {}
        self._idle = asyncio.Event()
        self._idle.set()

    def connect(self, router: str, protocol: int, outbox: Outbox) -> RouterSession:
        """Begins a router's stream, ending an older one of the same router: it connects again because that one is
        dead.

        Raises PROTOCOL_VERSION, PROTOCOL_ORDER for a nameless router, DRAINING.
        """
        if protocol < PROTOCOL:
            raise FailedPrecondition(
                reasons.ERROR_REASON_PROTOCOL_VERSION,
                f"the router speaks RunTurns up to version {protocol}, this brain speaks {PROTOCOL}: update the router",
                {"protocol": str(PROTOCOL)},
            )
        if not router:
            raise FailedPrecondition(reasons.ERROR_REASON_PROTOCOL_ORDER, "hello.router must name the router instance")
        if self.draining:
            raise _draining()
        older = self._sessions.get(router)
        if older is not None:
            older.close(Unavailable(reasons.ERROR_REASON_SERVICE_UNAVAILABLE, f"{router} has connected again"))
        session = RouterSession(self, router, outbox, self._share)
        self._sessions[router] = session
        _log.info("router.connected", router=router, credit=session.granted)
        return session

    def forget(self, session: RouterSession) -> None:
        """Takes a closed stream out."""
        if self._sessions.get(session.router) is session:
            del self._sessions[session.router]

    def begin(self, turn: RunningTurn) -> None:
        """Takes a turn in."""
        self.turns[turn.turn_id] = turn
        self._idle.clear()

    def end(self, turn: RunningTurn) -> None:
        """Takes a turn out, if it is still the one that counts."""
        if self.turns.get(turn.turn_id) is turn:
            del self.turns[turn.turn_id]
        if not self.turns:
            self._idle.set()

    async def drain(self, grace_s: float) -> None:
        """Takes nothing new, lets turns finish for `grace_s` seconds, hands back the rest, ends the streams."""
        self.draining = True
        for session in list(self._sessions.values()):
            session.send(cognition.RunTurnsResponse(draining=True))
        try:
            async with asyncio.timeout(grace_s):
                await self._idle.wait()
        except TimeoutError:
            _log.info("brain.hands_back", turns=len(self.turns))
        for turn in list(self.turns.values()):
            turn.session.decline(turn.turn_id, turn.dispatch, _draining())
            turn.cancel()
        for session in list(self._sessions.values()):
            session.close(None)
        if self.unwinding:
            await asyncio.wait(self.unwinding, timeout=1.0)


class RouterSession:
    """One router's stream. The adapter reads frames into it and writes what its outbox gathers; `close` is
    idempotent."""

    def __init__(self, brain: Brain, router: str, outbox: Outbox, granted: int) -> None:
        self.router = router
        self.granted = granted
        """Turns this router may run here at once."""
        self.running = 0
        """Turns of this router that run."""
        self.failure: SomaError | None = None
        """Why the stream was ended from this side; None: in order."""
        self.closed = asyncio.Event()
        self._brain = brain
        self._outbox = outbox
        self._silent_ticks = 0

    @property
    def behind(self) -> bool:
        """Whether so much waits to be written that text should wait at its source."""
        return len(self._outbox) > self._brain.max_turns

    def take(self, frame: cognition.RunTurnsRequest) -> None:
        """Takes a frame of the router. Never waits. Raises PROTOCOL_ORDER for a second hello.

        Stops and confirmed finals come first, as they make room for starts; a turn that is started and stopped in one
        frame does not run. Further inputs come last: they may be for a turn that is started in the same frame.
        """
        self._silent_ticks = 0
        if frame.HasField("hello"):
            raise FailedPrecondition(
                reasons.ERROR_REASON_PROTOCOL_ORDER, "hello belongs in the first frame of RunTurns and only there"
            )
        turns = self._brain.turns
        stopped: dict[bytes, int] = {}
        for stop in frame.stops:
            stopped[stop.turn_id] = stop.dispatch
            turn = turns.get(stop.turn_id)
            if turn is not None and turn.session is self and turn.dispatch <= stop.dispatch:
                turn.cancel()
        for confirm in frame.confirms:
            turn = turns.get(confirm.turn_id)
            if turn is not None and turn.session is self:
                turn.confirm(confirm.dispatch, confirm.step)
        for start in frame.starts:
            if not stopped or stopped.get(start.turn_id, 0) < start.dispatch:
                self._start(start)
        for more in frame.add_inputs:
            if stopped.get(more.turn_id, 0) < more.dispatch:
                self._add_inputs(more)

    def tick(self) -> None:
        """Called once per heartbeat interval: sends a heartbeat, and ends the stream of a router that is silent too
        long.

        Intervals are counted, not seconds: a brain that was frozen itself finds frames waiting when it wakes up, and
        must not take everybody else for dead.
        """
        self._silent_ticks += 1
        if self._silent_ticks > SILENT_INTERVALS:
            self.close(
                Unavailable(
                    reasons.ERROR_REASON_SERVICE_UNAVAILABLE,
                    f"no frame from {self.router} for {SILENT_INTERVALS} heartbeat intervals",
                )
            )
        else:
            self.send(cognition.RunTurnsResponse(heartbeat=True))

    def decline(self, turn_id: bytes, dispatch: int, error: SomaError) -> None:
        """Says that a turn does not run here (any more)."""
        self.send(cognition.StopTurn(turn_id=turn_id, dispatch=dispatch, error=to_proto(error)))

    def send(self, item: Outgoing) -> None:
        """Gathers an item for the next frame. A router that lets more pile up than its credits explain is cut off."""
        try:
            self._outbox.put(item)
        except GatherClosed:
            pass  # the stream has ended; its turns are being cancelled
        except GatherFull:
            self.close(
                ResourceExhausted(
                    reasons.ERROR_REASON_QUEUE_FULL,
                    f"{self.router} does not read what this brain sends",
                    retry_delay_s=1,
                )
            )

    def ended(self, turn: RunningTurn) -> None:
        """A turn is over: its credit is free again."""
        self.running -= 1
        self._brain.end(turn)

    def close(self, failure: SomaError | None) -> None:
        """Cancels every turn of this stream and ends it; what is gathered is still written if the router reads."""
        if self.closed.is_set():
            return
        self.closed.set()
        self.failure = failure
        cancelled = 0
        for turn in list(self._turns()):
            turn.cancel()
            cancelled += 1
        self._outbox.close()
        self._brain.forget(self)
        why = reason_name(failure.reason) if failure else "in order"
        _log.info("router.disconnected", router=self.router, turns_cancelled=cancelled, why=why)

    def _turns(self) -> Iterator[RunningTurn]:
        return (turn for turn in self._brain.turns.values() if turn.session is self)

    def _start(self, start: cognition.StartTurn) -> None:
        if self.closed.is_set():  # it was cut off in the middle of this frame
            return
        brain = self._brain
        older = brain.turns.get(start.turn_id)
        if older is not None:
            if older.dispatch >= start.dispatch:
                if older.session is not self:  # a router that lost the turn, or has not raised its dispatch
                    self.decline(start.turn_id, start.dispatch, _outdated(start, older.dispatch))
                return
            older.cancel()
        if brain.draining:
            self.decline(start.turn_id, start.dispatch, _draining())
        elif self.running >= self.granted or len(brain.turns) >= brain.max_turns:
            self.decline(start.turn_id, start.dispatch, _full(self.granted))
        else:
            self.running += 1
            turn = RunningTurn(self, start, brain.loop)
            brain.begin(turn)
            turn.launch(brain.runner, brain.unwinding)

    def _add_inputs(self, more: cognition.AddInputs) -> None:
        """Gives a turn further inputs. If that is not possible the turn is declined: started again it gets them all."""
        turn = self._brain.turns.get(more.turn_id)
        if turn is None or turn.session is not self or turn.dispatch < more.dispatch:
            self.decline(more.turn_id, more.dispatch, _not_here())
        elif turn.dispatch == more.dispatch and not turn.add_inputs(more.first, more.inputs):
            _log.error(
                "turn.inputs_missing",
                router=self.router,
                turn=more.turn_id.hex(),
                first=more.first,
                known=len(turn.inputs),
            )
            self.decline(more.turn_id, more.dispatch, _missing(more, len(turn.inputs)))
            turn.cancel()


def _draining() -> SomaError:
    return Unavailable(reasons.ERROR_REASON_DRAINING, "this brain is shutting down; start the turn on another one")


def _full(granted: int) -> SomaError:
    return ResourceExhausted(
        reasons.ERROR_REASON_QUEUE_FULL,
        f"this brain runs as many turns as it can; start one only while there is credit (of {granted})",
        {"credit": str(granted)},
        retry_delay_s=0.1,
    )


def _not_here() -> SomaError:
    return FailedPrecondition(
        reasons.ERROR_REASON_PROTOCOL_ORDER,
        "the turn that got further inputs does not run in this brain; start it again",
    )


def _missing(more: cognition.AddInputs, known: int) -> SomaError:
    return FailedPrecondition(
        reasons.ERROR_REASON_PROTOCOL_ORDER,
        f"further inputs of the turn came from number {more.first} on, this brain knows {known}: start the turn again",
        {"first": str(more.first), "known": str(known)},
    )


def _outdated(start: cognition.StartTurn, running: int) -> SomaError:
    return Conflict(
        reasons.ERROR_REASON_LEASE_LOST,
        f"dispatch {start.dispatch} of the turn came after dispatch {running}, which another router started",
        {"dispatch": str(running)},
    )
