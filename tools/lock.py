"""Write requirements/*.lock from pyproject.toml: every version pinned, every file hashed, no registry named.

`runtime.lock` is what a service's image installs; `dev.lock` adds what development, the gates and the benchmark's plots
need, at the same versions. Pins stay as they are unless pyproject.toml needs another; `--upgrade` takes the newest.
"""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LOCKS = {
    "requirements/runtime.lock": (),
    "requirements/dev.lock": ("--group", "dev", "--group", "bench", "--constraint", "requirements/runtime.lock"),
}
RECIPE = (
    *("uv", "pip", "compile", "pyproject.toml", "--quiet", "--universal", "--python-version", "3.11"),
    *("--generate-hashes", "--no-annotate", "--no-emit-index-url", "--no-emit-find-links"),
    *("--custom-compile-command", "make lock"),
)
# A lock must install from any index, mirror or folder of wheels: no address, no option line, no file path.
ADDRESS = re.compile(r"://|^\s*-(?!-hash=)|@ |file:", re.MULTILINE)


def main(options: list[str]) -> int:
    """Compile each lock with the given uv options; return 1 when uv fails or a lock names an address."""
    for lock, arguments in LOCKS.items():
        print(f"lock: {lock}", flush=True)
        if subprocess.run([*RECIPE, *arguments, *options, "--output-file", lock], cwd=ROOT).returncode != 0:
            return 1
        if found := ADDRESS.search((ROOT / lock).read_text()):
            print(f"lock: {lock} names an address: {found.group()!r}", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
