"""The field on which the faults meet the workers."""

# ruff: noqa: S311 - chance that can be repeated, not secrets
from __future__ import annotations

import os
import random
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import psycopg
from psycopg.conninfo import make_conninfo

from awaitly_postgres import Durable, postgres

from . import worker
from .check import Row, check, prepare
from .cluster import Cluster
from .turns import SHARED, shared_id
from .workload import Setup, order

WORKERS = 8
PATIENCE = 180.0  # seconds for all workflows to end when the faults are over
LIBFAKETIME = "libfaketime.so.1"


class NotHere(Exception):
    """This fault cannot be made on this machine; says why."""


@dataclass
class Fault:
    """How one fault is made. ``inject`` is called again and again; returns how many it made."""

    inject: Callable[[Field], int]
    short: int  # how many injections in a short run
    long: int
    own_server: bool = False  # it cannot be made on a server of somebody else
    before: Callable[[Field], object] = lambda field: None
    after: Callable[[Field], object] = lambda field: None  # ends the fault; called once
    pause: float = 0.1  # seconds between two, at most
    ttl: float = 1.5


@dataclass
class Field:
    """One scenario: a schema, eight workers, and what is done to them."""

    fault: Fault
    url: str  # of the server, for us
    cluster: Cluster | None
    seed: int
    folder: Path = field(init=False)
    chance: random.Random = field(init=False)
    setup: Setup = field(init=False)
    schema: str = field(init=False)
    workers: dict[int, Setup] = field(default_factory=dict)
    started: int = 0
    seen: int = 0  # of what happens by itself
    helpers: list[Any] = field(default_factory=list)
    standby: Cluster | None = None
    mount: Path | None = None

    def __post_init__(self) -> None:
        self.chance = random.Random(self.seed)
        self.folder = Path(tempfile.mkdtemp(prefix="awaitly-faults-"))
        self.schema = f"faults_{secrets.token_hex(6)}"
        with psycopg.connect(self.url, autocommit=True) as conn:
            conn.execute(f"CREATE SCHEMA {self.schema}")
        url = make_conninfo(self.url, options=f"-c search_path={self.schema}")
        self.setup = Setup(url, str(self.folder), self.seed, self.fault.ttl)
        self.url = make_conninfo(url, application_name="faults-main")

    def admin(self) -> psycopg.Connection:
        return psycopg.connect(self.url, autocommit=True)

    def submit(self) -> None:
        """Have runs accepted that nobody has started."""
        with postgres(self.url, max_size=1) as store:
            durable = Durable(store)
            for nr in range(SHARED):
                durable.submit(shared_id(nr), durable.workflow(order), shared_id(nr), nr)

    # -- workers ---------------------------------------------------------------------------

    def start_worker(self, **options: object) -> int:
        """Start one; by fork, for which this process has neither threads nor connections."""
        self.started += 1
        setup = replace(self.setup, seed=self.seed * 100_000 + self.started, **options)
        pid = os.fork()
        if pid == 0:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            code = 1
            try:
                worker.main(setup)
                code = 0
            finally:
                os._exit(code)
        self.workers[pid] = setup
        return pid

    def start_worker_at(self, offset: str) -> int:
        """Start one whose clock is wrong."""
        self.started += 1
        setup = replace(self.setup, seed=self.seed * 100_000 + self.started)
        env = {
            **os.environ,
            "LD_PRELOAD": libfaketime(),
            "FAKETIME": offset,
            "FAKETIME_DONT_FAKE_MONOTONIC": "1",
            "FAKETIME_NO_CACHE": "1",
        }
        command = [sys.executable, "-m", worker.__name__, worker.encode(setup)]
        pid = os.posix_spawn(sys.executable, command, env)
        self.workers[pid] = setup
        return pid

    def any_worker(self) -> int:
        return self.chance.choice(sorted(self.workers, key=lambda pid: self.workers[pid].seed))

    def fresh(self, total: int) -> int:
        """Return how many have come since the last call."""
        since, self.seen = total - self.seen, total
        return since

    def kill(self, pid: int) -> None:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        del self.workers[pid]

    def reap(self) -> list[int]:
        """Return the workers that have ended by themselves."""
        ended = [pid for pid in self.workers if os.waitpid(pid, os.WNOHANG)[0]]
        for pid in ended:
            del self.workers[pid]
        return ended

    # -- all of it -------------------------------------------------------------------------

    def play(self, name: str, injections: int) -> Row:
        row, began = Row(name), time.monotonic()
        try:
            prepare(self.url)
            self.submit()
            self.fault.before(self)
            while len(self.workers) < WORKERS:
                self.start_worker()
            self.wait_for_work()
            while row.injections < injections:
                row.injections += self.fault.inject(self)
                time.sleep(self.chance.random() * self.fault.pause)
            self.fault.after(self)
            (self.folder / "calm").touch()
            deadline = time.monotonic() + PATIENCE
            while self.workers and time.monotonic() < deadline:
                self.reap()
                time.sleep(0.02)
            for pid in list(self.workers):
                row.broke += 1
                row.remark(f"worker {pid} does not end")
                self.kill(pid)
            check(row, self.url, self.folder)
        finally:
            self.clear()
        row.seconds = round(time.monotonic() - began, 1)
        return row

    def wait_for_work(self) -> None:
        """Return when something has been acknowledged."""
        log, deadline = self.folder / "log", time.monotonic() + 60
        while not (log.exists() and b" got " in log.read_bytes()):
            if time.monotonic() > deadline:
                raise TimeoutError("the workers do not work")
            time.sleep(0.01)

    def clear(self) -> None:
        for pid in list(self.workers):
            self.kill(pid)
        for helper in self.helpers:
            helper.kill()
            helper.join()
        if self.standby is not None:
            self.standby.remove()
        if self.cluster is not None:
            self.cluster.remove()
        else:
            with self.admin() as conn:
                conn.execute(f"DROP SCHEMA {self.schema} CASCADE")
        if self.mount is not None:
            subprocess.run(["umount", "-l", self.mount], check=False)
            self.mount.rmdir()
        shutil.rmtree(self.folder, ignore_errors=True)


def libfaketime() -> str:
    for folder in ("/usr/lib", "/usr/local/lib", "/opt/homebrew/lib"):
        for found in Path(folder).glob(f"**/faketime/{LIBFAKETIME}"):
            return str(found)
    raise NotHere("libfaketime is not installed (Debian: apt-get install faketime)")
