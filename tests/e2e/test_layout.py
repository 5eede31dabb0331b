"""A process that counts partitions otherwise than the stack would send sessions elsewhere: it does not start."""

import asyncio
import sys
from pathlib import Path

import pytest

from soma_common.settings import EXIT_BAD_SETTINGS
from tests.e2e.record import Record, answer
from tests.e2e.stack import ECHO, Stack


@pytest.mark.parametrize("service", ["router", "gateway"])
async def test_another_number_of_partitions_does_not_start(stack: Stack, channel: str, service: str) -> None:
    running = stack.supervisor.parts[f"{service}-0"].process
    assert running is not None
    environment = _environment_of(running.pid) | {
        "SOMA_SERVICE_INSTANCE": f"{service}-9",
        "SOMA_LISTEN": "127.0.0.1:0",
        "SOMA_ADMIN_LISTEN": "127.0.0.1:0",
        "SOMA_PARTITIONS": "4",
    }
    log = Path(environment.pop("SOMA_LOG_FILE")).with_name(f"{service}-9.log")
    other = await asyncio.create_subprocess_exec(
        sys.executable, "-P", "-m", f"services.{service}.main",
        env={**environment, "SOMA_LOG_FILE": str(log)}, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    async with asyncio.timeout(20):
        _, said = await other.communicate()
    assert other.returncode == EXIT_BAD_SETTINGS
    assert "SOMA_PARTITIONS" in said.decode(), "it says what to change"
    assert "Traceback" not in log.read_text() + said.decode()
    seen = Record()
    async with stack.adapter(channel, on_delivery=seen.on_delivery) as adapter:
        receipt = await adapter.send(ECHO, "s", "still here")
        assert "still here" in answer(await seen.outcome_of(receipt.message_id))


def _environment_of(pid: int) -> dict[str, str]:
    """What a running process was started with."""
    variables = Path(f"/proc/{pid}/environ").read_text().split("\0")
    return dict(variable.split("=", 1) for variable in variables if variable)
