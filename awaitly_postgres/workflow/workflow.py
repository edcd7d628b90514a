"""Workflows in memory: for tests, and for saving and loading snapshots by hand."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Concatenate, Generic, Literal, ParamSpec, TypeVar

from attrs import define, field

from .. import _json
from .._checks import OnDrift, check_on_drift
from ..errors import VersionMismatch, WorkflowConflict, WorkflowDrift, WorkflowSuspended
from ..snapshot import Status, WorkflowSnapshot, compose
from .codec import Codec
from .event import EventType, OnEvent
from .history import History
from .run import Run
from .step import Step

P = ParamSpec("P")
T = TypeVar("T")


@define(eq=False)
class Workflow(Generic[P, T]):
    """A workflow in memory: run it, take its snapshot, run it again over a snapshot.

    Args:
        fn: the workflow function; its first parameter is a `Step`.
        name: its name in the snapshot (default: the function's name).
        version: increase it when the steps change; a snapshot of another version is refused.
        snapshot: what an earlier run recorded, a `WorkflowSnapshot` or its JSON; None starts
            afresh.
        codec: converts results to JSON and back.
        on_event: called with an `Event` whenever the run or a step starts, ends or is replayed; its
            errors are logged.
        on_drift: ``"ignore"`` lets new steps run before all recorded ones were asked for.

    Raises:
        VersionMismatch: the snapshot is of another version.
        WorkflowConflict: the snapshot is of another workflow.
        SnapshotFormatError: the JSON is not a snapshot.

    Example:
        >>> run = Workflow(lambda step, n: step("double", lambda: n * 2))
        >>> run(21), Workflow(run.fn, snapshot=run.snapshot())(21)
        (42, 42)
    """

    fn: Callable[Concatenate[Step, P], T]
    name: str = field(default=None, kw_only=True)
    version: int = field(default=1, kw_only=True)
    _snapshot: WorkflowSnapshot | None = field(default=None, kw_only=True)
    codec: Codec | None = field(default=None, kw_only=True)
    on_event: OnEvent | None = field(default=None, kw_only=True)
    on_drift: OnDrift = field(default="error", kw_only=True)

    def __attrs_post_init__(self) -> None:
        self.name = self.name or name_of(self.fn)
        check_on_drift(self.on_drift)
        if isinstance(self._snapshot, Mapping):
            self._snapshot = WorkflowSnapshot.from_json(self._snapshot)
        if self._snapshot is not None:
            metadata = self._snapshot.metadata or {}
            stored_name = metadata.get("workflow", self.name)
            if stored_name != self.name:
                raise WorkflowConflict(None, "workflow", repr(stored_name), repr(self.name))
            stored = stored_version(metadata)
            if stored != self.version:
                raise VersionMismatch(None, stored, self.version)

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> T:
        """Run the workflow over what is recorded, and return its result.

        Recorded steps are replayed. Afterwards `snapshot` has the steps of this run too, even if it
        failed; after `WorkflowDrift` it stays as it was.

        Raises:
            whatever the workflow raises.
            WorkflowDrift: the code no longer asks for the recorded steps.
            WorkflowSuspended: it reached a sleep that has not ended, or a wait.
        """
        run = Run(self.name, codec=self.codec, on_event=self.on_event, on_drift=self.on_drift)
        if self._snapshot is not None:
            # Through the same round trip as in a store, so that a replayed value is equal to what
            # the step returned when it ran.
            stored = _json.as_stored(_json.dumps(self._snapshot.to_json()))
            run.history = History.of(WorkflowSnapshot.from_json(stored))
        try:
            result = run.run(lambda: self.fn(Step(run), *args, **kwargs))
        except BaseException as error:
            run.emit(self._end(run, error), error=error)
            raise
        run.end()
        self._snapshot = self._document(run, "completed")
        run.emit("run_completed")
        return result

    @property
    def status(self) -> Status:
        """How the last run ended; ``"running"`` before it, and if it was suspended or stopped."""
        return "running" if self._snapshot is None else self._snapshot.execution.status

    def snapshot(
        self,
        *,
        include: Literal["all", "completed", "failed"] = "all",
        metadata: Mapping[str, Any] | None = None,
    ) -> WorkflowSnapshot:
        """Return what is recorded so far, ready for ``store.save``.

        Args:
            include: ``"all"`` steps, or only those that ``"completed"`` or ``"failed"``.
            metadata: added to the snapshot's own metadata; JSON values.

        Raises:
            NotSerializable: the metadata is not JSON.
            ValueError: ``include`` is something else.
        """
        if include not in ("all", "completed", "failed"):
            raise ValueError(f"include must be 'all', 'completed' or 'failed', not {include!r}")
        document = (self._snapshot or self._document(Run(self.name), "running")).to_json()
        if include != "all":
            wanted = include == "completed"
            document["steps"] = {k: s for k, s in document["steps"].items() if s["ok"] is wanted}
        document["metadata"] = {**(document.get("metadata") or {}), **(metadata or {})}
        return WorkflowSnapshot.from_json(_json.loads(_json.dumps(document)))

    def _end(self, run: Run, error: BaseException) -> EventType:
        run.end()
        ours = run.is_interruption(error)
        if ours and isinstance(error, WorkflowDrift):
            return "run_stopped"  # the code is wrong, not the record: the snapshot stays as it was
        if ours and isinstance(error, WorkflowSuspended):
            self._snapshot = self._document(run, "running", suspended=True)
            return "run_suspended"
        if isinstance(error, Exception):
            self._snapshot = self._document(run, "failed")
            return "run_failed"
        self._snapshot = self._document(run, "running")
        return "run_stopped"

    def _document(self, run: Run, status: Status, *, suspended: bool = False) -> WorkflowSnapshot:
        metadata = {"workflow": self.name, "version": self.version}
        return snapshot_of(run, self._snapshot, status, metadata, suspended=suspended)


def snapshot_of(
    run: Run,
    before: WorkflowSnapshot | None,
    status: Status,
    metadata: Mapping[str, Any],
    *,
    suspended: bool = False,
) -> WorkflowSnapshot:
    """Return the snapshot of a run in memory, which had ``before`` when it started."""
    history = run.history
    if status != "completed":
        metadata = {**metadata, **history.unfinished_metadata(suspended)}
    text = compose(
        before,
        status,
        steps=history.steps,
        last_key=history.last_key,
        metadata=metadata,
        texts={},
    )
    return WorkflowSnapshot.from_json(_json.loads(text))


def name_of(fn: Callable[..., Any]) -> str:
    """Return the default name of a workflow function."""
    return str(getattr(fn, "__name__", type(fn).__name__))


def stored_version(metadata: Mapping[str, Any]) -> int:
    """Return the version in a snapshot's metadata, or 1 without one, as the Node package does."""
    version = metadata.get("version", 1)
    return version if isinstance(version, int) and not isinstance(version, bool) else 1
