"""The journal: large runs append their steps, and nobody who reads can tell."""

from __future__ import annotations

from collections.abc import Callable
from itertools import count
from typing import Any

import psycopg
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from awaitly_postgres import Durable, SnapshotStore, Step, WorkflowSuspended
from awaitly_postgres.durable import admission

DB = psycopg.Connection
MakeStore = Callable[..., SnapshotStore]

SMALL = 2 * 1024  # up to here a snapshot is rewritten whole
TABLES = ("awaitly_snapshots", "awaitly_snapshots_steps", "awaitly_workflow_lock")


class Crash(BaseException):
    """Ends a run as the death of its process would: nothing more is recorded."""


class Outage(Exception):
    """Ends a run as failed."""


def journal(db: DB, id: str) -> list[str]:
    query = "SELECT key FROM awaitly_snapshots_steps WHERE id = %s ORDER BY key"
    return [key for (key,) in db.execute(query, [id]).fetchall()]


def rows(db: DB) -> dict[str, int]:
    return {t: db.execute(f"SELECT count(*) FROM {t}").fetchone()[0] for t in TABLES}


def recorded(store: SnapshotStore, id: str) -> dict[str, Any]:
    """Return the values of all steps as `load` gives them, each recorded once and none left out."""
    steps = store.load(id).steps
    assert sorted(step.meta["seq"] for step in steps.values()) == list(range(1, len(steps) + 1))
    return {key: step.value for key, step in steps.items()}


def filled(key: str, size: int = 5_000) -> str:
    return f"{key}:".ljust(size, ".")


def crash_with_journal(durable: Durable, id: str) -> None:
    """Leave a run of three recorded steps, the last of them in the journal only."""

    def old(step: Step) -> None:
        for key in "abc":
            step(key, filled, key)
        raise Crash

    with pytest.raises(Crash):
        durable.run(id, old)


