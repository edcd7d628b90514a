"""Which failures are final: how long a failed run pauses, when it is given up and revived."""

from __future__ import annotations

import logging
import math
import os
import threading
from collections.abc import Callable
from datetime import datetime, timedelta
from typing import Any

import psycopg
import pytest

from awaitly_postgres import Durable, Event, SnapshotStore, Step, VersionMismatch
from tests.support import Proxy, run_in_the_parent

DB = psycopg.Connection


class Declined(Exception):
    """Trying again will not help."""


class Outage(Exception):
    """Trying again will."""


def pause(error: Exception, attempt: int) -> float | None:
    """A verdict as the README has it."""
    return None if isinstance(error, Declined) else 60.0 * attempt


def metadata(db: DB, id: str = "a") -> Any:
    query = "SELECT snapshot->'metadata' FROM awaitly_snapshots WHERE id = %s"
    return db.execute(query, (id,)).fetchone()[0]


def status(db: DB, id: str = "a") -> Any:
    query = "SELECT snapshot->'execution'->>'status' FROM awaitly_snapshots WHERE id = %s"
    return db.execute(query, (id,)).fetchone()[0]


def seconds_until_due(db: DB, id: str = "a") -> float:
    query = (
        "SELECT extract(epoch FROM (snapshot->'metadata'->>'wakeAt')::timestamptz - now()) "
        "FROM awaitly_snapshots WHERE id = %s"
    )
    return float(db.execute(query, (id,)).fetchone()[0])


def be_over(db: DB) -> None:
    """Let every pause and every lease be over."""
    db.execute(
        "UPDATE awaitly_snapshots SET snapshot = "
        "jsonb_set(snapshot, '{metadata,wakeAt}', '\"2000-01-01T00:00:00.000Z\"') "
        "WHERE snapshot->'metadata' ? 'wakeAt'"
    )
    db.execute("UPDATE awaitly_workflow_lock SET expires_at = '2000-01-01'")


def die(db: DB, id: str, starts: int) -> None:
    """Leave a run as processes do that were killed so often before their first step."""
    db.execute(
        "UPDATE awaitly_snapshots SET snapshot = jsonb_set(jsonb_set(snapshot, "
        "'{metadata,attempts}', to_jsonb(%s)), '{metadata,wakeAt}', '\"2000\"') WHERE id = %s",
        (starts, id),
    )


def failing(error: Exception) -> Callable[[Step], None]:
    def fail() -> None:
        raise error

    def job(step: Step) -> None:
        step("ready", str)
        step("a", fail)

    return job


# -- giving up -----------------------------------------------------------------------------


def test_a_failure_for_which_backoff_returns_none_is_final(durable: Durable, db: DB) -> None:
    """The declined card is tried once; the connection that was lost is tried again."""
    for id, error in (("a", Declined("no funds")), ("b", Outage("gone"))):
        durable.submit(id, durable.workflow(name=id, backoff=pause)(failing(error)))
    given_up, failed = durable.resume_pending()
    assert (given_up.status, str(given_up.error), given_up.attempts) == ("failed", "no funds", 1)
    assert given_up.retry_at is None
    assert "wakeAt" not in metadata(db, "a")
    assert datetime.fromisoformat(metadata(db, "a")["gaveUpAt"].replace("Z", "+00:00"))
    assert (status(db, "a"), metadata(db, "a")["failure"]["message"]) == ("failed", "no funds")
    assert (failed.status, failed.attempts) == ("failed", 1)
    assert failed.retry_at is not None
    assert "gaveUpAt" not in metadata(db, "b")
    be_over(db)
    assert [info.id for info in durable.list_pending()] == ["b"]


@pytest.mark.parametrize("length", [90, 90.0, timedelta(seconds=90)])
def test_backoff_sets_the_pause(durable: Durable, db: DB, length: Any) -> None:
    """In seconds or as a timedelta, by the server's clock; the outcome says until when."""
    asked: list[tuple[str, int]] = []

    def backoff(error: Exception, attempt: int) -> Any:
        asked.append((str(error), attempt))
        return length

    durable.submit("a", durable.workflow(name="w", backoff=backoff)(failing(Outage("gone"))))
    (outcome,) = durable.resume_pending()
    assert 80 < seconds_until_due(db) <= 90
    assert outcome.retry_at == datetime.fromisoformat(metadata(db)["wakeAt"].replace("Z", "+00:00"))
    be_over(db)
    (again,) = durable.resume_pending()
    assert again.attempts == 2
    assert asked == [("gone", 1), ("gone", 2)]


