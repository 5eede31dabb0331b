"""`somastack sessions`, `turns`, `agents` and `tenants` on the whole stack, as an operator types them."""

import asyncio
import json
import os
import re
import signal
import sys
import uuid
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import grpc
from soma.common.v1.message_pb2 import Message, Part, Role, SessionKey
from soma.common.v1.turn_pb2 import Outcome
from soma.gateway.v1.channel_service_pb2 import SendMessageRequest, SendMessageResponse
from soma.router.v1.session_service_pb2 import ListMessagesRequest, SessionMessage
from soma.router.v1.turn_service_pb2 import GetTurnRequest, Turn, TurnStatus

from soma_common.testing.eventually import eventually
from tests.e2e.stack import ECHO, OFFLINE, WITNESS, Stack

COMMAND = (sys.executable, "-m", "somastack.cli")
ENVIRONMENT = {**os.environ, "NO_COLOR": "1", "COLUMNS": "200"}
FOR_EVER = "for ever: and on"


@dataclass(frozen=True)
class Said:
    """What a command printed, and how it ended."""

    code: int
    out: str
    errors: str

    @property
    def json(self) -> Any:
        """The output for programs."""
        assert self.code == 0, self.errors
        return json.loads(self.out)


async def soma(stack: Stack, *arguments: str, tenant: str = "demo") -> Said:
    """Run a command to its end."""
    process = await _start(stack, *arguments, tenant=tenant)
    async with asyncio.timeout(60):
        out, errors = await process.communicate()
    assert process.returncode is not None
    return Said(process.returncode, out.decode(), errors.decode())


@asynccontextmanager
async def running(stack: Stack, *arguments: str, tenant: str = "demo") -> AsyncIterator[Process]:
    """A command that goes on until it is left."""
    process = await _start(stack, *arguments, tenant=tenant)
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
        await process.communicate()


async def _start(stack: Stack, *arguments: str, tenant: str) -> Process:
    scope = () if arguments[0] == "tenants" else ("--tenant", tenant)
    command = (*COMMAND, *arguments, *scope, "--home", str(stack.auth.home.path))
    return await asyncio.create_subprocess_exec(*command, stdout=PIPE, stderr=PIPE, env=ENVIRONMENT)


async def printed(process: Process, wanted: str, within_s: float = 30.0) -> str:
    """Read what a running command prints until `wanted` is in it."""
    assert process.stdout is not None
    seen = ""
    async with asyncio.timeout(within_s):
        while wanted not in seen:
            piece = await process.stdout.read(4096)
            assert piece, f"ended before it printed {wanted!r}: {seen!r}"
            seen += piece.decode()
    return seen


async def remark(process: Process, within_s: float = 30.0) -> str:
    """The next line that a running command prints beside its output."""
    assert process.stderr is not None
    async with asyncio.timeout(within_s):
        return (await process.stderr.readline()).decode()


async def say(
    stack: Stack, agent: str, channel: str, session: str, text: str, tenant: str = "demo"
) -> SendMessageResponse:
    """Send a message that no adapter is to have the answer of."""
    request = SendMessageRequest(
        session=SessionKey(tenant=tenant, agent=agent, channel=channel, session=session),
        idempotency_key=uuid.uuid4().hex,
        message=Message(role=Role.ROLE_USER, parts=[Part(text=text)]),
        no_delivery=True,
    )
    async with stack.channels(tenant) as gateway:
        return await gateway.SendMessage(request, timeout=10)


async def messages_of(stack: Stack, session: str, tenant: str = "demo") -> list[SessionMessage]:
    """The messages of a session; none while no router has it."""
    async with stack.sessions(tenant) as sessions:
        try:
            page = await sessions.ListMessages(ListMessagesRequest(parent=session, page_size=1000), timeout=10)
        except grpc.aio.AioRpcError as error:
            if error.code() is not grpc.StatusCode.NOT_FOUND:
                raise
            return []
    return list(page.messages)


