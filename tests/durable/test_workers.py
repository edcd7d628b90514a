"""Several runs at once in one process: each by one worker, told of in one thread, stopped well."""

from __future__ import annotations

import contextvars
import logging
import os
import signal
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress

import psycopg
import pytest
from attrs import define, field
from psycopg_pool import ConnectionPool

from awaitly_postgres import (
    Durable,
    Outcome,
    SnapshotStore,
    Step,
    StoreUnavailable,
    WorkflowDrift,
    postgres,
)
from tests.support import Proxy, eventually

DB = psycopg.Connection
TIMEOUT = 60  # seconds, for a machine that is busy


@define(eq=False)
class Job:
    """A workflow whose runs wait in their step until the test lets them go on."""

    gate: threading.Event = field(factory=threading.Event)
    waiting: threading.Event = field(factory=threading.Event)  # a run waits for it
    ran: Counter[str] = field(factory=Counter)  # the step of each run
    inside: int = 0
    most_inside: int = 0
    lock: threading.Lock = field(factory=threading.Lock)

    def __call__(self, step: Step, waits: bool = False) -> str:
        step("work", self.work, step.workflow_id, waits)
        return step("after", str, "done")

    def work(self, id: str, waits: bool) -> None:
        with self.lock:
            self.ran[id] += 1
            self.inside += 1
            self.most_inside = max(self.inside, self.most_inside)
        if waits:
            self.waiting.set()
            assert self.gate.wait(TIMEOUT)
        with self.lock:
            self.inside -= 1


@pytest.fixture
def job(durable: Durable) -> Iterator[Job]:
    job = Job()
    durable.workflow(job, name="job")
    yield job
    job.gate.set()  # let every thread go


def submit(durable: Durable, job: Job, count: int, *args: object) -> list[str]:
    return durable.submit_many(job, {f"run-{nr:02}": args for nr in range(count)})


def statuses(outcomes: list[Outcome]) -> dict[str, str]:
    assert len({outcome.id for outcome in outcomes}) == len(outcomes)
    return {outcome.id: outcome.status for outcome in outcomes}


def leases(db: DB) -> int:
    return db.execute("SELECT count(*) FROM awaitly_workflow_lock").fetchone()[0]


def test_as_many_runs_as_workers_are_in_progress_at_a_time(durable: Durable, job: Job) -> None:
    """All of them meet in their step; each run is done once."""
    ids = submit(durable, job, 20, True)
    threads: list[threading.Thread] = []

    def open_when_five_are_there() -> None:
        eventually(lambda: job.inside == 5)
        job.gate.set()

    threads.append(threading.Thread(target=open_when_five_are_there))
    threads[0].start()
    outcomes = durable.resume_pending(workers=5)
    threads[0].join()
    assert statuses(outcomes) == dict.fromkeys(ids, "completed")
    assert job.ran == Counter(ids)
    assert job.most_inside == 5
    assert [t for t in threading.enumerate() if "_work" in t.name] == []


def test_one_worker_is_the_callers_thread(durable: Durable) -> None:
    """As before: an interrupt strikes in the workflow itself."""
    found = []

    @durable.workflow
    def which(step: Step) -> None:
        found.append(threading.current_thread())

    durable.submit("a", which)
    durable.resume_pending(workers=1)
    assert found == [threading.current_thread()]


@pytest.mark.parametrize("workers", [2, 8])
def test_the_limit_holds_over_all_workers(durable: Durable, job: Job, workers: int) -> None:
    """It starts no more than so many, and all of so many."""
    submit(durable, job, 12)
    assert len(durable.resume_pending(limit=5, workers=workers)) == 5
    assert len(job.ran) == 5
    assert len(durable.resume_pending(limit=100, workers=workers)) == 7


def test_what_was_not_started_counts_against_no_limit(durable: Durable, job: Job) -> None:
    """Drift is found before any new step runs; it must not keep the others from starting."""
    earlier = Durable(durable.store)

    @earlier.workflow(name="job")
    def another(step: Step) -> None:
        step("renamed", str)
        step.wait("go")

    for nr in range(3):
        earlier.submit(f"drifts-{nr}", another)
    earlier.resume_pending()
    for nr in range(3):
        earlier.signal(f"drifts-{nr}", "go", 1)
    submit(durable, job, 3)
    outcomes = durable.resume_pending(limit=2, workers=4)
    drifted = [outcome.id for outcome in outcomes if isinstance(outcome.error, WorkflowDrift)]
    assert sorted(drifted) == ["drifts-0", "drifts-1", "drifts-2"]
    assert len(outcomes) == 5


def test_a_run_that_another_process_took_is_skipped(
    durable: Durable, job: Job, make_store: Callable[..., SnapshotStore]
) -> None:
    """And the worker goes on with the next."""
    ids = submit(durable, job, 6)
    elsewhere = Durable(make_store())
    elsewhere.workflow(job, name="job")
    taken: list[str] = []

    def take_the_others(outcome: Outcome) -> None:
        if not taken:
            taken.extend(outcome.id for outcome in elsewhere.resume_pending())

    here = statuses(durable.resume_pending(workers=2, on_progress=take_the_others))
    assert {id for id, status in here.items() if status == "completed"} == {*ids} - {*taken}
    assert job.ran == Counter(ids)


