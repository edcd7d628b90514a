"""Durable runs: what is recorded, resumed, retried, refused and left alone."""

from __future__ import annotations

import re
import secrets
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from decimal import Decimal
from typing import Any

import psycopg
import pytest

from awaitly_postgres import (
    AlreadyRunning,
    Durable,
    Event,
    NotSerializable,
    Outcome,
    SnapshotFormatError,
    SnapshotStore,
    Step,
    VersionMismatch,
    Workflow,
    WorkflowCancelled,
    WorkflowConflict,
    WorkflowDrift,
    WorkflowNotFound,
    WorkflowSnapshot,
    WorkflowSuspended,
)
from tests.support import eventually, photograph, restore

MakeStore = Callable[..., SnapshotStore]
DB = psycopg.Connection

LARGE = 5_000  # characters in a step's result, enough for the journal to be used


class Crash(BaseException):
    """Ends a run as the death of its process would: nothing more is recorded."""


class Declined(Exception):
    """A failure that the workflows here handle."""


class Outage(Exception):
    """A failure that they do not."""


class Work:
    """A step function that remembers for what it ran, and fails as told."""

    def __init__(self) -> None:
        self.ran: list[str] = []
        self.faults: dict[str, type[BaseException]] = {}
        self.size = 0

    def __call__(self, key: str) -> str:
        self.ran.append(key)
        if key in self.faults:
            raise self.faults[key](key)
        return f"{key} done{'.' * self.size}"


@pytest.fixture
def work() -> Work:
    return Work()


@pytest.fixture
def background() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor() as pool:
        yield pool


def steps(work: Work, keys: str) -> Callable[[Step], list[str]]:
    """Make a workflow of these one-letter steps."""

    def letters(step: Step) -> list[str]:
        return [step(key, work, key) for key in keys]

    return letters


def save_by_hand(store: SnapshotStore, id: str, fn: Callable[..., Any], name: str) -> None:
    workflow = Workflow(fn, name=name)
    workflow()
    store.save(id, workflow.snapshot())


def row(db: DB, id: str) -> tuple[Any, ...]:
    """Return everything stored as ``id`` byte for byte, and what tells a rewrite of the same."""
    snapshots = "SELECT snapshot::text, updated_at, xmin::text FROM awaitly_snapshots WHERE id = %s"
    journal = (
        "SELECT key, step::text, xmin::text FROM awaitly_snapshots_steps WHERE id = %s ORDER BY key"
    )
    return db.execute(snapshots, [id]).fetchall(), db.execute(journal, [id]).fetchall()


def metadata(db: DB, id: str) -> dict[str, Any]:
    query = "SELECT snapshot->'metadata' FROM awaitly_snapshots WHERE id = %s"
    return db.execute(query, [id]).fetchone()[0]


def set_metadata(db: DB, id: str, key: str, value: str) -> None:
    db.execute(
        "UPDATE awaitly_snapshots SET snapshot = jsonb_set(snapshot, %s, %s::jsonb) WHERE id = %s",
        [["metadata", key], value, id],
    )


def wake(db: DB, id: str) -> None:
    """Let the pause, or the sleep, of ``id`` be over."""
    set_metadata(db, id, "wakeAt", '"2000-01-01T00:00:00.000Z"')


def seconds_until_due(db: DB, id: str) -> float:
    """Return the pause that the end of the run wrote, by the server's clock alone."""
    query = (
        "SELECT extract(epoch FROM (snapshot->'metadata'->>'wakeAt')::timestamptz - updated_at) "
        "FROM awaitly_snapshots WHERE id = %s"
    )
    return float(db.execute(query, [id]).fetchone()[0])


def leases(db: DB) -> list[str]:
    query = "SELECT workflow_id FROM awaitly_workflow_lock ORDER BY 1"
    return [id for (id,) in db.execute(query).fetchall()]


def pending(durable: Durable) -> list[str]:
    return [info.id for info in durable.list_pending()]


# -- running and resuming ------------------------------------------------------------------


def test_completed_id_returns_its_output_and_runs_nothing(
    durable: Durable, work: Work, db: DB
) -> None:
    """The second call of a completed id reads its output and writes nothing."""
    workflow = durable.workflow(name="w")(steps(work, "ab"))
    first = durable.run("id", workflow)
    before = row(db, "id")
    assert durable.run("id", workflow) == durable.resume("id") == first == ["a done", "b done"]
    assert work.ran == ["a", "b"]
    assert row(db, "id") == before
    assert leases(db) == []


@pytest.mark.parametrize("crash", [KeyboardInterrupt, SystemExit, Crash])
@pytest.mark.parametrize("at", ["a", "b", "c"])
def test_interrupted_run_frees_its_lease_and_goes_on_where_it_was(
    durable: Durable, work: Work, db: DB, at: str, crash: type[BaseException]
) -> None:
    """Ctrl-C and its like leave no lease behind; only the step that was cut short runs again."""
    workflow = durable.workflow(name="w")(steps(work, "abc"))
    work.faults = {at: crash}
    with pytest.raises(crash):
        durable.run("id", workflow)
    assert leases(db) == []
    assert list(durable.store.load("id").steps) == list("abc"[: "abc".index(at)])
    assert pending(durable) == ["id"]

    work.faults, cut_short = {}, work.ran.index(at)
    assert durable.resume("id") == ["a done", "b done", "c done"]
    assert work.ran == [*"abc"[: cut_short + 1], *"abc"[cut_short:]]


def test_crash_after_the_last_step_only_ends_the_run(durable: Durable, work: Work) -> None:
    """A run that died between its last step and its end is completed without running any."""

    @durable.workflow
    def workflow(step: Step) -> str:
        result = step("a", work, "a")
        if len(work.ran) == 1:
            work.ran.append("crashed")
            raise Crash
        return result

    with pytest.raises(Crash):
        durable.run("id", workflow)
    assert durable.resume("id") == "a done"
    assert work.ran == ["a", "crashed"]
    assert durable.store.load("id").execution.status == "completed"


@pytest.mark.parametrize("start", ["run", "submit"])
@pytest.mark.parametrize("other", ["workflow", "input"])
@pytest.mark.parametrize("finished", [True, False])
def test_id_of_another_workflow_or_input_is_refused(
    durable: Durable, work: Work, db: DB, start: str, other: str, finished: bool
) -> None:
    """An id that was started with something else conflicts, and stays as it is."""

    @durable.workflow
    def order(step: Step, user: str) -> str:
        return step("a", work, user)

    @durable.workflow
    def refund(step: Step, user: str) -> str:
        return step("a", work, user)

    (durable.run if finished else durable.submit)("id", order, "ada")
    before, ran = row(db, "id"), list(work.ran)
    workflow, user = (refund, "ada") if other == "workflow" else (order, "bob")
    with pytest.raises(WorkflowConflict) as refused:
        getattr(durable, start)("id", workflow, user)
    assert refused.value.what == other
    assert row(db, "id") == before
    assert work.ran == ran
    assert leases(db) == []