def test_the_attempt_counts_from_the_last_progress(durable: Durable) -> None:
    """What has recorded a step since is at its first attempt."""
    attempts: list[int] = []

    def job(step: Step) -> None:
        for key in "abc":
            new: list[str] = []
            step(key, new.append, key)
            if new:
                raise Outage(key)

    durable.workflow(backoff=lambda error, attempt: attempts.append(attempt) or 0)(job)
    durable.submit("a", job)
    for _ in range(3):
        durable.resume_pending()
    assert attempts == [1, 1, 1]


@pytest.mark.parametrize("own", [True, False], ids=["workflow", "durable"])
def test_the_last_of_max_attempts_is_final(store: SnapshotStore, db: DB, own: bool) -> None:
    """As the workflow says, else as the Durable does."""
    durable = Durable(store, backoff=lambda error, attempt: 0, max_attempts=7 if own else 2)
    limit: dict[str, Any] = {"max_attempts": 2} if own else {}
    durable.submit("a", durable.workflow(name="w", **limit)(failing(Outage("gone"))))
    outcomes = [outcome for _ in range(3) for outcome in durable.resume_pending()]
    # The first start records "ready", so it is the first of a new count; so is none after it.
    assert [(o.status, o.attempts, o.retry_at is None) for o in outcomes] == [
        ("failed", 1, False),
        ("failed", 2, True),
    ]
    assert "gaveUpAt" in metadata(db)


def test_max_attempts_none_tries_for_ever(store: SnapshotStore, db: DB) -> None:
    """On a workflow it overrides the number of the Durable."""
    durable = Durable(store, max_attempts=1)
    durable.submit("a", durable.workflow(name="w", max_attempts=None)(failing(Outage("gone"))))
    die(db, "a", 5000)
    (outcome,) = durable.resume_pending()
    assert (outcome.status, outcome.attempts) == ("failed", 5001)
    assert outcome.retry_at is not None


@pytest.mark.parametrize(
    "wrong", [-1, math.nan, math.inf, "soon", False, timedelta(seconds=-1), ValueError("a slip")]
)
def test_a_backoff_that_fails_is_logged_and_decides_nothing(
    durable: Durable, db: DB, caplog: pytest.LogCaptureFixture, wrong: Any
) -> None:
    """The failure is recorded all the same, and the run pauses as it does by default."""

    def backoff(error: Exception, attempt: int) -> Any:
        if isinstance(wrong, Exception):
            raise wrong
        return wrong

    durable.submit("a", durable.workflow(name="w", backoff=backoff)(failing(Outage("gone"))))
    (outcome,) = durable.resume_pending()
    assert str(outcome.error) == "gone"
    assert outcome.retry_at is not None
    assert seconds_until_due(db) <= 1
    assert metadata(db)["failure"]["message"] == "gone"
    assert "backoff failed for Outage at attempt 1" in caplog.text


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"max_attempts": 0}, ValueError),
        ({"max_attempts": "3"}, ValueError),
        ({"max_attempts": True}, ValueError),
        ({"backoff": 5}, TypeError),
    ],
)
def test_verdicts_are_checked_when_they_are_given(
    store: SnapshotStore, options: dict[str, Any], error: type[Exception]
) -> None:
    """Not when the first run fails."""
    with pytest.raises(error):
        Durable(store, **options)
    with pytest.raises(error):
        Durable(store).workflow(**options)


def test_a_run_that_was_killed_too_often_is_given_up_by_the_next_pass(
    store: SnapshotStore, db: DB
) -> None:
    """Nobody was left to record a verdict; so the resumer does, and starts nothing."""
    events: list[Event] = []
    durable = Durable(store, on_event=events.append, max_attempts=3)
    ran: list[str] = []

    @durable.workflow
    def job(step: Step) -> None:
        ran.append(str(step.workflow_id))

    durable.submit("a", job)
    die(db, "a", 3)
    assert [info.id for info in durable.list_pending()] == ["a"]
    (outcome,) = durable.resume_pending()
    assert (outcome.status, outcome.attempts, outcome.retry_at) == ("failed", 3, None)
    assert "started 3 times without progress" in str(outcome.error)
    assert (status(db), ran) == ("failed", [])
    assert "started 3 times" in metadata(db)["failure"]["message"]
    assert metadata(db).keys() & {"gaveUpAt", "wakeAt"} == {"gaveUpAt"}
    assert [event.type for event in events] == ["run_given_up"]
    assert db.execute("SELECT count(*) FROM awaitly_workflow_lock").fetchone() == (0,)
    assert durable.list_pending() == durable.resume_pending() == []


