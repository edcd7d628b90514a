"""PostgreSQL persistence and durable execution for blocking Python."""

from .durable.checking import Problem
from .durable.durable import Durable
from .durable.pending import Outcome
from .errors import (
    AlreadyRunning,
    AwaitlyError,
    DuplicateStepKey,
    LeaseLost,
    NotSerializable,
    SchemaMissing,
    SnapshotError,
    SnapshotFormatError,
    StepFailed,
    StoreError,
    StoreUnavailable,
    VersionMismatch,
    WaitTimedOut,
    WorkflowCancelled,
    WorkflowConflict,
    WorkflowDrift,
    WorkflowError,
    WorkflowNotFound,
    WorkflowSuspended,
)
from .snapshot import (
    Execution,
    StepResult,
    WorkflowSnapshot,
    merge_snapshots,
    validate_snapshot,
)
from .store.lease import Lease
from .store.postgres import postgres
from .store.rows import RunInfo, SnapshotInfo, StepInfo, StoreStats
from .store.store import SnapshotStore
from .workflow.codec import Codec
from .workflow.event import Event
from .workflow.step import Step
from .workflow.workflow import Workflow

__version__ = "0.2.0"

__all__ = [
    "AlreadyRunning",
    "AwaitlyError",
    "Codec",
    "DuplicateStepKey",
    "Durable",
    "Event",
    "Execution",
    "Lease",
    "LeaseLost",
    "NotSerializable",
    "Outcome",
    "Problem",
    "RunInfo",
    "SchemaMissing",
    "SnapshotError",
    "SnapshotFormatError",
    "SnapshotInfo",
    "SnapshotStore",
    "Step",
    "StepFailed",
    "StepInfo",
    "StepResult",
    "StoreError",
    "StoreStats",
    "StoreUnavailable",
    "VersionMismatch",
    "WaitTimedOut",
    "Workflow",
    "WorkflowCancelled",
    "WorkflowConflict",
    "WorkflowDrift",
    "WorkflowError",
    "WorkflowNotFound",
    "WorkflowSnapshot",
    "WorkflowSuspended",
    "merge_snapshots",
    "postgres",
    "validate_snapshot",
]
