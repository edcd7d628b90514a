"""The stored document: what is read, what is refused, and what survives."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from datetime import datetime, timezone
from typing import Any

import psycopg
import pytest

from awaitly_postgres import (
    Durable,
    Execution,
    SnapshotFormatError,
    SnapshotStore,
    Step,
    StepFailed,
    StepResult,
    Workflow,
    WorkflowSnapshot,
    merge_snapshots,
    validate_snapshot,
)
from awaitly_postgres.snapshot import timestamp
from tests.support import DATA

NODE = json.loads((DATA / "node-snapshots.json").read_text("utf-8"))
NOW = "2026-11-22T10:56:04.184Z"
RUNNING = {"status": "running", "lastUpdated": NOW}
VOID = {"formatVersion": 1, "steps": {"a": {"ok": True}}, "execution": RUNNING}
RESUME_STATE = {
    "kind": "ResumeState",
    "steps": [["fetch-user", {"ok": True, "value": {"id": "1"}}], ["notify", {"ok": True}]],
}


def put(db: psycopg.Connection, id: str, document: object) -> None:
    """Write a row by hand, as another program would."""
    text = document if isinstance(document, str) else json.dumps(document)
    db.execute("INSERT INTO awaitly_snapshots VALUES (%s, %s)", [id, text])


def stored(db: psycopg.Connection, id: str) -> str:
    (text,) = db.execute(
        "SELECT snapshot::text FROM awaitly_snapshots WHERE id = %s", [id]
    ).fetchone()
    return text


# -- what Node wrote -----------------------------------------------------------------------


@pytest.mark.parametrize("name", NODE)
def test_a_row_that_node_wrote_comes_back_equal(
    store: SnapshotStore, db: psycopg.Connection, name: str
) -> None:
    """Load and save change nothing in it: the two rows are the same text."""
    store.create_tables()
    put(db, "theirs", NODE[name])
    store.save("ours", store.load("theirs"))
    assert stored(db, "ours") == stored(db, "theirs")
    assert store.load("ours").to_json() == NODE[name]


def test_node_values_are_read_by_attribute() -> None:
    """Steps, failures, times and metadata of a failed durable run."""
    snapshot = WorkflowSnapshot.from_json(NODE["node-durable-failed"])
    assert snapshot.steps["fetch-user"].ok
    assert snapshot.steps["fetch-user"].value["big"] == 10**21
    failed = snapshot.steps["fetch-missing"]
    assert (failed.ok, failed.error, failed.meta["origin"]) == (False, "NOT_FOUND", "result")
    assert snapshot.execution.status == "running"
    assert snapshot.execution.current_step_id == "fetch-missing"
    assert snapshot.metadata["source"] == "api"


def test_a_run_that_node_left_crashed_is_finished_here(
    durable: Durable, store: SnapshotStore, db: psycopg.Connection
) -> None:
    """Its recorded step is replayed, and its own metadata stays."""
    store.create_tables()
    put(db, "id", NODE["node-durable-crashed"] | {"metadata": {"source": "node"}})

    def checkout(step: Step) -> str:
        name = step("fetch-user", pytest.fail)["name"]
        return step("greet", lambda: f"hello {name}")

    assert durable.run("id", checkout) == "hello Alice"
    assert store.load("id").metadata["source"] == "node"


def test_the_failure_that_ended_a_node_run_is_tried_again() -> None:
    """Node's rows name their last step in the metadata; the step before it is replayed."""

    def workflow(step: Step) -> list[Any]:
        return [step("fetch-user", pytest.fail)["id"], step("fetch-missing", lambda: "found")]

    snapshot = WorkflowSnapshot.from_json(NODE["node-durable-failed"])
    assert Workflow(workflow, snapshot=snapshot)() == ["123", "found"]


def test_a_failure_that_a_node_workflow_handled_is_replayed_as_step_failed() -> None:
    """No Python class stands behind it, so it has the JavaScript error's name and message."""
    document = copy.deepcopy(NODE["node-failed-throw"])
    document["metadata"] = {"lastStepKey": "fetch-user"}

    def workflow(step: Step) -> object:
        try:
            step("explode", pytest.fail)
        except StepFailed as error:
            step("fetch-user", pytest.fail)
            return [error.key, error.name, error.reason, error.error]

    replayed = Workflow(workflow, snapshot=WorkflowSnapshot.from_json(document))()
    assert replayed == ["explode", "TypeError", "boom", "BOOM"]


