"""What README.md beside this, and the project's, say of the figures: written from nothing else."""

from __future__ import annotations

import re
import textwrap
from typing import Any

from .contenders import TITLES

BLOCK = re.compile(r"(?<=<!-- benchmark -->\n).*?(?=<!-- /benchmark -->)", re.DOTALL)


def into(page: str, summary: str) -> str:
    """Put a summary where the page has its place."""
    return BLOCK.sub(lambda _: summary, page)


def headline(results: dict[str, Any]) -> str:
    """What a step costs, beside the others."""
    costs = {
        (row["contender"], row["steps"]): f"{row['µs of the run']['median'] / 1000:.2f} ms"
        for row in results["tables"]["step_cost_300"]["rows"]
    }

    def both(title: str) -> str:
        return f"{costs[title, '10']} and {costs[title, '10,000']}"

    text = (
        f"In runs of 10 and of 10,000 steps, a step with a result of 300 bytes costs "
        f"{both('awaitly-postgres')}. On the same server, a prepared INSERT with its commit costs "
        f"{both('bare INSERT')}, a step in DBOS {both('DBOS')}, and one in LangGraph "
        f"{both('LangGraph')}."
    )
    picture = "![Milliseconds per step, and runs per second](tests/benchmark/results.svg)"
    return f"\n{textwrap.fill(text, 115)}\n\n{picture}\n\n"


def markdown(results: dict[str, Any]) -> str:
    tables, machine = results["tables"], results["machine"]
    start, contention = tables["start_up"], tables["contention"]
    about = (
        "A step costs the time of a whole run divided by its steps, each with a result of 300 "
        "bytes. Runs/s counts completed runs of 10 steps. Medians of "
        f"{results['rounds']} rounds on {machine['machine']}, Python {machine['Python']}, "
        f"PostgreSQL {machine['PostgreSQL']}. {' '.join(results['peers'])}"
    )
    pending = _row(tables["scale"], "list_pending")
    few, many = [_ms(figure) for name, figure in pending.items() if "ms" in name]
    resume = _row(start, "resume 10,000 steps")
    runs = _row(contention, "runs/s")
    wasted = _row(contention, "acquisitions wasted, %")["16 processes"]["median"]
    found = [
        f"`list_pending` takes {few} among 10,000 snapshots and {many} among 1,000,000.",
        "A cron job with nothing to do takes "
        f"{_ms(_row(start, 'cron, nothing to do')['ms'])} from start to exit; psycopg alone, "
        f"with one SELECT, takes {_ms(_row(start, 'psycopg, one SELECT')['ms'])}.",
        f"Resuming a run of 10,000 steps takes {_ms(resume['ms'])}, including the start of "
        f"Python, and at most {resume['peak memory, MB']['median']:.0f} MB.",
        f"16 processes that empty one queue complete {runs['16 processes']['median']:.0f} runs of "
        f"one step per second, and a single process {runs['1 process']['median']:.0f}. "
        f"{wasted:.0f} % of their attempts find that another process got there first.",
    ]
    return "\n\n".join(
        [
            "",
            "![Milliseconds per step, and runs per second](results.svg)",
            _table(tables["step_cost_300"]["rows"], tables["whole_runs"]["rows"]),
            textwrap.fill(about, 115),
            "\n".join(textwrap.fill(f"- {text}", 115, subsequent_indent="  ") for text in found),
            "",
        ]
    )


def _table(steps: list[dict[str, Any]], runs: list[dict[str, Any]]) -> str:
    counts = list(dict.fromkeys(row["steps"] for row in steps))
    modes = list(dict.fromkeys(row["by"] for row in runs))
    lines = [
        ["ms per step, in runs of", *counts, "round trips", *(f"runs/s, {mode}" for mode in modes)],
        ["---", *["--:"] * (len(counts) + 1 + len(modes))],
    ]
    for title in TITLES.values():
        ours = [row for row in steps if row["contender"] == title]
        costs = {row["steps"]: f"{row['µs of the run']['median'] / 1000:.2f}" for row in ours}
        rates = {
            row["by"]: f"{row['runs/s']['median']:,.0f}"
            for row in runs
            if row["contender"] == title and row["steps"] == "10"
        }
        if ours:
            trips = f"{ours[0]['round trips']['median']:.0f}"
            by_count = [costs.get(count, "–") for count in counts]
            lines.append([title, *by_count, trips, *(rates.get(mode, "–") for mode in modes)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _row(table: dict[str, Any], label: str) -> dict[str, Any]:
    """Return the row that begins so."""
    return next(row for row in table["rows"] if label in row.values())


def _ms(figure: dict[str, Any]) -> str:
    median = figure["median"]
    return f"{median:.0f} ms" if median >= 10 else f"{median:.1f} ms"
