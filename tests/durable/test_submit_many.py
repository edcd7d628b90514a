"""Accepting many runs at once: all or none, in the caller's transaction, with a true answer."""

from __future__ import annotations

import threading
from collections.abc import Callable
from datetime import datetime, timedelta, timezone
from typing import Any

import psycopg
import pytest

from awaitly_postgres import (
    Durable,
    NotSerializable,
    SnapshotStore,
    Step,
    WorkflowConflict,
    WorkflowNotFound,
)
from tests.support import Loss, Proxy, eventually

DB = psycopg.Connection


def mail(step: Step, address: str, nr: int = 0) -> str:
    return step("send", f"{address} {nr}".strip)


def call(step: Step, address: str, nr: int = 0) -> None:
    """Another workflow with the same parameters."""


@pytest.fixture
def durable(durable: Durable) -> Durable:
    durable.workflow(mail)
    durable.workflow(call)
    return durable


def stored(db: DB) -> list[str]:
    return [id for (id,) in db.execute("SELECT id FROM awaitly_snapshots ORDER BY 1").fetchall()]


def document(db: DB, id: str) -> dict[str, Any]:
    query = "SELECT snapshot FROM awaitly_snapshots WHERE id = %s"
    (found,) = db.execute(query, [id]).fetchone()
    for name in ("submittedAt", "input"):
        found["metadata"].pop(name)
    found["execution"].pop("lastUpdated")
    return found


def test_many_runs_are_accepted_and_run_like_submitted_ones(durable: Durable, db: DB) -> None:
    """The rows are those of ``submit``, and the new ids come in the order of the mapping."""
    assert durable.submit_many(mail, {"b": ("b@x", 2), "a": ["a@x"]}) == ["b", "a"]
    durable.submit("c", mail, "c@x")
    assert document(db, "a") == document(db, "b") == document(db, "c")
    results = {outcome.id: outcome.result for outcome in durable.resume_pending()}
    assert results == {"a": "a@x 0", "b": "b@x 2", "c": "c@x 0"}


def test_runs_that_exist_are_not_new(durable: Durable) -> None:
    """Whether they wait or have completed; nothing is stored of them again."""
    assert durable.submit_many(mail, {"a": ("x",)}) == ["a"]
    durable.resume("a")
    durable.submit("b", mail, "x", 1)
    assert durable.submit_many(mail, {"a": ("x",), "b": ("x", 1), "c": ("x",)}) == ["c"]
    assert durable.get("a").state == "completed"
    assert durable.submit_many(mail, {}) == []


@pytest.mark.parametrize("count", [999, 1000, 2001])
def test_more_than_one_statement_holds_is_one_transaction(
    durable: Durable, db: DB, count: int
) -> None:
    """A conflict in the last batch leaves nothing of the first."""
    runs = {f"run-{nr:05}": ("x", nr) for nr in range(count)}
    last = list(runs)[-1]
    durable.submit(last, mail, "y")
    with pytest.raises(WorkflowConflict, match=last):
        durable.submit_many(mail, runs)
    assert stored(db) == [last]
    durable.delete_state(last)
    assert durable.submit_many(mail, runs) == list(runs)
    assert stored(db) == list(runs)


@pytest.mark.parametrize("kind", ["workflow", "input"])
def test_a_conflict_stores_nothing_and_is_that_of_submit(
    durable: Durable, db: DB, kind: str
) -> None:
    """It names the id, and what was recorded under it."""
    fn, args = (call, ("x",)) if kind == "workflow" else (mail, ("y",))
    durable.submit("taken", fn, *args)
    with pytest.raises(WorkflowConflict) as one:
        durable.submit("taken", mail, "x")
    with pytest.raises(WorkflowConflict) as many:
        durable.submit_many(mail, {"new": ("x",), "taken": ("x",), "other": ("x",)})
    assert str(many.value) == str(one.value)
    assert many.value.id == "taken"
    assert stored(db) == ["taken"]


def test_wrong_calls_store_nothing(durable: Durable, db: DB) -> None:
    """They are refused before the first statement."""
    durable.store.create_tables()
    refused: list[tuple[type[Exception], str, Any]] = [
        (TypeError, "missing a required argument", {"a": ("x",), "b": ()}),
        (TypeError, "the arguments of 'b' must be a tuple or a list", {"a": ("x",), "b": "x"}),
        (TypeError, "runs must be a mapping", [("a", ("x",))]),
        (ValueError, "id", {"a": ("x",), "": ("x",)}),
        (NotSerializable, "the input", {"a": ("x",), "b": (object(),)}),
    ]
    for error, message, runs in refused:
        with pytest.raises(error, match=message):
            durable.submit_many(mail, runs)
    with pytest.raises(WorkflowNotFound, match="not registered"):
        durable.submit_many(lambda step: None, {"a": ()})
    assert stored(db) == []


