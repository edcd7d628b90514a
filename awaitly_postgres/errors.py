"""Every exception of the package, in one tree.

* AwaitlyError
  * StoreError ── the database; psycopg's own error is the ``__cause__``
    · StoreUnavailable ── no connection, or none that stays
    · SchemaMissing ── the tables are not there and may not be made; ``.ddl`` makes them
  * SnapshotError ── what is stored, or should be
    · SnapshotFormatError ── not a snapshot; ``.errors`` lists every fault
    · NotSerializable ── a value that JSONB cannot hold; ``.path`` says which
  * WorkflowError ── the run
    · AlreadyRunning · WorkflowNotFound · WorkflowConflict · VersionMismatch
    · WorkflowDrift · DuplicateStepKey · StepFailed
    · LeaseLost · WorkflowSuspended · WorkflowCancelled

All can be pickled. Wrong arguments are ``TypeError`` or ``ValueError``, as everywhere in Python.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Any

from attrs import define


class AwaitlyError(Exception):
    """Base of every error that this package raises on purpose."""


@define(slots=False)
class StoreError(AwaitlyError):
    """The database refused or failed; the driver's error is the ``__cause__``."""

    message: str

    def __str__(self) -> str:
        return self.message


class StoreUnavailable(StoreError):
    """No connection could be had, or none lasted, for as long as the store retries."""


@define(slots=False)
class SchemaMissing(StoreError):
    """The tables are missing and this role or session may not create them.

    ``ddl`` is what someone who may has to run.
    """

    ddl: str

    def __str__(self) -> str:
        return f"{self.message} Have a role that may create tables run:\n{self.ddl}"


class SnapshotError(AwaitlyError):
    """Something is wrong with what is stored, or with what should be."""


@define(slots=False)
class SnapshotFormatError(SnapshotError):
    """The document is not a workflow snapshot; ``errors`` names every fault in it."""

    id: str | None
    errors: Sequence[str]

    def __str__(self) -> str:
        faults = "; ".join(self.errors)
        if self.id is None:
            return f"the given snapshot is not valid: {faults}. Correct it first."
        return (
            f"the snapshot stored as {self.id!r} is not valid: {faults}. "
            f"Correct the row, or delete_state({self.id!r}) to start afresh."
        )


@define(slots=False)
class NotSerializable(SnapshotError):
    """A value that PostgreSQL's JSONB cannot hold; nothing was written.

    ``path`` is where in the value (``$.user.created_at``), ``subject`` what the value was for.
    """

    path: str
    reason: str
    subject: str | None = None

    def __str__(self) -> str:
        subject = f"{self.subject}: " if self.subject else ""
        return (
            f"{subject}{self.path} cannot be stored as JSON: {self.reason}. "
            "Nothing of it was written; convert it, or give a codec that does."
        )


class WorkflowError(AwaitlyError):
    """A run was refused, or ended without a result."""


@define(slots=False)
class AlreadyRunning(WorkflowError):
    """Somebody else holds the lease on this id."""

    id: str
    holder: str | None = None
    expires_at: datetime | None = None

    def __str__(self) -> str:
        until = f" until {self.expires_at:%Y-%m-%d %H:%M:%S%z}" if self.expires_at else ""
        return (
            f"workflow {self.id!r} is running elsewhere: its lease is held by "
            f"{(self.holder or 'another process')[:200]}{until} unless renewed. Try again later."
        )


@define(slots=False)
class WorkflowNotFound(WorkflowError):
    """There is nothing stored under this id, or nobody here knows the function that made it."""

    id: str
    workflow: str | None = None

    def __str__(self) -> str:
        if self.workflow is None:
            return (
                f"nothing that can be resumed is stored as {self.id!r}. "
                "Start it with run(id, fn, ...), which also takes over hand-saved snapshots."
            )
        return (
            f"{self.id!r} belongs to workflow {self.workflow!r}, which is not registered here. "
            "Import the module that decorates it with @durable.workflow first."
        )


