"""Keeps a stack's parts running: starts them in order, restarts the dead, replaces the frozen, stops them in order.

One task per part walks it through its phases; the task alone starts, checks and kills its part. What the commands need
to know about the stack stands in <home>/run/stack.json after every change.

The first start is strict: a part that cannot start ends the whole stack with its reason. Once the stack was ready,
a part that dies is started again for as long as it takes (see `restart`).
"""

import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator, Iterable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime

import structlog

from soma_common.embedded.process import PartFailed, ProcessIdentity
from somastack.auth_material import AuthMaterial
from somastack.home import Home
from somastack.layout import SERVICES, Layout
from somastack.parts import Part, Unresponsive, parts_of
from somastack.restart import RestartPolicy
from somastack.state import PartState, Phase, StackState

CHECK_EVERY_S = 10.0
REPLACE_AFTER_S = 60.0
"""A part that has not answered for so long is killed and started again."""
STRAY_END_WITHIN_S = 5.0
"""What processes of a killed supervisor get to end politely, at the next start."""

_log = structlog.get_logger()


@dataclass(frozen=True)
class StackOptions:
    """What kind of stack to run."""

    home: Home
    layout: Layout = field(default_factory=Layout)
    tenants: tuple[str, ...] = ("demo",)
    """Tenants whose channels get a token file."""
    overrides: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    """Further environment variables by instance (`router-0`) or service (`router`)."""
    module: str = "services.{service}.main"
    """The Python module that runs a service; tests put another in its place."""
    durable: bool = True
    """False only for tests: PostgreSQL does not fsync. Commits then survive a killed server, not a killed machine."""
    check_every_s: float = CHECK_EVERY_S
    replace_after_s: float = REPLACE_AFTER_S


