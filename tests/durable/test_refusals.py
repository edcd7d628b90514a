"""Runs that today's code cannot continue: told once for each pause, and why is stored."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import psycopg
import pytest
from attrs import evolve

from awaitly_postgres import (
    Durable,
    SnapshotStore,
    Step,
    VersionMismatch,
    WorkflowDrift,
    WorkflowError,
    WorkflowSnapshot,
)
from tests.support import Loss, Proxy, photograph

DB = psycopg.Connection


def first(step: Step) -> str:
    step("file", str)
    return str(step.wait("decision"))


def renamed(step: Step) -> str:
    step("request", str)
    return str(step.wait("decision"))


def fails_to_migrate(snapshot: WorkflowSnapshot, version: int) -> WorkflowSnapshot:
    raise LookupError("no such step")


DEPLOYS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "drift": ({}, WorkflowDrift, "asked for step 'request'"),
    "version": ({"version": 2}, VersionMismatch, "recorded by version 1"),
    "migration": (
        {"version": 2, "on_version_mismatch": fails_to_migrate},
        LookupError,
        "no such step",
    ),
}


def submitted(store: SnapshotStore) -> Durable:
    """A run of the old code that has been signalled since it was suspended."""
    old = Durable(store)
    old.submit("a", old.workflow(name="w")(first))
    old.resume_pending()
    old.signal("a", "decision", "yes")
    return old


def deployed(store: SnapshotStore, kind: str, **options: Any) -> Durable:
    new = Durable(store, **options)
    new.workflow(name="w", **DEPLOYS[kind][0])(renamed)
    return new


def due(db: DB) -> None:
    db.execute(
        "UPDATE awaitly_snapshots SET snapshot = "
        "jsonb_set(snapshot, '{metadata,wakeAt}', to_jsonb('2000'::text))"
    )


@pytest.mark.parametrize("kind", DEPLOYS)
def test_why_a_run_is_refused_is_told_once_and_stored(
    store: SnapshotStore, db: DB, kind: str
) -> None:
    """Once for each pause; in between nothing is due. Nothing recorded is touched."""
    submitted(store)
    new, (_, error, message) = deployed(store, kind), DEPLOYS[kind]
    for attempt in (1, 2):
        outcomes = [outcome for _ in range(3) for outcome in new.resume_pending()]
        assert [(outcome.status, outcome.attempts) for outcome in outcomes] == [("failed", attempt)]
        info = new.get("a")
        assert (info.state, info.attempts, type(info.error)) == ("retrying", attempt, error)
        assert message in str(info.error)
        assert [step.key for step in info.steps] == ["file"]
        assert photograph(db)["awaitly_workflow_lock"] == []
        due(db)


@pytest.mark.parametrize("kind", DEPLOYS)
def test_the_note_goes_with_the_next_start(store: SnapshotStore, db: DB, kind: str) -> None:
    """The old code, back again, finds nothing of it; nor does whoever looks."""
    old = submitted(store)
    deployed(store, kind).resume_pending()
    due(db)
    assert [outcome.result for outcome in old.resume_pending()] == ["yes"]
    assert old.get("a").error is None
    assert "refusal" not in store.load("a").metadata


def test_a_run_that_is_given_up_tells_what_it_was_refused_for(store: SnapshotStore, db: DB) -> None:
    """Not what it had failed with long before."""
    submitted(store)
    new = deployed(store, "drift", max_attempts=1)
    new.resume_pending()
    due(db)
    (outcome,) = new.resume_pending()
    assert (outcome.status, outcome.retry_at) == ("failed", None)
    info = new.get("a")
    assert (info.state, type(info.error)) == ("failed", WorkflowError)
    metadata = store.load("a").metadata
    assert metadata["failure"]["cause"]["name"] == "WorkflowDrift"
    assert "refusal" not in metadata


def test_drift_at_the_end_keeps_what_was_recorded_before_it(store: SnapshotStore, db: DB) -> None:
    """In the journal as well: only the note is added."""

    def long(step: Step) -> None:
        for nr in range(10):
            step(f"{nr}", lambda: "x" * 1000)
        step.wait("go")

    def short(step: Step) -> None:
        step("0", str)
        step("1", str)

    old, new = Durable(store), Durable(store)
    old.submit("a", old.workflow(name="w")(long))
    old.resume_pending()
    old.signal("a", "go", 1)
    new.workflow(name="w")(short)
    with pytest.raises(WorkflowDrift):
        new.resume("a")
    assert len(new.get("a").steps) == 10
    assert isinstance(new.get("a").error, WorkflowDrift)
    old.resume("a")


def test_a_run_that_is_refused_before_it_is_taken_up_is_untouched(
    store: SnapshotStore, db: DB
) -> None:
    """`resume` of another version counts no start and stores nothing: its caller is told."""
    submitted(store)
    before = photograph(db)
    with pytest.raises(VersionMismatch):
        deployed(store, "version").resume("a")
    assert photograph(db) == before


@pytest.mark.parametrize("what", ["request", "reply"])
def test_a_refusal_survives_the_loss_of_any_request_or_reply(
    connect: Callable[..., SnapshotStore], proxy: Proxy, what: Loss, store: SnapshotStore
) -> None:
    """The lease is given back, and the reason is there."""
    new = deployed(connect(), "drift")
    nr, lost = 0, True
    while lost:
        submitted(store)
        proxy.lose(what, nr)
        with pytest.raises(WorkflowDrift):
            new.resume("a")
        lost = proxy.has_lost
        proxy.lose(what, 10**9)
        assert isinstance(new.get("a").error, WorkflowDrift)
        with store.lock("a"):
            pass
        store.delete("a")
        nr += 1
    assert nr > 2


def test_what_is_saved_again_by_hand_keeps_its_note(store: SnapshotStore) -> None:
    """It is a field like any other to those who load and save."""
    submitted(store)
    deployed(store, "drift").resume_pending()
    stored = store.load("a")
    store.save("a", evolve(stored, metadata={**stored.metadata, "note": 1}))
    assert re.search("asked for step", store.load("a").metadata["refusal"]["message"])
