"""What a type checker must refuse; each line names the error it expects. Never run."""

from __future__ import annotations

from typing import Any

import psycopg

from awaitly_postgres import Durable, Step, Workflow, postgres


def fetch_user(user_id: str, *, fresh: bool = False) -> str:
    return user_id


def no_step() -> int:
    return 1


def charge(conn: psycopg.Connection[Any], cents: int) -> int:
    return cents


def checkout(step: Step, user_id: str) -> int:
    step("k", fetch_user, 5)  # expect: arg-type
    step("k", fetch_user)  # expect: call-arg
    step("k", fetch_user, "a", stale=True)  # expect: call-arg
    step("k", fetch_user("a"))  # expect: arg-type
    step(1, fetch_user, "a")  # expect: arg-type
    step.transaction("k", charge, "5")  # expect: arg-type
    step.transaction("k", charge)  # expect: call-arg
    step.map("k", fetch_user, [5])  # expect: arg-type
    step.map("k", fetch_user, range(5))  # expect: arg-type
    step.map("k", fetch_user, ["a"], name=no_step)  # expect: arg-type
    step.map("k", fetch_user)  # expect: call-arg
    step.sleep("nap", "5")  # expect: arg-type
    wrong: int = step("k", fetch_user, "a")  # expect: assignment
    return wrong


store = postgres("postgresql://localhost/mydb")
durable = Durable(store)
durable.run("id", checkout, 5)  # expect: arg-type
durable.run("id", checkout)  # expect: call-arg
durable.run(5, checkout, "a")  # expect: arg-type
durable.run("id", no_step)  # expect: arg-type
text: str = durable.run("id", checkout, "a")  # expect: assignment

Workflow(checkout)(5)  # expect: arg-type
Workflow(checkout)()  # expect: call-arg
Workflow(checkout, on_drift="maybe")  # expect: arg-type
Workflow(checkout).snapshot(include="some")  # expect: arg-type
Durable(store, on_complete="forget")  # expect: arg-type
postgres("postgresql://localhost/mydb", tabel="x")  # expect: call-arg
store.save("id", 5)  # expect: arg-type
steps = store.load("id").steps  # expect: union-attr


@durable.workflow(on_version_mismatch=lambda snapshot, version: 1)  # expect: arg-type, return-value
def migrating(step: Step) -> None: ...
