"""What one step costs in runs of 10 to 10,000 steps, and what it makes the server do."""

from __future__ import annotations

from collections.abc import Iterator

from .contenders import TITLES, Contenders, Work
from .figures import Figure, Table, Target, figures
from .server import Server, Wire

RUNS = {10: 30, 100: 5, 1_000: 1, 10_000: 1}  # steps of a run: runs of a round
SIZES = (300, 4_000)
LIMITS = {10: 1.3, 100: 1.3, 10_000: 1.5}  # times the floor


def measure(server: Server, contenders: Contenders, rounds: int, quick: bool) -> Iterator[Table]:
    names = contenders.names(*TITLES)
    trips = {name: _round_trips(contenders, name) for name in names}
    for size in SIZES:
        yield _table(server, contenders, names, trips, size, rounds, quick)


def _table(
    server: Server,
    contenders: Contenders,
    names: list[str],
    trips: dict[str, float],
    size: int,
    rounds: int,
    quick: bool,
) -> Table:
    table = Table(
        f"step_cost_{size}",
        f"A step with a result of {size:,} bytes",
        ("", "steps", "µs/step", "× floor", "µs/run/steps", "× floor", "WAL B", "commits", "trips"),
    )
    table.notes = [
        "µs/step: from one step to the next, median of a run. µs/run/steps: whole runs, begin",
        "and end included; the floor does two INSERTs more for those. WAL and commits: of whole",
        "runs, a step; no checkpoint comes in between. Trips: round trips a step. Of rewriting",
        "everything at most 25 steps are done, evenly spread. LangGraph tasks are written in the",
        "background: when the next one begins, the last may not be there yet.",
    ]
    for steps, runs in RUNS.items():
        if quick and steps > 100:
            break
        server.settle()
        with contenders.running(names) as running:
            samples: dict[str, list[list[float]]] = {name: [] for name in names}
            for nr in range(rounds):
                for contender in running[nr % len(running) :] + running[: nr % len(running)]:
                    before = server.wal(), server.transactions()
                    done = contender.do(Work(steps, size, runs))
                    written = server.wal() - before[0]
                    commits = server.transactions() - before[1] - 1
                    each = done["seconds"] / done["steps"]
                    between = each if contender.name == "rewrite" else done["between"]
                    samples[contender.name].append(
                        [between, each, written / done["steps"], commits / done["steps"]]
                    )
        found = {name: figures(samples[name]) for name in names}
        floor = found["floor"]
        for name, (between, each, wal, commits) in found.items():
            table.add(
                TITLES[name],
                f"{steps:,}",
                between * 1e6,
                between / floor[0],
                each * 1e6,
                each / floor[1],
                Figure([wal.median]),
                Figure([commits.median]),
                f"{trips[name]:.0f}",
            )
        ours = found["awaitly"]
        if steps in LIMITS and size == SIZES[0]:
            what = f"a step in {steps:,}, times the floor"
            table.targets.append(Target(what, ours[0] / floor[0], LIMITS[steps]))
        # The step's JSON is its result and about 95 bytes around it.
        what = f"WAL a step in {steps:,}, bytes"
        table.targets.append(Target(what, ours[2], 3 * (size + 95) + 1000))
    return table


def _round_trips(contenders: Contenders, name: str) -> float:
    """Count them on the wire: what a run of 30 steps has more than one of 10."""
    wire = Wire(contenders.url)
    with wire.counted() as url, contenders.running([name], url) as (contender,):
        counts = []
        for steps in (10, 30):
            before = wire.round_trips
            contender.do(Work(steps, runs=1))
            counts.append(wire.round_trips - before)
    return (counts[1] - counts[0]) / 20
