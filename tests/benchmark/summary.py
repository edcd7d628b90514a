"""What the README says of the benchmark, written from the figures and from nothing else."""

from __future__ import annotations

import re
import textwrap
from typing import Any

from .contenders import TITLES

BLOCK = re.compile(r"(?<=<!-- benchmark -->\n).*?(?=<!-- /benchmark -->)", re.DOTALL)


def into(readme: str, results: dict[str, Any]) -> str:
    """Put the summary where the README has its place."""
    return BLOCK.sub(lambda _: markdown(results), readme)


def markdown(results: dict[str, Any]) -> str:
    tables = results["tables"]
    steps, runs = tables["step_cost_300"]["rows"], tables["whole_runs"]["rows"]
    counts = list(dict.fromkeys(row[1] for row in steps))
    modes = list(dict.fromkeys(row[2] for row in runs))
    lines = [
        ["ms a step, in runs of", *counts, "round trips", *(f"runs/s, {mode}" for mode in modes)],
        ["---", *["--:"] * (len(counts) + 1 + len(modes))],
    ]
    for title in TITLES.values():
        costs = {row[1]: row[4]["median"] / 1000 for row in steps if row[0] == title}
        rates = {row[2]: row[3]["median"] for row in runs if row[0] == title and row[1] == "10"}
        if costs:
            lines.append(
                [
                    title,
                    *(f"{costs[count]:.2f}" if count in costs else "–" for count in counts),
                    next(row[8] for row in steps if row[0] == title),
                    *(f"{rates[mode]:,.0f}" if mode in rates else "–" for mode in modes),
                ]
            )
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    machine = ", ".join(
        [results["machine"]["machine"]]
        + [f"{name} {results['machine'][name]}" for name in ("Python", "PostgreSQL")]
    )
    pending = _row(tables["scale"], "list_pending")
    start, contention = tables["start_up"], tables["contention"]
    about = (
        "Whole runs with results of 300 bytes, divided by their steps; and runs of 10 steps in a "
        f"second. Medians of {results['rounds']} rounds on {machine}. {' '.join(results['peers'])}"
    )
    resume = _row(start, "resume 10,000 steps")
    found = [
        f"`list_pending` takes {_ms(pending[1])} among 10,000 snapshots, {_ms(pending[2])} among "
        "1,000,000.",
        f"A cron job with nothing to do takes {_ms(_row(start, 'cron, nothing to do')[1])} from "
        "start to end; psycopg alone, with one SELECT, "
        f"{_ms(_row(start, 'psycopg, one SELECT')[1])}.",
        f"A run of 10,000 steps is resumed in {_ms(resume[1])}, the start of Python included, with "
        f"{resume[2]['median']:.0f} MB at most.",
        "16 processes that empty one queue find another to be faster at "
        f"{_row(contention, 'acquisitions wasted, %')[2]['median']:.0f} % of what they turn to.",
    ]
    return "\n\n".join(
        [
            "",
            "![Milliseconds for each step, and runs a second](tests/benchmark/results.svg)",
            table,
            textwrap.fill(about, 105),
            "\n".join(textwrap.fill(f"- {text}", 105, subsequent_indent="  ") for text in found),
            "",
        ]
    )


def _row(table: dict[str, Any], label: str) -> list[Any]:
    return next(row for row in table["rows"] if row[0] == label)


def _ms(figure: dict[str, Any]) -> str:
    median = figure["median"]
    return f"{median:.0f} ms" if median >= 10 else f"{median:.1f} ms"
