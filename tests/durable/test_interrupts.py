"""Interrupts: Ctrl-C, exit, and exceptions that a signal handler raises at any moment."""

from __future__ import annotations

import gc
import os
import random
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from traceback import clear_frames, walk_tb
from types import TracebackType
from typing import Any

import psycopg
import pytest

from awaitly_postgres import (
    Durable,
    SnapshotStore,
    Step,
    StoreUnavailable,
    Workflow,
    WorkflowError,
)
from tests.support import TimeLimit, in_threads

DB = psycopg.Connection


@contextmanager
def raising(error: Callable[[], BaseException]) -> Iterator[None]:
    """Have SIGALRM raise ``error`` in the main thread."""

    def handle(number: int, frame: Any) -> None:
        raise error()

    before = signal.signal(signal.SIGALRM, handle)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def make_payments(db: DB, *, slow_commit: bool = False) -> None:
    """Make a table of payments; a slow one waits at COMMIT until nobody holds the gate."""
    db.execute("CREATE TABLE payments (id text)")
    if slow_commit:
        db.execute("CREATE TABLE gate ()")
        db.execute(
            "CREATE FUNCTION wait() RETURNS trigger LANGUAGE plpgsql AS "
            "$$BEGIN LOCK TABLE gate IN SHARE MODE; RETURN NULL; END$$"
        )
        db.execute(
            "CREATE CONSTRAINT TRIGGER wait AFTER INSERT ON payments "
            "DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION wait()"
        )


@contextmanager
def interrupted_in_commit(
    db: DB, url: str, error: type[BaseException], first: Callable[[], object] = lambda: None
) -> Iterator[None]:
    """Raise ``error`` in this thread while a slow COMMIT waits; then open the gate."""

    def interrupt_then_open(gate: DB) -> None:
        waiting = "SELECT count(*) FROM pg_locks WHERE relation = 'gate'::regclass AND NOT granted"
        while not db.execute(waiting).fetchone()[0]:
            pass
        first()
        os.kill(os.getpid(), signal.SIGALRM)
        db.execute("SELECT pg_sleep(0.1)")
        gate.rollback()

    with psycopg.connect(url) as gate, raising(error):
        gate.execute("LOCK TABLE gate")
        thread = threading.Thread(target=interrupt_then_open, args=(gate,))
        thread.start()
        yield
        thread.join()


def payments(db: DB) -> list[str]:
    return [id for (id,) in db.execute("SELECT id FROM payments ORDER BY 1").fetchall()]


def leases(db: DB) -> list[str]:
    return [id for (id,) in db.execute("SELECT workflow_id FROM awaitly_workflow_lock").fetchall()]


def pay(conn: DB, id: str) -> str:
    conn.execute("INSERT INTO payments VALUES (%s)", (id,))
    return f"paid {id}"


def filler(size: int) -> str:
    return "." * size


@pytest.mark.parametrize("size", [0, 5_000], ids=["rewritten", "appended"])
@pytest.mark.parametrize("handled", [False, True], ids=["goes through", "is caught"])
@pytest.mark.parametrize("error", [TimeLimit, KeyboardInterrupt])
def test_an_interrupt_during_the_commit_pays_once(
    make_store: Callable[..., SnapshotStore],
    db: DB,
    url: str,
    error: type[BaseException],
    handled: bool,
    size: int,
) -> None:
    """The COMMIT is under way in the server when the handler raises; a resume repeats nothing."""
    make_payments(db, slow_commit=True)
    durable = Durable(make_store(max_size=1))

    @durable.workflow
    def order(step: Step) -> list[str]:
        step("before", filler, size)
        try:
            paid = step.transaction("pay", pay, "a")
        except TimeLimit:
            if not handled:
                raise
            paid = "caught"
        return [paid, step("after", str)]

    with interrupted_in_commit(db, url, error), suppress(error):
        durable.run("a", order)
    assert leases(db) == []
    paid, _ = durable.resume("a")
    assert payments(db) == (["a"] if paid == "paid a" else [])
    # Where the commit could still be stopped it is the step's failure, to be handled or not.
    assert paid == "paid a" or (handled and error is TimeLimit)


