"""Recording and replay in memory: what a step returns, raises, and never does twice."""

from __future__ import annotations

import asyncio
import json
import logging
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime, timedelta
from types import ModuleType
from typing import Any

import attrs
import pytest

from awaitly_postgres import (
    DuplicateStepKey,
    Event,
    NotSerializable,
    SnapshotFormatError,
    Step,
    StepFailed,
    VersionMismatch,
    Workflow,
    WorkflowConflict,
    WorkflowDrift,
    WorkflowError,
    WorkflowSnapshot,
    WorkflowSuspended,
)


class Stop(Exception):
    """What a workflow raises here when it breaks off half way."""


class Declined(Exception):
    """An error with attributes, whose constructor takes something else than its args."""

    made = 0

    def __init__(self, code: int, *, reason: str) -> None:
        type(self).made += 1
        super().__init__(f"declined: {reason}")
        self.code = code
        self.reason = reason


@attrs.define
class Refused(Exception):
    """An error whose attributes are in slots."""

    code: int
    detail: dict[str, Any]


@dataclass
class Rejected(ValueError):
    """An error whose constructor never calls that of Exception."""

    code: int


class Busy(OSError):
    """An error with a built-in constructor of its own kind."""


def fail(error: BaseException) -> Any:
    raise error


def stored(run: Workflow[..., Any]) -> WorkflowSnapshot:
    """Its snapshot as another process would read it."""
    return WorkflowSnapshot.from_json(json.loads(json.dumps(run.snapshot().to_json())))


def again(run: Workflow[..., Any], fn: Callable[..., Any] | None = None) -> Workflow[..., Any]:
    """The same workflow in the next process, perhaps with other code."""
    return Workflow(fn or run.fn, name=run.name, snapshot=stored(run))


class Calls(list[str]):
    """Step functions that note their key when they really run."""

    def __call__(self, step: Step, *keys: str) -> list[str]:
        return [step(key, self._run, key) for key in keys]

    def _run(self, key: str) -> str:
        self.append(key)
        return key.upper()


# -- recorded once, replayed ---------------------------------------------------------------


def test_a_recorded_step_never_runs_again() -> None:
    """The second run gets the same answers, and only the new step runs."""
    calls = Calls()
    run = Workflow(lambda step, *keys: calls(step, *keys))
    assert run("a", "b") == ["A", "B"]
    assert again(run)("a", "b", "c") == ["A", "B", "C"]
    assert calls == ["a", "b", "c"]


def test_a_workflow_object_goes_on_from_its_own_last_run() -> None:
    """Calling it again replays what it has recorded itself."""
    calls = Calls()
    run = Workflow(lambda step: calls(step, "a"))
    assert run() == run() == ["A"]
    assert calls == ["a"]


def test_the_first_run_sees_what_the_replay_sees() -> None:
    """A tuple is a list both times, and keys come in the order of the database."""
    run = Workflow(lambda step: step("k", lambda: {"long key": (1, 2), "b": None, "a": 1.0}))
    first = run()
    assert repr(first) == "{'a': 1.0, 'b': None, 'long key': [1, 2]}"
    assert repr(again(run)()) == repr(first)


def test_changing_a_returned_value_does_not_change_the_record() -> None:
    """Neither what the step returned nor what the step function has kept."""
    kept = {"items": [1]}

    def workflow(step: Step) -> dict[str, list[int]]:
        value = step("k", lambda: kept)
        seen = json.dumps(value)
        value["items"].append(2)
        kept["items"].append(3)
        return json.loads(seen)

    run = Workflow(workflow)
    assert run() == again(run)() == {"items": [1]}


def test_arguments_reach_the_step_function() -> None:
    """Positional and named ones, also those called key and fn."""
    run = Workflow(lambda step: step("k", lambda *a, **k: [a, k], 1, key=2, fn=3))
    assert run() == [[1], {"key": 2, "fn": 3}]


def test_a_step_may_return_nothing() -> None:
    """None is recorded like any other result."""
    calls: list[int] = []
    run = Workflow(lambda step: step("k", calls.append, 1))
    assert run() is again(run)() is None
    assert calls == [1]


