"""What the tables hold, as values: runs and their steps, where they stand, and text to show.

The command line and the admin speak of runs in these words only. What a run's state is, and when
it is due, is decided here and nowhere else.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, Literal

from attrs import frozen

from .. import _json
from .._checks import check_id, moment
from ..snapshot import STATUSES, WorkflowSnapshot, as_mapping

__all__ = [
    "STATUSES",
    "RunRow",
    "SnapshotInfo",
    "State",
    "StepRow",
    "StoreStats",
    "check_id",
    "elide",
    "elide_steps",
    "is_input",
    "printable",
    "read_time",
    "reasons",
    "steps_of",
]

State = Literal["pending", "running", "waiting", "retrying", "completed", "failed", "cancelled"]

_NEVER = 9999  # the year of a wakeAt that only a signal ends
_FEW = 10  # first, last, longest and failed steps that are shown of many


@frozen
class SnapshotInfo:
    """One line of a listing. ``updated_at`` is aware; between rewrites of a long run it stands."""

    id: str
    status: str
    updated_at: datetime


@frozen
class StoreStats:
    """How much is stored: snapshots in all and by status, and bytes of all tables and indexes."""

    total: int
    by_status: Mapping[str, int]
    bytes: int


@frozen
class RunRow:
    """One stored run without its values, as it was at ``now`` by the server's clock.

    ``metadata`` lacks the input, the output and the failure. ``holder`` is the token of the lease,
    and ``held_until`` its end; both are None when nobody holds it.
    """

    id: str
    status: str
    updated_at: datetime
    step_count: int
    metadata: Mapping[str, Any]
    holder: str | None
    held_until: datetime | None
    now: datetime

    @classmethod
    def from_columns(cls, columns: Sequence[Any], prefix: str) -> RunRow:
        """Read what the statement ``details`` returns, and take the store's prefix off the id."""
        key, status, updated_at, step_count, metadata, holder, until, now = columns
        return cls(
            id=key[len(prefix) :],
            status=status,
            updated_at=moment(updated_at),
            step_count=step_count,
            metadata=_json.loads(metadata) if metadata else {},
            holder=holder,
            held_until=None if holder is None else moment(until),
            now=moment(now),
        )

    @property
    def state(self) -> State:
        """Where it stands, in one word."""
        if self.status == "completed":
            return "completed"
        if "cancelledAt" in self.metadata:
            return "cancelled"
        if self.holder is not None:
            return "running"
        if self.status == "failed":
            # What no Durable has stored is not tried again by itself.
            return "failed" if self.workflow is None else "retrying"
        if self.is_due:
            return "pending"
        # A start counts, and sets a pause, before it runs: this one has died.
        return "waiting" if self.waits_for else "retrying"

    @property
    def is_due(self) -> bool:
        """Whether nothing that it waits for is outstanding: no time and no answer."""
        wake_at = read_time(self.metadata.get("wakeAt"))
        signals = as_mapping(self.metadata.get("signals"))
        return wake_at is None or wake_at <= self.now or any(k in signals for k in self.waits_for)

    @property
    def next_at(self) -> datetime | None:
        """The time from which it is due; None if none is set, or only an answer can wake it."""
        wake_at = read_time(self.metadata.get("wakeAt"))
        return None if wake_at is None or wake_at.year == _NEVER else wake_at

    @property
    def waits_for(self) -> tuple[str, ...]:
        """The keys of the waits and sleeps in which it has suspended itself."""
        return tuple(as_mapping(self.metadata.get("waits")))

    @property
    def workflow(self) -> str | None:
        """The name of its workflow function; None if it was saved by hand or by Node."""
        name = self.metadata.get("workflow")
        return name if isinstance(name, str) else None

    @property
    def held_by(self) -> str:
        """``host:pid`` of the holder; the rest of a token only makes it unique."""
        token = self.holder or ""
        return token.rpartition(":")[0] or token

    @property
    def age(self) -> float:
        """Seconds since it was last written."""
        return (self.now - self.updated_at).total_seconds()


