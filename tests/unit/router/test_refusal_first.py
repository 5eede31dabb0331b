"""A refused message is over before a turn that came later is stored, however long the line of the committer."""

from __future__ import annotations

import asyncio

from services.router.application.group import Group, GroupResult
from services.router.domain.arrival import Policy
from tests.unit.router.engine import running_engine
from tests.unit.router.test_policies import message

MORE_THAN_A_GROUP = 3000


async def test_no_turn_is_stored_over_a_refusal_that_is_not() -> None:
    async with running_engine() as engine:
        order: list[str] = []
        commit, gate = engine.store.commit, asyncio.Event()

        async def watched(group: Group) -> GroupResult:
            result = await commit(group)
            order.extend(f"refused {row[4]}" for row in group.refusals)
            order.extend(f"started {row[5]}-{row[6]}" for row in group.turns)
            return result

        engine.store.commit = watched  # type: ignore[method-assign]
        engine.accept(message("1"))
        [start] = await engine.started(1)
        engine.store.gate = gate
        engine.accept(message("2"), message("3", Policy.REJECT), message("4", Policy.INTERRUPT))
        engine.answer(start, "one")
        for _ in range(MORE_THAN_A_GROUP):
            engine.accept(message("1"))  # a retry: nothing but the cursor moves
        gate.set()
        await engine.started(2)
        assert order == ["started 1-1", "refused 3", "started 2-4"]
