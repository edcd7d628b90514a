"""Durable runs of which each is killed at another of its statements, and their resumption.

``crash URL LOG`` starts a run in a process that is killed before its first statement, one before
the second and so on, then the same with after; until a run gets through. ``resume URL LOG`` goes on
until nothing is unfinished. Everything a step does is in LOG, a line each: the id, "ran" or "got",
the key and the value.
"""

from __future__ import annotations

import os
import secrets
import signal
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import psycopg
from psycopg_pool import ConnectionPool

from awaitly_postgres import Durable, Step, postgres

TTL = 3.0  # seconds; a run takes some milliseconds


class Mortal(psycopg.Connection):
    """Kills the process before or after the n-th statement of its main thread."""

    last: tuple[str, int] | None = None
    sent = 0

    def wait(self, *args: Any, **kwargs: Any) -> Any:
        if Mortal.last is None or threading.current_thread() is not threading.main_thread():
            return super().wait(*args, **kwargs)
        Mortal.sent += 1
        if Mortal.last == ("before", Mortal.sent):
            os.kill(os.getpid(), signal.SIGKILL)
        result = super().wait(*args, **kwargs)
        if Mortal.last == ("after", Mortal.sent):
            os.kill(os.getpid(), signal.SIGKILL)
        return result


def note(*words: str) -> None:
    log = os.open(sys.argv[3], os.O_APPEND | os.O_CREAT | os.O_WRONLY, 0o600)
    os.write(log, (" ".join(words) + "\n").encode())
    os.fsync(log)
    os.close(log)


def order(step: Step, id: str) -> dict[str, str]:
    def act(key: str) -> str:
        value = secrets.token_hex(4)
        note(id, "ran", key, value)
        return value

    def pay(conn: psycopg.Connection) -> str:
        value = act("pay")
        conn.execute("INSERT INTO payments VALUES (%s, %s)", (id, value))
        return value

    def refuse() -> None:
        raise LookupError(act("gift"))

    results = {}

    def got(key: str, value: str) -> None:
        note(id, "got", key, value)
        results[key] = value

    got("reserve", step("reserve", act, "reserve"))
    got("label", step("label", act, "label"))
    got("pay", step.transaction("pay", pay))
    try:
        step("gift", refuse)
    except LookupError as error:
        got("gift", error.args[0])
    got("ship", step("ship", act, "ship"))
    return results


def connect(url: str) -> tuple[Durable, ConnectionPool[Any]]:
    pool = ConnectionPool(
        url,
        connection_class=Mortal,
        kwargs={"autocommit": True},  # else switching it would count as a statement
        min_size=1,
        max_size=1,
        open=True,
    )
    store = postgres(pool=pool)
    store.ping()  # whatever a first use does is done
    durable = Durable(store, lock_ttl=TTL)
    durable.workflow(order)
    return durable, pool


def in_child(work: Callable[[], None]) -> int:
    """Run ``work`` in a process of its own; return 0, or minus the signal that killed it."""
    pid = os.fork()
    if pid == 0:
        try:
            work()
        except BaseException:
            sys.excepthook(*sys.exc_info())
            os._exit(1)
        os._exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if code > 0:
        raise SystemExit(code)
    return code


def crash(url: str) -> None:
    for moment in ("before", "after"):
        nr, died = 0, True
        while died:
            nr += 1

            def live(moment: str = moment, nr: int = nr) -> None:
                durable, pool = connect(url)
                Mortal.last = moment, nr
                durable.run(f"{moment}-{nr}", order, f"{moment}-{nr}")
                Mortal.last = None
                pool.close()

            died = in_child(live) != 0
        print(moment, nr)


def resume(url: str) -> None:
    durable, pool = connect(url)
    while durable.store.list(status="running"):
        for outcome in durable.resume_pending():
            if outcome.status != "completed":
                raise RuntimeError(outcome)
            print(outcome.id, outcome.attempts)
        time.sleep(0.02)
    pool.close()


if __name__ == "__main__":
    {"crash": crash, "resume": resume}[sys.argv[1]](sys.argv[2])
