"""Failures that are open are tried again, all of them, at once; settled ones are replayed."""

from __future__ import annotations

import builtins
import importlib
import threading
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import psycopg
import pytest

from awaitly_postgres import (
    Durable,
    SnapshotStore,
    Step,
    StepFailed,
    StoreUnavailable,
    Workflow,
    WorkflowDrift,
    WorkflowSuspended,
)
from tests.support import Proxy

DB = psycopg.Connection


class Crash(BaseException):
    """Ends a run as the death of its process would."""


class Flaky:
    """A step function that fails for some keys until it is mended, and counts."""

    def __init__(self, *failing: object, size: int = 0) -> None:
        self.failing = set(failing)
        self.size = size
        self.ran: Counter[object] = Counter()

    def __call__(self, key: object) -> str:
        self.ran[key] += 1
        if key in self.failing:
            raise ConnectionError(f"{key}{'.' * self.size}")
        return f"{key} done{'.' * self.size}"


def fan_out(act: Flaky, count: int, workers: int) -> Callable[[Step], list[str]]:
    """Make a workflow that tells of all its failures together."""

    def work(step: Step) -> list[str]:
        with ThreadPoolExecutor(workers) as pool:
            futures = [pool.submit(step, f"step-{nr}", act, nr) for nr in range(count)]
        if errors := [error for future in futures if (error := future.exception())]:
            raise RuntimeError(f"{len(errors)} failed") from errors[0]
        return [future.result() for future in futures]

    return work


@pytest.mark.parametrize("size", [0, 5_000], ids=["rewritten", "appended"])
@pytest.mark.parametrize(("count", "failing"), [(10, 4), (6, 6), (100, 100)])
def test_all_failures_of_a_fan_out_are_tried_again_by_one_resume(
    make_store: Callable[..., SnapshotStore], size: int, count: int, failing: int
) -> None:
    """However many there were, and whatever the number of workers."""
    durable = Durable(make_store(max_size=10))
    act = Flaky(*range(failing), size=size)
    durable.workflow(name="work")(fan_out(act, count, 4))
    with pytest.raises(RuntimeError, match=f"{failing} failed"):
        durable.run("a", durable._workflows["work"].fn)
    act.failing.clear()
    assert len(durable.resume("a")) == count
    assert act.ran == {nr: 1 + (nr < failing) for nr in range(count)}


def test_a_crash_with_six_workers_is_resumed_with_four(durable: Durable) -> None:
    """New work of threads waits for nobody, so fewer workers are enough for what is recorded."""
    act = Flaky()
    broken = [True]

    def work(step: Step, workers: int) -> list[str]:
        def one(nr: int) -> str:
            done = step(f"first-{nr}", act, f"first-{nr}")
            if broken and nr % 2:
                raise Crash
            return done + step(f"second-{nr}", act, f"second-{nr}")

        with ThreadPoolExecutor(4 if not broken else workers) as pool:
            return list(pool.map(one, range(12)))

    durable.workflow(work)
    with pytest.raises(Crash):
        durable.run("a", work, 6)
    broken.clear()
    assert len(durable.resume("a")) == 12
    assert set(act.ran.values()) == {1}


@pytest.mark.parametrize("size", [0, 5_000], ids=["rewritten", "appended"])
def test_a_failing_step_may_be_renamed(durable: Durable, size: int) -> None:
    """An open failure need not be asked for; it leaves the record with the next write."""
    act = Flaky("b", "B", size=size)

    def started(*keys: str) -> Durable:
        deployed = Durable(durable.store)
        deployed.workflow(name="w")(lambda step: [step(key, act, key) for key in keys])
        return deployed

    first = started("a", "b", "c")
    with pytest.raises(ConnectionError):
        first.run("a", first._workflows["w"].fn)
    with pytest.raises(ConnectionError):
        started("a", "B", "c").resume("a")
    act.failing.clear()
    assert len(started("a", "B", "c").resume("a")) == 3
    assert set(durable.store.load("a").steps) == {"a", "B", "c"}
    assert act.ran == {"a": 1, "b": 1, "B": 2, "c": 1}


