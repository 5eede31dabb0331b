"""Settings come from the environment, are frozen, and a bad one says what to change."""

from typing import Self

import pytest
from pydantic import ValidationError, model_validator

from soma_common.settings import ServiceSettings, load_settings, split_address


def test_values_come_from_prefixed_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOMA_SERVICE_INSTANCE", "router-0")
    monkeypatch.setenv("SOMA_COGNITION_TARGETS", "127.0.0.1:1, 127.0.0.1:2,")
    monkeypatch.setenv("SOMA_POSTGRES_DSN", "")
    settings = load_settings(ServiceSettings)
    assert settings.service == "router"
    assert settings.cognition_targets == ("127.0.0.1:1", "127.0.0.1:2")
    assert settings.postgres_dsn is None
    with pytest.raises(ValidationError):
        settings.lanes = 2  # type: ignore[misc]


def test_bad_values_end_the_process_with_the_variables_to_change(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("SOMA_SERVICE_INSTANCE", raising=False)
    monkeypatch.setenv("SOMA_PARTITIONS", "many")
    monkeypatch.setenv("SOMA_LISTEN", "8080")
    with pytest.raises(SystemExit) as ended:
        load_settings(ServiceSettings)
    assert ended.value.code == 2
    told = capsys.readouterr().err
    assert "SOMA_SERVICE_INSTANCE" in told
    assert "it is not set" in told
    assert "SOMA_PARTITIONS" in told
    assert "'many'" in told
    assert "host:port" in told


def test_values_that_do_not_fit_each_other_are_told_without_all_that_was_given(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Fitting(ServiceSettings):
        password: str

        @model_validator(mode="after")
        def _fits(self) -> Self:
            raise ValueError("SOMA_LANES must be lower than SOMA_PARTITIONS")

    monkeypatch.setenv("SOMA_SERVICE_INSTANCE", "router-0")
    monkeypatch.setenv("SOMA_PASSWORD", "hunter2")
    with pytest.raises(SystemExit):
        load_settings(Fitting)
    told = capsys.readouterr().err
    assert told.endswith("\n  Value error, SOMA_LANES must be lower than SOMA_PARTITIONS\n")
    assert "hunter2" not in told


@pytest.mark.parametrize(
    ("address", "host", "port"), [("127.0.0.1:80", "127.0.0.1", 80), ("[::1]:0", "::1", 0), ("svc:9", "svc", 9)]
)
def test_addresses_are_split(address: str, host: str, port: int) -> None:
    assert split_address(address) == (host, port)


@pytest.mark.parametrize("address", ["8080", ":80", "host:", "host:x", "host:70000", ""])
def test_addresses_that_are_none_are_refused(address: str) -> None:
    with pytest.raises(ValueError, match="host:port"):
        split_address(address)
