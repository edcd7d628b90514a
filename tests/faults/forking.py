"""Forks under load: what a prefork server never should do."""

# ruff: noqa: S311 - chance that can be repeated, not secrets
from __future__ import annotations

import itertools
import multiprocessing
import os
import random
import signal
import threading
import time
import traceback
from collections.abc import Callable

from awaitly_postgres import Durable

from . import workload
from .turns import connect, durable_on, finish, left_over, one_turn
from .workload import Setup, is_calm


def fork_under_load(setup: Setup) -> None:
    """Keep a thread inside the store, and fork beside it: what a prefork server never should do."""
    chance = random.Random(setup.seed)
    inside = threading.Event()

    def load(durable: Durable) -> None:
        mine = random.Random(setup.seed + 1)
        while not is_calm():
            one_turn(durable, mine)
            inside.set()

    with connect(setup) as store:
        durable = durable_on(store, setup)
        thread = threading.Thread(target=load, args=(durable,))
        thread.start()
        inside.wait(60)
        for nr in itertools.count():
            if is_calm():
                break
            seed = chance.getrandbits(32)
            _fork(("fork", "multiprocessing", "fork", "spawn")[nr % 4], durable, setup, seed)
        thread.join()
        finish(durable)
    left_over()


def _fork(kind: str, durable: Durable, setup: Setup, seed: int) -> None:
    if kind == "fork":
        child = _Forked(lambda: in_child(durable, seed))
    else:
        context = multiprocessing.get_context("spawn" if kind == "spawn" else "fork")
        target, args = (spawned, (setup, seed)) if kind == "spawn" else (in_child, (durable, seed))
        child = context.Process(target=target, args=args)
        child.start()
    child.join(60)
    workload.notes.add("forked", kind, child.exitcode)
    if child.exitcode is None:
        child.kill()
        child.join()


class _Forked:
    """A bare ``os.fork`` with the face of a ``multiprocessing.Process``."""

    exitcode: int | None = None

    def __init__(self, target: Callable[[], None]) -> None:
        self._pid = os.fork()
        if self._pid == 0:
            code = 1
            try:
                target()
                code = 0
            except BaseException:
                traceback.print_exc()
            os._exit(code)

    def join(self, timeout: float | None = None) -> None:
        deadline = time.monotonic() + (timeout or 60)
        while self.exitcode is None and time.monotonic() < deadline:
            pid, status = os.waitpid(self._pid, os.WNOHANG)
            if pid:
                self.exitcode = os.waitstatus_to_exitcode(status)
            else:
                time.sleep(0.005)

    def kill(self) -> None:
        os.kill(self._pid, signal.SIGKILL)


def in_child(durable: Durable, seed: int) -> None:
    """Use the store that was open at the fork. Its pool is not ours; we get one."""
    os.environ["PGAPPNAME"] = f"faults-{os.getpid()}"
    chance = random.Random(seed)
    for _ in range(3):
        one_turn(durable, chance)
    durable.store.close()


def spawned(setup: Setup, seed: int) -> None:
    workload.begin(setup)
    store = connect(setup)
    in_child(durable_on(store, setup), seed)
