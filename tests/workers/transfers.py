"""Processes that move money in submitted workflows, and are killed at random while they do.

Arguments: URL, number of processes, seed. Prints how many it has killed.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import time

import psycopg

from awaitly_postgres import Durable, Step, postgres

TTL = 1.0  # seconds


def move(conn: psycopg.Connection, id: str, source: int, target: int, amount: int) -> int:
    for account in sorted((source, target)):  # always in this order: no deadlocks
        change = amount if account == target else -amount
        conn.execute("UPDATE accounts SET cents = cents + %s WHERE nr = %s", (change, account))
    conn.execute("INSERT INTO transfers VALUES (%s, %s, %s, %s)", (id, source, target, amount))
    return amount


def transfer(step: Step, id: str, source: int, target: int, amount: int) -> int:
    step("look", lambda: source)
    moved = step.transaction("move", move, id, source, target, amount)
    step("tell", lambda: moved)
    return moved


def connect(url: str) -> Durable:
    durable = Durable(postgres(url, max_size=2), lock_ttl=TTL, max_attempts=None)
    durable.workflow(transfer)
    return durable


def work(url: str) -> None:
    durable = connect(url)
    while durable.store.list(status="running", limit=1):
        durable.resume_pending()
        time.sleep(0.05)
    durable.store.close()


def start(url: str) -> int:
    """Fork a worker. This process has no thread and no connection that it could inherit."""
    if pid := os.fork():
        return pid
    try:
        work(url)
    except BaseException:
        sys.excepthook(*sys.exc_info())
        os._exit(1)
    os._exit(0)


def main(url: str, size: int, seed: int) -> None:
    chance = random.Random(seed)  # noqa: S311 - has to be the same each time
    running = [start(url) for _ in range(size)]
    killed = 0
    while running:
        time.sleep(chance.uniform(0.05, 0.2))
        nr = chance.randrange(len(running))
        os.kill(running[nr], signal.SIGKILL)
        code = os.waitstatus_to_exitcode(os.waitpid(running[nr], 0)[1])
        if code > 0:
            raise SystemExit(f"a worker failed with {code}")
        if code == 0:  # had ended before, with nothing left to do
            del running[nr]
        else:
            running[nr] = start(url)
            killed += 1
    print(killed)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
