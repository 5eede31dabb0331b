"""docs/guides/channel-adapter.md, and the program of docs/guides/watching.md, say what runs."""

import ast
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


@pytest.mark.parametrize("guide", ["channel-adapter.md", "watching.md"])
def test_programs_import_the_kit_before_grpc(guide: str) -> None:
    """It chooses how gRPC works, which gRPC reads once, when it is imported."""
    programs = re.findall(r"```python\n(.*?)```", GUIDE.with_name(guide).read_text(encoding="utf-8"), re.DOTALL)
    program = next(program for program in programs if "asyncio.run(main())" in program)
    modules = [node.module or "" for node in ast.parse(program).body if isinstance(node, ast.ImportFrom)]
    kit = [place for place, module in enumerate(modules) if module.startswith("soma_common")]
    grpc = [place for place, module in enumerate(modules) if module.endswith("_pb2_grpc") or module == "grpc"]
    assert kit
    assert all(kit[0] < place for place in grpc)
