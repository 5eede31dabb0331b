"""One turn that runs in this brain: its task, what it says to its router, and the confirmation it waits for.

record ----- proposes a step ----> confirm                    the step is journaled, the turn goes on
conclude --- proposes a final ---> confirm                    the turn is over, its credit free at once
             (the task ends)       add_inputs                 the final is not taken, a new task goes on
fail ------- proposes a failure, over
cancel       over without a word
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from functools import partial
from typing import Protocol

import structlog
from soma.cognition.v1 import cognition_service_pb2 as cognition
from soma.common.v1 import error_reason_pb2 as reasons
from soma.common.v1 import turn_pb2

from services.cognition.application.ports import GoOn, Outgoing
from services.cognition.application.run_turn import TurnRunner
from services.cognition.domain.turn import STEP_FORMAT, kind_of
from soma_common.errors import Internal, SomaError, to_proto
from soma_common.telemetry import spans
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

    __slots__ = (
        "_go_on",
        "_journaled",
        "_loop",
        "_over",
        "_proposed",
        "_start",
        "_taken",
        "_task",
        "_unwinding",
        "dispatch",
        "inputs",
        "session",
        "turn_id",
    )

    def __init__(self, session: TurnOwner, start: cognition.StartTurn, loop: asyncio.AbstractEventLoop) -> None:
        self.session = session
        self.turn_id = start.turn_id
        self.dispatch = start.dispatch
        self.inputs = list(start.inputs)
        """The messages the turn answers, as far as they have come."""
        self._start = start
        self._loop = loop
        self._journaled = len(start.journal)
        self._proposed = 0
        self._go_on: GoOn | None = None  # what is to be done if the final, which is proposed, is not taken
        self._taken: asyncio.Future[None] | None = None  # done when the router has taken the step that is proposed
        self._over = False
        self._task: asyncio.Task[None] | None = None
        self._unwinding: set[asyncio.Task[None]] = set()
        if start.traceparent:
            spans.follow(start.traceparent, start.turn_id)

    def launch(self, runner: TurnRunner, unwinding: set[asyncio.Task[None]]) -> None:
        """Starts to run. `unwinding` keeps the task while it ends after a cancel."""
        self._unwinding = unwinding
        self._task = self._loop.create_task(self._run(partial(runner.run, self._start, self)))

    def confirm(self, dispatch: int, step: int) -> None:
        """The router has journaled a step. One that was not proposed is of another dispatch, or late: ignored."""
        if dispatch != self.dispatch or step != self._proposed or self._over:
            return
        if self._go_on is not None:
            self._finish()  # its credit is free: the router may use it in this very frame
            return
        taken = self._taken
        if taken is not None and not taken.done():
            self._journaled = step
            taken.set_result(None)

    def add_inputs(self, first: int, inputs: Sequence[bytes]) -> bool:
        """Takes further inputs, the first of them being number `first` from 0; those that are there already are not
        taken twice. False if some are missing in between.

        A final that waits for its confirmation has not read them, so it will never be journaled.
        """
        if first > len(self.inputs):
            return False
        further = inputs[len(self.inputs) - first :]
        self.inputs.extend(further)
        if further and self._go_on is not None:
            work, self._go_on = self._go_on, None
            self._proposed = 0  # a late word about the final counts no more
            self._task = self._loop.create_task(self._run(work))
        return True

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
        taken = self._taken = self._loop.create_future()
        self._proposed = step
        self._send(step, kind_of(body), body, call_count=len(body.model_reply.tool_calls))
        await taken

    def conclude(self, step: int, body: turn_pb2.StepBody, inputs_seen: int, go_on: GoOn) -> bool:
        """Proposes the final, for which no task has to wait: the turn is over when it is confirmed. False if the turn
        has inputs beyond `inputs_seen`; if they come before the confirmation, it goes on with `go_on`."""
        if inputs_seen < len(self.inputs):
            return False
        self._go_on = go_on
        self._proposed = step
        answer = body.final.message.SerializeToString()
        self._send(step, cognition.STEP_KIND_FINAL, body, answer=answer, inputs_seen=inputs_seen)
        return True

    def fail(self, step: int, body: turn_pb2.StepBody) -> None:
        """Proposes a failure and forgets the turn: the router takes it whatever was read, and if it cannot journal it,
        starts the turn again."""
        if self._over:
            return
        self._send(step, cognition.STEP_KIND_FAILURE, body, answer=body.failure.SerializeToString())
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

    async def _run(self, work: GoOn) -> None:
        if self._start.traceparent:  # without one, the calls of this turn belong to the stream's trace
            set_trace(parse_traceparent(self._start.traceparent))
            if spans.watched:
                spans.stage("cognition.wait", (self.turn_id,))
        try:
            await work()
            if not self._over and self._go_on is None:
                # Its journal has its last step already. To decline it would only make the router start it elsewhere;
                # left alone it counts as stuck there, and is set aside if that goes on.
                _log.error("turn.had_ended", turn=self.turn_id.hex(), tenant=self._start.session.tenant)
        except Exception:  # noqa: BLE001 - boundary: a defect ends its turn with a typed error, not the stream
            _log.exception("turn.defect", turn=self.turn_id.hex(), tenant=self._start.session.tenant)
            self.fail(self._journaled + 1, _defect())
        finally:
            if not self._over and self._go_on is None:
                self._finish()

    def _send(
        self,
        step: int,
        kind: cognition.StepKind.ValueType,
        body: turn_pb2.StepBody,
        *,
        call_count: int = 0,
        answer: bytes = b"",
        inputs_seen: int = 0,
    ) -> None:
        if self._over:
            return
        if spans.watched:
            spans.stage("cognition.step", (self.turn_id,))
        self.session.send(
            cognition.Proposal(
                turn_id=self.turn_id,
                dispatch=self.dispatch,
                step=step,
                kind=kind,
                body=body.SerializeToString(),
                answer=answer,
                inputs_seen=inputs_seen,
                call_count=call_count,
            )
        )

    def _finish(self) -> None:
        self._over = True
        self._go_on = None  # it refers to this turn
        if spans.watched:
            spans.stage("cognition.confirm", (self.turn_id,), last=True)
        self.session.ended(self)


def _defect() -> turn_pb2.StepBody:
    error = Internal(reasons.ERROR_REASON_INTERNAL, "the brain failed while it ran this turn; its log says more")
    return turn_pb2.StepBody(format=STEP_FORMAT, failure=to_proto(error))
