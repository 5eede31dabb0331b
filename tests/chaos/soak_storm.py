"""Makes the faults of a plan happen to a running stack, each at its time, and undoes them all at the end."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from contextlib import suppress

from tests.chaos.fault_proxy import FaultLink
from tests.chaos.load import Load
from tests.chaos.soak_plan import Fault, Round
from tests.chaos.stack import FaultyStack

FAILPOINT_WITHIN_S = 5.0


class Storm:
    """The faults of one round. `struck` counts those that happened, by kind and where."""

    def __init__(self, stack: FaultyStack, load: Load) -> None:
        self._stack, self._load = stack, load
        self.struck: Counter[tuple[str, str]] = Counter()
        self._do: dict[str, Callable[[Fault], Awaitable[None]]] = {
            "kill": self._kill,
            "freeze": self._freeze,
            "failpoint": self._failpoint,
            "cut": self._cut,
            "refuse": self._refuse,
            "delay": self._delay,
            "blackhole": self._blackhole,
            "one-way": self._one_way,
            "deaf": self._deaf,
            "adapter": self._adapter,
        }

    async def rage(self, planned: Round) -> None:
        """One fault after the other, some while others last; at the end everything is up, awake and connected."""
        began = time.monotonic()
        faults: list[asyncio.Task[None]] = []
        for fault in planned.faults:
            await asyncio.sleep(began + fault.at_s - time.monotonic())
            faults.append(asyncio.create_task(self._strike(fault), name=str(fault)))
        await asyncio.sleep(began + planned.seconds - time.monotonic())
        await asyncio.gather(*faults)
        await self.calm()

    async def calm(self) -> None:
        """Everything is up, awake and connected again."""
        if self._stack.proxy is not None:
            self._stack.proxy.heal()
        for part in self._stack.parts:
            self._stack.let_up(part)
            await self._stack.is_up(part)

    async def _strike(self, fault: Fault) -> None:
        self.struck[fault.kind, _kind_of(fault)] += 1
        await self._do[fault.kind](fault)

    async def _kill(self, fault: Fault) -> None:
        await self._stack.is_up(fault.where)
        await self._stack.kill9(fault.where)

    async def _freeze(self, fault: Fault) -> None:
        await self._stack.is_up(fault.where)
        self._stack.freeze(fault.where)
        await asyncio.sleep(fault.for_s)
        self._stack.thaw(fault.where)

    async def _failpoint(self, fault: Fault) -> None:
        await self._stack.is_up(fault.where)
        await self._stack.arm(fault.where, fault.detail)
        self._stack.expect_death(fault.where)
        with suppress(TimeoutError):  # Not every point is reached in every load.
            async with asyncio.timeout(FAILPOINT_WITHIN_S):
                await self._stack.process(fault.where).ended()

    def _link(self, fault: Fault) -> FaultLink:
        return self._stack.link(*fault.where.split("->"))

    async def _cut(self, fault: Fault) -> None:
        self._link(fault).cut()

    async def _refuse(self, fault: Fault) -> None:
        self._link(fault).cut(refuse=True)
        await self._heal_after(fault)

    async def _delay(self, fault: Fault) -> None:
        self._link(fault).delay(float(fault.detail.removesuffix(" ms")))
        await self._heal_after(fault)

    async def _blackhole(self, fault: Fault) -> None:
        self._link(fault).blackhole()
        await self._heal_after(fault)

    async def _one_way(self, fault: Fault) -> None:
        self._link(fault).blackhole(there=fault.detail == "there", back=fault.detail == "back")
        await self._heal_after(fault)

    async def _heal_after(self, fault: Fault) -> None:
        await asyncio.sleep(fault.for_s)
        self._link(fault).heal()

    async def _deaf(self, fault: Fault) -> None:
        await self._load.disconnect(fault.where)
        await asyncio.sleep(fault.for_s)
        await self._load.connect(fault.where)

    async def _adapter(self, fault: Fault) -> None:
        await self._load.join(fault.where)
        await asyncio.sleep(fault.for_s)
        await self._load.leave(fault.where)


def _kind_of(fault: Fault) -> str:
    """Where a fault strikes, without the numbers of replicas: `router`, `router->postgres`, `tenant`."""
    if fault.kind in ("deaf", "adapter"):
        return "tenant"
    return "->".join(name.rpartition("-")[0] or name for name in fault.where.split("->"))
