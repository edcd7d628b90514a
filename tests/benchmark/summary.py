"""What README.md beside this, and the project's, say of the figures: written from nothing else."""

from __future__ import annotations

import re
import textwrap
from typing import Any

from .contenders import TITLES
from .figures import short

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
        return f"{costs[title, '10']} and {costs[title, '5,000']}"

    items = results["tables"]["fan_out"]["rows"]
    item = next(row for row in items if (row["way"], row["threads"]) == ("step.map", "16"))
    text = (
        f"In runs of 10 and of 5,000 steps, a step with a result of 300 bytes costs "
        f"{both('awaitly-postgres')}. On the same server, a prepared INSERT with its commit costs "
        f"{both('bare INSERT')}, a step in DBOS {both('DBOS')}, and one in LangGraph "
        f"{both('LangGraph')}. As an item of `step.map` with 16 workers, it costs "
        f"{item['µs an item']['median'] / 1000:.2f} ms."
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
    items = tables["fan_out"]["rows"]
    of_map = next(row for row in items if (row["way"], row["threads"]) == ("step.map", "16"))
    queue = next((row for row in items if row["way"].startswith("DBOS")), None)
    accepted = {row["call"]: row["µs a run"]["median"] for row in tables["accepted"]["rows"]}
    workers = _row(tables["workers"], "16")
    wasted = _row(contention, "acquisitions wasted, %")["16 processes"]["median"]
    found = [
        f"An item of `step.map` with 16 workers takes {of_map['µs an item']['median']:.0f} µs, "
        f"{of_map['× floor']['median']:.2f} times one INSERT and commit"
        + (
            f"; a workflow on a DBOS queue {queue['µs an item']['median']:,.0f} µs."
            if queue
            else "."
        ),
        f"`submit` takes {accepted['submit']:.0f} µs, and `submit_many` "
        f"{accepted['submit_many']:.0f} µs a run.",
        f"Of runs that wait 20 ms, `resume_pending(workers=16)` completes "
        f"{workers['× one']['median']:.1f} times as many as one worker.",
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
            "### Targets",
            _targets(tables),
            "### Where the commits of a short run go",
            _short_run(tables["short_run"]),
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
    for name, title in TITLES.items():
        if name == "before":
            continue
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


def _targets(tables: dict[str, Any]) -> str:
    """Every target, met or missed, and why those are missed that are."""
    lines = ["| target | | measured | |", "| --- | --- | --: | --- |"]
    for table in tables.values():
        for target in table["targets"]:
            limit = f"{'≥' if target['at_least'] else '≤'} {target['limit']:,g}"
            verdict = "met" if target["met"] else f"**missed.** {target['why']}".strip()
            low, high = short(min(target["samples"])), short(max(target["samples"]))
            measured = short(target["median"]) + (f" ({low}–{high})" if low != high else "")
            lines.append(f"| {target['what']} | {limit} | {measured} | {verdict} |")
    return "\n".join(lines)


def _short_run(table: dict[str, Any]) -> str:
    lines = ["| commit | µs | × a bare INSERT |", "| --- | --: | --: |"]
    for row in table["rows"]:
        cells = (short(row[name]["median"]) for name in ("µs", "× a bare INSERT"))
        lines.append(f"| {row['commit']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _row(table: dict[str, Any], label: str) -> dict[str, Any]:
    """Return the row that begins so."""
    return next(row for row in table["rows"] if label in row.values())


def _ms(figure: dict[str, Any]) -> str:
    median = figure["median"]
    return f"{median:.0f} ms" if median >= 10 else f"{median:.1f} ms"
