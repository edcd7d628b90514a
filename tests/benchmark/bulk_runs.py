"""What many runs cost together: accepted in one call, and done by several workers."""

from __future__ import annotations

import time
from collections.abc import Iterator

from awaitly_postgres import Durable, Step, postgres

from .contenders import Contenders, Work
from .figures import Figure, Table, Target
from .rounds import in_rounds
from .server import Server

SCHEMA = "benchmark_bulk"
WORKERS = 16
WHY = "Beside the wait, a run takes processor time, of which the machine has little."
WAIT = 0.02  # seconds, in the step of each run
ACCEPTED = {
    "floor": "bare INSERT",
    "awaitly_submit": "submit",
    "awaitly_submit_many": "submit_many",
    "dbos_enqueue": "DBOS enqueue",
}


def measure(server: Server, contenders: Contenders, rounds: int, quick: bool) -> Iterator[Table]:
    yield accepted(server, contenders, rounds, 1_000 if quick else 10_000)
    yield done(server, rounds, 64 if quick else 800)


def accepted(server: Server, contenders: Contenders, rounds: int, count: int) -> Table:
    table = Table(
        "accepted",
        f"{count:,} runs accepted",
        ("call", "µs a run", "× submit", "CPU, µs", "WAL bytes", "commits"),
    )
    table.notes = ["Each with an argument of 100 bytes. submit_many is one call for all of them."]
    work = dict.fromkeys(contenders.names(*ACCEPTED), Work(count, size=100, runs=1))
    found = in_rounds(server, contenders, work, rounds)
    submit = found["awaitly_submit"].run
    for name, cost in found.items():
        ratio = cost.run / submit
        table.add(ACCEPTED[name], cost.run * 1e6, ratio, cost.cpu * 1e6, cost.wal, cost.commits)
    ratio = found["awaitly_submit_many"].run / submit
    table.targets.append(Target(f"submit_many of {count:,}, times submit", ratio, 0.15))
    return table


def wait(step: Step, nr: int) -> None:
    step("wait", time.sleep, WAIT)


def done(server: Server, rounds: int, count: int) -> Table:
    table = Table(
        "workers",
        f"Runs a second that wait {WAIT * 1e3:g} ms in a step, by resume_pending",
        ("workers", "runs/s", "× one"),
    )
    table.notes = [f"{count:,} runs; one worker has {count // WORKERS:,}."]
    rates = {
        workers: Figure(rate(server, workers, count) for _ in range(rounds))
        for workers in (1, WORKERS)
    }
    for workers, figure in rates.items():
        table.add(str(workers), figure, figure / rates[1])
    many = rates[WORKERS] / rates[1]
    table.targets.append(Target(f"{WORKERS} workers, times one", many, 10, True, WHY))
    return table


def rate(server: Server, workers: int, count: int) -> float:
    """Return the runs a second of so many workers."""
    server.fresh_schema(SCHEMA)
    with postgres(server.url, schema=SCHEMA) as store:
        durable = Durable(store)
        durable.workflow(wait)
        count = count if workers > 1 else count // WORKERS
        durable.submit_many(wait, {f"run-{nr}": (nr,) for nr in range(count)})
        server.settle()
        began = time.perf_counter()
        outcomes = durable.resume_pending(limit=count, workers=workers)
        seconds = time.perf_counter() - began
    assert [outcome.status for outcome in outcomes] == ["completed"] * count
    return count / seconds
