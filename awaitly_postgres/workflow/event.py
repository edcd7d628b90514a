"""What a run tells of itself, for logs, metrics and traces."""

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
    """Something that happened in a run, for ``on_event``. ``duration`` is in seconds.

    ``run_stopped`` is a run that ended without an end being recorded: refused, lease or database
    lost, Ctrl-C.
    """

    type: EventType
    workflow: str
    workflow_id: str | None
    key: str | None = None
    duration: float | None = None
    error: BaseException | None = None
    at: datetime = field(factory=lambda: datetime.now(timezone.utc))


OnEvent = Callable[[Event], object]
