"""Where runs stand: the rows and states that the command line and the admin show."""

from __future__ import annotations

import os
import socket
from collections import Counter
from collections.abc import Callable
from datetime import datetime, timedelta, timezone
from typing import Any

import psycopg
import pytest

from awaitly_postgres import Durable, LeaseLost, SnapshotStore, Step, WorkflowSuspended
from awaitly_postgres.store.rows import STATES, RunInfo, StepInfo, read_time, steps_of
from awaitly_postgres.store.text import (
    age,
    elide,
    elide_steps,
    printable,
    reasons,
    span,
    traceback_of,
    verdict,
)

LONG_AGO, FAR_OFF = "2000-01-01T00:00:00.000Z", "2999-01-01T00:00:00.000Z"
NEVER = "9999-12-31T23:59:59.999Z"


def document(status: str = "running", **metadata: Any) -> dict[str, Any]:
    """A snapshot without steps."""
    execution = {"status": status, "lastUpdated": LONG_AGO}
    return {"formatVersion": 1, "steps": {}, "execution": execution, "metadata": metadata}


def row_of(store: SnapshotStore, id: str) -> RunInfo:
    (row,) = store.details([id])
    return row


def test_each_run_is_in_one_of_seven_states(
    store: SnapshotStore, durable: Durable, db: psycopg.Connection
) -> None:
    """Runs as `Durable` leaves them, and those of a process that has died."""

    @durable.workflow
    def job(step: Step, fails: bool = False) -> None:
        step("first", str)
        if fails:
            raise RuntimeError

    @durable.workflow
    def waiting(step: Step) -> None:
        step.wait("approval")

    durable.submit("accepted", job)
    durable.submit("held", job)
    store.try_acquire("held", ttl=600)
    for id in ("waits", "answered"):
        with pytest.raises(WorkflowSuspended):
            durable.run(id, waiting)
    durable.signal("answered", "approval", 1)
    with pytest.raises(RuntimeError):
        durable.run("failed", job, fails=True)
    durable.run("done", job)
    durable.submit("ended", job)
    durable.cancel("ended")
    store.save("crashed", document(workflow="job", attempts=1, wakeAt=LONG_AGO))
    store.save("crashed just now", document(workflow="job", attempts=1, wakeAt=FAR_OFF))
    store.save("asleep", document(workflow="job", waits={"nap": FAR_OFF}, wakeAt=FAR_OFF))
    store.save("failed by hand", document("failed"))
    ids = [info.id for info in store.list()]
    states = {row.id: row.state for row in store.details(ids)}
    assert states == {
        "accepted": "pending",
        "held": "running",
        "waits": "waiting",
        "answered": "pending",
        "failed": "retrying",
        "done": "completed",
        "ended": "cancelled",
        "crashed": "pending",
        "crashed just now": "retrying",
        "asleep": "waiting",
        "failed by hand": "failed",
    }
    assert store.stats().by_state == Counter(states.values())
    for state in STATES:
        found = db.execute(f"SELECT id FROM awaitly_snapshots WHERE {store.where_state(state)}")
        assert {id for (id,) in found} == {id for id in ids if states[id] == state}


def test_a_word_that_is_no_state_makes_no_condition(store: SnapshotStore) -> None:
    """It would be SQL."""
    with pytest.raises(ValueError, match="state must be one of"):
        store.where_state("failed' OR 'a' = 'a")  # type: ignore[arg-type]


def test_what_is_due_is_what_is_pending(store: SnapshotStore) -> None:
    """The row and the statement that finds work agree about times and answers."""
    ours = {"workflow": "job", "input": {"args": [], "kwargs": {}}}
    for id, metadata in {
        "at once": {},
        "past": {"wakeAt": LONG_AGO},
        "far off": {"wakeAt": FAR_OFF},
        "unanswered": {"wakeAt": NEVER, "waits": {"go": None}},
        "answered": {"wakeAt": NEVER, "waits": {"go": None}, "signals": {"go": 1}},
    }.items():
        store.save(id, document(**ours, **metadata))
    due = {"at once", "past", "answered"}
    assert {info.id for info in store.pending()} == due
    ids = [info.id for info in store.list()]
    assert {row.id for row in store.details(ids) if row.is_due} == due
    assert row_of(store, "far off").next_at == datetime(2999, 1, 1, tzinfo=timezone.utc)
    assert row_of(store, "unanswered").next_at is None
    assert row_of(store, "unanswered").waits_for == ("go",)