def test_what_a_run_submits_is_run_in_the_same_pass(durable: Durable, job: Job) -> None:
    """The pass ends when nothing is left, not when nothing was left for a moment."""

    @durable.workflow
    def parent(step: Step, depth: int) -> None:
        if depth:
            step("submit", durable.submit, f"child-{depth}", parent, depth - 1)

    durable.submit("top", parent, 5)
    assert len(durable.resume_pending(workers=4)) == 6


def test_outcomes_are_told_in_the_callers_thread(durable: Durable, job: Job) -> None:
    """As each comes: a fast run is told of while a slow one is still in its step."""
    told = []

    def tell(outcome: Outcome) -> None:
        told.append((outcome.id, threading.current_thread(), job.inside))
        job.gate.set()

    @durable.workflow
    def fast(step: Step) -> None:
        step("beside the slow one", job.waiting.wait, TIMEOUT)

    durable.submit("slow", job, True)
    durable.submit("fast", fast)
    outcomes = durable.resume_pending(workers=2, on_progress=tell)
    assert [id for id, _, _ in told] == ["fast", "slow"] == [outcome.id for outcome in outcomes]
    assert {thread for _, thread, _ in told} == {threading.current_thread()}
    assert told[0][2] == 1


def test_workers_have_the_callers_context(durable: Durable) -> None:
    """Its context variables are copied for each run; what a run sets, no other run sees."""
    tenant = contextvars.ContextVar("tenant", default="none")
    found = []

    @durable.workflow
    def which(step: Step) -> None:
        found.append(tenant.get())
        tenant.set("changed")

    durable.submit_many(which, {str(nr): () for nr in range(6)})
    tenant.set("acme")
    durable.resume_pending(workers=3)
    assert found == ["acme"] * 6


@pytest.mark.parametrize("error", [ValueError, SystemExit])
def test_an_error_of_on_progress_lets_the_others_end(
    durable: Durable, job: Job, db: DB, error: type[BaseException]
) -> None:
    """Nothing more is started; what is in progress is finished and told of before it is raised."""
    told = []

    def tell(outcome: Outcome) -> None:
        told.append(outcome.id)
        job.gate.set()
        raise error(outcome.id)

    durable.submit("fast", job)
    submit(durable, job, 8, True)
    with pytest.raises(error, match="fast"):
        durable.resume_pending(workers=3, on_progress=tell)
    assert told[0] == "fast"
    assert len(told) == 3
    assert set(told) == set(job.ran)
    assert db.execute("SELECT count(*) FROM awaitly_snapshots").fetchone() == (9,)
    assert len(durable.list_pending()) == 6


def test_what_cannot_be_an_outcome_is_raised_after_the_others_have_ended(
    durable: Durable, job: Job
) -> None:
    """A workflow that exits ends the pass, as it does with one worker."""

    @durable.workflow
    def leave(step: Step) -> None:
        eventually(lambda: job.inside)
        job.gate.set()
        raise SystemExit(3)

    durable.submit("leaves", leave)
    durable.submit("stays", job, True)
    told: list[str] = []
    with pytest.raises(SystemExit):
        durable.resume_pending(workers=2, on_progress=lambda outcome: told.append(outcome.id))
    assert told == ["stays"]
    assert durable.get("stays").state == "completed"


def test_an_outage_ends_the_pass(connect: Callable[..., SnapshotStore], proxy: Proxy) -> None:
    """`StoreUnavailable` comes to the caller, whichever worker it has met."""
    durable = Durable(connect(retry_for=0, max_size=4))

    @durable.workflow
    def cut(step: Step) -> None:
        step("cut", proxy.cut)

    durable.submit_many(cut, {str(nr): () for nr in range(4)})
    with pytest.raises(StoreUnavailable):
        durable.resume_pending(workers=2)


def test_ctrl_c_abandons_what_is_in_progress(durable: Durable, job: Job, db: DB) -> None:
    """Another process can go on at once; the abandoned threads record nothing more."""

    def interrupt(outcome: Outcome) -> None:
        eventually(lambda: job.inside == 2)
        raise KeyboardInterrupt

    submit(durable, job, 2, True)
    durable.submit("fast", job)
    with pytest.raises(KeyboardInterrupt):
        durable.resume_pending(workers=3, on_progress=interrupt)
    assert leases(db) == 0
    left = {thread for thread in threading.enumerate() if "_work" in thread.name}
    assert len(left) >= 2
    job.gate.set()
    for thread in left:
        thread.join(TIMEOUT)
    for id in ("run-00", "run-01"):
        info = durable.get(id)
        assert (info.steps, info.error, info.attempts) == ((), None, 1)
        assert durable.resume(id) == "done"
        assert job.ran[id] == 2


