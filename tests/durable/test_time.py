"""Time: a wait that times out, a sleep until a moment, a run that is submitted for later."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from datetime import datetime, timedelta, timezone
from functools import partial
from typing import Any

import psycopg
import pytest

from awaitly_postgres import (
    Durable,
    Event,
    LeaseLost,
    SnapshotStore,
    Step,
    StoreUnavailable,
    WaitTimedOut,
    Workflow,
    WorkflowSuspended,
)
from awaitly_postgres.durable.checkpoints import Checkpoints
from awaitly_postgres.store.database import Backoff
from awaitly_postgres.testing import pass_time
from tests.support import Proxy, eventually

DB = psycopg.Connection
MakeStore = Callable[..., SnapshotStore]
PAST = "2000-01-01T00:00:00.000Z"


def metadata(db: DB, id: str = "a") -> Any:
    query = "SELECT snapshot->'metadata' FROM awaitly_snapshots WHERE id = %s"
    return db.execute(query, (id,)).fetchone()[0]


def steps(durable: Durable, id: str = "a") -> dict[str, Any]:
    return durable.store.load(id).to_json()["steps"]


def let_it_come(db: DB, id: str = "a") -> None:
    """Move everything that the run waits for into the past."""
    db.execute(
        """
        UPDATE awaitly_snapshots SET snapshot = jsonb_set(
            snapshot, '{metadata}', (snapshot->'metadata')
                || jsonb_build_object('wakeAt', %(past)s::text)
                || COALESCE((
                    SELECT jsonb_object_agg(name, (
                        SELECT jsonb_object_agg(key, %(past)s::text)
                        FROM jsonb_each(snapshot->'metadata'->name)
                    ))
                    FROM unnest(ARRAY['waits', 'sleeps', 'deadlines']) AS name
                    WHERE snapshot->'metadata'->name <> '{}'
                ), '{}')
        ) WHERE id = %(id)s
        """,
        {"id": id, "past": PAST},
    )


def seconds_until(db: DB, name: str, id: str = "a") -> float:
    query = (
        "SELECT extract(epoch FROM (snapshot->'metadata'->>%s)::timestamptz - updated_at) "
        "FROM awaitly_snapshots WHERE id = %s"
    )
    return float(db.execute(query, (name, id)).fetchone()[0])


def at_start_of(key: str, act: Callable[[], object]) -> Callable[[Event], None]:
    """An ``on_event`` that does this when a step or a wait starts."""

    def on_event(event: Event) -> None:
        if (event.type, event.key) == ("step_started", key):
            act()

    return on_event


def hold_at(durable: Durable, key: str) -> tuple[threading.Event, threading.Event]:
    """Hold runs where a step or a wait starts; return what tells so and what lets them go on."""
    began, gate = threading.Event(), threading.Event()

    def hold() -> None:
        began.set()
        assert gate.wait(30)

    durable.on_event = at_start_of(key, hold)
    return began, gate


def ask(step: Step, timeout: float | None = 3600, size: int = 0) -> Any:
    """Ask for an answer, and go on without one."""
    step("before", lambda: "." * size)
    try:
        answer = step.wait("answer", timeout=timeout)
    except WaitTimedOut:
        answer = "nobody answered"
    return [answer, step("after", str)]


def insist(step: Step, timeout: float = 3600) -> Any:
    return step.wait("answer", timeout=timeout)


# -- a wait with a timeout -----------------------------------------------------------------


def test_a_signal_in_time_is_returned(durable: Durable, db: DB) -> None:
    """The run is due when it comes, not before; it counts though the run comes late."""
    durable.workflow(ask)
    durable.submit("a", ask)
    assert [o.status for o in durable.resume_pending()] == ["suspended"]
    assert 3590 < seconds_until(db, "wakeAt") <= 3600
    assert metadata(db)["waits"] == metadata(db)["deadlines"]
    assert (info := durable.get("a")) is not None
    assert (info.state, info.waits_for) == ("waiting", ("answer",))
    assert durable.resume_pending() == []
    assert durable.signal("a", "answer", "yes")
    let_it_come(db)
    assert [o.result for o in durable.resume_pending()] == [["yes", ""]]
    assert "deadlines" not in metadata(db)


def test_a_wait_that_times_out_raises_and_the_workflow_goes_on(durable: Durable, db: DB) -> None:
    """It is recorded as the failure of the step."""
    durable.workflow(ask)
    durable.submit("a", ask)
    durable.resume_pending()
    let_it_come(db)
    assert [o.result for o in durable.resume_pending()] == [["nobody answered", ""]]
    step = steps(durable)["answer"]
    assert (step["ok"], step["error"], step["meta"]["timedOut"]) == (False, "WaitTimedOut", True)
    assert durable.run("a", ask) == ["nobody answered", ""]


def test_a_signal_after_the_deadline_is_refused(durable: Durable, db: DB) -> None:
    """Before cron has noticed, while it is noticing, and for ever after."""
    answers: list[bool] = []

    def answer() -> None:
        if is_late:
            answers.append(durable.signal("a", "answer", "late"))

    @durable.workflow
    def job(step: Step) -> None:
        answer()
        try:
            step.wait("answer", timeout=timedelta(hours=1))
        except WaitTimedOut:
            answer()
        step("after", answer)

    is_late: list[bool] = []
    durable.submit("a", job)
    durable.resume_pending()
    let_it_come(db)
    is_late.append(True)
    answer()
    assert durable.signal("a", "another", "in time") is True
    assert [o.status for o in durable.resume_pending()] == ["completed"]
    answer()
    assert answers == [False] * 5


def test_a_timeout_that_was_recorded_is_decided(durable: Durable, db: DB) -> None:
    """The process dies right after it: the next start is told the same, though somebody answers."""
    durable.workflow(ask)
    durable.submit("a", ask)
    durable.resume_pending()
    let_it_come(db)

    def die() -> None:
        raise KeyboardInterrupt

    durable.on_event = at_start_of("after", die)
    with pytest.raises(KeyboardInterrupt):
        durable.resume("a")
    durable.on_event = None
    assert "after" not in steps(durable)
    recorded = steps(durable)["answer"]
    assert durable.signal("a", "answer", "yes") is False
    # Not even where the row has lost its deadline, or the clock of another server is behind.
    db.execute("UPDATE awaitly_snapshots SET snapshot = snapshot #- '{metadata,deadlines}'")
    assert durable.signal("a", "answer", "yes") is False
    assert durable.resume("a") == ["nobody answered", ""]
    assert steps(durable)["answer"] == recorded


def test_a_timeout_stays_decided_while_another_thread_records(durable: Durable) -> None:
    """What it writes first on resuming has the timeout in it, though nothing came after that."""
    recorded, told = threading.Event(), threading.Event()
    crash = [True]

    @durable.workflow
    def job(step: Step) -> Any:
        with ThreadPoolExecutor(1) as pool:
            if not crash:
                other = pool.submit(step, "other", str)
                assert other.result(30) == ""
                recorded.set()
                assert told.wait(30)
            try:
                return step.wait("answer", timeout=0)
            except WaitTimedOut:
                if crash:
                    raise KeyboardInterrupt from None
                return "nobody answered"

    with pytest.raises(KeyboardInterrupt):
        durable.run("a", job)
    crash.clear()
    with ThreadPoolExecutor(1) as pool:
        run = pool.submit(durable.resume, "a")
        assert recorded.wait(30)
        answered = durable.signal("a", "answer", "yes")
        told.set()
        assert (answered, run.result(30)) == (False, "nobody answered")


def test_a_timeout_that_nobody_catches_is_final(store: SnapshotStore, db: DB) -> None:
    """The run is given up whatever backoff would say, and is told so."""
    events: list[Event] = []
    asked: list[Any] = []
    durable = Durable(store, on_event=events.append, backoff=lambda *it: asked.append(it) or 1)
    durable.workflow(insist)
    durable.submit("a", insist)
    durable.resume_pending()
    let_it_come(db)
    events.clear()
    (outcome,) = durable.resume_pending()
    assert (outcome.status, outcome.retry_at) == ("failed", None)
    assert isinstance(outcome.error, WaitTimedOut)
    assert (outcome.error.id, outcome.error.key) == ("a", "answer")
    assert "gaveUpAt" in metadata(db)
    assert [event.type for event in events[-2:]] == ["run_failed", "run_given_up"]
    assert [e.key for e in events if e.type == "step_failed"] == ["answer"]
    assert (asked, durable.list_pending()) == ([], [])
    assert [info.state for info in durable.list(state="failed")] == ["failed"]
    with pytest.raises(WaitTimedOut):
        durable.resume("a")  # decided
    with pytest.raises(WaitTimedOut):
        durable.result("a", timeout=0)


def test_a_rewind_to_a_wait_that_timed_out_waits_again(durable: Durable, db: DB) -> None:
    """With a new deadline, and signals are taken again."""
    durable.workflow(insist)
    durable.submit("a", insist)
    durable.resume_pending()
    let_it_come(db)
    durable.resume_pending()
    assert durable.rewind("a", "answer") == ["answer"]
    assert [o.status for o in durable.resume_pending()] == ["suspended"]
    assert 3590 < seconds_until(db, "wakeAt") <= 3600
    assert durable.signal("a", "answer", "yes")
    assert [o.result for o in durable.resume_pending()] == ["yes"]


def test_a_timeout_of_another_run_is_a_failure_like_any_other(durable: Durable, db: DB) -> None:
    """The run in which it was raised can be tried again: that of the other may be rewound."""

    @durable.workflow
    def parent(step: Step) -> None:
        step("child", durable.run, "child", insist, 0)

    durable.submit("a", parent)
    (outcome,) = durable.resume_pending()
    assert isinstance(outcome.error, WaitTimedOut)
    assert outcome.retry_at is not None
    assert "gaveUpAt" in metadata(db, "child")


def test_the_deadline_is_that_of_the_first_start(durable: Durable, db: DB) -> None:
    """Starts in between do not move it, nor does a timeout that a deploy has changed."""
    timeout = [3600.0]

    @durable.workflow
    def job(step: Step) -> Any:
        return step.wait("answer", timeout=timeout[0])

    durable.submit("a", job)
    for timeout[0] in (3600.0, 7200.0, 1.0):
        assert durable.try_resume("a").status == "suspended"
        assert durable.try_resume("a").status == "suspended"
    deadline = metadata(db)["deadlines"]
    assert deadline == metadata(db)["waits"]
    assert metadata(db)["wakeAt"] == deadline["answer"]
    assert seconds_until(db, "wakeAt") > 3500


@pytest.mark.parametrize("now", ["a wait", "a sleep"])
def test_code_that_has_no_timeout_any_more_forgets_the_deadline(
    durable: Durable, db: DB, now: str
) -> None:
    """A wait without one is answered after the old deadline; a sleep begins anew."""
    changed: list[bool] = []

    @durable.workflow
    def job(step: Step) -> Any:
        if not changed:
            return step.wait("key", timeout=60)
        return step.wait("key") if now == "a wait" else step.sleep("key", 600)

    durable.submit("a", job)
    durable.resume_pending()
    let_it_come(db)
    changed.append(True)
    for _ in range(2):
        assert durable.try_resume("a").status == "suspended"
        assert "deadlines" not in metadata(db)
    if now == "a wait":
        assert durable.signal("a", "key", "yes")
    else:
        assert 590 < seconds_until(db, "wakeAt") <= 600
        let_it_come(db)
    assert [o.status for o in durable.resume_pending()] == ["completed"]


def test_only_the_servers_clock_counts(durable: Durable, db: DB, slow_clock: None) -> None:
    """Ours is a day behind: nothing is late for it, and nothing early."""
    durable.workflow(ask)
    durable.submit("a", ask)
    durable.resume_pending()
    assert 3590 < seconds_until(db, "wakeAt") <= 3600
    let_it_come(db)
    now = "to_char(now() AT TIME ZONE 'UTC', 'YYYY-MM-DD\"T\"HH24:MI:SS.MS\"Z\"')"
    db.execute(
        "UPDATE awaitly_snapshots SET snapshot = jsonb_set(snapshot, "
        f"'{{metadata,deadlines,answer}}', to_jsonb({now}))"
    )
    assert durable.signal("a", "answer", "late") is False
    assert [o.result for o in durable.resume_pending()] == [["nobody answered", ""]]
    durable.with_options(delay=600).submit("b", ask)
    assert 599 < seconds_until(db, "wakeAt", "b") < 601


def test_a_wait_in_memory_times_out_too() -> None:
    """By this process's clock; its snapshot knows until when."""
    run = Workflow(ask)
    with pytest.raises(WorkflowSuspended):
        run(3600)
    document = run.snapshot().to_json()
    assert document["metadata"]["deadlines"].keys() == {"answer"}
    document["metadata"]["deadlines"] = document["metadata"]["waits"] = {"answer": PAST}
    later = Workflow(ask, snapshot=document)  # type: ignore[arg-type]
    assert later(3600) == ["nobody answered", ""]
    assert Workflow(ask, snapshot=later.snapshot())(3600) == ["nobody answered", ""]


