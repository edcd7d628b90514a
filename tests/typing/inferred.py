"""What a type checker infers for a user of the library. Read by mypy, never run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import psycopg
from typing_extensions import assert_type

from awaitly_postgres import Durable, Lease, Step, Workflow, WorkflowSnapshot, postgres


@dataclass
class User:
    name: str


def fetch_user(user_id: str, *, fresh: bool = False) -> User:
    return User(user_id)


def charge(conn: psycopg.Connection[Any], user: User, cents: int) -> list[int]:
    return [cents]


def checkout(step: Step, user_id: str, cents: int = 100) -> float:
    user = step("fetch-user", fetch_user, user_id, fresh=True)
    assert_type(user, User)
    assert_type(step("double", lambda: cents * 2), int)
    assert_type(step.transaction("charge", charge, user, cents=cents), list[int])
    assert_type(step.map("users", fetch_user, ["a", "b"]), list[User])
    assert_type(step.map("sizes", len, (name for name in "ab"), workers=2, name=str), list[int])
    assert_type(step.map("doubles", lambda n: n * 2, range(3)), list[int])
    assert_type(step.wait("approval"), Any)
    assert_type(step.workflow_id, str | None)
    step.sleep("nap", 5)
    return 1.0


store = postgres("postgresql://localhost/mydb")
durable = Durable(store)


@durable.workflow
def plain(step: Step, n: int) -> str:
    return str(n)


@durable.workflow(name="refund", version=2, on_version_mismatch="clear")
def configured(step: Step, n: int) -> str:
    return str(n)


@durable.workflow(on_version_mismatch=lambda snapshot, version: snapshot)
def migrating(step: Step) -> None: ...


run = Workflow(checkout, version=2, snapshot=store.load("id"))
assert_type(run("123", cents=5), float)
assert_type(run.snapshot(), WorkflowSnapshot)

assert_type(durable.run("id", checkout, "123", cents=5), float)
assert_type(durable.run("id", plain, 5), str)
assert_type(durable.run("id", configured, n=5), str)
assert_type(plain(Step.__new__(Step), 1), str)  # the decorated function is still the function

assert_type(store.load("id"), WorkflowSnapshot | None)
assert_type([info.id for info in store.list()], list[str])
with store.lock("id") as lease:
    assert_type(lease, Lease)
