"""The administrator's guide can be pasted: its calls about sessions and turns, in their order, against real routers."""

import asyncio
import os
import re
import sys
import uuid
from asyncio.subprocess import PIPE, STDOUT, Process
from pathlib import Path

from soma.common.v1.message_pb2 import SessionKey
from soma.gateway.v1.channel_service_pb2 import SendMessageRequest
from soma.router.v1.turn_service_pb2 import GetTurnRequest, TurnStatus

from soma_common.client.channel_client import text_message
from soma_common.testing.eventually import eventually
from tests.e2e.stack import WITNESS, Stack

GUIDE = (Path(__file__).parents[2] / "docs" / "guides" / "admin.md").read_text(encoding="utf-8")
DEFINITION = re.findall(r"^\$ (ask\(\) \{ buf .+\})$", GUIDE, re.MULTILINE)
CALLS = list(dict.fromkeys(re.findall(r"^\$ (ask (\w+)/(\w+) .+)$", GUIDE, re.MULTILINE)))


async def test_the_guides_calls_of_sessions_and_turns_work(stack: Stack, channel: str) -> None:
    key = SessionKey(tenant="demo", agent=WITNESS, channel=channel, session="s")
    request = SendMessageRequest(
        session=key,
        idempotency_key=uuid.uuid4().hex,
        message=text_message("for ever: as the guide has it"),
        no_delivery=True,
    )
    async with stack.channels() as gateway, stack.turns() as turns:
        sent = await gateway.SendMessage(request, timeout=10)

        async def status() -> TurnStatus.ValueType:
            return (await turns.GetTurn(GetTurnRequest(name=sent.turn_name), timeout=5)).turn.status

        async def runs() -> bool:
            return stack.was_asked("as the guide has it") and await status() == TurnStatus.TURN_STATUS_RUNNING

        async def has_ended() -> bool:
            return await status() == TurnStatus.TURN_STATUS_ENDED

        await eventually(runs, 20.0, "the turn runs")
        for call, _, method in CALLS:
            if method == "ResumeTurn":  # A turn that is still being stopped cannot be resumed yet.
                await eventually(has_ended, 20.0, "the turn has ended")
            await _paste(stack, call, sent.session_name, sent.turn_name, goes_on=method == "WatchSession")
    assert {method for _, _, method in CALLS} >= {"PauseSession", "InterruptTurn", "ResumeTurn", "WatchTurn"}


async def _paste(stack: Stack, call: str, session: str, turn: str, *, goes_on: bool) -> None:
    """Run a call as it stands; one that `goes_on` is left when it has printed something."""
    environment = {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "HOME": str(stack.auth.home.path),
        "ROUTER": f"http://{stack.layout.targets('router').partition(',')[0]}/soma.router.v1",
        "TOKEN": stack.admin_token,
        "SESSION": session,
        "TURN": turn,
    }
    process = await asyncio.create_subprocess_exec(
        "sh", "-c", f"{DEFINITION[0]}\n{call}", env=environment, stdout=PIPE, stderr=STDOUT, start_new_session=True
    )
    async with asyncio.timeout(30):
        if goes_on:
            assert "event" in await _beginning(process)
            os.killpg(process.pid, 15)
        output = (await process.communicate())[0].decode()
    assert goes_on or process.returncode == 0, f"{call}: {output}"


async def _beginning(process: Process) -> str:
    assert process.stdout is not None
    seen = ""
    while "event" not in seen:
        piece = await process.stdout.read(4096)
        assert piece, seen
        seen += piece.decode()
    return seen
