"""step.transaction: what commits with the record of the step, and what is refused or looked up."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager

import psycopg
import pytest

from awaitly_postgres import Durable, LeaseLost, SnapshotStore, Step, WorkflowError, postgres
from tests.support import eventually, in_threads, run_in_the_parent

DB = psycopg.Connection


def pay(conn: DB, id: str = "a") -> str:
    conn.execute("INSERT INTO payments VALUES (%s)", [id])
    return "paid"


@pytest.fixture
def payments(db: DB) -> DB:
    db.execute("CREATE TABLE payments (id text)")
    return db


def paid(db: DB) -> int:
    return db.execute("SELECT count(*)::int FROM payments").fetchone()[0]


def test_an_error_after_the_commit_does_not_undo_the_record(
    store: SnapshotStore, payments: DB, url: str
) -> None:
    """The server's error need not be about the COMMIT, so its outcome is looked up."""

    @contextmanager
    def unit_of_work() -> Iterator[DB]:
        with kept.transaction():
            yield kept
        kept.execute("SELECT 1 / 0")  # a hook that runs after the commit, and fails

    def order(step: Step) -> str:
        return step.transaction("pay", pay)

    durable = Durable(store, transaction=unit_of_work)
    with psycopg.connect(url, autocommit=True) as kept:
        with pytest.raises(psycopg.errors.DivisionByZero):
            durable.run("a", order)
        assert durable.run("a", order) == "paid"
    assert paid(payments) == 1


@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize("statement", ["ROLLBACK", "COMMIT"])
def test_a_body_that_ends_the_transaction_in_sql_has_failed(
    store: SnapshotStore, payments: DB, url: str, statement: str, own: bool
) -> None:
    """There is nothing left that the record could commit with."""
    durable = Durable(store, transaction=None if own else lambda: psycopg.connect(url))

    def end(conn: DB) -> str:
        pay(conn)
        conn.execute(statement)
        return "paid"

    with pytest.raises(RuntimeError, match="'pay' is in no transaction"):
        durable.run("a", lambda step: step.transaction("pay", end))
    assert [step.state for step in durable.get("a").steps] == ["failed"]


def test_a_transaction_option_must_begin_one(store: SnapshotStore, payments: DB, url: str) -> None:
    """On a connection that autocommits, a body that fails would leave half of what it wrote."""
    durable = Durable(store, transaction=lambda: psycopg.connect(url, autocommit=True))
    with pytest.raises(RuntimeError, match="must yield a connection"):
        durable.run("a", lambda step: step.transaction("pay", pay))
    assert paid(payments) == 0


def test_a_transaction_and_a_thread_that_wait_for_each_other_end(
    store: SnapshotStore, db: DB
) -> None:
    """The body has locked the run's row, and the thread that waits for it keeps the body from
    being recorded; no server sees that."""
    durable = Durable(store, lock_ttl=6)
    locked = threading.Event()

    def order(step: Step) -> None:
        def notify(conn: DB) -> None:
            durable.signal("a", "paid", 1, conn=conn)
            locked.set()
            blocker = [conn.info.backend_pid]
            eventually(lambda: db.execute(waiting, blocker).fetchone(), "the thread's write")

        def beside() -> None:
            assert locked.wait(60)
            step("beside", str)

        thread = threading.Thread(target=beside)
        thread.start()
        try:
            step.transaction("notify", notify)
        finally:
            thread.join()

    waiting = "SELECT 1 FROM pg_stat_activity WHERE %s = ANY(pg_blocking_pids(pid))"
    with pytest.raises(WorkflowError, match="'notify' of 'a' cannot be recorded: other threads"):
        durable.run("a", order)
    assert "paid" not in str(db.execute("SELECT snapshot FROM awaitly_snapshots").fetchone())


@pytest.mark.parametrize("level", ["REPEATABLE READ", "SERIALIZABLE"])
def test_runs_that_share_nothing_do_not_conflict(url: str, level: str) -> None:
    """Not even by what this package reads in their transactions."""
    options = f"{psycopg.conninfo.conninfo_to_dict(url)['options']} "
    options += f"-c default_transaction_isolation={level.lower()}".replace(" r", r"\ r")
    with postgres(url, kwargs={"options": options}) as store:
        durable = Durable(store)

        @durable.workflow
        def order(step: Step) -> str:
            step("long", "x".__mul__, 3_000)
            return step.transaction("pay", lambda conn: str(conn.execute("SELECT 1").fetchone()))

        durable.submit_many(order, {f"{nr}": () for nr in range(40)})
        outcomes = durable.resume_pending(workers=8)
    assert [outcome.error for outcome in outcomes] == [None] * 40


def test_a_child_forked_in_a_transaction_of_ones_own_ends_nothing(
    store: SnapshotStore, payments: DB, url: str
) -> None:
    """Its way out would roll back on the connection that it shares with its parent."""

    @contextmanager
    def own() -> Iterator[DB]:
        with kept.transaction():
            yield kept

    def pay_and_fork(conn: DB) -> str:
        pay(conn)
        if (pid := os.fork()) == 0:
            sys.exit(0)
        os.waitpid(pid, 0)
        return "paid"

    kept = psycopg.connect(url, autocommit=True)
    durable = Durable(store, transaction=own)
    with kept:
        run_in_the_parent(durable, "a", lambda step: step.transaction("pay", pay_and_fork))
    assert paid(payments) == 1


def test_an_error_on_a_connection_that_its_opener_closes_is_the_steps_own_failure(
    store: SnapshotStore, payments: DB, url: str
) -> None:
    """It is closed after the rollback, or after the COMMIT that was refused; that is no outage."""

    @contextmanager
    def own() -> Iterator[DB]:
        with closing(psycopg.connect(url)) as conn, conn.transaction():
            yield conn

    durable = Durable(store, transaction=own)
    payments.execute("ALTER TABLE payments ADD UNIQUE (id) DEFERRABLE INITIALLY DEFERRED")

    def order(step: Step) -> str:
        try:
            step.transaction("divide", lambda conn: conn.execute("SELECT 1 / 0").fetchone())
        except psycopg.errors.DivisionByZero:
            step.transaction("pay", pay)
        try:
            return step.transaction("pay again", pay)
        except psycopg.errors.UniqueViolation:
            return step("instead", str)

    assert durable.run("a", order) == ""
    assert [step.state for step in durable.get("a").steps] == [
        *("failed", "completed", "failed", "completed")
    ]
    assert paid(payments) == 1


def test_threads_on_a_lost_history_are_all_refused(url: str, db: DB) -> None:
    """Also those whose first transactions find out together that they are isolated."""
    options = f"{psycopg.conninfo.conninfo_to_dict(url)['options']} "
    options += r"-c default_transaction_isolation=repeatable\ read"
    together = threading.Barrier(2)

    def order(step: Step) -> None:
        def act(nr: int) -> None:
            together.wait(60)
            step.transaction(f"pay-{nr}", pay, f"{nr}")

        step("long", "x".__mul__, 3_000)
        step("appended", str)
        db.execute("DELETE FROM awaitly_snapshots_steps")
        in_threads(act, 2)

    db.execute("CREATE TABLE payments (id text)")
    with postgres(url, kwargs={"options": options}) as store, pytest.raises(LeaseLost):
        Durable(store).run("a", order)
    assert paid(db) == 0
