"""Rows that nobody should write: a typed error for each, and what is stored is as it was."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import psycopg
import pytest

from awaitly_postgres import (
    AlreadyRunning,
    AwaitlyError,
    Durable,
    SnapshotFormatError,
    Step,
    WorkflowDrift,
)
from tests.faults.test_hostile import MEGABYTE, stored, three_steps

# -- rows edited by hand -------------------------------------------------------------------

SEQ = {"meta": {"seq": 1}}
NONSENSE = {
    "null": "null",
    "a number": "7",
    "a string": '"snapshot"',
    "an array": "[]",
    "an empty object": "{}",
    "a newer format": '{"formatVersion": 2, "steps": {}, "execution": {}}',
    "a format that is true": '{"formatVersion": true, "steps": {}, "execution": {}}',
    "steps as an array": {"steps": []},
    "steps as null": {"steps": None},
    "a step that is null": {"steps": {"first": None}},
    "a step that is a number": {"steps": {"first": 1}},
    "a step without ok": {"steps": {"first": {"value": 1}}},
    "ok as a string": {"steps": {"first": {"ok": "true", "value": 1}}},
    "a failure without cause": {"steps": {"first": {"ok": False, "error": "x"}}},
    "a cause that is a list": {"steps": {"first": {"ok": False, "error": 1, "cause": [1]}}},
    "meta as a string": {"steps": {"first": {"ok": True, "value": 1, "meta": "m"}}},
    "no execution": {"execution": None},
    "an execution that is a list": {"execution": [1]},
    "a status of its own": {"execution": {"status": "exploded", "lastUpdated": "now"}},
    "a status that is an object": {"execution": {"status": {}, "lastUpdated": "now"}},
    "lastUpdated as a number": {"execution": {"status": "running", "lastUpdated": 1}},
    "metadata as an array": {"metadata": [1, 2]},
    "metadata as a string": {"metadata": "m"},
    "warnings as an object": {"warnings": {}},
    "a resume state without steps": '{"kind": "ResumeState"}',
    "a resume state of triples": '{"kind": "ResumeState", "steps": [["a", {"ok": true}, 1]]}',
    "another workflow": {"metadata": {"workflow": "another"}},
    "a workflow that is a list": {"metadata": {"workflow": ["three_steps"]}},
    "another input": {"metadata": {"input": {"args": [1, 2, 3], "kwargs": {}}}},
}
NOBODY_ASKS = {
    "steps nobody asks for": {"zero": {"ok": True, "value": 0, **SEQ}},
    "a step without a name": {"": {"ok": True, "value": 0, **SEQ}},
}


@pytest.mark.parametrize("what", NONSENSE)
def test_a_row_of_nonsense_is_a_typed_error_and_stays_as_it_is(
    durable: Durable, db: psycopg.Connection, what: str
) -> None:
    """Somebody edited it by hand: a run refuses it, and no lease stays behind."""
    durable.submit("a", durable.workflow(three_steps))
    nonsense = NONSENSE[what]
    if isinstance(nonsense, str):
        db.execute("UPDATE awaitly_snapshots SET snapshot = %s::jsonb", (nonsense,))
    else:
        edit = json.dumps(nonsense)
        db.execute("UPDATE awaitly_snapshots SET snapshot = snapshot || %s::jsonb", (edit,))
    before = stored(db)
    with pytest.raises(AwaitlyError):
        durable.run("a", three_steps)
    assert stored(db) == before


@pytest.mark.parametrize("what", NOBODY_ASKS)
def test_steps_that_nobody_asks_for_stay_recorded(
    durable: Durable, db: psycopg.Connection, what: str
) -> None:
    """Somebody added them by hand: a run refuses, counts the start, and erases nothing."""
    durable.submit("a", durable.workflow(three_steps))
    steps = json.dumps({"steps": NOBODY_ASKS[what]})
    db.execute("UPDATE awaitly_snapshots SET snapshot = snapshot || %s::jsonb", (steps,))
    with pytest.raises(WorkflowDrift):
        durable.run("a", three_steps)
    snapshot = durable.store.load("a").to_json()
    assert snapshot["steps"] == NOBODY_ASKS[what]
    assert snapshot["metadata"]["attempts"] == 1
    assert durable.resume_pending() == []


@pytest.mark.parametrize("what", NONSENSE)
def test_a_row_of_nonsense_does_not_keep_cron_from_the_others(
    durable: Durable, db: psycopg.Connection, what: str
) -> None:
    """Listing, statistics and resume_pending pass over it."""
    durable.workflow(three_steps)
    for id in ("a", "b"):
        durable.submit(id, durable.workflow(three_steps))
    nonsense = NONSENSE[what]
    whole = isinstance(nonsense, str)
    edit = "%s::jsonb" if whole else "snapshot || %s::jsonb"
    text = nonsense if whole else json.dumps(nonsense)
    db.execute(f"UPDATE awaitly_snapshots SET snapshot = {edit} WHERE id = 'a'", (text,))
    durable.resume_pending()
    assert durable.store.load("b").execution.status == "completed"
    assert durable.store.stats().total == 2
    assert {info.id for info in durable.store.list()} == {"a", "b"}
    assert durable.delete_state("a")


@pytest.mark.parametrize(
    "metadata",
    [
        {"attempts": "many"},
        {"attempts": -5},
        {"attempts": [1]},
        {"version": "1"},
        {"wakeAt": 5},
        {"waits": [1, 2]},
        {"waits": {"first": 5}},
        {"signals": "all"},
        {"lastStepKey": {}},
        {"failure": 1},
    ],
)
def test_metadata_that_only_we_read_cannot_break_a_run(
    durable: Durable, db: psycopg.Connection, metadata: dict[str, Any]
) -> None:
    """Counts, pauses and waits of the wrong type count as not there."""
    durable.submit("a", durable.workflow(three_steps))
    edit = "jsonb_build_object('metadata', snapshot->'metadata' || %s::jsonb)"
    db.execute(
        f"UPDATE awaitly_snapshots SET snapshot = snapshot || {edit}", (json.dumps(metadata),)
    )
    assert durable.run("a", three_steps) == [1, 2, 3]
    assert stored(db)[1:] == [[], []]


@pytest.mark.parametrize("waits", [5, [], {}, True, "soon"])
def test_a_wait_of_nonsense_is_waited_for_afresh(
    durable: Durable, db: psycopg.Connection, waits: Any
) -> None:
    """The end of a sleep that somebody has overwritten: no comparison with nonsense."""

    @durable.workflow
    def nap(step: Step) -> str:
        step.sleep("nap", 3600)
        return "awake"

    assert [outcome.status for outcome in _suspended(durable, nap)] == ["suspended"]
    db.execute(
        "UPDATE awaitly_snapshots SET snapshot = jsonb_set(jsonb_set(snapshot, "
        "'{metadata,waits,nap}', %s::jsonb), '{metadata,wakeAt}', '\"2000\"')",
        (json.dumps(waits),),
    )
    with pytest.raises(AwaitlyError, match="suspended"):
        durable.resume("nap")
    assert stored(db)[2] == []


def _suspended(durable: Durable, fn: Callable[..., Any]) -> list[Any]:
    durable.submit("nap", durable.workflow(fn))
    return durable.resume_pending()


# -- locks and journal edited by hand ------------------------------------------------------


@pytest.mark.parametrize("token", ["", "garbage", "::::", "x" * MEGABYTE, "'; DROP TABLE x; --"])
@pytest.mark.parametrize("expires", ["infinity", "9999-12-31", "294276-12-31"])
def test_a_lock_row_of_garbage_that_does_not_end_holds(
    durable: Durable, db: psycopg.Connection, token: str, expires: str
) -> None:
    """Whoever wrote it: it is somebody's, and the error can be printed."""
    durable.store.create_tables()
    db.execute("INSERT INTO awaitly_workflow_lock VALUES ('a', %s, %s)", (token, expires))
    with pytest.raises(AlreadyRunning) as refused:
        durable.run("a", three_steps)
    assert len(str(refused.value)) < 2000
    assert durable.store.try_acquire("a") is None
    assert len(stored(db)[2]) == 1
    assert durable.list_pending() == []


