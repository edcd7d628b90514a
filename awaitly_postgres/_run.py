"""One run of a workflow over what is recorded: replay, drift, recording. Knows no database."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Collection, Mapping
from datetime import datetime, timedelta, timezone
from typing import Any, Literal, Protocol, TypeVar

from attrs import define, field

from . import _failure, _json
from ._sql import check_id
from .codec import Codec, decode, encode
from .errors import (
    AwaitlyError,
    DuplicateStepKey,
    WorkflowDrift,
    WorkflowError,
    WorkflowSuspended,
)
from .event import Event, EventType, OnEvent
from .snapshot import WorkflowSnapshot, timestamp

T = TypeVar("T")

OnDrift = Literal["error", "ignore"]

# How long a thread with new work waits, without any progress, for the other threads of a resumed
# run to ask for their recorded steps, before that is called drift. Seconds.
_THREADS_PATIENCE = 5.0

_log = logging.getLogger("awaitly_postgres")


class Recorder(Protocol):
    """Where a run keeps its steps beyond its own memory."""

    def begin(self) -> None:
        """Note that live work is about to start."""

    def record(self, key: str, enter: Callable[[], str]) -> None:
        """Keep one step; ``enter`` adds it to the run and returns its JSON."""

    def transact(self, key: str, body: Callable[[Any], T], enter: Callable[[T], str]) -> None:
        """Run ``body`` on a connection and keep its step in the same transaction."""

    def signal(self, key: str) -> str | None:
        """Return the JSON that was sent for ``step.wait(key)``, if any was."""

    def now(self) -> datetime:
        """Tell the time that counts."""


class Interrupted(BaseException):
    """Carries an error of ours through the user's ``except Exception`` to the caller of run."""

    def __init__(self, error: AwaitlyError) -> None:
        super().__init__(error)
        self.error = error