def test_a_step_of_node_that_returned_nothing_replays_as_none(
    store: SnapshotStore, db: psycopg.Connection
) -> None:
    """``undefined`` is not in JSON, so the value is missing; it stays missing when saved."""
    store.create_tables()
    put(db, "id", VOID)
    snapshot = store.load("id")
    assert snapshot.steps["a"].value is None
    assert Workflow(lambda step: [step("a", pytest.fail)], snapshot=snapshot)() == [None]
    store.save("id", snapshot)
    assert json.loads(stored(db, "id")) == VOID


def test_a_resume_state_loads_and_resumes(store: SnapshotStore, db: psycopg.Connection) -> None:
    """The newest Node releases store pairs; they are the steps of a run in progress."""
    store.create_tables()
    put(db, "id", RESUME_STATE)

    def workflow(step: Step) -> list[Any]:
        return [step("fetch-user", pytest.fail), step("notify", pytest.fail), step("c", int)]

    run = Workflow(workflow, snapshot=store.load("id"))
    assert run() == [{"id": "1"}, None, 0]
    store.save("id", run.snapshot())
    assert store.load("id").execution.status == "completed"


def test_a_resume_state_is_taken_over_by_a_durable_run(
    durable: Durable, store: SnapshotStore, db: psycopg.Connection
) -> None:
    """It becomes a snapshot of format 1 with its steps in it."""
    store.create_tables()
    put(db, "id", RESUME_STATE)

    def workflow(step: Step) -> int:
        step("notify", pytest.fail)  # Node's steps are not numbered: any order will do
        step("fetch-user", pytest.fail)
        return step("c", lambda: 3)

    assert durable.run("id", workflow) == 3
    assert list(store.load("id").steps) == ["c", "notify", "fetch-user"]


# -- what is no snapshot -------------------------------------------------------------------


def but(**changes: object) -> dict[str, Any]:
    return {**VOID, **changes}


def with_step(step: object) -> dict[str, Any]:
    return but(steps={"a": step})


def with_execution(**changes: object) -> dict[str, Any]:
    execution = {k: v for k, v in (RUNNING | changes).items() if v != "missing"}
    return but(execution=execution)


NONSENSE = {
    "null": (None, "must be an object, not null"),
    "an array": ([], "must be an object, not an array"),
    "a string": ('"snapshot"', "must be an object, not a string"),
    "a number": (5, "must be an object, not a number"),
    "an empty object": ({}, "formatVersion is missing; steps is missing; execution is missing"),
    "format 2": (but(formatVersion=2), "formatVersion must be 1, not 2"),
    "format '1'": (but(formatVersion="1"), "formatVersion must be 1, not '1'"),
    "format true": (but(formatVersion=True), "formatVersion must be 1, not True"),
    "steps null": (but(steps=None), "steps must be an object, not null"),
    "steps in an array": (but(steps=[]), "steps must be an object, not an array"),
    "a step null": (with_step(None), r"steps\['a'\] must be an object, not null"),
    "a step without ok": (with_step({"value": 1}), r"steps\['a'\].ok is missing"),
    "ok as a string": (with_step({"ok": "yes"}), r"ok must be true or false, not a string"),
    "a failure without error": (with_step({"ok": False, "cause": {}}), "error is missing"),
    "a failure without cause": (with_step({"ok": False, "error": 1}), "cause is missing"),
    "a cause as text": (with_step({"ok": False, "error": 1, "cause": "x"}), "cause must be an"),
    "a meta as a number": (with_step({"ok": True, "meta": 0}), "meta must be an object"),
    "execution null": (but(execution=None), "execution must be an object, not null"),
    "another status": (with_execution(status="paused"), "must be one of running, completed"),
    "a status as a list": (with_execution(status=["running"]), "must be one of running, comp"),
    "no status": (with_execution(status="missing"), "execution.status is missing"),
    "no lastUpdated": (with_execution(lastUpdated="missing"), "lastUpdated is missing"),
    "lastUpdated null": (with_execution(lastUpdated=None), "lastUpdated must be a string"),
    "completedAt as a number": (with_execution(completedAt=5), "completedAt must be a string"),
    "currentStepId as a number": (with_execution(currentStepId=5), "currentStepId must be a"),
    "metadata in an array": (but(metadata=[]), "metadata must be an object, not an array"),
    "metadata as a number": (but(metadata=0), "metadata must be an object, not a number"),
    "warnings in an object": (but(warnings={}), "warnings must be an array, not an object"),
    "warnings false": (but(warnings=False), "warnings must be an array, not a boolean"),
    "pairs in an object": ({"kind": "ResumeState", "steps": {}}, "must be an array"),
    "no pairs": ({"kind": "ResumeState"}, "must be an array"),
    "a pair of three": ({"kind": "ResumeState", "steps": [["a", {}, 1]]}, "must be a pair"),
    "a pair with a number": ({"kind": "ResumeState", "steps": [[1, {}]]}, "must be a pair"),
    "a pair without ok": ({"kind": "ResumeState", "steps": [["a", {}]]}, "ok is missing"),
    "an integer of 5,000 digits": (json.dumps(VOID)[:-1] + ', "x": ' + "1" * 5000 + "}", "decoded"),
    "3,000 levels": ("[" * 3000 + "]" * 3000, "is not valid"),
}


