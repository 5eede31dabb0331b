"""What `somastack status` shows."""

import dataclasses
from typing import Any

from rich.table import Table

from somastack.home import Home
from somastack.state import Phase, StackState

EXIT_READY, EXIT_NOT_READY, EXIT_NOT_RUNNING = 0, 1, 3
PHASE_STYLES = {
    Phase.READY: "green",
    Phase.STOPPED: "dim",
    Phase.FAILED: "bold red",
    Phase.UNRESPONSIVE: "bold yellow",
    Phase.RESTARTING: "bold yellow",
}


def exit_code(state: StackState | None) -> int:
    """0: everything is ready; 1: something is not; 3: nothing runs (as `systemctl status` has it)."""
    if state is None:
        return EXIT_NOT_RUNNING
    ready = state.phase is Phase.READY and all(part.phase is Phase.READY for part in state.parts)
    return EXIT_READY if ready else EXIT_NOT_READY


def as_json(home: Home, state: StackState | None) -> dict[str, Any]:
    """The state for programs: `running`, `home`, and while it runs phase, port base, supervisor and components."""
    if state is None:
        return {"running": False, "home": str(home.path)}
    return {
        "running": True,
        "home": str(home.path),
        "state": state.phase.value,
        "since": state.since,
        "port_base": state.port_base,
        "supervisor_pid": state.supervisor.pid,
        "components": [
            {
                "name": part.name,
                "pid": part.process.pid if part.process else None,
                "state": part.phase.value,
                **{key: value for key, value in dataclasses.asdict(part).items() if key not in _SAID_OTHERWISE},
            }
            for part in state.parts
        ],
    }


_SAID_OTHERWISE = frozenset({"name", "process", "phase"})


def as_table(state: StackState) -> Table:
    """The state for people."""
    table = Table(box=None, pad_edge=False, header_style="dim")
    for column in ("component", "pid", "state", "since", "restarts", "addresses"):
        table.add_column(column, overflow="fold")
    for part in state.parts:
        style = PHASE_STYLES.get(part.phase, "yellow")
        addresses = "  ".join(part.addresses.values())
        table.add_row(
            part.name,
            str(part.process.pid) if part.process else "-",
            f"[{style}]{part.phase}[/]" + (f" ({part.trouble})" if part.trouble else ""),
            part.since,
            str(part.restarts),
            addresses,
        )
    return table
