"""`step.map` in memory: keys, results, failures, drift, and threads."""

from __future__ import annotations

import contextvars
import os
import signal
import threading
import tracemalloc
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest

from awaitly_postgres import (
    DuplicateStepKey,
    Event,
    NotSerializable,
    Step,
    Workflow,
    WorkflowDrift,
    WorkflowError,
)
from awaitly_postgres.workflow.map import Threads
from tests.support import TimeLimit, eventually


def double(item: int) -> int:
    return 2 * item


def mapping(items: Any, fn: Callable[[Any], Any] = double, **options: Any) -> Callable[[Step], Any]:
    def work(step: Step) -> Any:
        return step.map("m", fn, items, **options)

    return work


@pytest.mark.parametrize("workers", [1, 3, 50])
def test_results_come_in_the_order_of_the_items(workers: int) -> None:
    """Whatever the order in which they end; each is a step of its own, with its number as key."""
    first = threading.Event()

    def act(item: int) -> int:
        if item == 0 and workers > 1:
            assert first.wait(30)
        first.set()
        return 2 * item

    run = Workflow(mapping(range(20), act, workers=workers))
    assert run() == [2 * i for i in range(20)]
    assert set(run.snapshot().steps) == {f"m[{i}]" for i in range(20)}
    assert Workflow(mapping(range(20), pytest.fail), snapshot=run.snapshot())() == run()


def test_an_item_may_have_a_name_instead_of_its_number() -> None:
    """Then their order may change; what is recorded goes by the name."""
    run = Workflow(mapping(["ada", "bob"], str.upper, name=lambda user: user[0]))
    assert run() == ["ADA", "BOB"]
    assert set(run.snapshot().steps) == {"m[a]", "m[b]"}
    again = mapping(iter(["bob", "ada"]), pytest.fail, name=lambda user: user[0])
    assert Workflow(again, snapshot=run.snapshot())() == ["BOB", "ADA"]


def test_a_map_over_nothing_is_nothing() -> None:
    """No thread, no step."""
    run = Workflow(mapping([]))
    assert run() == []
    assert dict(run.snapshot().steps) == {}


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"items": "aba", "name": str}, DuplicateStepKey),
        ({"items": ["a" * 1000], "name": str}, ValueError),
        ({"items": ["a\0"], "name": str}, ValueError),
        ({"items": "ab", "workers": 0}, ValueError),
    ],
)
def test_what_cannot_be_is_refused_before_any_work(
    options: dict[str, Any], error: type[Exception]
) -> None:
    """Names twice, keys that cannot be stored, no workers."""
    run = Workflow(mapping(fn=pytest.fail, **options))
    with pytest.raises(error):
        run()
    assert dict(run.snapshot().steps) == {}


def test_keys_of_maps_and_steps_are_unique_together() -> None:
    """A map's own key as well as those of its items."""
    for taken in ("m", "m[1]"):

        def work(step: Step, taken: str = taken) -> None:
            step(taken, str)
            step.map("m", pytest.fail, range(2))

        with pytest.raises(DuplicateStepKey, match=taken.replace("[", r"\[")):
            Workflow(work)()


def test_all_items_finish_then_the_first_failure_is_raised() -> None:
    """The first in the order of the items, though a later one failed before it."""
    ran: Counter[int] = Counter()
    later = threading.Event()

    def act(item: int) -> int:
        ran[item] += 1
        if item == 1:
            assert later.wait(30)
            raise LookupError("one")
        if item == 2:
            later.set()
            raise ValueError("two")
        return item

    run = Workflow(mapping(range(10), act))
    with pytest.raises(LookupError, match="one"):
        run()
    assert ran == Counter(range(10))
    assert {key for key, step in run.snapshot().steps.items() if not step.ok} == {"m[1]", "m[2]"}


def test_only_what_is_missing_or_failed_runs_again() -> None:
    """Open failures are tried again at once."""
    ran: Counter[int] = Counter()
    broken = {3, 4}

    def act(item: int) -> int:
        ran[item] += 1
        if item in broken:
            raise LookupError(item)
        return item

    run = Workflow(mapping(range(6), act))
    with pytest.raises(LookupError):
        run()
    broken.clear()
    assert run() == list(range(6))
    assert ran == Counter([0, 1, 2, 3, 3, 4, 4, 5])


