"""Helpers for testing workflows: crash them everywhere, let time pass, finish what is due."""

from __future__ import annotations

import os
import pickle
import reprlib
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from datetime import MAXYEAR, datetime, timedelta, timezone
from functools import partial
from itertools import zip_longest
from typing import Any, TypeVar

import psycopg
from attrs import define, field, frozen

from . import _json
from ._checks import read_time
from .durable.admission import Found
from .durable.durable import Durable
from .durable.pending import Outcome
from .durable.registry import Registry
from .errors import NotSerializable, SnapshotFormatError, WorkflowError, WorkflowSuspended
from .snapshot import WorkflowSnapshot, as_mapping, timestamp
from .workflow.codec import Codec, encode
from .workflow.event import EventType
from .workflow.history import History
from .workflow.replay import Replay
from .workflow.run import Run
from .workflow.step import Step
from .workflow.workflow import snapshot_of

T = TypeVar("T")
Place = tuple[str, str]  # when, and the key of the step

_NAME = "crash_everywhere"  # of the workflow and its run, while it is tried
BEFORE, WORKED, RECORDED = "before", "after the work of", "after the record of"
_TIMES = ("waits", "sleeps", "deadlines")  # what a stored run has to wait for, by key
_FIRST = datetime.min.replace(tzinfo=timezone.utc)
_HASH_SEEDS = range(1, 4)


def crash_everywhere(
    workflow: Callable[..., object],
    *args: Any,
    signals: Mapping[str, Any] | None = None,
    conn: psycopg.Connection[Any] | None = None,
    codec: Codec | None = None,
    **kwargs: Any,
) -> dict[str, int]:
    """Run ``workflow`` whole, then crash it at each place where a process can die, and resume it.

    Those places are before each step, after its work, and after it is recorded. Everything happens
    in memory. The bodies of the steps really run, whenever a process would run them; if a body runs
    again, its first result or exception is recorded again, so its result may be random. Sleeps and
    timeouts pass at once.

    A whole run is also replayed in processes with a different order of sets, if ``workflow`` and
    its arguments can be pickled. With cloudpickle installed, nested functions can be pickled, too.

    Args:
        workflow: the workflow function.
        *args: its arguments after the `Step`.
        signals: what each ``step.wait`` gets, by key. Those without a signal time out.
        conn: the connection for ``step.transaction``, in savepoints. Each run on it is rolled back
            in the end, and so is a step that crashes before it is recorded.
        codec: the one of the `Durable`, if it has one.
        **kwargs: its keyword arguments.

    Returns:
        by key, how often the body of each step has run in all: once in each run, and once more
        where the crash came between its work and its record.

    Raises:
        AssertionError: after a crash, the result or the order of the steps was different. The
            message names the place. Either the code between the steps is not deterministic (a
            clock, a random number, the order of a set), or the body of a step cannot be repeated.
        ValueError: the workflow waits for a signal that was not given.
        TypeError: the workflow does not take these arguments.
        AwaitlyError: the workflow cannot run at all: it uses a key twice, or a step inside a step,
            or ``step.transaction`` without ``conn=``, or a result is not JSON.

    Example:
        >>> def order(step, id):
        ...     paid = step("charge", lambda: f"paid {id}")
        ...     return step("ship", lambda: f"shipped, {paid}")
        >>> crash_everywhere(order, "123")
        {'charge': 8, 'ship': 8}
    """
    Registry().of(workflow).check_call(args, kwargs)
    trial = _Trial(partial(workflow, **kwargs), args, signals or {}, conn, codec)
    whole = trial.carry_out(None)
    for place in trial.places:
        trial.compare(whole, trial.carry_out(place), f"a crash {place[0]} step {place[1]!r}")
    if whole.document is not None:
        _replay_elsewhere(trial, whole)
    return dict(trial.ran)


def pass_time(durable: Durable, time: timedelta) -> None:
    """Let ``time`` pass for unfinished runs: for their sleeps, timeouts, pauses and delays.

    The server's clock is not changed; the stored times are. Runs that a process is running, and
    those that wait for no time, are left as they are.

    Example:
        >>> durable.submit("trial-1", trial_period)
        >>> drain(durable)  # it sleeps for 30 days
        >>> pass_time(durable, timedelta(days=30))
        >>> drain(durable)[0].status
        'completed'
    """
    store = durable.store
    for info in list(store.iter()):
        if info.status == "completed":
            continue
        key = {"id": store.prefix + info.id}
        for row in store._db.rows(store._sql.read_for_resume, key):
            try:
                found = Found.of(info.id, row)
            except SnapshotFormatError:
                continue  # nothing can resume it
            metadata = found.snapshot.metadata or {}
            times: dict[str, Any] = _closer({"wakeAt": metadata.get("wakeAt")}, time)
            for name in _TIMES:
                ends = as_mapping(metadata.get(name))
                if closer := _closer(ends, time):
                    times[name] = {**ends, **closer}
            if "workflow" in metadata and times:
                params = {**key, "seen": found.written_at, "times": _json.dumps(times)}
                store._db.count(store._sql.move_times, params)


