"""One run of a workflow over what is recorded: replay, drift, recording. Knows no database."""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime, timedelta, timezone
from typing import Any, NoReturn, Protocol, TypeVar

from attrs import define, field

from .. import _json
from .._checks import OnDrift, check_id
from ..errors import (
    AwaitlyError,
    DuplicateStepKey,
    WorkflowDrift,
    WorkflowError,
    WorkflowSuspended,
)
from ..snapshot import WorkflowSnapshot, timestamp
from . import failure as _failure
from .codec import Codec, decode, encode
from .event import Event, EventType, OnEvent

T = TypeVar("T")

# Fields of a snapshot's metadata that each new document writes anew, or not at all.
OF_THIS_MOMENT = ("failure", "failures", "waits", "sleeps", "settled", "wakeAt")

_log = logging.getLogger("awaitly_postgres")


class Recorder(Protocol):
    """Where a run keeps its steps beyond its own memory.

    Every method may raise an `AwaitlyError`, which then ends the run.
    """

    def record(self, key: str, enter: Callable[[], str]) -> None:
        """Keep one step; ``enter`` adds it to the run and returns its JSON."""

    def transact(self, key: str, body: Callable[[Any], T], enter: Callable[[T], str]) -> None:
        """Run ``body`` on a connection and keep its step in the same transaction.

        Whatever it raises, the run has the step afterwards only if it was committed.
        """

    def signal(self, key: str) -> str | None:
        """Return the JSON that was sent for ``step.wait(key)``, if any was."""

    def now(self) -> datetime:
        """Tell the time that counts."""


class Interrupted(BaseException):
    """Carries what ends the run through the user's ``except Exception`` to the caller of run."""

    def __init__(self, error: BaseException) -> None:
        super().__init__(error)
        self.error = error


