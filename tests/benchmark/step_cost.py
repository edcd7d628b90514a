"""What a durable step costs, beside the floor: one prepared INSERT of the same JSON and its commit.

    python tests/benchmark/step_cost.py [--url URL] [--size BYTES] [--rounds N]

Without --url on an embedded server of its own; fsync is on in any case. Inside each run, step and
INSERT take turns on a connection each, so that a noisy machine disturbs both alike.

    us/run     a whole run, begin and end and rewrites included, per step; mean
    x floor    the same to the mean of the floor
    us/step    one step; median
    x floor    the same to the median of the floor
    WAL/step   bytes of write-ahead log that a run writes, per step
    commits    of a run: the transaction ids it takes
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import mean, median

import psycopg

from awaitly_postgres import Durable, SnapshotStore, Step, embedded, postgres

SCHEMA = "awaitly_step_cost"
COUNTS = {10: 100, 100: 10, 1_000: 3, 10_000: 1}  # steps of a run: runs of a round


@contextmanager
def own_server() -> Iterator[str]:
    with tempfile.TemporaryDirectory(prefix="awaitly-step-cost-") as folder:
        Path(folder).chmod(0o755)  # run by root, the server is another user
        server = embedded.server(Path(folder) / "pgdata")
        try:
            yield server.get_uri()
        finally:
            server.cleanup()


class Runs:
    """Durable runs, with a bare INSERT after each step or without."""

    def __init__(self, store: SnapshotStore, url: str, size: int) -> None:
        self._durable = Durable(store)
        self._value = "x" * (size - 2)
        self._runs = 0
        self.run(10)
        first = store.load("run-1").steps["step-0"]
        self.step_json = json.dumps(first.to_json(), separators=(",", ":"))
        self._floor = psycopg.connect(url, autocommit=True)
        self._floor.execute(
            f"CREATE TABLE {SCHEMA}.floor (id text, key text, step jsonb, PRIMARY KEY (id, key))"
        )
        self._insert = f"INSERT INTO {SCHEMA}.floor VALUES (%s, %s, %s::jsonb)"

    def run(self, count: int) -> None:
        self._runs += 1
        self._durable.run(f"run-{self._runs}", self._work, count)

    def _work(self, step: Step, count: int) -> None:
        for nr in range(count):
            step(f"step-{nr}", str, self._value)

    def run_with_floor(self, count: int) -> tuple[float, list[float], list[float]]:
        """Return the seconds of the run without the INSERTs, of each step and of each INSERT."""
        steps, floors = [], []

        def work(step: Step) -> None:
            for nr in range(count):
                at = [time.perf_counter()]
                step(f"step-{nr}", str, self._value)
                at.append(time.perf_counter())
                with self._floor.cursor() as cursor:
                    params = f"run-{self._runs}", f"step-{nr}", self.step_json
                    cursor.execute(self._insert, params, prepare=True)
                at.append(time.perf_counter())
                steps.append(at[1] - at[0])
                floors.append(at[2] - at[1])

        self._runs += 1
        began = time.perf_counter()
        self._durable.run(f"run-{self._runs}", work)
        return time.perf_counter() - began - sum(floors), steps, floors

    def close(self) -> None:
        self._floor.close()


def wal(db: psycopg.Connection) -> int:
    return int(db.execute("SELECT pg_current_wal_insert_lsn() - '0/0'::pg_lsn").fetchone()[0])


def transactions(db: psycopg.Connection) -> int:
    """Take a transaction id, as each commit that writes does."""
    return int(db.execute("SELECT txid_current()").fetchone()[0])


def measure(url: str, size: int, rounds: int) -> None:
    with psycopg.connect(url, autocommit=True) as db:
        version, fsync = db.execute(
            "SELECT current_setting('server_version'), current_setting('fsync')"
        ).fetchone()
        db.execute(f"DROP SCHEMA IF EXISTS {SCHEMA} CASCADE")
        db.execute(f"CREATE SCHEMA {SCHEMA}")
        with postgres(url, schema=SCHEMA, max_size=2) as store:
            runs = Runs(store, url, size)
            print(f"PostgreSQL {version}, fsync {fsync}, steps of {len(runs.step_json)} bytes\n")
            table(db, runs, rounds)
            runs.close()
        db.execute(f"DROP SCHEMA {SCHEMA} CASCADE")


def table(db: psycopg.Connection, runs: Runs, rounds: int) -> None:
    titles = "steps", "us/run", "x floor", "us/step", "x floor", "WAL/step", "commits"
    print("".join(title.rjust(10) for title in titles))
    for count, times in COUNTS.items():
        wholes, steps, floors = [], [], []
        for _ in range(times * rounds):
            whole, *each = runs.run_with_floor(count)
            wholes.append(whole / count)
            steps += each[0]
            floors += each[1]
        written, committed = [], []
        for _ in range(3):  # the least of them: others may use the server, too
            before = wal(db), transactions(db)
            runs.run(count)
            committed.append(transactions(db) - before[1] - 1)
            written.append((wal(db) - before[0]) / count)
        print(
            f"{count:10,}{1e6 * mean(wholes):10.0f}{mean(wholes) / mean(floors):10.2f}"
            f"{1e6 * median(steps):10.0f}{median(steps) / median(floors):10.2f}"
            f"{min(written):10.0f}{min(committed):10,}",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--url", help="a server with fsync on (default: an embedded one)")
    parser.add_argument("--size", type=int, default=300, help="bytes of a step's result")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    if options.url:
        measure(options.url, options.size, options.rounds)
    else:
        with own_server() as url:
            measure(url, options.size, options.rounds)


if __name__ == "__main__":
    main()
