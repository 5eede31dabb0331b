"""The brain as its own process: it starts, says that it is ready, thinks, and ends when it is told to."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import orjson
from soma.common.v1 import turn_pb2

from soma_common.authz.tokens import generate_key, public_jwks, sign_token
from soma_common.ids import call_key
from tests.integration.cognition.counterparts import ScriptedRouter, ToolGateway, routers
from tests.integration.cognition.test_run_turns import answer_of
from tests.unit.cognition import stories

ROOT = Path(__file__).parents[3]


@asynccontextmanager
async def brain_process(home: Path, **environment: str) -> AsyncIterator[tuple[asyncio.subprocess.Process, int, str]]:
    """A started brain: the process, its port and a token for it."""
    key = generate_key()
    (home / "keys.json").write_text(public_jwks([key]))
    log = home / "cognition.log"
    variables = {
        "SOMA_SERVICE_INSTANCE": "cognition-7",
        "SOMA_AUTH_KEYS_FILE": str(home / "keys.json"),
        "SOMA_LOG_FILE": str(log),
        "SOMA_HEARTBEAT_MS": "100",
        "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'gen'}",
    }
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "services.cognition.main", cwd=ROOT, env=os.environ | variables | environment
    )
    try:
        port = 0
        async with asyncio.timeout(20):
            while not port:
                assert process.returncode is None, log.read_text() if log.exists() else "it did not start"
                lines = [orjson.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
                port = next((line["port"] for line in lines if line["event"] == "service.ready"), 0)
                await asyncio.sleep(0.02)
        yield process, port, sign_token(key, "services/router", "*", ["service"], ttl_s=600)
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


async def test_it_answers_and_ends_in_order_on_sigterm(tmp_path: Path) -> None:
    async with brain_process(tmp_path, SOMA_DRAIN_GRACE_S="0.2") as (process, port, token):
        async with routers(ScriptedRouter(f"127.0.0.1:{port}", token)) as (router,):
            await router.connect()
            assert router.welcome.brain.startswith("cognition-7-")
            await router.start(stories.start("hello", model="offline/assistant"))
            assert "offline" in answer_of(await router.ending())
            await router.start(stories.start("slow", turn_id=bytes(16), model="echo/words-1000x100ms"))
            await router.until(lambda: any(text.turn_id == bytes(16) for text in router.texts))
            process.send_signal(signal.SIGTERM)
            await router.over.wait()
            assert router.error is None
            assert [d.turn_id for d in router.declined] == [bytes(16)]
        assert await asyncio.wait_for(process.wait(), 10) == 0


async def test_after_a_kill_another_one_goes_on_from_the_journal(tmp_path: Path, tool_gateway: ToolGateway) -> None:
    """Killed after its tool ran and before the result was proposed: the next brain gets the stored result."""
    environment = {"SOMA_TOOLGW_TARGET": f"127.0.0.1:{tool_gateway.port}", "SOMA_OFFLINE_WORD_DELAY_MS": "0"}
    asked: dict[str, Any] = {"model": "offline/assistant", "tools": ["calculate"]}
    dying = brain_process(tmp_path, SOMA_FAILPOINTS="cognition.after_tool_before_result=kill", **environment)
    async with dying as (process, port, token), routers(ScriptedRouter(f"127.0.0.1:{port}", token)) as (router,):
        await router.connect()
        await router.start(stories.start("what is 17*23", **asked))
        await asyncio.wait_for(router.over.wait(), 10)
        assert await asyncio.wait_for(process.wait(), 10) == -signal.SIGKILL
    journal = [turn_pb2.StepBody.FromString(proposal.body) for proposal in router.proposals]
    assert [step.WhichOneof("body") for step in journal] == ["model_reply"]

    (tmp_path / "cognition.log").unlink()
    again = brain_process(tmp_path, **environment)
    async with again as (_, port, token), ScriptedRouter(f"127.0.0.1:{port}", token) as router:
        await router.start(stories.start("what is 17*23", dispatch=2, journal=journal, **asked))
        assert answer_of(await router.ending()).endswith("17*23 = 391.")
        assert [proposal.step for proposal in router.proposals] == [2, 3]
    assert tool_gateway.asked == {call_key(stories.TURN, 1, 0): 2}
    assert tool_gateway.effects == {call_key(stories.TURN, 1, 0): 1}


async def test_bad_settings_are_named_and_end_the_process_with_code_2(tmp_path: Path) -> None:
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "services.cognition.main",
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'gen'}", "SOMA_MAX_TURNS": "none"},
        stderr=asyncio.subprocess.PIPE,
    )
    _, said = await process.communicate()
    assert process.returncode == 2
    assert b"SOMA_MAX_TURNS" in said
    assert b"SOMA_SERVICE_INSTANCE" in said
