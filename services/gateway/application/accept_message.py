"""Takes a message or cancel in: known tenant and agent, rules kept, queued for its lane.

The receipt comes later, through the sink, once the item is durable. Refusals known at once are raised.
"""

from __future__ import annotations

from collections.abc import Callable

from soma.common.v1.message_pb2 import Message
from soma.router.v1.inbound_pb2 import Inbound

from services.gateway.application.ports import Directory, Sink
from services.gateway.application.write_lanes import LaneWriters
from services.gateway.domain.admission import Submission, admit_cancel, admit_message, stored_content
from services.gateway.domain.mailbox_bounds import MailboxBounds
from soma_common import ids
from soma_common.layout import LaneLayout
from soma_common.telemetry import spans
from soma_common.telemetry.trace import new_trace


class AcceptMessage:
    """The only way of an item into the system."""

    def __init__(
        self,
        directory: Directory,
        writers: LaneWriters,
        mailboxes: MailboxBounds,
        layout: LaneLayout,
        *,
        max_content_bytes: int,
        now_ms: Callable[[], int],
        trace_every: int = 0,
    ) -> None:
        """Of messages that come without a trace every `trace_every`-th gets one that is sampled; 0: none."""
        self._directory = directory
        self._writers = writers
        self._mailboxes = mailboxes
        self._layout = layout
        self._max_content_bytes = max_content_bytes
        self._now_ms = now_ms
        self._trace_every = self._until_traced = trace_every

    def message(self, submission: Submission, message: Message, sink: Sink, ref: int) -> int:
        """Queues a message. Returns the bytes it counts for until the sink is told.

        Raises:
            Refused: not stored; the sink is not told.
        """
        self._directory.check_agent(submission.tenant, submission.agent)
        # First what needs no look at the message: a flood is refused at little cost.
        self._mailboxes.check_tenant(submission.tenant)
        self._writers.check_room(submission.tenant)
        inbound = admit_message(
            submission, message, self._layout, max_content_bytes=self._max_content_bytes, now_ms=self._now_ms()
        )
        self._mailboxes.check_session(submission.tenant, inbound.session_id)
        if not inbound.traceparent and self._trace_every:
            self._until_traced -= 1
            if not self._until_traced:
                self._until_traced = self._trace_every
                inbound.traceparent = str(new_trace(sampled=True))
        if inbound.traceparent:
            spans.follow_message(inbound.traceparent, inbound.session_id, inbound.message_id)
        return self._queue(submission.tenant, inbound, sink, ref)

    def cancel(self, submission: Submission, turn_id: bytes, sink: Sink, ref: int) -> int:
        """Queues a cancel behind the messages accepted before it. Also for agents that are suspended or gone, and for
        sessions and tenants for which too much waits: it makes that less.

        Raises:
            Refused: not stored; the sink is not told.
        """
        self._directory.check_tenant(submission.tenant)
        inbound = admit_cancel(submission, turn_id, self._layout, now_ms=self._now_ms())
        return self._queue(submission.tenant, inbound, sink, ref)

    def ids_of(self, submission: Submission, message: Message) -> tuple[bytes, bytes]:
        """The id that a message has once it is stored, and the hash of its content."""
        return submission.message_id(self._layout), ids.content_hash(stored_content(message))

    def _queue(self, tenant: str, inbound: Inbound, sink: Sink, ref: int) -> int:
        return self._writers.put(tenant, self._layout.lane_of(inbound.session_id), inbound, sink, ref)
