"""A map whose process is killed before or after each of its statements, and its resumption.

``URL crash`` prints the ids of the runs that were killed, ``URL resume`` finishes them. The tables
``ran`` and ``got`` tell which items ran, and which were acknowledged by the end of their step.
"""

from __future__ import annotations

import itertools
import os
import signal
import sys
import threading
import time
from typing import Any

import psycopg
from psycopg_pool import ConnectionPool

from awaitly_postgres import Durable, Event, Step, postgres

ITEMS = 24
TTL = 2.0  # seconds


class Mortal(psycopg.Connection):
    """Kills the process before or after the n-th statement, whichever thread sends it."""

    last: tuple[str, int] | None = None
    sent = itertools.count(1)

    def wait(self, *args: Any, **kwargs: Any) -> Any:
        if Mortal.last is None:
            return super().wait(*args, **kwargs)
        nr = next(Mortal.sent)
        if Mortal.last == ("before", nr):
            os.kill(os.getpid(), signal.SIGKILL)
        result = super().wait(*args, **kwargs)
        if Mortal.last == ("after", nr):
            os.kill(os.getpid(), signal.SIGKILL)
        return result


class Notes:
    """One connection for each thread, which is not mortal."""

    def __init__(self, url: str) -> None:
        self.url, self.mine = url, threading.local()

    def add(self, table: str, id: str, item: int) -> None:
        if not hasattr(self.mine, "conn"):
            self.mine.conn = psycopg.connect(self.url, autocommit=True)
        self.mine.conn.execute(f"INSERT INTO {table} VALUES (%s, %s)", (id, item))


def make(url: str) -> tuple[Durable, Any]:
    notes = Notes(url)

    def note(event: Event) -> None:
        if event.type == "step_completed" and "[" in str(event.key):
            notes.add("got", str(event.workflow_id), int(str(event.key)[2:-1]))

    pool = ConnectionPool(
        url, connection_class=Mortal, kwargs={"autocommit": True}, min_size=2, max_size=2, open=True
    )
    pool.wait()
    store = postgres(pool=pool)
    durable = Durable(store, lock_ttl=TTL, on_event=note)

    @durable.workflow
    def work(step: Step, id: str) -> int:
        def act(item: int) -> str:
            notes.add("ran", id, item)
            return "." * 300

        return len(step.map("m", act, range(ITEMS), workers=6))

    return durable, work


def crash(url: str) -> None:
    for moment in ("before", "after"):
        for nr in itertools.count(1):
            pid = os.fork()
            if pid == 0:
                die(url, moment, nr)
            if (code := os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])) == 0:
                break
            if code != -signal.SIGKILL:
                raise SystemExit(code)
            print(f"{moment}-{nr}")


def die(url: str, moment: str, nr: int) -> None:
    """Run in this process, which ends here in any case."""
    code = 1
    try:
        durable, work = make(url)
        durable.store.ping()
        Mortal.last = moment, nr
        durable.run(f"{moment}-{nr}", work, f"{moment}-{nr}")
        code = 0
    except BaseException:
        sys.excepthook(*sys.exc_info())
    os._exit(code)


def resume(url: str) -> None:
    durable, _ = make(url)
    while durable.store.list(status="running"):
        for outcome in durable.resume_pending():
            if outcome.status != "completed":
                raise RuntimeError(outcome)
        time.sleep(0.02)
    durable.store._db.pool.opened().close()


if __name__ == "__main__":
    {"crash": crash, "resume": resume}[sys.argv[2]](sys.argv[1])
