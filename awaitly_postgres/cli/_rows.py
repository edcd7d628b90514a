"""What a listing tells of each workflow: a page of them in one statement."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime, timedelta
from typing import Any

from attrs import frozen

from .. import _json
from .._checks import moment
from ..snapshot import as_mapping
from ..store.store import SnapshotStore
from ._text import span

_PAGE = 500
_FAR = timedelta(days=365 * 1000)


@frozen
class Row:
    """One workflow. ``holder`` is None when nobody has its lease; ``now`` is the server's time."""

    id: str
    status: str
    updated_at: datetime
    steps: int
    metadata: Mapping[str, Any]
    holder: str | None
    held_until: datetime | None
    now: datetime

    @property
    def age(self) -> float:
        """Seconds since it was last written."""
        return (self.now - self.updated_at).total_seconds()

    @property
    def workflow(self) -> str | None:
        """The name of its workflow function; None if it was saved by hand or by Node."""
        name = self.metadata.get("workflow")
        return name if isinstance(name, str) else None

    @property
    def is_cancelled(self) -> bool:
        """Whether it was ended for good from outside."""
        return "cancelledAt" in self.metadata

    @property
    def next(self) -> str:
        """When it is to be resumed; empty if never, or not before its holder is done."""
        if self.is_cancelled:
            return "cancelled"
        if self.status == "completed" or self.holder is not None or self.workflow is None:
            return ""
        waits, signals = (as_mapping(self.metadata.get(name)) for name in ("waits", "signals"))
        wake_at = read_time(self.metadata.get("wakeAt"))
        if wake_at is None or wake_at <= self.now or any(key in signals for key in waits):
            return "due"
        if wake_at - self.now > _FAR:
            return f"waits for {', '.join(waits)}"
        verb = "retry" if self.status == "failed" else "wakes"
        return f"{verb} in {span((wake_at - self.now).total_seconds())}"

    def to_json(self) -> dict[str, Any]:
        """Return what ``--json`` prints."""
        until = self.held_until and self.held_until.isoformat()
        return {
            "id": self.id,
            "status": self.status,
            "updated_at": self.updated_at.isoformat(),
            "steps": self.steps,
            "workflow": self.workflow,
            "attempts": self.metadata.get("attempts"),
            "cancelled": self.is_cancelled,
            "wake_at": self.metadata.get("wakeAt"),
            "lease": self.holder and {"holder": self.holder, "expires_at": until},
        }


def find(store: SnapshotStore, ids: Sequence[str]) -> list[Row]:
    """Read these workflows, in this order; those that are not there are left out."""
    keys = [store.key(id) for id in ids]
    found = {row[0]: row for row in store._db.rows(store._sql.details, {"ids": keys})}
    skip = len(store.prefix)
    return [
        Row(
            id=key[skip:],
            status=status,
            updated_at=moment(updated_at),
            steps=steps,
            metadata=_json.loads(metadata) if metadata else {},
            holder=holder,
            held_until=None if holder is None else moment(until),
            now=moment(now),
        )
        for key, status, updated_at, steps, metadata, holder, until, now in (
            found[key] for key in keys if key in found
        )
    ]


def walk(
    store: SnapshotStore, prefix: str = "", status: str | None = None, limit: int = 100
) -> Iterator[Row]:
    """List workflows, newest first."""
    last = None
    while limit > 0 and (
        page := store.list(prefix, status=status, limit=min(limit, _PAGE), after=last)
    ):
        yield from find(store, [info.id for info in page])
        last = page[-1]
        limit -= len(page)


def read_time(text: object) -> datetime | None:
    """Read a time of the snapshot format; None for anything else."""
    if not isinstance(text, str):
        return None
    try:
        time = datetime.fromisoformat(text.replace("Z", "+00:00"))
    except ValueError:
        return None
    return time if time.tzinfo else None