async def running_turn(stack: Stack, sent: SendMessageResponse) -> str:
    """Wait until the turn of a message runs; its short name."""
    await eventually(lambda: _stands(stack, sent.turn_name, TurnStatus.TURN_STATUS_RUNNING), 20.0, "the turn runs")
    return "/".join(sent.turn_name.split("/")[3::2])


async def outcome_of(stack: Stack, turn: str, tenant: str = "demo") -> str:
    """Wait for a turn's end; its outcome."""
    ended = await eventually(
        lambda: _stands(stack, turn, TurnStatus.TURN_STATUS_ENDED, tenant), 30.0, f"turn {turn} ends"
    )
    assert ended is not None
    return Outcome.Name(ended.outcome).removeprefix("OUTCOME_").lower()


async def answered(stack: Stack, sent: SendMessageResponse) -> str:
    """Wait for the end of the turn that answers a message; its outcome."""
    return await outcome_of(stack, sent.turn_name, sent.turn_name.split("/")[1])


async def _stands(stack: Stack, turn: str, status: TurnStatus.ValueType, tenant: str = "demo") -> Turn | None:
    """The turn, if it has that status."""
    async with stack.turns(tenant) as turns:
        try:
            found = (await turns.GetTurn(GetTurnRequest(name=turn), timeout=10)).turn
        except grpc.aio.AioRpcError as error:
            if error.code() is not grpc.StatusCode.NOT_FOUND:
                raise
            return None
    return found if found.status == status else None


async def test_a_turn_is_found_and_its_journal_is_read(stack: Stack, channel: str) -> None:
    sent = await say(stack, OFFLINE, channel, "s", "what is 6*7")
    assert await answered(stack, sent) == "final"
    name = f"{OFFLINE}/{channel}/s"
    listed = await soma(stack, "sessions", "list", "--agent", OFFLINE, "--channel", channel)
    heading, row = listed.out.splitlines()
    assert heading.split("  ")[0] == "session"
    assert row.split()[:3] == [name, "idle", "0"]
    turns = (await soma(stack, "turns", "list", "--session", name)).out.splitlines()
    turn = turns[1].split()[0]
    assert turn == f"{name}/{sent.turn_name.rpartition('/')[2]}"
    assert turns[1].split()[1:4] == ["1", "ended", "final"]
    steps = await soma(stack, "turns", "steps", turn)
    assert re.search(r"→ calculate\(.*6\*7.*\n2  tools.*\n   ← .*42", steps.out)
    assert "42" in (await soma(stack, "turns", "get", turn)).out
    watched = await soma(stack, "turns", "watch", turn)
    assert watched.code == 0
    assert "42" in watched.out
    for form in ((sent.turn_name,), (turn.rpartition("/")[2], "--session", name)):
        assert (await soma(stack, "turns", "get", *form, "-o", "json")).json["name"] == sent.turn_name


async def test_a_watch_shows_tokens_as_they_come_and_an_interrupt_ends_it(stack: Stack, channel: str) -> None:
    sent = await say(stack, WITNESS, channel, "s", FOR_EVER)
    turn = await running_turn(stack, sent)
    async with running(stack, "turns", "watch", turn) as watch:
        await printed(watch, "word word word")
        stopped = await soma(stack, "turns", "interrupt", turn)
        assert stopped.code == 0, stopped.errors
        assert await answered(stack, sent) == "interrupted"
        async with asyncio.timeout(20):
            rest = b"".join(await watch.communicate())
        assert watch.returncode == 0
        assert b"interrupted" in rest
    again = await soma(stack, "turns", "interrupt", turn)
    assert again.code == 0
    assert "interrupted" in again.out


