"""The administrator's guide can be pasted: its commands, in their order, against a real control plane."""

from __future__ import annotations

import asyncio
import os
import re
import sys
from pathlib import Path

from tests.integration.controlplane.conftest import Plane

GUIDE = Path(__file__).parents[3] / "docs" / "guides" / "admin.md"
SCRIPTS = re.compile(r"^```sh\n(.*?)^```", re.DOTALL | re.MULTILINE)


async def test_the_guides_commands_work(plane: Plane, tmp_path: Path) -> None:
    blocks = SCRIPTS.findall(GUIDE.read_text(encoding="utf-8"))
    assert len(blocks) > 7
    environment = {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "HOME": str(tmp_path),
        "CONTROL": f"http://{plane.target}",
        "TOKEN": plane.identities.token(),
    }
    script = "set -eu\n" + "\n".join(blocks)
    process = await asyncio.create_subprocess_exec(
        "sh", "-c", script, env=environment, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
    )
    output = (await process.communicate())[0].decode()
    assert process.returncode == 0, output
    assert '"model": "echo/echo"' in output