@define(slots=False)
class WorkflowConflict(WorkflowError):
    """The id is taken by another workflow, or by another input of the same one."""

    id: str | None
    what: str
    stored: str
    given: str

    def __str__(self) -> str:
        if self.id is None:  # in memory
            return (
                f"the snapshot is of {self.what} {self.stored}, not {self.given}. Pass name= as it "
                "was when the snapshot was made, or another snapshot."
            )
        return (
            f"{self.id!r} is taken: it was started with {self.what} {self.stored} "
            f"and this call has {self.given}. Use another id, or delete_state({self.id!r}) first."
        )


@define(slots=False)
class VersionMismatch(WorkflowError):
    """The stored state was made by another version of the workflow."""

    id: str | None
    stored: int
    requested: int

    def __str__(self) -> str:
        way_out = 'pass on_version_mismatch="clear" or a migration, or delete_state() it.'
        if self.id is None:  # in memory
            way_out = "migrate the snapshot, or start without it."
        return (
            f"{_subject(self.id)} has state of version {self.stored}, the code is version "
            f"{self.requested}; nothing ran. Run the old code to finish it, {way_out}"
        )


@define(slots=False)
class WorkflowDrift(WorkflowError):
    """The code no longer asks for the steps that are recorded; nothing new ran.

    ``key`` is the step it asked for instead (None: it returned), ``unreached`` the recorded ones.
    """

    id: str | None
    key: str | None
    unreached: Sequence[str]

    def __str__(self) -> str:
        did = "returned" if self.key is None else f"asked for step {self.key!r}"
        return (
            f"{_subject(self.id)} {did} before the recorded steps "
            f"{_listed(self.unreached)}: the code has changed under the run, so nothing was run. "
            "Restore the old steps, raise version= with a migration, or delete the state."
        )


@define(slots=False)
class DuplicateStepKey(WorkflowError):
    """One run used a step key twice."""

    id: str | None
    key: str

    def __str__(self) -> str:
        return (
            f"{_subject(self.id)} used step key {self.key!r} twice in one run. "
            "Keys name results, so each needs its own: put the loop variable into it."
        )


@define(slots=False)
class StepFailed(WorkflowError):
    """A recorded failure, replayed, whose own class is not loaded in this process.

    ``name`` and ``reason`` are the class and the message it had, ``error`` the JSON beside them.
    """

    key: str
    name: str
    reason: str
    error: Any = None

    def __str__(self) -> str:
        return (
            f"step {self.key!r} had failed with {self.name}: {self.reason} "
            "(replayed; import the module of its class before the run to catch it as itself)"
        )


@define(slots=False)
class LeaseLost(WorkflowError):
    """Another process owns the id by now, or the lease ran out; this write changed nothing."""

    id: str

    def __str__(self) -> str:
        return (
            f"the lease on {self.id!r} is lost: it expired, was taken over or was released. "
            "Nothing was written; what is recorded stands and can be resumed."
        )


@define(slots=False)
class WorkflowSuspended(WorkflowError):
    """The run waits for a time or a signal; everything so far is recorded."""

    id: str | None
    key: str

    def __str__(self) -> str:
        return (
            f"{_subject(self.id)} is suspended in step {self.key!r}. "
            "resume_pending() takes it up when its time or its signal has come."
        )


@define(slots=False)
class WorkflowCancelled(WorkflowError):
    """The run was cancelled; it is not resumed any more."""

    id: str

    def __str__(self) -> str:
        return f"workflow {self.id!r} was cancelled. delete_state({self.id!r}) to start it afresh."


class WrongType(TypeError, ValueError):
    """An argument of the wrong type where callers also guard against wrong values (ids, keys)."""


def _subject(id: str | None) -> str:
    return "this workflow" if id is None else f"workflow {id!r}"


def _listed(keys: Sequence[str], most: int = 5) -> str:
    shown = ", ".join(map(repr, keys[:most]))
    return shown if len(keys) <= most else f"{shown} and {len(keys) - most} more"
