"""The tasks that undo turns: how many, how long, and what holds them up. A store in memory."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest

from services.toolgw.application import run_reversals
from services.toolgw.application.run_reversals import ReversalRuns
from services.toolgw.application.run_tool import Bounds
from services.toolgw.domain import refusals
from services.toolgw.domain.reversal import Reversal, StoppedTurn, Undoing
from soma_common.errors import ResourceExhausted, Unavailable

DONE = Undoing(Reversal.REVERTED, ("k1",))


def turn(number: int, tenant: str = "demo") -> StoppedTurn:
    return StoppedTurn(tenant, "helper", "chat", "s-1", f"{number:032x}")


class Claims:
    """Gives every claim, unless it is another's or the database is away."""

    def __init__(self) -> None:
        self.is_anothers = False
        self.away = 0
        self.asked = 0
        self.released: list[StoppedTurn] = []
        self.left: list[StoppedTurn] = []

    async def claim_reversal(self, turn: StoppedTurn) -> bool:
        self.asked += 1
        if self.away:
            self.away -= 1
            raise refusals.lease_not_held()
        return not self.is_anothers

    async def release_reversal(self, turn: StoppedTurn) -> None:
        self.released.append(turn)

    async def left_reversals(self, bounds: Bounds) -> Sequence[StoppedTurn]:
        return self.left


class Work:
    """Work that goes on when it is told to."""

    def __init__(self) -> None:
        self.began = 0
        self.may_end = asyncio.Event()

    async def __call__(self) -> Undoing:
        self.began += 1
        await self.may_end.wait()
        return DONE


@pytest.fixture
def claims(monkeypatch: pytest.MonkeyPatch) -> Claims:
    monkeypatch.setattr(run_reversals, "FIRST_PAUSE_S", 0.001)
    return Claims()


async def test_a_caller_that_leaves_does_not_end_it(claims: Claims) -> None:
    runs, work = ReversalRuns(claims, Bounds(9, 9)), Work()
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.01):
            await asyncio.wait([runs.begin(turn(1), work)])
    found = runs.find(turn(1))
    assert found is not None
    work.may_end.set()
    assert await found == DONE
    assert runs.find(turn(1)) is None
    assert (work.began, claims.asked) == (1, 1)


async def test_as_many_as_may_be(claims: Claims) -> None:
    runs, work = ReversalRuns(claims, Bounds(of_process=3, of_tenant=2)), Work()
    begun = [runs.begin(turn(number), work) for number in (1, 2)]
    with pytest.raises(ResourceExhausted, match="tenant demo"):
        runs.begin(turn(3), work)
    begun.append(runs.begin(turn(1, "acme"), work))
    with pytest.raises(ResourceExhausted, match="this instance"):
        runs.begin(turn(2, "acme"), work)
    work.may_end.set()
    assert await asyncio.gather(*begun) == [DONE] * 3
    assert await runs.begin(turn(3), work) == DONE


async def test_what_is_anothers_is_not_worked_on(claims: Claims) -> None:
    claims.is_anothers = True
    work = Work()
    assert await ReversalRuns(claims, Bounds(9, 9)).begin(turn(1), work) is None
    assert work.began == 0


async def test_it_waits_for_the_database_and_for_places(claims: Claims) -> None:
    claims.away = 2
    troubles: list[Exception] = [refusals.too_many_runs("tenant demo", 64), refusals.lease_not_held()]

    async def work() -> Undoing:
        if troubles:
            raise troubles.pop()
        return DONE

    assert await ReversalRuns(claims, Bounds(9, 9)).begin(turn(1), work) == DONE
    assert claims.asked == 3
    assert claims.released == []


async def test_a_defect_gives_the_claim_back(claims: Claims) -> None:
    async def work() -> Undoing:
        raise KeyError("defect")

    runs = ReversalRuns(claims, Bounds(9, 9))
    with pytest.raises(KeyError):
        await runs.begin(turn(1), work)
    assert claims.released == [turn(1)]
    assert runs.find(turn(1)) is None


async def test_a_drain_ends_all_and_begins_none(claims: Claims) -> None:
    runs, work = ReversalRuns(claims, Bounds(9, 9)), Work()
    begun = runs.begin(turn(1), work)
    await asyncio.sleep(0)
    async with asyncio.timeout(1.0):
        await runs.drain()
    assert begun.cancelled()
    assert claims.released == [], "its lease says that it is gone"
    with pytest.raises(Unavailable):
        runs.begin(turn(2), work)


async def test_what_runs_here_is_not_left_behind(claims: Claims) -> None:
    runs, work = ReversalRuns(claims, Bounds(9, 9)), Work()
    claims.left = [turn(1), turn(2)]
    begun = runs.begin(turn(1), work)
    assert list(await runs.left_behind()) == [turn(2)]
    work.may_end.set()
    await begun
