"""Every exception of the package, in one tree.

* AwaitlyError
  * StoreError ── the database; psycopg's own error is the ``__cause__``
    · StoreUnavailable ── no connection, or none that lasted
    · SchemaMissing ── the tables are missing and cannot be created here; ``.ddl`` creates them
  * SnapshotError ── the data, stored or to be stored
    · SnapshotFormatError ── not a snapshot; ``.errors`` lists every fault
    · NotSerializable ── a value that JSONB cannot hold; ``.path`` says where it is
  * WorkflowError ── the run
    · AlreadyRunning · WorkflowNotFound · WorkflowConflict · VersionMismatch
    · WorkflowDrift · DuplicateStepKey · StepFailed
    · LeaseLost · WorkflowSuspended · WorkflowCancelled · WaitTimedOut

All can be pickled. Wrong arguments are ``TypeError`` or ``ValueError``, as everywhere in Python.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Any

from attrs import define


class AwaitlyError(Exception):
    """Base class of all errors of this package."""


@define(slots=False)
class StoreError(AwaitlyError):
    """The database refused a statement or failed; psycopg's own error is the ``__cause__``."""

    message: str

    def __str__(self) -> str:
        return self.message


class StoreUnavailable(StoreError):
    """The database could not be reached, although the store retried for ``retry_for`` seconds."""


@define(slots=False)
class SchemaMissing(StoreError):
    """The tables are missing, and this role or session may not create them.

    ``ddl`` is the SQL that creates them, for a role that may. ``migrate``, if not empty, is the
    command that runs it.
    """

    ddl: str
    migrate: str = ""

    def __str__(self) -> str:
        if self.migrate:
            return f"{self.message} Run '{self.migrate}'."
        return f"{self.message} With a role that may create tables, run:\n{self.ddl}"


class SnapshotError(AwaitlyError):
    """Stored data, or data to be stored, is not valid."""


@define(slots=False)
class SnapshotFormatError(SnapshotError):
    """The document is not a workflow snapshot.

    ``errors`` describes every fault in it; ``id`` is its id, None if it is not stored.
    """

    id: str | None
    errors: Sequence[str]

    def __str__(self) -> str:
        faults = "; ".join(self.errors)
        if self.id is None:
            return f"the given snapshot is not valid: {faults}. Correct it first."
        return (
            f"the snapshot stored as {self.id!r} is not valid: {faults}. Correct the row (or the "
            f"codec, if that failed), or call delete_state({self.id!r}) to discard it."
        )


@define(slots=False)
class NotSerializable(SnapshotError):
    """A value cannot be stored, because it is not JSON or JSONB cannot hold it. It was not written.

    ``path`` says where in the value (``$.user.created_at``), ``reason`` why, and ``subject`` what
    the value is (``the result of step 'charge-card'``).
    """

    path: str
    reason: str
    subject: str | None = None

    def __str__(self) -> str:
        subject = f"{self.subject}: " if self.subject else ""
        return (
            f"{subject}{self.path} cannot be stored as JSON: {self.reason}. "
            "The value was not written; convert it, or use a codec that does."
        )


class WorkflowError(AwaitlyError):
    """A run was refused, or ended without a result."""


@define(slots=False)
class AlreadyRunning(WorkflowError):
    """Another process, or another thread, holds the lease on this id.

    ``holder`` is the token of that lease, ``host:pid:random``; ``expires_at`` is when the lease
    expires unless it is renewed, by the server's clock.
    """

    id: str
    holder: str | None = None
    expires_at: datetime | None = None

    def __str__(self) -> str:
        until = f" until {self.expires_at:%Y-%m-%d %H:%M:%S%z}" if self.expires_at else ""
        return (
            f"workflow {self.id!r} is running elsewhere: its lease is held by "
            f"{(self.holder or 'another process')[:200]}{until} unless renewed. Try again later; "
            "if that process has died, the lease expires."
        )


@define(slots=False)
class WorkflowNotFound(WorkflowError):
    """No resumable run is stored under this id, or its workflow is not registered.

    ``workflow`` is the name that is not registered; None if there is nothing to resume.
    """

    id: str
    workflow: str | None = None

    def __str__(self) -> str:
        if self.workflow is None:
            return (
                f"no resumable run is stored as {self.id!r}. "
                "Start it with run(id, fn, ...), which also continues snapshots saved by hand."
            )
        return (
            f"{self.id!r} belongs to workflow {self.workflow!r}, which is not registered here. "
            "Import the module that decorates it with @durable.workflow first."
        )


@define(slots=False)
class WorkflowConflict(WorkflowError):
    """The id belongs to another workflow, or to the same one with another input.

    ``what`` is ``"workflow"`` or ``"input"``; ``stored`` and ``given`` are the two as text.
    """

    id: str | None
    what: str
    stored: str
    given: str

    def __str__(self) -> str:
        if self.id is None:  # in memory
            return (
                f"the snapshot is of {self.what} {self.stored}, not {self.given}. Pass the name= "
                "that the snapshot was made with, or another snapshot."
            )
        return (
            f"{self.id!r} is taken: it was started with {self.what} {self.stored}, "
            f"not {self.given}. Use another id, or call delete_state({self.id!r}) first."
        )