def test_first_run_sees_its_input_and_output_as_a_replay_would(durable: Durable) -> None:
    """Arguments and result pass through JSON at once, and another spelling is the same input."""
    seen = []

    @durable.workflow
    def workflow(step: Step, pair: Any, *, options: Any) -> Any:
        seen.append((pair, options, list(options)))
        if len(seen) == 1:
            raise Crash
        return (pair, {"b": 1, "a": 2})

    with pytest.raises(Crash):
        durable.run("id", workflow, (1, 2.0), options={"bb": 1, "a": (None,)})
    first = durable.run("id", workflow, [1, 2.0], options={"a": [None], "bb": 1})
    assert seen == [([1, 2.0], {"a": [None], "bb": 1}, ["a", "bb"])] * 2
    again = durable.run("id", workflow, (1, 2.0), options={"a": [None], "bb": 1})
    assert first == again == [[1, 2.0], {"a": 2, "b": 1}]
    assert list(first[1]) == list(again[1]) == ["a", "b"]


def test_a_name_is_not_lent_to_another_function(store: SnapshotStore) -> None:
    """A run of it would be resumed with the one that is registered under the name."""

    def letters(step: Step) -> None:
        step("a", str)

    durable = Durable(store)
    durable.workflow(name="letters")(lambda step: step("b", str))
    for start in (durable.run, durable.submit):
        with pytest.raises(ValueError, match="already registered as 'letters'"):
            start("id", letters)
    assert not durable.has_state("id")


@pytest.mark.parametrize("stored", ["nothing", "by hand", "unregistered"])
def test_resume_needs_a_recorded_input_and_a_registered_workflow(
    durable: Durable, work: Work, stored: str
) -> None:
    """What cannot be resumed by its id alone says so, and what to do."""
    if stored == "by hand":
        save_by_hand(durable.store, "id", steps(work, "a"), name="letters")
    elif stored == "unregistered":
        other = Durable(durable.store)
        other.submit("id", other.workflow(steps(work, "a")))
    with pytest.raises(WorkflowNotFound) as refused:
        durable.resume("id")
    assert refused.value.workflow == ("letters" if stored == "unregistered" else None)
    assert ("@durable.workflow" if stored == "unregistered" else "run(id") in str(refused.value)


def test_step_that_runs_its_own_id_again_is_refused(durable: Durable, db: DB) -> None:
    """A run is running while its own steps run, whoever asks."""

    @durable.workflow
    def workflow(step: Step) -> Any:
        return step("again", lambda: durable.run("id", workflow))

    with pytest.raises(AlreadyRunning) as refused:
        durable.run("id", workflow)
    assert refused.value.id == "id"
    assert durable.store.load("id").execution.status == "failed"
    assert leases(db) == []


def test_workflow_inside_a_workflow_resumes_with_it(make_store: MakeStore, work: Work) -> None:
    """A run inside a step keeps its own steps, and needs no second connection to do so."""
    durable = Durable(make_store(max_size=1))
    inner = durable.workflow(name="inner")(steps(work, "ab"))

    @durable.workflow
    def outer(step: Step) -> Any:
        return step("inner", lambda: durable.run("inner", inner)) + step("last", lambda: ["end"])

    work.faults = {"b": Crash}
    with pytest.raises(Crash):
        durable.run("outer", outer)
    work.faults = {}
    assert durable.resume("outer") == ["a done", "b done", "end"]
    assert work.ran == ["a", "b", "b"]
    assert durable.resume("inner") == ["a done", "b done"]


# -- submitting ----------------------------------------------------------------------------


def test_submitted_run_waits_for_resume_pending(durable: Durable, work: Work, db: DB) -> None:
    """Accepting a run stores its input once and runs nothing; it counts as no start."""

    @durable.workflow
    def order(step: Step, user: str) -> str:
        return step("a", work, user)

    assert durable.submit("id", order, "ada") is True
    before = row(db, "id")
    assert durable.submit("id", order, "ada") is False
    assert (row(db, "id"), work.ran, pending(durable)) == (before, [], ["id"])

    assert durable.resume_pending() == [Outcome("id", "completed", "ada done", None, 1)]
    before = row(db, "id")
    assert durable.submit("id", order, "ada") is False
    assert (row(db, "id"), work.ran, pending(durable)) == (before, ["ada"], [])


@pytest.mark.parametrize("end", ["commit", "rollback"])
def test_submission_shares_the_fate_of_the_callers_transaction(
    durable: Durable, url: str, db: DB, work: Work, end: str
) -> None:
    """With ``conn=`` the run is accepted if and when the caller commits, first tables and all."""
    workflow = durable.workflow(name="w")(steps(work, "a"))
    db.execute("CREATE TABLE orders (id int)")
    with psycopg.connect(url) as conn:
        conn.execute("INSERT INTO orders VALUES (1)")
        assert durable.submit("id", workflow, conn=conn) is True
        assert durable.submit("id", workflow, conn=conn) is False
        assert conn.info.transaction_status == psycopg.pq.TransactionStatus.INTRANS
        getattr(conn, end)()
    committed = end == "commit"
    assert db.execute("SELECT count(*) FROM orders").fetchone()[0] == committed
    assert durable.has_state("id") is committed
    assert [outcome.id for outcome in durable.resume_pending()] == ["id"] * committed


# -- resume_pending ------------------------------------------------------------------------


def test_resume_pending_reports_one_outcome_for_each_run(durable: Durable, work: Work) -> None:
    """A failure does not stop the rest; what is registered nowhere here is left alone."""

    @durable.workflow
    def job(step: Step, what: str) -> str:
        step("a", work, what)
        return step.wait("go") if what == "waits" else what

    work.faults = {"fails": Outage}
    for id in ("fails", "waits", "works"):
        durable.submit(id, job, id)
    elsewhere = Durable(durable.store)
    elsewhere.submit("foreign", elsewhere.workflow(steps(work, "z")))
    reported: list[Outcome] = []
    failed, suspended, completed = outcomes = durable.resume_pending(on_progress=reported.append)
    assert reported == outcomes
    assert (failed.id, failed.status, failed.attempts) == ("fails", "failed", 1)
    assert isinstance(failed.error, Outage)
    assert (suspended.id, suspended.status, suspended.result) == ("waits", "suspended", None)
    assert isinstance(suspended.error, WorkflowSuspended)
    assert completed == Outcome("works", "completed", "works", None, 1)
    assert work.ran == ["fails", "waits", "works"]
    assert (pending(durable), pending(elsewhere)) == ([], ["foreign"])


