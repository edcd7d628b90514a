"""Leases wait for nobody: no locked row, no pooled connection, no isolation level."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import psycopg
import pytest
from psycopg.conninfo import conninfo_to_dict, make_conninfo
from psycopg_pool import ConnectionPool

from awaitly_postgres import (
    Durable,
    SnapshotStore,
    Step,
    StoreUnavailable,
    Workflow,
    WorkflowCancelled,
    WorkflowNotFound,
    postgres,
)
from awaitly_postgres.durable import steering
from awaitly_postgres.store import lease
from tests.durable.test_interrupts import make_payments, pay
from tests.support import Proxy, eventually

DB = psycopg.Connection


def wait_until(db: DB, seconds: float) -> None:
    db.execute("SELECT pg_sleep(%s)", (seconds,))


def test_a_lease_whose_row_is_locked_is_taken_at_once(
    store: SnapshotStore, db: DB, url: str
) -> None:
    """Even when it has expired: whoever locks it is writing under it."""
    assert store.try_acquire("a", ttl=0.01)
    wait_until(db, 0.05)
    with psycopg.connect(url) as writer, ThreadPoolExecutor(1) as pool:
        writer.execute("SELECT * FROM awaitly_workflow_lock FOR UPDATE")
        assert pool.submit(store.try_acquire, "a").result(30) is None
        assert not writer.closed  # it still had the lock when the answer came
    assert store.try_acquire("a")


def test_a_save_in_a_long_transaction_costs_no_other_lease(
    make_store: Callable[..., SnapshotStore], db: DB, url: str
) -> None:
    """The thread that renews does not wait for its row; nobody takes it meanwhile either."""
    store = make_store()
    snapshot = Workflow(lambda step: step("a", str)).snapshot()
    with (
        store.lock("long", ttl=2) as long,
        store.lock("bystander", ttl=2) as bystander,
        psycopg.connect(url) as conn,
    ):
        store.save("long", snapshot, lease=long, conn=conn)
        wait_until(db, 2)
        assert bystander.held()
        assert store.try_acquire("bystander") is None
        assert store.try_acquire("long") is None
        conn.commit()
    assert store.load("long") == snapshot


@pytest.mark.parametrize("own_pool", [True, False])
def test_a_transaction_longer_than_the_ttl_on_the_only_connection_keeps_its_lease(
    make_store: Callable[..., SnapshotStore], db: DB, url: str, own_pool: bool
) -> None:
    """It is renewed on a connection of its own."""
    with ConnectionPool(url, min_size=1, max_size=1) as pool:
        store = make_store(max_size=1) if own_pool else postgres(pool=pool)
        durable = Durable(store, lock_ttl=1.5)

        def work(step: Step) -> list[Any]:
            first = step.transaction("a", lambda conn: wait_until(conn, 1.6))
            return [first, step("b", str)]

        assert durable.run("a", work) == [None, ""]


def test_a_lost_reply_to_a_commit_is_cleared_up_though_threads_hold_all_connections(
    connect: Callable[..., SnapshotStore], proxy: Proxy, db: DB, url: str
) -> None:
    """They hold them while they wait for the turn of the one whose commit is in doubt."""
    make_payments(db, slow_commit=True)
    store = connect(max_size=2, retry_for=10)
    durable = Durable(store)
    paying = threading.Event()

    @durable.workflow
    def work(step: Step) -> list[str]:
        def beside(nr: int) -> str:
            assert paying.wait(30)
            return step(f"beside-{nr}", str, nr)

        with ThreadPoolExecutor(3) as pool:
            others = pool.map(beside, range(3))
            return [step.transaction("pay", pay, "a"), *others]

    with psycopg.connect(url) as gate, ThreadPoolExecutor(1) as threads:
        gate.execute("LOCK TABLE gate")
        run = threads.submit(durable.run, "a", work)
        waiting = "SELECT count(*) FROM pg_locks WHERE relation = 'gate'::regclass AND NOT granted"
        eventually(lambda: db.execute(waiting).fetchone() == (1,))
        paying.set()
        stats = store._db.pool.opened().get_stats
        eventually(lambda: stats()["pool_size"] == 2 and stats()["pool_available"] == 0)
        proxy.lose("reply", 0)
        gate.rollback()
        assert run.result(60) == ["paid a", "0", "1", "2"]
    assert db.execute("SELECT count(*) FROM payments").fetchone() == (1,)


@pytest.mark.parametrize("stored", ["nothing", "completed", "cancelled"])
def test_a_cancel_that_finds_nothing_to_cancel_changes_nothing(
    durable: Durable, db: DB, stored: str
) -> None:
    """The lease that somebody has on that id is theirs still."""
    if stored != "nothing":

        @durable.workflow
        def work(step: Step) -> None: ...

        if stored == "completed":
            durable.run("a", work)
        else:
            durable.submit("a", work)
            assert durable.cancel("a")
    with durable.store.lock("a") as lease:
        before = db.execute("SELECT t::text FROM awaitly_snapshots t").fetchall()
        assert durable.cancel("a") is False
        assert lease.held()
        assert db.execute("SELECT t::text FROM awaitly_snapshots t").fetchall() == before


ISOLATION = ["REPEATABLE READ", "SERIALIZABLE"]


@pytest.fixture(params=["server", "pool"])
def isolated(request: pytest.FixtureRequest, url: str) -> Iterator[Callable[..., SnapshotStore]]:
    """Make a store whose transactions are of this level, by the server's default or the pool's."""
    stores: list[Any] = []

    def make(level: str) -> SnapshotStore:
        if request.param == "server":
            setting = level.replace(" ", "\\ ").lower()
            with psycopg.connect(url) as conn:
                path = conn.execute("SHOW search_path").fetchone()[0]
            options = f"-c search_path={path} -c default_transaction_isolation={setting}"
            stores.append(postgres(make_conninfo(url, options=options), max_size=3))
        else:

            def configure(conn: DB) -> None:
                conn.isolation_level = psycopg.IsolationLevel[level.replace(" ", "_")]

            pool = ConnectionPool(url, min_size=1, max_size=3, configure=configure, open=True)
            stores.insert(0, pool)
            stores.append(postgres(pool=pool))
        return stores[-1]

    yield make
    for store in reversed(stores):
        store.close()


@pytest.mark.parametrize("size", [0, 5_000], ids=["rewritten", "appended"])
@pytest.mark.parametrize("level", ISOLATION)
def test_a_transaction_longer_than_the_ttl_commits_at_every_isolation_level(
    isolated: Callable[[str], SnapshotStore], db: DB, level: str, size: int
) -> None:
    """Renewing its lease does not make its own fence fail; runs are resumed as well."""
    durable = Durable(isolated(level), lock_ttl=1.5)
    broken = [True]

    def slow(conn: DB) -> str:
        (found,) = conn.execute("SHOW transaction_isolation").fetchone()
        wait_until(conn, 1.6)
        return found

    @durable.workflow
    def work(step: Step) -> list[str]:
        step("fill", lambda: "." * size)
        found = step.transaction("slow", slow)
        if broken:
            raise LookupError
        return [found, step("after", str)]

    durable.submit("a", work)
    (failed,) = durable.resume_pending()
    assert isinstance(failed.error, LookupError)
    broken.clear()
    wake = "jsonb_set(snapshot, '{metadata,wakeAt}', '\"2000\"')"
    db.execute(f"UPDATE awaitly_snapshots SET snapshot = {wake}")
    (outcome,) = durable.resume_pending()
    assert outcome.result == [level.lower(), ""]
    assert durable.signal("a", "go", 1) is False


@pytest.mark.parametrize("what", ["request", "reply"])
@pytest.mark.parametrize("call", ["submit", "signal", "delete", "delete_many", "cancel"])
def test_an_answer_survives_a_lost_reply(
    connect: Callable[..., SnapshotStore], proxy: Proxy, call: str, what: Any
) -> None:
    """It tells what happened, not what the second try saw; each request is lost once."""
    durable = Durable(connect())

    @durable.workflow
    def work(step: Step) -> Any:
        return step.wait("go")

    calls: dict[str, Callable[[str], object]] = {
        "submit": lambda id: durable.submit(f"{id}-new", work),
        "signal": lambda id: durable.signal(id, "go", {"n": 1}),
        "delete": durable.delete_state,
        "delete_many": lambda id: durable.delete_states([id, f"{id}-missing"]) == 1,
        "cancel": durable.cancel,
    }
    nr, lost = 0, True
    while lost:
        durable.submit(f"{nr}", work)
        proxy.lose(what, nr)
        assert calls[call](f"{nr}") is True
        lost = proxy.has_lost
        proxy.lose(what, 10**9)
        again = durable.submit(f"{nr}-new", work) if call == "submit" else calls[call](f"{nr}")
        assert again is False
        nr += 1
    assert nr > 1


def test_a_lost_reply_to_the_beginning_counts_one_start(
    connect: Callable[..., SnapshotStore], proxy: Proxy
) -> None:
    """The second try finds what the first has begun, and goes on with it."""
    durable = Durable(connect())
    proxy.lose("reply", 0)
    assert durable.run("a", lambda step: step("a", str)) == ""
    assert proxy.has_lost
    assert durable.store.load("a").metadata["attempts"] == 1


def test_an_outage_at_the_release_does_not_hide_what_the_body_has_raised(
    connect: Callable[..., SnapshotStore], proxy: Proxy
) -> None:
    """``store.lock`` gives its lease back if it can."""
    store = connect(retry_for=0)

    def body() -> None:
        proxy.cut()
        raise LookupError

    with pytest.raises(LookupError), store.lock("a"):
        body()


def test_cancelled_while_it_runs_it_is_cancelled(durable: Durable) -> None:
    """The next write is refused, and the caller is told why."""

    @durable.workflow
    def work(step: Step) -> None:
        step("a", lambda: durable.cancel("a"))
        step("b", str)

    with pytest.raises(WorkflowCancelled):
        durable.run("a", work)


@pytest.mark.parametrize("what", ["signal", "cancel"])
def test_a_transaction_that_writes_to_its_own_run_waits_for_no_lock_of_its_own(
    make_store: Callable[..., SnapshotStore], url: str, what: str
) -> None:
    """Its first try has failed, so that the snapshot is to be rewritten before it is appended."""
    limited = make_conninfo(url, options=f"{conninfo_to_dict(url)['options']} -c lock_timeout=3s")
    durable = Durable(postgres(limited, retry_for=0))
    tries: list[str] = []

    def body(conn: DB, id: str) -> bool:
        tries.append(what)
        if len(tries) == 1:
            raise ConnectionError("away")
        if what == "signal":
            return durable.signal(id, "later", True, conn=conn)
        return durable.cancel(id, conn=conn)

    @durable.workflow
    def work(step: Step) -> bool:
        return bool(step.transaction("once", body, step.workflow_id))

    with durable.store:
        durable.submit("a", work)
        assert durable.try_resume("a").status == "failed"
        outcome = durable.try_resume("a")
        assert not isinstance(outcome.error, StoreUnavailable)
        assert (outcome.status, outcome.result) == (
            ("completed", True) if what == "signal" else ("skipped", None)
        )


def test_a_cancel_that_waited_for_a_start_revokes_its_lease(
    durable: Durable, db: DB, url: str
) -> None:
    """The lease is newer than what the statement that marks the run can see."""

    @durable.workflow
    def job(step: Step) -> None: ...

    durable.submit("a", job)
    with psycopg.connect(url) as start, ThreadPoolExecutor(1) as threads:
        start.execute("UPDATE awaitly_snapshots SET updated_at = now()")
        cancelled = threads.submit(durable.cancel, "a")
        waiting = "SELECT 1 FROM pg_stat_activity WHERE %s = ANY(pg_blocking_pids(pid))"
        eventually(lambda: db.execute(waiting, [start.info.backend_pid]).fetchone())
        start.execute("INSERT INTO awaitly_workflow_lock VALUES ('a', 'h:1:x', 'infinity')")
        start.commit()
        assert cancelled.result(60) is True
    assert durable.get("a").state == "cancelled"
    assert db.execute("SELECT FROM awaitly_workflow_lock").fetchall() == []


def test_a_submit_whose_run_is_gone_before_its_retry_stores_it_once(
    connect: Callable[..., SnapshotStore], proxy: Proxy, durable: Durable, db: DB
) -> None:
    """The run has completed and was deleted in between; its outcome is looked up, not repeated."""
    client = Durable(connect(), on_complete="delete")

    @client.workflow
    def job(step: Step) -> None: ...

    db.execute(
        "CREATE FUNCTION forget() RETURNS trigger LANGUAGE plpgsql AS "
        "$$BEGIN DELETE FROM awaitly_snapshots; RETURN NULL; END$$"
    )
    durable.store.create_tables()
    db.execute(
        "CREATE CONSTRAINT TRIGGER forget AFTER INSERT ON awaitly_snapshots "
        "DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION forget()"
    )
    proxy.lose("reply", 3)  # to the COMMIT
    assert client.submit("a", job) is True
    assert proxy.has_lost
    assert not durable.has_state("a")


def test_a_second_signal_is_told_so_although_its_first_try_was_lost(
    connect: Callable[..., SnapshotStore], proxy: Proxy
) -> None:
    """A webhook is delivered twice; the request of the second is lost, and it is sent again."""
    durable = Durable(connect())

    @durable.workflow
    def job(step: Step) -> str:
        return step.wait("go")

    durable.submit("a", job)
    assert durable.signal("a", "go", 1) is True
    proxy.lose("request", 1)
    assert durable.signal("a", "go", 1) is False
    assert proxy.has_lost


def test_a_run_that_is_deleted_before_it_is_resumed_is_not_begun_anew(
    durable: Durable, db: DB, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may have completed and been deleted by another process since it was looked up."""
    ran: list[str] = []

    @durable.workflow
    def job(step: Step) -> None:
        step("work", ran.append, "work")

    durable.submit("a", job)
    acquire = lease.acquire

    def late(*args: Any) -> Any:
        db.execute("DELETE FROM awaitly_snapshots")
        return acquire(*args)

    monkeypatch.setattr(lease, "acquire", late)
    with pytest.raises(WorkflowNotFound):
        durable.resume("a")
    assert ran == []
    assert db.execute("SELECT FROM awaitly_workflow_lock").fetchall() == []


def test_a_cancel_on_a_connection_that_autocommits_is_one_transaction(
    durable: Durable, db: DB, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It holds the lease row from its first statement to its commit, so no write comes between."""

    @durable.workflow
    def job(step: Step) -> None: ...

    durable.submit("a", job)
    db.execute("INSERT INTO awaitly_workflow_lock VALUES ('a', 'h:1:x', 'infinity')")
    fetch = steering.fetch
    free: list[Any] = []

    def look_before(conn: DB, statement: bytes, params: Any) -> Any:
        if statement == durable.store._sql.cancel:
            free.extend(db.execute("SELECT FROM awaitly_workflow_lock FOR UPDATE SKIP LOCKED"))
        return fetch(conn, statement, params)

    monkeypatch.setattr(steering, "fetch", look_before)
    with psycopg.connect(url, autocommit=True) as conn:
        assert durable.cancel("a", conn=conn) is True
    assert free == []
    assert durable.get("a").state == "cancelled"
