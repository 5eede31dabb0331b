"""What `somastack status` shows."""

import dataclasses
from collections.abc import Iterator
from typing import Any

from rich.text import Text

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


def as_lines(state: StackState) -> Iterator[Text]:
    """The state for people: a heading and a line for each component, never wrapped, so that addresses can be copied."""
    row = "{:<15} {:>7}  {:<12}  {:<20}  {:>8}  {}".format
    yield Text(row("component", "pid", "state", "since", "restarts", "addresses"), style="dim")
    for part in state.parts:
        since = part.since.partition(".")[0] + "Z"
        line = row(
            part.name,
            part.process.pid if part.process else "-",
            part.phase,
            since,
            part.restarts,
            "  ".join(part.addresses.values()),
        )
        yield Text(line, style=PHASE_STYLES.get(part.phase, "yellow"))
        if part.trouble:
            yield Text(f"{'':<25}{part.trouble}", style="yellow")