# -- what load returns ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "journal"),
    [(1, True), (10, True), (100, True), (1_000, True), (1, False), (10, False), (200, False)],
)
def test_load_returns_what_was_recorded_at_every_checkpoint(
    make_store: MakeStore, size: int, journal: bool
) -> None:
    """Small or large, with the journal or without: `load` sees each step once it is recorded."""
    check_checkpoints(make_store(journal=journal), size, range(0, size, max(1, size // 50)))


def test_load_returns_what_was_recorded_in_a_run_of_ten_thousand_steps(
    store: SnapshotStore,
) -> None:
    """The same where a checkpoint is far smaller than what is recorded, looked at now and then."""
    check_checkpoints(store, 10_000, {0, 1, 27, 28, 29, 500, 2_345, 5_000, 9_998, 9_999})


def check_checkpoints(store: SnapshotStore, size: int, looks: Any) -> None:
    durable = Durable(store)
    expected: dict[str, Any] = {}

    @durable.workflow
    def workflow(step: Step) -> int:
        for i in range(size):
            value = step(f"step-{i}", lambda i=i: {"i": i, "text": "x" * 250})
            expected[f"step-{i}"] = value
            if i in looks:
                assert recorded(store, "id") == expected
        return size

    assert durable.run("id", workflow) == size
    assert recorded(store, "id") == expected
    assert len(expected) == size


ids = (f"run-{n}" for n in count())


@settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    sizes=st.lists(st.one_of(st.integers(1, 300), st.integers(1, 50_000)), max_size=14),
    faults=st.lists(
        st.tuples(
            st.integers(0, 13),
            st.sampled_from(["in", "after"]),
            st.sampled_from([Crash, Outage]),
        ),
        max_size=4,
    ),
)
def test_crashes_lose_nothing_that_was_recorded(
    store: SnapshotStore,
    db: DB,
    sizes: list[int],
    faults: list[tuple[int, str, type[BaseException]]],
) -> None:
    """Whatever the sizes and wherever it ends, in a step or after one: what is recorded is there.

    The run is resumed until it completes. Each step has then run once, and once more for each time
    that the run ended in it.
    """
    id, durable = next(ids), Durable(store)
    values = {f"step-{i}": "ü" * size for i, size in enumerate(sizes)}
    left, ran, done = list(faults), [], {}

    def fail_at(key: str, where: str) -> None:
        if left and (f"step-{left[0][0]}", left[0][1]) == (key, where):
            raise left.pop(0)[2]

    def body(key: str) -> str:
        ran.append(key)
        fail_at(key, "in")
        return values[key]

    @durable.workflow
    def workflow(step: Step) -> str:
        for key in values:
            done[key] = step(key, body, key)
            assert succeeded(store, id) == done
            fail_at(key, "after")
        return "end"

    expected_runs = list(values)
    output = None
    while output is None:
        planned, died = list(left), False
        try:
            output = durable.run(id, workflow)
        except (Crash, Outage) as error:
            expected_runs += [ran[-1]] * (planned[0][1] == "in")
            died = isinstance(error, Crash)
        assert succeeded(store, id) == done
        assert died or journal(db, id) == []
    assert sorted(ran) == sorted(expected_runs)
    assert done == values


def succeeded(store: SnapshotStore, id: str) -> dict[str, Any]:
    return {key: step.value for key, step in store.load(id).steps.items() if step.ok}


def test_failure_in_the_journal_gives_way_to_its_retry(store: SnapshotStore, db: DB) -> None:
    """A step tried again shows its new outcome at once, and never the old one again."""
    durable = Durable(store)
    failures: list[type[BaseException]] = [Outage, Outage]
    crashes: list[type[BaseException]] = [Crash]
    seen = []

    def fragile() -> str:
        if failures:
            raise failures.pop()
        return filled("fragile")

    @durable.workflow
    def workflow(step: Step) -> str:
        for key in "ab":
            step(key, filled, key)
        try:
            step("fragile", fragile)
        except Outage:
            if crashes:
                raise crashes.pop() from None  # the failure is recorded, the end of the run is not
            raise
        for key in "def":
            seen.append((store.load("id").steps["fragile"].ok, "fragile" in journal(db, "id")))
            step(key, filled, key)
        return "end"

    with pytest.raises(Crash):
        durable.run("id", workflow)
    assert journal(db, "id") == ["fragile"]
    with pytest.raises(Outage):
        durable.run("id", workflow)
    assert (store.load("id").steps["fragile"].ok, journal(db, "id")) == (False, [])
    assert durable.run("id", workflow) == "end"
    assert seen == [(True, False)] * 3
    assert store.load("id").steps["fragile"].value == filled("fragile")
    assert rows(db) == dict(zip(TABLES, (1, 0, 0), strict=True))


# -- what is in the journal, and when ------------------------------------------------------


def test_small_run_never_touches_the_journal(durable: Durable, db: DB) -> None:
    """Up to 2 KiB the snapshot's own row has every step, for anybody to read in one table."""

    @durable.workflow
    def workflow(step: Step) -> None:
        for i in range(14):
            step(f"step-{i}", filled, "value", 10)
            stored, size = db.execute(
                "SELECT snapshot->'steps', octet_length(snapshot::text) FROM awaitly_snapshots"
            ).fetchone()
            assert len(stored) == i + 1
            assert journal(db, "id") == []
        assert size > SMALL * 0.8  # it was nearly too large

    durable.run("id", workflow)


@pytest.mark.parametrize("end", ["completed", "failed", "suspended", "cancelled"])
def test_end_of_a_run_folds_its_journal(durable: Durable, db: DB, end: str) -> None:
    """However a run ends, all of it is then in the snapshot's row, and its lease is gone."""
    keys = [f"step-{i}" for i in range(40)]

    @durable.workflow
    def workflow(step: Step) -> None:
        for key in keys:
            step(key, filled, key, 1_000)
        assert journal(db, "id")
        if end == "failed":
            raise Outage
        if end == "suspended":
            step.wait("go")
        if end == "cancelled":
            raise Crash

    if end == "completed":
        durable.run("id", workflow)
    else:
        with pytest.raises((Outage, WorkflowSuspended, Crash)):
            durable.run("id", workflow)
    if end == "cancelled":
        durable.cancel("id")
    (stored,) = db.execute("SELECT snapshot->'steps' FROM awaitly_snapshots").fetchone()
    assert {key: step["value"] for key, step in stored.items()} == {
        key: filled(key, 1_000) for key in keys
    }
    assert rows(db) == dict(zip(TABLES, (1, 0, 0), strict=True))


def test_run_that_deletes_itself_leaves_nothing_in_any_table(store: SnapshotStore, db: DB) -> None:
    """``on_complete="delete"`` forgets snapshot, journal and lease in one."""
    durable = Durable(store, on_complete="delete")

    @durable.workflow
    def workflow(step: Step) -> bool:
        for i in range(40):
            step(f"step-{i}", filled, "value", 1_000)
        return bool(journal(db, "id"))

    assert durable.run("id", workflow) is True
    assert rows(db) == dict.fromkeys(TABLES, 0)


@pytest.mark.parametrize("table", ["missing", "made by another store"])
def test_without_journal_the_third_table_is_left_alone(
    make_store: MakeStore, db: DB, table: str
) -> None:
    """With ``journal=False`` every step is in the snapshot's row at once, however large it gets."""
    if table != "missing":
        make_store().create_tables()
    durable = Durable(make_store(journal=False))

    @durable.workflow
    def workflow(step: Step) -> None:
        for i in range(40):
            step(f"step-{i}", filled, "value", 1_000)
            (stored,) = db.execute("SELECT snapshot->'steps' FROM awaitly_snapshots").fetchone()
            assert len(stored) == i + 1
            assert table == "missing" or journal(db, "id") == []

    durable.run("id", workflow)
    durable.cancel("id")
    durable.delete_state("id")
    (there,) = db.execute("SELECT to_regclass('awaitly_snapshots_steps') IS NOT NULL").fetchone()
    assert there is (table != "missing")


# -- a journal without its snapshot --------------------------------------------------------


@pytest.mark.parametrize("size", [10, 3_000])
def test_a_run_whose_snapshot_was_deleted_is_stored_again_at_its_end(
    durable: Durable, db: DB, size: int
) -> None:
    """With all its steps, in the journal or not; and the lease is given back."""

    @durable.workflow
    def workflow(step: Step) -> str:
        for key in ("a", "b", "c"):
            step(key, filled, key, size)
        db.execute("DELETE FROM awaitly_snapshots")
        return "done"

    assert durable.run("id", workflow) == "done"
    assert (durable.result("id"), durable.get("id").step_count) == ("done", 3)
    assert journal(db, "id") == []
    assert db.execute("SELECT * FROM awaitly_workflow_lock").fetchall() == []


@pytest.mark.parametrize("anew", ["run", "submit", "save", "save under a lease"])
def test_journal_of_a_deleted_id_never_comes_back(durable: Durable, db: DB, anew: str) -> None:
    """Whatever begins under an id again begins with nothing.

    The row was deleted by somebody who does not know the journal, such as the Node package.
    """
    store = durable.store
    crash_with_journal(durable, "id")
    db.execute("DELETE FROM awaitly_snapshots")
    assert journal(db, "id") == ["c"]
    assert (store.load("id"), durable.has_state("id"), durable.list_pending()) == (None, False, [])

    @durable.workflow
    def workflow(step: Step) -> dict[str, Any]:
        step("new", filled, "new", 10)
        return recorded(store, "id")

    if anew == "run":
        assert durable.run("id", workflow) == {"new": filled("new", 10)}
    elif anew == "submit":
        durable.submit("id", durable.workflow(workflow))
        assert recorded(store, "id") == {}
        assert durable.resume("id") == {"new": filled("new", 10)}
    elif anew == "save":
        store.save("id", EMPTY)
        assert recorded(store, "id") == {}
    else:
        with store.lock("id") as lease:
            store.save("id", EMPTY, lease=lease)
        assert recorded(store, "id") == {}
    assert journal(db, "id") == []


EMPTY = {
    "formatVersion": 1,
    "steps": {},
    "execution": {"status": "running", "lastUpdated": "2026-11-22T10:56:04.184Z"},
}


@pytest.mark.parametrize(
    "delete",
    [
        pytest.param(lambda durable: durable.store.delete("id"), id="delete"),
        pytest.param(lambda durable: durable.delete_state("id"), id="delete_state"),
        pytest.param(lambda durable: durable.delete_states(["id"]), id="delete_states"),
    ],
)
def test_deleting_a_run_deletes_its_journal_and_no_other(
    durable: Durable, db: DB, delete: Callable[[Durable], Any]
) -> None:
    """Nothing is left of the one, and nothing is missing of its neighbour."""
    for id in ("id", "id2"):
        crash_with_journal(durable, id)
    neighbour = recorded(durable.store, "id2")
    delete(durable)
    assert journal(db, "id") == []
    assert recorded(durable.store, "id2") == neighbour


def test_clearing_all_state_clears_the_journal(durable: Durable, db: DB) -> None:
    """Of everything nothing is left."""
    for id in ("id", "id2"):
        crash_with_journal(durable, id)
    assert durable.clear_state() == 2
    assert rows(db) == dict.fromkeys(TABLES, 0)


def test_snapshot_saved_over_a_crashed_run_replaces_its_journal(durable: Durable, db: DB) -> None:
    """A snapshot that is saved by hand is what `load` returns, without a trace of the run."""
    crash_with_journal(durable, "id")
    durable.store.save("id", EMPTY)
    assert (recorded(durable.store, "id"), journal(db, "id")) == ({}, [])


def test_step_in_the_snapshot_wins_over_the_journals(durable: Durable, db: DB) -> None:
    """Who rewrites the row without knowing the journal, such as the Node package, is believed."""
    crash_with_journal(durable, "id")
    db.execute(
        "UPDATE awaitly_snapshots SET snapshot = jsonb_set(snapshot, '{steps,c}', %s)",
        ['{"ok": true, "value": "from Node", "meta": {"seq": 3}}'],
    )
    assert journal(db, "id") == ["c"]
    assert recorded(durable.store, "id")["c"] == "from Node"


def test_a_step_appended_after_the_run_was_read_is_not_run_again(
    durable: Durable, db: DB, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the last holder appends before its lease ends counts, though the run was read before."""
    crash_with_journal(durable, "id")
    ran, acquire = [], admission.leases.acquire

    def acquire_late(*args: Any) -> Any:
        db.execute(
            "INSERT INTO awaitly_snapshots_steps SELECT id, 'd', jsonb_set(step, '{meta,seq}', '4')"
            " FROM awaitly_snapshots_steps WHERE key = 'c'"
        )
        return acquire(*args)

    @durable.workflow
    def old(step: Step) -> None:
        for key in "abcde":
            step(key, ran.append, key)

    with monkeypatch.context() as patch:
        patch.setattr(admission.leases, "acquire", acquire_late)
        durable.resume("id")
    assert ran == ["e"]
    assert [*recorded(durable.store, "id")] == [*"abcde"]
