"""docs/guides/channel-adapter.md says what runs."""

import re
from pathlib import Path

import pytest

from tests.integration.gateway.harness import TENANT, World

GUIDE = Path(__file__).parents[3] / "docs/guides/channel-adapter.md"


async def test_the_smallest_adapter_of_the_guide_runs(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    await world.router.echo()
    target = await world.gateway()
    token = tmp_path / "demo.token"
    token.write_text(world.identities.token("adapter", TENANT, ["channel"]) + "\n")
    block = re.search(r"```python\n(.*?)```", GUIDE.read_text(encoding="utf-8"), re.DOTALL)
    assert block is not None
    program = block[1]
    for written, here in {
        "127.0.0.1:7400": target,
        ".somastack/auth/tenants/demo.token": str(token),
        '"assistant"': '"echo"',
        "asyncio.run(main())": "",
    }.items():
        assert written in program
        program = program.replace(written, here)
    names: dict[str, object] = {}
    exec(compile(program, str(GUIDE), "exec"), names)
    await names["main"]()  # type: ignore[operator]
    assert "what is 17*23\n" in capsys.readouterr().out


def test_links_of_the_guide_lead_somewhere() -> None:
    for link in re.findall(r"\]\(([^)#]+)\)", GUIDE.read_text(encoding="utf-8")):
        assert (GUIDE.parent / link).exists(), link
