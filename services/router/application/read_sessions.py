"""What the API shows of sessions, messages, turns and steps, as rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Protocol


@dataclass(frozen=True, slots=True)
class SessionRow:
    """A session as stored."""

    session_id: bytes
    tenant: str
    agent: str
    channel: str
    session: str
    create_time: datetime
    update_time: datetime
    message_count: int
    turn_count: int
    delivery_count: int
    done_position: int
    last_position: int
    paused: bool
    running_turn: bytes | None
    queued_count: int
    oldest_queued_time: datetime | None
    undelivered_count: int


@dataclass(frozen=True, slots=True)
class MessageRow:
    """An accepted message as stored; content is a serialized Message."""

    position: int
    message_id: bytes
    accept_ms: int
    content: bytes
    policy: int
    turn_id: bytes | None
    outcome: int | None
    queue_position: int
    """Place among those that wait, from 1; 0: it does not wait."""
    age_ms: int


@dataclass(frozen=True, slots=True)
class TurnRow:
    """A turn as stored; `last_body` is the serialized StepBody of its final or failure."""

    turn_id: bytes
    session_id: bytes
    number: int
    status: int
    outcome: int
    dispatch: int
    agent_revision: str
    create_time: datetime
    end_time: datetime | None
    stopping: int
    tenant: str
    agent: str
    channel: str
    session: str
    step_count: int
    message_ids: Sequence[bytes]
    last_body: bytes | None


@dataclass(frozen=True, slots=True)
class StepRow:
    """A journaled step; body is a serialized StepBody."""

    step: int
    dispatch: int
    create_time: datetime
    body: bytes


class SessionReader(Protocol):
    """Reads for the API. All raise StoreLost."""

    async def session(self, tenant: str, session_id: bytes) -> SessionRow | None:
        """One session."""

    async def sessions(
        self,
        tenant: str,
        agent: str | None,
        channel: str | None,
        busy: bool | None,
        after: tuple[str, str, str],
        limit: int,
    ) -> list[SessionRow]:
        """Sessions of a tenant by (agent, channel, session), beyond a place in that order."""

    async def messages(self, tenant: str, session_id: bytes, after: int, limit: int) -> list[MessageRow]:
        """Messages of a session beyond a position, in the order accepted."""

    async def control_done(self, tenant: str, message_id: bytes) -> bool | None:
        """Whether a control is done with; None if it is not in the mailbox."""

    async def waits(self, tenant: str, session_id: bytes, turn_id: bytes) -> bool:
        """Whether the turn is that of a message that waits in its session: no turn yet."""

    async def turn(self, tenant: str, turn_id: bytes) -> TurnRow | None:
        """One turn."""

    async def session_turns(
        self, tenant: str, session_id: bytes, status: int | None, after: int, limit: int
    ) -> list[TurnRow]:
        """Turns of a session in order, beyond a number."""

    async def tenant_turns(
        self, tenant: str, status: int | None, before: tuple[datetime, bytes] | None, limit: int
    ) -> list[TurnRow]:
        """Turns of a tenant, newest first, before a place in that order."""

    async def steps(self, tenant: str, turn_id: bytes, after: int, limit: int) -> list[StepRow]:
        """Steps of a turn in order, beyond a number."""
