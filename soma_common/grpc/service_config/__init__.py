"""Timeouts and retries per method, as data: one `<service>.json` per service in gRPC's service-config format.

A timeout is a default: the channel takes it for calls that are made without one, the server for calls that come
without a deadline. The retries are gRPC's own (`retries_of`). Only unary, idempotent methods retry, and only on
UNAVAILABLE; long-lived streams have neither timeout nor retry. InvokeTool has no retry here: the brain asks again by
itself, and has to know of each try how it failed.
"""

import json
from functools import cache
from importlib.resources import files
from typing import Any

DEFAULT_UNARY_TIMEOUT_S = 30.0
"""For unary methods that no file names."""


@cache
def load_service_config(service: str) -> dict[str, Any]:
    """Return the service config of `service` (`router`), or an empty one when it has no file. Do not change the
    result.
    """
    file = files(__name__) / f"{service}.json"
    config: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    return config


def retries_of(service: str) -> dict[str, Any]:
    """Return the service config of `service` as gRPC gets it: without the timeouts. gRPC takes the smaller of such a
    timeout and the call's own, so that no caller could allow more.
    """
    config = load_service_config(service)
    entries = [
        {key: value for key, value in entry.items() if key != "timeout"} for entry in config.get("methodConfig", [])
    ]
    return {**config, "methodConfig": [entry for entry in entries if entry.keys() != {"name"}]}


def timeout_of(full_service: str, method: str) -> float | None:
    """Return the default timeout in seconds that the config names for a method, the service's if it names none itself,
    else None.
    """
    timeouts: dict[tuple[str, str], float] = {}
    for entry in load_service_config(short_name(full_service)).get("methodConfig", []):
        if "timeout" in entry:
            for name in entry["name"]:
                timeouts[name["service"], name.get("method", "")] = float(entry["timeout"].removesuffix("s"))
    return timeouts.get((full_service, method), timeouts.get((full_service, "")))


def short_name(service: str) -> str:
    """Return `router` for `soma.router.v1.TurnService`; a name without dots is returned as it is."""
    parts = service.split(".")
    return parts[1] if len(parts) > 2 else service
