"""One turn that runs in this brain: its task, what it says to its router, and the confirmation it waits for."""

from __future__ import annotations

import asyncio
from typing import Protocol

import structlog
from soma.cognition.v1 import cognition_service_pb2 as cognition
from soma.common.v1 import error_reason_pb2 as reasons
from soma.common.v1 import turn_pb2

from services.cognition.application.ports import Outgoing
from services.cognition.application.run_turn import TurnRunner
from services.cognition.domain.turn import STEP_FORMAT, kind_of
from soma_common.errors import Internal, SomaError, to_proto
from soma_common.telemetry.trace import parse_traceparent, set_trace

_log = structlog.get_logger(__name__)


class TurnOwner(Protocol):
    """The stream a turn came by."""

    @property
    def behind(self) -> bool:
        """Whether text should wait at its source."""
        ...

    def send(self, item: Outgoing) -> None:
        """Sends an item to the router, never waits."""
        ...

    def decline(self, turn_id: bytes, dispatch: int, error: SomaError) -> None:
        """Says that a turn does not run here (any more)."""
        ...

    def ended(self, turn: RunningTurn) -> None:
        """A turn is over."""
        ...


class RunningTurn:
    """One running turn and its voice towards the router (the port `Journal`)."""

    __slots__ = ("_confirmed", "_over", "_proposed", "_start", "_task", "_unwinding", "dispatch", "session", "turn_id")

    def __init__(self, session: TurnOwner, start: cognition.StartTurn) -> None:
        self.session = session
        self.turn_id = start.turn_id
        self.dispatch = start.dispatch
        self._start = start
        self._confirmed: asyncio.Future[None] | None = None
        self._proposed = 0
        self._over = False
        self._task: asyncio.Task[None] | None = None
        self._unwinding: set[asyncio.Task[None]] = set()

    def launch(self, runner: TurnRunner, loop: asyncio.AbstractEventLoop, unwinding: set[asyncio.Task[None]]) -> None:
        """Starts to run. `unwinding` keeps the task while it ends after a cancel."""
        self._unwinding = unwinding
        self._task = loop.create_task(self._run(runner))

    def confirm(self, dispatch: int, step: int) -> None:
        """The router has journaled a step. One that was not proposed is of another dispatch, or late: ignored."""
        confirmed = self._confirmed
        if dispatch == self.dispatch and step == self._proposed and confirmed is not None and not confirmed.done():
            confirmed.set_result(None)

    def cancel(self) -> None:
        """Stops at once and says nothing more; its credit is free."""
        if self._over:
            return
        self._finish()
        task = self._task
        if task is not None and not task.done():
            task.cancel()
            # Unwinding may take a moment (a connection to a model is closed); nobody else holds the task until then.
            self._unwinding.add(task)
            task.add_done_callback(self._unwinding.discard)

    async def record(self, step: int, body: turn_pb2.StepBody) -> None:
        """Proposes a step and returns when it is journaled. However long that takes: the database may be away."""
        calls = len(body.model_reply.tool_calls)
        self._confirmed = asyncio.get_running_loop().create_future()
        self._proposed = step
        self._propose(
            cognition.Proposal(
                turn_id=self.turn_id,
                dispatch=self.dispatch,
                step=step,
                kind=kind_of(body),
                body=body.SerializeToString(),
                call_count=calls,
            )
        )
        await self._confirmed

    def end(self, step: int, body: turn_pb2.StepBody, inputs_seen: int) -> None:
        """Proposes the last step and forgets the turn: if it is not journaled, the router starts the turn again."""
        is_final = body.WhichOneof("body") == "final"
        answer = body.final.message if is_final else body.failure
        self._propose(
            cognition.Proposal(
                turn_id=self.turn_id,
                dispatch=self.dispatch,
                step=step,
                kind=cognition.STEP_KIND_FINAL if is_final else cognition.STEP_KIND_FAILURE,
                body=body.SerializeToString(),
                answer=answer.SerializeToString(),
                inputs_seen=inputs_seen,
            )
        )
        if not self._over:
            self._finish()

    def show(self, step: int, offset: int, text: str) -> bool:
        """Sends text of the running step; False if the router is behind and wants it later."""
        if self._over:
            return True
        if self.session.behind:
            return False
        self.session.send(
            cognition.TurnText(turn_id=self.turn_id, dispatch=self.dispatch, step=step, offset=offset, text=text)
        )
        return True

    async def _run(self, runner: TurnRunner) -> None:
        if self._start.traceparent:  # without one, the calls of this turn belong to the stream's trace
            set_trace(parse_traceparent(self._start.traceparent))
        try:
            await runner.run(self._start, self)
            if not self._over:
                # Its journal has its last step already. To decline it would only make the router start it elsewhere;
                # left alone it counts as stuck there, and is set aside if that goes on.
                _log.error("turn.had_ended", turn=self.turn_id.hex(), tenant=self._start.session.tenant)
        except Exception:  # noqa: BLE001 - boundary: a defect ends its turn with a typed error, not the stream
            _log.exception("turn.defect", turn=self.turn_id.hex(), tenant=self._start.session.tenant)
            if not self._over:
                self.end(max(self._proposed, len(self._start.journal)) + 1, _defect(), 0)
        finally:
            if not self._over:
                self._finish()

    def _propose(self, proposal: cognition.Proposal) -> None:
        if not self._over:
            self.session.send(proposal)

    def _finish(self) -> None:
        self._over = True
        self.session.ended(self)


def _defect() -> turn_pb2.StepBody:
    error = Internal(reasons.ERROR_REASON_INTERNAL, "the brain failed while it ran this turn; its log says more")
    return turn_pb2.StepBody(format=STEP_FORMAT, failure=to_proto(error))
