"""One start of a workflow over its history: each step is replayed, or run and recorded."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime, timedelta, timezone
from typing import Any, NoReturn, TypeVar

from attrs import define

from .. import _json
from ..errors import (
    AwaitlyError,
    WaitTimedOut,
    WorkflowDrift,
    WorkflowError,
    WorkflowSuspended,
)
from ..snapshot import timestamp
from . import failure as _failure
from .asking import Asking, Interrupted
from .codec import decode, encode
from .event import EventType, Timer, Timing, tell
from .history import Recorded

T = TypeVar("T")


@define(eq=False, repr=False)
class Run(Asking):
    """One start of a workflow function over its history.

    Steps may be called from several threads.
    """

    def run(self, fn: Callable[[], T]) -> T:
        """Call ``fn``, the workflow; raise `WorkflowDrift` if it leaves recorded steps out.

        If ``fn`` swallows or replaces the error that ended the run, it is raised here anyway.
        """
        self._own_thread = threading.get_ident()
        self._handled_before = sys.exc_info()[1]
        self.emit("run_started")
        try:
            result = fn()
            unreached = [] if self.interruption else self.history.unreached()
            if unreached and self.on_drift == "error":
                self._interrupt(WorkflowDrift(self.id, None, unreached))
        except (Exception, Interrupted) as error:
            if self.interruption is None:
                raise
            # The workflow's own failure, beside a thread that waits or sleeps.
            if isinstance(error, Exception) and not (self._ended_by or self._own_was_told):
                raise
            # An error that was never raised itself gets the traceback into the user's code.
            if isinstance(error, Interrupted) and error.error.__traceback__ is None:
                error.error.__traceback__ = error.__traceback__
        if (ended := self.interruption) is not None:
            raise ended
        return result

    def step(self, key: str, fn: Callable[..., T], call: Callable[[], T]) -> T:
        """Replay ``key``, or run ``call`` and record its result or failure."""
        recorded = self._ask(key)
        if recorded is not None:
            return self.replay(key, fn, recorded)
        return self.execute(key, fn, call, self.is_own_thread())

    def execute(
        self,
        key: str,
        fn: Callable[..., T],
        call: Callable[[], T],
        own: bool,
        about: Timing | None = None,
    ) -> T:
        """Run ``call`` as the new step ``key``, and record its result or failure.

        ``own`` is whether the workflow's own thread has asked for it; ``about`` is for its meta.
        """
        with self.executing(key):
            timer = self._start(key, about)
            try:
                value = call()
                text = self._encode(key, value, is_item=about is not None)
            except Exception as error:
                self._record_failure(key, error, timer.stop(), own)
                raise
            self._record_value(key, text, timer.stop(), own)
        return self._decode(key, fn, _json.as_stored(text))

    def step_transaction(self, key: str, fn: Callable[..., T], call: Callable[[Any], T]) -> T:
        """Replay ``key``, or run ``call`` and record it in one transaction."""
        recorder = self.recorder
        if recorder is None:
            raise WorkflowError(
                f"step.transaction({key!r}) needs a database, but this workflow runs in memory; "
                "run it with Durable.run(id, ...)"
            )
        recorded = self._ask(key)
        if recorded is not None:
            return self.replay(key, fn, recorded)
        text = ""
        with self.executing(key):
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
                    own = self.is_own_thread()
                    transaction.record(lambda: self._enter(key, text, timer.stop(), own))
            except BaseException as error:
                # Drop the reference first: if returning the connection to the pool was interrupted,
                # it returns once no frame refers to it, and it may be the pool's only one.
                conn = None
                # Whatever was raised, and wherever: first find out whether the step was committed.
                failure = transaction.settle(error)
                if failure is not None:
                    self._fail_transaction(key, failure, failure is of_the_body, timer)
                    if failure is error:
                        raise
                    raise failure from error
            self.mark_recorded(key)
        self.emit("step_completed", key, timer.stop()["durationMs"])
        return self._decode(key, fn, _json.as_stored(text))

    def sleep(self, key: str, until: Callable[[datetime], datetime]) -> Any:
        """Return if the time of ``key`` has come, else suspend the run.

        ``until`` maps the time now to the time to wait for.
        """
        recorded = self._ask(key)
        if recorded is not None:
            return self.replay(key, _nothing, recorded)
        with self.executing(key):
            timer = self._start(key)
            now = self._now()
            with self._lock:
                due = self.history.begin_sleep(key, timestamp(until(now)))
            if due > timestamp(now):
                self._suspend(key, due)
            self._record_value(key, "null", timer.stop(), self.is_own_thread())
        return None

    def wait(self, key: str, timeout: timedelta | None = None) -> Any:
        """Return the value that was sent for ``key``, else suspend the run until it times out."""
        recorded = self._ask(key)
        if recorded is not None:
            return self.replay(key, _nothing, recorded)
        with self.executing(key):
            timer = self._start(key)
            value = self._signal(key)
            if value is None:
                value = self._suspend(key) if timeout is None else self._expire(key, timeout, timer)
            self._record_value(key, value, timer.stop(), self.is_own_thread())
        return self._decode(key, _nothing, _json.as_stored(value))

    def emit(
        self,
        type: EventType,
        key: str | None = None,
        milliseconds: float | None = None,
        error: BaseException | None = None,
    ) -> None:
        """Log an event, and pass it to ``on_event``."""
        tell(self.on_event, type, self.workflow, self.id, key, milliseconds, error)

    # -- working ---------------------------------------------------------------------------

    @contextmanager
    def executing(self, key: str) -> Iterator[None]:
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
            # GeneratorExit: an exception was raised just outside this block and has been handled.
            if unrecorded and not isinstance(error, (Interrupted, GeneratorExit)):
                self.stop(error)
            raise
        finally:
            self._in_step.pop(thread, None)

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

        Whether the signal or the timeout came first is decided in the database, when the timeout is
        recorded. Returns the signal if it came first.
        """
        now = self._now()
        with self._lock:
            due = self.history.begin_wait(key, timestamp(now + timeout))
        if due > timestamp(now):
            self._suspend(key, due)
        error, timing = WaitTimedOut(self.id, key), {**timer.stop(), "timedOut": True}
        failure, own = _failure.to_json(error), self.is_own_thread()
        enter = lambda: self._enter_failure(key, failure, timing, own)  # noqa: E731
        if self._record(key, enter, expires=True):
            self.emit("step_failed", key, timing["durationMs"], error)
            raise error
        return self._signal(key) or self._suspend(key, due)

    def _suspend(self, key: str, due: str | None = None) -> NoReturn:
        with self._lock:
            self.history.suspend(key, due, self.is_own_thread())
        raise self._interrupt(WorkflowSuspended(self.id, key))

    def refuse_to_begin(self) -> None:
        """Raise where no step may run, as the recorder says."""
        if self.recorder is not None:
            self.recorder.refuse_to_begin()

    def leave_thread(self) -> None:
        """Close what is kept for the current thread, which is about to end."""
        if self.recorder is not None:
            self.recorder.leave_thread()

    def _start(self, key: str, about: Timing | None = None) -> Timer:
        self.refuse_to_begin()
        self.emit("step_started", key)
        return Timer(about or {})

    def _record_value(self, key: str, text: str, timing: Timing, own: bool) -> None:
        self._record(key, lambda: self._enter(key, text, timing, own))
        self.emit("step_completed", key, timing["durationMs"])

    def _record_failure(self, key: str, error: Exception, timing: Timing, own: bool) -> None:
        failure = _failure.to_json(error)
        self._record(key, lambda: self._enter_failure(key, failure, timing, own))
        self.emit("step_failed", key, timing["durationMs"], error)

    def _record(self, key: str, enter: Callable[[], str], *, expires: bool = False) -> bool:
        try:
            if self.recorder is None:
                enter()
            elif not expires:
                self.recorder.record(key, enter)
            elif not self.recorder.record_timeout(key, enter):
                return False
            self.mark_recorded(key)
            return True
        except AwaitlyError as error:
            if self._over:
                raise
            raise self._interrupt(error) from error

    def mark_recorded(self, key: str) -> None:
        """Note that a step is recorded: only now may the own thread begin another."""
        self._done.add(key)
        if self._unrecorded == key:
            self._unrecorded = None

    # The thread that records a step may be another one than asked for it, so ``own`` is passed in.

    def _enter(self, key: str, value: str, timing: Timing, own: bool) -> str:
        with self._lock:
            self.refuse_if_over(key)  # again: the run may have ended while the step ran
            meta = _json.encode_own(self.history.next_meta(timing, own))
            return self.history.add(key, f'{{"ok":true,"value":{value},"meta":{meta}}}')

    def _enter_failure(self, key: str, failure: Timing, timing: Timing, own: bool) -> str:
        step = {"ok": False, **failure}
        with self._lock:
            self.refuse_if_over(key)  # as above
            step["meta"] = {**step["meta"], **self.history.next_meta(timing, own)}
            return self.history.add(key, _json.dumps(step))

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
            self.stop(failure)
        else:  # rolled back by the body, or because the server refused to commit
            self._record_failure(key, failure, timer.stop(), self.is_own_thread())

    def _encode(self, key: str, value: Any, *, is_item: bool = False) -> str:
        try:
            return encode(self.codec, value, f"the result of step {key!r}")
        except AwaitlyError as error:
            if is_item:  # the item has failed, and the others of its map still run
                raise
            raise self._interrupt(error) from error

    def _decode(self, key: str, fn: Callable[..., T], value: Any) -> T:
        try:
            return decode(self.codec, value, fn, self.id, f"steps[{key!r}].value")
        except AwaitlyError as error:
            raise self._interrupt(error) from error

    def replay(self, key: str, fn: Callable[..., T], recorded: Recorded) -> T:
        self.emit("step_replayed", key)
        if not recorded["ok"]:
            raise _failure.from_json(key, recorded)
        return self._decode(key, fn, recorded.get("value"))


def _nothing() -> Any:
    """Stand in for a step function that returns plain JSON."""
