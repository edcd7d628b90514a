"""Group commit: steps of several threads in one commit, whatever becomes of it or of its leader."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import psycopg
import pytest

from awaitly_postgres import (
    Durable,
    LeaseLost,
    SnapshotStore,
    Step,
    StoreUnavailable,
    WorkflowError,
)
from awaitly_postgres.durable.group import MOST
from tests.support import (
    Loss,
    Proxy,
    SlowBackend,
    TimeLimit,
    eventually,
    photograph,
)

DB = psycopg.Connection
SIZES = pytest.mark.parametrize("size", [0, 5_000], ids=["rewritten", "appended"])


def filler(size: int) -> str:
    return "." * size


class Race:
    """Steps of a run in threads, which end while a gate keeps the first commit from landing.

    The gate is the row of the run's lease, locked from outside.
    """

    def __init__(self, url: str, db: DB, durable: Durable, size: int, threads: int = 6) -> None:
        self.url, self.db, self.durable = url, db, durable
        self.size, self.threads = size, threads
        self.run: Any = None
        self.acknowledged: list[str] = []

    @contextmanager
    def closed(self) -> Iterator[None]:
        with psycopg.connect(self.url) as gate:
            gate.execute("SELECT FROM awaitly_workflow_lock FOR UPDATE")
            yield

    def step(self, step: Step, key: str) -> str:
        value = step(key, filler, self.size)
        self.acknowledged.append(key)
        return value

    def until_waiting(self, count: int) -> None:
        """Return when one waits in the server, and so many in all for their commit."""
        eventually(lambda: len(self.run.recorder._group._waiting) >= count, f"{count} wait")
        eventually(lambda: len(waiting(self.db)) == 1, "one waits in the server")

    def work(self, step: Step, during: Callable[[list[Future[str]]], None]) -> None:
        """Do one step, then one in each thread, and ``during`` while all of them wait."""
        self.run = step._run
        self.step(step, "first")
        with ThreadPoolExecutor(self.threads) as pool:
            with self.closed():
                futures = [pool.submit(self.step, step, f"{nr}") for nr in range(self.threads)]
                self.until_waiting(self.threads)
                during(futures)
            for future in futures:
                future.exception(30)
        for future in futures:
            future.result()


def waiting(db: DB) -> list[int]:
    """The backends of this test that wait for the row of the lease."""
    found = db.execute(
        "SELECT pid FROM pg_stat_activity WHERE wait_event_type = 'Lock' "
        "AND query LIKE '%awaitly_workflow_lock%' AND pid <> pg_backend_pid()"
    )
    return [pid for (pid,) in found.fetchall()]


def keys(durable: Durable, id: str = "a") -> set[str]:
    return set(durable.store.load(id).steps)


def writes(db: DB) -> int:
    """How many transactions have written steps: each rewrite is numbered in the lease's token."""
    (count,) = db.execute(
        "SELECT (SELECT count(DISTINCT xmin::text)::int FROM awaitly_snapshots_steps) "
        "+ COALESCE(NULLIF(split_part(owner_token, '#', 2), ''), '0')::int "
        "FROM awaitly_workflow_lock"
    ).fetchone()
    return int(count)


@SIZES
def test_steps_that_end_while_a_commit_is_under_way_are_committed_together(
    make_store: Callable[..., SnapshotStore], db: DB, url: str, size: int
) -> None:
    """One statement for the leader's, one for all others: and they wait without a connection."""
    durable = Durable(make_store(max_size=1))
    race = Race(url, db, durable, size, threads=12)
    before: list[int] = []

    def during(futures: list[Future[str]]) -> None:
        assert race.acknowledged == ["first"]
        before.append(writes(db))

    def work(step: Step) -> str:
        race.work(step, during)
        before.append(writes(db))
        return "done"

    assert durable.run("a", work) == "done"
    assert before[1] - before[0] <= 2
    assert keys(durable) == {"first", *map(str, range(12))}


