"""The snapshot store: what goes in comes out, what is refused changes nothing."""

from __future__ import annotations

import re
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from datetime import timedelta
from pathlib import Path
from typing import Any

import psycopg
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from psycopg_pool import ConnectionPool

from awaitly_postgres import (
    Durable,
    LeaseLost,
    NotSerializable,
    SchemaMissing,
    SnapshotFormatError,
    SnapshotStore,
    Step,
    StoreError,
    WorkflowSnapshot,
    postgres,
)

MakeStore = Callable[..., SnapshotStore]
Db = psycopg.Connection

NODE_DDL = """
    CREATE TABLE awaitly_snapshots (
      id TEXT PRIMARY KEY, snapshot JSONB NOT NULL, updated_at TIMESTAMPTZ DEFAULT NOW());
    CREATE INDEX awaitly_snapshots_updated_at_idx ON awaitly_snapshots (updated_at DESC);
    CREATE TABLE awaitly_workflow_lock (
      workflow_id TEXT PRIMARY KEY, owner_token TEXT NOT NULL, expires_at TIMESTAMPTZ NOT NULL);
"""


def snapshot(status: str = "running", **values: Any) -> WorkflowSnapshot:
    return WorkflowSnapshot.from_json(
        {
            "formatVersion": 1,
            "steps": {key: {"ok": True, "value": value} for key, value in values.items()},
            "execution": {"status": status, "lastUpdated": "2026-01-02T03:04:05.678Z"},
        }
    )


def ids(db: Db, table: str = "awaitly_snapshots") -> list[str]:
    return [row[0] for row in db.execute(f'SELECT id FROM {table} ORDER BY id COLLATE "C"')]


def relations(db: Db) -> set[str]:
    """The definitions of all tables and indexes of the test's schema, without its name."""
    rows = db.execute(
        "SELECT format('%s %s %s %s %s', table_name, column_name, data_type, is_nullable, "
        "coalesce(column_default, '')) FROM information_schema.columns "
        "WHERE table_schema = current_schema() "
        "UNION ALL SELECT replace(indexdef, current_schema() || '.', '') FROM pg_indexes "
        "WHERE schemaname = current_schema()"
    )
    return {row[0] for row in rows}


def age(db: Db, by: str, like: str = "%") -> None:
    db.execute(
        "UPDATE awaitly_snapshots SET updated_at = updated_at - %s::interval WHERE id LIKE %s",
        [by, like],
    )


@pytest.fixture
def pool(url: str) -> Iterator[ConnectionPool]:
    with ConnectionPool(url, min_size=1, max_size=2, open=True) as pool:
        yield pool


@pytest.fixture
def untouched() -> Iterator[str]:
    """The URL of a port on which nobody may have knocked by the end of the test."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        listener.setblocking(False)
        yield f"postgresql://postgres@127.0.0.1:{listener.getsockname()[1]}/postgres"
        with pytest.raises(BlockingIOError):
            listener.accept()


# -- save, load, delete --------------------------------------------------------------------


def test_what_is_saved_is_loaded(store: SnapshotStore) -> None:
    """A snapshot and its JSON mapping are stored alike; the last save counts."""
    store.save("order", snapshot(a=1))
    store.save("order", snapshot("completed", a=2, b={"c": [None, "ü😀"]}).to_json())
    assert store.load("order") == snapshot("completed", a=2, b={"c": [None, "ü😀"]})


def test_nothing_is_loaded_as_none(store: SnapshotStore) -> None:
    """An id under which nothing is stored loads as None, also on the very first call."""
    assert store.load("nobody") is None


def test_load_lays_the_journal_under_the_snapshot(store: SnapshotStore, db: Db) -> None:
    """Appended steps are loaded too, and a key that the snapshot has wins."""
    store.save("order", snapshot(a="snapshot"))
    db.execute(
        "INSERT INTO awaitly_snapshots_steps VALUES "
        """('order', 'a', '{"ok": true, "value": "journal"}'), """
        """('order', 'b', '{"ok": true, "value": "journal"}'), """
        """('other', 'c', '{"ok": true, "value": "journal"}')"""
    )
    loaded = store.load("order")
    assert loaded is not None
    assert {key: step.value for key, step in loaded.steps.items()} == {
        "a": "snapshot",
        "b": "journal",
    }


@pytest.mark.parametrize("replace", ["save", "delete", "delete_many"])
def test_the_journal_goes_with_its_snapshot(store: SnapshotStore, db: Db, replace: str) -> None:
    """Saving over a snapshot or deleting it drops what was appended to it, and no other's."""
    for id in ("order", "other"):
        store.save(id, snapshot(a=1))
        db.execute("INSERT INTO awaitly_snapshots_steps VALUES (%s, 'b', '{\"ok\": true}')", [id])
    if replace == "save":
        store.save("order", snapshot(a=2))
    elif replace == "delete":
        store.delete("order")
    else:
        store.delete_many(["order"])
    assert ids(db, "awaitly_snapshots_steps") == ["other"]


