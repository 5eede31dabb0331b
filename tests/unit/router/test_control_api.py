"""Controls of sessions as the API takes them: each is stored, and answered once it holds."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any, cast

import pytest
from soma.router.v1.inbound_pb2 import InboundKind
from soma.router.v1.session_service_pb2 import CancelSessionRequest, PauseSessionRequest, ResumeSessionRequest
from soma.router.v1.turn_service_pb2 import CancelTurnRequest, InterruptTurnRequest

from services.router.adapters import control_grpc
from services.router.adapters.api_grpc import SessionApi, TurnApi
from services.router.application.read_sessions import SessionRow, TurnRow
from services.router.domain.turn import Outcome
from soma_common.errors import NotFound, Unavailable
from soma_common.ids import SessionName, TurnName

NAME = SessionName("demo", "echo", "line", "s")
WAITING = b"w" * 16


class Session:
    """The lane and the store of one session. Its owner applies controls while `owned`."""

    def __init__(self) -> None:
        self.lane: list[tuple[str, InboundKind.ValueType]] = []
        self.applied = 0
        self.paused = False
        self.owned = True
        self.api = SessionApi(cast(Any, self), cast(Any, self), cast(Any, None))

    async def control(
        self, name: SessionName, kind: InboundKind.ValueType, request_id: str, target: bytes = b""
    ) -> bytes:
        if (request_id, kind) not in self.lane:
            self.lane.append((request_id, kind))
        return f"{request_id}/{kind}".encode()

    def work(self) -> None:
        if self.owned:
            for _, kind in self.lane[self.applied :]:
                if kind in (InboundKind.INBOUND_KIND_PAUSE, InboundKind.INBOUND_KIND_RESUME):
                    self.paused = kind == InboundKind.INBOUND_KIND_PAUSE
            self.applied = len(self.lane)

    async def control_done(self, tenant: str, message_id: bytes) -> bool | None:
        self.work()
        done = message_id.decode() in [f"{key}/{kind}" for key, kind in self.lane[: self.applied]]
        return True if done else None

    async def session(self, tenant: str, session_id: bytes) -> SessionRow:
        self.work()
        now = datetime.now(UTC)
        return SessionRow(NAME.id, "demo", "echo", "line", "s", now, now, 0, 0, 0, 0, 0, self.paused, None, 0, None, 0)

    async def turn(self, tenant: str, turn_id: bytes) -> TurnRow | None:
        self.work()
        if not self.applied:
            return None
        now = datetime.now(UTC)
        key = ("demo", "echo", "line", "s")
        return TurnRow(turn_id, NAME.id, 1, 3, 4, 1, "", now, now, 0, *key, 0, (), None)

    async def waits(self, tenant: str, session_id: bytes, turn_id: bytes) -> bool:
        return turn_id == WAITING and not self.applied

    async def pause(self, key: str = "") -> bool:
        answer = await self.api.PauseSession(PauseSessionRequest(name=str(NAME), request_id=key), cast(Any, None))
        return answer.session.paused

    async def resume(self, key: str = "") -> bool:
        answer = await self.api.ResumeSession(ResumeSessionRequest(name=str(NAME), request_id=key), cast(Any, None))
        return answer.session.paused


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(control_grpc, "_WAIT_S", 0.0)
    monkeypatch.setattr(control_grpc, "_POLL_S", 0.0)


async def test_a_pause_comes_after_a_resume_that_is_still_on_its_way() -> None:
    session = Session()
    session.paused, session.owned = True, False
    with pytest.raises(Unavailable):
        await session.resume()
    with pytest.raises(Unavailable):
        await session.pause()  # it is paused as yet, and will not be once the resume is applied
    session.owned = True
    session.work()
    assert session.paused


async def test_the_retry_of_a_pause_that_was_taken_back_since_is_answered() -> None:
    session = Session()
    assert await session.pause("one")
    assert not await session.resume("two")
    assert not await session.pause("one"), "the same request: it was applied, and changes nothing any more"


async def test_a_cancel_that_is_not_stored_yet_is_not_answered() -> None:
    session = Session()
    session.owned = False
    with pytest.raises(Unavailable):
        await session.api.CancelSession(CancelSessionRequest(name=str(NAME)), cast(Any, None))
    assert [kind for _, kind in session.lane] == [InboundKind.INBOUND_KIND_CANCEL_ALL]


async def test_a_message_that_waits_is_cancelled_by_the_name_of_its_turn() -> None:
    session = Session()
    turns = TurnApi(cast(Any, session), cast(Any, session), cast(Any, None))
    name = str(TurnName(NAME, WAITING))
    with pytest.raises(NotFound):
        await turns.CancelTurn(CancelTurnRequest(name=str(TurnName(NAME, b"n" * 16))), cast(Any, None))
    with pytest.raises(NotFound):
        await turns.InterruptTurn(InterruptTurnRequest(name=name), cast(Any, None))
    answer = await turns.CancelTurn(CancelTurnRequest(name=name), cast(Any, None))
    assert int(answer.turn.outcome) == Outcome.CANCELLED
    assert [kind for _, kind in session.lane] == [InboundKind.INBOUND_KIND_CANCEL]
