"""The events that a run reports, for logs, metrics and traces."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime, timezone
from typing import Literal

from attrs import field, frozen

EventType = Literal[
    "run_started",
    "run_completed",
    "run_failed",
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
            ``"run_stopped"`` means that the run stopped and no end was recorded: it was refused,
            the lease or the database was lost, or Ctrl-C.
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