async def test_a_watch_outlives_the_router_that_served_it(stack: Stack, channel: str) -> None:
    sent = await say(stack, WITNESS, channel, "s", FOR_EVER)
    turn = await running_turn(stack, sent)
    async with running(stack, "turns", "watch", turn) as watch:
        await printed(watch, "word word word")
        await stack.kill("router-0")
        await printed(watch, "the turn starts again")
        await printed(watch, "word word word")
        assert (await soma(stack, "turns", "cancel", turn)).code == 0
        async with asyncio.timeout(20):
            rest = b"".join(await watch.communicate())
        assert watch.returncode == 0
        assert b"cancelled" in rest


async def test_a_stopped_turn_is_resumed_and_an_answered_one_is_not(stack: Stack, channel: str) -> None:
    sent = await say(stack, WITNESS, channel, "s", FOR_EVER)
    turn = await running_turn(stack, sent)
    assert (await soma(stack, "turns", "cancel", turn)).code == 0
    assert await answered(stack, sent) == "cancelled"
    first = (await soma(stack, "turns", "resume", turn, "--request-id", "r-1", "-o", "json")).json
    assert (await soma(stack, "turns", "resume", turn, "--request-id", "r-1", "-o", "json")).json == first
    assert await outcome_of(stack, first["turnName"]) == "final"
    refused = await soma(stack, "turns", "resume", first["turnName"])
    assert refused.code == 1
    assert "TURN_NOT_RESUMABLE" in refused.errors
    assert len(refused.errors.splitlines()) == 1


async def test_a_paused_session_takes_messages_and_answers_them_later(stack: Stack, channel: str) -> None:
    name = f"{ECHO}/{channel}/s"
    await answered(stack, await say(stack, ECHO, channel, "s", "one"))
    paused = await soma(stack, "sessions", "pause", name)
    assert paused.code == 0, paused.errors
    assert "idle, paused" in paused.out
    waiting = [await say(stack, ECHO, channel, "s", text) for text in ("two", "three")]

    async def both_wait() -> bool:
        places = [message.queue_position for message in await messages_of(stack, waiting[0].session_name)]
        return places == [0, 1, 2]

    await eventually(both_wait, 10.0, "both messages wait")
    shown = (await soma(stack, "sessions", "get", name, "--messages", "-o", "json")).json
    assert (shown["session"]["queuedCount"], shown["session"]["paused"]) == ("2", True)
    assert [message["message"]["parts"][0]["text"] for message in shown["messages"]] == ["one", "two", "three"]
    table = (await soma(stack, "sessions", "get", name, "--waiting")).out
    assert "idle, paused" in table
    assert re.search(r"oldest waits +\d", table)
    assert [line.split()[-1] for line in table.splitlines()[-2:]] == ["two", "three"]
    assert (await soma(stack, "sessions", "resume", name)).code == 0
    assert [await answered(stack, sent) for sent in waiting] == ["final", "final"]


async def test_a_session_is_watched_over_its_turns(stack: Stack, channel: str) -> None:
    name = f"{ECHO}/{channel}/s"
    async with running(stack, "sessions", "watch", name) as watch:
        await printed(watch, "nothing waits")
        await say(stack, ECHO, channel, "s", "the kettle is on")
        await printed(watch, "the kettle is on")
        await say(stack, ECHO, channel, "s", "the tea is ready")
        assert "turn 2" in await printed(watch, "the tea is ready")
        watch.send_signal(signal.SIGINT)
        async with asyncio.timeout(10):
            await watch.communicate()
        assert watch.returncode == 0


async def test_a_watch_of_a_session_that_is_not_there_says_that_it_waits(stack: Stack, channel: str) -> None:
    name = f"{ECHO}/{channel}/none"
    async with running(stack, "sessions", "watch", name) as watch:
        await printed(watch, "nothing waits")
        watch.send_signal(signal.SIGINT)
        async with asyncio.timeout(10):
            _, errors = await watch.communicate()
    assert errors.decode() == f"there is no session {name} yet: waiting for its first message\n"


