"""How long a failed run pauses, and in which order a worker resumes pending runs."""

from __future__ import annotations

import logging
import math
import random
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta
from typing import Any, Literal

from attrs import define, field, frozen

from .._checks import check_seconds
from ..store.rows import SnapshotInfo
from ..store.store import Infos

PAGE = 100  # entries in one listing
LONGEST_PAUSE = 3600.0  # seconds
GIVE_UP = math.inf  # the pause of a run that is given up

Backoff = Callable[[Exception, int], float | timedelta | None]

_log = logging.getLogger("awaitly_postgres")


def pause_after(attempts: int) -> float:
    """Return the pause in seconds after a failed start: 1, 2, 4 ... up to `LONGEST_PAUSE`.

    ``attempts`` counts the starts since the run last made progress, the failed one included.
    """
    return min(2.0 ** min(attempts - 1, 12), LONGEST_PAUSE)


def retry_delay(
    error: Exception, attempt: int, max_attempts: int | None, backoff: Backoff | None
) -> float:
    """Return the seconds before a run that has failed is due again; `GIVE_UP` if it is given up.

    If ``backoff`` raises or returns an invalid pause, that is logged and the default applies: a bug
    in it must neither end a run for good nor keep the failure from being recorded.
    """
    if attempts_are_exhausted(attempt, max_attempts):
        return GIVE_UP
    if backoff is None:
        return pause_after(attempt)
    try:
        pause = backoff(error, attempt)
        return GIVE_UP if pause is None else check_seconds(pause, "the result of backoff")
    except Exception:
        _log.exception("backoff failed for %s at attempt %d", type(error).__name__, attempt)
        return pause_after(attempt)


def attempts_are_exhausted(attempts: int, max_attempts: int | None) -> bool:
    """Return whether a run with this many starts is not started again automatically."""
    return max_attempts is not None and attempts >= max_attempts


@frozen
class Outcome:
    """The outcome of resuming one run, from `Durable.resume_pending` or `Durable.try_resume`.

    Attributes:
        id: the id of the run.
        status: ``"completed"``; ``"failed"``, if the workflow raised or could not be started;
            ``"suspended"``, if it waits for a time or a signal; ``"skipped"``, if another process
            got there first or the run was cancelled.
        result: what a completed workflow returned.
        error: the exception, unless it completed.
        attempts: the starts since the run last made progress, this one included.
        started: False if it could not be started or continued, so that nothing new ran.
        retry_at: when a failed run is retried automatically, by the server's clock; None: never.
    """

    id: str
    status: Literal["completed", "failed", "suspended", "skipped"]
    result: Any = None
    error: BaseException | None = None
    attempts: int = 0
    retry_at: datetime | None = None
    started: bool = True


@define(eq=False, repr=False)
class Queue:
    """Iterates over the pending runs, each once.

    A single worker takes the runs in the order of the listing. If another process got to a run
    first, both are working on the same listing: the worker then takes runs in random order, and
    lists again sooner, the more often it is too late.
    """

    _list: Callable[[SnapshotInfo | None, int], Infos]  # lists up to n entries after a given one
    _seen: set[str] = field(factory=set)
    _behind: SnapshotInfo | None = None
    _trust: int = PAGE  # how many runs of a listing to take before listing again
    _was_late: bool = False

    def __iter__(self) -> Iterator[SnapshotInfo]:
        while listing := self._list(self._behind, self._length):
            unseen = [info for info in listing if info.id not in self._seen]
            if not unseen:
                if self._behind == listing[-1]:
                    return  # its time is infinity, so no entry can come after it
                self._behind = listing[-1]
            if self._contended:
                random.shuffle(unseen)
            for info in unseen[: self._trust]:
                self._seen.add(info.id)
                yield info
                if self._was_late:
                    break
            self._trust = max(1, self._trust // 2) if self._was_late else min(PAGE, self._trust * 2)
            self._was_late = False

    @property
    def _contended(self) -> bool:
        return self._trust < PAGE

    @property
    def _length(self) -> int:
        return PAGE * min(self._trust, 10) if self._contended else PAGE

    def note_contention(self) -> None:
        """Note that another process had already taken the last run."""
        self._was_late = True
