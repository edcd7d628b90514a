"""Draws what the benchmark has found."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.figure import Figure

from .contenders import TITLES

COLOURS = {
    "awaitly": "#0b6e4f",
    "floor": "#8a8f98",
    "rewrite": "#c8553d",
    "dbos": "#3a6ea5",
    "langgraph": "#8c5e9c",
    "langgraph_tasks": "#c49bd1",
}


def draw(results: dict[str, Any], file: Path) -> None:
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    _steps(left, results["tables"]["step_cost_300"])
    _runs(right, results["tables"]["whole_runs"])
    with rc_context({"svg.hashsalt": "awaitly"}):  # the same figures give the same file
        figure.savefig(file, dpi=150, metadata={"Date": None} if file.suffix == ".svg" else None)


def _steps(axes: Any, table: dict[str, Any]) -> None:
    for name in COLOURS:
        title = TITLES[name]
        rows = [row for row in table["rows"] if row["contender"] == title]
        if rows:
            counts = [int(row["steps"].replace(",", "")) for row in rows]
            cost = [row["µs of the run"]["median"] / 1000 for row in rows]
            style = "--" if name == "floor" else "-"
            axes.plot(counts, cost, style, marker="o", color=COLOURS[name], label=title)
    axes.set(
        xscale="log",
        yscale="log",
        xlabel="steps of the run",
        ylabel="ms for each step",
        title="A run, divided by its steps",
    )
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter("{x:,g}")
    axes.legend(frameon=False, fontsize="small")
    axes.grid(alpha=0.2)


def _runs(axes: Any, table: dict[str, Any]) -> None:
    rows = [row for row in table["rows"] if row["steps"] == "10"]
    modes = list(dict.fromkeys(row["by"] for row in rows))
    names = [name for name in COLOURS if any(row["contender"] == TITLES[name] for row in rows)]
    width = 0.8 / len(names)
    for place, name in enumerate(names):
        of_name = [row for row in rows if row["contender"] == TITLES[name]]
        rates = [row["runs/s"]["median"] for row in of_name]
        spots = [nr + (place - (len(names) - 1) / 2) * width for nr in range(len(modes))]
        bars = axes.bar(spots, rates, width, color=COLOURS[name], label=TITLES[name])
        axes.bar_label(bars, fmt="%.0f", fontsize="x-small")
    axes.set(title="Runs of 10 steps, each second", ylabel="runs/s")
    axes.set_xticks(range(len(modes)), modes)
    axes.legend(frameon=False, fontsize="small")
    axes.spines[["top", "right"]].set_visible(False)
