"""Renew the peers' hash-pinned lock: `python -m tests.peers.lock [--upgrade]`, then commit it.

What the product uses too (the PostgreSQL driver, the event loop) is taken at the product's version. Restate's server is
pinned in node/: `npm install --package-lock-only --omit-lockfile-registry-resolved` there renews its lock.
"""

from __future__ import annotations

import subprocess
import sys

from tests.peers.install import HERE, LOCK, ROOT
from tools.lock import ADDRESS

RECIPE = (
    *("uv", "pip", "compile", str(HERE / "requirements.in"), "--quiet", "--universal", "--python-version", "3.11"),
    *("--generate-hashes", "--no-annotate", "--no-emit-index-url", "--no-emit-find-links"),
    *("--constraint", "requirements/runtime.lock", "--custom-compile-command", "python -m tests.peers.lock"),
)


def main(options: list[str]) -> int:
    """Compile the lock; return 1 when uv fails or the lock names an address."""
    if subprocess.run([*RECIPE, *options, "--output-file", str(LOCK)], cwd=ROOT, check=False).returncode:
        return 1
    if found := ADDRESS.search(LOCK.read_text()):
        print(f"{LOCK.name} names an address: {found.group()!r}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
