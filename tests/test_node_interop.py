"""Rows that the Node package wrote go on here, and what is written here passes its validation.

``data/node-snapshots.json`` holds rows as the JavaScript package awaitly 1 stored them: the
``node-durable-*`` ones by its durable runs, the others saved by hand.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import psycopg
import pytest

from awaitly_postgres import (
    AlreadyRunning,
    Durable,
    SnapshotStore,
    Step,
    StepFailed,
    Workflow,
    WorkflowNotFound,
    WorkflowSuspended,
)
from tests.support import DATA

DB = psycopg.Connection
MakeStore = Callable[..., SnapshotStore]

NODE_ROWS: dict[str, Any] = json.loads((DATA / "node-snapshots.json").read_text("utf-8"))
ALICE = NODE_ROWS["node-completed"]["steps"]["fetch-user"]["value"]
LARGE = 5_000  # characters in a step's result, enough for the journal to be used


class Crash(BaseException):
    """Ends a run as the death of its process would: nothing more is recorded."""


class Outage(Exception):
    """Ends a run as failed."""


def faults_for_node(snapshot: Any) -> list[str]:
    """Say what the JavaScript package's ``validateSnapshot`` would, rule by rule."""
    if not isinstance(snapshot, dict):
        return ["the snapshot is not an object"]
    faults = []
    if snapshot.get("formatVersion") != 1 or snapshot["formatVersion"] is True:
        faults.append("formatVersion is not 1")
    steps = snapshot.get("steps")
    if not isinstance(steps, dict):
        return [*faults, "steps is not an object"]
    for key, step in steps.items():
        if not isinstance(step, dict):
            faults.append(f"{key} is not an object")
        elif not isinstance(step.get("ok"), bool):
            faults.append(f"{key}.ok is not a boolean")
        elif not step["ok"]:
            faults += [
                f"{key}.{name} is missing" for name in ("error", "cause") if name not in step
            ]
    execution = snapshot.get("execution")
    if not isinstance(execution, dict):
        return [*faults, "execution is not an object"]
    if execution.get("status") not in ("running", "completed", "failed"):
        faults.append("execution.status is none of the three")
    if not isinstance(execution.get("lastUpdated"), str):
        faults.append("execution.lastUpdated is not a string")
    return faults


def insert(db: DB, id: str, row: Any) -> None:
    """Store a row as Node does, which knows nothing of our other columns and tables."""
    query = "INSERT INTO awaitly_snapshots (id, snapshot) VALUES (%s, %s)"
    db.execute(query, [id, json.dumps(row)])


def stored(db: DB, id: str) -> dict[str, Any]:
    return db.execute("SELECT snapshot FROM awaitly_snapshots WHERE id = %s", [id]).fetchone()[0]


class Steps:
    """The steps that the rows are of, and which of them ran."""

    def __init__(self) -> None:
        self.ran: list[str] = []

    def __call__(self, key: str) -> Any:
        self.ran.append(key)
        return f"{key} here"


@pytest.fixture
def work() -> Steps:
    return Steps()


def workflow_of(work: Steps, *keys: str) -> Callable[[Step], dict[str, Any]]:
    def checkout(step: Step) -> dict[str, Any]:
        return {key: step(key, work, key) for key in keys}

    return checkout


# -- from Node to here ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("id", "keys", "runs"),
    [
        ("node-completed", ["fetch-user", "create-order"], []),
        ("node-lossy", ["lossy"], []),
        ("node-failed-result", ["fetch-user", "fetch-missing"], ["fetch-missing"]),
        ("node-failed-throw", ["fetch-user", "explode"], ["explode"]),
        ("node-durable-failed", ["fetch-user", "fetch-missing"], ["fetch-missing"]),
        ("node-durable-crashed", ["fetch-user", "create-order"], ["create-order"]),
    ],
)
def test_row_from_node_resumes_here(
    store: SnapshotStore, db: DB, work: Steps, id: str, keys: list[str], runs: list[str]
) -> None:
    """What Node recorded is replayed, what failed there is tried again, the rest is run.

    Fields that only Node knows are in the row afterwards as they were.
    """
    before = NODE_ROWS[id]
    store.create_tables()
    insert(db, id, before)
    durable = Durable(store)
    version = before.get("metadata", {}).get("version", 1)
    checkout = durable.workflow(version=version)(workflow_of(work, *keys))

    result = durable.run(id, checkout)
    replayed = {key: before["steps"][key]["value"] for key in keys if key not in runs}
    assert result == {**replayed, **{key: f"{key} here" for key in runs}}
    assert work.ran == runs

    after = stored(db, id)
    assert {k: v for k, v in after["steps"].items() if k not in runs} == {
        k: v for k, v in before["steps"].items() if k not in runs
    }
    assert after.get("warnings") == before.get("warnings")
    for name, value in before.get("metadata", {}).items():
        if name not in ("input", "lastStepKey"):  # those are the run's own
            assert after["metadata"][name] == value
    assert after["execution"]["status"] == "completed"
    assert faults_for_node(after) == []
    assert durable.resume(id) == result
    assert work.ran == runs