@pytest.mark.parametrize("meanwhile", ["leased", "finished", "cancelled", "deleted"])
def test_run_that_somebody_else_took_meanwhile_is_skipped(
    durable: Durable, make_store: MakeStore, work: Work, meanwhile: str
) -> None:
    """Between the listing and its turn a run may change hands: then it is not touched."""
    other = Durable(make_store())
    workflow = steps(work, "a")
    for instance in (durable, other):
        instance.workflow(workflow)
    for id in ("first", "second"):
        durable.submit(id, workflow)

    def change_hands(outcome: Outcome) -> None:
        if outcome.id == "second":
            return
        if meanwhile == "leased":
            assert other.store.try_acquire("second")
        elif meanwhile == "finished":
            other.resume("second")
        elif meanwhile == "cancelled":
            other.cancel("second")
        else:
            other.delete_state("second")

    first, second = durable.resume_pending(on_progress=change_hands)
    assert (first.status, work.ran) == ("completed", ["a"] * (1 + (meanwhile == "finished")))
    assert second.status == "skipped"
    assert durable.has_state("second") is (meanwhile != "deleted")


def test_resume_pending_takes_the_longest_untouched_of_a_prefix_first(
    durable: Durable, work: Work
) -> None:
    """``prefix`` is exact, ``limit`` bounds one call, and nobody is overtaken."""
    workflow = durable.workflow(name="w")(steps(work, "a"))
    for id in ("eu_3", "euX1", "eu_1", "eu_2", "us_1"):
        durable.submit(id, workflow)
    assert [o.id for o in durable.resume_pending(prefix="eu_", limit=2)] == ["eu_3", "eu_1"]
    assert [o.id for o in durable.resume_pending(prefix="eu_")] == ["eu_2"]
    assert [info.id for info in durable.list_pending("eu")] == ["euX1"]
    assert [info.id for info in durable.list_pending(limit=1)] == ["euX1"]


@pytest.mark.parametrize(
    ("attempts", "pause"), [(1, 1), (2, 2), (3, 4), (12, 2048), (13, 3600), (5000, 3600)]
)
def test_pause_after_a_failure_grows_by_the_servers_clock(
    durable: Durable, work: Work, db: DB, slow_clock: None, attempts: int, pause: int
) -> None:
    """Each start doubles the pause up to an hour, however wrong the client's clock is."""
    durable.max_attempts = None
    durable.submit("id", durable.workflow(name="w")(steps(work, "a")))
    set_metadata(db, "id", "attempts", str(attempts - 1))
    work.faults = {"a": Outage}
    with pytest.raises(Outage):
        durable.resume("id")
    assert metadata(db, "id")["attempts"] == attempts
    assert abs(seconds_until_due(db, "id") - pause) < 0.5
    assert durable.store.load("id").execution.last_updated < metadata(db, "id")["wakeAt"]


def test_failed_run_is_pending_when_its_pause_is_over(durable: Durable, work: Work, db: DB) -> None:
    """`resume_pending` keeps the pause, `resume` does not."""
    work.faults = {"b": Outage}
    with pytest.raises(Outage):
        durable.run("id", durable.workflow(name="w")(steps(work, "ab")))
    set_metadata(db, "id", "wakeAt", '"2999-01-01T00:00:00.000Z"')
    assert pending(durable) == []
    assert durable.resume_pending() == []
    with pytest.raises(Outage):
        durable.resume("id")
    wake(db, "id")
    assert pending(durable) == ["id"]
    work.faults = {}
    (outcome,) = durable.resume_pending()
    assert (outcome.status, outcome.attempts) == ("completed", 3)
    assert work.ran == ["a", "b", "b", "b"]


def test_crashed_run_is_pending_as_soon_as_its_lease_is_over(
    durable: Durable, work: Work, db: DB
) -> None:
    """Whose process is gone does not pause; but while its lease stands it is somebody's."""
    durable.submit("id", durable.workflow(name="w")(steps(work, "a")))
    lease = durable.store.try_acquire("id")
    assert (pending(durable), durable.resume_pending()) == ([], [])
    db.execute("UPDATE awaitly_workflow_lock SET expires_at = clock_timestamp()")
    assert pending(durable) == ["id"]
    assert [outcome.status for outcome in durable.resume_pending()] == ["completed"]
    assert not lease.held()


def test_max_attempts_counts_every_start(make_store: MakeStore, work: Work, db: DB) -> None:
    """Crashes count as failures do; then it is given up, and only `resume` tries again."""
    durable = Durable(make_store(), max_attempts=3)
    workflow = durable.workflow(name="w")(steps(work, "a"))
    for fault in (Crash, Outage, Crash):
        work.faults = {"a": fault}
        with pytest.raises(fault):
            durable.run("id", workflow)
    assert (pending(durable), durable.resume_pending()) == ([], [])
    wake(db, "id")
    assert pending(durable) == ["id"]
    assert [outcome.status for outcome in durable.resume_pending()] == ["failed"]
    assert (pending(durable), durable.resume_pending()) == ([], [])
    assert work.ran == ["a"] * 3
    work.faults = {}
    assert durable.resume("id") == ["a done"]


# -- options and state ---------------------------------------------------------------------


def test_on_complete_delete_lets_the_id_run_again(store: SnapshotStore, work: Work) -> None:
    """A run that deletes itself is forgotten when it completes, and only then."""
    durable = Durable(store, on_complete="delete")
    workflow = durable.workflow(name="w")(steps(work, "ab"))
    work.faults = {"b": Outage}
    with pytest.raises(Outage):
        durable.run("id", workflow)
    assert durable.has_state("id")
    work.faults = {}
    assert durable.run("id", workflow) == ["a done", "b done"]
    assert not durable.has_state("id")
    durable.run("id", workflow)
    assert work.ran == ["a", "b", "b", "a", "b"]


def test_metadata_is_stored_with_every_run_beside_what_is_recorded(
    store: SnapshotStore, work: Work, db: DB
) -> None:
    """The user's fields are there from the first moment; they replace none of the run's own."""
    given = {"tenant": "acme", "workflow": "forged", "attempts": 7}
    durable = Durable(store, metadata=given)
    workflow = durable.workflow(name="w", version=2)(steps(work, "a"))
    durable.submit("id", workflow)
    expected = {"custom": given, "workflow": "w", "version": 2, "attempts": 0}
    expected["input"] = {"args": [], "kwargs": {}}
    expected["submittedAt"] = metadata(db, "id")["submittedAt"]
    assert metadata(db, "id") == expected
    durable.resume("id")
    expected |= {"attempts": 1, "output": ["a done"], "lastStepKey": "a"}
    assert metadata(db, "id") == expected


