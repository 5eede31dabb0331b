"""The home directory: which one, whose, and how closed."""

import re
import stat
import sys
from pathlib import Path

import pytest

from soma_common.authz.tokens import TokenVerifier
from soma_common.embedded.process import PartFailed
from somastack.auth_material import AuthMaterial
from somastack.home import AlreadyRunning, Home


def test_the_order_of_choice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "me"))
    monkeypatch.delenv("SOMASTACK_HOME", raising=False)
    assert Home.chosen(None).path == tmp_path / "me" / ".somastack"
    (tmp_path / ".somastack").mkdir()
    assert Home.chosen(None).path == tmp_path / ".somastack"
    monkeypatch.setenv("SOMASTACK_HOME", str(tmp_path / "there"))
    assert Home.chosen(None).path == tmp_path / "there"
    assert Home.chosen(Path("here")).path == tmp_path / "here"


def test_its_commands_can_be_pasted_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SOMASTACK_HOME", str(tmp_path / "mine"))
    program = Path(sys.executable).with_name("somastack")
    program = program if program.exists() else Path("somastack")
    monkeypatch.setenv("PATH", "/nowhere")
    assert Home(tmp_path / "mine").command("up", "--demo") == f"{program} up --demo"
    assert Home(tmp_path / "an other").command("status") == f"{program} status --home 'an other'"
    assert Home(Path("/elsewhere")).command("down") == f"{program} down --home /elsewhere"
    monkeypatch.setenv("PATH", str(program.parent))
    assert Home(tmp_path / "mine").command("chat") == "somastack chat"


def test_a_stack_that_runs_already_is_looked_at_or_stopped(tmp_path: Path) -> None:
    advice = AlreadyRunning(Home(tmp_path)).advice
    assert re.search(r"^look at it \(\S*somastack status .*\), or stop it \(\S*somastack down ", advice)


def test_everything_inside_is_closed_to_others(tmp_path: Path) -> None:
    home = Home(tmp_path / "home")
    home.make()
    AuthMaterial(home).make(["router"], ["demo"])
    for path in (home.path, *home.path.rglob("*")):
        assert stat.S_IMODE(path.stat().st_mode) == (0o700 if path.is_dir() else 0o600), path


def test_a_home_others_can_write_to_is_refused(tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home").chmod(0o777)
    with pytest.raises(PartFailed, match="other users can write"):
        Home(tmp_path / "home").make()


def test_one_owner_at_a_time(tmp_path: Path) -> None:
    home = Home(tmp_path / "home")
    home.make()
    assert not home.is_owned()
    with home.owned():
        assert home.is_owned()
        with pytest.raises(AlreadyRunning), home.owned():
            pass
    assert not home.is_owned()
    with home.owned():
        pass


class TestTokens:
    """What the services will take the tokens for."""

    @pytest.fixture
    def material(self, tmp_path: Path) -> AuthMaterial:
        home = Home(tmp_path / "home")
        home.make()
        made = AuthMaterial(home)
        made.make(["router"], ["demo"])
        return made

    def test_each_says_who_and_for_which_tenant(self, material: AuthMaterial) -> None:
        verifier = TokenVerifier(material.keys_file)
        files = {
            material.admin_token_file: ("admin", "*", ("admin",)),
            material.service_token_file("router"): ("router", "*", ("service",)),
            material.tenant_token_file("demo"): ("demo-channels", "demo", ("channel",)),
        }
        for file, expected in files.items():
            caller = verifier.verify(file.read_text().strip())
            assert (caller.subject, caller.tenant, caller.roles) == expected

    def test_a_second_start_keeps_them(self, material: AuthMaterial) -> None:
        before = material.admin_token_file.read_text()
        material.make(["router"], ["demo"])
        assert material.admin_token_file.read_text() == before

    def test_a_tenant_of_ones_own_gets_one_that_later_starts_keep(self, material: AuthMaterial) -> None:
        issued = material.issue("acme")
        verified = TokenVerifier(material.keys_file).verify(issued.read_text().strip())
        assert (verified.subject, verified.tenant, verified.roles) == ("acme-channels", "acme", ("channel",))
        assert stat.S_IMODE(issued.stat().st_mode) == 0o600
        (material.home.auth / "signing.key").unlink()
        material.make(["router"], ["demo"])
        assert TokenVerifier(material.keys_file).verify(issued.read_text().strip()).tenant == "acme"

    @pytest.mark.parametrize("name", ["", "*", "../admin", "Acme", "a/b"])
    def test_what_is_no_tenant_gets_none(self, material: AuthMaterial, name: str) -> None:
        with pytest.raises(PartFailed, match="no tenant's id"):
            material.issue(name)

    def test_a_lost_key_renews_all(self, material: AuthMaterial) -> None:
        (material.home.auth / "signing.key").unlink()
        material.make(["router"], ["demo"])
        verifier = TokenVerifier(material.keys_file)
        assert verifier.verify(material.admin_token_file.read_text().strip()).subject == "admin"