def test_a_result_that_is_not_json_ends_the_run_even_inside_except_exception() -> None:
    """It names step and path, and nothing of it is recorded."""

    def workflow(step: Step) -> None:
        step("good", lambda: 1)
        try:
            step("bad", lambda: {"at": datetime.min})  # noqa: DTZ901
        except Exception as error:
            swallowed.append(error)

    swallowed: list[Exception] = []
    run = Workflow(workflow)
    with pytest.raises(NotSerializable, match=r"step 'bad'.*\$\.at"):
        run()
    assert list(run.snapshot().steps) == ["good"]
    assert swallowed == []


def test_a_coroutine_is_refused_as_the_result_of_a_step() -> None:
    """Nobody awaits it; the error says what to do, and Python does not warn as well."""

    async def fetch() -> str:
        return "page"

    with pytest.raises(NotSerializable, match=r"step 'fetch'.* is async.*asyncio\.run\(\)"):
        Workflow(lambda step: step("fetch", fetch))()
    blocking = Workflow(lambda step: step("fetch", lambda: asyncio.run(fetch())))
    assert blocking() == "page"


@pytest.mark.parametrize("key", ["", "a\0b", "\ud800", "é" * 501, None, 1])
def test_a_key_that_cannot_be_stored_is_refused(key: Any) -> None:
    """As a wrong argument, before the step runs."""
    with pytest.raises(ValueError, match="step key"):
        Workflow(lambda step: step(key, pytest.fail))()


# -- failures ------------------------------------------------------------------------------


def test_a_failure_is_recorded_and_goes_on_unchanged() -> None:
    """The caller gets the very exception; the record is in the shape that Node reads."""
    error = Declined(7, reason="no cover")
    run = Workflow(lambda step: step("pay", fail, error))
    with pytest.raises(Declined) as raised:
        run()
    assert raised.value is error
    assert run.status == "failed"
    failed = run.snapshot().steps["pay"]
    assert (failed.ok, failed.error, failed.meta["origin"]) == (False, "Declined", "throw")
    assert (failed.cause["type"], failed.cause["name"]) == ("error", "Declined")
    assert failed.cause["message"] == "declined: no cover"
    assert "in fail" in failed.cause["stack"]


def test_the_failure_that_ended_the_run_is_tried_again() -> None:
    """And if it works now, the run completes."""
    tries: list[int] = []

    def flaky() -> int:
        tries.append(1)
        return len(tries) if len(tries) > 1 else fail(Stop())

    run = Workflow(lambda step: step("k", flaky))
    with pytest.raises(Stop):
        run()
    resumed = again(run)
    assert resumed() == 2
    assert (resumed.status, resumed.snapshot().steps["k"].value) == ("completed", 2)


HANDLED = [
    pytest.param(Declined(7, reason="x"), {"code": 7, "reason": "x"}, id="own constructor"),
    pytest.param(Refused(7, {"a": [1]}), {"code": 7, "detail": {"a": [1]}}, id="slots"),
    pytest.param(Rejected(7), {"code": 7}, id="dataclass"),
    pytest.param(Busy(16, "busy", "/dev/x"), {"errno": 16, "filename": "/dev/x"}, id="OSError"),
    pytest.param(KeyError("k"), {"args": ("k",)}, id="KeyError"),
    pytest.param(FileNotFoundError(2, "gone", "a", None, "b"), {"filename2": "b"}, id="two files"),
    pytest.param(StopIteration(5), {"value": 5}, id="StopIteration"),
    pytest.param(json.JSONDecodeError("bad", "doc", 1), {"pos": 1, "doc": "doc"}, id="stdlib"),
]


@pytest.mark.parametrize(("error", "attributes"), HANDLED)
def test_a_handled_failure_is_replayed_as_itself(
    error: Exception, attributes: dict[str, Any]
) -> None:
    """Same class, message and attributes, so that the workflow takes the same turn."""

    def workflow(step: Step) -> list[Any]:
        try:
            step("k", fail, error)
        except type(error) as caught:
            seen.append(caught)
        step("after", lambda: None)
        raise Stop

    seen: list[Any] = []
    run = Workflow(workflow)
    with pytest.raises(Stop):
        run()
    with pytest.raises(Stop):
        again(run)()
    first, replayed = seen
    assert first is error
    assert (type(replayed), str(replayed)) == (type(error), str(error))
    assert {name: getattr(replayed, name) for name in attributes} == attributes


