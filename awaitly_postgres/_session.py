"""One durable run under its lease: how it begins, what each step writes, and how it ends."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, ExitStack, suppress
from datetime import datetime
from typing import Any, Literal, TypeVar

from attrs import define, evolve, field, frozen

from . import _failure, _json
from . import lease as leases
from ._db import Connection, Database, Row, execute, fetch
from ._run import OnDrift, Run
from ._sql import Statements
from .codec import Codec, decode, decode_input, encode
from .errors import (
    AwaitlyError,
    LeaseLost,
    StoreError,
    StoreUnavailable,
    VersionMismatch,
    WorkflowCancelled,
    WorkflowConflict,
    WorkflowDrift,
    WorkflowSuspended,
)
from .event import EventType, OnEvent
from .lease import Lease, moment
from .snapshot import WorkflowSnapshot, timestamp
from .step import Step
from .store import SnapshotStore, decode_snapshot
from .workflow import stored_version

T = TypeVar("T")

OnVersionMismatch = Literal["error", "clear"] | Callable[[WorkflowSnapshot, int], WorkflowSnapshot]
OpenTransaction = Callable[[], AbstractContextManager[Connection]]

# Characters. A larger row than IN_ROW is spread over PostgreSQL's TOAST table, which costs more to
# rewrite than a step to append; the journal is worth folding from FOLDED on.
IN_ROW, FOLDED = 2 * 1024, 8 * 1024
LONGEST_PAUSE = 3600.0  # seconds
FAREWELL = 2.0  # seconds to give a lease back in: after an outage, its caller has waited already
NEVER = "9999-12-31T23:59:59.999Z"  # until a signal comes


@frozen
class Entry:
    """A workflow function under its name, with the rule for state of other versions."""

    name: str
    fn: Callable[..., Any]
    version: int = 1
    on_version_mismatch: OnVersionMismatch = "error"


@frozen
class Policy:
    """What all runs of one `Durable` have in common."""

    lock_ttl: float
    codec: Codec | None
    on_event: OnEvent | None
    on_complete: Literal["keep", "delete"]
    on_drift: OnDrift
    metadata: Mapping[str, Any]
    transaction: OpenTransaction | None


class TouchedMeanwhile(AwaitlyError):
    """Another process has worked on the run between a listing and now."""


@define(eq=False)
class Session:
    """One run: takes the lease, is the `Recorder` of the steps, gives the lease back."""

    store: SnapshotStore
    policy: Policy
    id: str
    entry: Entry
    input: str  # JSON text
    attempts: int = 0
    end: EventType | None = None  # None: it has not come to run
    _failures: int = 0  # since the run last suspended itself
    _key: str = field(init=False)
    _run: Run = field(init=False)
    _token: str = field(init=False, factory=leases.new_token)
    _lease: Lease | None = None
    _stored: WorkflowSnapshot | None = None
    _begun: bool = False
    _written: int = 0  # characters of the snapshot when it was last rewritten
    _appended: int = 0  # characters put into the journal since
    _journal_is_empty: bool = False
    _in_doubt: str | None = None  # the step of a transaction whose outcome is not known
    _turn: threading.Lock = field(factory=threading.Lock)

    def __attrs_post_init__(self) -> None:
        self._key = self.store.key(self.id)
        policy = self.policy
        self._run = Run(
            self.entry.name, self.id, policy.codec, policy.on_event, policy.on_drift, self
        )

    # -- beginning -------------------------------------------------------------------------

    def submit(self, conn: Connection | None) -> bool:
        """Store the input for a later run; tell whether it is new."""
        params = {"id": self._key, "snapshot": self._document("running")}
        if self._db.rows(self._sql.create, params, conn):
            return True
        stored = self.store.load(self.id, conn=conn)
        if stored is not None:
            self._check_identity(stored)
        return False

    def start(self, unless_touched_since: datetime | None = None) -> Any:
        """Run to an end, or return the recorded output."""
        self.attempts = 1
        if unless_touched_since is None:
            found = self._begin_afresh()
            if found is not None and self._is_finished(found):
                return self._output(found)
        if not self._begun:
            if self._lease is None:
                ttl = self.policy.lock_ttl
                self._lease = leases.acquire(self._db, self.id, self._key, ttl, self._token)
            try:
                finished = self._take_up(unless_touched_since)
            except BaseException:
                self._release()
                raise
            if finished is not None:
                self._release()
                return self._output(finished)
        return self._execute()

    def _begin_afresh(self) -> WorkflowSnapshot | None:
        """Take the lease and store the input in one statement, if nothing is stored yet.

        Otherwise return what is stored, and nothing has changed.
        """
        token, ttl, document = self._token, self.policy.lock_ttl, self._document("running")
        params = {"id": self._key, "token": token, "ttl": ttl, "snapshot": document}
        ((text, journal, until, created),) = self._db.rows(self._sql.begin, params, prepare=True)
        if until is not None:
            self._lease = Lease(self.id, token, moment(until), ttl, self._key, self._db)
        self._begun = self._journal_is_empty = created
        self._written = len(document)
        return None if text is None else decode_snapshot(self.id, text, journal)

    def _take_up(self, unless_touched_since: datetime | None) -> WorkflowSnapshot | None:
        """Under the lease, make ready to go on from what is stored; return that if finished."""
        rows = self._db.rows(self._sql.look, {"id": self._key})
        if unless_touched_since is not None:
            check_untouched(self.id, rows, unless_touched_since)
        stored = decode_snapshot(self.id, rows[0][0], rows[0][1]) if rows else None
        if stored is not None and self._is_finished(stored):
            return stored
        if stored is not None:
            self.attempts = _count((stored.metadata or {}).get("attempts")) + 1
            self._failures = _count((stored.metadata or {}).get("failures"))
            stored = self._at_our_version(stored)
        if stored is None:
            self.attempts, self._failures = 1, 0
            self.begin()
        else:
            self._stored = stored
            self._run.restore(stored)
        return None

    def _is_finished(self, stored: WorkflowSnapshot) -> bool:
        """Tell whether there is an output to return; raise if the state is not this run's."""
        self._check_identity(stored)
        metadata = stored.metadata or {}
        if "cancelledAt" in metadata:
            raise WorkflowCancelled(self.id)
        if stored.execution.status == "completed" and "output" in metadata:
            return True
        version = stored_version(metadata)
        if version != self.entry.version and self.entry.on_version_mismatch == "error":
            raise VersionMismatch(self.id, version, self.entry.version)
        return False

    def _check_identity(self, stored: WorkflowSnapshot) -> None:
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

    def _at_our_version(self, stored: WorkflowSnapshot) -> WorkflowSnapshot | None:
        """Return the state to go on from; None to start afresh."""
        if stored_version(stored.metadata or {}) == self.entry.version:
            return stored
        migrate = self.entry.on_version_mismatch
        if not callable(migrate):  # "clear"; "error" has been raised by now
            return None
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

    # -- running ---------------------------------------------------------------------------

    def _execute(self) -> Any:
        run, lease, codec = self._run, self._held, self.policy.codec
        failure: BaseException | None = None
        self.end = "run_stopped"
        leases.keep_renewed(lease)
        try:
            try:
                input = _json.as_stored(self.input)
                args, kwargs = decode_input(codec, input, self.entry.fn, self.id)
                result = run.run(lambda: self.entry.fn(Step(run), *args, **kwargs))
                output = encode(codec, result, f"the output of workflow {self.entry.name!r}")
            except BaseException as error:
                self.end = self._end(error)
                raise
            self._finish(self._document("completed", output=output))
            self.end = "run_completed"
        except BaseException as error:
            failure = error
            if isinstance(error, LeaseLost):
                self._raise_if_cancelled(error)
            raise
        finally:
            leases.stop_renewing(lease)
            run.emit(self.end, error=failure)
        return self._decode_output(_json.as_stored(output))

    def _end(self, error: BaseException) -> EventType:
        """Record how the run ended, as far as there is anything to record."""
        ours = error is self._run.interruption
        if ours and isinstance(error, LeaseLost):
            return "run_stopped"
        if ours and isinstance(error, WorkflowSuspended):
            self._finish(self._document("running", suspended=True))
            return "run_suspended"
        # Drift has changed nothing; without the store nothing can be changed.
        if isinstance(error, Exception) and not (
            ours and isinstance(error, (WorkflowDrift, StoreError))
        ):
            self._run.blame(error)
            self._failures += 1
            pause = min(2.0 ** min(self._failures - 1, 12), LONGEST_PAUSE)
            self._finish(self._document("failed", failure=error), pause)
            return "run_failed"
        self._release()  # after Ctrl-C and the like, another process may go on at once
        return "run_stopped"

    def begin(self) -> None:
        """Count the attempt of a resumed run, before its first live step."""
        if not self._begun:
            if not self._db.run(self._rewrite):
                raise LeaseLost(self.id)
            self._begun = True

    def record(self, key: str, enter: Callable[[], str]) -> None:
        """Checkpoint one step: one statement, fenced by the lease."""
        step: str | None = None

        def work(conn: Connection) -> bool:
            nonlocal step
            # One checkpoint at a time, or an older snapshot could overwrite a newer one. Taken
            # after the connection, so that nobody waits for a connection while holding it.
            with self._turn:
                step = enter() if step is None else step
                return self._checkpoint(conn, key, step)

        if not self._db.run(work):
            raise LeaseLost(self.id)

    def transact(self, key: str, body: Callable[[Any], T], enter: Callable[[T], str]) -> None:
        """Run ``body`` and checkpoint its step in one transaction, the fence last."""
        step: str | None = None
        before = self._written, self._appended, self._journal_is_empty

        def last(conn: Connection, value: T) -> None:
            nonlocal step, before
            turn.enter_context(self._turn)  # until after the commit
            before = self._written, self._appended, self._journal_is_empty
            entered = step = enter(value)
            if not self._db.run(lambda conn: self._checkpoint(conn, key, entered), conn):
                raise LeaseLost(self.id)

        with ExitStack() as turn:
            try:
                self._db.transact(body, last, self.policy.transaction)
            except BaseException as error:
                # What was lost may be only the reply to the commit.
                if isinstance(error, StoreUnavailable) and step and self._has_committed(key, step):
                    return
                if step is not None:
                    self._written, self._appended, self._journal_is_empty = before
                    self._run.forget(key)
                raise

    def signal(self, key: str) -> str | None:
        """Return the JSON text that was sent for ``key``."""
        rows = self._db.rows(self._sql.signal_for, {"id": self._key, "key": key})
        return rows[0][0] if rows else None

    def now(self) -> datetime:
        """Tell the server's time."""
        return moment(self._db.rows(self._sql.now, {})[0][0])

    # -- checkpoints -----------------------------------------------------------------------

    def _checkpoint(self, conn: Connection, key: str, step: str) -> bool:
        """Write one step, fenced; tell whether the lease was still ours.

        While the snapshot fits into its row it is rewritten whole, for anybody to read in one
        table. Beyond that, rewriting it each time would be quadratic: steps are appended to the
        journal until they amount to as much again.
        """
        if self._in_doubt is not None:
            raise StoreUnavailable(
                f"the connection was lost while step {self._in_doubt!r} was being committed, and "
                "whether it was is not known yet. Resume the run."
            )
        grown = self._appended + len(key) + len(step)
        small = self._written + grown <= IN_ROW
        due = grown >= max(FOLDED, self._written)
        # A key of the snapshot would hide the one in the journal.
        hidden = self._stored is not None and key in self._stored.steps
        if small or due or hidden or not self._sql.journal:
            return self._rewrite(conn)
        params = {**self._held.params, "key": key, "step": step}
        self._appended, self._journal_is_empty = grown, False
        return bool(execute(conn, self._sql.append, params, prepare=True))

    def _rewrite(self, conn: Connection) -> bool:
        document = self._document("running")
        statement = self._sql.write if self._journal_is_empty else self._sql.fold
        params = {**self._held.params, "snapshot": document}
        done = bool(execute(conn, statement, params, prepare=True))
        self._written, self._appended, self._journal_is_empty = len(document), 0, True
        return done

    def _has_committed(self, key: str, step: str) -> bool:
        """Tell how a transaction has ended; until that is known, no thread writes without it."""
        self._in_doubt = key
        self._held.renew()  # its row is locked for as long as the commit is under way
        stored = self.store.load(self.id)
        self._in_doubt = None
        steps = {} if stored is None else stored.steps
        return key in steps and bool(steps[key].to_json() == _json.loads(step))

    # -- the end ---------------------------------------------------------------------------

    def _finish(self, document: str, pause: float | None = None) -> None:
        """Store how it ended, fold the journal and release the lease, in one statement."""

        def execution() -> Any:
            return _json.loads(document)["execution"]

        params = {**self._held.params, "snapshot": document, "pause": pause}
        forget = self.policy.on_complete == "delete" and execution()["status"] == "completed"
        finish = self._sql.finish if self._journal_is_empty else self._sql.finish_and_fold
        tries = 0

        def work(conn: Connection) -> bool:
            nonlocal tries
            tries += 1
            if forget:
                return bool(fetch(conn, self._sql.discard, self._held.params))
            return bool(execute(conn, finish, params, prepare=True))

        if not self._db.run(work):
            # An earlier try may have done it, and only its reply was lost.
            stored = self.store.load(self.id) if tries > 1 else None
            done = tries > 1 and (
                forget if stored is None else stored.execution.to_json() == execution()
            )
            if not done:
                raise LeaseLost(self.id)

    def _release(self) -> None:
        """Give the lease back if the database can be reached; otherwise it runs out."""
        if self._lease is not None:
            leases.stop_renewing(self._lease)
            with suppress(AwaitlyError):
                self._lease._release(retry_for=FAREWELL)

    def _raise_if_cancelled(self, error: LeaseLost) -> None:
        stored = None
        with suppress(AwaitlyError):
            stored = self.store.load(self.id)
        if stored is not None and "cancelledAt" in (stored.metadata or {}):
            raise WorkflowCancelled(self.id) from error

    # -- the document ----------------------------------------------------------------------

    def _document(
        self,
        status: Literal["running", "completed", "failed"],
        *,
        output: str | None = None,
        failure: Exception | None = None,
        suspended: bool = False,
    ) -> str:
        """Write the whole snapshot as it stands, from the texts of its steps."""
        now, last, waits = timestamp(), self._run.last_key, self._run.waits
        execution = {"status": status, "lastUpdated": now}
        if status != "running":
            execution["completedAt"] = now
        if last is not None and status != "completed":
            execution["currentStepId"] = last

        metadata: dict[str, Any] = {
            **((self._stored.metadata if self._stored else None) or {}),
            **self.policy.metadata,
            "workflow": self.entry.name,
            "version": self.entry.version,
            # A run that waits has not failed; its next start is the first of a new count.
            "attempts": 0 if suspended else self.attempts,
        }
        for of_this_moment in ("input", "output", "failure", "failures", "waits", "wakeAt"):
            metadata.pop(of_this_moment, None)
        if self._failures and status != "completed" and not suspended:
            metadata["failures"] = self._failures
        if last is not None:
            metadata["lastStepKey"] = last
        if failure is not None:
            metadata["failure"] = _failure.to_json(failure)["cause"]
        if waits and status == "running":
            metadata["waits"] = waits
        if suspended:
            metadata["wakeAt"] = min(due or NEVER for due in waits.values())
        texts = {"input": self.input} | ({} if output is None else {"output": output})

        members = {
            "formatVersion": "1",
            "steps": self._run.steps_json(),
            "execution": _json.encode_own(execution),
            "metadata": _json.join_to(metadata, texts),
        }
        if self._stored is not None:
            if self._stored.warnings:
                members["warnings"] = _json.dumps(self._stored.warnings)
            members |= {name: _json.dumps(value) for name, value in self._stored.extra.items()}
        text = _json.join(members)
        _json.check_size(text, f"the snapshot for {self.id!r}")
        return text

    def _output(self, stored: WorkflowSnapshot) -> Any:
        metadata = stored.metadata or {}
        self.attempts = _count(metadata.get("attempts"))
        return self._decode_output(metadata.get("output"))

    def _decode_output(self, output: Any) -> Any:
        return decode(self.policy.codec, output, self.entry.fn, self.id, "metadata.output")

    @property
    def _db(self) -> Database:
        return self.store._db

    @property
    def _sql(self) -> Statements:
        return self.store._db.sql

    @property
    def _held(self) -> Lease:
        if self._lease is None:
            raise RuntimeError("nothing is written before the lease is taken")
        return self._lease


def check_untouched(id: str, rows: list[Row], seen: datetime) -> None:
    """Raise if what was last ``seen`` at that time is gone, or has changed since."""
    if not rows or moment(rows[0][2]) != seen:
        raise TouchedMeanwhile(f"another process has worked on {id!r} just now")


def is_input(value: object) -> bool:
    """Tell whether this is an input as we record it; Node's users record theirs in any shape."""
    return (
        isinstance(value, Mapping)
        and set(value) == {"args", "kwargs"}
        and isinstance(value["args"], list)
        and isinstance(value["kwargs"], Mapping)
    )


def _count(value: object) -> int:
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else 0


def _brief(text: str, most: int = 200) -> str:
    return text if len(text) <= most else f"{text[:most]}…"