@pytest.mark.parametrize("id", sorted(NODE_ROWS))
def test_row_from_node_needs_run_to_say_whose_it_is(
    store: SnapshotStore, db: DB, work: Steps, id: str
) -> None:
    """Node records neither the function nor its arguments: `resume` cannot guess, and says so."""
    store.create_tables()
    insert(db, id, NODE_ROWS[id])
    durable = Durable(store)
    durable.workflow(workflow_of(work, "fetch-user"))
    with pytest.raises(WorkflowNotFound, match="run"):
        durable.resume(id)
    assert durable.resume_pending() == []
    assert stored(db, id) == NODE_ROWS[id]


def test_failure_from_node_that_was_handled_is_replayed(
    store: SnapshotStore, db: DB, work: Steps
) -> None:
    """Where Node went on after a failure, it comes back as `StepFailed`, with all that is known."""
    row = json.loads(json.dumps(NODE_ROWS["node-durable-failed"]))
    row["steps"]["create-order"] = NODE_ROWS["node-completed"]["steps"]["create-order"]
    row["metadata"]["lastStepKey"] = row["execution"]["currentStepId"] = "create-order"
    store.create_tables()
    insert(db, "id", row)
    failures = []

    def checkout(step: Step) -> Any:
        step("fetch-user", work, "fetch-user")
        try:
            step("fetch-missing", work, "fetch-missing")
        except StepFailed as failure:
            failures.append((failure.key, failure.name, failure.reason, failure.error))
        step("create-order", work, "create-order")
        return step("ship", work, "ship")

    assert Durable(store).run("id", checkout) == "ship here"
    assert failures == [("fetch-missing", "string", "NOT_FOUND", "NOT_FOUND")]
    assert work.ran == ["ship"]


def test_unknown_fields_of_a_node_row_outlive_a_run(
    store: SnapshotStore, db: DB, work: Steps
) -> None:
    """At every level: what a later Node release may add is carried along, before and after."""
    row = json.loads(json.dumps(NODE_ROWS["node-durable-crashed"]))
    row["later"] = {"top": [1, None]}
    row["steps"]["fetch-user"]["later"] = "step"
    row["steps"]["fetch-user"]["meta"] = {"later": "meta"}
    row["metadata"]["later"] = {"in": "metadata"}
    store.create_tables()
    insert(db, "id", row)
    durable = Durable(store)
    durable.run("id", durable.workflow(version=3)(workflow_of(work, "fetch-user", "create-order")))
    after = stored(db, "id")
    assert after["later"] == row["later"]
    assert after["steps"]["fetch-user"] == row["steps"]["fetch-user"]
    assert after["metadata"]["later"] == row["metadata"]["later"]


# -- from here to Node ---------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, LARGE])
@pytest.mark.parametrize("journal", [True, False])
def test_every_row_of_a_run_is_one_that_node_reads(
    make_store: MakeStore, db: DB, journal: bool, size: int
) -> None:
    """At each moment of its life; without the journal it is also complete at each."""
    durable = Durable(make_store(journal=journal), metadata={"tenant": "acme"})
    faults: list[type[BaseException]] = [Crash, Outage]
    statuses = []

    def check(*keys: str) -> None:
        row = stored(db, "id")
        assert faults_for_node(row) == []
        statuses.append(row["execution"]["status"])
        if not journal or size == 0:
            assert sorted(row["steps"]) == sorted(keys)

    def fragile() -> None:
        if faults:
            raise faults.pop()

    @durable.workflow
    def workflow(step: Step) -> str:
        recorded: list[str] = sorted(durable.store.load("id").steps)
        for key in "abcd":
            step(key, lambda: "." * size)
            recorded = sorted({*recorded, key})
            check(*recorded)
        step("fragile", fragile)
        step.wait("go")
        return "end"

    durable.submit("id", durable.workflow(workflow))
    check()
    for fault in (Outage, Crash):
        with pytest.raises(fault):
            durable.resume("id")
        check(*"abcd", "fragile")
    with pytest.raises(WorkflowSuspended):
        durable.resume("id")
    check(*"abcd", "fragile")
    durable.signal("id", "go", {"by": "ada"})
    check(*"abcd", "fragile")
    durable.resume("id")
    check(*"abcd", "fragile", "go")
    assert set(statuses) == {"running", "failed", "completed"}


