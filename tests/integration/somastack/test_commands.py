"""The command `somastack` on a real stack: the whole way from `up` to `down`, as a stranger would type it."""

import contextlib
import io
import json
import os
import pty
import re
import select
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import asyncpg
import pytest
from google.protobuf.field_mask_pb2 import FieldMask
from rich.console import Console
from soma.controlplane.v1.agent_service_pb2 import (
    Agent,
    AgentSpec,
    GetAgentRequest,
    PauseAgentRequest,
    ResumeAgentRequest,
    UpdateAgentRequest,
)

from somastack.demo import demonstrate
from somastack.home import Home
from somastack.layout import Layout
from somastack.remote import Remote
from somastack.state import StackState
from tests.integration.somastack.test_supervisor import free_base

if TYPE_CHECKING:
    from soma.controlplane.v1.agent_service_pb2_grpc import AgentServiceAsyncStub

ASSISTANT = "tenants/demo/agents/assistant"
COMMAND = [sys.executable, "-m", "somastack.cli"]
ENVIRONMENT = {**os.environ, "NO_COLOR": "1", "COLUMNS": "200", "SOMA_OFFLINE_WORD_DELAY_MS": "2"}


def run(*arguments: object, within_s: float = 90.0, **variables: str) -> "subprocess.CompletedProcess[str]":
    environment = {**ENVIRONMENT, **variables}
    return subprocess.run(
        [*COMMAND, *map(str, arguments)], capture_output=True, text=True, timeout=within_s, env=environment, check=False
    )


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The home of a stack that runs detached, with the demonstration played, as the guide says to start it."""
    home = tmp_path_factory.mktemp("stack") / "home"
    base = free_base()
    started = run(*guided("up"), "--home", home, "--port-base", base)
    assert started.returncode == 0, started.stdout + started.stderr
    (home / "started.txt").write_text(started.stdout)
    yield home
    stopped = run("down", "--home", home)
    assert stopped.returncode == 0, stopped.stderr
    assert not Home(home).is_owned()


def guided(command: str) -> list[str]:
    """The first such command in the guide to the standalone stack, with its arguments."""
    guide = (Path(__file__).parents[3] / "docs" / "guides" / "standalone.md").read_text(encoding="utf-8")
    line = re.search(rf"^\$ somastack ({command} .+)$", guide, re.MULTILINE)
    assert line is not None
    return shlex.split(line[1], comments=True)


def status(home: Path) -> dict[str, Any]:
    shown: dict[str, Any] = json.loads(run("status", "--home", home, "--output", "json").stdout)
    return shown


def test_up_plays_a_conversation_and_says_what_to_type(home: Path) -> None:
    shown = (home / "started.txt").read_text()
    assert "you> What is 17*23?" in shown
    assert re.search(r"calculate\(.*17\*23", shown)
    assert "391" in shown
    assert "offline" in shown
    for command in ("somastack chat", "somastack status", "buf curl"):
        assert command in shown


def test_status_names_every_component(home: Path) -> None:
    shown = status(home)
    assert shown["running"] is True
    assert shown["state"] == "ready"
    names = {"nats", "postgres", "controlplane-0", "toolgw-0", "cognition-0", "router-0", "gateway-0"}
    assert {component["name"] for component in shown["components"]} == names
    for component in shown["components"]:
        assert component["state"] == "ready"
        assert component["addresses"]
        os.kill(component["pid"], 0)
    table = run("status", "--home", home)
    assert table.returncode == 0
    assert all(name in table.stdout for name in names)


def test_chat_with_a_message_prints_the_answer_alone(home: Path) -> None:
    answered = run(*guided("chat"), "--home", home)
    assert answered.returncode == 0, answered.stderr
    assert "391" in answered.stdout
    assert answered.stderr == ""


def test_a_session_goes_on_where_it_ended(home: Path) -> None:
    run("chat", "--home", home, "--session", "kept", "--message", "remember that the kettle is on")
    answered = run("chat", "--home", home, "--session", "kept", "--message", "what did I ask you to remember")
    assert "the kettle is on" in answered.stdout


def test_chat_with_an_unknown_agent_says_so(home: Path) -> None:
    refused = run("chat", "--home", home, "--agent", "nobody", "--message", "hello")
    assert refused.returncode == 1
    assert "AGENT_NOT_FOUND" in refused.stderr
    assert refused.stdout == ""


def test_chat_on_a_terminal_streams_and_ends_with_ctrl_d(home: Path) -> None:
    pid, terminal = pty.fork()
    if pid == 0:
        os.execve(sys.executable, [*COMMAND, "chat", "--home", str(home)], ENVIRONMENT)
    try:
        seen = read_until(terminal, "you> ")
        os.write(terminal, b"what is 6*7\n")
        seen = read_until(terminal, "you> ", after="what is 6*7")
        assert "42" in seen
        os.write(terminal, b"\x04")
        assert exit_code(pid, terminal) == 0
    finally:
        with contextlib.suppress(ProcessLookupError, ChildProcessError):
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        os.close(terminal)


def exit_code(pid: int, terminal: int, within_s: float = 60.0) -> int:
    """The exit code of the program on the terminal, which closes when the program ends."""
    deadline = time.monotonic() + within_s
    while select.select([terminal], [], [], max(0.0, deadline - time.monotonic()))[0]:
        try:
            said = os.read(terminal, 4096)
        except OSError:  # how Linux tells that nobody has the other end any more
            said = b""
        if not said:
            return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    raise AssertionError(f"process {pid} still runs after {within_s} s")


def read_until(terminal: int, wanted: str, *, after: str = "", within_s: float = 30.0) -> str:
    seen, deadline = "", time.monotonic() + within_s
    while time.monotonic() < deadline:
        if select.select([terminal], [], [], 0.1)[0]:
            seen += os.read(terminal, 4096).decode(errors="replace")
        if wanted in (seen.partition(after)[2] if after else seen):
            return seen
    raise AssertionError(f"{wanted!r} not seen in {seen!r}")


def test_a_tenants_token_is_made_on_demand(home: Path) -> None:
    made = run("token", "acme", "--home", home)
    assert made.stdout.strip() == str(home / "auth" / "tenants" / "acme.token")
    assert "there is no tenant 'acme' yet" in made.stderr
    assert f"somastack tenants list --home {home}" in made.stderr
    assert run("token", "demo", "--home", home).stderr == ""
    assert run("token", "../acme", "--home", home).returncode == 1


async def test_the_queries_of_the_operations_page_work(home: Path) -> None:
    page = (Path(__file__).parents[3] / "docs" / "operations.md").read_text()
    queries = re.findall(r"```sql\n(.*?)```", page, re.DOTALL)
    dsn = next(part["addresses"]["dsn"] for part in status(home)["components"] if part["name"] == "postgres")
    connection = await asyncpg.connect(dsn)
    try:
        rows = [await connection.fetch(query) for query in queries]
    finally:
        await connection.close()
    leases = next(found for found in rows if found and "held" in found[0])
    assert [lease["held"] for lease in leases] == [True] * 8


def test_a_service_that_cannot_start_tells_the_whole_reason(tmp_path: Path) -> None:
    failed = run(
        "up", "--home", tmp_path / "home", "--port-base", free_base(), SOMA_TOOLGW_HTTP_TOOLS_FILE="/" + "x" * 200
    )
    assert failed.returncode == 1
    assert f"toolgw-0 ended with exit code 2: /{'x' * 200} cannot be read" in failed.stderr
    assert "Traceback" not in failed.stderr


def test_restart_replaces_services_one_after_the_other(home: Path) -> None:
    before = {part["name"]: part["pid"] for part in status(home)["components"]}
    done = run("restart", "--home", home)
    assert done.returncode == 0, done.stderr
    assert [line.split()[0] for line in done.stdout.splitlines()] == [
        "controlplane-0",
        "toolgw-0",
        "cognition-0",
        "router-0",
        "gateway-0",
    ]
    shown = status(home)
    assert shown["state"] == "ready"
    for part in shown["components"]:
        servers = part["name"] in ("nats", "postgres")
        assert (part["pid"] == before[part["name"]]) == servers
        assert part["restarts"] == (0 if servers else 1)
    talk = run("chat", "--home", home, "--message", "what is 17*23?")
    assert "391" in talk.stdout
    nothing = run("restart", "nats", "--home", home)
    assert nothing.returncode == 1
    assert "no service nats runs" in nothing.stderr


def test_logs_tell_one_story(home: Path) -> None:
    router = run("logs", "router", "--home", home)
    assert "service.ready" in router.stdout
    assert "gateway-0" not in router.stdout
    everything = run("logs", "--home", home, "--lines", "500")
    assert all(name in everything.stdout for name in ("gateway-0", "router-0", "supervisor"))
    assert run("logs", "nothing", "--home", home).returncode == 1


def test_where_nothing_has_logged_there_are_no_logs(tmp_path: Path) -> None:
    nothing = run("logs", "--home", tmp_path / "nowhere")
    assert (nothing.returncode, nothing.stdout) == (1, "")
    assert "nothing has logged anything" in nothing.stderr
    assert f"somastack up --demo --home {tmp_path / 'nowhere'}" in nothing.stderr


def test_a_second_up_says_so_with_the_addresses(home: Path) -> None:
    second = run("up", "--home", home, "--port-base", free_base())
    assert second.returncode == 1
    assert "already running" in second.stderr
    assert status(home)["components"][-1]["addresses"]["grpc"] in second.stderr
    assert f"somastack chat --home {home}" in second.stderr


class TestDemonstration:
    """Played again on a stack whose agent a person has configured."""

    @pytest.fixture
    async def agents(self, home: Path) -> AsyncIterator["AgentServiceAsyncStub"]:
        """The control plane; the agent is as the demonstration makes it before and after."""
        async with Remote.of(home).agents() as agents:
            before = (await agents.GetAgent(GetAgentRequest(name=ASSISTANT))).agent
            yield agents
            await agents.ResumeAgent(ResumeAgentRequest(name=ASSISTANT))
            mask = FieldMask(paths=["spec"])
            await agents.UpdateAgent(
                UpdateAgentRequest(agent=Agent(name=ASSISTANT, spec=before.spec), update_mask=mask)
            )

    @staticmethod
    async def played(home: Path, model: str | None = None) -> str:
        """What the demonstration shows; no conversations but those that are there by then."""
        shown, state = io.StringIO(), StackState.load(Home(home).state_file)
        assert state is not None
        await demonstrate(Home(home), state, Console(file=shown, no_color=True, soft_wrap=True), model)
        return shown.getvalue()

    async def test_it_changes_nothing_that_was_configured(
        self, home: Path, agents: "AgentServiceAsyncStub", monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        monkeypatch.setattr("somastack.demo.CONVERSATIONS", tmp_path)
        assert await self.played(home) == ""
        spec = AgentSpec(model="echo/echo", tools=["calculate"], instructions="Say it back.", max_steps=7)
        paths = ["spec.model", "spec.tools", "spec.instructions", "spec.max_steps"]
        changed = Agent(name=ASSISTANT, spec=spec)
        await agents.UpdateAgent(UpdateAgentRequest(agent=changed, update_mask=FieldMask(paths=paths)))
        assert await self.played(home) == (
            "agent assistant: kept as configured: model echo/echo (--model offline/assistant changes it), "
            "tools calculate, its instructions\n"
        )
        assert (await agents.GetAgent(GetAgentRequest(name=ASSISTANT))).agent.spec == spec
        assert await self.played(home, "offline/assistant") == (
            "agent assistant: model changed from echo/echo to offline/assistant; "
            "kept as configured: tools calculate, its instructions\n"
        )
        spec.model = "offline/assistant"
        assert (await agents.GetAgent(GetAgentRequest(name=ASSISTANT))).agent.spec == spec

    async def test_a_paused_agent_is_named_and_nothing_is_played(
        self, home: Path, agents: "AgentServiceAsyncStub"
    ) -> None:
        await agents.PauseAgent(PauseAgentRequest(name=ASSISTANT))
        shown = await self.played(home)
        assert re.fullmatch(
            r"no conversation is played: agent assistant is paused "
            rf"\(\S*somastack agents resume assistant --home {home}\)\n",
            shown,
        )


def test_another_home_on_the_same_ports_is_told_which_port_is_taken(home: Path, tmp_path: Path) -> None:
    base = status(home)["port_base"]
    refused = run("up", "--home", tmp_path / "other", "--port-base", base)
    assert refused.returncode == 1
    assert f"port {Layout(base).nats_port} (for nats) is taken" in refused.stderr
    assert "--port-base" in refused.stderr


def test_doctor_finds_a_healthy_stack_healthy(home: Path) -> None:
    seen = run("doctor", "--home", home)
    assert seen.returncode == 0, seen.stdout
    assert "router-0" in seen.stdout


def test_the_printed_buf_curl_call_works(home: Path) -> None:
    shown = (home / "started.txt").read_text()
    line = next(line for line in shown.splitlines() if "buf curl" in line)
    command = line[line.index("administrate") + len("administrate") :].strip()
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    called = subprocess.run(
        ["sh", "-c", command], capture_output=True, text=True, timeout=60, env={**ENVIRONMENT, "PATH": path}
    )
    assert called.returncode == 0, called.stderr
    agents = json.loads(called.stdout)["agents"]
    assert [agent["name"] for agent in agents] == ["tenants/demo/agents/assistant"]


def test_ctrl_c_on_up_in_the_foreground(tmp_path: Path) -> None:
    home = tmp_path / "home"
    arguments = [*COMMAND, "up", "--home", str(home), "--port-base", str(free_base())]
    process = subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True, env=ENVIRONMENT)
    assert process.stdout is not None
    shown = ""
    for line in process.stdout:
        shown += line
        if "serving from" in line:
            break
    assert "part.ready" in shown
    assert "there is no agent assistant of tenant demo yet: start with --demo" in shown
    assert "somastack chat" not in shown
    nobody = run("chat", "--home", home, "--message", "hello")
    assert nobody.returncode == 1
    assert f"somastack up --demo --home {home}" in nobody.stderr
    assert "--tenant" in nobody.stderr
    children = [component["pid"] for component in status(home)["components"]]
    began = time.monotonic()
    process.send_signal(signal.SIGINT)
    rest = process.stdout.read()
    assert process.wait(15) == 0
    assert time.monotonic() - began < 10.0
    assert "stack.stopped" in rest
    for pid in children:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
    process.stdout.close()
    nothing = run("status", "--home", home)
    assert nothing.returncode == 3
    assert f"somastack up --demo --home {home}" in nothing.stdout
