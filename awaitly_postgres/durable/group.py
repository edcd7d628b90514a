"""Group commit: steps that end while a commit is under way are committed together by the next."""

from __future__ import annotations

import _thread
import time
from collections.abc import Callable
from contextlib import suppress

from attrs import define, field

from ..errors import AwaitlyError
from ..workflow.mapping import held_lock

MOST = 1024 * 1024  # characters; a group that has as many takes no further steps


@define(eq=False, repr=False)
class Waiting:
    """A step that one thread wants to have recorded.

    ``enter`` adds it to the history and returns its JSON text. From then on it is in every rewrite
    of the snapshot; ``step`` keeps the text, so that every try writes the same.
    """

    key: str
    enter: Callable[[], str]
    step: str | None = None
    recorded: bool = False
    error: AwaitlyError | None = None  # why it was not recorded
    # Held until the thread is to go on. A plain lock, because a signal interrupts the wait for it,
    # and because a signal handler's exception cannot leave it half locked, as it can a Condition.
    awake: _thread.LockType = field(factory=held_lock)

    @property
    def is_settled(self) -> bool:
        """Whether its thread can go on."""
        return self.recorded or self.error is not None

    def wake(self) -> None:
        """Let its thread go on. May be repeated."""
        with suppress(RuntimeError):  # it was awake already
            self.awake.release()


@define(eq=False, repr=False)
class Group:
    """The steps of one run that wait to be recorded, and the thread that records them.

    Whoever finds no commit under way leads: it records all steps that wait by then. The others wait
    without a connection, and are woken when their step is recorded or has failed, or to lead next.

    An exception out of a signal handler may strike the main thread anywhere. If it leads, nothing
    is lost: the steps that it has entered are still here, and the next leader writes the same
    again, as a retry after a lost reply does.

    ``commit`` calls `entered` with the turn held, writes the result in one statement, and marks it
    as recorded.
    """

    _commit: Callable[[], None]
    _waiting: list[Waiting] = field(factory=list)  # replaced and extended only under the lock
    _leader: Waiting | None = None
    _size: int = 0  # of the last group
    _lock: _thread.LockType = field(factory=_thread.allocate_lock)

    def record(self, key: str, enter: Callable[[], str]) -> None:
        """Return when the step is recorded, by this thread or by another; else raise."""
        step = Waiting(key, enter)
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
            self._leave(step)  # in case the exception has struck on the way into the line above
            raise
        if step.error is not None:
            raise step.error

    def entered(self) -> list[Waiting]:
        """Enter what waits into the history; return all that is entered and not settled yet.

        A step that the history refuses, because the run has ended, is settled by that.
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

    def in_flight(self) -> list[Waiting]:
        """Return what is entered into the history and not settled yet."""
        return [step for step in self._waiting if step.step is not None and not step.is_settled]

    def _lead(self, leader: Waiting) -> None:
        # Threads just woken are soon back with another step. Without this the first of them would
        # commit its own alone while all others wait, so that every second commit would be of one.
        for _ in range(self._size):
            if len(self._waiting) >= self._size:
                break
            time.sleep(0)  # lets another thread have the interpreter
        try:
            self._commit()
        except AwaitlyError as error:
            # The outcome is the same for all that were sent. What was not even entered is left to
            # the next leader.
            for step in {leader, *self.in_flight()}:
                step.error = step.error or error

    def _leave(self, leaving: Waiting) -> None:
        """Wake those that are settled, and appoint the next leader. May be repeated."""
        if leaving.is_settled and self._leader is not leaving:
            return  # whoever has settled it removes it, and what is settled is never appointed
        with self._lock:
            # Woken before they are removed: should an exception strike in between, the repetition
            # still finds them.
            for step in self._waiting:
                if step.is_settled:
                    step.wake()
            self._waiting = [s for s in self._waiting if s is not leaving and not s.is_settled]
            if self._leader is leaving:
                self._leader = self._waiting[0] if self._waiting else None
                if self._leader is not None:
                    self._leader.wake()