@define(slots=False)
class VersionMismatch(WorkflowError):
    """The run was recorded by another version of the workflow; no step ran.

    ``stored`` is the version of the run, ``requested`` that of the code.
    """

    id: str | None
    stored: int
    requested: int

    def __str__(self) -> str:
        way_out = 'pass on_version_mismatch="clear" or a migration, or delete the run.'
        if self.id is None:  # in memory
            way_out = "migrate the snapshot, or start without it."
        return (
            f"{_subject(self.id)} was recorded by version {self.stored}, but the code is version "
            f"{self.requested}; no step ran. Run the old code to finish it, {way_out}"
        )


@define(slots=False)
class WorkflowDrift(WorkflowError):
    """The code no longer asks for its recorded steps; the run stopped, and nothing was erased.

    ``key`` is the step or map it asked for instead (None: the function returned); ``unreached`` has
    the keys of the recorded steps that it did not ask for. ``counts``, for a map with other items
    than recorded, is the number of items recorded and the number now.
    """

    id: str | None
    key: str | None
    unreached: Sequence[str]
    counts: tuple[int, int] | None = None

    def __str__(self) -> str:
        did = "returned" if self.key is None else f"asked for step {self.key!r}"
        did += f" before the recorded steps {_listed([k for k in self.unreached if k != self.key])}"
        if self.counts is not None:
            before, now = self.counts
            did = f"asked for the map {self.key!r} over {now:,} items, recorded over {before:,}"
            if self.unreached:
                did += f", without the recorded steps {_listed(self.unreached)}"
        return (
            f"{_subject(self.id)} {did}: the code has changed since they were recorded, so the run "
            "was stopped. Restore the old steps, increase version= with a migration, or delete the "
            "run."
        )


@define(slots=False)
class DuplicateStepKey(WorkflowError):
    """One run used the same step key twice."""

    id: str | None
    key: str

    def __str__(self) -> str:
        return (
            f"{_subject(self.id)} used step key {self.key!r} twice in one run. "
            "Each step needs its own key: in a loop, put the loop variable into it; in a map, "
            "name= must return a different name for each item."
        )


@define(slots=False)
class StepFailed(WorkflowError):
    """A replayed failure whose own class is not loaded in this process.

    ``name`` and ``reason`` are the class name and the message of the recorded exception; ``error``
    is the JSON that is stored as the error of the step.
    """

    key: str
    name: str
    reason: str
    error: Any = None

    def __str__(self) -> str:
        return (
            f"step {self.key!r} failed with {self.name}: {self.reason} (replayed from the record; "
            "to get the exception itself, import the module of its class before the run)"
        )


@define(slots=False)
class LeaseLost(WorkflowError):
    """The lease expired, was taken over or was released; this write changed nothing.

    Also raised if the database has lost steps that the run had recorded.
    """

    id: str

    def __str__(self) -> str:
        return (
            f"the lease on {self.id!r} is lost: it expired, was taken over or was released, or the "
            "database has lost recorded steps. This write changed nothing; the run can be resumed "
            "from what is stored."
        )


@define(slots=False)
class WorkflowSuspended(WorkflowError):
    """The run is waiting, in step ``key``, for a time or a signal. This is not a failure."""

    id: str | None
    key: str

    def __str__(self) -> str:
        return (
            f"{_subject(self.id)} is suspended in step {self.key!r}. "
            "resume_pending() resumes it when its time or its signal has come."
        )


@define(slots=False)
class WaitTimedOut(WorkflowError):
    """No signal came within the timeout of ``step.wait(key)``. Later signals are refused.

    Unlike most of these errors, a workflow can catch it with ``except Exception`` and go on.
    """

    id: str | None
    key: str

    def __str__(self) -> str:
        return (
            f"{_subject(self.id)} waited for {self.key!r}, and no signal came in time. Catch "
            "WaitTimedOut to go on without one; rewind(id, key) waits again."
        )


@define(slots=False)
class WorkflowCancelled(WorkflowError):
    """The run was cancelled and cannot be resumed."""

    id: str

    def __str__(self) -> str:
        return (
            f"workflow {self.id!r} was cancelled. "
            f"Call delete_state({self.id!r}) to start it afresh."
        )


class WrongType(TypeError, ValueError):
    """An argument of the wrong type, where callers may also catch ``ValueError`` (ids, keys)."""


def _subject(id: str | None) -> str:
    return "this workflow" if id is None else f"workflow {id!r}"


def _listed(keys: Sequence[str], most: int = 5) -> str:
    shown = ", ".join(map(repr, keys[:most]))
    return shown if len(keys) <= most else f"{shown} and {len(keys) - most} more"
