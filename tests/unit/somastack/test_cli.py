"""What the command line says before anything runs, and of a start that fails half-way."""

import asyncio
import importlib.metadata
import os
from collections.abc import Awaitable, Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner

from soma_common.embedded.process import PartFailed
from somastack import cli
from somastack.home import Home
from somastack.layout import Layout
from somastack.supervisor import StackOptions

FAILED = PartFailed("the demonstration failed", "look at the log")


@pytest.fixture
def options(tmp_path: Path) -> StackOptions:
    return StackOptions(Home(tmp_path / "home"), Layout())


def test_the_version_is_that_of_the_package() -> None:
    shown = CliRunner().invoke(cli.app, ["--version"])
    assert (shown.exit_code, shown.output) == (0, f"somastack {importlib.metadata.version('somastack')}\n")


@pytest.mark.parametrize("model", ["foo", "openai/", "/gpt-4o", "Open AI/gpt"])
def test_a_model_of_no_provider_is_refused_before_anything_starts(tmp_path: Path, model: str) -> None:
    environment = {"NO_COLOR": "1", "COLUMNS": "200"}
    arguments = ["up", "--demo", "--model", model, "--home", str(tmp_path / "home")]
    refused = CliRunner(env=environment).invoke(cli.app, arguments)
    assert refused.exit_code == 2
    assert f"{model!r} is not provider/name, such as openai/gpt-4o" in refused.output
    assert not (tmp_path / "home").exists()


@pytest.mark.parametrize("detached", [[], ["--detach"]])
def test_a_model_without_the_demonstration_is_refused_before_anything_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, detached: list[str]
) -> None:
    for start in ("_up_here", "_up_detached"):
        monkeypatch.setattr(cli, start, lambda *_arguments, **_options: pytest.fail("a stack was started"))
    environment = {"NO_COLOR": "1", "COLUMNS": "200"}
    arguments = ["up", *detached, "--model", "openai/gpt-4o", "--home", str(tmp_path / "home")]
    refused = CliRunner(env=environment).invoke(cli.app, arguments)
    assert refused.exit_code == 2
    assert "--model: it is the model of the demonstration's agent: add --demo, or " in refused.output
    assert not (tmp_path / "home").exists()


async def failing(*_arguments: object) -> None:
    raise FAILED


def test_a_demonstration_that_fails_stops_the_stack_and_says_so(
    options: StackOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def serve(_options: StackOptions, when_ready: Callable[[object], Awaitable[None]]) -> None:
        await when_ready(SimpleNamespace(state=None))

    monkeypatch.setattr(cli, "demonstrate", failing)
    monkeypatch.setattr(cli, "serve", serve)
    with pytest.raises(PartFailed) as failed:
        cli._up_here(options, None, demo=True)
    assert (failed.value.message, failed.value.advice) == (FAILED.message, "look at the log; the stack was stopped")


class TestDetached:
    """A stack of which only the demonstration is played here."""

    @pytest.fixture(autouse=True)
    def started(self, monkeypatch: pytest.MonkeyPatch) -> None:
        async def until_ready(*_arguments: object) -> None:
            pass

        monkeypatch.setattr(cli, "start_detached", lambda _options: None)
        monkeypatch.setattr(cli, "until_ready", until_ready)

    def test_a_demonstration_that_fails_leaves_the_stack_and_says_so(
        self, options: StackOptions, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(cli, "demonstrate", failing)
        with pytest.raises(PartFailed) as failed:
            cli._up_detached(options, None, demo=True)
        assert failed.value.advice.startswith("look at the log; the stack goes on running (")
        assert f"somastack down --home {options.home.path}" in failed.value.advice

    def test_a_demonstration_that_is_left_leaves_the_stack_and_says_so(
        self, options: StackOptions, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        async def left(*_arguments: object) -> None:
            os.kill(os.getpid(), 2)
            await asyncio.sleep(60)

        monkeypatch.setattr(cli, "demonstrate", left)
        with pytest.raises(KeyboardInterrupt):
            cli._up_detached(options, None, demo=True)
        assert "the stack goes on running" in capsys.readouterr().err
