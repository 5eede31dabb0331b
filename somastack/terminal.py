"""What all commands share: where they print, and the options that mean the same everywhere."""

from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console

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
