"""One start of a workflow over its history: each step is replayed, or run and recorded."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime, timedelta, timezone
from typing import Any, NoReturn, TypeVar

from attrs import define, field

from .. import _json
from .._checks import OnDrift, check_id
from ..errors import (
    AwaitlyError,
    DuplicateStepKey,
    WaitTimedOut,
    WorkflowDrift,
    WorkflowError,
    WorkflowSuspended,
)
from ..snapshot import timestamp
from . import failure as _failure
from .codec import Codec, decode, encode
from .event import EventType, OnEvent, Timer, Timing, tell
from .history import History
from .recorder import Recorder

T = TypeVar("T")


class Interrupted(BaseException):
    """Carries the error that ends the run past any ``except Exception`` of the user's code."""

    def __init__(self, error: BaseException) -> None:
        super().__init__(error)
        self.error = error


@define(eq=False)
class Run:
    """One start of a workflow function over its history.

    Steps may be called from several threads; ``_lock`` guards the history and the private fields.
    """

    workflow: str
    id: str | None = None
    codec: Codec | None = None
    on_event: OnEvent | None = None
    on_drift: OnDrift = "error"
    recorder: Recorder | None = None
    history: History = field(factory=History)
    _in_step: dict[int, str] = field(factory=dict)  # the key of the step each thread is in
    _done: set[str] = field(factory=set)  # keys that this start has certainly recorded
    _unrecorded: str | None = None  # the own thread's step that has begun and is not recorded yet
    _ended_by: BaseException | None = None
    _over: bool = False
    _own_thread: int = field(factory=threading.get_ident)
    _handled_before: BaseException | None = None
    _lock: threading.RLock = field(factory=threading.RLock)

    def run(self, fn: Callable[[], T]) -> T:
        """Call ``fn``, the workflow; raise `WorkflowDrift` if it leaves recorded steps out.

        ``fn`` may swallow or replace the error that ended the run; it is raised here all the same.
        """
        self._own_thread = threading.get_ident()
        self._handled_before = sys.exc_info()[1]
        self.emit("run_started")
        try:
            result = fn()
            if (unreached := self.history.unreached()) and self.on_drift == "error":
                self._interrupt(WorkflowDrift(self.id, None, unreached))
        except (Exception, Interrupted):
            if self._ended_by is None:
                raise
        if self._ended_by is not None:
            raise self._ended_by
        return result

    def end(self) -> None:
        """From now on, refuse the steps that other threads still run: see `refuse_if_over`."""
        with self._lock:
            self._over = True

    @property
    def interruption(self) -> AwaitlyError | None:
        """The error of this package that ended the run; None if it ended in any other way."""
        return self._ended_by if isinstance(self._ended_by, AwaitlyError) else None

    def step(self, key: str, fn: Callable[..., T], call: Callable[[], T]) -> T:
        """Replay ``key``, or run ``call`` and record its result or failure."""
        recorded = self._ask(key)
        if recorded is not None:
            return self._replay(key, fn, recorded)
        with self._live(key):
            timer = self._start(key)
            try:
                value = call()
            except Exception as error:
                self._record_failure(key, error, timer.stop())
                raise
            text = self._encode(key, value)
            self._record_value(key, text, timer.stop())
        return self._decode(key, fn, _json.as_stored(text))

    def step_transaction(self, key: str, fn: Callable[..., T], call: Callable[[Any], T]) -> T:
        """Replay ``key``, or run ``call`` and record it in one transaction."""
        recorder = self.recorder
        if recorder is None:
            raise WorkflowError("step.transaction needs a database; use Durable.run(id, ...)")
        recorded = self._ask(key)
        if recorded is not None:
            return self._replay(key, fn, recorded)
        text = ""
        with self._live(key):
            timer = self._start(key)
            of_the_body: Exception | None = None
            transaction = recorder.transaction(key)
            try:
                with transaction as conn:
                    try:
                        value = call(conn)
                    except Exception as error:
                        of_the_body = error
                        raise
                    text = self._encode(key, value)
                    transaction.record(lambda: self._enter(key, text, timer.stop()))
            except BaseException as error:
                conn = None  # struck on its way back to the pool, it gets there when let go of
                # Whatever struck, and wherever: first find out whether the step was committed.
                failure = transaction.settle(error)
                if failure is not None:
                    self._fail_transaction(key, failure, failure is of_the_body, timer)
                    if failure is error:
                        raise
                    raise failure from error
            self._acknowledge(key)
        self.emit("step_completed", key, timer.stop()["durationMs"])
        return self._decode(key, fn, _json.as_stored(text))

    def sleep(self, key: str, until: Callable[[datetime], datetime]) -> Any:
        """Return if the time of ``key`` has come, else suspend the run.

        ``until`` is asked when it will come, given the time now.
        """
        recorded = self._ask(key)
        if recorded is not None:
            return self._replay(key, _nothing, recorded)
        with self._live(key):
            timer = self._start(key)
            now = self._now()
            with self._lock:
                due = self.history.end_of_sleep(key, timestamp(until(now)))
            if due > timestamp(now):
                self._suspend(key, due)
            self._record_value(key, "null", timer.stop())
        return None

    def wait(self, key: str, timeout: timedelta | None = None) -> Any:
        """Return the value that was sent for ``key``, else suspend the run until it times out."""
        recorded = self._ask(key)
        if recorded is not None:
            return self._replay(key, _nothing, recorded)
        with self._live(key):
            timer = self._start(key)
            value = self._signal(key)
            if value is None:
                value = self._suspend(key) if timeout is None else self._expire(key, timeout, timer)
            self._record_value(key, value, timer.stop())
        return self._decode(key, _nothing, _json.as_stored(value))

    def refuse_if_over(self, key: str) -> None:
        """Raise if the run has ended: a step must not return as recorded when it is not."""
        if self._over:
            name = "this run" if self.id is None else f"the run of {self.id!r}"
            raise WorkflowError(
                f"{name} ended while another thread was still in step {key!r}; its result was not "
                "recorded. Have the workflow function wait for its threads."
            )

    def emit(
        self,
        type: EventType,
        key: str | None = None,
        milliseconds: float | None = None,
        error: BaseException | None = None,
    ) -> None:
        """Log it, and tell ``on_event``."""
        tell(self.on_event, type, self.workflow, self.id, key, milliseconds, error)

    # -- asking ----------------------------------------------------------------------------

    def _ask(self, key: str) -> str | None:
        """Return the recorded JSON of ``key``, or None when the step may run now.

        The workflow's own thread must ask for its recorded steps in their order, and for all of
        them before anything new. Other threads may ask in any order; recorded steps of theirs that
        have not been asked for when the function returns are drift then.
        """
        check_id(key, "step key")
        thread = threading.get_ident()
        with self._lock:
            self.refuse_if_over(key)
            self._refuse_if_ended()
            if thread in self._in_step:
                raise self._interrupt(
                    WorkflowError(
                        f"step {key!r} was called inside step {self._in_step[thread]!r}. Call it "
                        "from the workflow function: what is inside a step is recorded as a whole."
                    )
                )
            history = self.history
            if history.has_been_asked(key):
                raise self._interrupt(DuplicateStepKey(self.id, key))
            own = thread == self._own_thread
            if own and self.on_drift == "error" and not history.is_in_turn(key):
                raise self._interrupt(WorkflowDrift(self.id, key, history.unreached()))
            recorded = history.ask(key, own)
            if recorded is None and own:
                if self._unrecorded is not None:
                    raise self._interrupt(
                        WorkflowError(
                            f"step {self._unrecorded!r} was interrupted before it was recorded, so "
                            f"step {key!r} cannot run after it. Resume the run."
                        )
                    )
                self._unrecorded = key
            return recorded

    def _refuse_if_ended(self) -> None:
        if self._ended_by is None and threading.get_ident() == self._own_thread:
            # Called from a ``finally`` of the workflow, while Ctrl-C or the like is propagating.
            passing = sys.exc_info()[1]
            if passing is not self._handled_before and not isinstance(
                passing, (Exception, Interrupted, type(None))
            ):
                self._stop(passing)
        if self._ended_by is not None:
            raise Interrupted(self._ended_by)

    # -- working ---------------------------------------------------------------------------

    @contextmanager
    def _live(self, key: str) -> Iterator[None]:
        """Guard the execution of a step that is not recorded yet.

        If it ends without being recorded (Ctrl-C, or an exception from a signal handler while it
        was being recorded), no step may follow in this start: a later one would be recorded before
        this one, and when the run is resumed, asking for this one first would be drift.
        """
        thread = threading.get_ident()
        self._in_step[thread] = key
        try:
            yield
        except BaseException as error:
            unrecorded = key not in self._done or not isinstance(error, Exception)
            # GeneratorExit: an exception struck just outside this block and has been handled.
            if unrecorded and not isinstance(error, (Interrupted, GeneratorExit)):
                self._stop(error)
            raise
        finally:
            self._in_step.pop(thread, None)

    def _stop(self, error: BaseException) -> None:
        with self._lock:
            if self._ended_by is None:  # the first error counts: later ones may be its consequences
                self._ended_by = error

    def _interrupt(self, error: AwaitlyError) -> Interrupted:
        """End the run with ``error``: every further step is refused, in every thread."""
        self._stop(error)
        return Interrupted(error)

    def _now(self) -> datetime:
        if self.recorder is None:
            return datetime.now(timezone.utc)
        return self._asked_for(self.recorder.now)

    def _signal(self, key: str) -> str | None:
        recorder = self.recorder
        return None if recorder is None else self._asked_for(lambda: recorder.signal(key))

    def _asked_for(self, what: Callable[[], T]) -> T:
        try:
            return what()
        except AwaitlyError as error:  # an outage must get past the user's ``except Exception``
            raise self._interrupt(error) from error

    def _expire(self, key: str, timeout: timedelta, timer: Timer) -> str:
        """Suspend the run until the deadline of ``key``; after it, raise `WaitTimedOut`.

        Whether the signal or the timeout was first is decided where both are stored, when the
        timeout is recorded. Returns the signal if it was.
        """
        now = self._now()
        with self._lock:
            due = self.history.deadline(key, timestamp(now + timeout))
        if due > timestamp(now):
            self._suspend(key, due)
        error, timing = WaitTimedOut(self.id, key), {**timer.stop(), "timedOut": True}
        if self._record(key, lambda: self._enter_failure(key, error, timing), expires=True):
            self.emit("step_failed", key, timing["durationMs"], error)
            raise error
        return self._signal(key) or self._suspend(key, due)

    def _suspend(self, key: str, due: str | None = None) -> NoReturn:
        with self._lock:
            self.history.suspend(key, due, threading.get_ident() == self._own_thread)
        raise self._interrupt(WorkflowSuspended(self.id, key))

    def _start(self, key: str) -> Timer:
        self.emit("step_started", key)
        return Timer()

    def _record_value(self, key: str, text: str, timing: Timing) -> None:
        self._record(key, lambda: self._enter(key, text, timing))
        self.emit("step_completed", key, timing["durationMs"])

    def _record_failure(self, key: str, error: Exception, timing: Timing) -> None:
        self._record(key, lambda: self._enter_failure(key, error, timing))
        self.emit("step_failed", key, timing["durationMs"], error)

    def _record(self, key: str, enter: Callable[[], str], *, expires: bool = False) -> bool:
        try:
            if self.recorder is None:
                enter()
            elif not expires:
                self.recorder.record(key, enter)
            elif not self.recorder.record_timeout(key, enter):
                return False
            self._acknowledge(key)
            return True
        except AwaitlyError as error:
            if self._over:
                raise
            raise self._interrupt(error) from error

    def _acknowledge(self, key: str) -> None:
        """Note that a step is recorded: only now may the own thread begin another."""
        self._done.add(key)
        if self._unrecorded == key:
            self._unrecorded = None

    def _enter(self, key: str, value: str, timing: Timing) -> str:
        with self._lock:
            self.refuse_if_over(key)  # again: the run may have ended while the step ran
            meta = _json.encode_own(self._numbered(timing))
            return self.history.add(key, f'{{"ok":true,"value":{value},"meta":{meta}}}')

    def _enter_failure(self, key: str, error: Exception, timing: Timing) -> str:
        step = {"ok": False, **_failure.to_json(error)}
        with self._lock:
            self.refuse_if_over(key)  # as above
            step["meta"] = {**step["meta"], **self._numbered(timing)}
            return self.history.add(key, _json.dumps(step))

    def _numbered(self, timing: Timing) -> dict[str, Any]:
        return self.history.numbered(timing, threading.get_ident() == self._own_thread)

    def _fail_transaction(
        self, key: str, failure: BaseException, of_the_body: bool, timer: Timer
    ) -> None:
        """Record why a step's transaction failed, if that is the step's own failure."""
        if not isinstance(failure, Exception):
            return
        if isinstance(failure, AwaitlyError) and not of_the_body:
            if not self._over:
                raise self._interrupt(failure) from failure
        elif key in self.history.steps:  # committed, then interrupted: nothing may follow
            self._stop(failure)
        else:  # rolled back by the body, or because the server refused to commit
            self._record_failure(key, failure, timer.stop())

    def _encode(self, key: str, value: Any) -> str:
        try:
            return encode(self.codec, value, f"the result of step {key!r}")
        except AwaitlyError as error:
            raise self._interrupt(error) from error

    def _decode(self, key: str, fn: Callable[..., T], value: Any) -> T:
        try:
            return decode(self.codec, value, fn, self.id, f"steps[{key!r}].value")
        except AwaitlyError as error:
            raise self._interrupt(error) from error

    def _replay(self, key: str, fn: Callable[..., T], recorded: str) -> T:
        self.emit("step_replayed", key)
        step = _json.loads(recorded)  # decoded anew each time: the caller may change the value
        if not step["ok"]:
            raise _failure.from_json(key, step)
        return self._decode(key, fn, step.get("value"))


def _nothing() -> Any:
    """Stand in for a step function that returns plain JSON."""