def test_an_attribute_that_is_not_json_is_left_out_alone() -> None:
    """The others are there at the replay, and so is the message."""
    error = Declined(7, reason="x")
    error.response = object()  # type: ignore[attr-defined]
    run = Workflow(handling(error))
    run()
    kind, message, state = again(run)()
    assert (kind, message) == ("Declined", "declined: x")
    assert state == {"code": 7, "reason": "x"}


def test_a_failure_whose_arguments_are_not_json_keeps_its_class() -> None:
    """The workflow's except clause catches the replay as it caught the first."""
    run = Workflow(handling(UnicodeDecodeError("utf-8", b"\xff", 0, 1, "bad")))
    run()
    assert again(run)()[0] == "UnicodeDecodeError"


def handling(error: Exception) -> Callable[[Step], list[Any]]:
    """A workflow that handles the failure of its step "k" and goes on."""

    def workflow(step: Step) -> list[Any]:
        try:
            step("k", fail, error)
        except Exception as caught:
            described = [type(caught).__name__, str(caught), vars(caught)]
            described[2].pop("response", None)
        step("after", lambda: None)
        return described

    return workflow


def test_a_replayed_failure_runs_no_constructor() -> None:
    """What is in the table is data."""
    run = Workflow(handling(Declined(7, reason="x")))
    run()
    made = Declined.made
    again(run)()
    assert Declined.made == made


def test_a_failure_whose_class_is_not_loaded_is_step_failed() -> None:
    """It tells key, class and message; nothing is imported to do better."""

    class Local(Exception):
        pass

    def workflow(step: Step) -> Any:
        try:
            step("k", fail, Local("why"))
        except Local:
            step("after", int)
        except StepFailed as error:
            step("after", pytest.fail)
            return [error.key, error.name, error.reason, error.error]

    run = Workflow(workflow)
    run()
    assert again(run)() == ["k", "Local", "why", "Local"]


def test_a_replay_imports_nothing() -> None:
    """A class named in the table is found among what is loaded, or not at all."""
    run = Workflow(handling(ValueError("x")))
    run()
    document = run.snapshot().to_json()
    kinds = ["antigravity:Error", "wave:Error", "importlib:lazy.Error", "sys:exit", "builtins:str"]
    for kind in kinds:
        document["steps"]["k"]["meta"]["exception"]["type"] = kind
        workflow = Workflow(run.fn, name=run.name, snapshot=WorkflowSnapshot.from_json(document))
        assert workflow()[0] == "StepFailed"
    assert not {"antigravity", "wave"} & set(sys.modules)