async def test_a_message_behind_a_turn_says_so_and_waits_on_when_it_is_left(stack: Stack, channel: str) -> None:
    sent = await say(stack, WITNESS, channel, "s", FOR_EVER)
    await running_turn(stack, sent)
    name = f"{WITNESS}/{channel}/s"
    chat = ("chat", "--agent", WITNESS, "--channel", channel, "--session", "s", "--message", "what is 6*7?")
    async with running(stack, *chat) as first:
        assert await remark(first) == "waiting: behind the running turn\n"
        async with running(stack, *chat) as second:
            assert await remark(second) == "waiting: behind the running turn and 1 message\n"
            first.send_signal(signal.SIGINT)
            waits = r"\(no longer shown; the message waits and will be answered, see: \S*somastack sessions watch "
            assert re.match(rf"{waits}{name} --home ", await remark(first))
            assert await first.wait() == 130
            assert (await soma(stack, "turns", "interrupt", sent.turn_name)).code == 0
            async with asyncio.timeout(30):
                out, errors = await second.communicate()
            assert (second.returncode, "42" in out.decode(), errors) == (0, True, b"")


async def test_a_message_to_a_paused_agent_names_the_pause(stack: Stack, channel: str) -> None:
    await stack.add_agent("acme", "slow", "echo/echo")
    await stack.agent_is_known("acme", "slow")
    assert (await soma(stack, "agents", "pause", "slow", tenant="acme")).code == 0
    held = await _held(stack, "slow", channel, "acme")
    chat = ("chat", "--agent", "slow", "--channel", channel, "--message", "the kettle is on")
    async with running(stack, *chat, tenant="acme") as waiting:
        resume = r"\S*somastack agents resume slow --tenant acme --home \S+"
        assert re.fullmatch(rf"waiting: agent slow is paused \({resume}\)\n", await remark(waiting))
        assert (await soma(stack, "agents", "resume", "slow", tenant="acme")).code == 0
        async with asyncio.timeout(30):
            out, errors = await waiting.communicate()
    assert (waiting.returncode, "the kettle is on" in out.decode(), errors) == (0, True, b"")
    assert await answered(stack, held) == "final"
    await stack.delete_agent("acme", "slow")


async def test_a_message_says_what_it_does_to_the_turn_that_runs(stack: Stack, channel: str) -> None:
    sent = await say(stack, WITNESS, channel, "s", FOR_EVER)
    await running_turn(stack, sent)
    chat = ("chat", "--agent", WITNESS, "--channel", channel, "--session", "s", "--message")
    rejected = await soma(stack, *chat, "hello", "--policy", "reject")
    assert (rejected.code, rejected.out) == (1, "")
    assert rejected.errors.startswith("rejected: ")
    answered_by = await soma(stack, *chat, "what is 6*7?", "--policy", "interrupt")
    assert (answered_by.code, "42" in answered_by.out) == (0, True)
    assert await answered(stack, sent) == "interrupted"


async def test_a_session_is_interrupted_and_cancelled(stack: Stack, channel: str) -> None:
    name = f"{WITNESS}/{channel}/s"
    sent = await say(stack, WITNESS, channel, "s", FOR_EVER)
    await running_turn(stack, sent)
    busy = (await soma(stack, "sessions", "list", "--agent", WITNESS, "--channel", channel, "--state", "busy")).out
    assert sent.turn_name.rpartition("/")[2] in busy
    assert (await soma(stack, "sessions", "interrupt", name)).code == 0
    assert await answered(stack, sent) == "interrupted"
    running_now = await say(stack, WITNESS, channel, "s", FOR_EVER)
    await running_turn(stack, running_now)
    waiting = await say(stack, WITNESS, channel, "s", "hello")
    assert (await soma(stack, "sessions", "cancel", name)).code == 0
    assert [await answered(stack, each) for each in (running_now, waiting)] == ["cancelled", "cancelled"]