@define(eq=False)
class Run:
    """One run of a workflow function over what is recorded of it.

    ``steps`` holds the JSON text of every recorded step by key, of earlier runs and of this one;
    ``waits`` what the run is suspended for: a time by key, or None for a signal.
    """

    workflow: str
    id: str | None = None
    codec: Codec | None = None
    on_event: OnEvent | None = None
    on_drift: OnDrift = "error"
    recorder: Recorder | None = None
    steps: dict[str, str] = field(factory=dict)
    waits: dict[str, str | None] = field(factory=dict)
    last_key: str | None = None
    _replayable: set[str] = field(factory=set)  # recorded and not to be tried again
    _in_order: list[str] = field(factory=list)  # ... by the workflow's own thread, not yet asked
    _unordered: set[str] = field(factory=set)  # ... elsewhere (threads, Node), not yet asked
    _had_threads: bool = False
    _restored: WorkflowSnapshot | None = None
    _asked: dict[str, int] = field(factory=dict)  # in order, with the thread
    _failures: dict[str, BaseException] = field(factory=dict)
    _seq: int = 0
    _live: bool = False
    _interrupted: Interrupted | None = None
    _own_thread: int = field(factory=threading.get_ident)
    _changed: threading.Condition = field(factory=threading.Condition)

    def restore(self, snapshot: WorkflowSnapshot, retried: Collection[str] = ()) -> None:
        """Take over what an earlier run has recorded, but for the failures to be ``retried``."""
        self._restored = snapshot
        recorded = snapshot.to_json()["steps"]
        self.steps = {key: _json.dumps(step) for key, step in recorded.items()}
        metas = {key: step.get("meta") or {} for key, step in recorded.items()}
        seqs = {key: _positive(meta.get("seq")) for key, meta in metas.items()}
        self._seq = max(seqs.values(), default=0)
        if self._seq:
            self.last_key = max(seqs, key=seqs.__getitem__)
        self._replayable = set(recorded) - _marked_as_the_end(recorded, metas, seqs) - set(retried)
        parallel = {key for key in self._replayable if metas[key].get("parallel")}
        self._had_threads = bool(parallel)
        self._unordered = parallel | {key for key in self._replayable if not seqs[key]}
        in_order = sorted(self._replayable - self._unordered, key=seqs.__getitem__)
        self._in_order = in_order[::-1]  # the next one is the last
        waits = (snapshot.metadata or {}).get("waits")
        if isinstance(waits, Mapping):
            self.waits = {
                key: due
                for key, due in waits.items()
                if key not in recorded and (due is None or isinstance(due, str))
            }

    def run(self, fn: Callable[[], T]) -> T:
        """Call ``fn``, which steps through this run, and see that it asks for all that is recorded.

        A crash leaves open whether the workflow had caught the last recorded failure. So it is
        replayed; if the workflow ends with it then, before anything new has run, it was the end,
        and the function is called once more to try that step again.
        """
        self._own_thread = threading.get_ident()
        self.emit("run_started")
        try:
            return self._call(fn)
        except Exception as error:
            ended_with = set() if self._live or self._interrupted else set(self._blamed(error))
            if self._restored is None or not ended_with:
                raise
        self._asked.clear()
        self._failures.clear()
        self.restore(self._restored, ended_with)
        return self._call(fn)

    def _call(self, fn: Callable[[], T]) -> T:
        try:
            result = fn()
            if (unreached := self._unreached()) and self.on_drift == "error":
                self._interrupt(WorkflowDrift(self.id, None, unreached))
        except (Exception, Interrupted):
            if self._interrupted is None:
                raise
        # Whatever the function made of it on the way: swallowed by a bare except, or replaced.
        if self._interrupted is not None:
            raise self._interrupted.error
        return result

    @property
    def interruption(self) -> AwaitlyError | None:
        """The error of ours that has ended the run, not one that a step has raised."""
        return None if self._interrupted is None else self._interrupted.error

    def step(self, key: str, fn: Callable[..., T], call: Callable[[], T]) -> T:
        """Replay ``key``, or run ``call`` and record what comes out."""
        recorded = self._ask(key)
        if recorded is not None:
            return self._replay(key, fn, recorded)
        timer = self._start(key)
        try:
            value = call()
        except Exception as error:
            self._record_failure(key, error, timer.stop())
            raise
        timing = timer.stop()
        return self._record_value(key, fn, lambda: self._encode(key, value), timing)

    def step_transaction(self, key: str, fn: Callable[..., T], call: Callable[[Any], T]) -> T:
        """Replay ``key``, or run ``call`` and record it in one transaction."""
        recorder = self.recorder
        if recorder is None:
            raise WorkflowError("step.transaction needs a database; use Durable.run(id, ...)")
        recorded = self._ask(key)
        if recorded is not None:
            return self._replay(key, fn, recorded)
        timer = self._start(key)
        text, raised = "", None

        def body(conn: Any) -> T:
            nonlocal raised
            try:
                return call(conn)
            except Exception as error:
                raised = error
                raise

        def enter(value: T) -> str:
            nonlocal text
            text = self._encode(key, value)
            return self._enter(key, text, timer.stop())

        try:
            recorder.transact(key, body, enter)
        except Exception as error:
            if error is raised:
                self._record_failure(key, error, timer.stop())
            elif isinstance(error, AwaitlyError):
                raise self._interrupt(error) from error
            raise
        self.emit("step_completed", key, timer.stop()["durationMs"])
        return self._decode(key, fn, text)

    def sleep(self, key: str, duration: timedelta) -> Any:
        """Go on if the time of ``key`` has come, else suspend the run."""
        recorded = self._ask(key)
        if recorded is not None:
            return self._replay(key, _nothing, recorded)
        timer = self._start(key)
        now = datetime.now(timezone.utc) if self.recorder is None else self.recorder.now()
        due = self.waits.get(key) or timestamp(now + duration)
        if due > timestamp(now):
            self._suspend(key, due)
        return self._record_value(key, _nothing, lambda: "null", timer.stop())

    def wait(self, key: str) -> Any:
        """Return what was sent for ``key``, else suspend the run."""
        recorded = self._ask(key)
        if recorded is not None:
            return self._replay(key, _nothing, recorded)
        timer = self._start(key)
        value = None if self.recorder is None else self.recorder.signal(key)
        if value is None:
            self._suspend(key, None)
        return self._record_value(key, _nothing, lambda: str(value), timer.stop())

    def forget(self, key: str) -> None:
        """Take back a step that was rolled back."""
        self.steps.pop(key, None)

    def blame(self, error: BaseException) -> None:
        """Mark the step whose failure ended the run, so that the next run tries it again."""
        for key in self._blamed(error):
            step = _json.loads(self.steps[key])
            step["meta"] = {**(step.get("meta") or {}), "ended": True}
            self.steps[key] = _json.dumps(step)

    def _blamed(self, error: BaseException) -> list[str]:
        """Return the steps whose failures ``error`` is, or comes from; several for a group.

        Not one after which the workflow's own thread has asked for another step, to clean up: it
        has moved past it, and what it recorded then could not be asked for before a new try.
        """
        blamed: list[str] = []
        own = [key for key, thread in self._asked.items() if thread == self._own_thread]
        for cause in _failure.chain(error):
            keys = [key for key, failure in self._failures.items() if failure is cause]
            blamed += [key for key in keys if key not in own[:-1]]
            if keys and not hasattr(error, "exceptions"):
                break
        return blamed

    def steps_json(self) -> str:
        """Return all steps as the text of one JSON object."""
        return _json.join(self.steps)

    def emit(
        self,
        type: EventType,
        key: str | None = None,
        milliseconds: float | None = None,
        error: BaseException | None = None,
    ) -> None:
        """Tell ``on_event``. An observer that fails is logged and does not disturb the run."""
        if self.on_event is None:
            return
        duration = None if milliseconds is None else milliseconds / 1000
        try:
            self.on_event(Event(type, self.workflow, self.id, key, duration, error))
        except Exception:
            _log.exception("on_event failed for %s of workflow %s", type, self.id or self.workflow)

    # -- asking ----------------------------------------------------------------------------

    def _ask(self, key: str) -> str | None:
        """Return the recorded JSON of ``key``, or None when the step may run now."""
        check_id(key, "step key")
        with self._changed:
            if self._interrupted is not None:
                raise self._interrupted
            if key in self._asked:
                raise self._interrupt(DuplicateStepKey(self.id, key))
            self._asked[key] = threading.get_ident()
            if key in self._replayable:
                self._reach(key)
                return self.steps[key]
            self._wait_until_all_reached(key)
            if not self._live and self.recorder is not None:
                try:
                    self.recorder.begin()
                except AwaitlyError as error:
                    raise self._interrupt(error) from error
            self._live = True
            return None

    def _reach(self, key: str) -> None:
        """Tick ``key`` off. The workflow's own thread must ask in the order of the record."""
        if key in self._unordered:
            self._unordered.discard(key)
        elif self._in_order[-1] == key:
            self._in_order.pop()
        else:
            own = threading.get_ident() == self._own_thread
            if own and self.on_drift == "error":
                raise self._interrupt(WorkflowDrift(self.id, key, self._unreached()))
            self._in_order.remove(key)
        self._changed.notify_all()

    def _wait_until_all_reached(self, key: str) -> None:
        """Return once everything recorded has been asked for: new work must not start before.

        What the workflow's own thread recorded is asked for there, in order; when that thread comes
        with something new, it never will be. Other threads may still be on their way.
        """
        if self.on_drift == "ignore":
            return
        while unreached := self._unreached():
            own = threading.get_ident() == self._own_thread
            hopeless = own and not self._had_threads
            if hopeless or not self._changed.wait(_THREADS_PATIENCE):
                raise self._interrupt(WorkflowDrift(self.id, key, unreached))
            if self._interrupted is not None:
                raise self._interrupted

    def _unreached(self) -> list[str]:
        return self._in_order[::-1] + sorted(self._unordered)

    def _interrupt(self, error: AwaitlyError) -> Interrupted:
        """End the run with ``error``: now, and at every further step it may still try."""
        with self._changed:
            if self._interrupted is None:
                self._interrupted = Interrupted(error)
                self._changed.notify_all()
            return self._interrupted

    def _suspend(self, key: str, due: str | None) -> None:
        self.waits[key] = due
        raise self._interrupt(WorkflowSuspended(self.id, key))

    # -- recording -------------------------------------------------------------------------

    def _start(self, key: str) -> _Timer:
        self.emit("step_started", key)
        return _Timer()

    def _record_value(
        self, key: str, fn: Callable[..., T], encoded: Callable[[], str], timing: _Timing
    ) -> T:
        try:
            text = encoded()
            self._record(key, lambda: self._enter(key, text, timing))
        except AwaitlyError as error:
            raise self._interrupt(error) from error
        self.emit("step_completed", key, timing["durationMs"])
        return self._decode(key, fn, text)

    def _record_failure(self, key: str, error: Exception, timing: _Timing) -> None:
        def enter() -> str:
            step = {"ok": False, **_failure.to_json(error)}
            with self._changed:
                step["meta"] = {**step["meta"], **self._meta(timing)}
                text = self._add(key, _json.dumps(step))
                self._failures[key] = error
                return text

        try:
            self._record(key, enter)
        except AwaitlyError as lost:
            raise self._interrupt(lost) from error
        self.emit("step_failed", key, timing["durationMs"], error)

    def _record(self, key: str, enter: Callable[[], str]) -> None:
        if self.recorder is None:
            enter()
        else:
            self.recorder.record(key, enter)

    def _enter(self, key: str, value: str, timing: _Timing) -> str:
        with self._changed:
            meta = _json.encode_own(self._meta(timing))
            return self._add(key, f'{{"ok":true,"value":{value},"meta":{meta}}}')

    def _add(self, key: str, step: str) -> str:
        self.steps[key] = step
        self.waits.pop(key, None)
        self.last_key = key
        return step

    def _meta(self, timing: _Timing) -> dict[str, Any]:
        self._seq += 1
        meta = {**timing, "seq": self._seq}
        return meta if threading.get_ident() == self._own_thread else {**meta, "parallel": True}

    def _encode(self, key: str, value: Any) -> str:
        return encode(self.codec, value, f"the result of step {key!r}")

    def _decode(self, key: str, fn: Callable[..., T], text: str) -> T:
        try:
            value = _json.as_stored(text)
            return decode(self.codec, value, fn, self.id, f"steps[{key!r}].value")
        except AwaitlyError as error:
            raise self._interrupt(error) from error

    def _replay(self, key: str, fn: Callable[..., T], recorded: str) -> T:
        self.emit("step_replayed", key)
        step = _json.loads(recorded)
        if step["ok"]:
            return self._decode(key, fn, _json.dumps(step.get("value")))
        failure = self._failures[key] = _failure.from_json(key, step)
        raise failure


_Timing = dict[str, Any]


class _Timer:
    """Measures one step: the clock says when it began, the counter for how long."""

    def __init__(self) -> None:
        self._started = timestamp()
        self._counter = time.perf_counter()

    def stop(self) -> _Timing:
        elapsed = time.perf_counter() - self._counter
        return {"startedAt": self._started, "durationMs": round(elapsed * 1000, 3)}


def _nothing() -> Any:
    """Stands for a step function that returns plain JSON."""


def _positive(value: object) -> int:
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else 0


def _marked_as_the_end(
    recorded: Mapping[str, Any], metas: Mapping[str, Any], seqs: Mapping[str, int]
) -> set[str]:
    """Return the failures that the last run has marked as its end and that still are."""
    own_newest = max((s for key, s in seqs.items() if not metas[key].get("parallel")), default=0)
    return {
        key
        for key, step in recorded.items()
        if not step["ok"]
        and metas[key].get("ended")
        and (metas[key].get("parallel") or seqs[key] == own_newest)
    }
