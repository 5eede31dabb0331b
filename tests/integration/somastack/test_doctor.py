"""What the doctor finds in homes and on ports that are not as they should be."""

import socket
from pathlib import Path

import pytest

from somastack.doctor import Finding, Verdict, diagnose
from somastack.home import Home
from somastack.layout import SPAN, Layout


async def findings(home: Path, base: int = 30_000) -> dict[str, Finding]:
    return {finding.what: finding for finding in await diagnose(Home(home), Layout(base))}


async def test_a_fresh_machine_is_well(tmp_path: Path) -> None:
    found = await findings(tmp_path / "home")
    assert {finding.verdict for finding in found.values()} <= {Verdict.GOOD, Verdict.DOUBTFUL}
    assert not (tmp_path / "home").exists()


async def test_whatever_is_not_good_comes_with_advice(tmp_path: Path) -> None:
    home = tmp_path / "home"
    Home(home).make()
    (home / "auth" / "admin.token").write_text("secret")
    (home / "auth" / "admin.token").chmod(0o644)
    home.chmod(0o777)
    found = await findings(home)
    assert found["home"].verdict is Verdict.BAD
    assert found["home"].advice == f"close it: chmod go-w {home}"
    assert found["secrets"].verdict is Verdict.BAD
    assert "admin.token" in found["secrets"].advice
    assert all(finding.advice for finding in found.values() if finding.verdict is not Verdict.GOOD)


async def test_a_taken_port_is_named(tmp_path: Path) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        base = port - 10  # where the control plane would listen
        if base + SPAN > 65536:
            pytest.skip("the system gave a port at the very end")
        found = await findings(tmp_path / "home", base)
    assert found["ports"].verdict is Verdict.BAD