def test_details_are_in_the_order_asked_for(make_store: Callable[..., SnapshotStore]) -> None:
    """What is not stored is left out, an id that could not be stored too; prefixes are kept."""
    store, other = make_store(prefix="a:"), make_store(prefix="b:")
    for id in ("x", "y", "z"):
        store.save(id, document())
    other.save("x", document("completed"))
    rows = store.details(["z", "no-such", "", "l" * 2000, "x"])
    assert [(row.id, row.status) for row in rows] == [("z", "running"), ("x", "running")]


def test_details_join_a_transaction(store: SnapshotStore, url: str) -> None:
    """With ``conn`` they tell what is not committed yet."""
    store.create_tables()
    with psycopg.connect(url) as conn:
        store.save("a", document(), conn=conn)
        assert [row.id for row in store.details(["a"], conn=conn)] == ["a"]
        assert store.details(["a"]) == []
        conn.rollback()


def test_pending_is_chosen_and_paged(store: SnapshotStore) -> None:
    """By prefix and workflow; what somebody holds is not in it."""
    for id, name, attempts in (
        ("a1", "job", 0),
        ("a2", "job", 7),
        ("a3", "other", 0),
        ("b1", "job", 0),
        ("b2", "job", 0),
    ):
        made = {"workflow": name, "attempts": attempts, "input": {"args": [], "kwargs": {}}}
        store.save(id, document(**made))
    store.try_acquire("b2", ttl=600)

    def found(*prefix: str, **options: Any) -> list[str]:
        return [info.id for info in store.pending(*prefix, **options)]

    assert found() == ["a1", "a2", "a3", "b1"]
    assert found("a") == ["a1", "a2", "a3"]
    assert found(workflows=["job"]) == ["a1", "a2", "b1"]
    assert found(workflows=[]) == []
    (first,) = store.pending(limit=1)
    assert found(limit=2, after=first) == ["a2", "a3"]


def test_a_lease_is_revoked_from_the_holder_that_was_named(store: SnapshotStore) -> None:
    """Only from that one, whose next write is refused; nobody else loses theirs."""
    store.save("a", document())
    held = store.try_acquire("a", ttl=600)
    row = row_of(store, "a")
    assert row.held_by == f"{socket.gethostname()}:{os.getpid()}"
    assert row.held_until == held.expires_at
    assert store.revoke_lease("a", "another:1:0") is False
    assert held.held()
    assert store.revoke_lease("a", row.holder) is True
    assert store.revoke_lease("a", row.holder) is False
    with pytest.raises(LeaseLost):
        store.save("a", document(), lease=held)


@pytest.mark.parametrize("nonsense", [7, True, "text", [1], None, {"a": {"b": 1}}])
@pytest.mark.parametrize("name", ["workflow", "waits", "signals", "wakeAt", "attempts"])
def test_nonsense_in_a_row_has_a_state(store: SnapshotStore, name: str, nonsense: Any) -> None:
    """Metadata are anybody's to edit."""
    store.save("odd", document(**{name: nonsense}))
    row = row_of(store, "odd")
    assert row.state in ("pending", "waiting")
    assert row.next_at is None


def test_steps_are_in_the_order_in_which_they_began(store: SnapshotStore) -> None:
    """By time, then by number; those that nobody measured come last."""
    snapshot = document()
    for key, meta in {
        "second": {"startedAt": "2026-01-01T00:00:02.000Z", "durationMs": 1500, "seq": 1},
        "unmeasured": {"seq": 2},
        "odd": {"startedAt": 7, "durationMs": "long"},
        "first": {"startedAt": "2026-01-01T00:00:01.000Z", "seq": 3},
    }.items():
        snapshot["steps"][key] = {"ok": True, "value": key, "meta": meta}
    store.save("a", snapshot)
    steps = steps_of(store.load("a"))
    assert [step.key for step in steps] == ["first", "second", "unmeasured", "odd"]
    assert [step.seconds for step in steps] == [0, 1.5, 0, 0]
    assert [step.started_at is None for step in steps] == [False, False, True, True]


