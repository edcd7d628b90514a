"""Rows as values: runs with their state and steps. How people read them is in ``text.py``.

The command line and the admin use only these two. The state is computed by ``fragment: state`` in
queries.sql.
"""

from __future__ import annotations

import json
import typing
from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, Literal, cast

from attrs import evolve, frozen

from .. import _json
from .._checks import check_id, moment, read_time
from ..errors import NotSerializable, SnapshotFormatError
from ..snapshot import OURS, STATUSES, Steps, WorkflowSnapshot, as_mapping
from .text import reasons, span, traceback_of

__all__ = [
    "STATES", "STATUSES", "RunInfo", "SnapshotInfo", "State", "StepInfo", "StoreStats", "check_id",
    "check_state", "is_input", "maps_of", "read_time", "steps_of",
]  # fmt: skip

State = Literal["pending", "running", "waiting", "retrying", "completed", "failed", "cancelled"]

STATES: tuple[State, ...] = typing.get_args(State)

_NEVER = 9999  # the year of the wakeAt of a run that waits for a signal only
_MOST = 2**53  # a larger number in a row is nonsense; many of them fit no float


@frozen
class SnapshotInfo:
    """An entry of a listing.

    ``updated_at`` is an aware datetime: when the snapshot was last written. A run that appends its
    steps to the journal does not change it.
    """

    id: str
    status: str
    updated_at: datetime


@frozen
class StoreStats:
    """Counts of snapshots: in total, by stored status, and by state; and the size in bytes.

    The size includes all tables and indexes. A status or state without snapshots is left out.
    """

    total: int
    by_status: Mapping[str, int]
    bytes: int
    by_state: Mapping[str, int]

    @classmethod
    def from_rows(cls, rows: Sequence[Sequence[Any]]) -> StoreStats:
        """Read the rows of the statement ``stats``; the completed are the total minus the rest."""
        numbers = {what: count for what, *_, count in rows}
        counted = [row[1:] for row in rows if row[0] == "unfinished"]
        if completed := numbers["total"] - sum(count for *_, count in counted):
            counted.insert(0, ("completed", "completed", completed))
        by_status, by_state = Counter[str](), Counter[str]()
        for status, state, count in counted:
            by_status[status] += count
            by_state[state] += count
        return cls(numbers["total"], dict(by_status), numbers["bytes"], dict(by_state))


@frozen
class StepInfo:
    """One recorded step.

    ``state`` is ``"completed"`` or ``"failed"``. ``started_at`` is an aware datetime and
    ``duration`` is in seconds; both are None if they were not recorded. ``value`` is JSON, as
    stored. For a failed step, ``error`` is the rebuilt exception (from `Durable.get` only),
    ``traceback`` its text, and ``cause`` and ``stored_error`` the JSON behind both. ``seq`` is its
    place in the order of recording, infinite if unknown. ``map`` is the key of the map that it is
    an item of, if any, and ``map_count`` the number of items of that map.
    """

    key: str
    state: Literal["completed", "failed"]
    started_at: datetime | None
    duration: float | None
    value: Any = None
    error: BaseException | None = None
    traceback: str | None = None
    cause: Any = None
    stored_error: Any = None
    seq: float = float("inf")
    map: str | None = None
    map_count: int = 0  # items of that map

    @classmethod
    def from_json(cls, key: str, step: Mapping[str, Any]) -> StepInfo:
        """Read the JSON of a step, whether Python or Node wrote it."""
        meta = as_mapping(step.get("meta"))
        milliseconds = meta.get("durationMs")
        return cls(
            key=key,
            state="completed" if step.get("ok") else "failed",
            started_at=read_time(meta.get("startedAt")),
            duration=None if milliseconds is None else _number(milliseconds) / 1000,
            value=step.get("value"),
            traceback=traceback_of(step.get("cause")),
            cause=step.get("cause"),
            stored_error=step.get("error"),
            seq=_number(meta.get("seq")) or float("inf"),
            map=name if isinstance(name := meta.get("map"), str) else None,
            map_count=int(_number(meta.get("of"))),
        )

    @property
    def ok(self) -> bool:
        """Whether it completed."""
        return self.state == "completed"

    @property
    def seconds(self) -> float:
        """How long it took; 0 if that was not recorded."""
        return self.duration or 0.0

    @property
    def reasons(self) -> tuple[str, ...]:
        """Why it failed: the error, then its causes; empty if it did not fail."""
        if self.ok:
            return ()
        return reasons(self.cause) or (json.dumps(self.stored_error, ensure_ascii=False),)


