"""docs/guides/tools.md, "Call one by hand", can be pasted into a fresh shell of the checkout."""

import asyncio
import re
import sys
from asyncio.subprocess import PIPE, STDOUT
from pathlib import Path

from tests.integration.toolgw.conftest import DEMO, Surroundings, running_gateway

GUIDE = Path(__file__).parents[3] / "docs/guides/tools.md"


async def test_the_calls_by_hand_work(surroundings: Surroundings, tmp_path: Path) -> None:
    part = GUIDE.read_text(encoding="utf-8").partition("\n## Call one by hand\n")[2]
    block = re.search(r"```console\n(.*?)```", part, re.DOTALL)
    assert block is not None
    script = re.sub(r"^\$ ", "", block[1], flags=re.MULTILINE)
    checkout = tmp_path / "checkout"
    checkout.mkdir()
    (checkout / ".venv").symlink_to(Path(sys.prefix))
    token = checkout / ".somastack/auth/admin.token"
    token.parent.mkdir(parents=True)
    token.write_text(surroundings.identities.token("operators/me", "*", ["admin"]))
    async with running_gateway(surroundings) as gateway:
        for written, here in {
            "127.0.0.1:7440": gateway.target,
            '"agent": "assistant"': f'"agent": "{DEMO.agent}"',
        }.items():
            assert written in script
            script = script.replace(written, here)
        process = await asyncio.create_subprocess_exec(
            "sh",
            "-euc",
            script,
            cwd=checkout,
            env={"PATH": "/usr/bin:/bin", "HOME": str(tmp_path)},  # what a shell has without the project's own
            stdout=PIPE,
            stderr=STDOUT,
        )
        async with asyncio.timeout(60):
            output = (await process.communicate())[0].decode()
    assert process.returncode == 0, output
    assert '"tool": "calculate"' in output
    assert '"result": "391"' in output