def test_a_replay_does_not_ask_a_module_for_what_it_makes_on_demand(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A module's own __getattr__ may import."""
    lazy = ModuleType("lazy_errors")
    lazy.__getattr__ = pytest.fail  # type: ignore[method-assign]
    monkeypatch.setitem(sys.modules, "lazy_errors", lazy)
    run = Workflow(handling(ValueError("x")))
    run()
    document = run.snapshot().to_json()
    document["steps"]["k"]["meta"]["exception"]["type"] = "lazy_errors:Error"
    replay = Workflow(run.fn, name=run.name, snapshot=WorkflowSnapshot.from_json(document))
    assert replay()[0] == "StepFailed"


@pytest.mark.parametrize("cause", [None, {}, {"type": "thrown", "stringRepresentation": "why"}])
def test_a_failure_that_says_little_still_replays(cause: Any) -> None:
    """As Node's, of a thrown value or of nothing known."""
    document = {
        "formatVersion": 1,
        "steps": {"k": {"ok": False, "error": "E", "cause": cause}, "after": {"ok": True}},
        "execution": {"status": "running", "lastUpdated": "2026-11-22T10:56:04.184Z"},
        "metadata": {"lastStepKey": "after"},
    }
    replay = Workflow(handling(Stop()), snapshot=WorkflowSnapshot.from_json(document))
    assert replay()[0] == "StepFailed"


@pytest.mark.parametrize("openly", [True, False])
def test_a_failure_wrapped_by_the_workflow_is_tried_again(openly: bool) -> None:
    """``raise X from e`` ends the run because of e, and so does ``raise X from None``."""
    broken = [True]

    def workflow(step: Step) -> str:
        try:
            return step("k", lambda: fail(Stop()) if broken.pop() else "fine")
        except Stop as error:
            raise RuntimeError("wrapped") from (error if openly else None)

    run = Workflow(workflow)
    with pytest.raises(RuntimeError):
        run()
    broken.append(False)
    assert again(run)() == "fine"


def test_a_handled_failure_stays_when_something_else_ends_the_run() -> None:
    """Only the step that ended the run runs again."""
    tries: list[str] = []

    def attempt(key: str) -> str:
        tries.append(key)
        return fail(Stop(key)) if tries.count(key) == 1 else key

    def workflow(step: Step) -> str:
        try:
            taken = step("card", attempt, "card")
        except Stop:
            taken = step("invoice", attempt, "invoice")
        return taken

    run = Workflow(workflow)
    with pytest.raises(Stop, match="invoice"):
        run()
    assert again(run)() == "invoice"
    assert tries == ["card", "invoice", "invoice"]


def test_a_crash_of_the_workflow_itself_retries_no_step() -> None:
    """What it had handled before is replayed, not run."""
    calls: list[int] = []

    def workflow(step: Step, crash: bool) -> str:
        try:
            step("k", lambda: fail(Stop(str(calls.append(1)))))
        except Stop:
            step("after", lambda: None)
        return fail(RuntimeError("unrelated")) if crash else "done"

    run = Workflow(workflow)
    with pytest.raises(RuntimeError):
        run(True)
    assert again(run)(False) == "done"
    assert calls == [1]


def test_a_failure_too_deep_to_be_stored_is_still_the_users_own() -> None:
    """Its arguments are given up, not the exception."""
    deep: Any = 0
    for _ in range(600):
        deep = [deep]
    run = Workflow(lambda step: step("k", fail, Stop(deep)))
    with pytest.raises(Stop):
        run()
    assert run.snapshot().steps["k"].error == "Stop"


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(1), GeneratorExit()])
def test_an_interrupted_step_is_not_a_failed_step(error: BaseException) -> None:
    """Nothing is recorded of it; the run is as running as before, and goes on the next time."""
    interrupted = [True, False]

    def workflow(step: Step) -> list[int]:
        return [step("a", int), step("b", lambda: fail(error) if interrupted.pop(0) else 1)]

    run = Workflow(workflow)
    with pytest.raises(type(error)):
        run()
    assert (run.status, list(run.snapshot().steps)) == ("running", ["a"])
    assert again(run)() == [0, 1]


# -- drift and duplicates ------------------------------------------------------------------

CHANGES = {
    "renamed": (["a", "x", "c"], "x", ["b", "c"]),
    "inserted": (["a", "x", "b", "c"], "x", ["b", "c"]),
    "removed": (["a", "c"], "c", ["b", "c"]),
    "reordered": (["b", "a", "c"], "b", ["a", "b", "c"]),
    "cut short": (["a"], None, ["b", "c"]),
    "emptied": ([], None, ["a", "b", "c"]),
}


@pytest.mark.parametrize("change", CHANGES)
def test_changed_code_is_refused_before_anything_runs(change: str) -> None:
    """The error names the step asked for and the recorded ones not reached."""
    keys, asked, unreached = CHANGES[change]
    calls = Calls()
    run = Workflow(lambda step, keys: calls(step, *keys) and None)
    run(["a", "b", "c"])
    resumed = again(run)
    before = resumed.snapshot().to_json()
    with pytest.raises(WorkflowDrift) as drift:
        resumed(keys)
    assert (drift.value.key, list(drift.value.unreached)) == (asked, unreached)
    assert all(repr(key) in str(drift.value) for key in [asked, *unreached] if key)
    assert calls == ["a", "b", "c"]
    assert resumed.snapshot().to_json()["steps"] == before["steps"]
    assert resumed.status == "completed"


def test_steps_may_be_added_at_the_end() -> None:
    """Everything recorded has been asked for by then."""
    calls = Calls()
    run = Workflow(lambda step, keys: calls(step, *keys))
    run(["a", "b"])
    assert again(run)(["a", "b", "c"]) == ["A", "B", "C"]


@pytest.mark.parametrize("keys", [["a", "x", "b"], ["b", "a"], ["b"], ["x"]])
def test_drift_can_be_ignored(keys: list[str]) -> None:
    """Then new steps run at once and recorded ones are replayed wherever they come."""
    calls = Calls()
    run = Workflow(lambda step, keys: calls(step, *keys))
    run(["a", "b"])
    loose = Workflow(run.fn, name=run.name, snapshot=stored(run), on_drift="ignore")
    assert loose(keys) == [key.upper() for key in keys]
    assert calls == ["a", "b", *(["x"] if "x" in keys else [])]
    assert {"a", "b"} <= set(loose.snapshot().steps)