def test_a_failure_is_settled_when_the_workflow_has_gone_on() -> None:
    """It is caught, and a step follows: so it is replayed, and no item runs again."""
    ran: Counter[int] = Counter()

    def act(item: int) -> int:
        ran[item] += 1
        if item == 1:
            raise LookupError(item)
        return item

    def work(step: Step, broken: bool) -> str:
        try:
            step.map("m", act, range(3))
        except LookupError:
            step("caught", str)
        if broken:
            raise ValueError
        return "done"

    run = Workflow(work)
    with pytest.raises(ValueError):
        run(True)
    assert run(False) == "done"
    assert ran == Counter(range(3))


@pytest.mark.parametrize(
    ("before", "now", "message"),
    [
        ("abc", "abcd", "over 4 items, recorded over 3:"),
        ("abc", "ab", r"over 2 items, recorded over 3, without the recorded steps 'm\[c\]'"),
        ("abc", "abd", r"over 3 items, recorded over 3, without the recorded steps 'm\[c\]'"),
        ("abc", "", "over 0 items, recorded over 3"),
    ],
)
def test_other_items_are_drift_before_any_work(before: str, now: str, message: str) -> None:
    """More, fewer, or different ones."""
    run = Workflow(mapping(before, str.upper, name=str))
    run()
    with pytest.raises(WorkflowDrift, match=message) as drift:
        Workflow(mapping(now, pytest.fail, name=str), snapshot=run.snapshot())()
    assert drift.value.key == "m"
    ignoring = Workflow(
        mapping(now, str.upper, name=str), snapshot=run.snapshot(), on_drift="ignore"
    )
    assert ignoring() == [*now.upper()]


def test_failed_items_may_be_renamed() -> None:
    """An open failure need not be asked for again."""

    def act(item: str) -> str:
        if item == "c":
            raise LookupError
        return item

    run = Workflow(mapping("abc", act, name=str))
    with pytest.raises(LookupError):
        run()
    assert Workflow(mapping("abd", act, name=str), snapshot=run.snapshot())() == [*"abd"]


def in_order(*names: str) -> Callable[[Step], None]:
    """A workflow that does these in turn: a map if it is in capitals, else a step."""

    def work(step: Step) -> None:
        for name in names:
            if name.isupper():
                step.map(name, double, range(3))
            else:
                step(name, str)

    return work


@pytest.mark.parametrize("names", ["MaN", "aNM", "aM", "aMbN", "a", ""])
def test_a_map_has_one_place_in_the_order_of_the_workflow(names: str) -> None:
    """Moved, left out, or with something new before it."""
    run = Workflow(in_order("a", "M", "N"))
    run()
    with pytest.raises(WorkflowDrift):
        Workflow(in_order(*names), snapshot=run.snapshot())()
    Workflow(in_order(*"aMN"), snapshot=run.snapshot())()
    Workflow(in_order(*"aMNb"), snapshot=run.snapshot())()


def test_a_map_that_has_become_a_step_is_drift() -> None:
    """Of its own key, or of the first of its items alone."""
    run = Workflow(in_order("M"))
    run()
    for key in ("M", "M[0]"):

        def work(step: Step, key: str = key) -> None:
            step(key, str)

        with pytest.raises(WorkflowDrift):
            Workflow(work, snapshot=run.snapshot())()


