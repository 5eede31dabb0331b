"""What is said to gRPC has to be said before it is imported; a process that imports it earlier pays for it silently."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
_SAYS = """
import importlib, os, sys
importlib.import_module({package!r})
print("grpc" in sys.modules, os.environ.get("GRPC_EXPERIMENTS"))
"""


def _says(package: str, **environment: str) -> list[str]:
    inherited = {name: value for name, value in os.environ.items() if name != "GRPC_EXPERIMENTS"}
    inherited["PYTHONPATH"] = os.pathsep.join((str(ROOT), str(ROOT / "gen")))
    ran = subprocess.run(
        [sys.executable, "-c", _SAYS.format(package=package)],
        env=inherited | environment,
        capture_output=True,
        text=True,
        check=True,
    )
    return ran.stdout.split()


@pytest.mark.parametrize("package", ["services", "soma_common", "tests.bench"])
def test_the_engine_is_chosen_before_grpc_is_imported(package: str) -> None:
    assert _says(package) == ["False", "-event_engine_listener,-event_engine_client"]


def test_a_value_from_outside_wins() -> None:
    assert _says("services", GRPC_EXPERIMENTS="x") == ["False", "x"]