def test_a_failure_is_settled_when_the_own_thread_goes_on(durable: Durable) -> None:
    """A fan-out's failures that were handled are replayed, however long ago another step began."""
    act = Flaky(1, 3)
    broken = [True]

    @durable.workflow
    def work(step: Step) -> list[str]:
        with ThreadPoolExecutor(4) as pool:
            futures = [pool.submit(step, f"step-{nr}", act, nr) for nr in range(4)]
        told = [f"{future.exception() or future.result()}" for future in futures]
        step("summary", str)
        if broken:
            raise Crash
        return told

    with pytest.raises(Crash):
        durable.run("a", work)
    broken.clear()
    act.failing.clear()
    assert durable.resume("a") == ["0 done", "1", "2 done", "3"]
    assert set(act.ran.values()) == {1}


def test_a_failure_beside_a_longer_step_of_the_own_thread_stays_open(durable: Durable) -> None:
    """That step was asked for before the failure, so it does not show that it was handled."""
    act = Flaky("beside")
    own_began = threading.Event()

    def beside() -> str:
        assert own_began.wait(30)
        return act("beside")

    @durable.workflow
    def work(step: Step) -> str:
        with ThreadPoolExecutor(1) as pool:

            def wait_for_the_other() -> str:
                own_began.set()
                future.exception()
                return "own"

            future = pool.submit(step, "beside", beside)
            step("own", wait_for_the_other)
            return future.result()

    with pytest.raises(ConnectionError):
        durable.run("a", work)
    act.failing.clear()
    assert durable.resume("a") == "beside done"


def test_threads_steps_that_nobody_asks_for_are_drift_and_stay(durable: Durable) -> None:
    """The function returned without them: it is not completed, and nothing is erased."""
    act = Flaky()
    durable.workflow(name="w")(fan_out(act, 3, 3))
    broken = Durable(durable.store)

    @broken.workflow(name="w")
    def crashing(step: Step) -> None:
        fan_out(act, 3, 3)(step)
        raise Crash

    with pytest.raises(Crash):
        broken.run("a", crashing)
    fewer = Durable(durable.store)
    fewer.workflow(name="w")(fan_out(act, 2, 3))
    with pytest.raises(WorkflowDrift, match="'step-2'"):
        fewer.resume("a")
    assert len(durable.resume("a")) == 3
    assert set(act.ran.values()) == {1}


class Odd(Exception):
    """Has attributes of names that mean something elsewhere."""

    def __init__(self, exceptions: Any, args: Any = ()) -> None:
        super().__init__("odd")
        if exceptions != "method":
            self.exceptions = exceptions


class OddArgs(Exception):
    args = 5  # type: ignore[assignment]


class WithMethod(Exception):
    def exceptions(self) -> None: ...


ODD = [Odd({"a": 1}), Odd([("a", 1)]), Odd(None), WithMethod("odd"), OddArgs("odd")]


@pytest.mark.parametrize("error", ODD, ids=lambda error: f"{type(error).__name__}")
@pytest.mark.parametrize("wrapped", [False, True], ids=["itself", "as a cause"])
def test_an_exception_that_looks_like_a_group_ends_a_run(
    durable: Durable, db: DB, error: Any, wrapped: bool
) -> None:
    """Its caller gets it as it is; it is recorded with its pause, and the lease is released."""

    def fail() -> None:
        raise error

    @durable.workflow
    def work(step: Step) -> None:
        try:
            step("a", fail)
        except Exception as caught:
            if wrapped:
                raise LookupError("wrapped") from caught
            raise

    with pytest.raises(LookupError if wrapped else type(error)) as raised:
        durable.run("a", work)
    assert (raised.value.__cause__ if wrapped else raised.value) is error
    info = durable.get("a")
    assert info is not None
    assert (info.state, [step.state for step in info.steps]) == ("retrying", ["failed"])
    assert db.execute("SELECT * FROM awaitly_workflow_lock").fetchall() == []


@pytest.mark.parametrize("error", ODD, ids=lambda error: f"{type(error).__name__}")
def test_a_users_exception_may_look_like_a_group(durable: Durable, db: DB, error: Any) -> None:
    """It is raised as it is, recorded, and replayed in its own class."""
    seen: list[Exception] = []
    broken = [True]

    def fail() -> None:
        raise error

    @durable.workflow
    def work(step: Step) -> str:
        try:
            step("a", fail)
        except Exception as caught:
            seen.append(caught)
        step("b", str)
        if broken:
            raise Crash
        return "done"

    with pytest.raises(Crash):
        durable.run("a", work)
    broken.clear()
    assert durable.resume("a") == "done"
    assert seen[0] is error
    assert type(seen[1]) is type(error)
    assert db.execute("SELECT * FROM awaitly_workflow_lock").fetchall() == []