def drain(durable: Durable) -> list[Outcome]:
    """Call `Durable.resume_pending` until nothing is due any more; return all outcomes.

    A run that cannot be started, because its row is malformed for example, is returned once.
    """
    outcomes: list[Outcome] = []
    refused: set[str] = set()
    while True:
        new = [each for each in durable.resume_pending() if each.started or each.id not in refused]
        refused |= {each.id for each in new if not each.started}
        outcomes += new
        if all(outcome.status == "skipped" for outcome in new):
            return outcomes


def _closer(ends: Mapping[str, Any], time: timedelta) -> dict[str, str]:
    return {
        # A time that would be before the year 1 has come long ago, wherever it is moved to.
        name: timestamp(moment - min(time, moment - _FIRST))
        for name, end in ends.items()
        if (moment := read_time(end)) and moment.year < MAXYEAR  # which stands for never
    }


class _Crash(BaseException):
    """The process has died here."""


@frozen
class _End:
    """How a run came out: what it returned or raised, and the order of its steps."""

    outcome: str
    order: list[str]
    keys: set[str]
    document: WorkflowSnapshot | None  # of a run that has completed


@define(eq=False)
class _Trial:
    """All runs of one call of `crash_everywhere`, which share what the bodies have returned."""

    workflow: Callable[..., object]
    args: tuple[Any, ...]
    signals: Mapping[str, Any]
    conn: psycopg.Connection[Any] | None
    codec: Codec | None
    places: list[Place] = field(factory=list)  # where the whole run came by
    ran: Counter[str] = field(factory=Counter)  # the bodies, by key
    # What each body returned when it ran first, or the exception that it raised.
    results: dict[str, tuple[bool, Any]] = field(factory=dict)
    now: datetime = field(factory=lambda: datetime.now(timezone.utc))
    is_whole: bool = True
    crash_at: Place | None = None
    lock: threading.RLock = field(factory=threading.RLock)

    def carry_out(self, crash_at: Place | None) -> _End:
        """Run the workflow from its first start to its end, with a crash on the way or without."""
        self.is_whole, self.crash_at = crash_at is None, crash_at
        with self.conn.transaction(force_rollback=True) if self.conn else nullcontext():
            return self._finish()

    def _finish(self) -> _End:
        stored: WorkflowSnapshot | None = None
        while True:
            run = _CrashingRun(_NAME, _NAME, codec=self.codec, trial=self)
            if stored is not None:
                run.history = _read_back(stored)
            try:
                output = _output(run, self.workflow, self.args)
            except _Crash:
                stored = snapshot_of(run, stored, "running", {})
            except Exception as error:
                if isinstance(error, WorkflowSuspended) and run.is_interruption(error):
                    self._wait_for(run.history)
                    stored = snapshot_of(run, stored, "running", {}, suspended=True)
                elif self.is_whole and (
                    run.is_interruption(error) or isinstance(error, NotSerializable)
                ):
                    raise  # a refusal would be the outcome of every run, and they would all agree
                else:
                    return self._end_of(run, stored, error, None)
            else:
                return self._end_of(run, stored, None, output)
            finally:
                run.end()

    def _wait_for(self, history: History) -> None:
        """Let the time pass until the first of the sleeps and timeouts is over."""
        ends = [moment for end in history.waits.values() if (moment := read_time(end))]
        if not ends:
            wanted = ", ".join(map(repr, history.waits))
            raise ValueError(
                f"the workflow waits for a signal to {wanted}, and none was given; "
                "pass signals={key: value}"
            )
        self.now = max(self.now, min(ends))

    def _end_of(
        self, run: Run, stored: WorkflowSnapshot | None, error: Exception | None, output: str | None
    ) -> _End:
        done = snapshot_of(run, stored, "failed" if error else "completed", {})
        steps = done.to_json()["steps"]
        metas = {key: step.get("meta", {}) for key, step in steps.items()}
        own = [key for key, meta in metas.items() if not meta.get("parallel")]
        own.sort(key=lambda key: int(metas[key].get("seq", 0)))
        # The items of a map have no order among each other: the map has its place among the steps.
        order = list(dict.fromkeys(str(metas[key].get("map", key)) for key in own))
        outcome = _raised(error) if error else f"returns {output}"
        return _End(outcome, order, set(steps), None if error else done)

    def compare(self, whole: _End, other: _End, what: str) -> None:
        """Raise AssertionError if a run has come out different from the whole one."""
        if whole.outcome != other.outcome:
            difference = f"the workflow {other.outcome}, and without it {whole.outcome}"
        elif whole.order != other.order:
            orders = [map("step {!r}".format, end.order) for end in (whole, other)]
            pairs = zip_longest(*orders, fillvalue="the end")
            before, after = next(pair for pair in pairs if pair[0] != pair[1])
            difference = f"{after} comes where {before} comes without it"
        elif odd := sorted(whole.keys ^ other.keys):
            difference = f"the steps are others: {reprlib.repr(odd)} with it or without it only"
        else:
            return
        raise AssertionError(
            f"after {what}, {difference}. The code between the steps must do the same each time: "
            "put clocks, random numbers and other systems into steps, and sort sets. The body of a "
            "step must be repeatable."
        )

    # -- called by the runs ----------------------------------------------------------------

    def pass_by(self, place: Place) -> None:
        """Note the place in the whole run; crash there if this run is meant to."""
        with self.lock:
            if self.is_whole and place not in self.places:
                self.places.append(place)
            if self.crash_at == place:
                self.crash_at = None
                raise _Crash

    def work(self, key: str, call: Callable[[], T]) -> T:
        """Run the body of a step, and return or raise what it did when it ran first."""
        with self.lock:
            self.ran[key] += 1
        try:
            value: Any = call()
        except Exception as error:
            succeeded, value = self.results.setdefault(key, (False, error))
            if succeeded:
                raise  # it cannot be repeated
        else:
            succeeded, value = self.results.setdefault(key, (True, value))
        self.pass_by((WORKED, key))
        if not succeeded:
            raise value
        result: T = value
        return result