def test_threads_record_nothing_while_a_commit_is_in_doubt(
    make_store: Callable[..., SnapshotStore], db: DB, url: str
) -> None:
    """Ctrl-C strikes in COMMIT; a joined thread's record does not erase the payment's."""
    make_payments(db, slow_commit=True)
    durable = Durable(make_store(max_size=4))
    committing = threading.Event()

    @durable.workflow
    def order(step: Step) -> str:
        def beside() -> None:
            committing.wait(30)
            step("beside", str)

        with ThreadPoolExecutor(1) as pool:
            pool.submit(beside)
            return step.transaction("pay", pay, "a")

    with interrupted_in_commit(db, url, TimeLimit, committing.set), pytest.raises(TimeLimit):
        durable.run("a", order)
    committing.set()
    assert set(durable.store.load("a").steps) == {"beside", "pay"}
    assert durable.resume("a") == "paid a"
    assert payments(db) == ["a"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("where", ["in a step", "between steps"])
def test_steps_in_finally_are_refused_while_the_process_is_told_to_end(
    durable: Durable, db: DB, error: type[BaseException], where: str
) -> None:
    """They would be recorded out of turn, and the run could never be resumed."""
    broken = [True]

    def act() -> str:
        if broken:
            raise error
        return "done"

    @durable.workflow
    def work(step: Step) -> list[str]:
        done = [step("a", str)]
        try:
            done.append(step("b", act) if where == "in a step" else act())
        finally:
            step("cleanup", str)
        return done

    with pytest.raises(error):
        durable.run("a", work)
    assert set(durable.store.load("a").steps) == {"a"}
    assert leases(db) == []
    broken.clear()
    assert durable.resume("a") == ["", "done"]


def test_a_step_that_an_interrupt_kept_from_being_recorded_is_followed_by_none(
    durable: Durable,
) -> None:
    """Neither result nor failure is recorded; going on would strand what came after."""
    held: list[Step] = []

    def work(step: Step) -> str:
        held.append(step)
        run = step._run
        record, run.recorder = run.recorder, Interrupting(run.recorder)
        with suppress(TimeLimit):
            step("a", str)
        run.recorder = record
        return step("b", str)

    with pytest.raises(TimeLimit):
        durable.run("a", work)
    assert dict(durable.store.load("a").steps) == {}


class Interrupting:
    """A recorder at whose door the handler raises."""

    def __init__(self, recorder: Any) -> None:
        self._recorder = recorder

    def refuse_to_begin(self) -> None:
        pass

    def record(self, key: str, enter: Any) -> None:
        raise TimeLimit


# What is raised inside a finalizer, Python itself swallows.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("threads", [0, 3])
@pytest.mark.parametrize("kind", [TimeLimit, KeyboardInterrupt])
def test_runs_interrupted_at_random_lose_and_repeat_nothing(
    make_store: Callable[..., SnapshotStore], db: DB, threads: int, kind: type[BaseException]
) -> None:
    """No payment twice, none lost, no lease left behind, no connection lost to the pool."""
    make_payments(db)
    # Enough connections for nobody to wait in the pool, whose conditions are Python's own as well.
    store = make_store(min_size=6, max_size=6)
    durable = Durable(store)
    acknowledged: Counter[str] = Counter()
    chance = random.Random(f"{threads}{kind.__name__}")  # noqa: S311

    @durable.workflow
    def order(step: Step, id: str) -> list[str]:
        done = [step("reserve", str)]
        done.append(step.transaction("pay", pay, f"{id}-pay"))
        acknowledged[f"{id}-pay"] += 1
        in_threads(lambda nr: step(f"item-{nr}", str, nr), threads)
        if threads:
            done += step.map("map", filler, range(8), workers=threads)
        done.append(step("fill", filler, 3000))
        done.append(step.transaction("tip", pay, f"{id}-tip"))
        return done

    taken = []
    for id in ("first", "second", "third"):
        began = time.monotonic()
        durable.run(id, order, id)
        taken.append(time.monotonic() - began)
    runs, stopped = int(os.environ.get("AWAITLY_INTERRUPTED_RUNS", "75")), 0
    for nr in range(runs):
        id = f"run-{nr}"
        with raising(kind):
            try:
                signal.setitimer(signal.ITIMER_REAL, chance.uniform(0.0001, min(taken)))
                durable.run(id, order, id)
                signal.setitimer(signal.ITIMER_REAL, 0)
            except kind:
                stopped += 1
            # Out of a thread that the interrupt had left alone; or of the standard library, whose
            # own locks an interrupt may confuse.
            except (WorkflowError, RuntimeError):
                stopped += 1
    assert stopped > runs / 10
    # Whatever may still be under way was cancelled; nobody is left at work.
    assert leases(db) == []
    for info in list(store.iter()):
        durable.resume(info.id)
    ids = [info.id for info in store.iter()]
    assert payments(db) == sorted(f"{id}-{what}" for id in ids for what in ("pay", "tip"))
    assert {info.status for info in store.iter()} == {"completed"}
    gc.collect()
    take_all(store, 6)


@pytest.fixture
def cleared(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the frames that are cleared lose the copy of their variables that a tracer is given.

    Up to Python 3.10 it keeps what it refers to; asked for again, it is made anew.
    """

    def clear(traceback: TracebackType | None) -> None:
        clear_frames(traceback)
        for frame, _ in walk_tb(traceback):
            _ = frame.f_locals

    monkeypatch.setattr("awaitly_postgres.store.loan.clear_frames", clear)


def at_each_call(act: Callable[[int], object], every: int) -> Iterator[int]:
    """Raise KeyboardInterrupt in ``act(nr)``, at the entry of the function called as the ``nr``-th.

    There Python looks for signals. Only functions of ours, of the driver and its pool count, and
    the blocks of contextlib. What came of it is for the caller to check, each time.
    """
    places, called, nr = {"awaitly_postgres", "psycopg", "psycopg_pool", "contextlib.py"}, 0, 1

    def trace(frame: Any, event: str, arg: Any) -> None:
        nonlocal called
        if not places.isdisjoint(Path(frame.f_code.co_filename).parts):
            called += 1
            if called == nr:
                sys.settrace(None)
                raise KeyboardInterrupt

    before = sys.gettrace()
    while True:
        gc.collect()  # what the traceback of an earlier interrupt holds
        called = 0
        sys.settrace(trace)
        try:
            act(nr)
        except KeyboardInterrupt:
            pass
        finally:
            sys.settrace(before)
        if called < nr:
            return
        yield nr
        nr += every


def take_all(store: SnapshotStore, size: int) -> None:
    """Have all connections of the pool at work at once; none was lost to it."""
    both = threading.Barrier(size)
    with ThreadPoolExecutor(size) as pool:
        list(pool.map(lambda _: store._db.run(lambda conn: both.wait(30)), range(size)))


@pytest.mark.usefixtures("cleared")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_lock_interrupted_anywhere_is_given_back(
    make_store: Callable[..., SnapshotStore], db: DB
) -> None:
    """At the entry of every eleventh function on its way; the connection is back in the pool."""
    store = make_store(max_size=1)
    store.try_acquire("warm").release()

    def lock(nr: int) -> None:
        with store.lock(f"id-{nr}"):
            pass

    for _ in at_each_call(lock, every=11):
        assert leases(db) == []
        take_all(store, 1)


@pytest.mark.usefixtures("cleared")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_run_interrupted_anywhere_pays_once(
    make_store: Callable[..., SnapshotStore], db: DB
) -> None:
    """At the entry of every nineteenth function on its way, with one connection for everything."""
    make_payments(db)
    store = make_store(max_size=1)
    durable = Durable(store)

    @durable.workflow
    def order(step: Step, id: str) -> str:
        step("reserve", str)
        return step.transaction("pay", pay, id)

    durable.run("warm", order, "warm")
    for nr in at_each_call(lambda nr: durable.run(f"id-{nr}", order, f"id-{nr}"), every=19):
        assert leases(db) == []
        take_all(store, 1)
        if store.load(f"id-{nr}") is not None:
            durable.resume(f"id-{nr}")
    assert payments(db) == sorted(info.id for info in store.iter())


@pytest.mark.usefixtures("cleared")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("function", ["putconn", "_reset_connection", "_add_to_pool"])
def test_a_connection_struck_on_its_way_back_serves_the_release(
    make_store: Callable[..., SnapshotStore], db: DB, function: str
) -> None:
    """It is the only one, and the traceback of the interrupt must not hold it meanwhile."""
    make_payments(db)
    durable = Durable(make_store(max_size=1))

    @durable.workflow
    def order(step: Step, id: str) -> str:
        return step.transaction("pay", pay_and_be_struck, id)

    def pay_and_be_struck(conn: DB, id: str) -> str:
        sys.settrace(strike)
        return pay(conn, id)

    def strike(frame: Any, event: str, arg: Any) -> None:
        if frame.f_code.co_name == function:
            sys.settrace(None)
            raise KeyboardInterrupt

    before = sys.gettrace()
    try:
        with pytest.raises(KeyboardInterrupt):
            durable.run("a", order, "a")
    finally:
        sys.settrace(before)
    assert leases(db) == []
    assert durable.resume("a") == "paid a"
    assert payments(db) == ["a"]


def test_a_transaction_that_an_interrupt_left_open_is_not_waited_for(
    make_store: Callable[..., SnapshotStore], db: DB, url: str
) -> None:
    """It strikes at the door of a block of the user's, whose connection then holds our row."""
    make_payments(db)
    struck: list[DB] = []

    class Transaction:
        def __enter__(self) -> DB:
            self.conn = psycopg.connect(url)
            return self.conn

        def __exit__(self, kind: Any, *args: object) -> None:
            if not struck:
                struck.append(self.conn)
                raise TimeLimit
            with self.conn:
                pass

    durable = Durable(make_store(), transaction=Transaction)

    @durable.workflow
    def order(step: Step) -> str:
        return step.transaction("pay", pay, "a")

    with pytest.raises(TimeLimit):
        durable.run("a", order)
    assert struck[0].closed
    assert durable.resume("a") == "paid a"
    assert payments(db) == ["a"]


def test_an_interrupted_wait_for_a_lock_gives_the_lease_back(durable: Durable, db: DB) -> None:
    """The body of ``store.lock`` is left by Ctrl-C."""
    with pytest.raises(KeyboardInterrupt), durable.store.lock("a"):
        raise KeyboardInterrupt
    assert leases(db) == []


def test_a_step_inside_a_step_is_refused_at_once(durable: Durable) -> None:
    """It would be recorded before the one that it is a part of, and never be asked for again."""

    def work(step: Step) -> str:
        return step("outer", lambda: step("inner", str))

    for run in (lambda: durable.run("a", work), Workflow(work)):
        with pytest.raises(WorkflowError, match=r"'inner' of .* was called inside step 'outer'"):
            run()
    assert dict(durable.store.load("a").steps) == {}


def test_a_step_that_rolls_its_transaction_back_is_a_failure(durable: Durable, db: DB) -> None:
    """``psycopg.Rollback`` is swallowed by psycopg's own block, and there is nothing to record."""
    make_payments(db)

    def give_up(conn: DB) -> str:
        pay(conn, "a")
        raise psycopg.Rollback

    with pytest.raises(RuntimeError, match="rolled its transaction back"):
        durable.run("a", lambda step: step.transaction("pay", give_up))
    assert payments(db) == []
    assert durable.store.load("a").steps["pay"].error == "RuntimeError"


@pytest.mark.parametrize("size", [0, 5_000], ids=["rewritten", "appended"])
def test_what_commit_refuses_is_the_steps_own_failure(durable: Durable, db: DB, size: int) -> None:
    """A deferred constraint: psycopg's own exception, to be caught and recorded like any."""
    db.execute("CREATE TABLE users (id int PRIMARY KEY)")
    db.execute("CREATE TABLE orders (user_id int REFERENCES users DEFERRABLE INITIALLY DEFERRED)")
    seen: list[str] = []

    def insert(conn: DB) -> None:
        conn.execute("INSERT INTO orders VALUES (5)")

    def work(step: Step, catch: bool) -> str:
        step("fill", filler, size)
        try:
            step.transaction("order", insert)
        except psycopg.IntegrityError as error:
            seen.append(type(error).__name__)
            if not catch:
                raise
        return step("after", lambda: "done")

    with pytest.raises(psycopg.errors.ForeignKeyViolation):
        durable.run("raised", work, False)
    assert durable.store.load("raised").execution.status == "failed"
    assert durable.run("caught", work, True) == "done"
    assert durable.store.load("caught").steps["order"].error == "ForeignKeyViolation"
    assert seen == ["ForeignKeyViolation"] * 2


def test_a_connection_that_is_lost_in_the_body_is_an_outage(durable: Durable, db: DB) -> None:
    """It travels past ``except Exception``, records nothing, and the body runs again."""
    make_payments(db)
    ran: list[int] = []

    def cut(conn: DB) -> str:
        pay(conn, "a")
        ran.append(1)
        if len(ran) == 1:
            db.execute("SELECT pg_terminate_backend(%s)", (conn.info.backend_pid,))
            conn.execute("SELECT 1")
        return "paid"

    def work(step: Step) -> str:
        try:
            return step.transaction("pay", cut)
        except Exception:
            return "swallowed"

    with pytest.raises(StoreUnavailable):
        durable.run("a", work)
    assert dict(durable.store.load("a").steps) == {}
    assert durable.run("a", work) == "paid"
    assert payments(db) == ["a"]
