"""Replaying a run up to its first step that is not recorded."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from attrs import define

from ..errors import AwaitlyError
from .asking import Interrupted
from .history import Recorded
from .run import Run

T = TypeVar("T")


class FirstNewStep(AwaitlyError):
    """The workflow has asked for a step that is not recorded, which would run now."""


@define(eq=False, repr=False)
class Replay(Run):
    """A start that runs no step and records nothing: it ends at the first new step.

    ``undecodable`` is the key of the step whose value the codec could not decode.
    """

    undecodable: str | None = None

    def step_transaction(self, key: str, fn: Callable[..., T], call: Callable[[Any], T]) -> T:
        """Replay ``key`` like any other step, without opening a transaction."""
        return self.step(key, fn, lambda: call(None))

    def emit(self, *event: Any, **details: Any) -> None:
        """Report nothing: a dry run has no events."""

    def _ask(self, key: str) -> Recorded:
        recorded = super()._ask(key)
        if recorded is None:
            raise self._interrupt(FirstNewStep(key))
        return recorded

    def ask_map(self, key: str, keys: Sequence[str]) -> list[Recorded | None]:
        """Return the recorded items if all are recorded; no item runs."""
        recorded = super().ask_map(key, keys)
        if None in recorded:
            raise self._interrupt(FirstNewStep(key))
        return recorded

    def replay(self, key: str, fn: Callable[..., T], recorded: Recorded) -> T:
        try:
            return super().replay(key, fn, recorded)
        except Interrupted:
            self.undecodable = key
            raise
