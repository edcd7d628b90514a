"""How a start of a durable run is admitted: lease, identity, version, and counting the start."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

from attrs import define, evolve, field, frozen

from .. import _json
from .._checks import moment
from ..errors import (
    AlreadyRunning,
    AwaitlyError,
    VersionMismatch,
    WorkflowCancelled,
    WorkflowConflict,
    WorkflowError,
)
from ..snapshot import WorkflowSnapshot
from ..store import lease as leases
from ..store import renewal
from ..store.database import Database, Row, execute, fetch
from ..store.lease import Lease
from ..store.rows import is_input
from ..store.statements import Statements
from ..store.store import decode_snapshot
from ..workflow import failure
from ..workflow.workflow import stored_version
from .checkpoints import Checkpoints
from .pending import has_no_starts_left, pause_after
from .registry import Entry

RELEASE_TIMEOUT = 2.0  # seconds to give a lease back in: after an outage, enough was waited already


class TouchedMeanwhile(AwaitlyError):
    """Another process has worked on the run between a listing and now."""

    def __init__(self, id: str) -> None:
        super().__init__(f"another process got to {id!r} first")


class NoStartsLeft(WorkflowError):
    """The run was started as often as it may be, and each time died before it could say why."""

    def __init__(self, id: str, attempts: int) -> None:
        super().__init__(
            f"workflow {id!r} was started {attempts} times without getting further, and is given "
            f"up. resume({id!r}) starts it again."
        )


@frozen
class Found:
    """A stored run as it was looked up, before the lease on it was ours."""

    snapshot: WorkflowSnapshot
    journal: str | None  # JSON text of the steps in it, which the snapshot has too
    written_at: str | None  # as the server tells it: whoever takes the run up checks that it stands

    @classmethod
    def of(cls, id: str, row: Row) -> Found:
        """Read a row of ``begin`` or ``read_for_resume``."""
        return cls(decode_snapshot(id, row[0], row[1]), row[1], row[2])


@frozen
class New:
    """Admitted: nothing was stored, and the input is now."""


@frozen
class TakenUp:
    """Admitted: a stored run goes on, its start counted."""

    snapshot: WorkflowSnapshot


@frozen
class Finished:
    """Not admitted: the run has completed, and its output is stored."""

    snapshot: WorkflowSnapshot


@frozen
class GivenUp:
    """Not admitted: the run has no starts left, and is stored as failed for good."""

    error: NoStartsLeft


@define(eq=False)
class Admission:
    """Takes the lease on one run, admits a start of it, and gives the lease back.

    ``first_document`` composes the snapshot of a new run. ``max_attempts`` is for starts from cron.
    """

    id: str
    entry: Entry
    input: str  # JSON text
    first_document: Callable[[], str]
    max_attempts: int | None
    lease: Lease | None = None
    _checkpoints: Checkpoints = field(kw_only=True)
    _may_have_lease: bool = False  # asked for, and an exception may have struck before the answer
    _pid: int = field(factory=os.getpid)

    def admit(self, found: Found | None, as_it_was: bool) -> New | TakenUp | Finished | GivenUp:
        """Take the lease, and count the start before any of the user's code runs."""
        if found is None:
            begun = self._begin()
            if isinstance(begun, New):
                return begun
            found = begun
        while True:
            if found is None:
                # It was gone, or somebody was at it, before the lease was ours. Now it is.
                self._acquire()
                rows = self._db.rows(self._sql.read_for_resume, {"id": self._checkpoints.key})
                if not rows:
                    if self._create():
                        return New()
                    continue
                found = Found.of(self.id, rows[0])
            if self._is_finished(found.snapshot):
                return Finished(found.snapshot)
            if not as_it_was:
                self._check_version(found.snapshot)  # from cron, it counts as a start
            self._acquire()
            if as_it_was and has_no_starts_left(starts := _starts_of(found), self.max_attempts):
                return self._give_up(found, starts)
            if (taken := self._take_up(found)) is not None:
                return TakenUp(taken)
            if as_it_was:
                raise TouchedMeanwhile(self.id)
            found = None

    def _begin(self) -> New | Found | None:
        """Take the lease and store the input in one statement, if nothing is stored yet.

        Otherwise nothing has changed. Returns None if nothing is stored, but somebody has the
        lease.
        """
        token, ttl, document = self._checkpoints.token, self._checkpoints.ttl, self._first()
        params = {"id": self._checkpoints.key, "token": token, "ttl": ttl, "snapshot": document}
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
        """Store the input under the lease that we have already; tell whether nothing was there."""
        document = self._first()
        if not self._db.rows(self._sql.create, {"id": self._checkpoints.key, "snapshot": document}):
            return False
        self._checkpoints.begun(len(document))
        return True

    def _first(self) -> str:
        self._checkpoints.attempts = 1
        return self.first_document()

    def _acquire(self) -> None:
        if self.lease is None:
            self._may_have_lease = True
            try:
                ttl, token = self._checkpoints.ttl, self._checkpoints.token
                self.lease = leases.acquire(self._db, self.id, self._checkpoints.key, ttl, token)
            except AlreadyRunning:
                self._may_have_lease = False
                raise

    def _take_up(self, found: Found) -> WorkflowSnapshot | None:
        """Count this start before any of the user's code runs, and set when it is due again.

        So a run that kills its process comes to ``max_attempts`` like any other, and does not keep
        the head of the queue. Returns the state under the lease; None if it was touched since it
        was found. A second try of the same write writes the same.
        """
        metadata = found.snapshot.metadata or {}
        self._checkpoints.attempts = attempts = _starts_of(found) + 1
        counted: dict[str, Any] = {"attempts": attempts}
        if isinstance(waits := metadata.get("waits"), Mapping):
            earlier = metadata.get("sleeps")
            counted["sleeps"] = dict(earlier) if isinstance(earlier, Mapping) else {}
            counted["sleeps"] |= {key: end for key, end in waits.items() if end is not None}
        params = {
            **self._checkpoints.next_write(),
            "seen": found.written_at,
            "metadata": _json.dumps(counted),
            "pause": pause_after(attempts),
        }
        rows = self._db.rows(self._sql.take_up, params)
        if not rows:
            return None
        self._checkpoints.taken_up(len(rows[0][0]))
        return decode_snapshot(self.id, rows[0][0], None)

    def _give_up(self, found: Found, attempts: int) -> GivenUp:
        """Store that the run is not started again by itself, and give the lease back.

        Whoever could have said so when it failed was killed, or its code refused.
        """
        self._checkpoints.attempts = attempts
        error = NoStartsLeft(self.id, attempts)
        reason = failure.to_json(error)["cause"]
        if (earlier := (found.snapshot.metadata or {}).get("failure")) is not None:
            reason["cause"] = earlier
        params = {
            **self._checkpoints.next_write(),
            "seen": found.written_at,
            "failure": _json.dumps(reason),
        }
        if not self._db.told(lambda conn: fetch(conn, self._sql.give_up, params)):
            raise TouchedMeanwhile(self.id)
        self.finished()
        return GivenUp(error)

    def _is_finished(self, stored: WorkflowSnapshot) -> bool:
        """Tell whether there is an output to return; raise if the state is not this run's."""
        self.check_identity(stored)
        metadata = stored.metadata or {}
        if "cancelledAt" in metadata:
            raise WorkflowCancelled(self.id)
        return stored.execution.status == "completed" and "output" in metadata

    def _check_version(self, stored: WorkflowSnapshot) -> None:
        version = stored_version(stored.metadata or {})
        if version != self.entry.version and self.entry.on_version_mismatch == "error":
            raise VersionMismatch(self.id, version, self.entry.version)

    def check_identity(self, stored: WorkflowSnapshot) -> None:
        """Raise `WorkflowConflict` if what is stored is another workflow's, or of another input."""
        metadata = stored.metadata or {}
        name = metadata.get("workflow", self.entry.name)
        if name != self.entry.name:
            raise WorkflowConflict(self.id, "workflow", repr(name), repr(self.entry.name))
        # Another shape of input is one that Node wrote; there is nothing to compare it with.
        if is_input(metadata.get("input")):
            theirs = _json.canonical(_json.dumps(metadata["input"]))
            ours = _json.canonical(self.input)
            if theirs != ours:
                raise WorkflowConflict(self.id, "input", _brief(theirs), _brief(ours))

    def at_our_version(self, stored: WorkflowSnapshot) -> WorkflowSnapshot | None:
        """Return the state to go on from; None to start afresh."""
        if stored_version(stored.metadata or {}) == self.entry.version:
            return stored
        migrate = self.entry.on_version_mismatch
        if not callable(migrate):
            self._check_version(stored)
            return None  # "clear"
        migrated = migrate(stored, self.entry.version)
        if isinstance(migrated, Mapping):
            migrated = WorkflowSnapshot.from_json(migrated)
        if not isinstance(migrated, WorkflowSnapshot):
            raise TypeError(
                f"on_version_mismatch of {self.entry.name!r} must return a WorkflowSnapshot, "
                f"not {type(migrated).__name__}"
            )
        return evolve(
            migrated, metadata={**(migrated.metadata or {}), "version": self.entry.version}
        )

    def release(self) -> None:
        """Give the lease back if it is ours and the database can be reached; else it runs out."""
        if os.getpid() != self._pid or (self.lease is None and not self._may_have_lease):
            return
        lease, self.lease, self._may_have_lease = self.lease, None, False
        if lease is not None:
            renewal.stop_renewing(lease)
        params = {"id": self._checkpoints.key, "token": self._checkpoints.token}
        with suppress(AwaitlyError):
            self._db.run(lambda c: execute(c, self._sql.release, params), retry_for=RELEASE_TIMEOUT)

    def finished(self) -> None:
        """Note that the lease was given back with the end of the run."""
        self.lease, self._may_have_lease = None, False

    @property
    def _db(self) -> Database:
        return self._checkpoints.db

    @property
    def _sql(self) -> Statements:
        return self._checkpoints.db.sql


def count(value: object) -> int:
    """Return a number of attempts; none where somebody has edited it to something else."""
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else 0


def _starts_of(found: Found) -> int:
    """Return how often the run was started since it last got further, or was given up."""
    metadata = found.snapshot.metadata or {}
    if "gaveUpAt" in metadata:
        return 0  # whoever starts it now has been asked to
    attempts = count(metadata.get("attempts"))
    if attempts > 1 and found.journal and _has_success(found.journal):
        return 1  # the last start got further: it was the first of a new count
    return attempts


def _has_success(journal: str) -> bool:
    return any(step.get("ok") is True for step in _json.loads(journal).values())


def _brief(text: str, most: int = 200) -> str:
    return text if len(text) <= most else f"{text[:most]}…"
