"""`awaitly_postgres.testing`: what users test their workflows with."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from datetime import timedelta
from typing import Any

import psycopg
import pytest

from awaitly_postgres import (
    DuplicateStepKey,
    Durable,
    NotSerializable,
    SnapshotStore,
    Step,
    WaitTimedOut,
    WorkflowError,
    WorkflowSuspended,
)
from awaitly_postgres.testing import crash_everywhere, drain, pass_time


@pytest.fixture
def durable(make_store: Callable[..., SnapshotStore]) -> Durable:
    return Durable(make_store())


def fail(error: Exception) -> None:
    raise error


# -- crash_everywhere ----------------------------------------------------------------------


def order(step: Step, id: str) -> list[object]:
    started = step("start", time.time)
    return [id, started, step("token", random.random), step.idempotency_key("token")]


def test_bodies_may_return_anything_and_each_run_is_counted() -> None:
    """A whole run, two steps with three places to crash at, and one of those repeats the work."""
    assert crash_everywhere(order, id="123") == {"start": 8, "token": 8}


def test_the_keys_of_a_result_have_their_order_in_every_run() -> None:
    """That of JSONB, which a run that was not interrupted returns them in as well."""

    def work(step: Step) -> str:
        made = step("make", lambda: {"order": {"b": 1, "a": 2}, "item": "tea"})
        return str([made, step("next", str)])

    assert crash_everywhere(work).keys() == {"make", "next"}


def test_a_clock_between_the_steps_is_found() -> None:
    """The message names the place of the crash."""

    def work(step: Step) -> float:
        step("a", str)
        return time.time()

    with pytest.raises(AssertionError, match=r"a crash before step 'a', the workflow returns"):
        crash_everywhere(work)


def test_a_random_number_between_the_steps_is_found() -> None:
    """Here it decides which step comes next."""
    draws = iter([1, 1, 2, 2, 2, 2, 2, 2])

    def work(step: Step) -> None:
        step("a", str)
        step(f"b-{next(draws)}", str)

    with pytest.raises(AssertionError, match=r"step 'b-2' comes where step 'b-1' comes"):
        crash_everywhere(work)


def in_the_order_of_a_set(step: Step) -> None:
    for name in {"one", "two", "three", "four", "five", "six"}:
        step(name, str)


@pytest.mark.parametrize("where", ["module", "function"])
def test_the_order_of_a_set_between_the_steps_is_found(where: str) -> None:
    """It is the same throughout one process, so others look."""

    def inside(step: Step) -> None:
        in_the_order_of_a_set(step)

    with pytest.raises(AssertionError, match="orders sets differently"):
        crash_everywhere(in_the_order_of_a_set if where == "module" else inside)


def test_an_effect_between_the_steps_is_found() -> None:
    """It happens again at every start."""
    mails: list[str] = []

    def work(step: Step) -> int:
        step("a", str)
        mails.append("hello")
        step("b", str)
        return len(mails)

    with pytest.raises(AssertionError, match=r"a crash .* step '\w', the workflow returns"):
        crash_everywhere(work)


def test_a_body_that_cannot_be_repeated_is_found() -> None:
    """A process may die between the work of a step and its record."""
    paid: set[str] = set()

    def pay(id: str) -> None:
        if id in paid:
            raise LookupError(f"{id} is paid already")
        paid.add(id)

    def work(step: Step) -> None:
        step("pay", pay, "a")

    with pytest.raises(AssertionError, match=r"'pay', the workflow raises LookupError: a is paid"):
        crash_everywhere(work)


def test_what_a_transaction_wrote_is_rolled_back_by_each_crash(
    db: psycopg.Connection, url: str
) -> None:
    """The step sees that of the runs before nothing is there, and nothing stays."""
    db.execute("CREATE TABLE payments (id text PRIMARY KEY)")

    def pay(conn: psycopg.Connection, id: str) -> int:
        conn.execute("INSERT INTO payments VALUES (%s)", (id,))
        return len(conn.execute("SELECT FROM payments").fetchall())

    def work(step: Step, id: str) -> int:
        step("reserve", str)
        return step.transaction("pay", pay, id)

    with psycopg.connect(url) as conn:
        assert crash_everywhere(work, "a", conn=conn) == {"reserve": 8, "pay": 8}
    assert db.execute("SELECT * FROM payments").fetchall() == []


def test_sleeps_and_timeouts_pass_at_once_and_signals_are_given() -> None:
    """A wait without a signal times out, if it has a timeout."""

    def work(step: Step) -> list[object]:
        step.sleep("night", timedelta(days=30))
        answer = step.wait("approval")
        try:
            step.wait("objection", timeout=timedelta(days=3))
        except WaitTimedOut:
            return [answer, step("book", str)]
        return []

    assert crash_everywhere(work, signals={"approval": {"by": "Ada"}}).keys() == {"book"}
    with pytest.raises(ValueError, match="waits for a signal to 'approval'"):
        crash_everywhere(work)


def test_threads_and_maps_are_crashed_too() -> None:
    """Their steps come in any order."""

    def work(step: Step) -> list[Any]:
        squares = step.map("square", lambda n: n * n, range(3), workers=2)
        with ThreadPoolExecutor(2) as threads:
            doubles = list(threads.map(lambda n: step(f"double-{n}", lambda: 2 * n), range(2)))
        return [squares, doubles, step("end", str)]

    keys = [*(f"square[{nr}]" for nr in range(3)), "double-0", "double-1", "end"]
    assert crash_everywhere(work).keys() == {*keys}


def test_a_workflow_may_handle_failures_and_fail() -> None:
    """It has to do so each time."""

    def work(step: Step) -> None:
        try:
            step("first", fail, LookupError("none"))
        except LookupError:
            step("second", str)
        step("third", fail, ValueError("no more"))

    assert crash_everywhere(work).keys() == {"first", "second", "third"}


def transfer(step: Step) -> None:
    step("look", str)
    step.transaction("book", lambda conn: None)


def transfer_in_a_try(step: Step) -> None:
    with suppress(Exception):
        step.transaction("book", lambda conn: None)


def returns_an_object(step: Step) -> object:
    return object()


def returns_an_object_in_a_step(step: Step) -> None:
    step("a", object)


def maps_to_objects(step: Step) -> None:
    step.map("a", lambda item: object(), [1])


def uses_a_key_twice(step: Step) -> None:
    step("a", str)
    step("a", int)


def step_in_a_step(step: Step) -> None:
    step("a", lambda: step("b", str))


def needs_an_argument(step: Step, to: str) -> None: ...


@pytest.mark.parametrize(
    ("workflow", "error", "message"),
    [
        (transfer, WorkflowError, r"pass crash_everywhere\(conn=...\)"),
        (transfer_in_a_try, WorkflowError, r"pass crash_everywhere\(conn=...\)"),
        (returns_an_object, NotSerializable, "the output of the workflow"),
        (returns_an_object_in_a_step, NotSerializable, "the result of step 'a'"),
        (maps_to_objects, NotSerializable, r"the result of step 'a\[0\]'"),
        (uses_a_key_twice, DuplicateStepKey, "'a' twice"),
        (step_in_a_step, WorkflowError, "called inside step 'a'"),
        (needs_an_argument, TypeError, "missing a required argument: 'to'"),
    ],
)
def test_a_workflow_that_cannot_run_is_refused(
    workflow: Callable[..., Any], error: type[Exception], message: str
) -> None:
    """Else it would fail in the same way after each crash, which looks like success."""
    with pytest.raises(error, match=message):
        crash_everywhere(workflow)


def test_a_result_that_is_not_json_after_a_crash_is_found() -> None:
    """The message names the place, as for any other difference."""
    results = iter([1, object()])

    def work(step: Step) -> object:
        step("a", str)
        return next(results)

    with pytest.raises(AssertionError, match="before step 'a', the workflow raises NotSerial"):
        crash_everywhere(work)


# -- pass_time and drain -------------------------------------------------------------------


def test_time_passes_for_all_that_runs_wait_for(durable: Durable) -> None:
    """A delay, a pause after a failure, a sleep and a timeout."""
    broken = [True]

    @durable.workflow
    def work(step: Step) -> list[object]:
        step("flaky", lambda: fail(ConnectionError("away")) if broken else None)
        step.sleep("night", timedelta(days=30))
        try:
            return [step.wait("approval", timeout=timedelta(days=3))]
        except WaitTimedOut:
            return ["in time"]

    durable.with_options(delay=timedelta(hours=1)).submit("a", work)
    assert drain(durable) == []
    pass_time(durable, timedelta(hours=1))
    assert [outcome.status for outcome in drain(durable)] == ["failed"]
    broken.clear()
    pass_time(durable, timedelta(seconds=1))
    assert [outcome.status for outcome in drain(durable)] == ["suspended"]
    pass_time(durable, timedelta(days=29))
    assert drain(durable) == []
    pass_time(durable, timedelta(days=1))
    assert [outcome.status for outcome in drain(durable)] == ["suspended"]
    pass_time(durable, timedelta(days=3))
    assert [outcome.result for outcome in drain(durable)] == [["in time"]]


def test_time_that_passes_changes_nothing_else(durable: Durable) -> None:
    """A run that crashed after a recorded step stays due at once, by what its journal has."""

    @durable.workflow
    def work(step: Step) -> None:
        step("large", lambda: "x" * 5000)
        raise KeyboardInterrupt

    durable.submit("a", work)
    with pytest.raises(KeyboardInterrupt):
        durable.resume("a")
    assert [info.id for info in durable.list_pending()] == ["a"]
    pass_time(durable, timedelta(0))
    assert [info.id for info in durable.list_pending()] == ["a"]


def test_time_does_not_bring_a_signal(durable: Durable) -> None:
    """A run that waits for nothing else is not written; nor is one that has ended."""

    @durable.workflow
    def work(step: Step, key: str | None) -> object:
        return step.wait(key) if key else step("a", str)

    durable.run("ended", work, None)
    with pytest.raises(WorkflowSuspended):
        durable.run("waits", work, "approval")
    before = durable.store.list(), {id: durable.store.load(id) for id in ("ended", "waits")}
    pass_time(durable, timedelta(days=10_000))
    assert drain(durable) == []
    after = durable.store.list(), {id: durable.store.load(id) for id in ("ended", "waits")}
    assert after == before


def test_drain_goes_on_until_nothing_is_due(durable: Durable) -> None:
    """What a run submits is due as well, and so are more runs than one pass takes."""

    @durable.workflow
    def parent(step: Step, nr: int) -> None:
        step("submit", durable.submit, f"child-{nr}", child)

    @durable.workflow
    def child(step: Step) -> int:
        return step("a", int)

    for nr in range(101):
        durable.submit(f"parent-{nr}", parent, nr)
    outcomes = drain(durable)
    assert (len(outcomes), {outcome.status for outcome in outcomes}) == (202, {"completed"})


def test_drain_ends_although_a_run_can_never_start(
    durable: Durable, db: psycopg.Connection
) -> None:
    """Its row was written by a later version, say; it is returned once, and what is due is run."""

    @durable.workflow
    def parent(step: Step) -> None:
        step("submit", durable.submit, "child", child)

    @durable.workflow
    def child(step: Step) -> None:
        step("a", str)

    durable.submit("odd", child)
    db.execute("""UPDATE awaitly_snapshots SET snapshot = snapshot || '{"formatVersion": 2}'""")
    durable.submit("parent", parent)
    outcomes = drain(durable)
    assert sorted((outcome.id, outcome.status) for outcome in outcomes) == [
        ("child", "completed"),
        ("odd", "failed"),
        ("parent", "completed"),
    ]
