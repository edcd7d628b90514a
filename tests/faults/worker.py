"""A worker process: how it fares, and what it must not meet."""

# ruff: noqa: S311 - chance that can be repeated, not secrets
from __future__ import annotations

import itertools
import json
import logging
import os
import random
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import psycopg

from awaitly_postgres import Durable
from tests.support import TimeLimit

from . import workload
from .forking import fork_under_load
from .turns import connect, durable_on, finish, left_over, one_turn, roll_call
from .workload import Setup, is_calm

AMPLE = 8  # enough for nobody to wait for one, in locks that an interrupt may leave locked


def work(setup: Setup) -> None:
    """Run and resume until it is calm; then only resume, until nothing is left to do."""
    chance = random.Random(setup.seed)
    with connect(setup) as store:
        durable = durable_on(store, setup)
        if setup.limited:
            limited_turns(durable, setup, chance)
        while not is_calm():
            one_turn(durable, chance)
            time.sleep(chance.random() * setup.idle)
        finish(durable)
        if workload.hasty is not None:
            workload.hasty.threads.shutdown()
        if setup.roll_call:
            roll_call(store, setup.pool)
    left_over()


def die_at(moment: str, number: int) -> None:
    """Kill this process before or after the n-th statement that it sends, whichever thread does."""
    sent = itertools.count(1)
    wait = psycopg.Connection.wait

    def counted(self: Any, *args: Any, **kwargs: Any) -> Any:
        here = next(sent) == number
        if here and moment == "before":
            os.kill(os.getpid(), signal.SIGKILL)
        result = wait(self, *args, **kwargs)
        if here and moment == "after":
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    psycopg.Connection.wait = counted


def limited_turns(durable: Durable, setup: Setup, chance: random.Random) -> None:
    """Take turns that a signal handler may end at any moment; no lease may be left by one."""
    # What is raised inside a finalizer, Python swallows, and says so.
    sys.unraisablehook = lambda unraisable: None
    roll_call(durable.store, setup.pool)  # has all connections opened
    ours = "SELECT workflow_id FROM awaitly_workflow_lock WHERE owner_token LIKE %s"
    with psycopg.connect(setup.url, autocommit=True) as db, soft_limits(chance):
        while not is_calm():
            try:
                if chance.random() < 0.2:
                    signal.setitimer(signal.ITIMER_REAL, chance.uniform(0.0002, 0.05))
                one_turn(durable, chance)
                signal.setitimer(signal.ITIMER_REAL, 0)
            except (TimeLimit, KeyboardInterrupt):
                pass
            for (id,) in db.execute(ours, (f"%:{os.getpid()}:%",)).fetchall():
                workload.notes.add("lease", id)


@contextmanager
def soft_limits(chance: random.Random) -> Iterator[None]:
    """Have SIGALRM raise in the main thread, and have it come when a COMMIT is about to be sent."""
    leave = psycopg.Transaction.__exit__
    committing = False

    def leave_interrupted(self: Any, *error: Any) -> Any:
        nonlocal committing
        # By ident: the current thread, where `threading` has not made it, would be listed for ever.
        if threading.get_ident() != threading.main_thread().ident:
            return leave(self, *error)  # it may outlive its run, and so would its signal
        committing = error[0] is None
        try:
            if committing and chance.random() < 0.15:
                signal.setitimer(signal.ITIMER_REAL, chance.uniform(0.00001, 0.004))
            return leave(self, *error)
        finally:
            committing = False

    def interrupt(number: int, frame: object) -> None:
        workload.notes.add("interrupted", "commit" if committing else "elsewhere")
        raise chance.choice((TimeLimit, KeyboardInterrupt))

    before = signal.signal(signal.SIGALRM, interrupt)
    psycopg.Transaction.__exit__ = leave_interrupted
    try:
        yield
    finally:
        psycopg.Transaction.__exit__ = leave
        signal.signal(signal.SIGALRM, before)


def main(setup: Setup) -> None:
    """Be a worker; what it must not meet is noted as ``broke``."""
    workload.begin(setup)
    logging.getLogger("psycopg").setLevel(logging.CRITICAL)  # it tells of each fault
    random.seed(f"{setup.seed}-{os.getpid()}")
    try:
        if setup.dies:
            die_at(*setup.dies)
        (fork_under_load if setup.forks else work)(setup)
    except BaseException as error:
        workload.notes.add("broke", repr(error).replace("\n", " "))
        traceback.print_exc()


def encode(setup: Setup) -> str:
    return json.dumps(asdict(setup))


if __name__ == "__main__":  # with libfaketime, which spoils time.sleep: it is of another clock
    time.sleep = lambda seconds: threading.Event().wait(seconds)  # type: ignore[assignment]
    main(Setup(**json.loads(sys.argv[1])))
