"""What a run needs from the store that records its steps. A run in memory has none."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime
from types import TracebackType
from typing import Any, Protocol


class Recorder(Protocol):
    """Records the steps of a run outside this process.

    Every method may raise an `AwaitlyError`, which then ends the run.
    """

    def refuse_to_begin(self) -> None:
        """Raise where a rollback could undo what a step does, although the step is recorded."""

    def leave_thread(self) -> None:
        """Close what is kept for the current thread, which is about to end."""

    def record(self, key: str, enter: Callable[[], str]) -> None:
        """Record one step; ``enter`` adds it to the history and returns its JSON text.

        The recorder decides when to call ``enter``, so that steps of several threads are recorded
        in the order of their numbers. It returns only when the step is recorded.
        """

    def record_timeout(self, key: str, enter: Callable[[], str]) -> bool:
        """Record that ``step.wait(key)`` has timed out, unless a signal for it has come by now.

        This is one atomic decision: once it has returned True, no signal for ``key`` is accepted.
        """

    def transaction(self, key: str) -> StepTransaction:
        """Return a transaction in which one step runs and is recorded."""

    def signal(self, key: str) -> str | None:
        """Return the JSON text that was sent for ``step.wait(key)``, or None."""

    def now(self) -> datetime:
        """Return the time by the clock that decides when sleeps end."""


class StepTransaction(Protocol):
    """The transaction of one step: entering the block begins it, leaving the block commits it."""

    def __enter__(self) -> Any:
        """Return the connection."""

    def record(self, enter: Callable[[], str]) -> None:
        """Record the step, as the last statement; ``enter`` is as for `Recorder.record`."""

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Commit, or roll back if the block raised."""

    def settle(self, error: BaseException) -> BaseException | None:
        """Find out whether the transaction that ended with ``error`` was committed.

        Afterwards the history has the step only if it was committed, or if the outcome is still
        unknown. Returns the exception to raise; None if the step was committed and only the reply
        to the commit was lost.
        """