def test_a_caught_exception_group_is_replayed_with_its_members() -> None:
    """Each in its own class, groups inside it too; one of a class not loaded says so."""
    group_of: Any = getattr(builtins, "ExceptionGroup", None)
    if group_of is None:  # before Python 3.11; pytest brings the package along
        group_of = importlib.import_module("exceptiongroup").ExceptionGroup
    Hidden = type("Hidden", (Exception,), {"__module__": "nowhere"})  # noqa: N806
    error = group_of("all", [ValueError(1), group_of("in", [OSError(2, "no")]), Hidden("x")])
    seen: list[Any] = []

    def fail() -> None:
        raise error

    def work(step: Step) -> None:
        try:
            step("a", fail)
        except group_of as caught:
            seen.append(caught)
        step("b", str)

    run = Workflow(work)
    run()
    Workflow(work, name=run.name, snapshot=run.snapshot())()
    replayed = seen[1]
    assert (type(replayed), replayed.message) == (group_of, "all")
    value, inner, hidden = replayed.exceptions
    assert (type(value), value.args) == (ValueError, (1,))
    assert type(inner.exceptions[0]) is FileNotFoundError
    assert isinstance(hidden, StepFailed)


@pytest.mark.parametrize("ask", ["wait", "sleep"])
def test_an_outage_in_a_wait_travels_past_except_exception(
    connect: Callable[..., SnapshotStore], proxy: Proxy, ask: str
) -> None:
    """Like one in a step; swallowed, the workflow would take another turn."""
    durable = Durable(connect(retry_for=0))
    swallowed: list[Exception] = []

    @durable.workflow
    def work(step: Step) -> None:
        step("a", str)
        proxy.cut()
        try:
            step.wait("go") if ask == "wait" else step.sleep("nap", 60)
        except Exception as error:
            swallowed.append(error)

    with pytest.raises(StoreUnavailable):
        durable.run("a", work)
    assert swallowed == []


@pytest.mark.parametrize("ask", ["wait", "sleep"])
def test_what_is_not_asked_for_any_more_keeps_no_run_due(
    durable: Durable, db: DB, ask: str
) -> None:
    """The signal came, or the time; but the code waits for something else now."""
    asked = [ask]

    @durable.workflow
    def work(step: Step) -> Any:
        if asked == ["sleep"]:
            step.sleep("nap", 3600)
        return step.wait("first" if asked == ["wait"] else "second")

    with pytest.raises(WorkflowSuspended):
        durable.run("a", work)
    asked.clear()
    if ask == "wait":
        assert durable.signal("a", "first", 1)
    with pytest.raises(WorkflowSuspended):
        durable.resume("a")
    db.execute(
        "UPDATE awaitly_snapshots SET snapshot = replace(snapshot::text, %s, %s)::jsonb",
        ('"nap"', '"nap-"'),
    )
    assert durable.list_pending() == []
    assert list(durable.store.load("a").metadata["waits"]) == ["second"]
    durable.signal("a", "second", 2)
    assert durable.resume("a") == 2


def test_what_was_settled_stays_settled_when_the_step_that_settled_it_is_open(
    durable: Durable,
) -> None:
    """The fallback has failed too, and leaves the record; the workflow keeps its path."""
    ran: list[str] = []
    start = iter(range(3))

    def primary() -> str:
        ran.append("primary")
        if now == 0:
            raise ConnectionError("timeout")
        return "primary"

    def fallback() -> str:
        ran.append("fallback")
        if now == 0:
            raise ConnectionError("timeout")
        return "fallback"

    def work(step: Step) -> str:
        try:
            return step("primary", primary)
        except ConnectionError:
            if now == 1:
                raise KeyError("the code between the steps") from None
            return step("fallback", fallback)

    for error in (ConnectionError, KeyError):
        now = next(start)
        with pytest.raises(error):
            durable.run("a", work)
    now = next(start)
    assert durable.run("a", work) == "fallback"
    assert ran == ["primary", "fallback", "fallback"]
