"""The supervisor: order, restarts, replacement of the frozen, clean ends, and what it leaves when it is killed."""

import asyncio
import os
import signal
import socket
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from soma_common.embedded.process import PartFailed, ProcessIdentity
from soma_common.testing.eventually import eventually
from somastack.home import AlreadyRunning, Home
from somastack.layout import SPAN, Layout, is_taken
from somastack.state import PartState, Phase, StackState
from somastack.supervisor import StackOptions, Supervisor, running_stack
from tests.stalls import Stalls

STAND_IN = "tests.integration.somastack.stand_in"
ROOT = Path(__file__).parents[3]
CHILDREN = {"PYTHONPATH": str(ROOT)}


def free_base() -> int:
    """A port base all of whose ports are free; far from the default, so that a stack at work is left alone."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        start = 20_000 + probe.getsockname()[1] % 9_000
    for base in range(start, 60_000, SPAN):
        if not any(is_taken(port) for port, _ in Layout(base).ports()):
            return base
    raise AssertionError("no free ports")


def options(home: Path, **changes: object) -> StackOptions:
    services = ("gateway", "router", "cognition", "toolgw", "controlplane")
    given: dict[str, object] = {
        "home": Home(home),
        "layout": Layout(free_base()),
        "module": STAND_IN,
        "overrides": dict.fromkeys(services, CHILDREN),
        "durable": False,
        "check_every_s": 0.2,
        "replace_after_s": 1.0,
    }
    return StackOptions(**{**given, **changes})  # type: ignore[arg-type]


@pytest.fixture
async def stack(tmp_path: Path) -> AsyncIterator[Supervisor]:
    async with running_stack(options(tmp_path / "home")) as supervisor:
        yield supervisor


def part(stack: Supervisor, name: str) -> PartState:
    return next(state for state in stack.state.parts if state.name == name)


async def test_everything_is_ready_and_written_down(stack: Supervisor, tmp_path: Path) -> None:
    state = StackState.load(tmp_path / "home" / "run" / "stack.json")
    assert state is not None
    assert state.phase is Phase.READY
    names = ["nats", "postgres", "controlplane-0", "toolgw-0", "cognition-0", "router-0", "gateway-0"]
    assert [each.name for each in state.parts] == names
    assert all(each.phase is Phase.READY and each.process and each.process.alive() for each in state.parts)
    assert part(stack, "gateway-0").addresses["grpc"] == f"127.0.0.1:{state.port_base}"


@pytest.mark.parametrize("name", ["router-0", "nats", "postgres"])
async def test_a_killed_part_is_back_at_once(stack: Supervisor, name: str) -> None:
    before = part(stack, name).process
    assert before is not None
    async with Stalls() as stalls:
        killed_at = time.monotonic()
        assert before.send(signal.SIGKILL)
        state = part(stack, name)
        await eventually(lambda: state.restarts == 1 and state.phase is not Phase.RESTARTING, 20.0)
        assert time.monotonic() - killed_at < 1.0 + stalls.since(killed_at)
    await eventually(lambda: state.phase is Phase.READY, 20.0)
    assert state.process not in (None, before)
    await stack.parts[name].check()


async def test_a_frozen_part_is_replaced(stack: Supervisor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("somastack.parts.CHECK_TIMEOUT_S", 0.3)
    state = part(stack, "cognition-0")
    frozen = state.process
    assert frozen is not None
    assert frozen.send(signal.SIGSTOP)
    await eventually(lambda: state.phase is Phase.UNRESPONSIVE)
    await eventually(lambda: state.restarts == 1 and state.phase is Phase.READY, 20.0)
    assert not frozen.alive()


async def test_a_second_stack_in_the_same_home_is_refused(stack: Supervisor, tmp_path: Path) -> None:
    with pytest.raises(AlreadyRunning, match="already running"):
        async with running_stack(options(tmp_path / "home")):
            pass


async def test_a_taken_port_is_named(stack: Supervisor, tmp_path: Path) -> None:
    with pytest.raises(PartFailed, match=rf"port {stack.state.port_base + 50} \(for nats\) is taken") as refused:
        async with running_stack(options(tmp_path / "other", layout=Layout(stack.state.port_base))):
            pass
    assert "--port-base" in refused.value.advice


async def test_a_service_that_cannot_start_ends_the_start_with_its_reason(tmp_path: Path) -> None:
    bad = {"toolgw": {**CHILDREN, "STAND_IN": "bad-settings"}}
    chosen = options(tmp_path / "home")
    with pytest.raises(PartFailed, match="toolgw-0 ended with exit code 2: SOMA_LISTEN: nonsense"):
        async with running_stack(options(tmp_path / "home", overrides={**chosen.overrides, **bad})):
            pass
    state = StackState.load(tmp_path / "home" / "run" / "stack.json")
    assert state is not None
    assert all(each.process is None or not each.process.alive() for each in state.parts)


async def test_it_stops_within_ten_seconds_even_when_every_service_overruns(tmp_path: Path) -> None:
    slow = {service: {**CHILDREN, "STAND_IN": "slow-stop"} for service in options(tmp_path).overrides}
    async with running_stack(options(tmp_path / "home", overrides=slow)) as stack:
        began = time.monotonic()
    assert time.monotonic() - began < 10.0
    assert {state.phase for state in stack.state.parts} == {Phase.STOPPED}


async def test_replicas_run_beside_each_other_and_one_may_die(tmp_path: Path) -> None:
    async with running_stack(options(tmp_path / "home", layout=Layout(free_base(), {"router": 2}))) as stack:
        first, second = part(stack, "router-0"), part(stack, "router-1")
        assert stack.state.targets("router") == f"{first.addresses['grpc']},{second.addresses['grpc']}"
        assert first.process is not None
        first.process.send(signal.SIGKILL)
        await eventually(lambda: first.restarts == 1 and first.phase is Phase.READY, 20.0)
        assert (second.restarts, second.phase) == (0, Phase.READY)


async def test_data_survive_a_restart_of_the_stack(tmp_path: Path) -> None:
    tokens = []
    for _ in range(2):
        async with running_stack(options(tmp_path / "home")):
            tokens.append((tmp_path / "home" / "auth" / "admin.token").read_text())
    assert tokens[0] == tokens[1]


class TestAsProcess:
    """The supervisor as a process of its own, as `somastack up --detach` runs it."""

    @pytest.fixture
    async def served(self, tmp_path: Path) -> AsyncIterator[tuple[asyncio.subprocess.Process, Home]]:
        home = Home(tmp_path / "home")
        program = (
            "import asyncio, pathlib\n"
            "from somastack.serve import serve\n"
            "from tests.integration.somastack.test_supervisor import options\n"
            f"asyncio.run(serve(options(pathlib.Path({str(home.path)!r}))))\n"
        )
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-c", program, env={**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'gen'}"}
        )
        try:
            await eventually(lambda: self.phase(home) is Phase.READY, 30.0)
            yield process, home
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()

    @staticmethod
    def phase(home: Home) -> Phase | None:
        state = StackState.load(home.state_file)
        return state.phase if state else None

    @staticmethod
    def children(home: Home) -> list[ProcessIdentity]:
        state = StackState.load(home.state_file)
        assert state is not None
        return [each.process for each in state.parts if each.process is not None]

    async def test_ctrl_c_stops_everything_cleanly(self, served: tuple[asyncio.subprocess.Process, Home]) -> None:
        process, home = served
        children = self.children(home)
        began = time.monotonic()
        process.send_signal(signal.SIGINT)
        assert await process.wait() == 0
        assert time.monotonic() - began < 10.0
        assert self.phase(home) is Phase.STOPPED
        assert not [child for child in children if child.alive()]
        assert not home.is_owned()

    async def test_children_die_with_a_killed_supervisor(self, served: tuple[asyncio.subprocess.Process, Home]) -> None:
        process, home = served
        children = self.children(home)
        assert len(children) == 7
        process.kill()
        await process.wait()
        assert not home.is_owned()
        await eventually(lambda: not [child for child in children if child.alive()])

    async def test_the_next_start_ends_what_a_killed_supervisor_left(
        self, served: tuple[asyncio.subprocess.Process, Home]
    ) -> None:
        process, home = served
        # Frozen, the children cannot follow their supervisor by themselves.
        children = self.children(home)
        for child in children:
            child.send(signal.SIGSTOP)
        process.kill()
        await process.wait()
        assert [child for child in children if child.alive()]
        state = StackState.load(home.state_file)
        assert state is not None
        async with running_stack(options(home.path, layout=Layout(state.port_base))):
            assert not [child for child in children if child.alive()]