class Supervisor:
    """A running stack. Made by `running_stack`, which also stops it."""

    def __init__(self, options: StackOptions, parts: Iterable[Part]) -> None:
        self._options = options
        self.parts = {part.name: part for part in parts}
        self._ready = {name: asyncio.Event() for name in self.parts}
        me = ProcessIdentity.of(os.getpid())
        if me is None:
            raise RuntimeError("this process cannot find itself in the process table")
        self.state = StackState(Phase.STARTING, _now(), me, options.layout.base)
        self.state.parts = [
            PartState(p.name, since=_now(), addresses=p.addresses, log=p.log) for p in self.parts.values()
        ]
        self._states = {state.name: state for state in self.state.parts}
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._was_ready = False

    async def start(self) -> None:
        """Start every part, each as soon as those it needs are ready.

        Raises:
            PartFailed: of the first part that could not start; the others are stopped again by `stop`.
        """
        self.state.save(self._options.home.state_file)
        self._tasks = {name: asyncio.create_task(self._keep(part), name=name) for name, part in self.parts.items()}
        everything = asyncio.create_task(_all(self._ready.values()))
        try:
            done, _ = await asyncio.wait([everything, *self._tasks.values()], return_when=asyncio.FIRST_COMPLETED)
        finally:
            everything.cancel()
        for task in done - {everything}:
            task.result()  # Keepers end only by failing.
        self._was_ready = True
        self._enter_stack(Phase.READY)
        _log.info("stack.ready", port_base=self.state.port_base, home=str(self._options.home.path))

    async def watch(self) -> None:
        """Wait for ever; raises what a keeper raises, which is a defect of ours."""
        await asyncio.gather(*self._tasks.values())

    async def stop(self) -> None:
        """Stop every part, rank by rank; within ten seconds whatever the parts do."""
        self._enter_stack(Phase.STOPPING)
        for task in self._tasks.values():
            task.cancel()
        await asyncio.gather(*self._tasks.values(), return_exceptions=True)
        for rank in sorted({part.stop_rank for part in self.parts.values()}):
            together = [part for part in self.parts.values() if part.stop_rank == rank]
            await asyncio.gather(*(self._stop_part(part) for part in together))
        self._enter_stack(Phase.STOPPED)
        _log.info("stack.stopped")

    async def _keep(self, part: Part) -> None:
        """Start the part, and start it again whenever it ends."""
        await _all(self._ready[name] for name in self._needed_by(part))
        policy = RestartPolicy()
        while True:
            ready_for_s = await self._live_once(part)
            delay_s = policy.delay_after(ready_for_s)
            state = self._states[part.name]
            state.restarts += 1
            self._enter(part, Phase.RESTARTING, state.trouble)
            _log.warning("part.restarting", part=part.name, why=state.trouble, delay_s=delay_s, restarts=state.restarts)
            await asyncio.sleep(delay_s)

    async def _live_once(self, part: Part) -> float:
        """One life of the part, from its start to its end; returns for how many seconds it was ready."""
        self._enter(part, Phase.STARTING)
        began = time.monotonic()
        failure = await self._started(part)
        if failure is not None:
            self._enter(part, Phase.FAILED, str(failure))
            if not self._was_ready:
                raise failure
            _log.error("part.start_failed", part=part.name, why=failure.message, advice=failure.advice)
            return 0.0
        self._enter(part, Phase.READY)
        self._ready[part.name].set()
        ready_at = time.monotonic()
        _log.info("part.ready", part=part.name, pid=_pid(part), took_s=round(ready_at - began, 2), **part.addresses)
        trouble = await self._until_it_ends(part)
        self._states[part.name].trouble = trouble
        return time.monotonic() - ready_at

    async def _started(self, part: Part) -> PartFailed | None:
        """Start the part; returns what went wrong, with nothing of the part left running, or None."""
        try:
            await part.start()
        except PartFailed as failed:
            failure = failed
        except Exception as error:  # noqa: BLE001 - boundary: no part may take the others with it
            _log.exception("part.start_crashed", part=part.name)
            failure = PartFailed(f"{part.name} could not be started: {error!r}", f"read {self._options.home.logs}")
        else:
            return None
        if part.process is not None:
            part.process.send(signal.SIGKILL)  # Too slow, perhaps, rather than dead.
            await part.process.ended()
        return failure

    async def _until_it_ends(self, part: Part) -> str:
        """Watch a part that is ready; returns why it ended. One that has been silent for too long is ended here."""
        process = part.process
        assert process is not None
        ended = asyncio.ensure_future(process.ended())
        silent = asyncio.create_task(self._until_silent_too_long(part))
        try:
            await asyncio.wait([ended, silent], return_when=asyncio.FIRST_COMPLETED)
            if ended.done():
                return _end_described(ended.result())
            process.send(signal.SIGKILL)
            await ended
            return f"{silent.result()} and was killed"
        finally:
            ended.cancel()
            silent.cancel()

    async def _until_silent_too_long(self, part: Part) -> str:
        """Ask the part for its health again and again; returns when it has not answered for too long."""
        answered_at = time.monotonic()
        while True:
            await asyncio.sleep(self._options.check_every_s)
            silence = await self._checked(part)
            silent_s = time.monotonic() - answered_at
            if not silence:
                answered_at = time.monotonic()
            elif silent_s > self._options.replace_after_s:
                return f"it did not answer for {silent_s:.0f} s ({silence})"

    async def _checked(self, part: Part) -> str:
        """Why the part does not answer; empty when it does."""
        try:
            await part.check()
        except Exception as error:  # noqa: BLE001 - boundary: whatever a check runs into, there was no answer
            silence = str(error) if isinstance(error, Unresponsive) else repr(error)
            if self._states[part.name].phase is Phase.READY:
                _log.warning("part.unresponsive", part=part.name, why=silence)
            self._enter(part, Phase.UNRESPONSIVE, silence)
            return silence
        if self._states[part.name].phase is Phase.UNRESPONSIVE:
            _log.info("part.answers_again", part=part.name)
            self._enter(part, Phase.READY)
        return ""

    async def _stop_part(self, part: Part) -> None:
        if part.process is None:
            self._enter(part, Phase.STOPPED)
            return
        self._enter(part, Phase.STOPPING)
        began = time.monotonic()
        await part.stop()
        self._enter(part, Phase.STOPPED)
        took_s = round(time.monotonic() - began, 2)
        if part.process.exit_code == -signal.SIGKILL:
            _log.warning("part.killed", part=part.name, took_s=took_s)
        else:
            _log.info("part.stopped", part=part.name, took_s=took_s)

    def _needed_by(self, part: Part) -> list[str]:
        """The parts that `part` starts after; a service's name stands for all its replicas."""
        return [name for name in self.parts if {name, name.rpartition("-")[0]} & set(part.start_after)]

    def _enter(self, part: Part, phase: Phase, trouble: str = "") -> None:
        state = self._states[part.name]
        if state.phase is not phase:
            state.since = _now()
        state.phase, state.trouble = phase, trouble
        state.process = part.process.identity if part.process and part.process.exit_code is None else None
        self.state.save(self._options.home.state_file)

    def _enter_stack(self, phase: Phase) -> None:
        self.state.phase, self.state.since = phase, _now()
        self.state.save(self._options.home.state_file)


@asynccontextmanager
async def running_stack(options: StackOptions) -> AsyncIterator[Supervisor]:
    """A stack that is ready inside the block and stopped after it. The home is owned meanwhile.

    Raises:
        AlreadyRunning: another supervisor owns the home.
        PartFailed: a port is taken, or a part cannot start.
    """
    options.home.make()
    with options.home.owned():
        await end_strays(options.home)
        options.layout.refuse_taken_ports()
        auth = AuthMaterial(options.home)
        auth.make([service.name for service in SERVICES], options.tenants)
        supervisor = Supervisor(
            options,
            parts_of(options.home, options.layout, auth, options.module, options.overrides, durable=options.durable),
        )
        try:
            await supervisor.start()
            yield supervisor
        finally:
            await supervisor.stop()


async def end_strays(home: Home) -> None:
    """End what a killed supervisor left running in this home; the caller owns the home."""
    before = StackState.load(home.state_file)
    strays = [part for part in before.parts if part.process is not None and part.process.alive()] if before else []
    for part in strays:
        _log.warning("stack.stray_ended", part=part.name, pid=part.process.pid if part.process else 0)
    await asyncio.gather(*(p.process.end(signal.SIGTERM, STRAY_END_WITHIN_S) for p in strays if p.process is not None))


async def _all(events: Iterable[asyncio.Event]) -> None:
    for event in events:
        await event.wait()


def _end_described(exit_code: int) -> str:
    if exit_code == 0:
        return "it was asked to end"
    if exit_code >= 0:
        return f"it ended with exit code {exit_code}"
    return f"it was ended by {signal.Signals(-exit_code).name}"


def _pid(part: Part) -> int | None:
    return part.process.pid if part.process else None


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