@pytest.mark.parametrize("name", NONSENSE)
def test_a_row_that_is_no_snapshot_is_refused_and_left_alone(
    store: SnapshotStore, durable: Durable, db: psycopg.Connection, name: str
) -> None:
    """Loading and running both name the id and the fault; the row and the leases stay."""
    document, fault = NONSENSE[name]
    store.create_tables()
    put(db, "bad row", document)
    before = stored(db, "bad row")
    with pytest.raises(SnapshotFormatError, match=fault) as refused:
        store.load("bad row")
    assert refused.value.id == "bad row"
    with pytest.raises(SnapshotFormatError, match="'bad row'"):
        durable.run("bad row", pytest.fail)
    assert stored(db, "bad row") == before
    assert db.execute("SELECT count(*) FROM awaitly_workflow_lock").fetchone() == (0,)


def test_all_faults_are_reported_at_once() -> None:
    """So that a row is corrected in one go."""
    document = {
        "formatVersion": 3,
        "steps": {"a": 1, "b": {}, "c": {"ok": False}, "d": {"ok": True, "meta": "x"}},
        "execution": {"status": "done", "completedAt": 1, "currentStepId": []},
        "metadata": "x",
        "warnings": "x",
    }
    faults = [
        "formatVersion must be 1, not 3",
        "steps['a'] must be an object, not a number",
        "steps['b'].ok is missing",
        "steps['c'].error is missing",
        "steps['c'].cause is missing",
        "steps['d'].meta must be an object, not a string",
        "execution.status must be one of running, completed, failed, not 'done'",
        "execution.lastUpdated is missing",
        "execution.completedAt must be a string, not a number",
        "execution.currentStepId must be a string, not an array",
        "metadata must be an object, not a string",
        "warnings must be an array, not a string",
    ]
    assert validate_snapshot(document) == faults
    with pytest.raises(SnapshotFormatError) as refused:
        WorkflowSnapshot.from_json(document)
    assert refused.value.errors == faults
    assert all(fault in str(refused.value) for fault in faults)


@pytest.mark.parametrize("document", [*NODE.values(), RESUME_STATE, VOID])
def test_a_snapshot_has_no_faults(document: dict[str, Any]) -> None:
    """Node's rows, its newer shape, and a step without a value."""
    assert validate_snapshot(document) == []


@pytest.mark.parametrize(
    ("read", "bad"), [(StepResult.from_json, {"ok": 1}), (Execution.from_json, {"status": "x"})]
)
def test_the_parts_are_as_strict_as_the_whole(read: Callable[[Any], Any], bad: Any) -> None:
    """A step and an execution can be read by themselves."""
    with pytest.raises(SnapshotFormatError):
        read(bad)


# -- what survives -------------------------------------------------------------------------


def test_unknown_fields_survive_at_every_level(store: SnapshotStore) -> None:
    """A later version's or somebody's own: in the document, a step, its parts, the execution."""
    own = {"x": [1, {"y": None}]}
    failed = {"ok": False, "error": None, "cause": {"type": "thrown", **own}, "meta": own, **own}
    document = {
        "formatVersion": 1,
        "steps": {"a": {"ok": True, "value": 1, "meta": own, **own}, "b": failed},
        "execution": {**RUNNING, "currentStepId": "b", **own},
        "metadata": {"workflow": "w", **own},
        "warnings": [own],
        "own": own,
    }
    store.save("id", document)
    snapshot = store.load("id")
    assert snapshot.to_json() == document
    assert snapshot.steps["a"].to_json() == document["steps"]["a"]
    assert snapshot.steps["b"].to_json() == failed
    assert (snapshot.extra, snapshot.execution.extra) == ({"own": own}, own)