def test_drift_cannot_be_swallowed() -> None:
    """An except Exception of the workflow's own does not keep it from its caller."""
    run = Workflow(lambda step: step("a", int))
    run()

    def changed(step: Step) -> None:
        try:
            step("x", pytest.fail)
        except Exception as error:
            swallowed.append(error)
        finally:
            step("y", pytest.fail)

    swallowed: list[Exception] = []
    with pytest.raises(WorkflowDrift, match="'x'"):
        again(run, changed)()
    assert swallowed == []


@pytest.mark.parametrize("what", ["bare except", "replaced by another error", "left by return"])
def test_a_run_that_was_refused_stays_refused(what: str) -> None:
    """Even where the workflow catches everything, no later step runs."""

    def workflow(step: Step) -> str:
        step("a", int)
        try:
            step("a", pytest.fail)
        except BaseException:
            if what == "bare except":
                step("b", pytest.fail)
            if what == "replaced by another error":
                raise RuntimeError("instead") from None
        return "as if nothing had happened"

    with pytest.raises(DuplicateStepKey, match="'a'"):
        Workflow(workflow)()


def test_a_key_is_used_once_in_a_run() -> None:
    """At the first run and at the replay alike; the message names the key."""
    run = Workflow(lambda step, n: [step("k", int) for _ in range(n)])
    with pytest.raises(DuplicateStepKey) as refused:
        run(2)
    assert refused.value.key == "k"
    with pytest.raises(DuplicateStepKey):
        again(run)(2)
    assert again(run)(1) == [0]


@pytest.mark.parametrize("on_drift", ["Error", "", None])
def test_on_drift_is_one_of_two_words(on_drift: Any) -> None:
    """Anything else is a wrong argument."""
    with pytest.raises(ValueError, match="on_drift"):
        Workflow(int, on_drift=on_drift)


# -- other snapshots -----------------------------------------------------------------------


def test_a_snapshot_of_another_version_is_refused() -> None:
    """Before the workflow runs; both versions are named."""
    run = Workflow(lambda step: step("k", int))
    run()
    with pytest.raises(VersionMismatch) as refused:
        Workflow(pytest.fail, name=run.name, version=2, snapshot=run.snapshot())
    assert (refused.value.stored, refused.value.requested) == (1, 2)


def test_a_snapshot_of_another_workflow_is_refused() -> None:
    """By name, which is the function's unless it is given."""
    run = Workflow(lambda step: None, name="checkout")
    run()
    with pytest.raises(WorkflowConflict, match=r"checkout.*refund"):
        Workflow(pytest.fail, name="refund", snapshot=run.snapshot())


def test_a_snapshot_may_be_given_as_json() -> None:
    """It is checked as strictly."""
    run = Workflow(lambda step: step("k", int))
    run()
    document: Any = run.snapshot().to_json()
    assert Workflow(run.fn, snapshot=document)() == 0
    with pytest.raises(SnapshotFormatError):
        Workflow(run.fn, snapshot={**document, "steps": []})


def test_a_workflow_need_not_be_a_function() -> None:
    """Any callable will do; it is called by its class's name then."""

    class Checkout:
        def __call__(self, step: Step, n: int) -> int:
            return step("k", lambda: n)

    run = Workflow(Checkout())
    assert (run(3), run.name) == (3, "Checkout")


# -- threads -------------------------------------------------------------------------------


def test_threads_may_finish_in_another_order_at_the_replay() -> None:
    """Each gets the result of its own key, and nothing runs again."""
    ran: list[int] = []

    def workflow(step: Step, order: list[int]) -> list[int]:
        gates = [threading.Event() for _ in order]
        gates[order[0]].set()

        def body(n: int) -> int:
            ran.append(n)
            return n * n

        def work(n: int) -> int:
            gates[n].wait()
            result = step(f"square-{n}", body, n)
            position = order.index(n)
            if position + 1 < len(order):
                gates[order[position + 1]].set()
            return result

        step("before", int)
        with ThreadPoolExecutor(len(order)) as threads:
            return [*threads.map(work, range(len(order))), step("after", lambda: -1)]

    run = Workflow(workflow)
    expected = [n * n for n in range(8)] + [-1]
    assert run([3, 1, 7, 0, 5, 2, 6, 4]) == expected
    for order in (range(8), reversed(range(8))):
        assert again(run)(list(order)) == expected
    assert sorted(ran) == list(range(8))


