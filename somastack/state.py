"""What a running stack says about itself in <home>/run/stack.json: written by the supervisor, read by every command."""

import dataclasses
import json
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

from soma_common.embedded.process import ProcessIdentity, write_private

FORMAT = 1
"""Raised when the file's meaning changes; a file of another format is taken for no file."""


class Phase(StrEnum):
    """Where a part, or the whole stack, is in its life."""

    WAITING = "waiting"
    STARTING = "starting"
    READY = "ready"
    UNRESPONSIVE = "unresponsive"
    RESTARTING = "restarting"
    STOPPING = "stopping"
    STOPPED = "stopped"
    FAILED = "failed"


@dataclass
class PartState:
    """One part of the stack."""

    name: str
    phase: Phase = Phase.WAITING
    since: str = ""
    """When the phase began: RFC 3339, UTC."""
    process: ProcessIdentity | None = None
    addresses: dict[str, str] = field(default_factory=dict)
    """By purpose: `grpc`, `admin`, `nats`, `dsn` ..."""
    restarts: int = 0
    """How often it was started again since the stack's start."""
    log: str = ""
    """Its log: a file, or a directory of files."""
    trouble: str = ""
    """Why it is not ready; empty when it is."""


@dataclass
class StackState:
    """The whole stack."""

    phase: Phase
    since: str
    supervisor: ProcessIdentity
    port_base: int
    parts: list[PartState] = field(default_factory=list)

    def targets(self, service: str) -> str:
        """The gRPC addresses of the replicas of `service`, separated by commas."""
        return ",".join(part.addresses["grpc"] for part in self.parts if part.name.rpartition("-")[0] == service)

    def save(self, path: Path) -> None:
        """Write the state in one step: a reader never sees half of it."""
        # Not synced: it is true only while the supervisor lives, and a slow disk must not hold up a restart.
        write_private(path, json.dumps({"format": FORMAT, **dataclasses.asdict(self)}, indent=2) + "\n", sync=False)

    @classmethod
    def load(cls, path: Path) -> "StackState | None":
        """The state last written; None when there is none that this version understands."""
        try:
            raw: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            if raw.pop("format") != FORMAT:
                return None
            return cls(
                phase=Phase(raw["phase"]),
                since=raw["since"],
                supervisor=ProcessIdentity(**raw["supervisor"]),
                port_base=raw["port_base"],
                parts=[_part(part) for part in raw["parts"]],
            )
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            return None


def _part(raw: dict[str, Any]) -> PartState:
    process = raw.pop("process")
    return PartState(**{**raw, "phase": Phase(raw["phase"])}, process=ProcessIdentity(**process) if process else None)