def test_unknown_fields_survive_a_resumed_run(durable: Durable, store: SnapshotStore) -> None:
    """What somebody put beside our fields is there when the run has completed."""
    step = {"ok": True, "value": 1, "meta": {"theirs": 1}, "theirs": 2}
    document = but(steps={"a": step}, metadata={"theirs": 3}, warnings=[{"theirs": 4}], theirs=5)
    store.save("id", document)
    durable.run("id", lambda step: step("a", pytest.fail) + step("b", lambda: 1))
    after = store.load("id").to_json()
    assert after["steps"]["a"] == step
    assert after["metadata"]["theirs"] == 3
    assert (after["warnings"], after["theirs"]) == ([{"theirs": 4}], 5)


def test_a_run_goes_on_from_metadata_that_makes_no_sense(
    durable: Durable, db: psycopg.Connection
) -> None:
    """Only the shape of a document is checked; what its users put into metadata is theirs."""
    durable.store.create_tables()
    nonsense = {"attempts": "x", "lastStepKey": [], "waits": {"nap": 5}, "version": "x", "input": 1}
    failed = {"ok": False, "error": 1, "cause": None}
    put(db, "id", but(steps={"a": failed}, metadata=nonsense))

    def workflow(step: Step) -> str:
        step.sleep("nap", 0)
        return step("b", lambda: "done")

    assert durable.run("id", workflow) == "done"


def test_a_snapshot_is_built_from_results_too(store: SnapshotStore) -> None:
    """By a test or a migration, without writing JSON."""
    built = WorkflowSnapshot(
        steps={"a": StepResult(ok=True, value=1), "b": StepResult(ok=False, error=2, cause={})},
        execution=Execution(status="failed", last_updated=NOW, completed_at=NOW),
    )
    store.save("id", built)
    assert store.load("id") == built


def test_a_snapshot_cannot_be_changed_in_place() -> None:
    """Neither its fields nor its steps."""
    snapshot = WorkflowSnapshot.from_json(VOID)
    with pytest.raises(AttributeError):
        snapshot.metadata = {}  # type: ignore[misc]
    with pytest.raises(TypeError):
        snapshot.steps["b"] = snapshot.steps["a"]  # type: ignore[index]


# -- merging -------------------------------------------------------------------------------


def test_merging_lays_the_delta_over_the_base() -> None:
    """Its steps, metadata, own fields and execution win; what it lacks stays."""
    base = WorkflowSnapshot.from_json(
        {
            "formatVersion": 1,
            "steps": {"a": {"ok": True, "value": 1}, "b": {"ok": True, "value": 2}},
            "execution": RUNNING,
            "metadata": {"version": 1, "source": "base"},
            "own": 1,
            "kept": 2,
        }
    )
    delta = WorkflowSnapshot.from_json(
        {
            "formatVersion": 1,
            "steps": {"b": {"ok": True, "value": 3}, "c": {"ok": True, "value": 4}},
            "execution": {"status": "completed", "lastUpdated": NOW, "completedAt": NOW},
            "metadata": {"source": "delta"},
            "own": 3,
        }
    )
    merged = merge_snapshots(base, delta)
    assert {key: result.value for key, result in merged.steps.items()} == {"a": 1, "b": 3, "c": 4}
    assert merged.execution == delta.execution
    assert merged.metadata == {"version": 1, "source": "delta"}
    assert merged.extra == {"own": 3, "kept": 2}
    assert base.steps["b"].value == 2


def test_merging_drops_the_warnings_of_replaced_steps() -> None:
    """The new result is not lossy because the old one was."""
    lossy = {"type": "lossy_value", "stepId": "a"}
    other = {"type": "lossy_value", "stepId": "b"}
    base = WorkflowSnapshot.from_json(but(warnings=[lossy, other, "text"]))
    assert merge_snapshots(base, WorkflowSnapshot.from_json(VOID)).warnings == [other, "text"]
    delta = WorkflowSnapshot.from_json(but(warnings=[{"stepId": "a", "type": "new"}]))
    assert merge_snapshots(base, delta).warnings == [other, "text", *delta.warnings]


def test_merging_nothing_makes_nothing_up() -> None:
    """Without metadata and warnings on either side there are none."""
    snapshot = WorkflowSnapshot.from_json(VOID)
    assert merge_snapshots(snapshot, snapshot) == snapshot


def test_times_are_written_in_utc_with_milliseconds() -> None:
    """Cut, not rounded, so that no time is in the future."""
    assert timestamp(datetime(2026, 1, 2, 3, 4, 5, 999_999, timezone.utc)) == (
        "2026-01-02T03:04:05.999Z"
    )