@define(eq=False)
class _CrashingRun(Run):
    """One start of a trial's run."""

    trial: _Trial = field(kw_only=True)

    def execute(self, key: str, fn: Callable[..., T], call: Callable[[], T], *how: Any) -> T:
        return super().execute(key, fn, lambda: self.trial.work(key, call), *how)

    def step_transaction(self, key: str, fn: Callable[..., T], call: Callable[[Any], T]) -> T:
        if (conn := self.trial.conn) is None:
            raise self._interrupt(
                WorkflowError("step.transaction needs a database: pass crash_everywhere(conn=...)")
            )
        recorded = self._ask(key)
        if recorded is not None:
            return self.replay(key, fn, recorded)

        def body() -> T:
            with self.trial.lock, conn.transaction():  # a crash after the work rolls it back
                return self.trial.work(key, lambda: call(conn))

        return super().execute(key, fn, body, self.is_own_thread())

    def emit(self, type: EventType, key: str | None = None, *details: Any, **more: Any) -> None:
        if key is not None and type == "step_started":
            self.trial.pass_by((BEFORE, key))
        if key is not None and type in ("step_completed", "step_failed"):
            self.trial.pass_by((RECORDED, key))

    def _now(self) -> datetime:
        return self.trial.now

    def _signal(self, key: str) -> str | None:
        if key not in self.trial.signals:
            return None
        return encode(self.codec, self.trial.signals[key], f"the signal for step {key!r}")


def _output(run: Run, workflow: Callable[..., object], args: Sequence[Any]) -> str:
    result = run.run(lambda: workflow(Step(run), *args))
    return encode(run.codec, result, "the output of the workflow")


def _read_back(stored: WorkflowSnapshot) -> History:
    """Return the history as the database gives it back: keys are in the order of JSONB."""
    return History.of(WorkflowSnapshot.from_json(_json.as_stored(_json.dumps(stored.to_json()))))


def _raised(error: Exception) -> str:
    return f"raises {type(error).__name__}: {error}"


# -- replays in other processes ------------------------------------------------------------


def _replay_elsewhere(trial: _Trial, whole: _End) -> None:
    """Replay the whole run where strings have other hashes, and sets another order."""
    try:
        import cloudpickle as pickler  # type: ignore[import-not-found,import-untyped,unused-ignore]
    except ImportError:
        pickler = pickle
    try:
        task = pickler.dumps((trial.workflow, trial.args, trial.codec, whole.document))
    except Exception:  # it refers to something that cannot be pickled, in whatever way that fails
        return
    code = (
        f"import sys; sys.path = {sys.path!r}; from {__name__} import _replay_here; _replay_here()"
    )
    children = [
        subprocess.Popen(  # noqa: S603
            [sys.executable, "-c", code],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "PYTHONHASHSEED": str(seed)},
        )
        for seed in _HASH_SEEDS
    ]
    ends = [child.communicate(task)[0] for child in children]
    for end in ends:
        if end:  # otherwise it could not load the workflow
            outcome = pickle.loads(end)  # noqa: S301 - from our own child
            there = _End(outcome, whole.order, whole.keys, None)
            trial.compare(whole, there, "a replay in a process that orders sets differently")


def _replay_here() -> None:
    workflow, args, codec, document = pickle.load(sys.stdin.buffer)  # noqa: S301 - from our parent
    out, sys.stdout = sys.stdout.buffer, sys.stderr
    run = Replay(_NAME, _NAME, codec=codec, history=_read_back(document))
    try:
        outcome = f"returns {_output(run, workflow, args)}"
    except Exception as error:
        outcome = _raised(error)
    out.write(pickle.dumps(outcome))
    out.flush()
