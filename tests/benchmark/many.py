"""What items of `step.map`, and steps in threads, cost beside one INSERT and commit for each."""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import psycopg

from awaitly_postgres import Durable, SnapshotStore, Step, postgres

from .contender import step_json
from .figures import Figure, Table, Target, figures
from .server import Server

SCHEMA = "benchmark_many"
_ids = itertools.count()
THREADS = (8, 16, 32)
INSERT = f"INSERT INTO {SCHEMA}.bare VALUES (%s, %s, %s::jsonb)"


def measure(server: Server, _: object, rounds: int, quick: bool) -> Iterator[Table]:
    count = 1_000 if quick else 10_000
    table = Table(
        "many",
        f"{count:,} trivial items in one run",
        ("way", "threads", "µs a step", "× floor", "client CPU, µs", "commits"),
    )
    table.notes = [
        "The whole run, its begin and end included, divided by the items. Floor: as many prepared",
        "INSERTs of the same bytes, each with its commit, by one thread, in the same round.",
    ]
    samples: dict[tuple[str, int], list[tuple[float, ...]]] = {}
    for _round in range(rounds):
        server.fresh_schema(SCHEMA)
        with postgres(server.url, schema=SCHEMA) as store:
            store.create_tables()
            ways = [("bare INSERT", 1, lambda: insert(server.url, count))]
            for threads in THREADS:
                ways += [
                    ("step.map", threads, run_of(store, mapped(count, threads))),
                    ("step", threads, run_of(store, in_threads(count, threads))),
                ]
            server.db.execute(f"CREATE TABLE {SCHEMA}.bare (id text, key text, step jsonb)")
            server.db.execute(f"ALTER TABLE {SCHEMA}.bare ADD PRIMARY KEY (id, key)")
            for name, threads, do in ways:
                server.settle()
                found = measured(server, do, count)
                samples.setdefault((name, threads), []).append(found)
    seconds = {way: figures(found) for way, found in samples.items()}
    floor = seconds["bare INSERT", 1][0]
    for (name, threads), (step, cpu, commits) in seconds.items():
        table.add(name, f"{threads}", step * 1e6, step / floor, cpu * 1e6, commits)
    ratio: Figure = seconds["step.map", 16][0] / floor
    what = f"step.map of {count:,} items, 16 workers, times the floor a step"
    table.targets.append(Target(what, ratio, 0.5))
    yield table


def measured(server: Server, do: Callable[[], None], count: int) -> tuple[float, float, float]:
    """Return seconds, seconds of this process's processor time, and commits, for each item."""
    before, cpu, began = server.transactions(), time.process_time(), time.perf_counter()
    do()
    took, cpu = time.perf_counter() - began, time.process_time() - cpu
    return took / count, cpu / count, (server.transactions() - before - 1) / count


def insert(url: str, count: int) -> None:
    with psycopg.connect(url, autocommit=True) as db:
        for nr in range(count):
            step = json.dumps(step_json(nr, str(nr)), separators=(",", ":"))
            db.execute(INSERT, ("run", f"map[{nr}]", step), prepare=True)


def mapped(count: int, threads: int) -> Callable[[Step], int]:
    def work(step: Step) -> int:
        return len(step.map("map", str, range(count), workers=threads))

    return work


def in_threads(count: int, threads: int) -> Callable[[Step], int]:
    def work(step: Step) -> int:
        with ThreadPoolExecutor(threads) as pool:
            return len(list(pool.map(lambda nr: step(f"map[{nr}]", str, nr), range(count))))

    return work


def run_of(store: SnapshotStore, work: Callable[[Step], int]) -> Callable[[], None]:
    durable, id = Durable(store), str(next(_ids))
    return lambda: durable.run(id, work) and None
