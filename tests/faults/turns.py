"""The turns that a worker takes: it runs, resumes what is pending, and in the end finishes all."""

from __future__ import annotations

import gc
import os
import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import psycopg

from awaitly_postgres import (
    AlreadyRunning,
    Durable,
    LeaseLost,
    SnapshotStore,
    Step,
    StoreUnavailable,
    WorkflowDrift,
    postgres,
)

from . import workload
from .workload import Left, Setup, deadly, order

SHARED = 24  # ids that all workers run, and that somebody has submitted
LONG_PAUSE = 20.0  # seconds; a run that has been started often pauses for longer when it fails
MAX_ATTEMPTS = 3  # where there is poison
GOOD = ("own-", "shared-")  # how the ids begin of what must come to an end


def shared_id(nr: int) -> str:
    return f"shared-{nr}"


def connect(setup: Setup) -> SnapshotStore:
    # Names the process in what the server notes; a child that inherits the store has its own.
    os.environ["PGAPPNAME"] = f"faults-{os.getpid()}"
    least = setup.pool if setup.limited else 0  # while it grows, one waits
    return postgres(setup.url, min_size=least, max_size=setup.pool, retry_for=setup.retry_for)


def durable_on(store: SnapshotStore, setup: Setup) -> Durable:
    hasty = workload.hasty
    observe = None if hasty is None else hasty.observe
    most = MAX_ATTEMPTS if setup.poison else None
    durable = Durable(
        store, lock_ttl=setup.ttl, max_attempts=most, backoff=short_pause, on_event=observe
    )
    durable.workflow(order)
    durable.workflow(deadly)
    return durable


def short_pause(error: Exception, attempt: int) -> float:
    """Return how long a run pauses that has failed: an ending with pauses of hours is no ending."""
    return min(0.1 * 2**attempt, 2.0)


def one_turn(durable: Durable, chance: random.Random) -> None:
    """Do one thing that a view or a cron job does. Only what an outage explains may be raised."""
    try:
        dice = chance.random()
        # A slow run leaves little time to look for others, and poison is found only that way.
        resumes = 0.7 if workload.setup.slow or workload.setup.poison else 0.2
        if dice < resumes:
            durable.resume_pending(limit=5)
        elif dice < resumes + 0.15:
            nr = chance.randrange(SHARED)
            durable.run(shared_id(nr), order, shared_id(nr), nr)
        else:
            seed = chance.getrandbits(32)
            id = f"own-{os.getpid()}-{seed:x}"
            durable.run(id, order, id, seed)
    except AlreadyRunning as error:
        if error.id.startswith(f"own-{os.getpid()}-"):
            raise  # a new id of our own: whoever has it is we ourselves
    except (LeaseLost, StoreUnavailable) as error:
        workload.notes.add("met", type(error).__name__, error)
    except (Left, WorkflowDrift) as error:
        # Drift: it has ended before it came to what its threads had done.
        if workload.hasty is None:
            raise
        workload.notes.add("met", type(error).__name__, error)
    except (ConnectionResetError, psycopg.OperationalError) as error:
        # Raised by a body, recorded, and tried again.
        workload.notes.add("met", type(error).__name__, error)


def roll_call(store: SnapshotStore, size: int) -> None:
    """Have as many transactions meet as there are connections: none is lost, and there is no more.

    A lost one leaves them waiting. One more is for the renewal of leases.
    """
    gc.collect()  # a traceback may keep a connection
    durable = Durable(store, on_complete="delete")
    all_here = threading.Barrier(size)

    def meet(step: Step) -> None:
        step.transaction("meet", lambda conn: all_here.wait(30))

    with ThreadPoolExecutor(size) as pool:
        list(pool.map(lambda nr: durable.run(f"meet-{os.getpid()}-{nr}", meet), range(size)))
    ours = "SELECT count(*) FROM pg_stat_activity WHERE application_name = %s"
    with psycopg.connect(workload.setup.url, application_name="faults-main") as conn:
        conn.autocommit = True
        deadline = time.monotonic() + 10  # what is closed is there for a moment yet
        while (there := conn.execute(ours, (os.environ["PGAPPNAME"],)).fetchone()[0]) > size + 1:
            if time.monotonic() > deadline:
                workload.notes.add("broke", f"a pool of {size} has {there} connections")
                return
            time.sleep(0.1)


def finish(durable: Durable) -> None:
    """Resume until nothing is unfinished, or all that is pauses for long after a failure."""
    enough = time.monotonic() + LONG_PAUSE
    while True:
        try:
            durable.resume_pending(limit=5)
            running, failed = (
                [info for good in GOOD for info in durable.store.list(good, status=status, limit=1)]
                for status in ("running", "failed")
            )
            if not running and not (failed and time.monotonic() < enough):
                return
        except StoreUnavailable:
            workload.notes.add("met", "StoreUnavailable")
        time.sleep(0.2)


def left_over() -> None:
    """Note the threads that are still there a while after the store was closed."""
    deadline = time.monotonic() + 10
    while threading.active_count() > 1 and time.monotonic() < deadline:
        time.sleep(0.05)
    for thread in threading.enumerate():
        if thread is not threading.main_thread():
            workload.notes.add("thread", thread.name.replace(" ", "_"))