@pytest.mark.parametrize("size", [0, LARGE])
def test_cancelled_row_is_one_that_node_reads(durable: Durable, db: DB, size: int) -> None:
    """It says failed there, and holds every step that was recorded."""

    @durable.workflow
    def workflow(step: Step) -> None:
        for key in "abcd":
            step(key, lambda: "." * size)
        raise Crash

    with pytest.raises(Crash):
        durable.run("id", workflow)
    durable.cancel("id")
    row = stored(db, "id")
    assert faults_for_node(row) == []
    assert row["execution"]["status"] == "failed"
    assert sorted(row["steps"]) == ["a", "b", "c", "d"]


def test_failed_step_has_the_cause_that_node_shows(durable: Durable, db: DB) -> None:
    """An exception is stored in the JavaScript package's form, with what caused it."""

    def explode() -> None:
        try:
            raise KeyError("inner")
        except KeyError as inner:
            raise Outage("outer") from inner

    with pytest.raises(Outage):
        durable.run("id", lambda step: step("explode", explode))
    step = stored(db, "id")["steps"]["explode"]
    assert (step["error"], step["meta"]["origin"]) == ("Outage", "throw")
    cause = step["cause"]
    assert (cause["type"], cause["name"], cause["message"]) == ("error", "Outage", "outer")
    assert "explode" in cause["stack"]
    assert cause["cause"]["name"] == "KeyError"


def test_row_that_was_saved_by_hand_is_one_that_node_reads(
    store: SnapshotStore, db: DB, work: Steps
) -> None:
    """The snapshots of an in-memory workflow have the same shape."""
    run = Workflow(workflow_of(work, "fetch-user", "create-order"))
    store.save("before", run.snapshot())
    run()
    store.save("after", run.snapshot(metadata={"source": "api"}))
    assert [faults_for_node(stored(db, id)) for id in ("before", "after")] == [[], []]


def test_all_tables_have_the_full_id(make_store: MakeStore, db: DB) -> None:
    """With a prefix Node and we mean the same row and the same lease by ``eu:id``."""
    durable = Durable(make_store(prefix="eu:"))

    @durable.workflow
    def workflow(step: Step) -> list[list[str]]:
        for key in "abcd":
            step(key, lambda: "." * LARGE)
        return [
            [id for (id,) in db.execute(f"SELECT DISTINCT {column} FROM {table}").fetchall()]
            for table, column in (
                ("awaitly_snapshots", "id"),
                ("awaitly_snapshots_steps", "id"),
                ("awaitly_workflow_lock", "workflow_id"),
            )
        ]

    assert durable.run("id", workflow) == [["eu:id"], ["eu:id"], ["eu:id"]]


def test_lease_that_node_holds_is_respected(make_store: MakeStore, db: DB, work: Steps) -> None:
    """A row in the lock table is a lease, whoever wrote it; when it has run out it is free."""
    durable = Durable(make_store(prefix="eu:"))
    durable.submit("id", durable.workflow(workflow_of(work, "a")))
    db.execute(
        "INSERT INTO awaitly_workflow_lock (workflow_id, owner_token, expires_at) "
        "VALUES ('eu:id', 'a1b2-from-node', now() + interval '1 minute')"
    )
    with pytest.raises(AlreadyRunning) as refused:
        durable.resume("id")
    assert refused.value.holder == "a1b2-from-node"
    assert (durable.resume_pending(), work.ran) == ([], [])
    db.execute("UPDATE awaitly_workflow_lock SET expires_at = now()")
    assert [outcome.status for outcome in durable.resume_pending()] == ["completed"]