def test_what_is_given_up_unstarted_keeps_what_it_had_recorded(
    store: SnapshotStore, db: DB
) -> None:
    """Its steps, those in the journal too; its last failure is why."""
    durable = Durable(store, max_attempts=2)

    @durable.workflow
    def job(step: Step, size: int) -> str:
        for key in "ab":
            step(key, lambda: "." * size)
        if not patient:
            raise Outage("gone")
        return "done"

    patient: list[int] = []
    for id, size in (("small", 0), ("large", 5_000)):
        with pytest.raises(Outage):
            durable.run(id, job, size)
        die(db, id, 2)
    assert [outcome.status for outcome in durable.resume_pending()] == ["failed"] * 2
    for id in ("small", "large"):
        assert sorted(store.load(id).steps) == ["a", "b"]
        assert metadata(db, id)["failure"]["cause"]["message"] == "gone"
    patient.append(1)
    assert [durable.resume(id) for id in ("small", "large")] == ["done"] * 2


def test_runs_to_give_up_do_not_keep_others_from_running(store: SnapshotStore, db: DB) -> None:
    """They are the longest untouched, and the limit is one; all are dealt with in one pass."""
    durable = Durable(store, max_attempts=2)

    @durable.workflow
    def job(step: Step) -> str:
        return step("a", str)

    for nr in range(5):
        durable.submit(f"bad-{nr}", job)
        die(db, f"bad-{nr}", 2)
    durable.submit("good", job)
    outcomes = durable.resume_pending(limit=1)
    assert [(o.id, o.status) for o in outcomes[-1:]] == [("good", "completed")]
    assert [o.status for o in outcomes[:-1]] == ["failed"] * 5


def test_a_version_mismatch_comes_to_max_attempts_too(store: SnapshotStore, db: DB) -> None:
    """It is told once for each pause, and at last given up."""
    older, durable = Durable(store), Durable(store, max_attempts=2)

    def job(step: Step) -> None: ...

    older.submit("a", older.workflow(job))
    durable.workflow(version=2)(job)
    told = []
    for _ in range(4):
        told.append([(type(o.error), o.retry_at is None) for o in durable.resume_pending()])
        assert durable.resume_pending() == []  # it pauses, or is given up
        be_over(db)
    assert [[kind for kind, _ in each] == [VersionMismatch] for each in told[:2]] == [True] * 2
    assert [last for ((_, last),) in told[:3]] == [False, False, True]
    assert told[3] == []


def test_a_lost_reply_to_giving_up_is_no_surprise(
    connect: Callable[..., SnapshotStore], proxy: Proxy, db: DB
) -> None:
    """Whatever statement is lost on the way: it is given up once, and told so."""
    for nr in range(12):
        for what in ("request", "reply"):
            with connect() as store:
                durable = Durable(store, max_attempts=2)
                durable.workflow(name="w")(failing(Declined("no")))
                durable.submit("a", durable._workflows["w"].fn)
                die(db, "a", 2)
                proxy.lose(what, nr)  # type: ignore[arg-type]
                (outcome,) = durable.resume_pending()
                assert "started 2 times" in str(outcome.error), (nr, what)
                assert "gaveUpAt" in metadata(db)
                proxy.lose(what, 10**9)  # type: ignore[arg-type]
                durable.delete_state("a")


# -- coming back ---------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["resume", "try_resume", "run"])
def test_a_run_that_was_given_up_is_revived_when_asked_for(
    store: SnapshotStore, db: DB, way: str
) -> None:
    """Its steps stand, and its attempts start from none."""
    durable = Durable(store, max_attempts=2)
    ran: list[str] = []

    @durable.workflow
    def job(step: Step) -> str:
        step("a", lambda: ran.append("a"))
        if len(ran) < 2:
            raise Declined
        return "done"

    durable.workflow(name="job", backoff=pause)(job)
    with pytest.raises(Declined):
        durable.run("a", job)
    assert durable.resume_pending() == []
    ran.append("and now")
    die(db, "a", 2)
    calls: dict[str, Callable[[], Any]] = {
        "resume": lambda: durable.resume("a"),
        "try_resume": lambda: durable.try_resume("a").result,
        "run": lambda: durable.run("a", job),
    }
    assert calls[way]() == "done"
    assert ran == ["a", "and now"]
    assert metadata(db).keys().isdisjoint({"gaveUpAt", "wakeAt", "failure"})
    assert metadata(db)["attempts"] == 1


def test_a_revived_run_that_dies_is_pending_again(store: SnapshotStore, db: DB) -> None:
    """It is not given up at once for the starts that it had before."""
    durable = Durable(store, max_attempts=2)
    crash: list[type[BaseException]] = [KeyboardInterrupt]

    @durable.workflow
    def job(step: Step) -> str:
        if crash:
            raise crash.pop()
        return "done"

    durable.submit("a", job)
    die(db, "a", 2)
    assert [outcome.status for outcome in durable.resume_pending()] == ["failed"]
    with pytest.raises(KeyboardInterrupt):
        durable.resume("a")
    assert metadata(db)["attempts"] == 1
    assert "gaveUpAt" not in metadata(db)
    assert durable.resume_pending() == []  # it pauses
    be_over(db)
    assert [outcome.status for outcome in durable.resume_pending()] == ["completed"]


