"""Input that nobody should give, and callbacks that misbehave.

Each is met with a typed error, and what is stored is as it was.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import psycopg
import pytest

from awaitly_postgres import (
    AlreadyRunning,
    AwaitlyError,
    Durable,
    NotSerializable,
    SnapshotStore,
    Step,
    StoreError,
    WorkflowConflict,
    postgres,
)

TYPED = (AwaitlyError, ValueError, TypeError)
MEGABYTE = 1 << 20
TABLES = ("awaitly_snapshots", "awaitly_snapshots_steps", "awaitly_workflow_lock")


def three_steps(step: Step, start: int = 1) -> list[int]:
    first = step("first", lambda: start)
    second = step("second", lambda: first + 1)
    return [first, second, step("third", lambda: second + 1)]


def stored(db: psycopg.Connection) -> list[list[Any]]:
    return [db.execute(f"SELECT t::text FROM {table} t ORDER BY 1").fetchall() for table in TABLES]


def snapshot_of(value: Any) -> dict[str, Any]:
    return {
        "formatVersion": 1,
        "steps": {"a": {"ok": True, "value": value}},
        "execution": {"status": "running", "lastUpdated": "2026-11-22T10:56:04.184Z"},
    }


# -- size ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "call",
    [
        lambda durable, big: durable.run(big, three_steps),
        lambda durable, big: durable.submit(big, durable.workflow(three_steps)),
        lambda durable, big: durable.resume(big),
        lambda durable, big: durable.signal("a", big, 1),
        lambda durable, big: durable.cancel(big),
        lambda durable, big: durable.has_state(big),
        lambda durable, big: durable.delete_states(["a", big]),
        lambda durable, big: durable.resume_pending(prefix=big),
        lambda durable, big: durable.store.save(big, snapshot_of(1)),
        lambda durable, big: durable.store.load(big),
        lambda durable, big: durable.store.list(big),
        lambda durable, big: durable.store.try_acquire(big),
        lambda durable, big: durable.run("b", lambda step: step(big, int)),
    ],
)
def test_an_id_or_key_of_a_megabyte_is_refused_in_few_words(
    durable: Durable, call: Callable[[Durable, str], object]
) -> None:
    """The error says what is wrong without repeating the megabyte, and what is there stays."""
    durable.run("a", three_steps)
    before = durable.store.load("a")
    with pytest.raises(ValueError, match="1,000 is the limit") as refused:
        call(durable, "é" * MEGABYTE)
    assert len(str(refused.value)) < 1000
    assert durable.store.load("a") == before


@pytest.mark.parametrize("size", [1 * MEGABYTE, 64 * MEGABYTE])
def test_a_snapshot_of_many_megabytes_is_stored_and_comes_back_equal(
    store: SnapshotStore, size: int
) -> None:
    """There is no limit of ours below the server's."""
    store.save("big", snapshot_of("x" * size))
    assert store.load("big").steps["a"].value == "x" * size


@pytest.mark.long
def test_a_snapshot_beyond_what_jsonb_holds_is_refused_before_it_is_sent(
    store: SnapshotStore, durable: Durable
) -> None:
    """300 MB: the error names the path, and what was stored under that id stays."""
    store.save("big", snapshot_of("small"))
    with pytest.raises(NotSerializable, match="JSONB holds at most") as refused:
        store.save("big", snapshot_of("x" * 300 * MEGABYTE))
    assert len(str(refused.value)) < 1000
    assert store.load("big").steps["a"].value == "small"
    with pytest.raises(NotSerializable, match="step 'huge'"):
        durable.run("run", lambda step: step("huge", lambda: "x" * 300 * MEGABYTE))


@pytest.mark.long
def test_a_workflow_of_100_000_steps_ends_and_is_replayed(
    store: SnapshotStore, db: psycopg.Connection
) -> None:
    """It fails late, is resumed, and no step of the first run runs again."""
    durable = Durable(store)
    ran = 0

    def count(nr: int) -> int:
        nonlocal ran
        ran += 1
        return nr

    @durable.workflow
    def long(step: Step) -> int:
        total = sum(step(f"step-{nr}", count, nr) for nr in range(100_000))
        if ran == 100_000:
            count(-1)
            raise RuntimeError("once")
        return total

    with pytest.raises(RuntimeError, match="once"):
        durable.run("long", long)
    assert durable.resume("long") == sum(range(100_000))
    assert ran == 100_001
    assert stored(db)[1:] == [[], []]


# -- callbacks -----------------------------------------------------------------------------


def test_an_observer_that_raises_is_logged_and_changes_nothing(
    store: SnapshotStore, caplog: pytest.LogCaptureFixture
) -> None:
    """At every turn of the run."""

    def observe(event: object) -> None:
        raise RuntimeError("no")

    with caplog.at_level(logging.ERROR, "awaitly_postgres"):
        assert Durable(store, on_event=observe).run("a", three_steps) == [1, 2, 3]
    assert len(caplog.records) == 8  # the run, three steps, each of them twice
    assert store.load("a").execution.status == "completed"


class Moody:
    """A codec that raises at the n-th call."""

    def __init__(self, calls: int) -> None:
        self.left = calls

    def encode(self, value: Any) -> Any:
        return self._count(value)

    def decode(self, json: Any, type: Any) -> Any:
        return self._count(json)

    def _count(self, value: Any) -> Any:
        self.left -= 1
        if self.left == 0:
            raise KeyError("not today")
        return value


