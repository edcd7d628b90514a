"""The events that a run reports, for logs, metrics and traces."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from datetime import datetime, timezone
from typing import Any, Literal

from attrs import field, frozen

from ..snapshot import timestamp

EventType = Literal[
    "run_started",
    "run_completed",
    "run_failed",
    "run_given_up",
    "run_suspended",
    "run_stopped",
    "step_started",
    "step_completed",
    "step_failed",
    "step_replayed",
]


@frozen
class Event:
    """Something that happened in a run, as passed to ``on_event``.

    Attributes:
        type: ``"run_..."`` when a run starts or ends, ``"step_..."`` for a step.
            ``"run_stopped"`` means that the run stopped and no end was recorded: it was refused or
            interrupted (Ctrl-C), or the lease or the database was lost. ``"run_given_up"`` follows
            the ``"run_failed"`` of a final failure; it comes alone for a run that was started
            ``max_attempts`` times and died each time.
        workflow: the name of the workflow.
        workflow_id: the id of the durable run; None in memory.
        key: the key of the step; None for a run.
        duration: seconds, for a step that completed or failed; else None.
        error: the exception of what failed, was suspended or stopped; else None.
        at: when it happened, by this machine's clock, in UTC.
    """

    type: EventType
    workflow: str
    workflow_id: str | None
    key: str | None = None
    duration: float | None = None
    error: BaseException | None = None
    at: datetime = field(factory=lambda: datetime.now(timezone.utc))


OnEvent = Callable[[Event], object]

_log = logging.getLogger("awaitly_postgres")


def tell(
    on_event: OnEvent | None,
    type: EventType,
    workflow: str,
    id: str | None,
    key: str | None = None,
    milliseconds: float | None = None,
    error: BaseException | None = None,
) -> None:
    """Log an event and call ``on_event``; if that raises, the error is logged.

    No message is built if the level is disabled: this is called twice for each step.
    """
    level = logging.WARNING if type == "run_given_up" else logging.DEBUG
    if _log.isEnabledFor(level):
        subject = workflow if id is None else f"{workflow} {id!r}"
        step = "" if key is None else f" {key!r}"
        took = "" if milliseconds is None else f" after {milliseconds / 1000:.3f} s"
        if error is None:
            _log.log(level, "%s: %s%s%s", subject, type, step, took)
        else:
            _log.log(level, "%s: %s%s%s: %r", subject, type, step, took, error)
    if on_event is None:
        return
    duration = None if milliseconds is None else milliseconds / 1000
    try:
        on_event(Event(type, workflow, id, key, duration, error))
    except Exception:
        _log.exception("on_event failed for %s of workflow %s", type, id or workflow)


Timing = dict[str, Any]


class Timer:
    """Measures one step: its start by the clock, and its duration by the performance counter.

    ``about`` has further fields for the step's ``meta``.
    """

    def __init__(self, about: Timing) -> None:
        self._about = about
        self._started = timestamp()
        self._counter = time.perf_counter()

    def stop(self) -> Timing:
        """Return the fields for the step's ``meta``."""
        elapsed = time.perf_counter() - self._counter
        times = {"startedAt": self._started, "durationMs": round(elapsed * 1000, 3)}
        return {**times, **self._about}
