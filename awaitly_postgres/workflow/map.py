"""`Step.map`: one step for each item, in threads."""

from __future__ import annotations

import _thread
from collections.abc import Callable, Iterator, Sequence
from contextvars import Context, copy_context
from threading import Thread
from typing import Any, Generic, TypeVar

from attrs import define, field

from .asking import Interrupted
from .history import Recorded
from .run import Run

A = TypeVar("A")
T = TypeVar("T")


@define(eq=False, repr=False)
class Map(Generic[A, T]):
    """One call of `Step.map`: replays the items that are recorded, and runs the others.

    Args:
        run: the run it belongs to.
        key: its key, which takes one place in the order of the workflow's own thread.
        fn: called with each item.
        items: the items.
        keys: the key of each item's step.
    """

    run: Run
    key: str
    fn: Callable[[A], T]
    items: Sequence[A]
    keys: Sequence[str]
    _own: bool = False
    _results: list[Any] = field(factory=list)
    _failure: tuple[int, Exception] | None = None  # only the first: there may be very many
    _lock: _thread.LockType = field(factory=_thread.allocate_lock)

    def __call__(self, workers: int) -> list[T]:
        """Return the results in the order of the items, or raise the first failure among them."""
        run = self.run
        recorded = run.ask_map(self.key, self.keys)
        self._own, self._results = run.is_own_thread(), [None] * len(recorded)
        missing = []
        for index, step in enumerate(recorded):
            if step is None:
                missing.append(index)
            else:
                self._replay(index, step)
        if missing:
            # As for a single step: what interrupts this before all items are recorded ends the run.
            with run.executing(self.key):
                run.refuse_to_begin()  # the threads would not see what this one is inside of
                count = min(workers, len(missing))
                Threads(self._execute, iter(missing), run.leave_thread, count).run(self.key)
                run.refuse_if_ended()
                run.mark_recorded(self.key)
        if self._failure is not None:
            raise self._failure[1]
        return self._results

    def _replay(self, index: int, step: Recorded) -> None:
        try:
            self._results[index] = self.run.replay(self.keys[index], self.fn, step)
        except Exception as error:
            self._note(index, error)

    def _execute(self, index: int) -> bool:
        """Run one item; return whether another may begin."""
        if self.run.has_ended(self._own):
            return False
        item, about = self.items[index], {"map": self.key, "of": len(self.keys)}
        try:
            self._results[index] = self.run.execute(
                self.keys[index], self.fn, lambda: self.fn(item), self._own, about
            )
        except Exception as error:
            self._note(index, error)
        except BaseException as error:
            if not isinstance(error, Interrupted):  # SystemExit in a thread ends the run, too
                self.run.stop(error)
            return False
        return True

    def _note(self, index: int, error: Exception) -> None:
        with self._lock:
            if self._failure is None or index < self._failure[0]:
                self._failure = index, error


def held_lock() -> _thread.LockType:
    """Return an acquired lock: the next `acquire` waits until somebody releases it."""
    lock = _thread.allocate_lock()
    lock.acquire()
    return lock


@define(eq=False, repr=False)
class Threads:
    """Calls ``work`` with each number of ``todo``, in ``count`` threads, until it returns False.

    A signal handler can raise in the calling thread at any point. So that thread does not use
    `threading`, whose internal locks could stay locked for ever: it only waits for a plain lock.
    Everything else is done by threads that signals do not interrupt.
    """

    _work: Callable[[int], bool]
    _todo: Iterator[int]
    _leave_thread: Callable[[], object]  # called by each thread when it ends
    _count: int  # threads that have not ended
    _context: Context = field(factory=copy_context)
    _has_begun: bool = False
    _is_stopped: bool = False
    _error: RuntimeError | None = None  # why a thread could not be started
    _lock: _thread.LockType = field(factory=_thread.allocate_lock)
    _at_work: _thread.LockType = field(factory=held_lock)  # held until all threads have ended

    def run(self, name: str) -> None:
        """Return when all items are done, or all threads have ended because one was told to stop.

        An exception raised meanwhile (Ctrl-C) propagates once the threads have ended: they finish
        their current items and begin no more. A second one propagates at once.
        """
        try:
            _thread.start_new_thread(self._start, (name,))
            self._wait()
        except BaseException:
            with self._lock:
                self._is_stopped = True
                has_begun = self._has_begun
            if has_begun:
                self._wait()
            raise
        if self._error is not None and next(self._todo, None) is not None:
            raise self._error

    def _wait(self) -> None:
        # A second at a time: a signal that arrives just before this thread blocks does not wake it.
        # The lock is not released again, so the count decides whether all have ended: an interrupt
        # may come after the lock was acquired, and the next wait must end, too.
        while self._count > 0 and not self._at_work.acquire(timeout=1):
            pass

    def _start(self, name: str) -> None:
        with self._lock:
            if self._is_stopped:
                return  # `run` was interrupted, and does not wait
            self._has_begun = True
        for nr in range(self._count):
            try:
                # daemon= is passed because its default calls current_thread(), which would register
                # this thread for ever: it was not started by `threading`.
                Thread(target=self._go, name=f"{name}-{nr}", daemon=False).start()
            except RuntimeError as error:
                self._error = error
                self._leave()

    def _go(self) -> None:
        try:
            while not self._is_stopped:
                with self._lock:
                    index = next(self._todo, None)
                # Each item has a copy of the caller's context variables, so that spans nest.
                if index is None or not self._context.copy().run(self._work, index):
                    break
        finally:
            try:
                self._leave_thread()
            finally:
                self._leave()

    def _leave(self) -> None:
        with self._lock:
            self._count -= 1
            if self._count == 0:
                self._at_work.release()
