"""Load: ``python -m tests.faults.load URL`` runs workflows from 64 threads and from 8 processes.

Prints runs per second, the median and the 99th percentile of a run, errors and connections used.
A run is mixed: two steps, a transaction, three steps in a failed and resumed one, or a replay.
"""

from __future__ import annotations

import argparse
import multiprocessing
import random
import secrets
import threading
import time
from collections import Counter
from typing import Any

import psycopg
from psycopg.conninfo import make_conninfo

from awaitly_postgres import Durable, Step, postgres

# ruff: noqa: S311 - chance, not secrets


def plain(step: Step, nr: int) -> int:
    doubled = step("double", lambda: nr * 2)
    return step("add", lambda: doubled + 1)


def paying(step: Step, nr: int) -> int:
    step("look", lambda: nr)
    return step.transaction("pay", _pay, nr)


def _pay(conn: psycopg.Connection, nr: int) -> int:
    conn.execute("INSERT INTO paid VALUES (%s)", (nr,))
    return nr


def failing(step: Step, nr: int) -> int:
    step("first", lambda: nr)
    if step.workflow_id in _seen:
        return step("second", lambda: nr)
    _seen.add(str(step.workflow_id))
    return step("second", _fail)


def _fail() -> int:
    raise LookupError("the first time")


_seen: set[str] = set()


def one(durable: Durable, nr: int) -> None:
    """One run of a kind that the number decides; raises what nobody should see."""
    id, kind = f"{secrets.token_hex(6)}-{nr}", nr % 5
    if kind == 4:
        try:
            durable.run(id, failing, nr)
        except LookupError:
            durable.run(id, failing, nr)
        _seen.discard(id)
    elif kind == 3:
        durable.run(id, paying, nr)
    else:
        durable.run(id, plain, nr)
        if kind == 2:
            durable.run(id, plain, nr)  # returns what is recorded


def drive(url: str, threads: int, pool: int, seconds: float, results: Any) -> None:
    """Run from so many threads on one pool, and put times and errors into ``results``."""
    times: list[float] = []
    errors: Counter[str] = Counter()
    with postgres(url, max_size=pool, kwargs={"application_name": "load"}) as store:
        durable = Durable(store)
        store.create_tables()
        end = time.monotonic() + seconds

        def work() -> None:
            chance = random.Random()
            while time.monotonic() < end:
                start = time.perf_counter()
                try:
                    one(durable, chance.randrange(1_000_000))
                except Exception as error:
                    errors[repr(error)[:200]] += 1
                times.append(time.perf_counter() - start)

        workers = [threading.Thread(target=work) for _ in range(threads)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
    results.put((times, errors))


def measure(url: str, name: str, processes: int, threads: int, pool: int, seconds: float) -> int:
    """Measure one arrangement, print its line, and return the number of errors."""
    fork = multiprocessing.get_context("fork")
    results: Any = fork.Queue()
    children = [
        fork.Process(target=drive, args=(url, threads, pool, seconds, results))
        for _ in range(processes)
    ]
    for child in children:
        child.start()
    used = 0
    end = time.monotonic() + seconds
    query = "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'load'"
    with psycopg.connect(url, autocommit=True) as watcher:
        while time.monotonic() < end:
            used = max(used, watcher.execute(query).fetchone()[0])
            time.sleep(0.2)
    parts = [results.get(timeout=120) for _ in children]
    for child in children:
        child.join()
    times = sorted(taken for part, _ in parts for taken in part)
    errors = sum((found for _, found in parts), Counter())
    p50, p99 = (times[int(len(times) * share)] * 1000 for share in (0.5, 0.99))
    print(
        f"{name:24} {len(times) / seconds:8.0f} runs/s   p50 {p50:7.1f} ms   p99 {p99:7.1f} ms   "
        f"{errors.total()} errors   {used} connections",
        flush=True,
    )
    for text, number in errors.most_common(5):
        print(f"  {number} x {text}")
    return errors.total()


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.faults.load", description=__doc__)
    parser.add_argument("url")
    parser.add_argument("--seconds", type=float, default=60)
    options = parser.parse_args()
    schema = f"load_{secrets.token_hex(6)}"
    url = make_conninfo(options.url, options=f"-c search_path={schema}")
    with psycopg.connect(options.url, autocommit=True) as conn:
        conn.execute(f"CREATE SCHEMA {schema}")
        conn.execute(f"CREATE TABLE {schema}.paid (nr int)")
    try:
        errors = measure(url, "64 threads, pool of 10", 1, 64, 10, options.seconds)
        errors += measure(url, "8 processes of 8 threads", 8, 8, 4, options.seconds)
    finally:
        with psycopg.connect(options.url, autocommit=True) as conn:
            conn.execute(f"DROP SCHEMA {schema} CASCADE")
    return int(errors > 0)


if __name__ == "__main__":
    raise SystemExit(main())
