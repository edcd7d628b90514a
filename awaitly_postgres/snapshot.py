"""The stored document: ``WorkflowSnapshot`` of the JavaScript package awaitly, format version 1.

Values only, no I/O. Unknown fields survive ``from_json`` and ``to_json`` unchanged, in ``extra``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime, timezone
from typing import Any, Literal, cast

from attrs import field, frozen

from . import _json
from .errors import SnapshotFormatError

FORMAT_VERSION = 1
STATUSES = ("running", "completed", "failed")
# Metadata that applies to one snapshot only: the next one rewrites it or leaves it out.
TRANSIENT_METADATA = (
    "output", "failure", "failures", "waits", "sleeps", "settled", "wakeAt", "gaveUpAt",
    "deadlines", "refusal",
)  # fmt: skip
# All metadata that this package writes. The user's own is stored under "custom".
OURS = (
    *TRANSIENT_METADATA, "input", "workflow", "version", "attempts", "submittedAt", "cancelledAt",
    "lastStepKey", "signals", "custom", "keyGeneration",
)  # fmt: skip
_OBJECT = (dict, Mapping)  # dict first: isinstance with the abstract class dominates otherwise

Status = Literal["running", "completed", "failed"]


@frozen
class StepResult:
    """The recorded outcome of one step.

    Attributes:
        ok: whether the step succeeded.
        value: its result as JSON, if it succeeded.
        error: its error, any JSON, if it failed.
        cause: the serialised exception, if it failed.
        meta: among others ``startedAt`` (ISO 8601), ``durationMs`` (milliseconds), ``seq`` (its
            number in the run, from 1) and, for a failure, ``origin``.
    """

    ok: bool
    value: Any = None
    error: Any = None
    cause: Mapping[str, Any] | None = None
    meta: Mapping[str, Any] = field(factory=dict)
    extra: Mapping[str, Any] = field(factory=dict)

    @classmethod
    def from_json(cls, obj: Mapping[str, Any]) -> StepResult:
        """Read the JSON of one step; raise `SnapshotFormatError` if it is not one."""
        _refuse([f"step{fault}" for fault in _step_faults(obj)])
        rest = dict(obj)
        return cls(
            ok=rest.pop("ok"),
            value=rest.pop("value", None),
            error=rest.pop("error", None),
            cause=rest.pop("cause", None),
            meta=rest.pop("meta", None) or {},
            extra=rest,
        )

    def to_json(self) -> dict[str, Any]:
        """Return the JSON object that is stored."""
        outcome = {"value": self.value} if self.ok else {"error": self.error, "cause": self.cause}
        meta = {"meta": dict(self.meta)} if self.meta else {}
        return {"ok": self.ok, **outcome, **meta, **self.extra}


class Steps(Mapping[str, StepResult]):
    """The steps of a snapshot by key: a read-only view that builds each `StepResult` on access.

    Loading a snapshot of 10,000 steps to look at three of them should not build 10,000 objects.
    """

    __slots__ = ("_json", "_texts")

    def __init__(self, json: Mapping[str, Any], texts: Mapping[str, str] | None = None) -> None:
        self._json = json
        self._texts = texts or {}

    def text(self, key: str) -> str:
        """Return the JSON text of a step: as it was read, or else encoded now."""
        return self._texts.get(key) or _json.dumps(self._json[key])

    def to_json(self) -> dict[str, Any]:
        """Return the stored JSON of the steps by key."""
        return dict(self._json)

    def __getitem__(self, key: str) -> StepResult:
        return StepResult.from_json(self._json[key])

    def __iter__(self) -> Iterator[str]:
        return iter(self._json)

    def __len__(self) -> int:
        return len(self._json)

    def __repr__(self) -> str:
        return f"Steps({list(self._json)})"


def _as_steps(steps: Mapping[str, StepResult]) -> Steps:
    if isinstance(steps, Steps):
        return steps
    return Steps({key: result.to_json() for key, result in steps.items()})


@frozen
class Execution:
    """The status of a run. Times are ISO 8601 in UTC, with milliseconds and a ``Z``.

    Attributes:
        status: ``"running"`` (also when it is suspended or waits to be started), ``"completed"``
            or ``"failed"``.
        last_updated: when the snapshot was composed.
        completed_at: when the run ended; None while it is running.
        current_step_id: the key of the step recorded last, unless the run has completed.
    """

    status: Status
    last_updated: str
    completed_at: str | None = None
    current_step_id: str | None = None
    extra: Mapping[str, Any] = field(factory=dict)

    @classmethod
    def from_json(cls, obj: Mapping[str, Any]) -> Execution:
        """Read the ``execution`` object; raise `SnapshotFormatError` if it is not one."""
        _refuse(_execution_faults(obj))
        rest = dict(obj)
        return cls(
            status=rest.pop("status"),
            last_updated=rest.pop("lastUpdated"),
            completed_at=rest.pop("completedAt", None),
            current_step_id=rest.pop("currentStepId", None),
            extra=rest,
        )

    def to_json(self) -> dict[str, Any]:
        """Return the JSON object that is stored."""
        optional = {"completedAt": self.completed_at, "currentStepId": self.current_step_id}
        return {
            "status": self.status,
            "lastUpdated": self.last_updated,
            **{name: value for name, value in optional.items() if value is not None},
            **self.extra,
        }


@frozen
class WorkflowSnapshot:
    """The stored document of one run.

    Attributes:
        steps: each step's `StepResult` by key.
        execution: the status of the run.
        metadata: the name and version of the workflow, its input and output, and what the user
            added; None if there is none.
        warnings: those of the JavaScript package about steps it could not serialise; kept as is.

    Example:
        >>> snapshot = WorkflowSnapshot.from_json({
        ...     "formatVersion": 1,
        ...     "steps": {"fetch-user": {"ok": True, "value": {"name": "Ada"}}},
        ...     "execution": {"status": "running", "lastUpdated": "2026-11-22T10:56:04.184Z"},
        ... })
        >>> snapshot.steps["fetch-user"].value["name"], snapshot.execution.status
        ('Ada', 'running')
    """

    steps: Mapping[str, StepResult] = field(converter=_as_steps)
    execution: Execution
    metadata: Mapping[str, Any] | None = None
    warnings: Sequence[Any] | None = None
    extra: Mapping[str, Any] = field(factory=dict)

    @classmethod
    def from_json(cls, obj: Mapping[str, Any], *, id: str | None = None) -> WorkflowSnapshot:
        """Read a stored document: this format, or the ``ResumeState`` of newer Node releases.

        Args:
            obj: the decoded JSON.
            id: the id it is stored as, for error messages.

        Raises:
            SnapshotFormatError: it is not a snapshot; the error lists every fault.
        """
        _refuse(validate_snapshot(obj), id)
        if obj.get("kind") == "ResumeState":
            obj = _from_resume_state(obj)
        rest = dict(obj)
        rest.pop("formatVersion")
        return cls(
            steps=Steps(rest.pop("steps")),
            execution=Execution.from_json(rest.pop("execution")),
            metadata=rest.pop("metadata", None),
            warnings=rest.pop("warnings", None),
            extra=rest,
        )

    def to_json(self) -> dict[str, Any]:
        """Return the JSON document that is stored."""
        optional = {"metadata": self.metadata, "warnings": self.warnings}
        return {
            "formatVersion": FORMAT_VERSION,
            "steps": cast(Steps, self.steps).to_json(),
            "execution": self.execution.to_json(),
            **{name: value for name, value in optional.items() if value is not None},
            **self.extra,
        }


def validate_snapshot(obj: object) -> list[str]:
    """Return every fault that keeps ``obj`` from being a snapshot; an empty list if it is one.

    It checks what the JavaScript package's ``validateSnapshot`` checks, and the types of the fields
    that this package reads. ``obj`` is the decoded JSON.
    """
    if not isinstance(obj, Mapping):
        return [f"the snapshot must be an object, not {_kind(obj)}"]
    if obj.get("kind") == "ResumeState":
        return _resume_state_faults(obj)
    faults = []
    if "formatVersion" not in obj:
        faults.append("formatVersion is missing")
    elif obj["formatVersion"] != FORMAT_VERSION or isinstance(obj["formatVersion"], bool):
        faults.append(f"formatVersion must be {FORMAT_VERSION}, not {obj['formatVersion']!r}")
    if "steps" not in obj:
        faults.append("steps is missing")
    elif not isinstance(obj["steps"], Mapping):
        faults.append(f"steps must be an object, not {_kind(obj['steps'])}")
    else:
        for key, step in obj["steps"].items():
            if found := _step_faults(step):
                faults += [f"steps[{key!r}]{fault}" for fault in found]
    if "execution" not in obj:
        faults.append("execution is missing")
    else:
        faults += _execution_faults(obj["execution"])
    metadata, warnings = obj.get("metadata"), obj.get("warnings")
    if metadata is not None and not isinstance(metadata, Mapping):
        faults.append(f"metadata must be an object, not {_kind(metadata)}")
    if warnings is not None and not isinstance(warnings, (list, tuple)):
        faults.append(f"warnings must be an array, not {_kind(warnings)}")
    return faults


def merge_snapshots(base: WorkflowSnapshot, delta: WorkflowSnapshot) -> WorkflowSnapshot:
    """Return ``base`` updated with ``delta``, as the JavaScript package's ``mergeSnapshots`` does.

    Steps and metadata of ``delta`` replace those of the same key, and its execution replaces that
    of ``base``. Warnings are kept, except those of ``base`` about a step that ``delta`` replaces.
    """
    replaced = cast(Steps, delta.steps).to_json()
    warnings = [
        warning
        for warning in base.warnings or ()
        if not (isinstance(warning, Mapping) and warning.get("stepId") in replaced)
    ] + list(delta.warnings or ())
    metadata = {**(base.metadata or {}), **(delta.metadata or {})}
    return WorkflowSnapshot(
        steps=Steps({**cast(Steps, base.steps).to_json(), **replaced}),
        execution=delta.execution,
        metadata=metadata or None,
        warnings=warnings or None,
        extra={**base.extra, **delta.extra},
    )


def compose(
    base: WorkflowSnapshot | None,
    status: Status,
    *,
    steps: Mapping[str, str],
    last_key: str | None,
    metadata: Mapping[str, Any],
    texts: Mapping[str, str],
) -> str:
    """Return the snapshot of a run as it stands now, as JSON text.

    Args:
        base: the snapshot that the run was resumed from; its unknown fields survive.
        status: the status of the run.
        steps: the JSON text of every step, by key.
        last_key: the key of the step recorded last.
        metadata: added to the metadata of ``base``.
        texts: further members of the metadata, as JSON text.
    """
    now = timestamp()
    execution = {"status": status, "lastUpdated": now}
    if status != "running":
        execution["completedAt"] = now
    told = dict((base.metadata if base else None) or {})
    for name in (*TRANSIENT_METADATA, *texts):
        told.pop(name, None)
    told.update(metadata)
    if last_key is not None:
        told["lastStepKey"] = last_key
        if status != "completed":
            execution["currentStepId"] = last_key
    members = {
        "formatVersion": str(FORMAT_VERSION),
        "steps": _json.join(steps),
        "execution": _json.encode_own(execution),
        "metadata": _json.join_to(told, texts),
    }
    if base is not None:
        if base.warnings:
            members["warnings"] = _json.dumps(base.warnings)
        members |= {name: _json.dumps(value) for name, value in base.extra.items()}
    return _json.join(members)


def timestamp(moment: datetime | None = None) -> str:
    """Return a time (default: now) as the format writes it, ``2026-11-22T10:56:04.184Z``."""
    moment = datetime.now(timezone.utc) if moment is None else moment.astimezone(timezone.utc)
    return moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")


def as_mapping(value: object) -> Mapping[str, Any]:
    """Return ``value`` if it is an object, else an empty one: anyone can edit the metadata."""
    return value if isinstance(value, Mapping) else {}


def _from_resume_state(obj: Mapping[str, Any]) -> dict[str, Any]:
    known = {"kind", "steps", "execution", "metadata", "warnings", "formatVersion"}
    return {
        "formatVersion": FORMAT_VERSION,
        "steps": dict(obj["steps"]),
        "execution": {"status": "running", "lastUpdated": timestamp()},
        **{name: value for name, value in obj.items() if name not in known},
    }


def _resume_state_faults(obj: Mapping[str, Any]) -> list[str]:
    if not isinstance(obj.get("steps"), (list, tuple)):
        return ["steps of a ResumeState must be an array"]
    faults = []
    for i, entry in enumerate(obj["steps"]):
        if not (isinstance(entry, (list, tuple)) and len(entry) == 2 and isinstance(entry[0], str)):
            faults.append(f"steps[{i}] must be a pair of key and result")
        else:
            faults += [f"steps[{i}][1]{fault}" for fault in _step_faults(entry[1])]
    return faults


def _step_faults(step: object) -> list[str]:
    """Return the faults of one step, each to be appended to the path of the step."""
    if not isinstance(step, _OBJECT):
        return [f" must be an object, not {_kind(step)}"]
    ok = step.get("ok")
    faults = []
    if "ok" not in step:
        faults.append(".ok is missing")
    elif not isinstance(ok, bool):
        faults.append(f".ok must be true or false, not {_kind(ok)}")
    elif not ok:
        faults += [f".{name} is missing" for name in ("error", "cause") if name not in step]
    for name in ("cause", "meta"):
        part = step.get(name)
        if part is not None and not isinstance(part, _OBJECT):
            faults.append(f".{name} must be an object, not {_kind(part)}")
    return faults


def _execution_faults(execution: object) -> list[str]:
    if not isinstance(execution, Mapping):
        return [f"execution must be an object, not {_kind(execution)}"]
    faults = []
    if "status" not in execution:
        faults.append("execution.status is missing")
    elif execution["status"] not in STATUSES:
        faults.append(
            f"execution.status must be one of {', '.join(STATUSES)}, not {execution['status']!r}"
        )
    if "lastUpdated" not in execution:
        faults.append("execution.lastUpdated is missing")
    for name in ("lastUpdated", "completedAt", "currentStepId"):
        value = execution.get(name)
        required = name == "lastUpdated" and name in execution
        if not isinstance(value, str) and (value is not None or required):
            faults.append(f"execution.{name} must be a string, not {_kind(value)}")
    return faults


def _refuse(faults: list[str], id: str | None = None) -> None:
    if faults:
        raise SnapshotFormatError(id, faults)


def _kind(value: object) -> str:
    names = {type(None): "null", bool: "a boolean", int: "a number", float: "a number"}
    names |= {str: "a string", list: "an array", dict: "an object"}
    return names.get(type(value), type(value).__name__)
