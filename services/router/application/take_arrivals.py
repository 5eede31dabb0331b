"""Messages as they arrive: each waits in its session's line, ends at once, becomes an input of the turn that runs, or
stops it. What its policy says is decided here; `domain/arrival.py` has the rules.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import TYPE_CHECKING, Any, Final

import structlog
from soma.common.v1.error_reason_pb2 import ErrorReason
from soma.common.v1.message_pb2 import Error
from soma.common.v1.turn_pb2 import Delivery, StepBody

from services.router.application.dispatch_turns import RETRY_S
from services.router.application.group import StoreLost
from services.router.application.items import InputItem
from services.router.application.outcomes import EndItem, RefusalItem
from services.router.application.stop_turns import Stopper
from services.router.domain.arrival import STOPS, Arrival, Policy, arrival_of, due_in_s, may_join
from services.router.domain.session import QueuedMessage, Session, Turn
from services.router.domain.turn import Outcome, TurnStatus
from soma_common import ids
from soma_common.clock import monotonic
from soma_common.telemetry.metrics import counter

if TYPE_CHECKING:
    from services.router.application.commit_group import GroupCommitter
    from services.router.application.ports import HistoryStore
    from services.router.application.state import RouterState
    from services.router.application.watch_turns import LiveDesk

log = structlog.get_logger(__name__)

_STEP_FORMAT: Final = 1

JOINED = counter("soma_router_steered_total", "Messages that became an input of a turn that ran.")
REFUSED = counter("soma_router_refused_total", "Messages refused because a turn of their session ran or waited.")


class Arrivals:
    """What happens to messages from their ingest to the turn that takes them. `refused` is told of those that end at
    once; `end_first` makes the end of a first waiting message that no brain is to see.
    """

    def __init__(
        self,
        state: RouterState,
        stopper: Stopper,
        history: HistoryStore,
        live: LiveDesk,
        spawn: Callable[[Coroutine[Any, Any, None]], None],
        refused: Callable[[RefusalItem], None],
        end_first: Callable[[Session], EndItem],
    ) -> None:
        self._state = state
        self._stopper = stopper
        self._history = history
        self._live = live
        self._spawn = spawn
        self._refused = refused
        self._end_first = end_first
        self.committer: GroupCommitter

    def arrive(self, session: Session, message: QueuedMessage) -> None:
        """A message is stored, and its session has no turn for it yet."""
        what = arrival_of(session, message)
        if what is Arrival.REFUSED:
            self._refuse(session, message)
            return
        message.stops = what is Arrival.STOPS
        self._state.enqueue(session, message)
        if session.turn is None:
            self.ready(session)
        elif message.stops or len(session.queue) == 1:
            self.meet(session)

    def restore(self, session: Session, message: QueuedMessage, came_later: bool) -> None:
        """A message that was found waiting by a new owner; `came_later`: after the running turn had begun. What stops a
        turn does so once: one that began later took what it could take.
        """
        what = arrival_of(session, message)
        if what is Arrival.REFUSED:
            self._refuse(session, message)
            return
        message.stops = what is Arrival.STOPS and came_later
        self._state.enqueue(session, message)

    def meet(self, session: Session) -> None:
        """What waits meets the turn that runs: it is stopped, or takes the first of what waits as further inputs."""
        turn = session.turn
        if turn is None or not session.queue or not self._state.runs(turn):
            return
        for message in session.queue:
            if message.stops:
                message.stops = False
                self._stop(turn, STOPS[Policy(message.policy)])
        joined = False
        while session.queue and may_join(turn, session.queue[0]):
            self._join(turn, self._state.dequeue(session))
            joined = True
        if joined:
            self._live.state(turn)

    def ready(self, session: Session) -> None:
        """Has the next turn of a session start when there is room, if one may start: not in a paused session, and not
        before what waits there has been waited for.
        """
        if session.turn is not None or not session.queue or session.partition.lost:
            return
        if session.queue[0].ends_alone:
            self.committer.put(self._end_first(session))
            return
        if session.paused:
            return
        now = monotonic()
        wait_s = due_in_s(session.queue, now)
        if wait_s > 0:
            if session.timer is not None:
                session.timer.cancel()
            session.timer = asyncio.get_running_loop().call_later(wait_s, self._due, session)
            return
        self._state.scheduler.add(session)
        self.committer.nudge()

    def _due(self, session: Session) -> None:
        session.timer = None
        self.ready(session)

    # ---- stopping

    def _stop(self, turn: Turn, outcome: Outcome) -> None:
        if turn.ending or turn.status is not TurnStatus.RUNNING:
            return  # its last step was first, or it stops already
        self._stopper.stop(turn, outcome)
        self.committer.put(self._stopper.item(turn))

    # ---- joining

    def _join(self, turn: Turn, message: QueuedMessage) -> None:
        # In memory at once: a final that has not seen it must not be taken from now on.
        turn.inputs.append(message)
        turn.deliver |= message.deliver
        JOINED.inc()
        self.committer.put(InputItem(turn.session.partition, turn, message.position, self._joined))

    def _joined(self, turn: Turn) -> None:
        if turn.link is None or not turn.inputs_told or not self._state.runs(turn):
            return  # whoever runs it next is given all its inputs
        told = turn.inputs_told
        new = turn.inputs[told:]
        if any(message.content is None for message in new):
            self._spawn(self._load_and_tell(turn, turn.dispatch))
        elif new:
            turn.inputs_told = len(turn.inputs)
            turn.link.add_inputs(turn.id, turn.dispatch, told, [message.content or b"" for message in new])

    async def _load_and_tell(self, turn: Turn, dispatch: int) -> None:
        """Reads the content of inputs that memory does not hold, then tells of them."""
        while self._state.runs(turn) and turn.dispatch == dispatch:
            missing = [message for message in turn.inputs if message.content is None]
            key, partition = turn.session.key, turn.session.partition
            try:
                contents = await self._history.contents(key.tenant, partition.id, [m.position for m in missing])
            except StoreLost:
                log.warning("router.load_failed", turn=turn.id.hex())
                await asyncio.sleep(RETRY_S)
                continue
            if not self._state.runs(turn):
                return  # rolled back, its inputs wait again and are counted without content
            for message in missing:
                message.content = contents[message.position]
            if turn.dispatch == dispatch:
                self._joined(turn)
            return

    # ---- refusing

    def _refuse(self, session: Session, message: QueuedMessage) -> None:
        running = session.turn.id if session.turn is not None else _turn_of(session, session.queue[0])
        key = session.key
        name = ids.TurnName(ids.SessionName(key.tenant, key.agent, key.channel, key.session), running)
        error = Error(
            reason=ErrorReason.ERROR_REASON_TURN_RUNNING,
            message=f"turn {running.hex()} of the session is not over; send again when it has ended, or under another"
            " policy",
            metadata={"turn": str(name)},
        )
        turn = Turn(_turn_of(session, message), session, 0, [message], "", message.deliver)
        body = StepBody(format=_STEP_FORMAT, failure=error).SerializeToString()
        session.refusing += 1
        self.committer.put(RefusalItem(session.partition, turn, body, Delivery(error=error), self._was_refused))

    def _was_refused(self, item: RefusalItem) -> None:
        REFUSED.inc()
        session = item.turn.session
        session.refusing -= 1
        if session.queue and not session.refusing:
            self.ready(session)
        elif session.idle:
            self._state.idle(session)
        item.partition.pending.discard(item.turn.inputs[0].position)
        self._live.ended(item.turn, item.answer)
        self._refused(item)


def _turn_of(session: Session, message: QueuedMessage) -> bytes:
    return ids.turn_id(session.id, message.message_id)
