"""What gRPC gets of a service config, and what stays with us."""

from importlib.resources import files

import pytest

from soma_common.grpc.service_config import load_service_config, retries_of, timeout_of

SERVICES = sorted(
    file.name.removesuffix(".json")
    for file in files("soma_common.grpc.service_config").iterdir()
    if file.name.endswith(".json")
)


@pytest.mark.parametrize("service", [*SERVICES, "no-such-service"])
def test_grpc_gets_retries_and_no_timeouts(service: str) -> None:
    given = retries_of(service)["methodConfig"]
    assert all(entry.keys() == {"name", "retryPolicy"} for entry in given)
    retried = [entry for entry in load_service_config(service).get("methodConfig", []) if "retryPolicy" in entry]
    assert [(entry["name"], entry["retryPolicy"]) for entry in given] == [
        (entry["name"], entry["retryPolicy"]) for entry in retried
    ]


def test_the_timeouts_stay_defaults() -> None:
    retries_of("toolgw")
    assert timeout_of("soma.toolgw.v1.ToolService", "InvokeTool") == 60
    assert timeout_of("soma.toolgw.v1.ToolService", "NoSuchMethod") is None


def test_grpc_hides_no_try_of_a_tool_call() -> None:
    """A call that failed twice has the error of the second try: nobody could tell that the first one had begun it."""
    names = [name["method"] for entry in retries_of("toolgw")["methodConfig"] for name in entry["name"]]
    assert "InvokeTool" not in names
    assert "CancelInvocation" in names
