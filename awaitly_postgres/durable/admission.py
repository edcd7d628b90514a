"""How a start of a durable run is admitted: lease, identity, version, and counting the start."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from attrs import define, field, frozen

from .. import _json
from .._checks import as_count, moment
from ..errors import (
    AlreadyRunning,
    AwaitlyError,
    WorkflowCancelled,
    WorkflowError,
    WorkflowNotFound,
)
from ..snapshot import WorkflowSnapshot, as_mapping
from ..store import lease as leases
from ..store import renewal
from ..store.database import Database, Row, fetch
from ..store.lease import Lease
from ..store.rows import decode_snapshot
from ..store.statements import Statements
from ..workflow import failure
from .checkpoints import Checkpoints
from .pending import attempts_are_exhausted, pause_after
from .registry import Entry


class ChangedMeanwhile(AwaitlyError):
    """Another process has written to the run since it was listed as pending."""

    def __init__(self, id: str) -> None:
        super().__init__(f"another process got to {id!r} first")


class AttemptsExhausted(WorkflowError):
    """The run was started ``max_attempts`` times, and each time ended without a record."""

    def __init__(self, id: str, attempts: int) -> None:
        super().__init__(
            f"workflow {id!r} was started {attempts} times without progress and was given up. "
            f"resume({id!r}) starts it again."
        )


@frozen(eq=False, repr=False)
class Found:
    """A stored run as it was read, perhaps before this process had the lease on it."""

    snapshot: WorkflowSnapshot
    size: int  # characters of the snapshot and the journal
    journal: str | None  # the steps of the journal as JSON text; they are in the snapshot too
    written_at: str | None  # the row's time, as text
    appended: int  # how many steps the journal has

    @classmethod
    def of(cls, id: str, row: Row) -> Found:
        """Decode a row that ``begin`` or the lookup of a run has returned."""
        size = len(row[0]) + len(row[1] or "")
        snapshot = decode_snapshot(id, row[0], row[1], keep_texts=True)
        return cls(snapshot, size, *row[1:4])

    @property
    def unchanged(self) -> dict[str, Any]:
        """The parameters of statements that change the run only if it is still as it was read."""
        return {"seen": self.written_at, "appended": self.appended}


@frozen(eq=False, repr=False)
class New:
    """Admitted: nothing was stored under this id, and now its input is."""


@frozen(eq=False, repr=False)
class TakenUp:
    """Admitted: a stored run is resumed, and this start is counted."""

    snapshot: WorkflowSnapshot


@frozen(eq=False, repr=False)
class Finished:
    """Not admitted: the run has already completed, and its output is stored."""

    snapshot: WorkflowSnapshot


@frozen(eq=False, repr=False)
class GivenUp:
    """Not admitted: the run has reached ``max_attempts``, and is stored as failed for good."""

    error: AttemptsExhausted


@define(eq=False, repr=False)
class Admission:
    """Acquires the lease on one run, admits one start of it, and releases the lease.

    ``max_attempts`` applies to starts by `resume_pending` only.
    """

    id: str
    entry: Entry
    input: str  # JSON text
    max_attempts: int | None
    lease: Lease | None = None
    _checkpoints: Checkpoints = field(kw_only=True)
    _may_have_lease: bool = False  # requested: an exception may have come before the reply
    _pid: int = field(factory=os.getpid)

    def admit(self, found: Found | None, automatic: bool) -> New | TakenUp | Finished | GivenUp:
        """Acquire the lease, and count the start before any of the user's code runs.

        Args:
            found: the run as it was read before the lease was asked for; None reads it here.
            automatic: started by `resume_pending`, not by a call for this run: raise
                `ChangedMeanwhile` if it was written since, and apply ``max_attempts``.
        """
        is_resumed = found is not None
        if found is None:
            begun = self._begin()
            if isinstance(begun, New):
                return begun
            found = begun
        while True:
            if found is None:
                # The run was changed, or held by another process, when it was read. So acquire the
                # lease first: what is read under it stays as it is.
                self._acquire()
                rows = self._db.rows(self._sql.read_for_resume, {"id": self._checkpoints.key})
                if not rows:
                    if is_resumed:  # it was deleted, perhaps after completing, since it was read
                        raise WorkflowNotFound(self.id)
                    if self._create():
                        return New()
                    continue  # a `submit`, which needs no lease, has stored it: read it again
                found = Found.of(self.id, rows[0])
            if self._is_finished(found.snapshot):
                return Finished(found.snapshot)
            if not automatic:
                # Refused before the start is counted. From `resume_pending` it is refused after, in
                # `Session._restore`, so that the run backs off.
                self.entry.check_version(self.id, found.snapshot)
            self._acquire()
            if automatic and attempts_are_exhausted(starts := _starts_of(found), self.max_attempts):
                return self._give_up(found, starts)
            if self._take_up(found):
                return TakenUp(found.snapshot)
            if automatic:
                raise ChangedMeanwhile(self.id)
            found = None

    def _begin(self) -> New | Found | None:
        """Acquire the lease and store the input in one statement, if nothing is stored yet.

        Otherwise nothing is changed. Returns None if nothing is stored but another process holds
        the lease.
        """
        token, ttl, document = self._checkpoints.token, self._checkpoints.ttl, self._first()
        params = {"id": self._checkpoints.key, "token": token, "ttl": ttl, "snapshot": document}
        # Set before the request: Ctrl-C can come after the server has granted the lease and before
        # we know. Safe to repeat: the statement recognizes a first try by the token, which is new.
        self._may_have_lease = True
        ((*found, until, created),) = self._db.rows(self._sql.begin, params, prepare=True)
        self._may_have_lease = until is not None
        if until is not None:
            self.lease = Lease(self.id, token, moment(until), ttl, self._checkpoints.key, self._db)
        if created:
            self._checkpoints.begun(len(document))
            return New()
        return None if found[0] is None else Found.of(self.id, tuple(found))

    def _create(self) -> bool:
        """Store the input under the lease already held; return False if a run is stored by now.

        Safe to repeat: if only the reply was lost, the caller finds its own input and resumes it.
        """
        document = self._first()
        params = {"id": self._checkpoints.key, "snapshot": document, "pause": None}
        if not self._db.rows(self._sql.create, params):
            return False
        self._checkpoints.begun(len(document))
        return True

    def _first(self) -> str:
        self._checkpoints.attempts = 1
        return self._checkpoints.document()

    def _acquire(self) -> None:
        if self.lease is None:
            self._may_have_lease = True
            try:
                ttl, token = self._checkpoints.ttl, self._checkpoints.token
                self.lease = leases.acquire(self._db, self.id, self._checkpoints.key, ttl, token)
            except AlreadyRunning:
                self._may_have_lease = False
                raise

    def _take_up(self, found: Found) -> bool:
        """Count this start before any of the user's code runs, and set when it is due again.

        A run that kills its process therefore backs off and reaches ``max_attempts`` like any
        other, instead of staying at the head of the queue. Returns False, and changes nothing, if
        the run was written since it was read. Safe to repeat: the count is taken from ``found``,
        so a retry writes the same, and its fence accepts the token of the first try.
        """
        metadata = found.snapshot.metadata or {}
        self._checkpoints.attempts = attempts = _starts_of(found) + 1
        counted: dict[str, Any] = {"attempts": attempts}
        if isinstance(waits := metadata.get("waits"), Mapping):
            begun = {key: end for key, end in waits.items() if end is not None}
            counted["sleeps"] = {**as_mapping(metadata.get("sleeps")), **begun}
        params = {
            **self._checkpoints.next_write(),
            **found.unchanged,
            "metadata": _json.dumps(counted),
            "pause": pause_after(attempts),
        }
        if not self._db.count(self._sql.take_up, params):
            return False
        self._checkpoints.taken_up(found.size)
        return True

    def _give_up(self, found: Found, attempts: int) -> GivenUp:
        """Store that the run is not started again automatically, and release the lease.

        A run that raises is given up when its failure is recorded. This one was killed, or refused
        because its code has changed, so no failure was recorded.
        """
        self._checkpoints.attempts = attempts
        error = AttemptsExhausted(self.id, attempts)
        reason = failure.run_to_json(WorkflowError(str(error)))  # a class that cannot move
        metadata = found.snapshot.metadata or {}
        if (earlier := metadata.get("refusal", metadata.get("failure"))) is not None:
            reason["cause"] = earlier
        params = {
            **self._checkpoints.next_write(),
            **found.unchanged,
            "failure": _json.dumps(reason),
        }
        if not self._db.run_once(lambda conn: fetch(conn, self._sql.give_up, params)):
            raise ChangedMeanwhile(self.id)
        self.finished()
        return GivenUp(error)

    def refuse(self, error: Exception) -> None:
        """Store why this code cannot continue the run, for people to see, and release the lease.

        The run has not failed: the code is wrong, not the record. The note stays until the next
        start. If it cannot be written, `Session.start` still releases the lease.
        """
        if os.getpid() != self._pid or self.lease is None:
            return
        note = _json.dumps(failure.run_to_json(error))
        params = {**self._checkpoints.next_write(), "refusal": note}
        with suppress(AwaitlyError):
            # No row changes if a thread of the run has recorded a step meanwhile, or if this is
            # repeated after a lost reply.
            if self._db.count(self._sql.refuse, params):
                self.finished()

    def _is_finished(self, stored: WorkflowSnapshot) -> bool:
        """Return whether a recorded output can be returned.

        Raises:
            WorkflowConflict: what is stored belongs to another workflow or input.
            WorkflowCancelled: the run was cancelled.
        """
        metadata = stored.metadata or {}
        self.entry.check_identity(self.id, metadata, self.input)
        if "cancelledAt" in metadata:
            raise WorkflowCancelled(self.id)
        return stored.execution.status == "completed" and "output" in metadata

    def release(self) -> None:
        """Release the lease if we may hold it; if the database cannot be reached, it expires.

        Not in a forked child: the lease is its parent's.
        """
        if os.getpid() != self._pid or (self.lease is None and not self._may_have_lease):
            return
        lease, self.lease, self._may_have_lease = self.lease, None, False
        if lease is not None:
            renewal.stop_renewing(lease)
        # By token, not by lease: an exception may have been raised before `acquire` returned. Safe
        # to repeat, because no later holder has the same token.
        params = {"id": self._checkpoints.key, "token": self._checkpoints.token}
        with suppress(AwaitlyError):
            leases.release(self._db, params, leases.RELEASE_TIMEOUT)

    def finished(self) -> None:
        """Note that the statement that recorded the end has also released the lease."""
        self.lease, self._may_have_lease = None, False

    @property
    def _db(self) -> Database:
        return self._checkpoints.db

    @property
    def _sql(self) -> Statements:
        return self._checkpoints.db.sql


def _starts_of(found: Found) -> int:
    """Return how often the run was started since it last made progress, or was given up."""
    metadata = found.snapshot.metadata or {}
    if "gaveUpAt" in metadata:
        return 0  # somebody is starting it explicitly: counted afresh
    attempts = as_count(metadata.get("attempts"))
    if attempts > 1 and found.journal and _has_success(found.journal):
        return 1  # the last start made progress: it was the first of a new count
    return attempts


def _has_success(journal: str) -> bool:
    return any(step.get("ok") is True for step in _json.loads(journal).values())
