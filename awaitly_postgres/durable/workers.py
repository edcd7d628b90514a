"""Resuming the pending runs: one after another, or several at once in threads."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from contextvars import Context, copy_context
from queue import SimpleQueue

from attrs import define, field

from ..store.lease import RELEASE_TIMEOUT
from ..store.rows import SnapshotInfo
from .pending import Outcome, Queue
from .session import Session

InProgress = Callable[[Session], AbstractContextManager[object]]  # wraps a start
Attempt = Callable[[SnapshotInfo, InProgress], Outcome]
Ended = tuple[Outcome | None, BaseException | None]  # the outcome of a start, or what it raised


@define(eq=False, repr=False)
class Workers:
    """Starts runs and returns their outcomes: one in the caller's thread, several in their own.

    The threads are daemons: Python cannot stop a thread, and one that is stuck in a step must not
    keep the process from exiting on a second Ctrl-C.

    Args:
        attempt: starts one run, inside the context manager that it is given for its session.
        count: how many runs can be in progress at a time.
        leave: called by each thread when it ends.
    """

    _attempt: Attempt
    _count: int
    _leave: Callable[[], object]
    running: int = 0  # started, and not yet returned by `next`
    _sessions: set[Session] = field(factory=set)  # of the starts that are in progress
    _is_closed: bool = False
    _threads: list[threading.Thread] = field(factory=list)
    _tasks: SimpleQueue[tuple[Context, SnapshotInfo] | None] = field(factory=SimpleQueue)
    _ended: SimpleQueue[Ended] = field(factory=SimpleQueue)
    _pid: int = field(factory=os.getpid)

    @property
    def are_busy(self) -> bool:
        """Whether none is free for another run."""
        return self.running >= self._count

    def start(self, info: SnapshotInfo) -> None:
        """Start a run, with the context variables of the caller."""
        if self._count == 1:
            # In this thread, so that signal handlers raise in the workflow itself.
            self._ended.put((self._attempt(info, self._in_progress), None))
        else:
            if self.running == len(self._threads):
                self._add_thread()
            self._tasks.put((copy_context(), info))
        self.running += 1

    def _add_thread(self) -> None:
        self._threads.append(threading.Thread(target=self._work, daemon=True))
        try:
            self._threads[-1].start()
        except RuntimeError:
            # No more threads can be created: continue with the existing ones. Raising would abandon
            # the runs that are in progress.
            self._threads.pop()
            if not self._threads:
                raise
            self._count = len(self._threads)

    def next(self) -> Ended:
        """Wait for one of the runs to end."""
        ended = self._ended.get()
        self.running -= 1
        return ended

    def _work(self) -> None:
        while (task := self._tasks.get()) is not None:
            context, info = task
            try:
                self._ended.put((context.run(self._attempt, info, self._in_progress), None))
            except BaseException as error:
                self._ended.put((None, error))
            if os.getpid() != self._pid:
                # A child that the step forked has only this thread. Nobody there waits for the
                # outcome, and everything else belongs to its parent.
                os._exit(1)
            del task, context  # their values would live as long as this thread waits
        self._leave()

    @contextmanager
    def _in_progress(self, session: Session) -> Iterator[None]:
        self._sessions.add(session)
        try:
            # Checked after adding it: either this thread sees that no run may begin any more, or
            # `close` sees the session and stops it.
            if self._is_closed:
                raise KeyboardInterrupt
            yield
        finally:
            self._sessions.discard(session)

    def close(self) -> None:
        """End the threads. Runs in progress are abandoned, because the process must stop now.

        An abandoned run records nothing more, as after Ctrl-C, and another process can take it
        over. The code of its current step keeps running until it ends or the process does.
        """
        self._is_closed = True
        for _ in self._threads:
            self._tasks.put(None)
        if not self.running:
            for thread in self._threads:
                thread.join()
            return
        give_up_at = time.monotonic() + RELEASE_TIMEOUT
        sessions = [*self._sessions]  # in one go: the threads remove theirs
        for session in sessions:
            session.refuse_further_steps()
        for session in sessions:
            if time.monotonic() < give_up_at:
                session.release()


@define(eq=False, repr=False)
class Pass:
    """One pass over the pending runs.

    Only the caller's thread takes runs from the queue and reports their outcomes. So nothing here
    needs a lock, and no run is started before ``on_progress`` has returned.
    """

    _queue: Queue
    _workers: Workers
    _limit: int
    _on_progress: Callable[[Outcome], object] | None
    outcomes: list[Outcome] = field(factory=list)
    _ran: int = 0

    def run(self) -> list[Outcome]:
        """Start what is due, until nothing is or the limit is reached; return the outcomes."""
        workers = self._workers
        try:
            while True:
                for info in self._queue:
                    workers.start(info)
                    # Those in progress count against the limit until they turn out not to.
                    while workers.are_busy or self._ran + workers.running >= self._limit:
                        if not workers.running:
                            return self.outcomes
                        self._take()
                if not workers.running:
                    return self.outcomes
                self._take()  # then list again: it may have made others due
        finally:
            workers.close()

    def _take(self) -> None:
        """Wait for one run to end, and report it.

        Raises:
            what a worker could not report as an outcome (an outage, `SystemExit`), or what
            ``on_progress`` raises, after the other runs have ended; but KeyboardInterrupt at once.
        """
        outcome, error = self._workers.next()
        error = error or self._report(outcome)
        if error is None:
            return
        while self._workers.running and not isinstance(error, KeyboardInterrupt):
            outcome, _ = self._workers.next()
            if isinstance(again := self._report(outcome), KeyboardInterrupt):
                raise again
        raise error

    def _report(self, outcome: Outcome | None) -> BaseException | None:
        if outcome is None:
            return None
        self.outcomes.append(outcome)
        if outcome.status == "skipped":
            self._queue.note_contention()
        self._ran += outcome.started and outcome.status != "skipped"
        try:
            if self._on_progress is not None:
                self._on_progress(outcome)
        except BaseException as error:
            return error
        return None