def test_state_can_be_asked_for_and_deleted(make_store: MakeStore, work: Work) -> None:
    """The helpers see and delete what is under their store's prefix, and nothing else."""
    durable, neighbour = Durable(make_store(prefix="a:")), Durable(make_store(prefix="b:"))
    workflow = steps(work, "a")
    for owner in (durable, neighbour):
        owner.workflow(workflow)
    for id in ("1", "2", "3", "4", "5"):
        durable.submit(id, workflow)
        neighbour.submit(id, workflow)
    assert (durable.has_state("1"), durable.has_state("b:1")) == (True, False)
    assert (durable.delete_state("1"), durable.delete_state("1")) == (True, False)
    assert durable.delete_states(["1", "2", "3"]) == 2
    assert [durable.has_state(id) for id in "12345"] == [False, False, False, True, True]
    assert pending(durable) == ["4", "5"]
    assert (durable.clear_state(), durable.clear_state()) == (2, 0)
    assert pending(neighbour) == ["1", "2", "3", "4", "5"]


def test_events_tell_the_run_in_order(store: SnapshotStore, work: Work) -> None:
    """Each turn of a run is told once, in the order in which it happened."""
    told: list[Event] = []
    durable = Durable(store, on_event=told.append)
    workflow = durable.workflow(name="w")(steps(work, "ab"))
    work.faults = {"b": Outage}
    with pytest.raises(Outage):
        durable.run("id", workflow)
    assert [(event.type, event.key) for event in told] == [
        ("run_started", None),
        ("step_started", "a"),
        ("step_completed", "a"),
        ("step_started", "b"),
        ("step_failed", "b"),
        ("run_failed", None),
    ]
    assert {(event.workflow, event.workflow_id) for event in told} == {("w", "id")}
    assert isinstance(told[-1].error, Outage)

    told.clear()
    work.faults = {}
    durable.resume("id")
    assert [(event.type, event.key) for event in told] == [
        ("run_started", None),
        ("step_replayed", "a"),
        ("step_started", "b"),
        ("step_completed", "b"),
        ("run_completed", None),
    ]


@pytest.mark.parametrize(
    ("end", "told_last"),
    [
        ("returns", "run_completed"),
        ("raises", "run_failed"),
        ("waits", "run_suspended"),
        ("crashes", "run_stopped"),
        ("drifts", "run_stopped"),
        ("is cancelled, then returns", "run_stopped"),
        ("is cancelled, then raises", "run_stopped"),
        ("is cancelled, then steps", "run_stopped"),
    ],
)
def test_every_run_that_starts_tells_one_end(
    store: SnapshotStore, end: str, told_last: str
) -> None:
    """Whoever counts the runs under way by their events never loses one."""
    told: list[str] = []
    durable = Durable(store, on_event=lambda event: told.append(event.type))

    @durable.workflow
    def workflow(step: Step) -> None:
        if "cancelled" in end:
            durable.cancel("id")
        if end == "drifts":
            step("another", str)
        if "raises" in end:
            raise Outage
        if "steps" in end:
            step("a", str)
        if end == "waits":
            step.wait("go")
        if end == "crashes":
            raise Crash

    if end == "drifts":
        save_by_hand(store, "id", lambda step: step("old", str), name="workflow")
    with suppress(Outage, Crash, WorkflowSuspended, WorkflowDrift, WorkflowCancelled):
        durable.run("id", workflow)
    ends = [type for type in told if type.startswith("run_") and type != "run_started"]
    assert ends == [told_last]


# -- failures ------------------------------------------------------------------------------


def test_failing_step_ends_the_run_and_is_retried_at_the_next(durable: Durable, work: Work) -> None:
    """The exception reaches the caller as it is, the failure is recorded, and is not final."""
    workflow = durable.workflow(name="w")(steps(work, "abc"))
    work.faults = {"b": Outage}
    with pytest.raises(Outage):
        durable.run("id", workflow)
    failed = durable.store.load("id")
    assert (failed.execution.status, failed.steps["b"].error) == ("failed", "Outage")
    assert failed.metadata["failure"]["name"] == "Outage"
    work.faults = {}
    assert durable.run("id", workflow) == ["a done", "b done", "c done"]
    assert work.ran == ["a", "b", "b", "c"]
    completed = durable.store.load("id")
    assert (completed.execution.status, completed.steps["b"].ok) == ("completed", True)
    assert "failure" not in completed.metadata


@pytest.mark.parametrize("size", [0, LARGE])
@pytest.mark.parametrize(
    ("point", "runs", "paid_by"),
    [
        ("begun", ["a", "card", "ship"], "card"),
        ("a recorded", ["card", "ship"], "card"),
        ("card refused", ["card", "ship"], "card"),
        ("invoice recorded", ["ship"], "invoice"),
        ("ship failed", ["ship"], "invoice"),
        ("ended", ["ship"], "invoice"),
    ],
)
def test_handled_and_unhandled_failures_are_told_apart_after_any_crash(
    durable: Durable, work: Work, db: DB, point: str, runs: list[str], paid_by: str, size: int
) -> None:
    """Whatever stood in the tables when the process died, what was handled stays handled.

    That is, once something later is recorded. A handled failure comes back in its own class then,
    so that the same ``except`` catches it; one with nothing after it is tried again.
    """
    left: dict[str, dict[str, list[str]]] = {}

    @durable.workflow
    def order(step: Step) -> str:
        left["begun"] = photograph(db)
        step("a", work, "a")
        left["a recorded"] = photograph(db)
        try:
            paid = step("card", work, "card")
        except Declined:
            left["card refused"] = photograph(db)
            paid = step("invoice", work, "invoice")
        left["invoice recorded"] = photograph(db)
        try:
            step("ship", work, "ship")
        except Outage:
            left["ship failed"] = photograph(db)
            raise
        return paid

    work.size, work.faults = size, {"card": Declined, "ship": Outage}
    with pytest.raises(Outage):
        durable.run("id", order)
    left["ended"] = photograph(db)

    restore(db, left[point])
    work.ran, work.faults = [], {}
    if point == "ended":
        wake(db, "id")
    (outcome,) = durable.resume_pending()
    assert work.ran == runs
    assert outcome.result.rstrip(".") == f"{paid_by} done"


def test_failure_handled_before_a_suspension_stays_handled(durable: Durable, work: Work) -> None:
    """A run that went on to wait has moved past the failure, though it recorded nothing since."""

    @durable.workflow
    def order(step: Step) -> Any:
        try:
            return step("card", work, "card")
        except Declined:
            return step.wait("transfer")

    work.faults = {"card": Declined}
    with pytest.raises(WorkflowSuspended):
        durable.run("id", order)
    work.faults = {}
    durable.signal("id", "transfer", 9)
    assert durable.resume("id") == 9
    assert work.ran == ["card"]