@pytest.mark.parametrize("calls", range(1, 11))
def test_a_codec_that_raises_is_a_typed_error_and_the_run_goes_on_later(
    store: SnapshotStore, db: psycopg.Connection, calls: int
) -> None:
    """Wherever it raises: input, result, output, on the way in or out."""
    durable = Durable(store, codec=Moody(calls))
    try:
        assert durable.run("a", three_steps, 1) == [1, 2, 3]
    except AwaitlyError as error:
        assert "its codec failed: KeyError('not today')" in str(error)  # noqa: PT017
    else:
        assert calls > 9  # all calls that a run makes
    assert durable.run("a", three_steps, 1) == [1, 2, 3]
    assert stored(db)[1:] == [[], []]


class Unprintable(Exception):
    """An exception of which nothing can be told."""

    def __str__(self) -> str:
        raise RuntimeError("no str")

    __repr__ = __str__


def test_an_exception_that_cannot_be_printed_is_recorded_and_goes_on_unchanged(
    durable: Durable, db: psycopg.Connection
) -> None:
    """Recording a failure must not replace it by another."""

    def fail() -> None:
        raise Unprintable

    with pytest.raises(Unprintable):
        durable.run("a", lambda step: step("fail", fail))
    assert durable.store.load("a").steps["fail"].error == "Unprintable"
    assert stored(db)[2] == []


def test_a_step_that_closes_the_store_ends_its_run_with_a_typed_error(
    make_store: Callable[..., SnapshotStore], db: psycopg.Connection
) -> None:
    """What was recorded before stands, and another process goes on when the lease has ended."""
    durable, again = (Durable(make_store(), lock_ttl=0.5) for _ in range(2))
    ran = []

    def close() -> None:
        ran.append("second")
        durable.store.close()

    def work(step: Step) -> None:
        step("first", ran.append, "first")
        step("second", close)

    with pytest.raises(StoreError, match="closed"):
        durable.run("a", work)
    assert list(again.store.load("a").steps) == ["first"]
    with again.store.lock("a", wait=30):
        pass  # now the lease of the closed one has ended
    again.run("a", work)
    assert ran == ["first", "second", "second"]
    assert stored(db)[2] == []


def test_a_step_that_runs_its_own_workflow_again_is_told_so(
    durable: Durable, db: psycopg.Connection
) -> None:
    """It does not wait for itself, and its run can be finished."""
    calls = []

    def work(step: Step) -> str:
        try:
            step("again", lambda: durable.run("a", work))
        except AlreadyRunning as error:
            calls.append(error.id)
        return step("after", lambda: "done")

    assert durable.run("a", work) == "done"
    assert calls == ["a"]
    assert stored(db)[2] == []


def test_a_workflow_in_a_workflow_in_a_workflow_is_resumed_where_it_failed(
    durable: Durable, db: psycopg.Connection
) -> None:
    """Each has an id of its own; what the inner ones have done is not done again."""
    ran = []

    def level(step: Step, depth: int) -> int:
        step("mark", lambda: ran.append(depth))
        if depth == 0:
            return step("fail once", fail_once)
        return 1 + step("below", lambda: durable.run(f"level-{depth - 1}", level, depth - 1))

    def fail_once() -> int:
        ran.append(-1)
        if ran.count(-1) == 1:
            raise ConnectionError("the other side")
        return 0

    with pytest.raises(ConnectionError):
        durable.run("level-5", level, 5)
    assert durable.run("level-5", level, 5) == 5
    assert ran == [5, 4, 3, 2, 1, 0, -1, -1]
    assert stored(db)[2] == []


def test_two_hundred_threads_share_a_pool_of_two(
    make_store: Callable[..., SnapshotStore], db: psycopg.Connection
) -> None:
    """Runs with transactions, all at once: none starves, and none waits for itself."""
    durable = Durable(make_store(max_size=2, retry_for=300))  # for a busy machine
    db.execute("CREATE TABLE effects (id text)")
    gate = threading.Barrier(200)

    def pay(conn: psycopg.Connection, id: str) -> str:
        conn.execute("INSERT INTO effects VALUES (%s)", (id,))
        return id

    def work(step: Step, id: str) -> str:
        step("look", lambda: 1)
        return step.transaction("pay", pay, id)

    def start(nr: int) -> str:
        gate.wait(60)
        return durable.run(f"run-{nr}", work, f"run-{nr}")

    with ThreadPoolExecutor(200) as threads:
        results = list(threads.map(start, range(200)))
    assert results == [f"run-{nr}" for nr in range(200)]
    assert db.execute("SELECT count(*), count(DISTINCT id) FROM effects").fetchone() == (200, 200)
    assert stored(db)[1:] == [[], []]


def test_a_conflict_between_two_megabytes_is_told_in_few_words(durable: Durable) -> None:
    """The message shows the beginnings of both inputs."""
    durable.submit("a", durable.workflow(three_steps), 1)
    with pytest.raises(WorkflowConflict) as refused:
        durable.run("a", three_steps, "x" * MEGABYTE)
    assert len(str(refused.value)) < 2000


@pytest.mark.parametrize(
    "url", ["postgresql://u:s3cret@127.0.0.1:1/x", "host=127.0.0.1 port=1 password=s3cret"]
)
def test_no_error_tells_the_password(url: str, caplog: pytest.LogCaptureFixture) -> None:
    """Neither its text, nor its repr, nor that of its cause, nor the log."""
    with postgres(url, retry_for=0.2) as store, pytest.raises(StoreError) as refused:
        store.ping()
    told = [repr(store), caplog.text]
    error: BaseException | None = refused.value
    while error is not None:
        told += [str(error), repr(error)]
        error = error.__cause__
    assert "s3cret" not in "".join(told)
