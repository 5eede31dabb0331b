"""The peers' locks: pinned, hashed, without addresses, and at the product's versions where both use a package."""

import json
import re

from tests.peers import install
from tools.lock import ADDRESS

PIN = re.compile(r"^([a-z0-9][a-z0-9._-]*)==([^ ;\\]+)", re.MULTILINE)


def test_python_packages() -> None:
    text = install.LOCK.read_text()
    assert not ADDRESS.search(text)
    for pinned in PIN.finditer(text):
        assert text[pinned.start() :].split("\n", 2)[1].startswith("    --hash=sha256:"), pinned.group()


def test_the_driver_is_the_products() -> None:
    product = dict(PIN.findall((install.ROOT / "requirements" / "runtime.lock").read_text()))
    peers = dict(PIN.findall(install.LOCK.read_text()))
    shared = {name: version for name, version in peers.items() if name in product}
    assert {"asyncpg", "uvloop"} <= shared.keys()
    assert shared == {name: product[name] for name in shared}


def test_restate_server() -> None:
    package, lock = (json.loads(path.read_text()) for path in install.NODE_FILES)
    found = {path: entry for path, entry in lock["packages"].items() if path}
    assert all("resolved" not in entry and entry["integrity"].startswith("sha512-") for entry in found.values())
    [(name, version)] = package["dependencies"].items()
    assert found[f"node_modules/{name}"]["version"] == version