def test_failure_that_was_cleaned_up_after_is_final(durable: Durable, work: Work) -> None:
    """Steps recorded after a failure belong to it: retrying it would leave them stranded."""

    @durable.workflow
    def order(step: Step) -> None:
        step("a", work, "a")
        try:
            step("charge", work, "charge")
        except Declined:
            step("cancel-shipping", work, "cancel-shipping")
            raise

    work.faults = {"charge": Declined}
    for _ in range(2):
        with pytest.raises(Declined):
            durable.run("id", order)
    assert work.ran == ["a", "charge", "cancel-shipping"]


@pytest.mark.parametrize("what", ["the result of step 'b'", "the output of workflow 'order'"])
def test_result_that_is_not_json_is_refused_and_not_recorded(
    durable: Durable, work: Work, what: str
) -> None:
    """The error names what it was and where in it; the recorded steps stay, the run has failed."""
    bad: list[Any] = [{"when": [1, object()]}]

    @durable.workflow
    def order(step: Step) -> Any:
        step("a", work, "a")
        return step("b", lambda: bad[0]) if "step" in what else bad[0]

    with pytest.raises(NotSerializable) as refused:
        durable.run("id", order)
    assert (refused.value.subject, refused.value.path) == (what, "$.when[1]")
    failed = durable.store.load("id")
    assert (list(failed.steps), failed.execution.status) == (["a"], "failed")
    bad[0] = "json"
    assert durable.resume("id") == "json"
    assert work.ran == ["a"]


def test_input_that_is_not_json_leaves_nothing_behind(durable: Durable, db: DB) -> None:
    """An input is checked before there is a run."""
    for start in (durable.run, durable.submit):
        with pytest.raises(NotSerializable) as refused:
            start("id", lambda step, user: user, {"user": {1, 2}})
        assert refused.value.path == "$.args[0].user"
    assert durable.has_state("id") is False
    assert leases(db) == []


# -- code that changed under a run ---------------------------------------------------------


@pytest.mark.parametrize("size", [0, LARGE])
@pytest.mark.parametrize(
    ("now", "asked", "unreached"),
    [
        pytest.param("aXcde", "X", "bcd", id="renamed"),
        pytest.param("aXbcde", "X", "bcd", id="inserted"),
        pytest.param("acde", "c", "bcd", id="removed"),
        pytest.param("bacde", "b", "abcd", id="reordered"),
        pytest.param("abc", None, "d", id="shortened"),
    ],
)
def test_changed_steps_are_refused_before_anything_runs(
    durable: Durable, work: Work, db: DB, now: str, asked: str | None, unreached: str, size: int
) -> None:
    """Drift loses no step, frees the lease and says what to do; the old code still works."""
    crashed_in_e(durable, work, size)
    before, work.ran = recorded(durable), []
    assert bool(row(db, "id")[1]) == bool(size)  # the large one is partly in the journal

    changed = Durable(durable.store)
    workflow = changed.workflow(name="w")(steps(work, now))
    for start in (lambda: changed.run("id", workflow), lambda: changed.resume("id")):
        with pytest.raises(WorkflowDrift, match="Restore the old steps") as refused:
            start()
        assert refused.value.key == asked
        assert list(refused.value.unreached) == list(unreached)
    assert changed.resume_pending() == []  # each refusal counts as a start, and has its pause
    wake(db, "id")
    (outcome,) = changed.resume_pending()
    assert (outcome.status, type(outcome.error)) == ("failed", WorkflowDrift)
    assert work.ran == []
    assert recorded(durable) == before
    assert leases(db) == []

    durable.resume("id")
    assert work.ran == ["e"]


def recorded(durable: Durable) -> dict[str, Any]:
    """Return all that is stored of the steps of ``id``, wherever it is."""
    return {key: step.to_json() for key, step in durable.store.load("id").steps.items()}


def crashed_in_e(durable: Durable, work: Work, size: int = 0) -> None:
    """Leave a run of version 1 as ``id`` that has recorded a, b, c and d."""
    work.size, work.faults = size, {"e": Crash}
    with pytest.raises(Crash):
        durable.run("id", durable.workflow(name="w")(steps(work, "abcde")))
    work.faults = {}


def test_changed_step_of_a_thread_is_refused_too(durable: Durable, work: Work, db: DB) -> None:
    """What threads have recorded may come at any time; it is drift if it never came."""

    def fan_out(keys: str) -> Callable[[Step], list[str]]:
        def workflow(step: Step) -> list[str]:
            with ThreadPoolExecutor() as pool:
                return list(pool.map(lambda key: step(key, work, key), keys))

        return workflow

    work.faults = {"c": Crash}
    with pytest.raises(Crash):
        durable.run("id", durable.workflow(name="w")(fan_out("abc")))
    before, work.ran, work.faults = recorded(durable), [], {}
    with pytest.raises(WorkflowDrift) as refused:
        Durable(durable.store).run("id", rename(fan_out("aXc"), "w"))
    assert list(refused.value.unreached) == ["b"]
    after = recorded(durable)
    assert {key: after[key] for key in before} == before
    assert durable.store.load("id").execution.status == "running"
    assert (sorted(work.ran), leases(db)) == (["X", "c"], [])


def rename(fn: Any, name: str) -> Any:
    fn.__name__ = name
    return fn


def test_on_drift_ignore_runs_new_steps_and_keeps_the_old(
    store: SnapshotStore, durable: Durable, work: Work
) -> None:
    """Who says so may change the steps under a run; what is recorded is still not run again."""
    crashed_in_e(durable, work)
    work.ran = []
    lenient = Durable(store, on_drift="ignore")
    lenient.workflow(name="w")(steps(work, "Xbad"))
    assert lenient.resume("id") == ["X done", "b done", "a done", "d done"]
    assert work.ran == ["X"]
    assert sorted(store.load("id").steps) == ["X", "a", "b", "c", "d"]


@pytest.mark.parametrize("size", [0, LARGE])
def test_other_version_is_refused_before_anything_runs(
    durable: Durable, work: Work, db: DB, size: int
) -> None:
    """By default unfinished state of another version stays as it is, and the error says so."""
    crashed_in_e(durable, work, size)
    before, work.ran = row(db, "id"), []
    newer = Durable(durable.store)
    workflow = newer.workflow(name="w", version=2)(steps(work, "abcde"))
    for start in (lambda: newer.run("id", workflow), lambda: newer.resume("id")):
        with pytest.raises(VersionMismatch, match='on_version_mismatch="clear"') as refused:
            start()
        assert (refused.value.stored, refused.value.requested) == (1, 2)
    assert row(db, "id") == before
    steps_before = recorded(durable)
    (outcome,) = newer.resume_pending()
    assert (outcome.status, type(outcome.error)) == ("failed", VersionMismatch)
    assert newer.resume_pending() == []  # it pauses, as a failure does
    assert (work.ran, recorded(durable), leases(db)) == ([], steps_before, [])


