"""The locks say what pyproject.toml asks for, and nothing about where to get it."""

import re
import tomllib
from pathlib import Path

import pytest

from tools.lock import ADDRESS, LOCKS

ROOT = Path(__file__).parents[3]
PIN = re.compile(r"^([a-z0-9][a-z0-9._-]*)==([^ ;\\]+)", re.MULTILINE)
RUNTIME, DEV = LOCKS


def pins(lock: str) -> dict[str, str]:
    return dict(PIN.findall((ROOT / lock).read_text()))


def asked_for(requirements: list[str]) -> set[str]:
    return {re.split(r"[=<>!~\[; ]", requirement)[0] for requirement in requirements}


@pytest.mark.parametrize("lock", LOCKS)
def test_names_no_address(lock: str) -> None:
    assert not ADDRESS.search((ROOT / lock).read_text())


@pytest.mark.parametrize("lock", LOCKS)
def test_every_pin_has_a_hash(lock: str) -> None:
    text = (ROOT / lock).read_text()
    for pinned in PIN.finditer(text):
        assert text[pinned.start() :].split("\n", 2)[1].startswith("    --hash=sha256:"), pinned.group()


def test_development_runs_what_services_run() -> None:
    runtime, dev = pins(RUNTIME), pins(DEV)
    assert runtime
    assert {name: dev.get(name) for name in runtime} == runtime


def test_every_requirement_is_locked() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert asked_for(project["project"]["dependencies"]) <= pins(RUNTIME).keys()
    for group in project["dependency-groups"].values():
        assert asked_for(group) <= pins(DEV).keys()


def test_services_do_not_install_what_draws_plots() -> None:
    assert not {"matplotlib", "numpy"} & pins(RUNTIME).keys()


def test_stubs_are_generated_by_the_grpc_that_runs_them() -> None:
    assert pins(DEV)["grpcio-tools"] == pins(DEV)["grpcio"]


@pytest.mark.parametrize(
    "line", ["--index-url https://index.invalid/simple", "-e .", "name @ file:///tmp/name.whl", "--find-links wheels"]
)
def test_an_address_is_found(line: str) -> None:
    assert ADDRESS.search(f"typer==0.1 \\\n    --hash=sha256:00\n{line}\n")
