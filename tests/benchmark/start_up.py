"""What a process pays before and around its work: cron jobs above all."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psycopg

from awaitly_postgres import Durable, Step, postgres

from .figures import Table, Target, figures
from .server import Server

ROOT = str(Path(__file__).parents[2])
TABLES = ("_snapshots", "_snapshots_steps")
SCHEMA = "benchmark_start"
STEPS = 10_000
OURS = """
import awaitly_postgres
durable = awaitly_postgres.Durable(awaitly_postgres.postgres({url!r}, schema={schema!r}))
@durable.workflow
def work(step, steps):
    for nr in range(steps + 1):
        step(f"step-{{nr}}", str)
"""
# What rusage says of a child includes its parent's memory.
PRINT_PEAK = """
try:
    status = open('/proc/self/status').read()
    print(status.partition('VmHWM:')[2].split()[0])
except OSError:
    print(0)
"""
RESUME = f"resume {STEPS:,} steps"
SCRIPTS = {
    "python": "pass",
    "import psycopg_pool": "import psycopg_pool",
    "import awaitly_postgres": "import awaitly_postgres",
    "psycopg, one SELECT": "import psycopg; psycopg.connect({url!r}).execute('SELECT 1')",
    "cron, nothing to do": f"{OURS}\nassert durable.resume_pending() == []",
    RESUME: f"{OURS}\ndurable.resume('long')",
}


def measure(server: Server, _: object, rounds: int, quick: bool) -> Iterator[Table]:
    server.fresh_schema(SCHEMA)
    leave_unfinished(server.url)
    for table in TABLES:
        server.db.execute(f"CREATE TABLE {SCHEMA}.kept{table} AS TABLE {SCHEMA}.awaitly{table}")
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in SCRIPTS}
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "PYTHONPATH": ROOT, "PYTHONPYCACHEPREFIX": folder}
        environment.pop("PYTHONDONTWRITEBYTECODE", None)  # compiled, as what pip installs is
        for nr in range(1 + rounds):
            for name, script in SCRIPTS.items():
                for table in TABLES:
                    server.db.execute(f"TRUNCATE {SCHEMA}.awaitly{table}")
                    if name == RESUME:
                        kept = f"SELECT * FROM {SCHEMA}.kept{table}"
                        server.db.execute(f"INSERT INTO {SCHEMA}.awaitly{table} {kept}")
                figure = process(script.format(url=server.url, schema=SCHEMA), environment)
                if nr:  # the first round has compiled
                    found[name].append(figure)
    results = Table("start_up", "Start-up, whole processes", ("process", "ms", "peak memory, MB"))
    results.notes = [
        f"The run of {STEPS:,} steps with results of 300 bytes was left by a crash, a part of it",
        "in the journal. The last two rows are within a process.",
    ]
    seconds = {}
    for name, each in found.items():
        seconds[name], memory = figures(each)
        results.add(name, seconds[name] * 1e3, memory)
    bare, ours = figures([first_calls(server.url) for _ in range(1 + rounds)][1:])
    results.add("psycopg connects, SELECT", bare * 1e3, "")
    results.add("first load of a store", ours * 1e3, "")
    ratio = seconds["cron, nothing to do"] / seconds["psycopg, one SELECT"]
    results.targets.append(Target("cron with nothing to do, times psycopg's SELECT", ratio, 1.5))
    yield results


def process(script: str, environment: dict[str, str]) -> tuple[float, float]:
    """Run it; return the seconds it took and the megabytes it needed at most."""
    command = [sys.executable, "-c", script + PRINT_PEAK]
    began = time.perf_counter()
    done = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE)
    return time.perf_counter() - began, int(done.stdout) / 1024


def first_calls(url: str) -> tuple[float, float]:
    """Return the seconds of a bare connection's first answer and of a store's."""
    began = time.perf_counter()
    with psycopg.connect(url) as conn:
        conn.execute("SELECT 1")
    connected = time.perf_counter()
    with postgres(url, schema=SCHEMA) as store:
        store.load("nothing")
        return connected - began, time.perf_counter() - connected


def leave_unfinished(url: str) -> None:
    """Leave a run of so many steps behind, as a crash would."""

    class Crash(BaseException):
        pass

    def work(step: Step, steps: int) -> None:
        for nr in range(steps):
            step(f"step-{nr}", str.ljust, f"{nr}", 298)
        raise Crash

    with postgres(url, schema=SCHEMA) as store, suppress(Crash):
        Durable(store).run("long", work, STEPS)
