"""Recorded stays recorded: writes that are late, that follow a lost history, or come too late."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Any

import psycopg
import pytest

from awaitly_postgres import Durable, LeaseLost, SnapshotStore, Step, Workflow, WorkflowError
from tests.support import SlowBackend, photograph, restore

DB = psycopg.Connection


def filler(size: int) -> str:
    return "." * size


def keys(durable: Durable, id: str = "a") -> list[str]:
    return sorted(durable.store.load(id).steps)


@pytest.mark.parametrize("size", [0, 5_000], ids=["rewritten", "appended"])
@pytest.mark.parametrize("late", ["a step", "the end"])
def test_a_write_that_its_backend_was_slow_to_do_changes_nothing(
    slow_backend: SlowBackend, db: DB, size: int, late: str
) -> None:
    """The backend is stopped, its connection cut; the retry lands, more is recorded, it wakes."""
    durable = Durable(slow_backend.store)

    def stop() -> str:
        slow_backend.stop()
        return filler(size)

    def work(step: Step) -> str:
        step("a", filler, size)
        if late == "a step":
            step("b", stop)
            for key in "cde":
                step(key, filler, size)
        else:
            step("b", str)
            stop()
        return "done"

    assert durable.run("a", work) == "done"
    before = photograph(db)
    slow_backend.wake()
    assert slow_backend.stopped
    assert photograph(db) == before
    assert keys(durable) == (list("abcde") if late == "a step" else ["a", "b"])
    assert durable.run("a", work) == "done"


def test_a_step_that_is_appended_late_does_not_follow_the_next_rewrite(
    slow_backend: SlowBackend, db: DB
) -> None:
    """The rewrite has folded the journal, and the end does not look into it again."""
    durable = Durable(slow_backend.store)

    def stop() -> str:
        slow_backend.stop()
        return filler(5_000)

    def work(step: Step) -> str:
        step("a", filler, 9_000)  # rewrites all
        step("b", filler, 10)  # appended; the statement is prepared then
        step("c", stop)  # appended, late
        step("d", filler, 5_000)  # rewrites all
        assert photograph(db)["awaitly_snapshots_steps"] == []
        slow_backend.wake()
        return "done"

    assert durable.run("a", work) == "done"
    assert keys(durable) == list("abcd")
    assert photograph(db)["awaitly_snapshots_steps"] == []


@pytest.mark.parametrize("size", [0, 5_000], ids=["rewritten", "appended"])
@pytest.mark.parametrize("write", ["step", "transaction", "end"])
def test_a_write_on_a_history_that_the_server_has_lost_is_refused(
    durable: Durable, db: DB, size: int, write: str
) -> None:
    """A failover to a standby that was behind: the run stops, and goes on from what there is."""
    ran: Counter[str] = Counter()
    lost: list[dict[str, list[str]]] = []

    def act(key: str) -> str:
        ran[key] += 1
        return "." * size

    def work(step: Step) -> str:
        step("a", act, "a")
        behind = photograph(db)
        step("b", act, "b")
        if not lost:
            lost.append(behind)
            restore(db, behind)
            db.execute("UPDATE awaitly_workflow_lock SET expires_at = now() + interval '1 hour'")
        if write == "step":
            step("c", act, "c")
        if write == "transaction":
            step.transaction("c", lambda conn: act("c"))
        return "done"

    with pytest.raises(LeaseLost):
        durable.run("a", work)
    assert keys(durable) == ["a"]
    assert durable.run("a", work) == "done"
    assert (ran["a"], ran["b"]) == (1, 2)
    assert keys(durable) == ["a", "b"] + ["c"] * (write != "end")


@pytest.mark.parametrize("size", [0, 5_000], ids=["rewritten", "appended"])
@pytest.mark.parametrize("kind", ["step", "transaction"])
def test_a_thread_that_outlives_its_run_is_told_that_nothing_was_recorded(
    durable: Durable, size: int, kind: str
) -> None:
    """The pool is the process's, not the workflow's: what ends after the run raises."""
    inside, ended = threading.Event(), threading.Event()

    def linger() -> str:
        inside.set()
        assert ended.wait(30)
        return "." * size

    def transfer(conn: DB) -> str:
        return linger()

    futures: list[Any] = []

    def work(step: Step) -> None:
        step("a", filler, size)
        late = step if kind == "step" else step.transaction
        futures.append(pool.submit(late, "late", linger if kind == "step" else transfer))
        inside.wait(30)
        raise LookupError

    with ThreadPoolExecutor(1) as pool:
        with pytest.raises(LookupError):
            durable.run("a", work)
        ended.set()
        with pytest.raises(WorkflowError, match="ended while another thread"):
            futures[0].result(30)
    assert keys(durable) == ["a"]


def test_what_threads_have_acknowledged_when_the_run_ends_is_never_erased(
    make_store: Callable[..., SnapshotStore],
) -> None:
    """Forty runs end while eight threads of a foreign pool are recording."""
    durable = Durable(make_store(max_size=10))

    def end_amidst(id: str, pool: ThreadPoolExecutor) -> list[str]:
        """Return what was acknowledged."""
        acknowledged: list[str] = []
        started = threading.Barrier(9)
        futures: list[Any] = []

        def act(step: Step, thread: int) -> None:
            started.wait(30)
            for part in "abc":
                step(f"{thread}{part}", str)
                acknowledged.append(f"{thread}{part}")

        def work(step: Step) -> None:
            futures.extend(pool.submit(act, step, thread) for thread in range(8))
            started.wait(30)
            step("own", str)
            raise LookupError

        with pytest.raises(LookupError):
            durable.run(id, work)
        wait(futures)
        return acknowledged

    with ThreadPoolExecutor(8) as pool:
        for nr in range(40):
            assert set(end_amidst(f"{nr}", pool)) <= set(keys(durable, f"{nr}"))


def test_a_thread_that_outlives_a_run_in_memory_is_told_so_too() -> None:
    """The snapshot was taken; what comes later is in none."""
    inside, ended = threading.Event(), threading.Event()

    def linger() -> str:
        inside.set()
        assert ended.wait(30)
        return "late"

    with ThreadPoolExecutor(1) as pool:
        futures: list[Any] = []

        def work(step: Step) -> None:
            futures.append(pool.submit(step, "late", linger))
            inside.wait(30)

        run = Workflow(work)
        run()
        ended.set()
        with pytest.raises(WorkflowError, match="was not recorded"):
            futures[0].result(30)
    assert dict(run.snapshot().steps) == {}
