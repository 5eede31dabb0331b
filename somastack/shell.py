"""Commands as a person can paste them into the shell they are in."""

import shlex
import shutil
import sys
from pathlib import Path


def callable_name(program: str) -> str:
    """How to call a program of this environment from here: by its name if the shell finds it, else by its path."""
    beside_us = Path(sys.executable).with_name(program)
    found = shutil.which(program)
    if found is not None and Path(found).resolve() == beside_us.resolve():
        return program
    if not beside_us.exists():
        return program
    return from_here(beside_us)


def from_here(path: Path) -> str:
    """`path` for a shell in the present directory."""
    return shlex.quote(str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path))
