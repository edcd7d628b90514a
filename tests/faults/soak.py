"""Many workflows in one process: what it needs must not grow."""

from __future__ import annotations

import gc
import os
import resource
import secrets
import threading
import time

import psycopg
from psycopg.conninfo import make_conninfo

from awaitly_postgres import Durable, Step, postgres

from .check import Row

POOL = 4
THREADS = 8  # in groups of so many workflows


def small(step: Step, nr: int) -> int:
    doubled = step("double", lambda: nr * 2)
    return step("add", lambda: doubled + 1)


def large(step: Step, nr: int) -> int:
    return sum(len(step(f"part-{part}", lambda: "x" * 2000)) for part in range(12))


def mapped(step: Step, nr: int) -> int:
    return sum(step.map("part", lambda part: part * nr, range(12), workers=4))


# One in ten of each of the last two.
WORKFLOWS = [small] * 8 + [large, mapped]


def result_of(nr: int) -> int:
    return {small: 2 * nr + 1, large: 24_000, mapped: 66 * nr}[WORKFLOWS[nr % 10]]


def soak(url: str, workflows: int) -> Row:
    """Run so many, and compare memory, threads and connections early and late."""
    row, began = Row("soak"), time.monotonic()
    schema, name = f"soak_{secrets.token_hex(6)}", f"soak-{os.getpid()}"
    with psycopg.connect(url, autocommit=True) as watcher:
        watcher.execute(f"CREATE SCHEMA {schema}")
        own = make_conninfo(url, options=f"-c search_path={schema}", application_name=name)

        def connections() -> int:
            query = "SELECT count(*) FROM pg_stat_activity WHERE application_name = %s"
            return int(watcher.execute(query, (name,)).fetchone()[0])

        with postgres(own, max_size=POOL) as store:
            durable = Durable(store)

            def group(first: int) -> None:
                for nr in range(first, min(first + THREADS, workflows)):
                    if durable.run(f"soak-{nr}", WORKFLOWS[nr % 10], nr) != result_of(nr):
                        row.lost += 1

            def batch(first: int, last: int) -> tuple[int, int, int]:
                for start in range(first, last, THREADS * THREADS):
                    firsts = range(start, min(start + THREADS * THREADS, last), THREADS)
                    threads = [threading.Thread(target=group, args=(nr,)) for nr in firsts]
                    for thread in threads:
                        thread.start()
                    for thread in threads:
                        thread.join()
                gc.collect()
                peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
                return peak, connections(), len(gc.get_objects())

            early = batch(0, workflows // 4)
            late = batch(workflows // 4, workflows)
            row.workflows = store.stats().by_status["completed"]
        row.unfinished = workflows - row.workflows
        for what, least, before, after in zip(
            ("kB at most", "connections", "objects"), (4096, POOL, 2000), early, late, strict=True
        ):
            row.remark(f"note: {what}: {before:,} after a quarter, {after:,} at the end")
            if after - before > least:
                row.leftovers += 1
                row.remark(f"{what} grew by {after - before:,}")
        deadline = time.monotonic() + 10
        while (
            left := connections() + threading.active_count() - 1
        ) and time.monotonic() < deadline:
            time.sleep(0.05)
        row.leftovers += left
        if left:
            threads = [thread.name for thread in threading.enumerate()]
            row.remark(f"left over: {connections()} connections, threads {threads}")
        for table in ("awaitly_snapshots_steps", "awaitly_workflow_lock"):
            (rows,) = watcher.execute(f"SELECT count(*) FROM {schema}.{table}").fetchone()
            row.leftovers += rows
            if rows:
                row.remark(f"left over: {rows} rows in {table}")
        watcher.execute(f"DROP SCHEMA {schema} CASCADE")
    row.seconds = round(time.monotonic() - began, 1)
    return row