@pytest.mark.parametrize("expires", ["-infinity", "4713-01-01 BC", "1970-01-01"])
def test_a_lock_row_of_garbage_that_has_ended_is_taken_over(
    durable: Durable, db: psycopg.Connection, expires: str
) -> None:
    """However long ago."""
    durable.store.create_tables()
    db.execute("INSERT INTO awaitly_workflow_lock VALUES ('a', 'garbage', %s)", (expires,))
    assert durable.run("a", three_steps) == [1, 2, 3]
    assert stored(db)[2] == []


def test_journal_rows_without_a_snapshot_are_dead(durable: Durable, db: psycopg.Connection) -> None:
    """A new run under their id does not see them, and clears them."""
    durable.store.create_tables()
    db.execute(
        "INSERT INTO awaitly_snapshots_steps VALUES "
        """('a', 'first', '{"ok": true, "value": 100}'), ('b', 'first', '{"ok": true}')"""
    )
    assert durable.store.load("a") is None
    assert not durable.has_state("a")
    assert durable.run("a", three_steps) == [1, 2, 3]
    assert db.execute("SELECT id FROM awaitly_snapshots_steps").fetchall() == [("b",)]


@pytest.mark.parametrize("step", ["null", "1", '{"value": 1}', '{"ok": false}', "[]"])
def test_a_journal_row_of_nonsense_is_a_typed_error(
    durable: Durable, db: psycopg.Connection, step: str
) -> None:
    """As if it were in the snapshot, where it belongs."""
    durable.submit("a", durable.workflow(three_steps))
    db.execute("INSERT INTO awaitly_snapshots_steps VALUES ('a', 'first', %s::jsonb)", (step,))
    before = stored(db)
    with pytest.raises(SnapshotFormatError):
        durable.run("a", three_steps)
    assert stored(db) == before