def test_completed_output_outlives_a_new_version(durable: Durable, work: Work) -> None:
    """What is finished is not run again, whichever version finished it."""
    durable.run("id", durable.workflow(name="w")(steps(work, "ab")))
    newer = Durable(durable.store)
    assert newer.run("id", newer.workflow(name="w", version=2)(steps(work, "c"))) == [
        "a done",
        "b done",
    ]


@pytest.mark.parametrize("size", [0, LARGE])
def test_on_version_mismatch_clear_starts_afresh(
    durable: Durable, work: Work, db: DB, size: int
) -> None:
    """Nothing of the old version is left, in the snapshot or in the journal."""
    crashed_in_e(durable, work, size)
    work.ran, work.faults = [], {"g": Crash}
    newer = Durable(durable.store)
    newer.workflow(name="w", version=2, on_version_mismatch="clear")(steps(work, "efg"))
    with pytest.raises(Crash):
        newer.resume("id")
    assert work.ran == ["e", "f", "g"]
    assert sorted(newer.store.load("id").steps) == ["e", "f"]
    assert (metadata(db, "id")["version"], metadata(db, "id")["attempts"]) == (2, 1)


@pytest.mark.parametrize("size", [0, LARGE])
def test_migration_carries_recorded_steps_over(
    durable: Durable, work: Work, db: DB, size: int
) -> None:
    """A callable gets the whole state and the version wanted; the run goes on from its answer."""
    crashed_in_e(durable, work, size)
    work.ran, given = [], []

    def migrate(snapshot: WorkflowSnapshot, version: int) -> WorkflowSnapshot:
        given.append((sorted(snapshot.steps), version))
        document = snapshot.to_json()
        document["steps"]["B"] = document["steps"].pop("b")
        return WorkflowSnapshot.from_json(document)

    newer = Durable(durable.store)
    newer.workflow(name="w", version=2, on_version_mismatch=migrate)(steps(work, "aBcde"))
    assert [result.rstrip(".") for result in newer.resume("id")] == [
        "a done",
        "b done",
        "c done",
        "d done",
        "e done",
    ]
    assert (work.ran, given) == (["e"], [(["a", "b", "c", "d"], 2)])
    assert sorted(newer.store.load("id").steps) == ["B", "a", "c", "d", "e"]
    assert metadata(db, "id")["version"] == 2


@pytest.mark.parametrize("answer", ["raises", "returns None"])
def test_migration_that_fails_changes_nothing(
    durable: Durable, work: Work, db: DB, answer: str
) -> None:
    """The state is what it was, and free for another try."""
    crashed_in_e(durable, work)
    before, work.ran = recorded(durable), []

    def migrate(snapshot: WorkflowSnapshot, version: int) -> Any:
        if answer == "raises":
            raise Outage

    newer = Durable(durable.store)
    newer.workflow(name="w", version=2, on_version_mismatch=migrate)(steps(work, "abcde"))
    with pytest.raises(Outage if answer == "raises" else TypeError):
        newer.resume("id")
    assert (work.ran, recorded(durable), leases(db)) == ([], before, [])


# -- waiting, signals, cancelling ----------------------------------------------------------


def test_sleep_suspends_until_the_servers_clock_says_so(
    durable: Durable, work: Work, db: DB, slow_clock: None
) -> None:
    """The time is fixed when the step is first reached; looking early does not move it."""

    @durable.workflow
    def workflow(step: Step) -> str:
        step("a", work, "a")
        step.sleep("nap", 90)
        return step("b", work, "b")

    with pytest.raises(WorkflowSuspended) as suspended:
        durable.run("id", workflow)
    assert suspended.value.key == "nap"
    assert abs(seconds_until_due(db, "id") - 90) < 0.5
    due = metadata(db, "id")["wakeAt"]
    assert (pending(durable), leases(db)) == ([], [])
    with pytest.raises(WorkflowSuspended):
        durable.resume("id")
    assert metadata(db, "id")["wakeAt"] == due

    wake(db, "id")
    set_metadata(db, "id", "waits", '{"nap": "2000-01-01T00:00:00.000Z"}')
    assert durable.resume_pending() == [Outcome("id", "completed", "b done", None, 1)]
    assert work.ran == ["a", "b"]
    assert not {"waits", "wakeAt"} & set(metadata(db, "id"))


@pytest.mark.parametrize("value", [{"ok": [1, None]}, None, False])
@pytest.mark.parametrize("sent", ["before the run", "during the run", "after it suspended"])
def test_signal_answers_a_wait_whenever_it_is_sent(
    durable: Durable, work: Work, sent: str, value: Any
) -> None:
    """The first answer counts, survives every checkpoint meanwhile, and is replayed."""
    work.size = LARGE

    @durable.workflow
    def workflow(step: Step) -> Any:
        step("a", work, "a")
        if sent == "during the run" and work.ran == ["a"]:
            assert durable.signal("id", "go", value) is True
        for key in "bcd":
            step(key, work, key)
        answer = step.wait("go")
        step("e", work, "e")
        return answer

    durable.submit("id", workflow)
    if sent == "before the run":
        assert durable.signal("id", "go", value) is True
    work.faults = {"e": Outage}
    if sent == "after it suspended":
        with pytest.raises(WorkflowSuspended):
            durable.resume("id")
        assert pending(durable) == []
        assert durable.signal("id", "go", value) is True
        assert pending(durable) == ["id"]
    with pytest.raises(Outage):
        durable.resume("id")
    assert durable.signal("id", "go", "too late") is False
    work.faults = {}
    assert durable.resume("id") == value
    assert work.ran == ["a", "b", "c", "d", "e", "e"]


@contextmanager
def row_locked(url: str, id: str) -> Iterator[None]:
    """Hold up whoever writes the row of ``id``."""
    with psycopg.connect(url) as conn:
        conn.execute("SELECT FROM awaitly_snapshots WHERE id = %s FOR UPDATE", [id])
        yield
        conn.rollback()


def held_up(db: DB, application: str) -> int:
    query = (
        "SELECT count(*) FROM pg_stat_activity WHERE application_name = %s "
        "AND wait_event_type = 'Lock'"
    )
    return db.execute(query, [application]).fetchone()[0]