def test_a_failure_is_told_with_its_causes() -> None:
    """Nearest first, whether Python or Node has written it."""
    cause = {"name": "KeyError", "message": "'card'", "cause": {"originalType": "string"}}
    failure = {"name": "CardDeclined", "message": "", "cause": cause}
    assert reasons(failure) == ("CardDeclined", "KeyError: 'card'", "string")
    assert reasons({"stringRepresentation": "NOT_FOUND"}) == ("NOT_FOUND",)
    assert reasons("text") == reasons(None) == ()
    step = StepInfo.from_json("a", {"ok": False, "error": {"code": 7}, "cause": None})
    assert step.reasons == ('{"code": 7}',)
    assert StepInfo.from_json("a", {"ok": True, "value": 1}).reasons == ()


def test_a_traceback_is_told_below_those_of_its_causes() -> None:
    """As Python prints them; a failure that has none, as Node's, has no traceback."""
    cause = {"name": "KeyError", "stack": "Traceback: the cause\n"}
    told = traceback_of({"stack": "Traceback: the failure\n", "cause": cause})
    assert told is not None
    first, _, last = told.partition("direct cause of the following exception:\n\n")
    assert (first.partition("\n")[0], last) == ("Traceback: the cause", "Traceback: the failure\n")
    assert traceback_of({"message": "no", "stack": 7}) is None
    assert traceback_of(None) is traceback_of("text") is None


def test_of_many_steps_the_telling_ones_are_chosen() -> None:
    """Few are all shown; of many the ends, what failed, and what took long."""
    steps = [StepInfo.from_json(f"s{i}", {"ok": i != 70, "value": i}) for i in range(100)]
    steps[40] = StepInfo.from_json("long", {"ok": True, "meta": {"durationMs": 9000}})
    assert elide_steps(steps, 100) == [*range(100)]
    assert elide_steps(steps, 99) == [*range(10), 40, 70, *range(90, 100)]
    assert elide_steps([], 60) == []


def test_text_is_escaped_and_cut() -> None:
    """A terminal shows it, and no more of it than there is room for."""
    assert printable("é\x1b[2J\n") == "é\\x1b[2J\\n"
    assert printable("a\n\x07", keep="\n") == "a\n\\x07"
    assert [elide("12345", n) for n in (None, 5, 4)] == ["12345", "12345", "123…"]
    assert elide("12345", 3, "...") == "..."


def test_a_verdict_says_when_the_next_attempt_is_due() -> None:
    """Or that there is none; nothing of a run that was not started."""
    soon = datetime.now(timezone.utc) + timedelta(hours=2, seconds=30)
    assert verdict(0, None) == ""
    assert (verdict(1, None), verdict(8, None)) == (
        "given up after 1 attempt",
        "given up after 8 attempts",
    )
    assert verdict(3, soon) == "attempt 3, again in 2h00m"
    assert verdict(3, soon - timedelta(days=1)) == "attempt 3, again in 1.0 s"  # it is due


def test_durations_are_written_in_a_unit_that_leaves_few_digits() -> None:
    """Down to microseconds, since that is what a step without I/O takes."""
    given = (-1, 0.000045, 0.0003, 0.0123, 1.23, 57, 192, 7500, 90_000, 400_000)
    wanted = "0 µs,45 µs,0.3 ms,12 ms,1.2 s,57 s,3m12s,2h05m,1d01h,4d"
    assert [span(seconds) for seconds in given] == wanted.split(",")
    ages = [age(seconds) for seconds in (-1, 119, 120, 7200, 200_000)]
    assert ages == ["0s", "119s", "2m", "2h", "2d"]


def test_only_times_with_a_zone_are_read() -> None:
    """Of anything else that a row may hold there is no time."""
    read = read_time("2026-11-22T10:56:04.184Z")
    assert read is not None
    assert read.utcoffset() == timedelta(0)
    assert [read_time(t) for t in ("2026-11-22T10:56:04", "soon", "", None, 7)] == [None] * 5
