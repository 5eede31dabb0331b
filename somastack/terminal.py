"""What all commands share: where they print and read, and the options that mean the same everywhere."""

import contextlib
import re
import sys
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console
from rich.text import Text

from somastack.story import EMOJI, LEVEL_STYLES, Line, cut

console = Console(highlight=False, soft_wrap=True)
errors = Console(stderr=True, highlight=False, soft_wrap=True)

HomeOption = Annotated[
    Path | None,
    typer.Option(
        "--home",
        file_okay=False,
        show_default="$SOMASTACK_HOME, else ./.somastack if there is one, else ~/.somastack",
        help="Where the stack keeps everything.",
    ),
]
Output = Literal["table", "json"]
OutputOption = Annotated[Output, typer.Option("--output", "-o", help="For people or for programs.")]
TenantOption = Annotated[str, typer.Option(help="The tenant of names that do not say it.")]
LimitOption = Annotated[int, typer.Option("--limit", "-n", min=1, help="Show at most so many.")]
RequestIdOption = Annotated[
    str | None,
    typer.Option(
        "--request-id",
        help="The same id again is the same request, also after a lost answer.",
        show_default="a new one",
    ),
]
EtagOption = Annotated[str, typer.Option(help="Only if this is the stored etag.", show_default="whatever it is")]


def read_line(prompt: Text) -> str:
    """Read a line from the terminal, with line editing where Python has it. Raises EOFError at the end of the input.

    The prompt is given to readline instead of printed before it: what is typed as soon as the prompt is seen (Ctrl-D
    above all) then meets a terminal that is ready for it, and editing never erases the prompt.
    """
    with console.capture() as shown:
        console.print(prompt, end="")
    text = shown.get()
    if sys.stdin.isatty() and sys.stdout.isatty():
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401 - takes part in input() from now on

            text = re.sub(r"(\x1b\[[0-9;]*m)", "\x01\\1\x02", text)  # readline's marks around what takes no room
    return input(text)


def render_line(line: Line) -> Text:
    """A line of the story for a terminal."""
    style = LEVEL_STYLES[line.level]
    text = Text(f"{line.time:12} ", style="dim")
    text.append(f"{EMOJI.get(line.who.partition('-')[0], '· ')} {line.who:<15} ", style=style or "cyan")
    text.append({"warning": "⚠️  ", "error": "💥 "}.get(line.level, ""))
    text.append(line.event, style=style or "bold")
    for name, value in line.facts.items():
        text.append(f"  {name}=", style="dim")
        text.append(cut(value), style=style)
    return text