@SIZES
@pytest.mark.parametrize("what", ["request", "reply"])
def test_a_group_survives_the_loss_of_any_request_or_reply(
    connect: Callable[..., SnapshotStore],
    proxy: Proxy,
    store: SnapshotStore,
    db: DB,
    what: Loss,
    size: int,
) -> None:
    """The leader sends the same again; each step is there once, and the run goes on."""
    durable = Durable(connect(max_size=2))
    nr, lost = 0, True

    def work(step: Step) -> str:
        step("first", filler, size)
        values = step.map("m", lambda item: filler(size), range(24), workers=8)
        assert values == [filler(size)] * 24
        return "done"

    while lost:
        proxy.lose(what, nr)
        assert durable.run(f"{nr}", work) == "done"
        lost = proxy.has_lost
        steps = store.load(f"{nr}").to_json()["steps"]
        assert sorted(step["meta"]["seq"] for step in steps.values()) == [*range(1, 26)]
        nr += 1
    assert nr > 6
    photo = photograph(db)
    assert photo["awaitly_workflow_lock"] == photo["awaitly_snapshots_steps"] == []


@SIZES
@pytest.mark.parametrize("more", [0, 3])
def test_a_group_that_arrives_late_changes_nothing(
    slow_backend: SlowBackend, db: DB, size: int, more: int
) -> None:
    """Its backend was stopped; the retry has landed, and the run has gone on or ended, by then."""
    durable = Durable(slow_backend.store)
    together = threading.Barrier(6, slow_backend.stop)

    def act(nr: int) -> str:
        together.wait(30)
        return filler(size)

    def work(step: Step) -> str:
        step("first", filler, size)
        step("second", filler, size)  # the statement is prepared
        step.map("m", act, range(6), workers=6)
        for nr in range(more):
            step(f"{nr}", filler, 3 * size)
        return "done"

    assert durable.run("a", work) == "done"
    before = photograph(db)
    slow_backend.wake()
    assert len(slow_backend.stopped) == 1
    assert photograph(db) == before
    assert len(keys(durable)) == 8 + more


@SIZES
def test_an_outage_tells_every_thread_of_the_group(
    connect: Callable[..., SnapshotStore],
    proxy: Proxy,
    store: SnapshotStore,
    db: DB,
    url: str,
    size: int,
) -> None:
    """None of them hangs, none is acknowledged, and the run stops with the outage."""
    durable = Durable(connect())
    race = Race(url, db, durable, size)
    futures: list[Future[str]] = []

    def during(waiting: list[Future[str]]) -> None:
        futures.extend(waiting)
        durable.store._db.retry_for = 0.1  # what follows is tried for so long
        proxy.cut()

    def work(step: Step) -> None:
        if not futures:
            race.work(step, during)
        step("first", filler, size)
        with ThreadPoolExecutor() as pool:
            list(pool.map(lambda nr: step(f"{nr}", filler, size), range(race.threads)))

    with pytest.raises(StoreUnavailable):
        durable.run("a", work)
    assert race.acknowledged == ["first"]
    assert {type(future.exception()).__name__ for future in futures} == {"Interrupted"}
    db.execute("UPDATE awaitly_workflow_lock SET expires_at = now()")

    Durable(store).run("a", work)
    assert keys(Durable(store)) == {"first", *map(str, range(race.threads))}


@SIZES
def test_a_lost_lease_tells_every_thread_of_the_group(
    make_store: Callable[..., SnapshotStore], db: DB, url: str, size: int
) -> None:
    """Nothing of what they have done is recorded."""
    durable = Durable(make_store())
    race = Race(url, db, durable, size)

    @contextmanager
    def taken() -> Iterator[None]:
        with psycopg.connect(url) as gate:
            gate.execute("UPDATE awaitly_workflow_lock SET owner_token = 'somebody'")
            yield

    race.closed = taken  # type: ignore[method-assign]
    with pytest.raises(LeaseLost):
        durable.run("a", lambda step: race.work(step, lambda futures: None))
    assert race.acknowledged == ["first"]
    assert keys(durable) == {"first"}


@contextmanager
def raising(error: type[BaseException]) -> Iterator[None]:
    """Have SIGALRM raise ``error`` in the main thread."""

    def handle(number: int, frame: Any) -> None:
        raise error

    before = signal.signal(signal.SIGALRM, handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGALRM, before)