def test_delete_tells_whether_there_was_anything(store: SnapshotStore) -> None:
    """Deleting twice is no error, and only the first one says True."""
    store.save("order", snapshot())
    assert [store.delete("order"), store.delete("order")] == [True, False]
    assert store.load("order") is None


def test_delete_many_counts_what_there_was(store: SnapshotStore, db: Db) -> None:
    """More ids than one batch, unknown and repeated ones among them, are counted once each."""
    store.create_tables()
    db.execute(
        "INSERT INTO awaitly_snapshots SELECT 'id-' || n, %s FROM generate_series(1, 1201) n",
        ['{"formatVersion": 1}'],
    )
    given = [f"id-{n}" for n in range(1, 1201)]
    assert store.delete_many([*given, "unknown", *given[:3]]) == 1200
    assert ids(db) == ["id-1201"]
    assert store.delete_many([]) == 0


def test_a_refused_snapshot_leaves_the_stored_one(store: SnapshotStore) -> None:
    """What is no snapshot, or does not fit into JSON, changes nothing."""
    store.save("order", snapshot(a=1))
    with pytest.raises(NotSerializable, match=r"\$\.steps\.a\.value"):
        store.save("order", snapshot(a=float("nan")))
    with pytest.raises(SnapshotFormatError, match="execution is missing"):
        store.save("order", {"formatVersion": 1, "steps": {}})
    with pytest.raises(TypeError, match="must be a WorkflowSnapshot"):
        store.save("order", "{}")  # type: ignore[arg-type]
    assert store.load("order") == snapshot(a=1)


def test_what_is_stored_but_no_snapshot_is_named(store: SnapshotStore, db: Db) -> None:
    """Loading a foreign document raises with its id and every fault."""
    store.create_tables()
    db.execute("INSERT INTO awaitly_snapshots VALUES ('order', '{\"steps\": 3}')")
    with pytest.raises(SnapshotFormatError) as caught:
        store.load("order")
    assert caught.value.id == "order"
    assert len(caught.value.errors) == 3


# -- listing -------------------------------------------------------------------------------


def test_list_is_newest_first(store: SnapshotStore, db: Db) -> None:
    """The last one saved comes first, with its status and an aware time of the server."""
    for id, status in (("a", "running"), ("b", "completed"), ("c", "failed"), ("a", "failed")):
        store.save(id, snapshot(status))
    listed = store.list()
    assert [(info.id, info.status) for info in listed] == [
        ("a", "failed"),
        ("c", "failed"),
        ("b", "completed"),
    ]
    stored = db.execute("SELECT updated_at FROM awaitly_snapshots ORDER BY updated_at DESC")
    assert [info.updated_at for info in listed] == [row[0] for row in stored]


def test_list_takes_a_status_and_a_limit(store: SnapshotStore) -> None:
    """Only so many of that status are listed; an unknown status is a ValueError."""
    for n in range(5):
        store.save(f"id-{n}", snapshot("failed" if n % 2 else "completed"))
    assert [info.id for info in store.list(status="completed", limit=2)] == ["id-4", "id-2"]
    assert [info.id for info in store.iter(status="failed")] == ["id-3", "id-1"]
    with pytest.raises(ValueError, match="status"):
        store.list(status="suspended")
    with pytest.raises(ValueError, match="limit"):
        store.list(limit=0)


def test_pages_lose_and_repeat_nothing_at_equal_times(store: SnapshotStore, db: Db) -> None:
    """Ids of one and the same time are told apart by the id, page by page."""
    store.create_tables()
    db.execute(
        "INSERT INTO awaitly_snapshots SELECT 'id-' || n, %s, date_trunc('hour', now()) "
        "FROM generate_series(1, 1203) n",
        ['{"execution": {"status": "running"}}'],
    )
    paged, page = [], store.list(limit=400)
    while page:
        paged += page
        page = store.list(limit=400, after=page[-1])
    assert sorted(info.id for info in paged) == sorted(f"id-{n}" for n in range(1, 1204))
    assert list(store.iter()) == paged