@pytest.mark.parametrize("timeout", [-1, float("nan"), 1e9, timedelta(seconds=-1), "soon"])
def test_a_timeout_is_a_sensible_time(timeout: Any) -> None:
    with pytest.raises((ValueError, TypeError)):
        Workflow(ask)(timeout)


# -- a signal that races its timeout -------------------------------------------------------


def is_waiting_for(db: DB, text: str) -> bool:
    """Whether a statement with this in it waits for a lock."""
    query = (
        "SELECT count(*) FROM pg_stat_activity "
        "WHERE wait_event_type = 'Lock' AND query LIKE %s AND pid <> pg_backend_pid()"
    )
    return bool(db.execute(query, (f"%{text}%",)).fetchone()[0])


# Of the statements that are to meet at one row.
EXPIRING, SIGNALLING = "AS answered", "{metadata,signals}', COALESCE"


@pytest.mark.parametrize("size", [0, 5_000], ids=["rewritten", "journal"])
@pytest.mark.parametrize("sent", [True, False])
def test_a_timeout_waits_for_the_signal_that_is_being_sent(
    durable: Durable, store: SnapshotStore, db: DB, url: str, size: int, sent: bool
) -> None:
    """Uncommitted, it can be seen by nobody; if it is committed it was first."""
    durable.workflow(ask)
    began, gate = hold_at(durable, "answer")
    with psycopg.connect(url) as other, ThreadPoolExecutor(1) as pool:
        run = pool.submit(durable.run, "a", ask, 0, size)
        assert began.wait(30)
        signal = {"id": "a", "key": "answer", "value": '"yes"'}
        assert other.execute(store._sql.signal, signal).rowcount == 1
        gate.set()
        eventually(lambda: is_waiting_for(db, EXPIRING), "the timeout")
        if sent:
            other.commit()
        else:
            other.rollback()
        assert run.result(30) == ["yes" if sent else "nobody answered", ""]
    assert steps(durable).keys() == {"before", "answer", "after"}
    assert steps(durable)["answer"]["ok"] is sent