@pytest.mark.parametrize("autocommit", [True, False])
@pytest.mark.parametrize("end", ["commit", "rollback"])
def test_many_share_the_fate_of_the_callers_transaction(
    durable: Durable, url: str, db: DB, autocommit: bool, end: str
) -> None:
    """Also where they open it, and on a connection that commits each statement by itself."""
    durable.store.create_tables()
    with psycopg.connect(url, autocommit=autocommit) as conn:
        assert durable.submit_many(mail, {"a": ("x",), "b": ("x",)}, conn=conn) == ["a", "b"]
        assert durable.submit_many(mail, {"a": ("x",), "c": ("x",)}, conn=conn) == ["c"]
        getattr(conn, end)()
    assert stored(db) == ["a", "b", "c"] * (autocommit or end == "commit")


@pytest.mark.read_committed
def test_a_conflict_that_the_caller_handles_leaves_the_transaction_usable(
    durable: Durable, url: str, db: DB
) -> None:
    """Even one that comes up between two statements: what was inserted before it is taken back."""
    durable.store.create_tables()
    # A run that another process submits, and that has not committed when it is looked for.
    runs = {"a": ("x",), "taken": ("x",)}
    with psycopg.connect(url) as other, psycopg.connect(url, autocommit=True) as conn:
        durable.submit("taken", mail, "y", conn=other)
        conn.execute("BEGIN")
        conn.execute("CREATE TABLE orders (id int)")

        def commit_when_it_waits() -> None:
            waits = "SELECT 1 FROM pg_stat_activity WHERE pid = %s AND wait_event_type = 'Lock'"
            eventually(lambda: db.execute(waits, [conn.info.backend_pid]).fetchone())
            other.commit()

        thread = threading.Thread(target=commit_when_it_waits)
        thread.start()
        try:
            with pytest.raises(WorkflowConflict, match="taken"):
                durable.submit_many(mail, runs, conn=conn)
        finally:
            thread.join()
        conn.execute("COMMIT")
    assert stored(db) == ["taken"]
    assert db.execute("SELECT count(*) FROM orders").fetchone() == (0,)


@pytest.mark.read_committed
def test_two_that_submit_the_same_runs_in_another_order_do_not_deadlock(
    durable: Durable,
) -> None:
    """Each run is new to exactly one of the two."""
    durable.store.create_tables()
    runs = {f"run-{nr:04}": ("x", nr) for nr in range(2500)}
    found: list[list[str]] = [[], []]
    begin = threading.Barrier(2)

    def submit(nr: int) -> None:
        begin.wait()
        found[nr] = durable.submit_many(mail, dict(list(runs.items())[:: 1 - 2 * nr]))

    threads = [threading.Thread(target=submit, args=(nr,)) for nr in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(found[0] + found[1]) == list(runs)


@pytest.mark.parametrize("what", ["request", "reply"])
def test_the_answer_survives_the_loss_of_any_request_or_reply(
    connect: Callable[..., SnapshotStore], proxy: Proxy, what: Loss
) -> None:
    """A retry reports what the first try has done."""
    durable = Durable(connect())
    durable.workflow(mail)
    nr, lost = 0, True
    while lost:
        durable.submit(f"{nr}-old", mail, "x")
        runs = {f"{nr}-{name}": ("x",) for name in ("old", "a", "b")}
        proxy.lose(what, nr)
        assert durable.submit_many(mail, runs) == [f"{nr}-a", f"{nr}-b"]
        lost = proxy.has_lost
        proxy.lose(what, 10**9)
        assert durable.submit_many(mail, runs) == []
        nr += 1
    assert nr > 4


def test_options_apply_to_all(durable: Durable) -> None:
    """Metadata, and a time before which none is taken up."""
    end = datetime(2999, 1, 1, tzinfo=timezone.utc)
    spring = durable.with_options(metadata={"campaign": "spring"})
    spring.submit_many(mail, {"now": ("x",)})
    spring.with_options(at=end).submit_many(mail, {"at": ("x",)})
    spring.with_options(delay=timedelta(days=1)).submit_many(mail, {"later": ("x",)})
    found = {info.id: info for info in durable.list(metadata={"campaign": "spring"})}
    assert {id: info.state for id, info in found.items()} == {
        "now": "pending",
        "at": "waiting",
        "later": "waiting",
    }
    assert found["at"].next_at == end
    assert [outcome.id for outcome in durable.resume_pending()] == ["now"]


@pytest.mark.parametrize("journal", [True, False])
def test_remainders_of_deleted_runs_are_swept(
    make_store: Callable[..., SnapshotStore], db: DB, journal: bool
) -> None:
    """A run that was deleted while it went on may have left steps in the journal."""
    store = make_store(journal=journal)
    store.create_tables()
    durable = Durable(store)
    durable.workflow(mail)
    durable.submit("old", mail, "x")
    if journal:
        add = "INSERT INTO awaitly_snapshots_steps VALUES (%s, 'send', %s)"
        for id in ("old", "new"):
            db.execute(add, [id, '{"ok": true, "value": "left over"}'])
    assert durable.submit_many(mail, {"old": ("x",), "new": ("x",)}) == ["new"]
    results = {outcome.id: outcome.result for outcome in durable.resume_pending()}
    assert results == {"old": "left over" if journal else "x 0", "new": "x 0"}