@pytest.mark.parametrize("first", ["signal", "suspension"])
def test_signal_that_races_the_suspension_is_not_lost(
    make_store: MakeStore, url: str, db: DB, background: ThreadPoolExecutor, first: str
) -> None:
    """The run has looked and found no signal; whichever is written first, it is pending then."""
    name = secrets.token_hex(8)
    durable = Durable(make_store(kwargs={"application_name": name}))
    started, go_on = threading.Event(), threading.Event()

    @durable.workflow
    def workflow(step: Step) -> Any:
        started.set()
        assert go_on.wait(30)
        return step.wait("go")

    writers: dict[str, Future[Any]] = {}
    running = background.submit(durable.run, "id", workflow)
    assert started.wait(30)
    with row_locked(url, "id"):
        for n, writer in enumerate(["signal", "suspension"][:: 1 if first == "signal" else -1], 1):
            if writer == "signal":
                writers["signal"] = background.submit(durable.signal, "id", "go", 1)
            else:
                go_on.set()
            eventually(lambda n=n: held_up(db, name) == n)
    assert writers["signal"].result(30) is True
    assert isinstance(running.exception(30), WorkflowSuspended)
    assert durable.resume_pending() == [Outcome("id", "completed", 1, None, 1)]


def test_signal_without_a_run_to_take_it_is_refused(durable: Durable, work: Work, db: DB) -> None:
    """Nobody will ever wait for it: unknown ids, completed and cancelled runs."""
    workflow = durable.workflow(name="w")(steps(work, "a"))
    durable.run("completed", workflow)
    durable.submit("cancelled", workflow)
    durable.cancel("cancelled")
    before = row(db, "completed"), row(db, "cancelled")
    assert [durable.signal(id, "a", 1) for id in ("unknown", "completed", "cancelled")] == [
        False
    ] * 3
    assert (row(db, "completed"), row(db, "cancelled")) == before


@pytest.mark.parametrize("state", ["submitted", "crashed", "failed", "suspended"])
def test_cancelled_run_is_not_resumed_any_more(
    durable: Durable, work: Work, db: DB, state: str
) -> None:
    """Its steps stay to be read, whole and in one table, until it is deleted to start afresh."""

    @durable.workflow
    def workflow(step: Step) -> Any:
        for key in "abcd":
            step(key, work, key)
        return step.wait("go") if state == "suspended" else step("e", work, "e")

    work.size, work.faults = LARGE, {"e": Crash if state == "crashed" else Outage}
    if state == "submitted":
        durable.submit("id", workflow)
    else:
        with pytest.raises((Crash, Outage, WorkflowSuspended)):
            durable.run("id", workflow)
    before, work.ran = durable.store.load("id"), []
    assert durable.cancel("id") is True
    for start in (lambda: durable.run("id", workflow), lambda: durable.resume("id")):
        with pytest.raises(WorkflowCancelled):
            start()
    wake(db, "id")
    assert (pending(durable), durable.resume_pending()) == ([], [])
    assert durable.store.load("id").steps == before.steps
    assert durable.store.load("id").execution.status == "failed"
    assert (row(db, "id")[1], leases(db), work.ran) == ([], [], [])

    durable.delete_state("id")
    work.faults = {}
    durable.submit("id", workflow)
    assert durable.signal("id", "go", 1) is True
    durable.resume("id")
    assert work.ran[:4] == ["a", "b", "c", "d"]


def test_cancel_finds_unfinished_runs_only(durable: Durable, work: Work, db: DB) -> None:
    """A completed run keeps its output; what is not there is not made."""
    workflow = durable.workflow(name="w")(steps(work, "a"))
    durable.run("id", workflow)
    before = row(db, "id")
    assert (durable.cancel("id"), durable.cancel("unknown")) == (False, False)
    assert (row(db, "id"), leases(db)) == (before, [])
    assert durable.run("id", workflow) == ["a done"]


@pytest.mark.parametrize("size", [0, LARGE])
def test_cancelled_while_it_runs_it_writes_nothing_more(
    durable: Durable, work: Work, db: DB, size: int
) -> None:
    """The step under way is not recorded, no other begins, whatever the workflow catches."""
    after_cancel = []

    def cancel_me() -> None:
        assert durable.cancel("id") is True
        after_cancel.append(row(db, "id"))

    @durable.workflow
    def workflow(step: Step) -> None:
        for key in "abcd":
            step(key, work, key)
        try:
            step("cancelled-in", cancel_me)
        except Exception:
            work.ran.append("caught")
        finally:
            step("e", work, "e")

    work.size = size
    with pytest.raises(WorkflowCancelled):
        durable.run("id", workflow)
    assert work.ran == ["a", "b", "c", "d"]
    assert [row(db, "id")] == after_cancel
    assert sorted(durable.store.load("id").steps) == ["a", "b", "c", "d"]
    assert leases(db) == []


def test_cancel_that_races_a_takeup_is_not_undone(
    make_store: MakeStore, url: str, db: DB, work: Work, background: ThreadPoolExecutor
) -> None:
    """A run that is taken up while its cancellation is being written does not go on."""
    name = secrets.token_hex(8)
    durable = Durable(make_store(kwargs={"application_name": name}))
    durable.submit("id", durable.workflow(name="w")(steps(work, "a")))
    with row_locked(url, "id"):
        cancelled = background.submit(durable.cancel, "id")
        eventually(lambda: held_up(db, name) == 1)
        running = background.submit(durable.resume, "id")
        eventually(lambda: held_up(db, name) == 2)
    assert cancelled.result(30) is True
    assert isinstance(running.exception(30), WorkflowCancelled)
    assert (leases(db), durable.get("id").steps) == ([], ())
    assert "cancelledAt" in metadata(db, "id")


# -- threads -------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, LARGE])
@pytest.mark.parametrize(("replayed", "at_once"), [("abcdefgh", 8), ("hgfedcba", 1)])
def test_threads_of_a_run_record_steps_at_the_same_time(
    durable: Durable, work: Work, replayed: str, at_once: int, size: int
) -> None:
    """Nothing is lost, doubled or mixed up, however the threads come by on the next run."""
    keys = "abcdefgh"
    finished = {key: threading.Event() for key in [*keys, "nobody"]}
    together = threading.Barrier(len(keys))
    order, workers = keys, len(keys)

    def last_first(key: str) -> str:
        together.wait(30)  # a queue in front of the steps would break it
        assert finished[dict(zip(keys, [*keys[1:], "nobody"], strict=True))[key]].wait(30)
        try:
            return work(key)
        finally:
            finished[key].set()

    @durable.workflow
    def workflow(step: Step) -> dict[str, str]:
        step("before", work, "before")
        with ThreadPoolExecutor(workers) as pool:
            futures = {key: pool.submit(step, key, last_first, key) for key in order}
        step("after", work, "after")
        return {key: future.result() for key, future in futures.items()}

    finished["nobody"].set()
    work.size, work.faults = size, {"after": Crash}
    with pytest.raises(Crash):
        durable.run("id", workflow)
    assert work.ran == ["before", *keys[::-1], "after"]
    recorded = durable.store.load("id").steps
    assert sorted(step.meta["seq"] for step in recorded.values()) == list(range(1, 10))

    work.ran, work.faults, order, workers = [], {}, replayed, at_once
    assert durable.resume("id") == {key: f"{key} done{'.' * size}" for key in keys}
    assert work.ran == ["after"]