def test_a_thread_with_new_work_waits_for_no_other() -> None:
    """A run that stopped with half its threads recorded runs only the other half."""
    ran: list[str] = []
    both = threading.Barrier(2)

    def workflow(step: Step, first: bool) -> list[str]:
        asked = threading.Event()

        def slow() -> str:
            asked.wait()
            return step("recorded", lambda: ran.append("recorded") or "old")

        def new() -> str:
            asked.set()
            if first:
                both.wait()
                raise Stop
            return step("new", lambda: ran.append("new") or "new")

        with ThreadPoolExecutor(2) as threads:
            futures = [threads.submit(slow), threads.submit(new)]
            if first:
                futures[0].result()
                both.wait()
            return [future.result() for future in futures]

    run = Workflow(workflow)
    with pytest.raises(Stop):
        run(True)
    assert again(run)(False) == ["old", "new"]
    assert ran == ["recorded", "new"]


def test_a_threads_step_that_nobody_asks_for_is_drift_at_the_end() -> None:
    """Until the function returns, a thread may still be on its way to it."""

    def workflow(step: Step, key: str) -> int:
        with ThreadPoolExecutor(1) as threads:
            return threads.submit(step, key, int).result()

    run = Workflow(workflow)
    run("a")
    with pytest.raises(WorkflowDrift, match=r"returned before.*'a'"):
        again(run)("b")


def test_steps_of_many_threads_are_all_recorded_and_numbered() -> None:
    """No number is given twice."""
    start = threading.Barrier(8)

    def work(step: Step, thread: int) -> None:
        start.wait()
        for i in range(25):
            step(f"{thread}-{i}", lambda: None)

    def workflow(step: Step) -> None:
        with ThreadPoolExecutor(8) as threads:
            list(threads.map(lambda thread: work(step, thread), range(8)))

    run = Workflow(workflow)
    run()
    seqs = [result.meta["seq"] for result in run.snapshot().steps.values()]
    assert sorted(seqs) == list(range(1, 201))


def test_a_duplicate_key_in_another_thread_ends_the_run_there_and_here() -> None:
    """Whichever thread meets it, the caller of the run gets it, and no step runs any more."""

    def workflow(step: Step) -> str:
        step("k", int)
        with ThreadPoolExecutor(1) as threads:
            try:
                threads.submit(step, "k", pytest.fail).result()
            except BaseException:
                return step("after", pytest.fail)

    with pytest.raises(DuplicateStepKey):
        Workflow(workflow)()


# -- events --------------------------------------------------------------------------------


def observed(run: Workflow[..., Any]) -> list[tuple[Any, ...]]:
    """Run it, and return what its observer was told."""
    events: list[Event] = []
    run.on_event = events.append
    with suppress(BaseException):
        run()
    return [(event.type, event.key) for event in events]


def test_events_tell_the_run_in_order() -> None:
    """Started, each step started and completed or replayed, completed."""
    run = Workflow(lambda step: [step("a", int), step("b", int)])
    assert observed(run) == [
        ("run_started", None),
        ("step_started", "a"),
        ("step_completed", "a"),
        ("step_started", "b"),
        ("step_completed", "b"),
        ("run_completed", None),
    ]
    assert observed(again(run)) == [
        ("run_started", None),
        ("step_replayed", "a"),
        ("step_replayed", "b"),
        ("run_completed", None),
    ]


ENDS = {
    "a failed step": (lambda step: step("k", fail, Stop()), "run_failed"),
    "a failed workflow": (lambda step: fail(Stop()), "run_failed"),
    "ctrl-c": (lambda step: fail(KeyboardInterrupt()), "run_stopped"),
    "a wait": (lambda step: step.wait("k"), "run_suspended"),
    "a duplicate key": (lambda step: [step("k", int), step("k", int)], "run_failed"),
}


@pytest.mark.parametrize("end", ENDS)
def test_the_last_event_tells_how_the_run_ended(end: str) -> None:
    """Exactly one of them ends a run."""
    workflow, last = ENDS[end]
    events = [kind for kind, _ in observed(Workflow(workflow)) if kind.startswith("run")]
    assert events == ["run_started", last]


