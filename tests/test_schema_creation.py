"""First use: the tables are made once, by whoever may, however many begin at once."""

from __future__ import annotations

import secrets
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import psycopg
import pytest
from psycopg.conninfo import make_conninfo

from awaitly_postgres import (
    Durable,
    SchemaMissing,
    SnapshotStore,
    StoreError,
    StoreUnavailable,
    WorkflowSnapshot,
    postgres,
)

MakeStore = Callable[..., SnapshotStore]
Db = psycopg.Connection

DROP = (
    "DROP TABLE IF EXISTS awaitly_snapshots, awaitly_snapshots_steps, awaitly_workflow_lock CASCADE"
)
SNAPSHOT = WorkflowSnapshot.from_json(
    {
        "formatVersion": 1,
        "steps": {"a": {"ok": True, "value": 1}},
        "execution": {"status": "completed", "lastUpdated": "2026-01-02T03:04:05.678Z"},
    }
)


def at_once(actions: list[Callable[[], object]]) -> None:
    """Run all of them at the same moment, each in its thread; raise what one raises."""
    barrier = threading.Barrier(len(actions))

    def run(action: Callable[[], object]) -> object:
        barrier.wait()
        return action()

    with ThreadPoolExecutor(len(actions)) as executor:
        for outcome in [executor.submit(run, action) for action in actions]:
            outcome.result()


def schema_of(db: Db) -> str:
    (schema,) = db.execute("SELECT current_schema()").fetchone() or ()
    return str(schema)


def tables(db: Db) -> int:
    found = db.execute("SELECT FROM pg_tables WHERE schemaname = current_schema()")
    return found.rowcount


@pytest.fixture
def guest(db: Db) -> Iterator[str]:
    """A role that may use the tables of this test's schema and not make any."""
    name = f"guest_{secrets.token_hex(6)}"
    db.execute(f"CREATE ROLE {name}")
    db.execute(f"GRANT USAGE ON SCHEMA {schema_of(db)} TO {name}")
    yield name
    db.execute(f"DROP OWNED BY {name}")
    db.execute(f"DROP ROLE {name}")


def let_in(db: Db, guest: str) -> None:
    schema = schema_of(db)
    db.execute(f"GRANT SELECT, INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA {schema} TO {guest}")


def as_role(url: str, guest: str) -> str:
    options = psycopg.conninfo.conninfo_to_dict(url)["options"]
    return make_conninfo(url, options=f"{options} -c role={guest}")


def read_only(url: str) -> str:
    options = psycopg.conninfo.conninfo_to_dict(url)["options"]
    return make_conninfo(url, options=f"{options} -c default_transaction_read_only=on")


# -- many at once --------------------------------------------------------------------------


@pytest.mark.parametrize("round", range(4))
def test_sixteen_threads_make_the_tables_together(
    make_store: MakeStore, db: Db, round: int
) -> None:
    """Threads that share a store, and threads that each have one, all save without an error."""
    shared = make_store()
    stores = [shared] * 8 + [make_store(max_size=1) for _ in range(8)]
    at_once([lambda s=s, n=n: s.save(f"id-{n}", SNAPSHOT) for n, s in enumerate(stores)])
    assert len(shared.list()) == 16
    assert tables(db) == 3


def test_sixteen_threads_make_the_schema_together(make_store: MakeStore, db: Db) -> None:
    """The schema that is asked for is made without a race too."""
    name = f"{schema_of(db)}_other"
    stores = [make_store(schema=name, max_size=1) for _ in range(16)]
    try:
        at_once([lambda s=s, n=n: s.save(f"id-{n}", SNAPSHOT) for n, s in enumerate(stores)])
        assert len(stores[0].list()) == 16
    finally:
        db.execute(f"DROP SCHEMA {name} CASCADE")


