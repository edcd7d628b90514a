"""Which steps one start of a workflow may ask for, and what has ended it."""

from __future__ import annotations

import sys
import threading
from collections.abc import Sequence

from attrs import define, field

from .._checks import OnDrift, check_id
from ..errors import AwaitlyError, DuplicateStepKey, WorkflowDrift, WorkflowError, WorkflowSuspended
from .codec import Codec
from .event import OnEvent
from .history import History, Recorded
from .recorder import Recorder


class Interrupted(BaseException):
    """Carries the error that ends the run past any ``except Exception`` of the user's code."""

    def __init__(self, error: BaseException) -> None:
        super().__init__(error)
        self.error = error


@define(eq=False, repr=False)
class Asking:
    """The part of `Run` that decides which step may be asked for now.

    Steps may be called from several threads. ``_lock`` guards the history and ``_ended_by``;
    ``_in_step`` and ``_done`` are changed without it, one key per thread, in single operations.
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
    _unrecorded: str | None = None  # the own thread's step that has begun but is not recorded yet
    _ended_by: BaseException | None = None
    _suspended_by: WorkflowSuspended | None = None
    _own_was_told: bool = False  # `Interrupted` was raised in the own thread
    _over: bool = False
    _own_thread: int = field(factory=threading.get_ident)
    _handled_before: BaseException | None = None
    _lock: threading.RLock = field(factory=threading.RLock)

    def is_own_thread(self) -> bool:
        """Return whether this is the workflow's own thread."""
        return threading.get_ident() == self._own_thread

    def is_interruption(self, error: BaseException) -> bool:
        """Return whether ``error`` is what this package ended or suspended the run with."""
        return isinstance(error, AwaitlyError) and (
            error is self._ended_by or error is self._suspended_by
        )

    @property
    def interruption(self) -> BaseException | None:
        """The error that ended the run, or else the one that suspended it; None if neither did."""
        return self._ended_by or self._suspended_by

    def has_ended(self, own: bool) -> bool:
        """Return whether no step may begin any more, in the own thread or in another one."""
        return self._over or self._ended_by is not None or (own and self._suspended_by is not None)

    def end(self) -> None:
        """From now on, refuse steps of threads that are still running: see `refuse_if_over`."""
        with self._lock:
            self._over = True

    # -- asking ----------------------------------------------------------------------------

    def _ask(self, key: str) -> Recorded | None:
        """Return what is recorded under ``key``, or None if the step may run now.

        The workflow's own thread must ask for its recorded steps in their order, and for all of
        them before anything new. Other threads may ask in any order; recorded steps of theirs that
        have not been asked for when the function returns are drift then.
        """
        check_id(key, "step key")
        with self._lock:
            self._refuse_to_ask(key, [key])
            history, own = self.history, self.is_own_thread()
            if own and self.on_drift == "error" and not history.is_in_turn(key):
                raise self._interrupt(WorkflowDrift(self.id, key, history.unreached()))
            recorded = history.ask(key, own)
            if recorded is None and own:
                self._begin(key)
            return recorded

    def ask_map(self, key: str, keys: Sequence[str]) -> list[Recorded | None]:
        """Return what `_ask` does for each of ``keys``, the steps of the map ``key``.

        All of them together have one place in the order of the workflow's own thread.
        """
        with self._lock:
            self._refuse_to_ask(key, [key, *keys])
            history, own = self.history, self.is_own_thread()
            if self.on_drift == "error":
                if (change := history.change_of_map(key, keys)) is not None:
                    raise self._interrupt(WorkflowDrift(self.id, key, *change))
                if own and not history.is_map_in_turn(keys):
                    raise self._interrupt(WorkflowDrift(self.id, key, history.unreached()))
            recorded = history.ask_map(key, keys, own)
            if None in recorded and own:
                self._begin(key)
            return recorded

    def _refuse_to_ask(self, key: str, keys: Sequence[str]) -> None:
        self.refuse_if_over(key)
        self.refuse_if_ended()
        if (outer := self._in_step.get(threading.get_ident())) is not None:
            raise self._interrupt(
                WorkflowError(
                    f"step {key!r} of {self.id or self.workflow!r} was called inside step "
                    f"{outer!r}, which is recorded as a whole. Call it from the workflow function."
                )
            )
        if (twice := self.history.asked_twice(keys)) is not None:
            raise self._interrupt(DuplicateStepKey(self.id, twice))

    def _begin(self, key: str) -> None:
        """Note that the own thread has begun a step, which must be recorded before the next."""
        if self._unrecorded is not None:
            raise self._interrupt(
                WorkflowError(
                    f"step {self._unrecorded!r} of {self.id or self.workflow!r} was interrupted "
                    f"before it was recorded, so step {key!r} cannot run after it. Resume the run."
                )
            )
        self._unrecorded = key

    def refuse_if_ended(self) -> None:
        """Raise if this thread may begin no further step.

        An error that has ended the run stops all threads. A suspension stops the workflow's own
        thread only: the others continue, to steps that they can record, and to waits and sleeps.
        """
        own = self.is_own_thread()
        if self._ended_by is None and own:
            # Called from a ``finally`` of the workflow, while Ctrl-C or the like is propagating.
            passing = sys.exc_info()[1]
            if passing is not self._handled_before and not isinstance(
                passing, (Exception, Interrupted, type(None))
            ):
                self.stop(passing)
        if (error := self.interruption if own else self._ended_by) is not None:
            self._own_was_told = self._own_was_told or own
            raise Interrupted(error)

    # -- what has ended it -----------------------------------------------------------------

    def refuse_if_over(self, key: str) -> None:
        """Raise if the run has ended: a step must not return as recorded when it is not."""
        if self._over:
            name = "this run" if self.id is None else f"the run of {self.id!r}"
            raise WorkflowError(
                f"{name} ended while another thread was still in step {key!r}; its result was not "
                "recorded. Have the workflow function wait for its threads."
            )

    def stop(self, error: BaseException) -> None:
        """End the run with ``error``: every further step is refused, in every thread."""
        with self._lock:
            if self._ended_by is None:  # the first error counts: later ones may be its consequences
                self._ended_by = error

    def _interrupt(self, error: AwaitlyError) -> Interrupted:
        self._own_was_told = self._own_was_told or self.is_own_thread()
        if not isinstance(error, WorkflowSuspended):
            self.stop(error)
        elif self._suspended_by is None:  # of several threads, any one will do
            self._suspended_by = error
        return Interrupted(error)