AWKWARD = st.text(
    st.sampled_from("aZ_%\\'\" é\ud7ff\ue000\uffff\U00010000😀\U0010ffff"), max_size=4
)


@settings(
    max_examples=150,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    own=AWKWARD,
    prefix=AWKWARD
    | st.text(st.characters(exclude_characters="\0", exclude_categories=("Cs",)), max_size=3),
    names=st.sets(AWKWARD, max_size=12),
)
def test_a_prefix_lists_exactly_what_starts_with_it(
    db: Db, pool: ConnectionPool, own: str, prefix: str, names: set[str]
) -> None:
    """Neither wildcards nor quotes nor the ends of Unicode mean anything in a prefix."""
    # Names that begin with the prefixes, and names that nearly do.
    names |= {prefix + name for name in names} | {own + prefix + name for name in names}
    if prefix and prefix[-1] not in "\ud7ff\U0010ffff":  # after which no character comes
        names |= {prefix[:-1] + chr(ord(prefix[-1]) + 1)}
    names.discard("")
    store = postgres(pool=pool, prefix=own)
    store.create_tables()
    db.execute("TRUNCATE awaitly_snapshots")
    db.execute(
        "INSERT INTO awaitly_snapshots SELECT id, '{}' FROM unnest(%s::text[]) id", [list(names)]
    )
    expected = {name[len(own) :] for name in names if name.startswith(own + prefix)}
    expected.discard("")  # the bare prefix of the store is no id in it
    assert {info.id for info in store.list(prefix, limit=1000)} == expected


# -- pruning -------------------------------------------------------------------------------


def test_prune_deletes_what_is_completed_and_old(store: SnapshotStore, db: Db) -> None:
    """Newer ones, unfinished ones and leased ones stay; by the server's clock."""
    for id, status in (
        ("old-completed", "completed"),
        ("old-failed", "failed"),
        ("old-running", "running"),
        ("old-leased", "completed"),
        ("new-completed", "completed"),
    ):
        store.save(id, snapshot(status))
    store.try_acquire("old-leased")
    age(db, "31 days", "old-%")
    age(db, "29 days", "new-%")
    assert store.prune(timedelta(days=30)) == 1
    assert ids(db) == ["new-completed", "old-failed", "old-leased", "old-running"]
    assert store.prune(timedelta(days=30), status=None) == 2
    assert ids(db) == ["new-completed", "old-leased"]


def test_prune_takes_a_state_instead_of_a_status(store: SnapshotStore, db: Db) -> None:
    """A stored status says less: a failed run may be tried again, or be cancelled."""
    for id, status, metadata in (
        ("retrying", "failed", {"workflow": "w"}),
        ("given-up", "failed", {"workflow": "w", "gaveUpAt": "2026-01-01T00:00:00.000Z"}),
        ("cancelled", "failed", {"workflow": "w", "cancelledAt": "2026-01-01T00:00:00.000Z"}),
        ("completed", "completed", {"workflow": "w"}),
    ):
        store.save(id, {**snapshot(status).to_json(), "metadata": metadata})
    age(db, "2 days")
    assert store.prune(timedelta(days=1), state="failed") == 1
    assert ids(db) == ["cancelled", "completed", "retrying"]
    with pytest.raises(ValueError, match="state must be one of"):
        store.prune(timedelta(days=1), state="done")  # type: ignore[arg-type]
    assert store.prune(timedelta(days=1), status="failed") == 2
    assert ids(db) == ["completed"]


