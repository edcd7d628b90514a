"""A durable run that stays in its second step until a line comes in; prints how it ended.

Arguments: URL, ttl, "step" or "transaction".
"""

from __future__ import annotations

import sys

import psycopg

from awaitly_postgres import AwaitlyError, Durable, Step, postgres


def stay() -> str:
    print("in the step", flush=True)
    sys.stdin.readline()
    return "the sleeper"


def pay(conn: psycopg.Connection) -> str:
    conn.execute("INSERT INTO paid VALUES ('the sleeper')")
    return stay()


def work(step: Step, kind: str) -> list[str]:
    first = step("first", lambda: "the sleeper")
    second = step.transaction("second", pay) if kind == "transaction" else step("second", stay)
    return [first, second]


with postgres(sys.argv[1]) as store:
    durable = Durable(store, lock_ttl=float(sys.argv[2]))
    try:
        print(durable.run("a", work, sys.argv[3]))
    except AwaitlyError as error:
        print(type(error).__name__)
