"""What is wrong with the tool gateway's settings is told by their names, before anything is started."""

from pathlib import Path

import pytest

from services.toolgw.settings import ToolgwSettings
from soma_common.settings import EXIT_BAD_SETTINGS, load_settings


@pytest.fixture(autouse=True)
def _needed(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {
        "SOMA_SERVICE_INSTANCE": "toolgw-0",
        "SOMA_POSTGRES_DSN": "postgresql://nowhere/soma",
        "SOMA_CONTROLPLANE_TARGET": "127.0.0.1:1",
        "SOMA_AUTH_SERVICE_TOKEN_FILE": "/tmp/token",
    }.items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize("path", ["tools.json", "./tools.json", "../here/tools.json"])
def test_a_tools_file_by_a_relative_path_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], path: str
) -> None:
    monkeypatch.setenv("SOMA_TOOLGW_HTTP_TOOLS_FILE", path)
    with pytest.raises(SystemExit) as ended:
        load_settings(ToolgwSettings)
    assert ended.value.code == EXIT_BAD_SETTINGS
    told = capsys.readouterr().err
    assert "SOMA_TOOLGW_HTTP_TOOLS_FILE: " in told
    assert "no absolute path, and services run in /: give the whole path, such as $PWD/" in told
    assert f"(it is '{path}')" in told


@pytest.mark.parametrize(("given", "read"), [("/etc/tools.json", Path("/etc/tools.json")), ("", None)])
def test_a_tools_file_by_its_whole_path_is_taken(
    monkeypatch: pytest.MonkeyPatch, given: str, read: Path | None
) -> None:
    monkeypatch.setenv("SOMA_TOOLGW_HTTP_TOOLS_FILE", given)
    assert load_settings(ToolgwSettings).toolgw_http_tools_file == read