@define(eq=False)
class Run:
    """One run of a workflow function over what is recorded of it.

    ``steps`` holds the JSON text of every recorded step by key, of earlier runs and of this one;
    ``waits`` what this start has asked for in vain: a time by key, or None for a signal;
    ``sleeps`` when the sleeps end that an earlier start has begun.

    A failed step is *open* until the workflow's own thread has gone on to something later, or the
    run has completed. Open failures are tried again, so a new run does not take them over.
    """

    workflow: str
    id: str | None = None
    codec: Codec | None = None
    on_event: OnEvent | None = None
    on_drift: OnDrift = "error"
    recorder: Recorder | None = None
    steps: dict[str, str] = field(factory=dict)
    waits: dict[str, str | None] = field(factory=dict)
    sleeps: dict[str, str] = field(factory=dict)
    last_key: str | None = None
    settled: int = -1  # the number of the last failure that a wait of the own thread has settled
    _in_order: list[str] = field(factory=list)  # recorded by the own thread, not yet asked for
    _unnumbered: set[str] = field(factory=set)  # ... by Node, which keeps no order
    _parallel: set[str] = field(factory=set)  # ... by other threads
    _asked: set[str] = field(factory=set)
    _seq: int = 0
    _gone_on_after: int = 0  # the last number there was when the own thread asked for new work
    _in_step: dict[int, str] = field(factory=dict)  # by thread
    _done: set[str] = field(factory=set)  # what is known to be recorded by this start
    _unrecorded: str | None = None  # what the own thread has begun and not recorded
    _ended_by: BaseException | None = None
    _over: bool = False
    _own_thread: int = field(factory=threading.get_ident)
    _handled_before: BaseException | None = None
    _lock: threading.RLock = field(factory=threading.RLock)

    def restore(self, snapshot: WorkflowSnapshot) -> bool:
        """Take over what an earlier run has recorded; tell whether open failures were left out."""
        recorded = snapshot.to_json()["steps"]
        metadata = snapshot.metadata or {}
        metas = {key: step.get("meta") or {} for key, step in recorded.items()}
        seqs = {key: _positive(meta.get("seq")) for key, meta in metas.items()}
        if "settled" in metadata:
            self.settled = _positive(metadata["settled"])
        settled = max(self.settled, _own_thread_went_on_after(metas, seqs))
        # Node numbers nothing, but says which step was its last.
        last_of_node = str(metadata.get("lastStepKey"))
        completed = snapshot.execution.status == "completed"
        replayed = [
            key
            for key, step in recorded.items()
            if step["ok"]
            or completed
            or seqs[key] <= settled
            or (not seqs[key] and last_of_node != key and last_of_node in recorded)
        ]
        self.steps = {key: _json.dumps(recorded[key]) for key in replayed}
        self._seq = max(seqs.values(), default=0)
        if self._seq:
            self.last_key = max(seqs, key=seqs.__getitem__)
        self._parallel = {key for key in replayed if metas[key].get("parallel")}
        self._unnumbered = {key for key in replayed if not seqs[key]} - self._parallel
        in_order = [key for key in replayed if seqs[key] and key not in self._parallel]
        in_order.sort(key=seqs.__getitem__)
        self._in_order = in_order[::-1]  # the next one is the last
        for name in ("waits", "sleeps"):
            if isinstance(ends := metadata.get(name), Mapping):
                self.sleeps |= {
                    key: end
                    for key, end in ends.items()
                    if isinstance(end, str) and key not in self.steps
                }
        return len(replayed) < len(recorded)

    def run(self, fn: Callable[[], T]) -> T:
        """Call ``fn``, which steps through this run, and see that it asks for all that is recorded.

        ``fn`` may swallow or replace what has ended the run; the caller gets it all the same.
        """
        self._own_thread = threading.get_ident()
        self._handled_before = sys.exc_info()[1]
        self.emit("run_started")
        try:
            result = fn()
            if (unreached := self._unreached()) and self.on_drift == "error":
                self._interrupt(WorkflowDrift(self.id, None, unreached))
        except (Exception, Interrupted):
            if self._ended_by is None:
                raise
        if self._ended_by is not None:
            raise self._ended_by
        return result

    def end(self) -> None:
        """Refuse from now on what other threads still want to record."""
        with self._lock:
            self._over = True

    @property
    def interruption(self) -> AwaitlyError | None:
        """The error of ours that has ended the run, not one that a step has raised."""
        return self._ended_by if isinstance(self._ended_by, AwaitlyError) else None

    def step(self, key: str, fn: Callable[..., T], call: Callable[[], T]) -> T:
        """Replay ``key``, or run ``call`` and record what comes out."""
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
        return self._decode(key, fn, text)

    def step_transaction(self, key: str, fn: Callable[..., T], call: Callable[[Any], T]) -> T:
        """Replay ``key``, or run ``call`` and record it in one transaction."""
        recorder = self.recorder
        if recorder is None:
            raise WorkflowError("step.transaction needs a database; use Durable.run(id, ...)")
        recorded = self._ask(key)
        if recorded is not None:
            return self._replay(key, fn, recorded)
        text, of_the_body = "", None
        with self._live(key):
            timer = self._start(key)

            def body(conn: Any) -> T:
                nonlocal of_the_body
                try:
                    return call(conn)
                except Exception as error:
                    of_the_body = error
                    raise

            def enter(value: T) -> str:
                nonlocal text
                text = self._encode(key, value)
                return self._enter(key, text, timer.stop())

            try:
                recorder.transact(key, body, enter)
                self._acknowledge(key)
            except Exception as error:
                if isinstance(error, AwaitlyError) and error is not of_the_body:
                    if self._over:
                        raise
                    raise self._interrupt(error) from error
                if key in self.steps:  # committed, and interrupted right then: nothing may follow
                    self._stop(error)
                else:  # rolled back, by the body or because the server refused to commit it
                    self._record_failure(key, error, timer.stop())
                raise
        self.emit("step_completed", key, timer.stop()["durationMs"])
        return self._decode(key, fn, text)

    def sleep(self, key: str, duration: timedelta) -> Any:
        """Go on if the time of ``key`` has come, else suspend the run."""
        recorded = self._ask(key)
        if recorded is not None:
            return self._replay(key, _nothing, recorded)
        with self._live(key):
            timer = self._start(key)
            now = self._now()
            due = self.sleeps.get(key) or timestamp(now + duration)
            if due > timestamp(now):
                self._suspend(key, due)
            self._record_value(key, "null", timer.stop())
        return None

    def wait(self, key: str) -> Any:
        """Return what was sent for ``key``, else suspend the run."""
        recorded = self._ask(key)
        if recorded is not None:
            return self._replay(key, _nothing, recorded)
        with self._live(key):
            timer = self._start(key)
            value = self._signal(key) or self._suspend(key, None)
            self._record_value(key, value, timer.stop())
        return self._decode(key, _nothing, value)

    def forget(self, key: str) -> None:
        """Take back a step that was rolled back."""
        self.steps.pop(key, None)

    def steps_json(self) -> str:
        """Return all steps as the text of one JSON object."""
        return _json.join(self.steps)

    def standing(self, status: str, suspended: bool) -> dict[str, Any]:
        """Return what the metadata of a document tell of waiting and of settled failures."""
        found: dict[str, Any] = {}
        if suspended:
            found["waits"] = self.waits
        if sleeps := {key: end for key, end in self.sleeps.items() if key not in self.waits}:
            found["sleeps"] = sleeps
        if self.settled >= 0:
            found["settled"] = self.settled
        return {} if status == "completed" else found

    def refuse_if_over(self, key: str) -> None:
        """Raise if the run has ended, so that nothing is acknowledged which nobody keeps."""
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
        """Return the recorded JSON of ``key``, or None when the step may run now.

        The workflow's own thread asks for its recorded steps in their order, and for all of them
        before anything new. Other threads are free; what they have recorded and nobody has asked
        for when the function returns is drift then.
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
            if key in self._asked:
                raise self._interrupt(DuplicateStepKey(self.id, key))
            own = thread == self._own_thread
            if own and self.on_drift == "error" and not self._is_in_turn(key):
                raise self._interrupt(WorkflowDrift(self.id, key, self._unreached()))
            self._asked.add(key)
            if key in self.steps:
                self._reach(key)
                return self.steps[key]
            if own:
                if self._unrecorded is not None:
                    raise self._interrupt(
                        WorkflowError(
                            f"step {self._unrecorded!r} was interrupted before it was recorded, so "
                            f"step {key!r} may not follow it. Resume the run."
                        )
                    )
                self._unrecorded = key
                self._gone_on_after = self._seq
            return None

    def _is_in_turn(self, key: str) -> bool:
        if key in self._parallel or key in self._unnumbered:
            return True
        if self._in_order:
            return self._in_order[-1] == key
        return not self._unnumbered

    def _reach(self, key: str) -> None:
        if self._in_order and self._in_order[-1] == key:
            self._in_order.pop()
        elif key in self._parallel or key in self._unnumbered:
            self._parallel.discard(key)
            self._unnumbered.discard(key)
        else:
            self._in_order.remove(key)  # asked for by another thread, or drift is ignored

    def _refuse_if_ended(self) -> None:
        if self._ended_by is None and threading.get_ident() == self._own_thread:
            # A ``finally`` of the workflow while Ctrl-C or the like passes through it.
            passing = sys.exc_info()[1]
            if passing is not self._handled_before and not isinstance(
                passing, (Exception, Interrupted, type(None))
            ):
                self._stop(passing)
        if self._ended_by is not None:
            raise Interrupted(self._ended_by)

    def _unreached(self) -> list[str]:
        return [*self._in_order[::-1], *sorted(self._unnumbered | self._parallel)]

    # -- working ---------------------------------------------------------------------------

    @contextmanager
    def _live(self, key: str) -> Iterator[None]:
        """Run a step that is not recorded yet.

        When it is left without a record (Ctrl-C, or an exception out of a signal handler while it
        was being recorded), nothing may follow in this start: what came later would be recorded
        out of turn, and the step could never be asked for again.
        """
        thread = threading.get_ident()
        self._in_step[thread] = key
        try:
            yield
        except BaseException as error:
            unrecorded = key not in self._done or not isinstance(error, Exception)
            # GeneratorExit: an exception has struck just outside this block, and was handled.
            if unrecorded and not isinstance(error, (Interrupted, GeneratorExit)):
                self._stop(error)
            raise
        finally:
            self._in_step.pop(thread, None)

    def _stop(self, error: BaseException) -> None:
        with self._lock:
            if self._ended_by is None:
                self._ended_by = error

    def _interrupt(self, error: AwaitlyError) -> Interrupted:
        """End the run with ``error``: every further step is refused, in every thread."""
        self._stop(error)
        return Interrupted(error)

    def _now(self) -> datetime:
        if self.recorder is None:
            return datetime.now(timezone.utc)
        try:
            return self.recorder.now()
        except AwaitlyError as error:  # an outage travels past ``except Exception``, as elsewhere
            raise self._interrupt(error) from error

    def _signal(self, key: str) -> str | None:
        if self.recorder is None:
            return None
        try:
            return self.recorder.signal(key)
        except AwaitlyError as error:
            raise self._interrupt(error) from error

    def _suspend(self, key: str, due: str | None) -> NoReturn:
        with self._lock:
            self.waits[key] = due
            if due is not None:
                self.sleeps[key] = due
            if threading.get_ident() == self._own_thread:
                self.settled = self._gone_on_after  # it has gone on, to wait
        raise self._interrupt(WorkflowSuspended(self.id, key))

    def _start(self, key: str) -> _Timer:
        self.emit("step_started", key)
        return _Timer()

    def _record_value(self, key: str, text: str, timing: _Timing) -> None:
        self._record(key, lambda: self._enter(key, text, timing))
        self.emit("step_completed", key, timing["durationMs"])

    def _record_failure(self, key: str, error: Exception, timing: _Timing) -> None:
        def enter() -> str:
            step = {"ok": False, **_failure.to_json(error)}
            with self._lock:
                step["meta"] = {**step["meta"], **self._meta(timing)}
                return self._add(key, _json.dumps(step))

        self._record(key, enter, error)
        self.emit("step_failed", key, timing["durationMs"], error)

    def _acknowledge(self, key: str) -> None:
        """Note that a step is recorded: only then may another of the own thread follow."""
        self._done.add(key)
        if self._unrecorded == key:
            self._unrecorded = None

    def _record(self, key: str, enter: Callable[[], str], failure: Exception | None = None) -> None:
        try:
            if self.recorder is not None:
                self.recorder.record(key, enter)
            else:
                with self._lock:
                    self.refuse_if_over(key)
                    enter()
            self._acknowledge(key)
        except AwaitlyError as error:
            if self._over:
                raise
            raise self._interrupt(error) from (failure or error)

    def _enter(self, key: str, value: str, timing: _Timing) -> str:
        with self._lock:
            meta = _json.encode_own(self._meta(timing))
            return self._add(key, f'{{"ok":true,"value":{value},"meta":{meta}}}')

    def _add(self, key: str, step: str) -> str:
        self.steps[key] = step
        self.waits.pop(key, None)
        self.sleeps.pop(key, None)
        self.last_key = key
        return step

    def _meta(self, timing: _Timing) -> dict[str, Any]:
        before = self._seq
        self._seq += 1
        meta = {**timing, "seq": self._seq}
        if threading.get_ident() != self._own_thread:
            return {**meta, "parallel": True}
        # Steps of other threads were recorded since this one was asked for.
        return meta if self._gone_on_after == before else {**meta, "after": self._gone_on_after}

    def _encode(self, key: str, value: Any) -> str:
        try:
            return encode(self.codec, value, f"the result of step {key!r}")
        except AwaitlyError as error:
            raise self._interrupt(error) from error

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
        raise _failure.from_json(key, step)


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


def _own_thread_went_on_after(
    metas: Mapping[str, Mapping[str, Any]], seqs: Mapping[str, int]
) -> int:
    """Return the last number that was given before the own thread asked for its last recorded step.

    A step of the own thread was asked for when all before it had been recorded, unless it says
    otherwise: that steps of other threads were recorded while it ran.
    """
    own = [key for key, seq in seqs.items() if seq and not metas[key].get("parallel")]
    return max(
        (min(_positive(metas[key].get("after", seqs[key])), seqs[key] - 1) for key in own),
        default=-1,
    )