@pytest.mark.parametrize("change", ["acquire", "save"])
def test_prune_spares_what_is_taken_up_after_it_was_listed(
    store: SnapshotStore, db: Db, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    """Before the deletion is sent, another process may acquire the lease, or write the run."""
    for id in ("a", "b"):
        store.save(id, snapshot("failed"))
    age(db, "2 days")
    delete = SnapshotStore._delete_batch

    def too_late(here: SnapshotStore, *batch: Any) -> int:
        if change == "acquire":
            assert store.try_acquire("a", ttl=600)
        else:
            store.save("a", snapshot("failed"))
        return delete(here, *batch)

    monkeypatch.setattr(SnapshotStore, "_delete_batch", too_late)
    assert store.prune(timedelta(days=1), status="failed") == 1
    assert ids(db) == ["a"]


def test_prune_goes_in_batches_and_says_how_far_it_is(store: SnapshotStore, db: Db) -> None:
    """Progress counts up to the number returned, a batch at a time."""
    for n in range(7):
        store.save(f"id-{n}", snapshot("completed"))
    age(db, "2 days")
    progress: list[int] = []
    assert store.prune(timedelta(days=1), batch_size=3, on_progress=progress.append) == 7
    assert progress == [3, 6, 7]


def test_a_dry_run_counts_and_deletes_nothing(store: SnapshotStore, db: Db) -> None:
    """The number is what the real run then deletes."""
    for n in range(5):
        store.save(f"id-{n}", snapshot("completed" if n else "failed"))
    age(db, "2 days")
    progress: list[int] = []
    counted = store.prune(
        timedelta(days=1), batch_size=2, dry_run=True, on_progress=progress.append
    )
    assert (counted, progress[-1], len(ids(db))) == (4, 4, 5)
    assert store.prune(timedelta(days=1)) == 4


def test_an_interrupted_prune_keeps_its_batches_and_goes_on(store: SnapshotStore, db: Db) -> None:
    """Ctrl-C in the middle loses nothing of what was done; the next call does the rest."""

    def interrupt(done: int) -> None:
        raise KeyboardInterrupt

    for n in range(5):
        store.save(f"id-{n}", snapshot("completed"))
    age(db, "2 days")
    with pytest.raises(KeyboardInterrupt):
        store.prune(timedelta(days=1), batch_size=2, on_progress=interrupt)
    assert len(ids(db)) == 3
    assert store.prune(timedelta(days=1), batch_size=2) == 3
    assert ids(db) == []


def test_prune_sweeps_up_orphans(store: SnapshotStore, db: Db) -> None:
    """Journal rows without a snapshot and long expired leases go; the others stay."""
    store.save("alive", snapshot())
    db.execute(
        "INSERT INTO awaitly_snapshots_steps VALUES ('alive', 'a', '{}'), ('dead', 'a', '{}')"
    )
    db.execute(
        "INSERT INTO awaitly_workflow_lock VALUES "
        "('expired long ago', 't', now() - '2 days'::interval), "
        "('expired now', 't', now()), ('held', 't', now() + '1 day'::interval)"
    )
    store.prune(timedelta(days=1))
    assert ids(db, "awaitly_snapshots_steps") == ["alive"]
    locks = db.execute("SELECT workflow_id FROM awaitly_workflow_lock ORDER BY 1").fetchall()
    assert locks == [("expired now",), ("held",)]


# -- the rest of the store -----------------------------------------------------------------


def test_stats_counts_by_status_and_state(store: SnapshotStore, db: Db) -> None:
    """Totals, statuses, states and the size of all tables with their indexes."""
    empty = store.stats()
    assert (empty.total, empty.by_status, empty.by_state) == (0, {}, {})
    for n, status in enumerate(["running", "completed", "completed", "failed"]):
        store.save(f"id-{n}", snapshot(status))
    stats = store.stats()
    assert stats.total == 4
    assert stats.by_status == {"running": 1, "completed": 2, "failed": 1}
    assert stats.by_state == {"pending": 1, "completed": 2, "failed": 1}
    size = db.execute(
        "SELECT sum(pg_total_relation_size(oid)) FROM pg_class "
        "WHERE relnamespace = current_schema()::regnamespace AND relkind = 'r'"
    ).fetchone()
    assert (stats.bytes,) == size


def test_ping_answers(store: SnapshotStore) -> None:
    """A reachable database pings True."""
    assert store.ping() is True


def test_ddl_is_what_create_tables_runs(make_store: MakeStore, db: Db) -> None:
    """The text, run by hand, makes the very same tables and indexes; both can be repeated."""
    store = make_store()
    store.create_tables()
    store.create_tables()
    created = relations(db)
    assert any("pending_idx" in definition for definition in created)
    db.execute(
        "DROP TABLE awaitly_snapshots, awaitly_snapshots_steps, awaitly_workflow_lock CASCADE"
    )
    for _ in range(2):
        db.execute(store.ddl().encode())
    assert relations(db) == created


def test_a_closed_store_says_so(make_store: MakeStore) -> None:
    """The context manager closes the store; closing again is no error; using it is."""
    with make_store() as store:
        store.save("order", snapshot())
    store.close()
    for use in (store.ping, lambda: store.load("order"), store.create_tables):
        with pytest.raises(StoreError, match="closed"):
            use()


def test_a_store_that_was_never_used_can_be_closed(untouched: str) -> None:
    """Closing opens nothing."""
    with postgres(untouched):
        pass


# -- options of postgres() -----------------------------------------------------------------


def test_names_of_tables_and_schema_are_used(make_store: MakeStore, db: Db) -> None:
    """All three tables are where the options say, the schema is made too; nothing else is."""
    (name,) = db.execute("SELECT current_schema() || '_Other'").fetchone() or ()
    store = make_store(table="Runs", lock_table="leases", schema=name)
    try:
        Durable(store).run("order", lambda step: step("a", int))
        store.try_acquire("order")
        found = db.execute(
            "SELECT relname FROM pg_class WHERE relkind = 'r' AND relnamespace = %s::regnamespace",
            [f'"{name}"'],
        )
        assert {row[0] for row in found} == {"Runs", "Runs_steps", "leases"}
        assert relations(db) == set()
    finally:
        db.execute(f'DROP SCHEMA "{name}" CASCADE')


def test_without_auto_create_the_error_brings_the_ddl(make_store: MakeStore, db: Db) -> None:
    """Nothing is made; what the error carries, run as it is, makes the store work."""
    store = make_store(auto_create_table=False)
    with pytest.raises(SchemaMissing) as caught:
        store.save("order", snapshot(a=1))
    assert relations(db) == set()
    assert caught.value.ddl in str(caught.value)
    db.execute(caught.value.ddl.encode())
    store.save("order", snapshot(a=1))
    assert store.load("order") == snapshot(a=1)


def test_without_a_journal_there_is_no_third_table(make_store: MakeStore, db: Db) -> None:
    """Two tables do for everything, and each step is in the snapshot as soon as it is done."""
    store = make_store(journal=False)
    seen: list[int] = []

    def workflow(step: Step) -> None:
        for n in range(4):
            step(f"step-{n}", lambda: "x" * 10_000)
            row = db.execute(
                "SELECT count(*) FROM awaitly_snapshots, jsonb_object_keys(snapshot->'steps')"
            ).fetchone()
            assert row is not None
            seen.append(row[0])

    Durable(store).run("order", workflow)
    store.save("order", snapshot())
    store.delete("order")
    store.delete_many(["order"])
    store.prune(timedelta(0))
    store.stats()
    assert seen == [1, 2, 3, 4]
    assert not any("steps" in definition for definition in relations(db))
    assert "steps" not in store.ddl()


def test_a_prefix_is_stored_and_taken_off_again(make_store: MakeStore, db: Db) -> None:
    """In the tables the ids have it, to the user they do not."""
    store = make_store(prefix="shop_%:")
    durable = Durable(store)
    store.save("saved", snapshot("completed"))
    durable.submit("submitted", durable.workflow(lambda step: None))
    lease = store.try_acquire("locked")
    assert ids(db) == ["shop_%:saved", "shop_%:submitted"]
    assert db.execute("SELECT workflow_id FROM awaitly_workflow_lock").fetchall() == [
        ("shop_%:locked",)
    ]
    assert lease is not None
    assert lease.id == "locked"
    assert [info.id for info in store.list()] == ["submitted", "saved"]
    assert [info.id for info in store.list("s", after=store.list()[0])] == ["saved"]
    assert [info.id for info in durable.list_pending()] == ["submitted"]


def test_stores_of_different_prefixes_do_not_see_each_other(make_store: MakeStore) -> None:
    """Nothing that one store does reaches an id of the other, however alike their prefixes."""
    mine, theirs = make_store(prefix="a_"), make_store(prefix="ab")
    theirs.save("order", snapshot("completed", a=1))
    mine.save("order", snapshot("failed"))
    assert mine.try_acquire("order")
    assert theirs.try_acquire("order")
    mine.save("order", snapshot("completed"))
    assert mine.stats().by_status == {"completed": 1}
    assert mine.delete("order")
    assert mine.list() == []
    assert Durable(mine).clear_state() == 0
    assert mine.prune(timedelta(0), status=None) == 0
    assert mine.delete_many(["order"]) == 0
    assert theirs.load("order") == snapshot("completed", a=1)


def test_a_pool_of_the_callers_is_only_borrowed_from(pool: ConnectionPool, db: Db) -> None:
    """It is not closed, and its settings and connections are as they were."""
    before = (pool.min_size, pool.max_size, pool.conninfo, dict(pool.kwargs or {}), pool.timeout)
    with postgres(pool=pool) as store:
        store.save("order", snapshot(a=1))
        Durable(store).run("run", lambda step: step("a", int))
        assert store.load("order") == snapshot(a=1)
    assert not pool.closed
    after = (pool.min_size, pool.max_size, pool.conninfo, dict(pool.kwargs or {}), pool.timeout)
    assert after == before
    with pool.connection() as conn:
        assert not conn.autocommit
        assert conn.execute("SELECT count(*) FROM awaitly_snapshots").fetchone() == (2,)


def test_kwargs_reach_the_connections(make_store: MakeStore, db: Db) -> None:
    """What psycopg.connect takes can be given."""
    (schema,) = db.execute("SELECT current_schema()").fetchone() or ()
    make_store(kwargs={"application_name": schema}).ping()
    row = db.execute(
        "SELECT count(*) FROM pg_stat_activity WHERE application_name = %s", [schema]
    ).fetchone()
    assert row is not None
    assert row[0] >= 1


def test_options_that_make_no_sense_are_refused(url: str) -> None:
    """Each wrong argument is a TypeError or a ValueError that names it."""
    refused: list[tuple[dict[str, Any], type[Exception], str]] = [
        ({}, TypeError, "a url or a pool"),
        ({"url": url, "pool": object()}, TypeError, "a url or a pool"),
        ({"url": 5}, TypeError, "url"),
        ({"pool": url}, TypeError, "pool"),
        ({"url": url, "prefix": "a\0"}, ValueError, "prefix"),
        ({"url": url, "prefix": None}, TypeError, "prefix"),
        ({"url": url, "min_size": 3, "max_size": 2}, ValueError, "min_size"),
        ({"url": url, "max_size": 0}, ValueError, "max_size"),
        ({"url": url, "retry_for": -1}, ValueError, "retry_for"),
        ({"url": url, "table": "a", "lock_table": "a"}, ValueError, "lock_table"),
        ({"url": url, "table": "a", "lock_table": "a_steps"}, ValueError, "lock_table"),
    ]
    for options, error, says in refused:
        with pytest.raises(error, match=says):
            postgres(**options)


# -- nothing hostile is sent ---------------------------------------------------------------

HOSTILE_NAMES = [
    "x); DROP TABLE users;--",
    "two words",
    "semi;colon",
    "per%cent",
    "per%scent",
    'quo"te',
    "dot.ted",
    "new\nline",
    "line\n",
    "1st",
    "",
    "x" * 64,
    "ü" * 32,
    "nul\0",
    None,
    5,
    b"bytes",
]


@pytest.mark.parametrize("option", ["table", "lock_table", "schema"])
@pytest.mark.parametrize("name", HOSTILE_NAMES, ids=repr)
def test_a_hostile_name_is_refused(untouched: str, option: str, name: object) -> None:
    """A name that is not plain is a ValueError before anything is opened."""
    if (option, name) == ("schema", None):
        postgres(untouched, schema=None)
        return
    with pytest.raises(ValueError, match=option):
        postgres(untouched, **{option: name})  # type: ignore[arg-type]


def test_names_up_to_the_limit_work(make_store: MakeStore, db: Db) -> None:
    """The longest name allowed does not make PostgreSQL cut a name derived from it."""
    store = make_store(table="t" * 48, lock_table="l" * 48)
    store.create_tables()
    names = {"t" * 48 + suffix for suffix in ("", "_steps", "_updated_at_idx", "_pending_idx")}
    found = db.execute(
        "SELECT relname FROM pg_class WHERE relnamespace = current_schema()::regnamespace"
    )
    assert names <= {row[0] for row in found}


@pytest.mark.parametrize(
    "id", ["", "a\0b", "\ud800", "x" * 1001, "é" * 501, None, 5, b"id"], ids=repr
)
def test_a_hostile_id_is_refused(untouched: str, id: Any) -> None:
    """An id that cannot be a key is a ValueError in every method before anything is opened."""
    store = postgres(untouched)
    durable = Durable(store)
    uses: list[Callable[[], object]] = [
        lambda: store.save(id, snapshot()),
        lambda: store.load(id),
        lambda: store.delete(id),
        lambda: store.delete_many(["fine", id]),
        lambda: store.try_acquire(id),
        lambda: store.lock(id).__enter__(),
        lambda: durable.run(id, lambda step: None),
        lambda: durable.submit(id, durable.workflow(lambda step: None)),
        lambda: durable.resume(id),
        lambda: durable.has_state(id),
        lambda: durable.delete_state(id),
        lambda: durable.delete_states([id]),
        lambda: durable.signal(id, "key", 1),
        lambda: durable.signal("fine", id, 1),
        lambda: durable.cancel(id),
    ]
    for use in uses:
        with pytest.raises(ValueError):
            use()


@pytest.mark.parametrize("prefix", ["a\0b", "\ud800", 5], ids=repr)
def test_a_hostile_prefix_is_refused(untouched: str, prefix: Any) -> None:
    """The same goes for the prefixes of listings."""
    store = postgres(untouched)
    for use in (store.list, lambda p: list(store.iter(p)), Durable(store).list_pending):
        with pytest.raises((ValueError, TypeError)):
            use(prefix)


def test_one_string_is_not_a_list_of_ids(untouched: str) -> None:
    """delete_many("order") would otherwise delete five ids of one letter."""
    with pytest.raises(TypeError, match="one string"):
        postgres(untouched).delete_many("order")


# -- leases --------------------------------------------------------------------------------


def test_a_save_under_a_held_lease_is_written(store: SnapshotStore) -> None:
    """The lease stays held; releasing it is its holder's business."""
    lease = store.try_acquire("order")
    assert lease is not None
    store.save("order", snapshot(a=1), lease=lease)
    assert store.load("order") == snapshot(a=1)
    assert lease.held()


@pytest.mark.parametrize(
    "lose",
    [
        "UPDATE awaitly_workflow_lock SET expires_at = clock_timestamp()",
        "UPDATE awaitly_workflow_lock SET owner_token = 'another'",
        "DELETE FROM awaitly_workflow_lock",
    ],
    ids=["expired", "taken over", "released"],
)
def test_a_save_under_a_lost_lease_changes_nothing(store: SnapshotStore, db: Db, lose: str) -> None:
    """LeaseLost, and neither the snapshot nor its journal is touched."""
    lease = store.try_acquire("order")
    store.save("order", snapshot(a=1))
    db.execute("INSERT INTO awaitly_snapshots_steps VALUES ('order', 'b', '{\"ok\": true}')")
    before = store.load("order")
    db.execute(lose.encode())
    with pytest.raises(LeaseLost):
        store.save("order", snapshot(a=2), lease=lease)
    assert store.load("order") == before


def test_a_lease_is_good_for_its_own_id_only(store: SnapshotStore, db: Db) -> None:
    """Saving another id under it is a ValueError."""
    lease = store.try_acquire("order")
    with pytest.raises(ValueError, match="'order'"):
        store.save("other", snapshot(), lease=lease)
    assert ids(db) == []


# -- conn= ---------------------------------------------------------------------------------


def _save(store: SnapshotStore, conn: Db) -> None:
    store.save("order", snapshot(a="new"), conn=conn)


def _save_under_lease(store: SnapshotStore, conn: Db) -> None:
    lease = store.try_acquire("order")
    store.save("order", snapshot(a="new"), lease=lease, conn=conn)


def _delete(store: SnapshotStore, conn: Db) -> None:
    assert store.delete("order", conn=conn)


def _submit(store: SnapshotStore, conn: Db) -> None:
    durable = Durable(store)
    assert durable.submit("accepted", durable.workflow(lambda step: None), conn=conn)


@pytest.mark.parametrize("act", [_save, _save_under_lease, _delete, _submit])
def test_conn_joins_the_callers_transaction(
    store: SnapshotStore, db: Db, url: str, act: Callable[[SnapshotStore, Db], None]
) -> None:
    """Others see it after the commit and not before; a rollback undoes it; we do neither."""
    store.save("order", snapshot(a="old"))
    stored = "SELECT id, snapshot::text FROM awaitly_snapshots ORDER BY id"
    before = db.execute(stored).fetchall()
    with psycopg.connect(url) as conn:
        act(store, conn)
        assert conn.info.transaction_status == psycopg.pq.TransactionStatus.INTRANS
        within = conn.execute(stored).fetchall()
        assert within != before
        assert db.execute(stored).fetchall() == before
        conn.rollback()
        assert db.execute(stored).fetchall() == before
        db.execute("DELETE FROM awaitly_workflow_lock")
        act(store, conn)
        conn.commit()
        after = db.execute(stored).fetchall()
    assert [row[0] for row in after] == [row[0] for row in within]
    assert after != before


def test_load_sees_what_its_transaction_has_written(store: SnapshotStore, url: str) -> None:
    """load(conn=) reads inside the caller's transaction, load() outside it."""
    store.create_tables()
    with psycopg.connect(url) as conn:
        store.save("order", snapshot(a=1), conn=conn)
        assert store.load("order", conn=conn) == snapshot(a=1)
        assert store.load("order") is None
        conn.rollback()


def test_conn_in_autocommit_mode_writes_at_once(store: SnapshotStore, db: Db) -> None:
    """Where no transaction is open, none is opened either."""
    store.save("order", snapshot(a=1), conn=db)
    assert store.load("order") == snapshot(a=1)


def test_a_savepoint_of_the_caller_undoes_only_its_part(store: SnapshotStore, url: str) -> None:
    """Nested blocks of psycopg's work around our statements as around the caller's."""
    store.create_tables()
    with psycopg.connect(url) as conn:
        store.save("kept", snapshot(), conn=conn)
        with conn.transaction(force_rollback=True):
            store.save("undone", snapshot(), conn=conn)
    assert [info.id for info in store.list()] == ["kept"]


def test_an_error_inside_the_callers_transaction_is_typed(store: SnapshotStore, url: str) -> None:
    """psycopg's error comes as the cause of a StoreError, and the transaction is the caller's."""
    with psycopg.connect(url) as conn:
        with pytest.raises(psycopg.Error):
            conn.execute("SELECT 1 / 0")
        with pytest.raises(StoreError) as caught:
            store.save("order", snapshot(), conn=conn)
        assert isinstance(caught.value.__cause__, psycopg.errors.InFailedSqlTransaction)
        conn.rollback()
        store.save("order", snapshot(), conn=conn)


def test_conn_must_be_a_connection(untouched: str) -> None:
    """A cursor or a URL in its place is a TypeError."""
    with pytest.raises(TypeError, match=r"psycopg\.Connection"):
        postgres(untouched).load("order", conn="a url")  # type: ignore[arg-type]


# -- Node's tables -------------------------------------------------------------------------


def test_tables_that_node_made_are_taken_as_they_are(store: SnapshotStore, db: Db) -> None:
    """They are used without being altered and without a new index; only the journal is added."""
    db.execute(NODE_DDL)
    before = relations(db)
    store.save("order_1", snapshot(a=1))
    store.save("orderX2", snapshot("completed"))
    assert Durable(store).run("run", lambda step: step("a", lambda: "done")) == "done"
    assert store.load("order_1") == snapshot(a=1)
    assert [info.id for info in store.list("order_")] == ["order_1"]
    assert store.try_acquire("order_1")
    added = relations(db) - before
    assert before <= relations(db)
    assert all("awaitly_snapshots_steps" in definition for definition in added)


def test_create_tables_adds_the_index_for_pending_work_to_nodes_tables(
    store: SnapshotStore, db: Db
) -> None:
    """Asked explicitly, the store completes what Node made."""
    db.execute(NODE_DDL)
    store.create_tables()
    assert any("awaitly_snapshots_pending_idx" in definition for definition in relations(db))


# -- cost ----------------------------------------------------------------------------------


@pytest.mark.read_committed
@pytest.mark.skipif(sys.platform != "linux", reason="libpq traces to a file descriptor on Linux")
@pytest.mark.parametrize("kind", ["its own pool", "a caller's pool", "a caller's in autocommit"])
def test_save_and_load_take_one_round_trip(url: str, tmp_path: Path, kind: str) -> None:
    """Each sends one message that waits for an answer."""
    autocommit = {"autocommit": kind.endswith("autocommit")}
    with ExitStack() as stack:
        if kind == "its own pool":
            store = stack.enter_context(postgres(url, max_size=1))
        else:
            pool = ConnectionPool(url, min_size=1, max_size=1, kwargs=autocommit, open=True)
            store = postgres(pool=stack.enter_context(pool))
        trace = stack.enter_context((tmp_path / "trace").open("w+b"))
        durable = Durable(store, on_complete="delete")

        def on_the_connection(act: Callable[[Db], None]) -> None:
            durable.run("act", lambda step: step.transaction("act", act))

        def round_trips(use: Callable[[], object]) -> int:
            on_the_connection(lambda conn: conn.pgconn.trace(trace.fileno()))
            trace.truncate(0)
            use()
            sent = (tmp_path / "trace").read_bytes()
            on_the_connection(lambda conn: conn.pgconn.untrace())
            return len(re.findall(rb"\tF\t\d+\t(?:Sync|Query)", sent))

        for _ in range(10):  # past the fifth execution, when psycopg prepares a statement
            store.save("order", snapshot(a=1))
            store.load("order")
        assert round_trips(lambda: store.save("order", snapshot(a=2))) == 1
        assert round_trips(lambda: store.load("order")) == 1
        assert round_trips(lambda: (store.load("order"), store.load("order"))) == 2