def test_a_run_that_is_revived_meanwhile_is_not_given_up(store: SnapshotStore, db: DB) -> None:
    """The listing is old: somebody has started it since, and may have got further."""
    durable = Durable(store, max_attempts=2)

    @durable.workflow
    def job(step: Step) -> str:
        return step("a", str)

    for id in ("a", "b"):
        durable.submit(id, job)
        die(db, id, 2)
    durable_elsewhere = Durable(store)
    durable_elsewhere.workflow(job)

    def revive(outcome: Any) -> None:
        if outcome.id == "a":
            durable_elsewhere.resume("b")

    outcomes = durable.resume_pending(on_progress=revive)
    assert [(o.id, o.status) for o in outcomes] == [("a", "failed"), ("b", "skipped")]
    assert status(db, "b") == "completed"


def test_two_that_come_to_give_up_one_run_do_it_once(
    make_store: Callable[..., SnapshotStore], db: DB
) -> None:
    """Both have seen it pending; the event and the outcome come from one of them."""
    events: list[Event] = []
    both, barrier = [], threading.Barrier(2)
    durables = [Durable(make_store(), on_event=events.append, max_attempts=2) for _ in range(2)]

    def job(step: Step) -> None: ...

    for durable in durables:
        durable.workflow(job)
    for nr in range(10):
        durables[0].submit(f"{nr}", job)
        die(db, f"{nr}", 2)

    def work(durable: Durable) -> None:
        barrier.wait(30)
        both.extend(durable.resume_pending())

    threads = [threading.Thread(target=work, args=(durable,)) for durable in durables]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(o.id for o in both if o.status == "failed") == [f"{nr}" for nr in range(10)]
    assert sorted(str(event.workflow_id) for event in events) == [f"{nr}" for nr in range(10)]


# -- what is told --------------------------------------------------------------------------


def test_giving_up_is_an_event_after_the_failure_and_a_warning(
    store: SnapshotStore, caplog: pytest.LogCaptureFixture
) -> None:
    """Both carry the error; a failure that is tried again is neither."""
    events: list[Event] = []
    durable = Durable(store, on_event=events.append, backoff=pause)
    for id, error in (("a", Declined("no funds")), ("b", Outage("gone"))):
        job = durable.workflow(name=id)(failing(error))
        with pytest.raises(type(error)):
            durable.run(id, job)
    told = [(e.type, e.workflow_id, str(e.error)) for e in events if e.type.startswith("run_")]
    assert [each for each in told if each[0] != "run_started"] == [
        ("run_failed", "a", "no funds"),
        ("run_given_up", "a", "no funds"),
        ("run_failed", "b", "gone"),
    ]
    warnings = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert [(record.name, record.levelname) for record in warnings] == [
        ("awaitly_postgres", "WARNING")
    ]
    assert "'a'" in warnings[0].getMessage()
    assert "no funds" in warnings[0].getMessage()


def test_a_child_forked_in_a_run_gives_nothing_up(durable: Durable, db: DB) -> None:
    """Nor does it tell so: the run is its parent's."""
    job = durable.workflow(name="w", max_attempts=1)

    @job
    def work(step: Step) -> str:
        pid = os.fork()
        if pid == 0:
            raise Declined
        os.waitpid(pid, 0)
        return "done"

    assert run_in_the_parent(durable, "a", work) == "done"
    assert "gaveUpAt" not in metadata(db)


# -- what others wrote ---------------------------------------------------------------------


def test_what_is_not_known_here_survives_giving_up_and_coming_back(
    store: SnapshotStore, db: DB
) -> None:
    """Fields of Node's, of a later version and of the user's, beside what version 0.1 wrote."""
    durable = Durable(store, max_attempts=2, backoff=pause)
    declined: list[int] = []

    @durable.workflow
    def job(step: Step) -> str:
        if not declined:
            declined.append(1)
            raise Declined
        return step("a", str)

    durable.submit("a", job)
    db.execute(
        "UPDATE awaitly_snapshots SET snapshot = snapshot || jsonb_build_object('later', 1, "
        "'metadata', snapshot->'metadata' || '{\"nodeOnly\": [1], \"custom\": {\"a\": 1}}')"
    )
    die(db, "a", 2)

    def keeps_all() -> bool:
        found = metadata(db)
        later = store.load("a").extra
        return (found["nodeOnly"], found["custom"], later) == ([1], {"a": 1}, {"later": 1})

    assert [outcome.status for outcome in durable.resume_pending()] == ["failed"]  # unstarted
    assert keeps_all()
    assert durable.try_resume("a").status == "failed"  # declined
    assert "gaveUpAt" in metadata(db)
    assert keeps_all()
    assert durable.try_resume("a").status == "completed"
    assert keeps_all()
