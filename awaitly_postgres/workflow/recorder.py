"""What a run asks of the place where its steps are kept. In memory there is none."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime
from types import TracebackType
from typing import Any, Protocol


class Recorder(Protocol):
    """Where a run keeps its steps beyond its own memory.

    Every method may raise an `AwaitlyError`, which then ends the run.
    """

    def record(self, key: str, enter: Callable[[], str]) -> None:
        """Keep one step; ``enter`` adds it to the history and returns its JSON."""

    def transaction(self, key: str) -> StepTransaction:
        """Return a transaction in which one step runs and is kept."""

    def signal(self, key: str) -> str | None:
        """Return the JSON that was sent for ``step.wait(key)``, if any was."""

    def now(self) -> datetime:
        """Tell the time that counts."""


class StepTransaction(Protocol):
    """The transaction of one step: entering the block begins it, leaving the block commits it."""

    def __enter__(self) -> Any:
        """Return the connection."""

    def record(self, enter: Callable[[], str]) -> None:
        """Keep the step, as the last statement; ``enter`` is as for `Recorder.record`."""

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Commit, or roll back if the block raised."""

    def settle(self, error: BaseException) -> BaseException | None:
        """Find out what became of the transaction when ``error`` came out of it.

        Afterwards the history has the step only if it was committed. Returns what to raise: None
        if all went well but for the reply to the commit.
        """
