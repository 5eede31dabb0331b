"""What the contracts say of each method agrees with the data beside them: timeouts, retries and roles."""

import json
from importlib import import_module
from importlib.resources import files
from pathlib import Path

import pytest
from google.protobuf import descriptor_pool
from google.protobuf.descriptor import MethodDescriptor
from soma.common.v1 import authz_pb2

from soma_common.grpc.method import describe_service
from soma_common.grpc.service_config import load_service_config, short_name, timeout_of

ROOT = Path(__file__).parents[2]


def _methods() -> list[MethodDescriptor]:
    found: list[MethodDescriptor] = []
    for path in sorted((ROOT / "proto" / "soma").rglob("*.proto")):
        name = path.relative_to(ROOT / "proto").as_posix()
        import_module(name.removesuffix(".proto").replace("/", ".") + "_pb2")
        file = descriptor_pool.Default().FindFileByName(name)
        found += [method for service in file.services_by_name.values() for method in service.methods]
    return found


METHODS = _methods()
OF_NO_TENANT = {
    "soma.cognition.v1.CognitionService.RunTurns",
    "soma.controlplane.v1.ConfigService.WatchConfig",
    "soma.controlplane.v1.TenantService.CreateTenant",
    "soma.controlplane.v1.TenantService.ListTenants",
    "soma.controlplane.v1.TenantService.UpdateTenant",
    "soma.controlplane.v1.TenantService.DeleteTenant",
    "soma.controlplane.v1.TenantService.PauseTenant",
    "soma.controlplane.v1.TenantService.ResumeTenant",
}
"""Methods for those who may act for all tenants: services, and administrators of the platform."""

CONFIGS = sorted((ROOT / "soma_common" / "grpc" / "service_config").glob("*.json"))


def _is_unary(method: MethodDescriptor) -> bool:
    return not (method.client_streaming or method.server_streaming)


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.full_name)
def test_every_method_says_who_may_call_it(method: MethodDescriptor) -> None:
    rules = describe_service(method.containing_service.full_name)
    assert rules[method.name].permission
    assert not rules[method.name].public


def test_only_these_methods_touch_no_single_tenant() -> None:
    without = {
        method.full_name for method in METHODS if not method.GetOptions().Extensions[authz_pb2.authz].tenant_field
    }
    assert without == OF_NO_TENANT


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.full_name)
def test_unary_methods_have_a_timeout_and_streams_have_none(method: MethodDescriptor) -> None:
    timeout_s = timeout_of(method.containing_service.full_name, method.name)
    assert (timeout_s is not None) == _is_unary(method)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_only_unary_methods_of_that_service_retry_and_only_when_unavailable(path: Path) -> None:
    known = {(method.containing_service.full_name, method.name): method for method in METHODS}
    for entry in load_service_config(path.stem)["methodConfig"]:
        for name in entry["name"]:
            assert short_name(name["service"]) == path.stem
            assert _is_unary(known[name["service"], name["method"]])
        if "retryPolicy" in entry:
            assert entry["retryPolicy"]["retryableStatusCodes"] == ["UNAVAILABLE"]


_SAME_TWICE = {"CancelTurn", "InterruptTurn", "PauseSession", "ResumeSession", "RevertTurn"}
"""Stopping or reverting a turn that was, or pausing what is paused, changes nothing: the name alone makes them
idempotent."""


def test_mutations_without_a_key_do_not_retry() -> None:
    """A method may be sent again by gRPC when it only reads, or when its request carries what makes it take effect
    once."""
    for path in CONFIGS:
        for entry in load_service_config(path.stem)["methodConfig"]:
            for name in entry["name"] if "retryPolicy" in entry else ():
                service = descriptor_pool.Default().FindServiceByName(name["service"])
                request = service.methods_by_name[name["method"]].input_type
                reads = name["method"].startswith(("Get", "List"))
                keyed = "idempotency_key" in request.fields_by_name
                assert reads or keyed or name["method"] in _SAME_TWICE, name


def test_roles_grant_only_permissions_that_some_method_asks_for() -> None:
    asked = {method.GetOptions().Extensions[authz_pb2.authz].permission for method in METHODS}
    roles = json.loads((files("soma_common.authz") / "policy" / "roles.json").read_text())["roles"]
    granted = {permission for role in roles.values() for permission in role["permissions"]}
    assert granted - {"*"} <= asked