def test_ctrl_c_starts_no_run_that_a_worker_is_just_looking_up(
    durable: Durable, job: Job, db: DB, url: str
) -> None:
    """Given to a thread that has not read it yet, it would go on after the pass has ended."""
    for id, waits in (("first", False), ("beside", True), ("next", False)):
        durable.submit(id, job, waits)

    def interrupt(outcome: Outcome) -> None:
        """Have the next one wait in its first statement, and strike then."""
        eventually(lambda: job.inside == 1)
        blocker.execute("LOCK TABLE awaitly_snapshots")
        threading.Thread(target=strike).start()

    def strike() -> None:
        waiting = (
            "SELECT FROM pg_locks WHERE relation = 'awaitly_snapshots'::regclass AND NOT granted"
        )
        eventually(lambda: db.execute(waiting).fetchall())
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)

    with psycopg.connect(url) as blocker:
        with pytest.raises(KeyboardInterrupt):
            durable.resume_pending(workers=2, on_progress=interrupt)
        left = {thread for thread in threading.enumerate() if "_work" in thread.name}
    job.gate.set()
    for thread in left:
        thread.join(TIMEOUT)
    assert (job.ran["first"], job.ran["next"], durable.get("next").attempts) == (1, 0, 0)
    assert leases(db) == 0


def test_fewer_threads_than_workers_will_do(
    durable: Durable, job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where no more can be started; nothing in progress is abandoned for that."""
    start = threading.Thread.start

    def start_two(thread: threading.Thread) -> None:
        names = [thread.name, *(other.name for other in threading.enumerate())]
        if "_work" in thread.name and sum("_work" in name for name in names) > 2:
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", start_two)
    ids = submit(durable, job, 8)
    assert statuses(durable.resume_pending(workers=5)) == dict.fromkeys(ids, "completed")
    assert job.ran == Counter(ids)
    assert [t for t in threading.enumerate() if "_work" in t.name] == []


def test_a_pool_of_the_stores_own_grows(make_store: Callable[..., SnapshotStore]) -> None:
    """Five transactions at a time need five connections, and the lease's thread none of them."""
    durable = Durable(make_store(max_size=2, retry_for=10))
    together = threading.Barrier(5)

    def meet(conn: DB) -> None:
        together.wait(TIMEOUT)

    @durable.workflow
    def pay(step: Step) -> None:
        step.transaction("pay", meet)

    durable.submit_many(pay, {str(nr): () for nr in range(10)})
    outcomes = durable.resume_pending(workers=5)
    assert [outcome.error for outcome in outcomes] == [None] * 10


def test_a_pool_that_is_too_small_is_named_once(url: str, caplog: pytest.LogCaptureFixture) -> None:
    """One of the caller's is not resized: its runs wait for each other, and the log says why."""
    with ConnectionPool(url, min_size=1, max_size=2, kwargs={"autocommit": True}) as pool:
        durable = Durable(postgres(pool=pool))
        job = durable.workflow(name="job")(Job())
        for count in (6, 12):
            submit(durable, job, count)
            outcomes = durable.resume_pending(workers=6)
            assert {outcome.status for outcome in outcomes} == {"completed"}
        assert pool.max_size == 2
    warnings = [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]
    assert len(warnings) == 1
    assert "at most 2 connections" in warnings[0]
    assert "max_size" in warnings[0]


@pytest.mark.parametrize("workers", [0, -1, 1.5, True, "2"])
def test_the_number_of_workers_is_checked(durable: Durable, workers: object) -> None:
    """Before anything is asked of the database."""
    with pytest.raises((TypeError, ValueError), match="workers"):
        durable.resume_pending(workers=workers)  # type: ignore[arg-type]


def test_two_processes_of_workers_share_a_queue(
    durable: Durable, job: Job, make_store: Callable[..., SnapshotStore]
) -> None:
    """Together they do each run once."""
    ids = submit(durable, job, 60)
    elsewhere = Durable(make_store())
    elsewhere.workflow(job, name="job")
    found: list[list[Outcome]] = []
    threads = [
        threading.Thread(target=lambda d=d: found.append(d.resume_pending(workers=4)))
        for d in (durable, elsewhere)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    completed = [o.id for outcomes in found for o in outcomes if o.status == "completed"]
    assert sorted(completed) == sorted(ids)
    assert job.ran == Counter(ids)


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_child_forked_in_a_worker_ends_with_its_step(durable: Durable, db: DB) -> None:
    """It takes no further run, and writes nothing for its parent's."""
    children = []

    def fork() -> str:
        if child := os.fork():
            children.append(child)
            return "parent"
        return "child"

    @durable.workflow
    def forks(step: Step) -> str:
        return step("fork", fork)

    durable.submit_many(forks, {"a": (), "b": ()})
    assert {o.result for o in durable.resume_pending(workers=2)} == {"parent"}
    try:
        for child in children:
            eventually(lambda child=child: os.waitpid(child, os.WNOHANG)[0], "the child's end")
    finally:
        for child in children:
            with suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
    assert len(children) == 2
    assert durable.get("a").state == "completed"
