"""Where the commits of a short run go: its begin, each of its steps, and its end."""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from statistics import median

import psycopg

from awaitly_postgres import Durable, Step, postgres

from .contender import step_json, text
from .figures import Figure, Table
from .server import Server

SCHEMA = "benchmark_short"
STEPS, SIZE = 10, 300  # a run's steps, and the bytes of the result of each
ROWS = ("begin", *(f"step {nr + 1}" for nr in range(STEPS)), "end")


def measure(server: Server, _: object, rounds: int, quick: bool) -> Iterator[Table]:
    runs = 30 if quick else 200
    table = Table(
        "short_run",
        f"The commits of a run of {STEPS} steps with results of {SIZE} bytes",
        ("commit", "µs", "× a bare INSERT", "WAL bytes"),
    )
    table.notes = [
        "A run's first steps are stored by rewriting its snapshot; from the size on at which",
        f"PostgreSQL would move it out of line they are appended. Median of {runs} runs a round.",
    ]
    server.fresh_schema(SCHEMA)
    with (
        postgres(server.url, schema=SCHEMA, max_size=1) as store,
        psycopg.connect(server.url, autocommit=True) as db,
    ):
        durable = Durable(store)
        db.execute(f"CREATE TABLE {SCHEMA}.bare (id text, key text, step jsonb)")
        db.execute(f"ALTER TABLE {SCHEMA}.bare ADD PRIMARY KEY (id, key)")
        ids = map(str, itertools.count())
        for _ in range(10):  # until the statements are prepared
            one_run(durable, next(ids), time.perf_counter)
            insert(db, next(ids))
        server.settle()
        samples = []
        for _round in range(rounds):
            of_runs = [one_run(durable, next(ids), time.perf_counter) for _ in range(runs)]
            bare = median(insert(db, next(ids)) for _ in range(runs * STEPS))
            samples.append((bare, *(median(of_commit) for of_commit in zip(*of_runs, strict=True))))
        wal = one_run(durable, next(ids), server.wal)
    bare, *commits = [Figure(samples) for samples in zip(*samples, strict=True)]
    table.add("bare INSERT", bare * 1e6, bare / bare, "")
    for name, commit, written in zip(ROWS, commits, wal, strict=True):
        table.add(name, commit * 1e6, commit / bare, Figure([written]))
    yield table


def one_run(durable: Durable, id: str, clock: Callable[[], float]) -> list[float]:
    """Return how far the clock has gone on in the begin of a run, in each step, and in the end."""

    def work(step: Step) -> None:
        moments.append(clock())
        for nr in range(STEPS):
            step(f"step-{nr}", text, nr, SIZE)
            moments.append(clock())

    moments = [clock()]
    durable.run(id, work)
    moments.append(clock())
    return [after - before for before, after in pairwise(moments)]


def insert(db: psycopg.Connection, id: str) -> float:
    """Return the seconds that it takes to insert a step."""
    began = time.perf_counter()
    step = json.dumps(step_json(0, text(0, SIZE)))
    db.execute(
        f"INSERT INTO {SCHEMA}.bare VALUES (%s, 'step', %s::jsonb)", (id, step), prepare=True
    )
    return time.perf_counter() - began
