"""Group commit: steps that end while a commit is under way are committed together by the next."""

from __future__ import annotations

import _thread
import time
from collections.abc import Callable
from contextlib import suppress

from attrs import define, field

from ..errors import AwaitlyError
from ..workflow.map import held_lock

MOST = 1024 * 1024  # characters; a group that has as many takes no further steps


@define(eq=False, repr=False)
class QueuedStep:
    """A step that one thread wants to have recorded.

    ``enter`` adds it to the history and returns its JSON text. From then on every rewrite of the
    snapshot includes it; ``step`` keeps the text, so that every retry writes the same.
    """

    key: str
    enter: Callable[[], str]
    step: str | None = None
    recorded: bool = False
    error: AwaitlyError | None = None  # why it was not recorded
    # Held until the thread may continue. A plain lock, because a signal interrupts the wait for it,
    # and because, unlike a Condition, a signal handler's exception cannot leave it inconsistent.
    awake: _thread.LockType = field(factory=held_lock)

    @property
    def is_settled(self) -> bool:
        """Whether its thread can continue."""
        return self.recorded or self.error is not None

    def wake(self) -> None:
        """Let its thread continue. Safe to repeat."""
        with suppress(RuntimeError):  # it is awake already
            self.awake.release()


@define(eq=False, repr=False)
class Group:
    """The steps of one run that wait to be recorded, and the thread that records them.

    A thread that finds no commit in progress becomes the leader: it records all steps that are
    waiting by then. The others wait without a connection, and are woken when their step is recorded
    or has failed, or to lead next.

    A signal handler can raise in the main thread at any point. If that thread is the leader,
    nothing is lost: the steps that it has entered are still here, and the next leader writes the
    same again, as a retry after a lost reply does.

    ``commit`` calls `entered` with the write lock held, writes the result in one statement, and
    marks it as recorded.
    """

    _commit: Callable[[], None]
    _waiting: list[QueuedStep] = field(factory=list)  # replaced and extended only under the lock
    _leader: QueuedStep | None = None
    _size: int = 0  # of the last group
    _lock: _thread.LockType = field(factory=_thread.allocate_lock)

    def record(self, key: str, enter: Callable[[], str]) -> None:
        """Return when the step is recorded, by this thread or by another; else raise."""
        step = QueuedStep(key, enter)
        try:
            try:
                with self._lock:
                    self._waiting.append(step)
                    if self._leader is None:
                        self._leader = step
                if self._leader is not step:
                    step.awake.acquire()
                if not step.is_settled:
                    self._lead(step)
            finally:
                self._leave(step)
        except BaseException:
            self._leave(step)  # again: the exception may have been raised in the finally above
            raise
        if step.error is not None:
            raise step.error

    def entered(self) -> list[QueuedStep]:
        """Enter the waiting steps into the history; return all that are entered and not settled.

        A step that the history refuses, because the run has ended, is settled with that error.
        """
        group, size = [], 0
        for step in list(self._waiting):
            if step.step is None and size < MOST:
                try:
                    step.step = step.enter()
                except AwaitlyError as error:
                    step.error = error
            if step.step is not None and not step.is_settled:
                size += len(step.step)
                group.append(step)
        self._size = len(group)
        return group

    def in_flight(self) -> list[QueuedStep]:
        """Return the steps that are entered into the history and not settled yet."""
        return [step for step in self._waiting if step.step is not None and not step.is_settled]

    def _lead(self, leader: QueuedStep) -> None:
        # The threads just woken will soon be back with another step. Without this pause, the first
        # one would commit its step alone while the others wait: every second commit would have one.
        for _ in range(self._size):
            if len(self._waiting) >= self._size:
                break
            time.sleep(0)  # lets another thread have the interpreter
        try:
            self._commit()
        except AwaitlyError as error:
            # The error applies to all steps that were sent. Steps that were not entered are left to
            # the next leader.
            for step in {leader, *self.in_flight()}:
                step.error = step.error or error

    def _leave(self, leaving: QueuedStep) -> None:
        """Wake the settled steps, and appoint the next leader. Safe to repeat."""
        if leaving.is_settled and self._leader is not leaving:
            return  # the leader that settled it removes it, and settled steps are never appointed
        with self._lock:
            # Woken before they are removed: if an exception is raised in between, the repeated call
            # still finds them.
            for step in self._waiting:
                if step.is_settled:
                    step.wake()
            self._waiting = [s for s in self._waiting if s is not leaving and not s.is_settled]
            if self._leader is leaving:
                self._leader = self._waiting[0] if self._waiting else None
                if self._leader is not None:
                    self._leader.wake()
