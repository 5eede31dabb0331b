"""The generated part of docs/benchmarks.md: tables and plots of one run. What people wrote around it stays."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from tests.bench import bars, report
from tests.bench.report import Results

PAGE: Final = Path("docs/benchmarks.md")
BEGIN: Final = "<!-- results: begin -->"
END: Final = "<!-- results: end -->"


def rewritten(page: str, generated: str) -> str:
    """The page with its generated part replaced.

    Raises ValueError when the page does not mark one part, with its begin before its end.
    """
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end or BEGIN in after or END in before or END in after:
        raise ValueError(f"the page must mark one generated part: {BEGIN} ... {END}")
    return f"{before}{BEGIN}\n{generated.strip()}\n{END}{after}"


def generated(results: Results, plots: dict[str, str]) -> str:
    """The part of a run in Markdown; `plots` are the alternative texts of pictures by their paths from the page."""
    blocks = [_made_with(results), _method(results)]
    if not results["complete"]:
        blocks.append("**This run was cut off: what follows is what it had measured until then.**")
    blocks += ["### Bars", bars.table(bars.judged(results)).markdown()]
    for table in report.tables(results):
        blocks += [f"### {table.title}", table.markdown()]
    if plots:
        blocks.append("### Plots")
        blocks += [f"![{text}]({path})" for path, text in plots.items()]
    return "\n\n".join(blocks)


def _made_with(results: Results) -> str:
    return "\n".join(f"- {name}: {value}" for name, value in results["machine"].items())


def _method(results: Results) -> str:
    plan = results["plan"]
    rounds = f"Medians of {plan['rounds']} interleaved rounds (lowest and highest in brackets)"
    if plan["rounds"] == 1:
        rounds = "One round"
    sweep = plan["sweep_rounds"]
    told = (
        f"{rounds}, each case {plan['seconds']:g} s after"
        f" {plan['warm_s']:g} s to warm up; 256-byte messages, agents with 20 messages of context, everything synced"
        " before it is acknowledged."
    )
    if sweep < plan["rounds"]:
        told += f" Shapes that no bar names were taken in {sweep} of the rounds."
    return told