@SIZES
@pytest.mark.parametrize("error", [KeyboardInterrupt, TimeLimit])
@pytest.mark.parametrize("role", ["leader", "follower"])
def test_an_interrupt_of_one_thread_strands_no_other(
    make_store: Callable[..., SnapshotStore],
    db: DB,
    url: str,
    role: str,
    error: type[BaseException],
    size: int,
) -> None:
    """Of the leader: another writes the same again. Of a follower: it leaves at once."""
    durable = Durable(make_store(max_size=2))
    race = Race(url, db, durable, size)
    own = "own"

    def interrupt(step: Step, gate: DB) -> None:
        race.until_waiting(race.threads + 1)
        os.kill(os.getpid(), signal.SIGALRM)
        eventually(lambda: own not in [w.key for w in race.run.recorder._group._waiting])
        gate.rollback()  # only now does any commit land

    def work(step: Step) -> None:
        race.run = step._run
        race.step(step, "first")
        gate = psycopg.connect(url)
        with ThreadPoolExecutor(race.threads + 1) as pool, gate:
            gate.execute("SELECT FROM awaitly_workflow_lock FOR UPDATE")

            def others() -> None:
                for nr in range(race.threads):
                    pool.submit(race.step, step, f"{nr}")

            if role == "leader":
                threading.Thread(target=lambda: (race.until_waiting(1), others())).start()
            else:
                others()
                race.until_waiting(race.threads)
            pool.submit(interrupt, step, gate)
            race.step(step, own)

    with raising(error), pytest.raises(error):
        durable.run("a", work)
    expected = {"first", *map(str, range(race.threads))}
    assert set(race.acknowledged) == expected
    assert keys(durable) - {own} == expected
    assert photograph(db)["awaitly_workflow_lock"] == []


def test_a_group_that_is_too_large_is_committed_in_parts(
    make_store: Callable[..., SnapshotStore], db: DB, url: str
) -> None:
    """A message to the server has a limit, and so has a JSONB value."""
    durable = Durable(make_store())
    race = Race(url, db, durable, MOST // 2)
    durable.run("a", lambda step: race.work(step, lambda futures: None))
    assert keys(durable) == {"first", *map(str, range(race.threads))}


@SIZES
def test_steps_in_a_group_whose_run_has_ended_are_told_so(
    make_store: Callable[..., SnapshotStore], db: DB, url: str, size: int
) -> None:
    """Those that the end has found entered are recorded; those behind them are refused."""
    durable = Durable(make_store(max_size=3))
    race = Race(url, db, durable, size)
    futures: list[Future[str]] = []

    def work(step: Step) -> None:
        race.run = step._run
        race.step(step, "first")
        with race.closed():
            futures.extend(pool.submit(race.step, step, f"{nr}") for nr in range(race.threads))
            race.until_waiting(race.threads)
        raise LookupError

    with ThreadPoolExecutor(race.threads) as pool:
        with pytest.raises(LookupError):
            durable.run("a", work)
        errors = [future.exception(30) for future in futures]
    assert {type(error) for error in errors if error} <= {WorkflowError}
    assert keys(durable) == set(race.acknowledged)


@pytest.mark.read_committed
def test_transactions_and_groups_stay_in_turn(
    make_store: Callable[..., SnapshotStore], db: DB
) -> None:
    """Threads that do both, over a pool that is smaller than they are many.

    At SERIALIZABLE so many transactions of one table may fail, as the user's own would.
    """
    db.execute("CREATE TABLE paid (key text)")
    durable = Durable(make_store(max_size=4))

    def pay(conn: DB, key: str) -> None:
        conn.execute("INSERT INTO paid VALUES (%s)", (key,))

    def act(step: Step, nr: int) -> None:
        for part in range(4):
            step(f"{nr}-{part}", filler, 500)
        step.transaction(f"{nr}-pay", pay, f"{nr}-pay")

    def work(step: Step) -> None:
        with ThreadPoolExecutor(32) as pool:
            list(pool.map(lambda nr: act(step, nr), range(32)))

    durable.run("a", work)
    steps = durable.store.load("a").to_json()["steps"]
    assert len(steps) == 32 * 5
    assert sorted(step["meta"]["seq"] for step in steps.values()) == [*range(1, 161)]
    assert db.execute("SELECT count(*), count(DISTINCT key) FROM paid").fetchone() == (32, 32)