@frozen
class RunInfo:
    """One stored run, as it was at ``seen_at`` by the server's clock.

    ``state`` is one of

    - ``"pending"``: due, because it was submitted or its process died;
    - ``"running"``: a process, ``holder``, has its lease until ``held_until`` unless renewed;
    - ``"waiting"``: for a time, or for a signal to one of ``waits_for``;
    - ``"retrying"``: it failed or its process died, and it is retried at ``next_at``;
    - ``"completed"``, ``"failed"`` (for good), ``"cancelled"``.

    ``attempts`` counts the starts since the run last made progress. ``metadata`` is the user's own.
    ``maps`` has the progress of each `Step.map` by its key: items completed, and items in total; in
    a listing, only for runs that have not completed. All times are aware datetimes.

    `Durable.get` also fills in ``input`` (JSON, as stored), ``result``, ``error`` (the rebuilt
    exception), its ``traceback``, ``cause`` (the JSON behind both) and ``steps``; listings do not
    read them.
    """

    id: str
    workflow: str | None
    version: int
    state: State
    attempts: int
    next_at: datetime | None
    waits_for: tuple[str, ...]
    holder: str | None
    held_until: datetime | None
    updated_at: datetime
    metadata: Mapping[str, Any]
    step_count: int
    status: str  # as stored
    seen_at: datetime
    maps: Mapping[str, tuple[int, int]] = {}
    input: Any = None
    result: Any = None
    error: BaseException | None = None
    traceback: str | None = None
    cause: Any = None
    steps: Sequence[StepInfo] = ()

    @classmethod
    def from_columns(cls, columns: Sequence[Any], prefix: str) -> RunInfo:
        """Read the columns of ``run_columns``, and remove the store's prefix from the id."""
        key, status, state, updated_at, step_count, maps, text, holder, until, now = columns
        metadata = as_mapping(_loads_if_possible(text))
        name, version = metadata.get("workflow"), metadata.get("version")
        wake_at = read_time(metadata.get("wakeAt"))
        ended = state in ("completed", "failed", "cancelled")
        return cls(
            id=key[len(prefix) :],
            workflow=name if isinstance(name, str) else None,
            version=int(_number(version)) or 1,
            state=state,
            attempts=int(_number(metadata.get("attempts"))),
            next_at=None if ended or wake_at is None or wake_at.year == _NEVER else wake_at,
            waits_for=() if ended else tuple(as_mapping(metadata.get("waits"))),
            holder=holder,
            held_until=None if holder is None else moment(until),
            updated_at=moment(updated_at),
            metadata=_of_the_user(metadata),
            step_count=step_count,
            status=status,
            seen_at=moment(now),
            maps={n: (done, int(_number(of))) for n, done, of in _loads_if_possible(maps) or ()},
        )

    @property
    def is_due(self) -> bool:
        """Whether it would be resumed now, if nobody holds it."""
        due = self.next_at is None or self.next_at <= self.seen_at
        return self.state == "pending" or (self.state == "retrying" and due)

    @property
    def what_next(self) -> str:
        """When it continues, in words; empty if never, or if a process is running it now."""
        if self.workflow is None or self.state in ("running", "completed", "failed", "cancelled"):
            return ""
        if self.is_due:
            return "due"
        left = "" if self.next_at is None else span((self.next_at - self.seen_at).total_seconds())
        if self.state == "retrying" or not self.waits_for:
            return f"in {left}"
        return f"waits for {', '.join(self.waits_for)}" + (left and f", {left} left")

    @property
    def reasons(self) -> tuple[str, ...]:
        """Why it last failed: the error, then its causes; empty if it did not fail."""
        return reasons(self.cause)

    @property
    def progress(self) -> str:
        """The progress of its incomplete maps, in words; empty if there are none."""
        open_maps = [f"{key} {n}/{of}" for key, (n, of) in self.maps.items() if n < of]
        return ", ".join(open_maps)

    @property
    def held_by(self) -> str:
        """The ``host:pid`` of the holder; the rest of the token only makes it unique."""
        token = self.holder or ""
        return token.rpartition(":")[0] or token

    @property
    def age(self) -> float:
        """Seconds since it was last written."""
        return (self.seen_at - self.updated_at).total_seconds()