@pytest.mark.parametrize("first", ["timeout", "signal"])
def test_of_a_timeout_and_a_signal_that_wait_for_the_row_the_first_decides(
    durable: Durable, make_store: MakeStore, db: DB, url: str, first: str
) -> None:
    """Somebody has locked it; when they let go, the second sees what the first has written."""
    durable.workflow(ask)
    elsewhere = Durable(make_store())
    began, gate = hold_at(durable, "answer")
    with psycopg.connect(url) as blocker, ThreadPoolExecutor(2) as pool:
        run = pool.submit(durable.run, "a", ask, 0)
        assert began.wait(30)
        blocker.execute("SELECT FROM awaitly_snapshots FOR UPDATE")
        if first == "timeout":
            gate.set()
            eventually(lambda: is_waiting_for(db, EXPIRING), "the timeout")
        answered = pool.submit(elsewhere.signal, "a", "answer", "yes")
        eventually(lambda: is_waiting_for(db, SIGNALLING), "the signal")
        if first == "signal":
            gate.set()
            eventually(lambda: is_waiting_for(db, EXPIRING), "the timeout")
        blocker.rollback()
        won = first == "signal"
        assert answered.result(30) is won
        assert run.result(30) == ["yes" if won else "nobody answered", ""]


def test_signals_and_timeouts_of_many_runs_agree(make_store: MakeStore) -> None:
    """Who was told that the answer is taken finds it in the result, and nobody else does."""
    durable = Durable(make_store(max_size=4))
    durable.workflow(ask)
    elsewhere = Durable(make_store(max_size=4))
    won = 0
    with ThreadPoolExecutor(2) as pool:
        for nr in range(150):
            barrier = threading.Barrier(2)

            def answer(id: str, barrier: threading.Barrier = barrier) -> bool:
                barrier.wait(30)
                return elsewhere.signal(id, "answer", "yes")

            durable.on_event = at_start_of("answer", partial(barrier.wait, 30))
            run = pool.submit(durable.run, f"{nr}", ask, 0, 3_000 * (nr % 2))
            taken = pool.submit(answer, f"{nr}").result(30)
            assert run.result(30) == ["yes" if taken else "nobody answered", ""]
            won += taken
    assert 0 <= won <= 150


