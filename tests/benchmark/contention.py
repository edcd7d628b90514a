"""Many workers, one queue: how fast they empty it together, and how often they get in the way.

    python -m tests.benchmark.contention URL

is one of the workers. It begins when it gets a line, and ends when the queue is empty.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

from awaitly_postgres import Durable, Outcome, Step, postgres

from .contenders import Contenders, Work
from .figures import Figure, Table, Target, figures
from .server import Server
from .whole_runs import rate

WORKERS = 16
WHY_WASTED = (
    "All look at the head of the queue; most are found taken by a look, which costs no lease."
)
SCHEMA = "benchmark_contention"


def work(step: Step, nr: int) -> int:
    return step("double", lambda: 2 * nr)


def measure(server: Server, contenders: Contenders, rounds: int, quick: bool) -> Iterator[Table]:
    queued = 500 if quick else 10_000
    table = Table(
        "contention",
        f"{WORKERS} processes empty one queue of {queued:,} runs of a step",
        ("figure", "1 process", f"{WORKERS} processes"),
    )
    table.notes = [
        f"The one has a queue of {queued // WORKERS:,}. Wasted: to turn to a run that another is",
        "faster to take; most of these are found out by a look, before a lease is taken, hence the",
        "commits. A run of one step is four: lease, begin, step, end.",
    ]
    alone = figures([emptied(server, queued // WORKERS, 1) for _ in range(rounds)])
    together = figures([emptied(server, queued, WORKERS) for _ in range(rounds)])
    commits = round(together[2].median)
    bare = [
        Figure([inserts(contenders, commits, processes, quick) for _ in range(rounds)])
        for processes in (1, WORKERS)
    ]
    table.add("runs/s", alone[0], together[0])
    table.add(f"the same of {commits} bare INSERTs each", *bare)
    table.add("acquisitions wasted, %", alone[1], together[1])
    table.add("commits of a run", alone[2], together[2])
    table.targets.append(Target("acquisitions wasted, %", together[1], 10, why=WHY_WASTED))
    yield table


def emptied(server: Server, queued: int, workers: int) -> tuple[float, float, float]:
    """Return runs per second, per cent of wasted acquisitions and commits per run."""
    server.fresh_schema(SCHEMA)
    with postgres(server.url, schema=SCHEMA) as store:
        durable = Durable(store)
        store.create_tables()
        with server.db.transaction():
            for nr in range(queued):
                durable.submit(f"run-{nr}", durable.workflow(work), nr, conn=server.db)
    server.settle()
    with ExitStack() as stack:
        team = []
        for _ in range(workers):
            team.append(
                subprocess.Popen(
                    [sys.executable, "-m", __spec__.name, server.url],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    cwd=Path(__file__).parents[2],
                    text=True,
                )
            )
            stack.callback(team[-1].kill)
        for worker in team:
            assert worker.stdout
            assert worker.stdout.readline(), "a worker has died, see above"
        before, began = server.transactions(), time.perf_counter()
        for worker in team:
            assert worker.stdin
            print(file=worker.stdin, flush=True)
        counts = [json.loads(worker.communicate()[0]) for worker in team]
        seconds = time.perf_counter() - began
    commits = server.transactions() - before - 1
    completed = sum(count["completed"] for count in counts)
    wasted = sum(count["skipped"] for count in counts)
    assert completed == queued, counts
    return completed / seconds, 100 * wasted / (completed + wasted), commits / completed


def inserts(contenders: Contenders, commits: int, processes: int, quick: bool) -> float:
    """Return how many runs of so many commits a second bare INSERTs make."""
    with contenders.running(["floor"] * processes) as team:
        return rate(team, Work(commits - 2, seconds=0.5 if quick else 2))


def worker(url: str) -> None:
    counts = {"completed": 0, "skipped": 0, "failed": 0, "suspended": 0}

    def count(outcome: Outcome) -> None:
        counts[outcome.status] += 1

    with postgres(url, schema=SCHEMA, max_size=2) as store:
        durable = Durable(store)
        durable.workflow(work, name="work")
        durable.list_pending(limit=1)
        print("ready", os.getpid(), flush=True)
        sys.stdin.readline()
        while durable.resume_pending(on_progress=count):
            pass
        print(json.dumps(counts), flush=True)


if __name__ == "__main__":
    worker(sys.argv[1])
