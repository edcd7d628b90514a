"""What one step costs in runs of 10 to 10,000 steps, and what it makes the server do."""

from __future__ import annotations

from collections.abc import Iterator

from .contenders import TITLES, Contenders, Work
from .figures import Figure, Table, Target, figures
from .server import Server, Wire

RUNS = {10: 30, 100: 5, 1_000: 1, 10_000: 1}  # steps of a run: runs of a round
SIZES = (300, 4_000)  # bytes of a step's result
ENVELOPE = 95  # bytes of its JSON besides
LIMITS = {10: 1.3, 100: 1.3, 10_000: 1.5}  # times the floor
COLUMNS = (
    *("contender", "steps", "µs a step", "× floor", "µs of the run", "× run of the floor"),
    *("WAL bytes", "commits", "round trips"),
)
NOTES = [
    "µs a step: from one step to the next; the median, which passes over a rewrite in between.",
    "µs of the run: all of it, divided by the steps; the floor does two INSERTs more for its begin",
    "and end. WAL and commits, which are transaction ids taken: of the run, divided by its steps;",
    "no checkpoint comes in between. Of rewriting all, at most 25 steps are done, evenly spread,",
    "and no begin and end. LangGraph tasks are written in the background: when the next one",
    "begins, the last may not be there yet.",
]

Samples = dict[str, list[Figure]]  # by contender: as in COLUMNS, without the ratios


def measure(server: Server, contenders: Contenders, rounds: int, quick: bool) -> Iterator[Table]:
    names = contenders.names(*TITLES)
    trips = {name: Figure([_round_trips(contenders, name)]) for name in names}
    for size in SIZES:
        title = f"A step with a result of {size:,} bytes"
        table = Table(f"step_cost_{size}", title, COLUMNS, notes=NOTES)
        for steps in list(RUNS)[: 2 if quick else None]:
            server.settle()
            found = _samples(server, contenders, names, Work(steps, size, RUNS[steps]), rounds)
            floor = found["floor"]
            for name, (step, run, wal, commits) in found.items():
                ratios = step / floor[0], run / floor[1]
                of_time = step * 1e6, ratios[0], run * 1e6, ratios[1]
                table.add(TITLES[name], f"{steps:,}", *of_time, wal, commits, trips[name])
            table.targets += _targets(found, steps, size)
        table.targets.append(Target("round trips a step", trips["awaitly"], 1))
        yield table


def _samples(
    server: Server, contenders: Contenders, names: list[str], work: Work, rounds: int
) -> Samples:
    samples: dict[str, list[list[float]]] = {name: [] for name in names}
    with contenders.running(names) as team:
        for nr in range(rounds):
            for contender in team[nr % len(team) :] + team[: nr % len(team)]:
                before = server.wal(), server.transactions()
                done = contender.do(work)
                written = server.wal() - before[0]
                commits = server.transactions() - before[1] - 1
                run = done["seconds"] / done["steps"]
                step = run if contender.name == "rewrite" else done["between"]
                each = [step, run, written / done["steps"], commits / done["steps"]]
                samples[contender.name].append(each)
    return {name: figures(samples[name]) for name in names}


def _targets(found: Samples, steps: int, size: int) -> Iterator[Target]:
    ours, floor = found["awaitly"], found["floor"]
    if steps in LIMITS:
        what = f"a step in {steps:,}, times the floor"
        yield Target(f"{what}: median", ours[0] / floor[0], LIMITS[steps])
        yield Target(f"{what}: whole run", ours[1] / floor[1], LIMITS[steps])
    what = f"WAL bytes of a step in {steps:,}"
    yield Target(what, ours[2], 3 * (size + ENVELOPE) + 1000)
    yield Target(f"commits of a step in {steps:,}", ours[3], (steps + 2) / steps)


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