def test_an_event_carries_what_an_observer_needs() -> None:
    """Workflow, time, duration in seconds and the error."""
    events: list[Event] = []
    error = Stop()
    run = Workflow(lambda step: step("k", fail, error), name="w", on_event=events.append)
    with pytest.raises(Stop):
        run()
    failed = events[2]
    assert (failed.type, failed.workflow, failed.workflow_id) == ("step_failed", "w", None)
    assert failed.error is error
    assert failed.duration >= 0
    assert failed.at.utcoffset() == timedelta(0)
    times = [event.at for event in events]
    assert times == sorted(times)


def test_an_observer_that_raises_changes_nothing(caplog: pytest.LogCaptureFixture) -> None:
    """Its errors are logged; result and record are as without it."""

    def observer(event: Event) -> None:
        raise RuntimeError(f"at {event.type}")

    run = Workflow(lambda step: step("k", int), on_event=observer)
    with caplog.at_level(logging.ERROR, logger="awaitly_postgres"):
        assert run() == 0
    assert run.snapshot().steps["k"].ok
    assert len(caplog.records) == 4


# -- the snapshot --------------------------------------------------------------------------


def mixed() -> Workflow[[], None]:
    """A run with a step that worked and one that failed."""

    def workflow(step: Step) -> None:
        step("good", int)
        step("bad", fail, Stop())

    run = Workflow(workflow)
    with pytest.raises(Stop):
        run()
    return run


@pytest.mark.parametrize(
    ("include", "keys"), [("all", ["good", "bad"]), ("completed", ["good"]), ("failed", ["bad"])]
)
def test_a_snapshot_can_be_of_some_steps_only(include: Any, keys: list[str]) -> None:
    """All, those that completed, or those that failed; the execution is the same."""
    snapshot = mixed().snapshot(include=include)
    assert (list(snapshot.steps), snapshot.execution.status) == (keys, "failed")


def test_include_is_one_of_three_words() -> None:
    """Anything else is a wrong argument."""
    with pytest.raises(ValueError, match="include"):
        mixed().snapshot(include="ok")  # type: ignore[arg-type]


def test_a_snapshot_takes_metadata_of_its_users() -> None:
    """Beside its own; it is a copy, checked like everything that is stored."""
    mine = {"tenant": ["a"]}
    snapshot = mixed().snapshot(metadata=mine)
    mine["tenant"].append("b")
    assert snapshot.metadata == {
        "workflow": "workflow",
        "version": 1,
        "lastStepKey": "bad",
        "tenant": ["a"],
    }
    with pytest.raises(NotSerializable, match="tenant"):
        mixed().snapshot(metadata={"tenant": {1}})


def test_a_snapshot_can_be_taken_before_the_first_run() -> None:
    """It says running, and has no steps."""
    snapshot = Workflow(pytest.fail, name="w").snapshot()
    assert (snapshot.execution.status, dict(snapshot.steps)) == ("running", {})


def test_a_step_records_when_and_how_long_it_ran() -> None:
    """And its number, which goes on counting over resumed runs."""
    calls = Calls()
    run = Workflow(lambda step, *keys: calls(step, *keys))
    run("a")
    resumed = again(run)
    resumed("a", "b")
    first, second = resumed.snapshot().steps.values()
    assert (first.meta["seq"], second.meta["seq"]) == (1, 2)
    assert first.meta == run.snapshot().steps["a"].meta
    started = datetime.fromisoformat(second.meta["startedAt"].replace("Z", "+00:00"))
    ended = datetime.fromisoformat(resumed.snapshot().execution.last_updated.replace("Z", "+00:00"))
    assert started <= ended
    assert 0 <= second.meta["durationMs"] <= (ended - started).total_seconds() * 1000 + 2


# -- waiting, and what needs a database ----------------------------------------------------


def test_a_sleep_suspends_the_run_until_its_time() -> None:
    """The time is kept from the first run; when it has come, the run goes on."""

    def workflow(step: Step) -> list[int]:
        first = step("a", int)
        step.sleep("nap", timedelta(hours=1))
        return [first, step("b", lambda: 1)]

    run = Workflow(workflow)
    for _ in range(2):
        with pytest.raises(WorkflowSuspended) as suspended:
            run()
    assert (suspended.value.key, run.status) == ("nap", "running")
    document = run.snapshot().to_json()
    assert list(document["steps"]) == ["a"]
    document["metadata"]["waits"] = {"nap": "2020-01-01T00:00:00.000Z"}
    woken = Workflow(workflow, snapshot=WorkflowSnapshot.from_json(document))
    assert woken() == [0, 1]
    assert "waits" not in woken.snapshot().metadata
    assert woken() == [0, 1]