@pytest.mark.parametrize("what", ["request", "reply"])
def test_a_timeout_survives_any_lost_statement(
    connect: Callable[..., SnapshotStore], proxy: Proxy, store: SnapshotStore, what: Any
) -> None:
    """It is recorded once, and who answers afterwards is refused."""
    elsewhere = Durable(store)
    for nr in range(12):
        with connect() as ours:
            durable = Durable(ours)
            proxy.lose(what, nr)
            assert durable.run(f"{nr}", ask, 0, 3_000 * (nr % 2)) == ["nobody answered", ""]
            proxy.lose(what, 10**9)
        assert steps(elsewhere, f"{nr}")["answer"]["meta"]["timedOut"]


@pytest.mark.parametrize("size", [0, 5_000], ids=["rewritten", "journal"])
def test_what_another_thread_writes_after_a_lost_reply_does_not_undo_the_timeout(
    make_store: MakeStore, db: DB, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    """The timeout landed, nobody knows; a step is recorded, somebody answers, and then it is sent
    again. The answer was refused."""
    durable, elsewhere = Durable(make_store()), Durable(make_store())
    lost, written = threading.Event(), threading.Event()
    told: list[bool] = []
    rewrite = Checkpoints._rewrite

    def lose_a_reply(self: Checkpoints, conn: DB, expired: str | None = None) -> bool:
        before = self.written
        done = rewrite(self, conn, expired)
        if lost.is_set():
            written.set()
        elif expired:
            self.written = before.trying_rewrite()  # as far as is known without the reply
            lost.set()
            raise psycopg.OperationalError("the reply is lost")
        return done

    def pause(self: Backoff) -> bool:
        """Before the timeout is sent again."""
        assert written.wait(30)
        told.append("answer" in steps(durable))
        told.append(elsewhere.signal("a", "answer", "yes"))
        return True

    @durable.workflow
    def job(step: Step) -> Any:
        step("before", lambda: "." * size)
        with ThreadPoolExecutor(1) as pool:
            future = pool.submit(step, "other", lambda: lost.wait(30))
            try:
                return step.wait("answer", timeout=0)
            except WaitTimedOut:
                assert future.result(30)
                return "nobody answered"

    monkeypatch.setattr(Checkpoints, "_rewrite", lose_a_reply)
    monkeypatch.setattr(Backoff, "pause", pause)
    assert durable.run("a", job) == "nobody answered"
    assert told == [False, False]  # the other step was written without it, and the answer refused
    assert steps(durable)["answer"]["meta"]["timedOut"]


def test_a_run_whose_lease_was_taken_records_no_timeout(durable: Durable, db: DB) -> None:
    """Nor does it come to a decision that another process may make differently."""

    @durable.workflow
    def job(step: Step) -> Any:
        if taken:
            return step.wait("answer", timeout=0)
        db.execute("UPDATE awaitly_workflow_lock SET owner_token = 'another:1:0'")
        taken.append(1)
        return step.wait("answer", timeout=0)

    taken: list[int] = []
    with pytest.raises(LeaseLost):
        durable.run("a", job)
    assert steps(durable) == {}
    db.execute("DELETE FROM awaitly_workflow_lock")
    assert durable.signal("a", "answer", "yes")
    assert durable.resume("a") == "yes"


def test_an_outage_at_the_deadline_travels_past_except_exception(
    connect: Callable[..., SnapshotStore], proxy: Proxy, store: SnapshotStore
) -> None:
    """It is no timeout, so the workflow must not go on without an answer."""
    with connect(retry_for=0.2) as ours:
        durable = Durable(ours)

        @durable.workflow
        def job(step: Step) -> Any:
            proxy.cut()
            try:
                return step.wait("answer", timeout=0)
            except Exception:
                return "nobody answered"

        with pytest.raises(StoreUnavailable):
            durable.run("a", job)
    assert steps(Durable(store)) == {}


# -- sleeping until a moment ---------------------------------------------------------------


def test_a_sleep_until_a_moment(durable: Durable, db: DB) -> None:
    """In any time zone; the run is due then, and the first moment that was given counts."""
    zone = timezone(timedelta(hours=9))
    moments = [datetime(2999, 7, 1, 9, tzinfo=zone), datetime(2999, 8, 1, tzinfo=zone)]

    @durable.workflow
    def job(step: Step) -> str:
        step.sleep("nap", until=moments[0])
        return "awake"

    durable.submit("a", job)
    for _ in range(2):
        assert durable.try_resume("a").status == "suspended"
        assert metadata(db)["wakeAt"] == "2999-07-01T00:00:00.000Z"
        moments.reverse()
    let_it_come(db)
    assert [o.result for o in durable.resume_pending()] == ["awake"]


def test_a_moment_that_is_over_is_no_sleep(durable: Durable) -> None:
    @durable.workflow
    def job(step: Step) -> str:
        step.sleep("nap", until=datetime(2000, 1, 1, tzinfo=timezone.utc))
        return "awake"

    assert durable.run("a", job) == "awake"


@pytest.mark.parametrize(
    ("given", "error"),
    [
        ({"until": datetime(2999, 1, 1)}, ValueError),  # noqa: DTZ001
        ({"until": datetime.max.replace(tzinfo=timezone(-timedelta(hours=9)))}, ValueError),
        ({"until": "2999-01-01T00:00:00Z"}, TypeError),
        ({"until": 5}, TypeError),
        ({"duration": 5, "until": datetime(2999, 1, 1, tzinfo=timezone.utc)}, TypeError),
        ({}, TypeError),
    ],
)
def test_a_sleep_takes_a_duration_or_an_aware_moment(
    given: dict[str, Any], error: type[Exception]
) -> None:
    """A naive datetime would be another moment on another machine."""
    with pytest.raises(error):
        Workflow(lambda step: step.sleep("nap", **given))()


def test_the_end_of_a_sleep_survives_what_another_thread_writes(durable: Durable, db: DB) -> None:
    """It is reached again, another step is recorded, and the process dies: it ends as before."""
    again: list[bool] = []

    @durable.workflow
    def job(step: Step) -> None:
        if again:
            slept = threading.Event()

            def other() -> str:
                assert slept.wait(30)
                return "other"

            with ThreadPoolExecutor(1) as pool:
                future = pool.submit(step, "other", other)
                try:
                    step.sleep("nap", 3600)
                finally:
                    slept.set()
                    future.result(30)
                    raise KeyboardInterrupt
        step.sleep("nap", 3600)

    durable.submit("a", job)
    durable.resume_pending()
    end = metadata(db)["waits"]["nap"]
    again.append(True)
    with pytest.raises(KeyboardInterrupt):
        durable.resume("a")
    assert "other" in steps(durable)
    assert metadata(db)["sleeps"] == {"nap": end}


# -- a run for later -----------------------------------------------------------------------


@pytest.mark.parametrize(
    "when",
    [{"delay": 600}, {"delay": timedelta(minutes=10)}, {"at": "in ten minutes"}],
    ids=["seconds", "timedelta", "at"],
)
def test_a_run_that_is_submitted_for_later_is_not_taken_up_before(
    durable: Durable, db: DB, when: dict[str, Any]
) -> None:
    """Then it is like any other."""
    if "at" in when:
        when = {"at": datetime.now(timezone(timedelta(hours=2))) + timedelta(minutes=10)}
    durable.workflow(greet)
    assert durable.with_options(**when).submit("a", greet, "ada")
    assert durable.with_options(**when).submit("a", greet, "ada") is False
    assert 590 < seconds_until(db, "wakeAt") <= 610
    assert (durable.list_pending(), durable.resume_pending()) == ([], [])
    assert (info := durable.get("a")) is not None
    assert (info.state, info.attempts) == ("waiting", 0)
    assert info.next_at is not None
    let_it_come(db)
    assert [(o.result, o.attempts) for o in durable.resume_pending()] == [("hello ada", 1)]
    assert "wakeAt" not in metadata(db)


def greet(step: Step, name: str) -> str:
    return step("greet", "hello {}".format, name)


def test_a_run_for_later_joins_the_callers_transaction(durable: Durable, url: str, db: DB) -> None:
    """Its delay counts from the submit, by the server's clock."""
    durable.workflow(greet)
    for end in ("rollback", "commit"):
        with psycopg.connect(url) as conn:
            assert durable.with_options(delay=600).submit("a", greet, "ada", conn=conn)
            getattr(conn, end)()
        assert durable.has_state("a") is (end == "commit")
    assert 599 < seconds_until(db, "wakeAt") <= 600


def test_a_run_for_later_can_be_run_at_once(durable: Durable, db: DB) -> None:
    """Like one that sleeps or pauses: who asks for it by its id does not wait."""
    durable.workflow(greet)
    durable.with_options(at=datetime(2999, 1, 1, tzinfo=timezone.utc)).submit("a", greet, "ada")
    assert durable.run("a", greet, "ada") == "hello ada"


@pytest.mark.parametrize("when", [{"delay": 0}, {"at": datetime(2999, 1, 1, tzinfo=timezone.utc)}])
def test_run_refuses_to_be_late(durable: Durable, when: dict[str, Any]) -> None:
    """It starts at once, so a delay would be lost without a word."""
    with pytest.raises(TypeError, match=r"submit\(\)"):
        durable.with_options(**when).run("a", greet, "ada")
    assert not durable.has_state("a")


@pytest.mark.parametrize(
    ("when", "error"),
    [
        ({"delay": -1}, ValueError),
        ({"delay": 1e10}, ValueError),
        ({"delay": "5"}, TypeError),
        ({"at": datetime(2999, 1, 1)}, ValueError),  # noqa: DTZ001
        ({"at": 5}, TypeError),
        ({"delay": 5, "at": datetime(2999, 1, 1, tzinfo=timezone.utc)}, TypeError),
    ],
)
def test_a_delay_is_a_sensible_time(
    durable: Durable, when: dict[str, Any], error: type[Exception]
) -> None:
    with pytest.raises(error):
        durable.with_options(**when)


def test_options_for_one_run_share_all_the_rest(store: SnapshotStore, db: DB) -> None:
    """The store and the workflows, those registered later too; the original stays as it is."""
    durable = Durable(store, metadata={"shop": "eu", "tier": 1})
    for_ada = durable.with_options(metadata={"user": "ada", "tier": 2})
    durable.workflow(greet)
    assert for_ada.submit("a", greet, "ada")
    assert for_ada.with_options(delay=600).submit("b", greet, "bob")
    assert durable.submit("c", greet, "cid")
    expected = {"shop": "eu", "tier": 2, "user": "ada"}
    assert [metadata(db, id)["custom"] for id in "ab"] == [expected] * 2
    assert metadata(db, "c")["custom"] == {"shop": "eu", "tier": 1}
    assert [o.id for o in for_ada.resume_pending()] == ["a", "c"]
    assert for_ada.store is durable.store


# -- in the caller's transaction -----------------------------------------------------------


@pytest.mark.parametrize("kept", [True, False], ids=["committed", "rolled back"])
def test_a_signal_and_a_cancellation_share_the_end_of_the_callers_transaction(
    durable: Durable, url: str, kept: bool
) -> None:
    """An approval is stored with the row that says who gave it, or not at all."""

    @durable.workflow
    def work(step: Step) -> Any:
        return step.wait("approval")

    for id in ("approved", "withdrawn"):
        durable.submit(id, work)
    with psycopg.connect(url) as conn:
        assert durable.signal("approved", "approval", "yes", conn=conn)
        assert durable.cancel("withdrawn", conn=conn)
        if not kept:
            conn.rollback()
    ends = {outcome.id: outcome.status for outcome in durable.resume_pending()}
    suspended = {"approved": "suspended", "withdrawn": "suspended"}
    assert ends == ({"approved": "completed"} if kept else suspended)


def test_a_signal_does_not_end_a_sleep(durable: Durable) -> None:
    """Nor does it make the run due again and again."""

    @durable.workflow
    def job(step: Step) -> None:
        step.sleep("pause", 3600)

    durable.submit("a", job)
    durable.resume_pending()
    assert durable.signal("a", "pause", 1) is True
    assert durable.list_pending() == []
    assert durable.get("a").state == "waiting"


def test_a_failure_beside_a_thread_that_waits_is_a_failure(durable: Durable) -> None:
    """It is recorded, and retried after its pause, not when the signal comes."""

    @durable.workflow
    def job(step: Step) -> None:
        def wait() -> None:
            with suppress(BaseException):
                step.wait("approval")

        thread = threading.Thread(target=wait)
        thread.start()
        thread.join()
        raise KeyError("the workflow's own")

    with pytest.raises(KeyError):
        durable.run("a", job)
    assert durable.get("a").state == "retrying"


def test_threads_wait_and_sleep_beside_each_other(durable: Durable) -> None:
    """The first to suspend does not keep the others from their steps, waits and sleeps."""
    suspended = threading.Event()

    @durable.workflow
    def job(step: Step) -> list[object]:
        def approve() -> object:
            try:
                return step.wait("approval")
            finally:
                suspended.set()

        def pause() -> object:
            assert suspended.wait(60)
            step("note", str)
            return step.sleep("pause", 3600)

        with ThreadPoolExecutor(2) as threads:
            return [each.result() for each in (threads.submit(approve), threads.submit(pause))]

    durable.submit("a", job)
    durable.resume_pending()
    info = durable.get("a")
    assert set(info.waits_for) == {"approval", "pause"}
    assert info.next_at is not None
    assert [step.key for step in info.steps] == ["note"]
    durable.signal("a", "approval", "yes")
    pass_time(durable, timedelta(hours=1))
    assert [outcome.result for outcome in durable.resume_pending()] == [["yes", None]]


class Busy(dict[str, Any]):
    """What another thread adds to while somebody iterates over it."""

    def items(self) -> Any:
        for item in super().items():
            yield item
            self["of another thread"] = None

    def values(self) -> Any:
        return (value for _, value in self.items())


def test_a_run_is_stored_while_its_threads_begin_to_sleep(durable: Durable, db: DB) -> None:
    """What they sleep for is copied at once, and the copy is written."""

    @durable.workflow
    def nap(step: Step) -> None:
        history = step._run.history
        history.waits, history.sleeps, history.deadlines = Busy(), Busy(), Busy(later=PAST)
        step.sleep("nap", 3600)

    with pytest.raises(WorkflowSuspended):
        durable.run("a", nap)
    stored = metadata(db)
    assert stored["waits"].keys() == {"nap"}
    assert stored["wakeAt"] == stored["waits"]["nap"]
    assert stored["deadlines"] == {"later": PAST}
