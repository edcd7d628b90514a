"""What a process pays before and around its work: cron jobs above all."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psycopg
from attrs import frozen

from awaitly_postgres import postgres

from .contenders import Contenders
from .figures import Cell, Table, Target, figures
from .server import Server

ROOT = str(Path(__file__).parents[2])
TABLES = ("_snapshots", "_snapshots_steps")
SCHEMA = "benchmark_start"
STEPS = 10_000
COLUMNS = ("process", "ms", "peak memory, MB", "ms in its call")
WHY_IMPORT = "A fifth of it are attrs, the rest are the modules of the package."
WHY_RESUME = (
    "A start is counted before it runs, which writes the snapshot once more. That is a third of it."
)
OURS = """
import awaitly_postgres
durable = awaitly_postgres.Durable(awaitly_postgres.postgres({url!r}, schema={schema!r}))
@durable.workflow
def work(step, steps):
    for nr in range(steps + 1):
        step(f"step-{{nr}}", str)
"""
# The kilobytes it needed at most (what rusage says of a child includes its parent's), and the
# seconds of its call, if it has measured one.
REPORT = """
try:
    status = open('/proc/self/status').read()
    peak = status.partition('VmHWM:')[2].split()[0]
except OSError:
    peak = 0
print(peak, globals().get('seconds', 0))
"""
# Leaves a run of so many steps behind, as a crash would.
LEAVE = f"""
import awaitly_postgres
class Crash(BaseException): pass
def work(step, steps):
    for nr in range(steps):
        step(f"step-{{{{nr}}}}", str.ljust, str(nr), 298)
    raise Crash
durable = awaitly_postgres.Durable(awaitly_postgres.postgres({{url!r}}, schema={{schema!r}}))
try:
    durable.run("long", work, {STEPS})
except Crash:
    pass
"""
RESUME = f"resume {STEPS:,} steps"
BEFORE = f"{RESUME}, earlier version"
SCRIPTS = {
    "python": "pass",
    "import psycopg_pool": "import psycopg_pool",
    "import awaitly_postgres": "import awaitly_postgres",
    "psycopg, one SELECT": "import psycopg; psycopg.connect({url!r}).execute('SELECT 1')",
    "cron, nothing to do": f"{OURS}\nassert durable.resume_pending() == []",
    RESUME: f"""{OURS}
import time
durable.list_pending()
began = time.perf_counter()
durable.resume('long')
seconds = time.perf_counter() - began
""",
}

Sample = tuple[float, float, float]  # seconds, megabytes at most, seconds of the call


@frozen
class Script:
    """A script, and the package and the schema that it works with."""

    text: str
    root: str = ROOT
    schema: str = SCHEMA
    resumes: bool = False

    def run(self, server: Server, environment: dict[str, str]) -> Sample:
        """Run it on what `prepare` has left."""
        for table in TABLES:
            server.db.execute(f"TRUNCATE {self.schema}.awaitly{table}")
            if self.resumes:
                kept = f"SELECT * FROM {self.schema}.kept{table}"
                server.db.execute(f"INSERT INTO {self.schema}.awaitly{table} {kept}")
        text = self.text.format(url=server.url, schema=self.schema)
        return process(text, environment, self.root)

    def prepare(self, server: Server) -> None:
        """Make what `run` starts from."""
        server.fresh_schema(self.schema)
        process(LEAVE.format(url=server.url, schema=self.schema), dict(os.environ), self.root)
        for table in TABLES:
            made = f"AS TABLE {self.schema}.awaitly{table}"
            server.db.execute(f"CREATE TABLE {self.schema}.kept{table} {made}")


def measure(server: Server, contenders: Contenders, rounds: int, quick: bool) -> Iterator[Table]:
    scripts = {name: Script(text, resumes=name == RESUME) for name, text in SCRIPTS.items()}
    scripts[RESUME].prepare(server)
    if contenders.before:
        before = Script(SCRIPTS[RESUME], str(contenders.before), f"{SCHEMA}_before", True)
        before.prepare(server)
        scripts[BEFORE] = before
    found: dict[str, list[Sample]] = {name: [] for name in scripts}
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "PYTHONPYCACHEPREFIX": folder}
        environment.pop("PYTHONDONTWRITEBYTECODE", None)  # compiled, as what pip installs is
        for nr in range(1 + rounds):
            for name, script in scripts.items():
                figure = script.run(server, environment)
                if nr:  # the first round has compiled
                    found[name].append(figure)
    results = Table("start_up", "Start-up, whole processes", COLUMNS)
    results.notes = [
        f"The run of {STEPS:,} steps with results of 300 bytes was left by a crash, a part of it",
        "in the journal. The last two rows are within a process.",
    ]
    seconds, calls = {}, {}
    for name, each in found.items():
        seconds[name], memory, calls[name] = figures(each)
        call: Cell = calls[name] * 1e3 if calls[name].median else ""
        results.add(name, seconds[name] * 1e3, memory, call)
    bare, ours = figures([first_calls(server.url) for _ in range(1 + rounds)][1:])
    results.add("psycopg connects, SELECT", bare * 1e3, "", "")
    results.add("first load of a store", ours * 1e3, "", "")
    results.targets = [
        Target(
            "cron with nothing to do, times psycopg's SELECT",
            seconds["cron, nothing to do"] / seconds["psycopg, one SELECT"],
            1.5,
            why=WHY_IMPORT,
        ),
        Target(
            "importing it, ms more than psycopg and its pool",
            (seconds["import awaitly_postgres"] - seconds["import psycopg_pool"]) * 1e3,
            60,
            why=WHY_IMPORT,
        ),
    ]
    if BEFORE in seconds:
        ratio = calls[RESUME] / calls[BEFORE]
        results.targets.append(
            Target(f"resume() of {STEPS:,} steps, times an earlier version", ratio, 0.6)
        )
    yield results


def process(script: str, environment: dict[str, str], root: str) -> Sample:
    """Run it with the package in ``root``."""
    command = [sys.executable, "-c", script + REPORT]
    began = time.perf_counter()
    done = subprocess.run(command, cwd=root, env=environment, check=True, stdout=subprocess.PIPE)
    took = time.perf_counter() - began
    peak, call = map(float, done.stdout.split())
    return took, peak / 1024, call


def first_calls(url: str) -> tuple[float, float]:
    """Return the seconds of a bare connection's first answer and of a store's."""
    began = time.perf_counter()
    with psycopg.connect(url) as conn:
        conn.execute("SELECT 1")
    connected = time.perf_counter()
    with postgres(url, schema=SCHEMA) as store:
        store.load("nothing")
        return connected - began, time.perf_counter() - connected
