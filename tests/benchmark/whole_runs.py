"""How many runs a second: one thread, 16 threads, 8 processes."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence

from .contenders import TITLES, Contender, Contenders, Work
from .figures import Figure, Table, Target
from .server import Server

MODES = {"1 thread": (1, 1), "16 threads": (1, 16), "8 processes": (8, 1)}
CONTENDERS = [name for name in TITLES if name not in ("rewrite", "before")]
WHY = {
    "langgraph": "A run of 10 steps is 12 commits; the first and the last are the dearest.",
    "langgraph_tasks": "Its tasks are written in the background, and the last can be lost.",
}
FASTER_THAN = {"dbos": 5, "langgraph": 3, "langgraph_tasks": 3}


def measure(server: Server, contenders: Contenders, rounds: int, quick: bool) -> Iterator[Table]:
    table = Table(
        "whole_runs",
        "Whole runs a second, steps of 300 bytes",
        ("contender", "steps", "by", "runs/s", "× ours"),
    )
    table.notes = [
        "The bare INSERTs are as many as the commits of a run of ours: its steps and 2. LangGraph",
        "tasks are written in the background, and promise less than a step of ours.",
    ]
    names = contenders.names(*CONTENDERS)
    for steps in (3, 10):
        for mode, (processes, threads) in MODES.items():
            server.settle()
            work = Work(steps, seconds=0.5 if quick else 1.5, threads=threads)
            rates: dict[str, list[float]] = {name: [] for name in names}
            with contenders.running([name for name in names for _ in range(processes)]) as running:
                for nr in range(rounds):
                    for name in names[nr % len(names) :] + names[: nr % len(names)]:
                        team = [contender for contender in running if contender.name == name]
                        rates[name].append(rate(team, work))
            found = {name: Figure(rates[name]) for name in names}
            ours = found["awaitly"]
            for name, each in found.items():
                table.add(TITLES[name], str(steps), mode, each, each / ours)
                if steps == 10 and mode == "1 thread" and name in FASTER_THAN:
                    what = f"runs of 10 steps, times {TITLES[name]}"
                    least = FASTER_THAN[name]
                    table.targets.append(Target(what, ours / each, least, True, WHY.get(name, "")))
    yield table


def rate(team: Sequence[Contender], work: Work) -> float:
    """Return how many runs a second they do together."""
    began = time.perf_counter()
    for contender in team:
        contender.start(work)
    runs = sum(contender.answer()["runs"] for contender in team)
    return runs / (time.perf_counter() - began)