def test_a_sleep_of_nothing_is_a_step_like_any_other() -> None:
    """It completes at once, and is replayed."""
    run = Workflow(lambda step: step.sleep("nap", 0))
    assert run() is again(run)() is None
    assert run.snapshot().steps["nap"].ok


@pytest.mark.parametrize("duration", [-1, float("nan"), float("inf"), timedelta(seconds=-1)])
def test_a_sleep_needs_a_sensible_duration(duration: Any) -> None:
    """Anything else is a wrong argument."""
    with pytest.raises(ValueError, match="duration"):
        Workflow(lambda step: step.sleep("nap", duration))()


def test_a_wait_suspends_the_run_and_cannot_be_swallowed() -> None:
    """A workflow's own except Exception does not see it."""

    def workflow(step: Step) -> None:
        try:
            step.wait("approval")
        except Exception as error:
            swallowed.append(error)

    swallowed: list[Exception] = []
    run = Workflow(workflow)
    with pytest.raises(WorkflowSuspended, match="'approval'"):
        run()
    assert run.snapshot().metadata["waits"] == {"approval": None}
    assert swallowed == []


@pytest.mark.parametrize(
    "use",
    [
        lambda step: step.transaction("k", pytest.fail),
        lambda step: step.idempotency_key("k"),
    ],
)
def test_what_needs_a_durable_run_says_so(use: Callable[[Step], Any]) -> None:
    """In memory there is no transaction and no id."""
    with pytest.raises(WorkflowError, match=r"Durable\.run"):
        Workflow(use)()


def test_an_error_of_ours_that_a_step_raises_is_the_users() -> None:
    """A step may run a workflow of its own; that one's drift is a failure of this step."""

    def workflow(step: Step) -> str:
        with pytest.raises(WorkflowDrift, match="'other'"):
            step("inner", fail, WorkflowDrift("other", "x", ["y"]))
        return step("after", lambda: "went on")

    run = Workflow(workflow)
    assert run() == "went on"
    assert not run.snapshot().steps["inner"].ok


def test_memory_needs_no_database() -> None:
    """A workflow runs in a process that has no connection and never tries to get one."""
    program = (
        "import socket; socket.socket.connect = None\n"
        "from awaitly_postgres import Workflow\n"
        "print(Workflow(lambda step: step('k', int))())\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, check=True)
    assert done.stdout.split() == [b"0"]


def test_a_failed_durable_snapshot_completed_in_memory_is_not_failed_any_more() -> None:
    """What held for the failure alone leaves the metadata, whoever recorded it."""
    of_the_failure = {
        "failure": {"type": "error", "name": "Declined", "message": ""},
        "failures": {},
        "wakeAt": "2026-01-01T00:00:00.000Z",
        "waits": {"approve": None},
        "settled": 3,
    }
    run = Workflow(
        lambda step: step("a", str),
        name="order",
        snapshot=WorkflowSnapshot.from_json(
            {
                "formatVersion": 1,
                "steps": {},
                "execution": {"status": "failed", "lastUpdated": "2026-01-01T00:00:00.000Z"},
                "metadata": {"workflow": "order", "tenant": "acme", **of_the_failure},
            }
        ),
    )
    run()
    assert run.status == "completed"
    assert run.snapshot().metadata == {
        "workflow": "order",
        "version": 1,
        "tenant": "acme",
        "lastStepKey": "a",
    }


@pytest.mark.parametrize("mismatch", [{"name": "other"}, {"name": "order", "version": 2}])
def test_a_snapshot_of_another_workflow_is_refused_in_words_for_memory(
    mismatch: dict[str, Any],
) -> None:
    """There is no id here, and nothing to call ``delete_state`` on."""
    run = Workflow(lambda step: 1, name="order")
    run()
    with pytest.raises((WorkflowConflict, VersionMismatch)) as refused:
        Workflow(lambda step: 1, snapshot=run.snapshot(), **mismatch)
    assert "snapshot" in str(refused.value)
    assert "delete_state" not in str(refused.value)
