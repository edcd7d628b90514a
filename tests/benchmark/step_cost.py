"""What one step costs in runs of 10 to 10,000 steps, and what it makes the server do."""

from __future__ import annotations

from collections.abc import Iterator

from .contenders import TITLES, Contenders, Work
from .figures import Figure, Table, Target
from .rounds import Cost, in_rounds
from .server import Server, Wire

RUNS = {10: 30, 100: 5, 1_000: 1, 5_000: 1}  # steps of a run: runs of a round
SIZES = (300, 4_000)  # bytes of a step's result
ENVELOPE = 95  # bytes of its JSON besides
# Times the floor; of the whole run where an INSERT and its commit take SLOW seconds.
LIMITS = {10: 1.4, 100: 1.3, 5_000: 1.15}
CPU_LIMITS = {10: 1.4, 100: 1.25, 5_000: 1.2}
SLOW = 0.0005
COLUMNS = (
    *("contender", "steps", "µs a step", "× floor", "µs of the run", "× run of the floor"),
    *("CPU, µs", "× floor's CPU", "WAL bytes", "commits", "round trips"),
)
NOTES = [
    "µs a step: from one step to the next; the median, which passes over a rewrite in between.",
    "µs of the run: all of it, divided by the steps; the floor does two INSERTs more for its begin",
    "and end. CPU (processor time of client and server), WAL and commits (transaction ids taken):",
    "of the run, divided by its steps; no checkpoint comes in between. Of rewriting all, at",
    "most 25 steps are done, evenly spread, and no begin and end. LangGraph tasks are written in",
    "the background: when the next one begins, the last may not be there yet.",
]

WHY_STEPS = (
    "The fenced statement alone takes 1.25 times the INSERT's processor time; the rest is Python."
)
WHY_WAL = "Folding writes what is out of line again, uncompressed where it hardly compresses."
Trips = dict[str, Figure]  # round trips a step, by contender


def measure(server: Server, contenders: Contenders, rounds: int, quick: bool) -> Iterator[Table]:
    names = contenders.names(*TITLES)
    runs = dict(list(RUNS.items())[: 2 if quick else None])
    trips = {name: Figure([_round_trips(contenders, name)]) for name in names}
    for size in SIZES:
        title = f"A step with a result of {size:,} bytes"
        table = Table(f"step_cost_{size}", title, COLUMNS, notes=NOTES)
        for steps in runs:
            work = dict.fromkeys(names, Work(steps, size, runs[steps]))
            found = in_rounds(server, contenders, work, rounds)
            _add(table, steps, found, trips)
            ours = found["awaitly"]
            if size == SIZES[0] and steps in CPU_LIMITS:
                what = f"processor time of a step in {steps:,}, times the floor's"
                limit = CPU_LIMITS[steps]
                ratio = ours.cpu / found["floor"].cpu
                table.targets.append(Target(what, ratio, limit, why=WHY_STEPS))
            what = f"WAL bytes of a step of {size:,} bytes in {steps:,}"
            limit = 3 * (size + ENVELOPE) + 1000
            table.targets.append(Target(what, ours.wal, limit, why=WHY_WAL))
            what = f"commits of a step of {size:,} bytes in {steps:,}"
            table.targets.append(Target(what, ours.commits, (steps + 2) / steps))
        table.targets.append(Target(f"round trips a step of {size:,} bytes", trips["awaitly"], 1))
        yield table
    yield _on_a_slower_disk(server, contenders, rounds, runs, trips)


def _on_a_slower_disk(
    server: Server, contenders: Contenders, rounds: int, runs: dict[int, int], trips: Trips
) -> Table:
    names = contenders.names("floor", "awaitly", "before")
    pace = dict.fromkeys(["floor"], Work(100, runs=5))
    quick = in_rounds(server, contenders, pace, rounds)["floor"].run.median
    table = Table(
        "step_cost_slow",
        f"A step with a result of 300 bytes where an INSERT takes about {SLOW * 1e3:g} ms",
        COLUMNS,
        notes=["The server waits before each commit (commit_delay), as a disk across a network."],
    )
    with server.slower_commits(max(SLOW - quick, 0)):
        for steps in runs:
            work = dict.fromkeys(names, Work(steps, runs=runs[steps]))
            found = in_rounds(server, contenders, work, rounds)
            _add(table, steps, found, trips)
            if steps in LIMITS:
                what = f"whole run of {steps:,} steps, times the floor, an INSERT taking 0.5 ms"
                ratio = found["awaitly"].run / found["floor"].run
                table.targets.append(Target(what, ratio, LIMITS[steps], why=WHY_STEPS))
    return table


def _add(table: Table, steps: int, found: dict[str, Cost], trips: Trips) -> None:
    floor = found["floor"]
    for name, cost in found.items():
        of_time = [cost.step * 1e6, cost.step / floor.step, cost.run * 1e6, cost.run / floor.run]
        rest = cost.cpu * 1e6, cost.cpu / floor.cpu, cost.wal, cost.commits, trips[name]
        table.add(TITLES[name], f"{steps:,}", *of_time, *rest)


def _round_trips(contenders: Contenders, name: str) -> float:
    """Count them on the wire: what a run of 30 steps has more than one of 10, a step."""
    wire = Wire(contenders.url)
    with wire.counted() as url, contenders.running([name], url) as (contender,):
        contender.do(Work(30, runs=3))  # all statements are prepared now
        counts = []
        for steps in (10, 30):
            before = wire.round_trips
            done = contender.do(Work(steps, runs=1))
            counts.append((wire.round_trips - before, done["steps"]))
    (few, of_few), (many, of_many) = counts
    return (many - few) / (of_many - of_few)