async def test_a_paused_agent_holds_its_messages_and_no_others(stack: Stack, channel: str) -> None:
    await stack.add_agent("demo", "held", "echo/echo")
    await stack.agent_is_known("demo", "held")
    assert (await soma(stack, "agents", "pause", "held")).out.splitlines()[1].split()[:2] == ["held", "paused"]
    held = await _held(stack, "held", channel)
    assert await answered(stack, await say(stack, ECHO, channel, "s", "hello")) == "final"
    for part in ("controlplane-0", "router-0"):  # What starts again knows of the pause before it starts a turn.
        await stack.kill(part)
    assert await _waits(stack, held)
    assert await _waits(stack, await say(stack, "held", channel, "new", "are you there?"))
    assert (await soma(stack, "agents", "resume", "held", "-o", "json")).json["paused"] is False
    assert await answered(stack, held) == "final"
    await stack.delete_agent("demo", "held")


async def test_a_paused_tenant_holds_its_messages_and_no_others(stack: Stack, channel: str) -> None:
    acme = (await soma(stack, "tenants", "pause", "acme", "-o", "json")).json
    try:
        assert acme["paused"] is True
        states = [line.split()[:2] for line in (await soma(stack, "tenants", "list")).out.splitlines()[1:]]
        assert states == [["acme", "paused"], ["demo", "active"]]
        held = await _held(stack, ECHO, channel, "acme")
        assert await answered(stack, await say(stack, ECHO, channel, "s", "hello")) == "final"
        late = await soma(stack, "tenants", "resume", "acme", "--etag", "old")
        assert (late.code, "ETAG_MISMATCH" in late.errors) == (1, True)
    finally:
        assert (await soma(stack, "tenants", "resume", "acme")).code == 0
    assert await answered(stack, held) == "final"


async def test_refusals_are_one_line_and_wrong_usage_is_told_apart(stack: Stack, channel: str) -> None:
    for arguments, reason in (
        (("sessions", "get", f"{ECHO}/{channel}/none"), "SESSION_NOT_FOUND"),
        (("turns", "cancel", f"{ECHO}/{channel}/none/{'0' * 32}"), "TURN_NOT_FOUND"),
        (("agents", "pause", "nobody"), "AGENT_NOT_FOUND"),
        (("tenants", "resume", "nobody"), "TENANT_NOT_FOUND"),
    ):
        refused = await soma(stack, *arguments)
        assert (refused.code, refused.out) == (1, ""), arguments
        assert reason in refused.errors
        assert len(refused.errors.splitlines()) == 1
        assert not re.search(r"\b(Get|List)[A-Z]", refused.errors), "names a command, not a call"
    for usage in (["turns", "get", "0" * 32], ["sessions", "get", "a b"], ["sessions", "list", "--channel", "x"]):
        assert (await soma(stack, *usage)).code == 2, usage


async def _held(stack: Stack, agent: str, channel: str, tenant: str = "demo") -> SendMessageResponse:
    """A message that has been waiting for more than a second: the routers know of the pause.

    One that was sent before they did is answered; then another is tried.
    """

    async def found() -> SendMessageResponse | None:
        sent = await say(stack, agent, channel, uuid.uuid4().hex, "are you there?", tenant)
        return sent if await _waits(stack, sent) else None

    sent = await eventually(found, 30.0, f"a message of {agent} of {tenant} waits")
    assert sent is not None
    return sent


async def _waits(stack: Stack, sent: SendMessageResponse) -> bool:
    """Whether a message waits for more than a second, which nothing but a pause makes it do here."""

    async def decided() -> str:
        messages = await messages_of(stack, sent.session_name, sent.session_name.split("/")[1])
        shown = next((message for message in messages if message.message_id == sent.message_id), None)
        if shown is None:
            return ""
        return "taken" if shown.turn else "waits" if shown.queue_age_ms > 1000 else ""

    return await eventually(decided, 20.0, f"message {sent.message_id} waits or is taken") == "waits"