CHILD = """
import sys
from awaitly_postgres import Durable, postgres

url, name = sys.argv[1:]
print("ready", flush=True)
for round in sys.stdin:
    with postgres(url, max_size=1) as store:
        try:
            Durable(store).run(f"{name}-{round.strip()}", lambda step: step("a", int))
            print("done", flush=True)
        except Exception as error:
            print(repr(error), flush=True)
"""


def test_eight_processes_make_the_tables_together(make_store: MakeStore, db: Db, url: str) -> None:
    """Processes that begin at the same moment, several times, all finish a durable run."""
    children = [
        subprocess.Popen(
            [sys.executable, "-c", CHILD, url, str(n)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for n in range(8)
    ]
    try:
        assert all(child.stdout and child.stdout.readline() == "ready\n" for child in children)
        for round in range(5):
            db.execute(DROP)
            for child in children:
                assert child.stdin
                child.stdin.write(f"{round}\n")
                child.stdin.flush()
            answers = {child.stdout.readline() for child in children if child.stdout}
            assert answers == {"done\n"}
            assert len(make_store().list()) == 8
    finally:
        for child in children:
            child.communicate(timeout=30)


# -- dropped, rolled back ------------------------------------------------------------------


def test_tables_dropped_under_a_running_store_are_made_again(store: SnapshotStore, db: Db) -> None:
    """The next call of any kind finds them missing and makes them."""
    store.save("order", SNAPSHOT)
    db.execute(DROP)
    assert store.load("order") is None
    db.execute(DROP)
    assert store.try_acquire("order")
    db.execute("DROP TABLE awaitly_workflow_lock")
    assert Durable(store).run("run", lambda step: step("a", lambda: 1)) == 1


def test_first_use_opens_one_connection(make_store: MakeStore, db: Db) -> None:
    """A cron job with nothing to do needs no more, and waits for no more."""
    name = secrets.token_hex(8)
    store = make_store(kwargs={"application_name": name})
    Durable(store).resume_pending()
    opened = store._db.pool.opened().get_stats()
    assert (opened["connections_num"], opened["pool_size"]) == (1, 1)
    query = "SELECT count(*) FROM pg_stat_activity WHERE application_name = %s"
    assert db.execute(query, [name]).fetchone() == (1,)


@pytest.mark.parametrize("round", range(4))
def test_threads_that_all_meet_dropped_tables_all_go_on(
    make_store: MakeStore, db: Db, round: int
) -> None:
    """One of them makes the tables again; the others do not take the error for the last word."""
    store = make_store(min_size=16, max_size=16)
    at_once([store.ping] * 16)
    for n in range(5):
        db.execute(DROP)
        at_once([lambda i=i, n=n: store.save(f"id-{n}-{i}", SNAPSHOT) for i in range(16)])
        assert len(store.list()) == 16


@pytest.mark.parametrize("end", ["rollback", "commit"])
def test_tables_made_in_a_callers_transaction_share_its_end(
    store: SnapshotStore, db: Db, url: str, end: str
) -> None:
    """Rolled back, they are made again at the next use, on either path; committed, they stay."""
    with psycopg.connect(url) as conn:
        store.save("order", SNAPSHOT, conn=conn)
        store.save("other", SNAPSHOT, conn=conn)
        assert tables(db) == 0
        getattr(conn, end)()
        assert tables(db) == (3 if end == "commit" else 0)
        store.save("order", SNAPSHOT, conn=conn)
        conn.rollback()
    store.save("third", SNAPSHOT)
    expected = {"third", "order", "other"} if end == "commit" else {"third"}
    assert {info.id for info in store.list()} == expected


def test_tables_being_made_in_an_open_transaction_are_not_waited_for_for_ever(
    make_store: MakeStore, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The thread that has it open may be the one that waits: an error, not a deadlock."""
    monkeypatch.setattr("awaitly_postgres.store.database._DDL_PATIENCE", "1s")
    store = make_store(retry_for=0)
    with psycopg.connect(url) as conn:
        store.save("order", SNAPSHOT, conn=conn)
        with pytest.raises(StoreUnavailable, match="lock"):
            store.load("order")
        assert conn.execute("SHOW lock_timeout").fetchone() == ("0",)
    assert store.load("order") == SNAPSHOT


# -- roles and sessions that may not -------------------------------------------------------


def test_a_role_that_may_not_create_uses_what_is_there(
    store: SnapshotStore, make_store: MakeStore, db: Db, url: str, guest: str
) -> None:
    """All of the store works without the right to make tables."""
    store.create_tables()
    let_in(db, guest)
    with postgres(as_role(url, guest), max_size=2) as theirs:
        theirs.save("order", SNAPSHOT)
        assert theirs.load("order") == SNAPSHOT
        assert Durable(theirs).run("run", lambda step: step("a", lambda: "x" * 9000)) == "x" * 9000
        assert theirs.prune(timedelta(0)) == 2
        assert theirs.stats().total == 0
    with psycopg.connect(as_role(url, guest)) as conn, postgres(url) as fresh:
        fresh.save("order", SNAPSHOT, conn=conn)
    assert store.load("order") == SNAPSHOT


def test_a_role_that_may_not_create_gets_the_ddl(db: Db, url: str, guest: str) -> None:
    """SchemaMissing carries what somebody else has to run; after that the same store works."""
    with postgres(as_role(url, guest)) as store:
        with pytest.raises(SchemaMissing) as caught:
            store.save("order", SNAPSHOT)
        assert isinstance(caught.value.__cause__, psycopg.errors.InsufficientPrivilege)
        assert tables(db) == 0
        db.execute(caught.value.ddl.encode())
        let_in(db, guest)
        store.save("order", SNAPSHOT)
        assert store.load("order") == SNAPSHOT


def test_a_callers_transaction_outlives_the_missing_schema(
    store: SnapshotStore, db: Db, url: str, guest: str
) -> None:
    """What the caller did before in its transaction can still be committed."""
    db.execute("CREATE TABLE theirs (n int)")
    let_in(db, guest)
    with psycopg.connect(as_role(url, guest)) as conn:
        conn.execute("INSERT INTO theirs VALUES (1)")
        with pytest.raises(SchemaMissing):
            store.save("order", SNAPSHOT, conn=conn)
    assert db.execute("SELECT n FROM theirs").fetchall() == [(1,)]


def test_a_read_only_session_reads(store: SnapshotStore, url: str) -> None:
    """Everything that only reads works; what writes is refused with the server's reason."""
    store.save("order", SNAPSHOT)
    with postgres(read_only(url)) as reader:
        assert reader.load("order") == SNAPSHOT
        assert [info.id for info in reader.list("or", status="completed")] == ["order"]
        assert [info.id for info in reader.iter()] == ["order"]
        assert reader.stats().total == 1
        assert reader.ping()
        assert Durable(reader).has_state("order")
        assert Durable(reader).list_pending() == []
        writes: list[Callable[[], object]] = [
            lambda: reader.save("order", SNAPSHOT),
            lambda: reader.delete("order"),
            lambda: reader.try_acquire("order"),
            lambda: Durable(reader).run("run", lambda step: step("a", int)),
        ]
        for write in writes:
            with pytest.raises(StoreError, match="read-only") as caught:
                write()
            assert isinstance(caught.value.__cause__, psycopg.errors.ReadOnlySqlTransaction)
    assert [info.id for info in store.list()] == ["order"]


def test_a_read_only_session_without_tables_gets_the_ddl(db: Db, url: str) -> None:
    """Reading before the tables are there is SchemaMissing, on the pool and on a connection."""
    with postgres(read_only(url)) as reader, psycopg.connect(read_only(url)) as conn:
        for use in (lambda: reader.load("order"), lambda: reader.load("order", conn=conn)):
            with pytest.raises(SchemaMissing) as caught:
                use()
            assert isinstance(caught.value.__cause__, psycopg.errors.ReadOnlySqlTransaction)
        db.execute(caught.value.ddl.encode())
        assert reader.load("order") is None
        assert reader.load("order", conn=conn) is None