@frozen
class StepRow:
    """One recorded step. ``started_at`` is None if nobody measured it; ``seconds`` is then 0."""

    key: str
    ok: bool
    value: Any
    error: Any
    cause: Any
    started_at: datetime | None
    seconds: float
    seq: float

    @classmethod
    def from_json(cls, key: str, step: Mapping[str, Any]) -> StepRow:
        """Read the JSON of a step, whoever wrote it."""
        meta = as_mapping(step.get("meta"))
        return cls(
            key=key,
            ok=bool(step.get("ok")),
            value=step.get("value"),
            error=step.get("error"),
            cause=step.get("cause"),
            started_at=read_time(meta.get("startedAt")),
            seconds=_number(meta.get("durationMs")) / 1000,
            seq=_number(meta.get("seq")) or float("inf"),
        )

    @property
    def reasons(self) -> tuple[str, ...]:
        """Why it failed, and why that, nearest first; nothing if it did not fail."""
        if self.ok:
            return ()
        return reasons(self.cause) or (json.dumps(self.error, ensure_ascii=False),)


def steps_of(snapshot: WorkflowSnapshot) -> list[StepRow]:
    """Return the steps in the order in which they began, those that nobody measured last."""
    steps = [StepRow.from_json(*item) for item in snapshot.to_json()["steps"].items()]
    steps.sort(key=lambda step: step.seq)
    return sorted(steps, key=lambda s: s.started_at.timestamp() if s.started_at else float("inf"))


def reasons(failure: object) -> tuple[str, ...]:
    """Tell a recorded failure and what caused it, one line each, nearest first."""
    told = []
    while isinstance(failure, Mapping):
        name = failure.get("name") or failure.get("originalType")
        message = failure.get("message", failure.get("stringRepresentation"))
        if name or message:
            told.append(": ".join(str(part) for part in (name, message) if part))
        failure = failure.get("cause")
    return tuple(told)


def is_input(value: object) -> bool:
    """Tell whether this is an input as we record it; Node's users record theirs in any shape."""
    return (
        isinstance(value, Mapping)
        and set(value) == {"args", "kwargs"}
        and isinstance(value["args"], list)
        and isinstance(value["kwargs"], Mapping)
    )


def read_time(text: object) -> datetime | None:
    """Read a time of the snapshot format; None for anything else that a row may hold."""
    if not isinstance(text, str):
        return None
    try:
        time = datetime.fromisoformat(text.replace("Z", "+00:00"))
    except ValueError:
        return None
    return time if time.tzinfo else None


def printable(text: str, keep: str = "") -> str:
    """Escape what a terminal would obey instead of show: ids and messages are anybody's text."""
    if text.isprintable():
        return text
    return "".join(
        c if c.isprintable() or c in keep else c.encode("unicode_escape").decode() for c in text
    )


def elide(text: str, most: int | None, sign: str = "…") -> str:
    """Cut ``text`` to at most so many characters, ``sign`` included; None: not at all."""
    return text if most is None or len(text) <= most else text[: most - len(sign)] + sign


def elide_steps(steps: Sequence[StepRow], most: int) -> list[int]:
    """Return which of the steps to show: all, or of more than ``most`` the telling ones.

    Those are the first, the last, the failed, and the longest that matter.
    """
    order = range(len(steps))
    if len(steps) <= most:
        return [*order]
    share = sum(step.seconds for step in steps) / 100
    longest = sorted(order, key=lambda i: steps[i].seconds, reverse=True)[:_FEW]
    longest = [i for i in longest if steps[i].seconds > share]
    failed = [i for i in order if not steps[i].ok][-_FEW:]
    return sorted({*order[:_FEW], *order[-_FEW:], *longest, *failed})


def _number(value: object) -> float:
    return float(value) if isinstance(value, (int, float)) and value > 0 else 0.0