def test_a_fan_out_of_ones_own_may_become_a_map() -> None:
    """Its steps are found by their keys, and the rest runs."""

    def by_hand(step: Step) -> None:
        threads = [threading.Thread(target=step, args=(f"m[{nr}]", double, nr)) for nr in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    run = Workflow(by_hand, name="work")
    run()
    again = Workflow(mapping([5, 6, 7]), snapshot=run.snapshot())
    assert again() == [0, 2, 14]


def test_maps_may_run_in_threads_of_ones_own() -> None:
    """Several at once; recorded ones that nobody asks for are drift when the function returns."""

    def work(step: Step, keys: str) -> None:
        threads = [threading.Thread(target=step.map, args=(k, double, range(5))) for k in keys]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    run = Workflow(work)
    run("abc")
    Workflow(work, snapshot=run.snapshot())("cab")
    with pytest.raises(WorkflowDrift):
        Workflow(work, snapshot=run.snapshot())("ab")


def test_a_map_inside_a_step_and_a_step_inside_a_map_are_refused() -> None:
    """What is inside a step is recorded as a whole."""

    def inner(step: Step) -> None:
        step("outer", lambda: step.map("m", double, range(2)))

    def outer(step: Step) -> None:
        step.map("m", lambda item: step("inner", str), range(2))

    for work in (inner, outer):
        with pytest.raises(WorkflowError, match="was called inside step"):
            Workflow(work)()


def test_an_item_whose_result_is_not_json_has_failed() -> None:
    """The others are run and recorded all the same."""
    run = Workflow(mapping(range(10), lambda item: item or object(), workers=2))
    with pytest.raises(NotSerializable, match=r"m\[0\]"):
        run()
    steps = run.snapshot().steps
    assert [steps[f"m[{item}]"].ok for item in range(10)] == [False, *[True] * 9]


def test_each_item_reports_events_and_sees_the_callers_context() -> None:
    """A copy of its own for each, so that spans nest."""
    current = contextvars.ContextVar("current", default="none")
    events: list[Event] = []

    def act(item: int) -> str:
        seen = current.get()
        current.set(f"item {item}")
        return seen

    def work(step: Step) -> list[str]:
        current.set("the caller's")
        return step.map("m", act, range(6), workers=2)

    run = Workflow(work, on_event=events.append)
    assert run() == ["the caller's"] * 6
    kinds = Counter(event.type for event in events)
    assert kinds == {"run_started": 1, "run_completed": 1, "step_started": 6, "step_completed": 6}
    assert {e.key for e in events if e.key} == {f"m[{i}]" for i in range(6)}


@pytest.mark.parametrize("error", [KeyboardInterrupt, TimeLimit])
def test_an_interrupt_begins_no_further_item_and_waits_for_those_begun(
    monkeypatch: pytest.MonkeyPatch, error: type[BaseException]
) -> None:
    """Those are recorded. What comes after the map is refused in this start."""
    begun = threading.Barrier(3)
    ran: list[int] = []
    threads: list[Threads] = []
    start = Threads._start

    def noted(self: Threads, name: str) -> None:
        threads.append(self)
        start(self, name)

    monkeypatch.setattr(Threads, "_start", noted)

    def handle(number: int, frame: Any) -> None:
        raise error

    def act(item: int) -> int:
        ran.append(item)
        if begun.wait(30) == 0:
            os.kill(os.getpid(), signal.SIGALRM)
        eventually(lambda: threads[0]._is_stopped, "the main thread has been struck")
        return item

    def work(step: Step) -> str:
        try:
            step.map("m", act, range(100), workers=3)
        except TimeLimit:
            step("after", str)
        return "done"

    before = signal.signal(signal.SIGALRM, handle)
    run = Workflow(work)
    try:
        with pytest.raises(error):
            run()
    finally:
        signal.signal(signal.SIGALRM, before)
    assert sorted(ran) == [0, 1, 2]
    assert set(run.snapshot().steps) == {"m[0]", "m[1]", "m[2]"}


def test_an_exit_in_an_item_ends_the_run() -> None:
    """It is no failure of the item, and nothing else is begun."""
    ran: list[int] = []

    def act(item: int) -> None:
        ran.append(item)
        raise SystemExit(3)

    with pytest.raises(SystemExit):
        Workflow(mapping(range(9), act, workers=1))()
    assert ran == [0]


@pytest.mark.parametrize(("items", "workers", "threads"), [(200, 4, 4), (2, 100, 2)])
def test_threads_are_limited_and_gone_afterwards(items: int, workers: int, threads: int) -> None:
    """No more than workers, and no more than items."""
    used: set[threading.Thread] = set()

    def act(item: int) -> int:
        used.add(threading.current_thread())
        return item

    Workflow(mapping(range(items), act, workers=workers))()
    assert 1 <= len(used) <= threads
    for thread in used:
        thread.join(30)  # its last item is done, but it may have a moment to live
        assert not thread.is_alive()


def test_a_hundred_thousand_items_need_memory_for_what_is_recorded_only() -> None:
    """No future waits for each; a tenth as many, so that it is fast with tracemalloc."""
    tracemalloc.start()
    try:
        run = Workflow(mapping(range(10_000), workers=4))
        assert sum(run()) == 9_999 * 10_000
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak / 10_000 < 5_000  # bytes for an item, the snapshot in several forms included
