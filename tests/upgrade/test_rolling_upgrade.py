"""The previous release is replaced by today's code, process by process, under load; and today's code by it again.

All processes share one NATS server and one database throughout. The previous release's code comes out of the
repository, by the commit in tests/contract/golden/releases.toml, and runs in the same environment.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Final

import pytest
import pytest_asyncio

from soma_common.ids import IDS_ANYWHERE
from soma_common.testing.checker import Story
from somastack.layout import Layout
from tests.chaos.load import Load, Mix
from tests.chaos.stack import FaultyStack, faulty_stack
from tests.contract.golden.releases import must_be_there, previous

REPLICAS: Final = {"gateway": 2, "router": 2, "cognition": 2}
ORDER: Final = ("controlplane", "toolgw", "cognition", "router", "gateway")
"""Of an upgrade: who is called before who calls. It is taken back the other way round."""
ERRANDS: Final = Mix(echo=4, slow=3, clerk=3, pause_s=0.3)
MODULE_PATH: Final = "PYTHONPATH"


@pytest.fixture(scope="module")
def old_code(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The previous release's tree."""
    release = previous()
    if absent := release.absent:
        assert not must_be_there(), absent
        pytest.skip(absent)
    return release.extract(tmp_path_factory.mktemp("previous"))


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def mixed(old_code: Path) -> AsyncIterator[FaultyStack]:
    """A stack whose services are all of the previous release."""
    instances = [instance.name for instance in Layout(replicas=REPLICAS).instances()]
    environment = {name: {MODULE_PATH: _path_of(old_code)} for name in instances}
    async with faulty_stack(REPLICAS, environment) as running:
        yield running


def test_the_old_code_is_what_runs(old_code: Path) -> None:
    """The environment has today's code installed as well: the path in front of it wins, for every package."""
    packages = ("services.router.main", "soma_common.ids", "soma.router.v1.inbound_pb2")
    show = "import importlib, sys; [print(importlib.import_module(name).__file__) for name in sys.argv[1:]]"
    environment = {**os.environ, MODULE_PATH: _path_of(old_code)}
    command = [sys.executable, "-P", "-c", show, *packages]
    shown = subprocess.run(command, env=environment, capture_output=True, check=True)
    files = shown.stdout.decode().split()
    assert len(files) == len(packages)
    assert all(Path(file).is_relative_to(old_code) for file in files), files


@pytest.mark.timeout(400)
@pytest.mark.asyncio(loop_scope="module")
async def test_up_and_back_again_under_load(mixed: FaultyStack, old_code: Path) -> None:
    upwards = [instance.name for service in ORDER for instance in mixed.layout.instances(service)]
    # The database keeps the form of ids that the release has which made it.
    story = Story(id_form=IDS_ANYWHERE)
    async with Load(mixed, ERRANDS, story=story, late_labels=True) as load:
        await load.flows()
        for part in upwards:
            del mixed.next_life(part)[MODULE_PATH]
            await _replace(mixed, load, part)
        await load.flows()
        for part in reversed(upwards):
            mixed.next_life(part)[MODULE_PATH] = _path_of(old_code)
            await _replace(mixed, load, part)
        await load.flows()
        counts = await load.finish()
    print(f"upgrade and back: {counts}")
    assert counts["sent"] == counts["accepted"] == counts["answered"], "a client was refused"
    assert not mixed.deaths
    assert not mixed.failed_starts
    assert {part: errors for part in upwards if (errors := _errors(mixed, part))} == {}


async def _replace(stack: FaultyStack, load: Load, part: str) -> None:
    """Stop one process, and go on when the one in its place has taken part."""
    asked_at, took_s = await stack.terminate(part)
    await stack.is_up(part)
    await load.flows(each=2, timeout_s=30.0)
    print(f"{part}: stopped in {took_s:.2f} s, longest silence {load.silence(asked_at):.2f} s")


def _errors(stack: FaultyStack, part: str) -> list[str]:
    """What a process logged as an error: something of the other release that it could not read or write."""
    lines = Path(stack.parts[part].log).read_text(encoding="utf-8").splitlines()
    return [line for line in lines if json.loads(line)["level"] == "error"]


def _path_of(code: Path) -> str:
    return f"{code}{os.pathsep}{code / 'gen'}"
