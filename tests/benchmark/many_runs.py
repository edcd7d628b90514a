"""What many runs cost together: accepted in one call, and done by several workers."""

from __future__ import annotations

import time
from collections.abc import Iterator

from awaitly_postgres import Durable, SnapshotStore, Step, postgres

from .figures import Figure, Table, Target
from .server import Server

SCHEMA = "benchmark_many_runs"
WORKERS = 16
WAIT = 0.02  # seconds, in the step of each run


def measure(server: Server, _: object, rounds: int, quick: bool) -> Iterator[Table]:
    server.fresh_schema(SCHEMA)
    with postgres(server.url, schema=SCHEMA, max_size=2) as store:
        store.create_tables()
        yield accepted(server, store, rounds, 1_000 if quick else 10_000)
    yield done(server, rounds, 64 if quick else 800)


def nothing(step: Step, nr: int, text: str) -> None:
    """A run that is only accepted."""


def wait(step: Step, nr: int) -> None:
    step("wait", time.sleep, WAIT)


def accepted(server: Server, store: SnapshotStore, rounds: int, count: int) -> Table:
    table = Table(
        "submit_many", f"{count:,} runs accepted, in seconds", ("call", "s", "× submit", "µs a run")
    )
    durable = Durable(store)
    durable.workflow(nothing)
    found: dict[str, list[float]] = {"submit": [], "submit_many": [], "submit_many again": []}
    for nr in range(rounds):
        server.settle()
        runs = {f"{nr}-{run}": (run, "x" * 100) for run in range(count)}
        began = time.perf_counter()
        for id, args in runs.items():
            durable.submit(f"one-{id}", nothing, *args)
        found["submit"].append(time.perf_counter() - began)
        for name, new in (("submit_many", count), ("submit_many again", 0)):
            began = time.perf_counter()
            assert len(durable.submit_many(nothing, runs)) == new
            found[name].append(time.perf_counter() - began)
    figures = {name: Figure(samples) for name, samples in found.items()}
    for name, figure in figures.items():
        table.add(name, figure, figure / figures["submit"], figure * (1e6 / count))
    ratio = figures["submit_many"] / figures["submit"]
    table.targets.append(Target("submit_many, times submit", ratio, 0.15))
    return table


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
    table.targets.append(Target(f"{WORKERS} workers, times one", many, 10, True))
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
