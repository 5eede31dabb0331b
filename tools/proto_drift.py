"""Fail when the committed gen/ is not, byte for byte, what proto/ generates."""

import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def main() -> int:
    """Generate beside the checkout and compare; return 1 and name the files when they differ."""
    with tempfile.TemporaryDirectory() as folder:
        if subprocess.run(["buf", "generate", "--output", folder], cwd=ROOT).returncode != 0:
            return 1
        expected, committed = _contents(Path(folder) / "gen"), _contents(ROOT / "gen")
    differing = sorted(
        f"gen/{name}" for name in expected.keys() | committed.keys() if expected.get(name) != committed.get(name)
    )
    if not differing:
        print(f"{len(expected)} generated files are up to date")
        return 0
    print(
        "gen/ is not what proto/ generates. Run `make proto` and commit the result. Differing:", *differing, sep="\n  "
    )
    return 1


def _contents(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }


if __name__ == "__main__":
    sys.exit(main())
