"""One bad run never keeps the others from running."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from collections.abc import Callable
from typing import Any

import psycopg
import pytest

from awaitly_postgres import (
    Durable,
    SnapshotStore,
    Step,
    StoreUnavailable,
    Workflow,
    WorkflowNotFound,
)
from tests.support import run_in_the_parent

DB = psycopg.Connection

KILLER = """
    import os, signal, sys
    from awaitly_postgres import Durable, postgres

    with postgres(sys.argv[1]) as store:
        durable = Durable(store, max_attempts=3)

        @durable.workflow
        def job(step, what):
            if what == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            if what == "exit":
                sys.exit(3)
            return step("a", str, what)

        durable.resume_pending(limit=1)
"""


def wake(db: DB) -> None:
    """Let every pause and every lease be over."""
    db.execute(
        "UPDATE awaitly_snapshots SET snapshot = "
        "jsonb_set(snapshot, '{metadata,wakeAt}', '\"2000-01-01T00:00:00.000Z\"')"
    )
    db.execute("UPDATE awaitly_workflow_lock SET expires_at = '2000-01-01'")


@pytest.mark.parametrize("end", ["kill", "exit"])
def test_a_run_that_ends_its_process_before_its_first_step_backs_off_and_is_given_up(
    durable: Durable, db: DB, url: str, end: str
) -> None:
    """It was taken first by every pass, for ever; now the good ones behind it run."""

    def job(step: Step, what: str) -> str: ...

    durable.workflow(job)
    for id, what in (("bad", end), ("good-1", "x"), ("good-2", "y")):
        durable.submit(id, job, what)

    def cron() -> None:
        script = textwrap.dedent(KILLER)
        subprocess.run([sys.executable, "-c", script, url], stderr=subprocess.DEVNULL, check=False)

    for _ in range(3):  # the bad one, then the others: it pauses
        cron()
        db.execute("UPDATE awaitly_workflow_lock SET expires_at = '2000-01-01'")
    statuses = {info.id: info.status for info in durable.store.iter()}
    assert statuses == {"bad": "running", "good-1": "completed", "good-2": "completed"}
    for _ in range(5):
        wake(db)
        cron()
    bad = durable.store.load("bad")
    assert (bad.execution.status, bad.metadata["attempts"]) == ("failed", 3)
    assert "gaveUpAt" in bad.metadata


@pytest.mark.parametrize("bad", ["saved by hand", "migration raises", "not registered", "drift"])
def test_what_cannot_start_keeps_no_other_from_running(store: SnapshotStore, bad: str) -> None:
    """Three of them, older than the good one, with a limit of three."""
    older, durable = Durable(store), Durable(store)

    def job(step: Step) -> str:
        return step("a", str) or "done"

    def other(step: Step) -> None:
        step("z", crash)

    def drifting(step: Step) -> None:
        step("y", str)
        other(step)

    def crash() -> None:
        raise KeyboardInterrupt

    def migrate(snapshot: Any, version: int) -> Any:
        raise LookupError

    version = 2 if bad == "migration raises" else 1
    durable.workflow(name="job", version=version, on_version_mismatch=migrate)(job)
    for id in ("bad-1", "bad-2", "bad-3"):
        if bad == "saved by hand":
            made = Workflow(job, name="job")
            store.save(id, made.snapshot())
        elif bad == "drift":
            with pytest.raises(KeyboardInterrupt):
                older.run(id, older.workflow(name="job")(drifting))
            older._workflows.clear()
        else:
            name = "unknown" if bad == "not registered" else "job"
            older.submit(id, older.workflow(name=name)(other))
            older._workflows.clear()
    durable.submit("good", job)
    passes = [durable.resume_pending(limit=3) for _ in range(2)]
    assert store.load("good").execution.status == "completed"
    # Each bad one has its pause; what has run nothing does not count against the limit.
    assert [outcome.id for outcome in passes[1] if outcome.id != "good"] == []
    listed = {info.id for info in durable.list_pending()}
    assert listed == set()


def test_a_row_whose_id_is_the_bare_prefix_is_passed_over(
    make_store: Callable[..., SnapshotStore], db: DB
) -> None:
    """It is no id in the store, and ends neither a pass nor a listing."""
    durable = Durable(make_store(prefix="shop:"))

    @durable.workflow
    def job(step: Step) -> str:
        return step("a", str)

    durable.submit("good", job)
    for id in ("shop:", "", f"shop:{'x' * 2000}"):
        db.execute(
            "INSERT INTO awaitly_snapshots SELECT %s, snapshot, '2000-01-01' "
            "FROM awaitly_snapshots WHERE id = 'shop:good'",
            (id,),
        )
    assert [info.id for info in durable.list_pending()] == ["good"]
    assert [outcome.status for outcome in durable.resume_pending()] == ["completed"]
    assert durable.clear_state() == 2
    assert durable.store.list() == []


@pytest.mark.parametrize("workers", [1, 2])
def test_a_session_that_the_server_ends_costs_its_run_only(
    durable: Durable, db: DB, workers: int
) -> None:
    """The database is there, so the pass goes on, and the run is due again after its pause."""

    def pay(conn: psycopg.Connection, id: str) -> None:
        if id == "a-bad":
            db.execute("SELECT pg_terminate_backend(%s)", [conn.info.backend_pid])
        conn.execute("SELECT 1")

    @durable.workflow
    def job(step: Step) -> None:
        step.transaction("pay", pay, step.workflow_id)

    for id in ("a-bad", "b", "c"):
        durable.submit(id, job)
    outcomes = {outcome.id: outcome for outcome in durable.resume_pending(workers=workers)}
    assert {id for id in outcomes if outcomes[id].status == "completed"} == {"b", "c"}
    assert isinstance(outcomes["a-bad"].error, StoreUnavailable)
    assert outcomes["a-bad"].retry_at == durable.get("a-bad").next_at
    assert not db.execute("SELECT FROM awaitly_workflow_lock").fetchall()


@pytest.mark.parametrize("setting", ["idle_in_transaction_session_timeout", "transaction_timeout"])
def test_a_transaction_that_takes_too_long_is_the_steps_own_failure(
    durable: Durable, db: DB, setting: str
) -> None:
    """It is recorded, with the exception of the driver, and retried after a pause."""
    if setting == "transaction_timeout" and db.info.server_version < 170000:
        pytest.skip("PostgreSQL 17 brought transaction_timeout")

    def slow(conn: psycopg.Connection) -> None:
        conn.execute(f"SET LOCAL {setting} = 20")
        while conn.info.backend_pid in {
            pid for (pid,) in db.execute("SELECT pid FROM pg_stat_activity")
        }:
            pass
        conn.execute("SELECT 1")

    @durable.workflow
    def job(step: Step) -> None:
        step.transaction("slow", slow)

    durable.submit("a", job)
    (outcome,) = durable.resume_pending()
    info = durable.get("a")
    assert outcome.status == "failed"
    assert info.state == "retrying"
    assert isinstance(info.steps[0].error, psycopg.Error)
    assert info.steps[0].error.sqlstate in ("25P03", "25P04")


def test_a_run_that_got_further_starts_a_new_count(store: SnapshotStore, db: DB) -> None:
    """Whether its steps are in the snapshot or in the journal."""
    durable = Durable(store, max_attempts=3)
    for id, size in (("small", 0), ("large", 5_000)):
        durable.workflow(name=id)(job := counting(size))
        durable.submit(id, job)
        for _ in range(6):
            with pytest.raises(KeyboardInterrupt):
                durable.resume(id)
        assert id in {info.id for info in durable.list_pending()}
        assert len(store.load(id).steps) == 6


def counting(size: int) -> Callable[[Step], None]:
    """Make a workflow that dies after each new step."""

    def job(step: Step) -> None:
        for nr in range(100):
            step.idempotency_key(f"{nr}")
            new = []
            step(f"{nr}", lambda new=new: new.append(1) or "." * size)
            if new:
                raise KeyboardInterrupt

    return job


def test_arguments_are_checked_when_they_are_given(durable: Durable) -> None:
    """At once, not at night; nothing is stored."""

    @durable.workflow
    def job(step: Step, user: str, *, amount: int = 1) -> str:
        return step("a", str, user)

    wrong: list[tuple[Any, Any]] = [((), {}), (("u", 2), {}), (("u",), {"sum": 1})]
    for args, kwargs in wrong:
        for call in (durable.run, durable.submit):
            with pytest.raises(TypeError):
                call("a", job, *args, **kwargs)
    assert not durable.has_state("a")


@pytest.mark.parametrize("fn", [print, lambda step: None])
def test_a_function_that_is_not_registered_is_not_accepted(durable: Durable, fn: Any) -> None:
    """Nothing could ever resume it, and it would sit there as due."""
    with pytest.raises((WorkflowNotFound, TypeError)):
        durable.submit("a", fn)
    assert not durable.has_state("a")


def test_a_bound_method_is_recognised(durable: Durable) -> None:
    """It is another object each time it is asked for."""

    class Shop:
        def checkout(self, step: Step, user: str) -> str:
            return step("greet", "hello {}".format, user)

    shop = Shop()
    durable.workflow(name="checkout", version=3)(shop.checkout)
    assert durable.run("a", shop.checkout, "ada") == "hello ada"
    metadata = durable.store.load("a").metadata
    assert (metadata["workflow"], metadata["version"]) == ("checkout", 3)
    assert durable.submit("b", shop.checkout, "bob")
    (outcome,) = durable.resume_pending()
    assert outcome.result == "hello bob"


def test_a_child_forked_in_a_step_ends_nothing_of_its_parents(
    durable: Durable, db: DB, capfd: pytest.CaptureFixture[str]
) -> None:
    """However it leaves: by returning, an exception, ``sys.exit``, out of a transaction too."""
    db.execute("CREATE TABLE payments (way text)")

    def fork_and(way: str) -> str:
        pid = os.fork()
        if pid == 0:
            os.environ["CHILD"] = way
            if way == "raise":
                raise LookupError
            if way == "exit":
                sys.exit(0)
            return "child"
        os.waitpid(pid, 0)
        return "parent"

    def pay(conn: DB, way: str) -> str:
        conn.execute("INSERT INTO payments VALUES (%s)", (way,))
        return fork_and(way)

    @durable.workflow
    def work(step: Step) -> list[str]:
        done = [step(f"step {way}", fork_and, way) for way in ("return", "raise", "exit")]
        done += [step.transaction(f"tx {w}", pay, w) for w in ("return", "raise", "exit")]
        return [*done, step("last", str)]

    assert run_in_the_parent(durable, "a", work) == ["parent"] * 6 + [""]
    assert db.execute("SELECT count(*) FROM payments").fetchone() == (3,)
    snapshot = durable.store.load("a")
    assert (snapshot.execution.status, len(snapshot.steps)) == ("completed", 7)


def test_an_input_that_is_none_of_ours_is_not_pending(durable: Durable, db: DB) -> None:
    """Nothing could start the run, so it must not stand at the head of the queue."""

    @durable.workflow
    def job(step: Step) -> str:
        return step("a", str)

    durable.submit("a", job)
    durable.submit("b", job)
    db.execute(
        "UPDATE awaitly_snapshots SET snapshot = "
        "jsonb_set(snapshot, '{metadata,input,more}', '1') WHERE id = 'a'"
    )
    assert [info.id for info in durable.list_pending()] == ["b"]


def test_a_run_that_cannot_be_taken_up_counts_against_no_limit(durable: Durable, db: DB) -> None:
    """Its start is not counted either, so it stays where it is in the queue."""

    @durable.workflow
    def job(step: Step) -> str:
        return step("a", str)

    for id in ("a", "b"):
        durable.submit(id, job)
    db.execute(
        "CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$BEGIN RAISE 'no'; END$$"
    )
    db.execute(
        "CREATE TRIGGER refuse BEFORE UPDATE ON awaitly_snapshots FOR EACH ROW "
        "WHEN (OLD.id = 'a') EXECUTE FUNCTION refuse()"
    )
    outcomes = durable.resume_pending(limit=1)
    assert [(outcome.id, outcome.status) for outcome in outcomes] == [
        ("a", "failed"),
        ("b", "completed"),
    ]