@pytest.mark.parametrize("crash", [Crash, Outage])
def test_run_that_ends_in_a_thread_repeats_only_that_threads_step(
    durable: Durable, work: Work, crash: type[BaseException]
) -> None:
    """The other threads' steps are recorded and replayed, though the failed one came earlier."""
    others_done, all_asked = threading.Event(), threading.Barrier(3)

    def fail_then_let_others_finish(key: str) -> str:
        if work.faults:
            all_asked.wait(30)
        if key != "a":
            assert others_done.wait(30) or not work.faults
        return work(key)

    @durable.workflow
    def workflow(step: Step) -> list[str]:
        with ThreadPoolExecutor() as pool:
            futures = [pool.submit(step, key, fail_then_let_others_finish, key) for key in "abc"]
            if work.faults:
                assert futures[0].exception(30) is not None
            others_done.set()
        return [future.result() for future in futures]

    work.faults = {"a": crash}
    with pytest.raises(crash):
        durable.run("id", workflow)
    assert [key for key, step in durable.store.load("id").steps.items() if step.ok] == ["b", "c"]
    work.ran, work.faults = [], {}
    assert durable.resume("id") == ["a done", "b done", "c done"]
    assert work.ran == ["a"]


# -- codecs --------------------------------------------------------------------------------


@dataclass
class Money:
    cents: int


class TypedCodec:
    """Knows ``Money`` by the annotation and ``Decimal`` by a tag."""

    def encode(self, value: Any) -> Any:
        if isinstance(value, Money):
            return asdict(value)
        if isinstance(value, Decimal):
            return {"$decimal": str(value)}
        if isinstance(value, dict):
            return {key: self.encode(item) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [self.encode(item) for item in value]
        return value

    def decode(self, json: Any, type: Any) -> Any:
        if type is Money:
            return Money(**json)
        if isinstance(json, dict) and "$decimal" in json:
            return Decimal(json["$decimal"])
        if isinstance(json, dict):
            return {key: self.decode(item, Any) for key, item in json.items()}
        return [self.decode(item, Any) for item in json] if isinstance(json, list) else json


def double(amount: Money) -> Money:
    return Money(amount.cents * 2)


def test_codec_carries_arguments_results_signals_and_output(
    store: SnapshotStore, work: Work, db: DB
) -> None:
    """What the codec knows is itself again at once and in every later run; the rows are JSON."""
    durable = Durable(store, codec=TypedCodec())
    seen = []

    @durable.workflow
    def order(step: Step, price: Money, *, rate: Decimal) -> Money:
        seen.append((price, rate, step("double", double, price), step.wait("fee")))
        step("fragile", work, "fragile")
        return price

    durable.submit("id", order, Money(5), rate=Decimal("0.10"))
    assert durable.signal("id", "fee", [Decimal("1.50")]) is True
    work.faults = {"fragile": Outage}
    with pytest.raises(Outage):
        durable.resume("id")
    work.faults = {}
    for output in (durable.resume("id"), durable.run("id", order, Money(5), rate=Decimal("0.10"))):
        assert output == Money(5)
    assert seen == [(Money(5), Decimal("0.10"), Money(10), [Decimal("1.50")])] * 2
    assert metadata(db, "id")["output"] == {"cents": 5}
    assert store.load("id").steps["fee"].value == [{"$decimal": "1.50"}]
    with pytest.raises(WorkflowConflict):
        durable.run("id", order, Money(6), rate=Decimal("0.10"))


class BrokenCodec:
    """Fails for the values that it is told to."""

    def __init__(self) -> None:
        self.fails_to_encode: Any = object()
        self.fails_to_decode: Any = object()

    def encode(self, value: Any) -> Any:
        if value == self.fails_to_encode:
            raise Outage("no such value")
        return value

    def decode(self, json: Any, type: Any) -> Any:
        if json == self.fails_to_decode:
            raise Outage("no such JSON")
        return json


def test_codec_that_cannot_encode_records_nothing_of_it(store: SnapshotStore, work: Work) -> None:
    """The error says for which value; the workflow cannot swallow it and go on unrecorded."""
    codec = BrokenCodec()
    durable = Durable(store, codec=codec)

    @durable.workflow
    def workflow(step: Step) -> str:
        step("a", work, "a")
        with suppress(Exception):
            step("b", work, "b")
        return step("c", work, "c")

    codec.fails_to_encode = "b done"
    with pytest.raises(NotSerializable, match="the result of step 'b'") as refused:
        durable.run("id", workflow)
    assert isinstance(refused.value.__cause__, Outage)
    assert list(store.load("id").steps) == ["a"]
    codec.fails_to_encode = None
    assert durable.resume("id") == "c done"
    assert work.ran == ["a", "b", "b", "c"]


def test_codec_that_cannot_decode_loses_nothing(store: SnapshotStore, work: Work) -> None:
    """The error says which recorded value it was; the record stands and is not run again."""
    codec = BrokenCodec()
    durable = Durable(store, codec=codec)
    codec.fails_to_decode = "a done"
    durable.submit("id", durable.workflow(name="w")(steps(work, "ab")))
    for _ in range(2):
        with pytest.raises(SnapshotFormatError, match=r"steps\['a'\]\.value") as refused:
            durable.resume("id")
        assert isinstance(refused.value.__cause__, Outage)
    assert store.load("id").steps["a"].value == "a done"
    codec.fails_to_decode = None
    assert durable.resume("id") == ["a done", "b done"]
    assert work.ran == ["a", "b"]


def test_trouble_of_a_nested_run_is_a_failure_of_the_outer_one(durable: Durable) -> None:
    """Somebody else has the inner id; the outer run has failed by it, and was not skipped."""

    @durable.workflow
    def outer(step: Step) -> Any:
        return step("inner", durable.run, "inner", lambda step: None)

    durable.submit("outer", outer)
    with durable.store.lock("inner"):
        (outcome,) = durable.resume_pending()
    assert (outcome.status, type(outcome.error)) == ("failed", AlreadyRunning)
    assert durable.store.load("outer").execution.status == "failed"


def test_the_stored_traceback_shows_the_users_frames_alone(durable: Durable, db: DB) -> None:
    """Ours, between the workflow and its step, tell nobody anything."""

    def decline() -> None:
        raise ZeroDivisionError

    def order(step: Step) -> None:
        step("card", decline)

    with pytest.raises(ZeroDivisionError):
        durable.run("a", order)
    stacks = db.execute(
        "SELECT snapshot->'metadata'->'failure'->>'stack', snapshot->'steps'->'card'->'cause'->>"
        "'stack' FROM awaitly_snapshots"
    ).fetchone()
    frames = [re.findall(r"^  File .*, in (.+)$", stack, re.M) for stack in stacks]
    assert frames == [["order", "decline"], ["decline"]]