def check_state(state: str | None) -> str | None:
    """Return ``state`` if it is one of the seven states, or None; else raise ValueError."""
    if state is not None and state not in STATES:
        raise ValueError(f"state must be one of {', '.join(STATES)}, not {state!r}")
    return state


def page_after(after: SnapshotInfo | RunInfo | None, prefix: str) -> dict[str, str]:
    """Return the parameters of a listing that goes on after this entry; None: from the start."""
    if after is None:
        return {}
    if not isinstance(after, (SnapshotInfo, RunInfo)):
        raise TypeError(f"after must be the last entry of the previous page, not {after!r:.80}")
    return {"after_time": after.updated_at.isoformat(), "after_id": prefix + after.id}


def in_state(state: str | None) -> dict[str, Any]:
    """Return the parameters of a statement that reads only runs in ``state``; None for any."""
    unfinished = state is not None and state != "completed"
    return {"state": check_state(state), "unfinished": unfinished or None}


def steps_of(snapshot: WorkflowSnapshot) -> list[StepInfo]:
    """Return the steps in the order in which they began; those without a start time come last."""
    steps = [StepInfo.from_json(*item) for item in snapshot.to_json()["steps"].items()]
    steps.sort(key=lambda step: step.seq)
    return sorted(steps, key=lambda s: s.started_at.timestamp() if s.started_at else float("inf"))


def maps_of(steps: Sequence[StepInfo]) -> dict[str, tuple[int, int]]:
    """Return the number of completed items and of all items of each map, by its key."""
    found: dict[str, tuple[int, int]] = {}
    for step in steps:
        if step.map is not None:
            done, of = found.get(step.map, (0, step.map_count))
            found[step.map] = done + step.ok, of
    return found


def encode_snapshot(id: str, snapshot: WorkflowSnapshot | Mapping[str, Any]) -> str:
    """Validate a snapshot and return it as JSON text, before a connection is acquired."""
    if isinstance(snapshot, Mapping):
        snapshot = WorkflowSnapshot.from_json(snapshot)
    if not isinstance(snapshot, WorkflowSnapshot):
        raise TypeError(
            "snapshot must be a WorkflowSnapshot or its JSON as a mapping, "
            f"not {type(snapshot).__name__}"
        )
    try:
        return _json.dumps(snapshot.to_json())
    except NotSerializable as error:
        raise NotSerializable(error.path, error.reason, f"the snapshot for {id!r}") from None


def decode_snapshot(
    id: str, text: str, journal: str | None, keep_texts: bool = False
) -> WorkflowSnapshot:
    """Read a row: the snapshot, and the steps of the journal that it does not have yet.

    ``keep_texts`` keeps the JSON text of each step, for a run that will write them again.
    """
    try:
        document, texts = _json.loads_document(text) if keep_texts else (_json.loads(text), {})
        appended, in_journal = _json.loads_members(journal or "{}")
    except (ValueError, RecursionError) as error:
        raise SnapshotFormatError(id, [f"it cannot be decoded: {error}"]) from error
    if appended and isinstance(document, dict) and isinstance(document.get("steps"), dict):
        document["steps"] = {**appended, **document["steps"]}
    snapshot = WorkflowSnapshot.from_json(document, id=id)
    if keep_texts:
        steps = cast(Steps, snapshot.steps).to_json()
        snapshot = evolve(snapshot, steps=Steps(steps, {**in_journal, **texts}))
    return snapshot


def is_input(value: object) -> bool:
    """Return whether ``value`` is an input that we recorded; Node users store any shape."""
    return (
        isinstance(value, Mapping)
        and set(value) == {"args", "kwargs"}
        and isinstance(value["args"], list)
        and isinstance(value["kwargs"], Mapping)
    )


def _of_the_user(metadata: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the user's metadata; Node and version 0.1 keep it beside the library's own."""
    beside = {name: value for name, value in metadata.items() if name not in OURS}
    return {**beside, **as_mapping(metadata.get("custom"))}


def _loads_if_possible(text: str | None) -> Any:
    """Decode JSON of a listing; None if it cannot be decoded, which must not end the listing."""
    try:
        return _json.loads(text or "null")
    except (ValueError, RecursionError):  # an integer of over 4,300 digits, a thousand levels
        return None


def _number(value: object) -> float:
    return float(value) if isinstance(value, (int, float)) and 0 < value <= _MOST else 0.0
