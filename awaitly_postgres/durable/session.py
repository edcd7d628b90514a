"""One durable run under its lease: how it begins, what each step writes, and how it ends."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, suppress
from datetime import datetime, timezone
from typing import Any, Literal, TypeVar

from attrs import define, evolve, field, frozen

from .. import _json
from .._checks import OnDrift, moment
from ..errors import (
    AlreadyRunning,
    AwaitlyError,
    LeaseLost,
    StoreError,
    StoreUnavailable,
    VersionMismatch,
    WorkflowCancelled,
    WorkflowConflict,
    WorkflowDrift,
    WorkflowError,
    WorkflowSuspended,
)
from ..snapshot import WorkflowSnapshot, timestamp
from ..store import lease as leases
from ..store import renewal
from ..store.database import ROLLBACK, Connection, Database, Row, driver_error, execute, fetch
from ..store.lease import Lease
from ..store.statements import Statements
from ..store.store import SnapshotStore, decode_snapshot
from ..workflow import failure as _failure
from ..workflow.codec import Codec, decode, decode_input, encode
from ..workflow.event import EventType, OnEvent
from ..workflow.run import OF_THIS_MOMENT, Run
from ..workflow.step import Step
from ..workflow.workflow import stored_version

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


@frozen
class Written:
    """What a run has stored so far, as far as it is known to have landed."""

    number: int = 0  # of the last write of the snapshot
    tried: int = 0  # of the last one sent; more, while it is not known what became of it
    size: int = 0  # characters of the snapshot then
    appended: int = 0  # characters put into the journal since
    last_appended: str | None = None  # the key
    journal_is_empty: bool = False


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
    _has_got_further: bool = False
    _key: str = field(init=False)
    _run: Run = field(init=False)
    _token: str = field(init=False, factory=leases.new_token)
    _lease: Lease | None = None
    _may_have_lease: bool = False  # asked for, and an exception may have struck before the answer
    _stored: WorkflowSnapshot | None = None
    _written: Written = Written()
    _must_rewrite: bool = False  # what is stored has steps that this start does not take over
    _in_doubt: str | None = None  # the step of a transaction whose outcome is not known
    _pid: int = field(factory=os.getpid)
    # One write at a time. Taken after a connection, so that nobody who has it waits for one.
    # Reentrant only so that a thread can tell that it has it, wherever an exception has struck.
    _turn: threading.RLock = field(factory=threading.RLock)

    def __attrs_post_init__(self) -> None:
        self._key = self.store.key(self.id)
        policy = self.policy
        self._run = Run(
            self.entry.name, self.id, policy.codec, policy.on_event, policy.on_drift, self
        )

    # -- beginning -------------------------------------------------------------------------

    def submit(self, conn: Connection | None) -> bool:
        """Store the input for a later run; tell whether it is new."""
        now = datetime.now(timezone.utc).isoformat()
        params = {"id": self._key, "snapshot": self._document("running", submitted_at=now)}
        tries = 0

        def create(conn: Connection) -> bool:
            nonlocal tries
            tries += 1
            return bool(fetch(conn, self._sql.create, params))

        if self._db.run(create, conn):
            return True
        stored = self.store.load(self.id, conn=conn)
        if stored is None:
            return False
        self._check_identity(stored)
        # An earlier try may have stored it, and only its reply was lost.
        return tries > 1 and (stored.metadata or {}).get("submittedAt") == now

    def start(self, unless_touched_since: datetime | None = None) -> Any:
        """Run to an end, or return the recorded output."""
        self._db.refuse_to_run_here()
        try:
            finished = self._take(unless_touched_since)
            if finished is None:
                return self._execute()
            return self._output(finished)
        finally:
            # Whatever has struck, and wherever: a lease that is still ours is given back.
            self._release()

    def _take(self, unless_touched_since: datetime | None) -> WorkflowSnapshot | None:
        """Take lease and run, and count the start; return what is stored if that is finished."""
        found: Row | None = None
        if unless_touched_since is None:
            found = self._begin()
            if self._written.size:
                return None
        while True:
            if found is not None:
                stored = decode_snapshot(self.id, found[0], found[1])
                if self._is_finished(stored):
                    return stored
                if unless_touched_since is None:
                    self._check_version(stored)  # from cron, it counts as a start
                self._acquire()
                if (taken := self._take_up(stored, found)) is not None:
                    self._restore(taken)
                    return None
            # Nobody has looked so far, or somebody else was at it before the lease was ours.
            self._acquire()
            rows = self._db.rows(self._sql.look, {"id": self._key})
            if unless_touched_since is not None:
                check_untouched(self.id, rows, unless_touched_since)
            found = rows[0] if rows else None
            if found is None:
                self._create()
                if self._written.size:
                    return None

    def _begin(self) -> Row | None:
        """Take the lease and store the input in one statement, if nothing is stored yet.

        Otherwise return what is stored, and nothing has changed.
        """
        token, ttl, document = self._token, self.policy.lock_ttl, self._first_document()
        params = {"id": self._key, "token": token, "ttl": ttl, "snapshot": document}
        self._may_have_lease = True
        ((*found, until, created),) = self._db.rows(self._sql.begin, params, prepare=True)
        self._may_have_lease = until is not None
        if until is not None:
            self._lease = Lease(self.id, token, moment(until), ttl, self._key, self._db)
        if created:
            self._written = Written(size=len(document), journal_is_empty=True)
        return None if created or found[0] is None else tuple(found)

    def _create(self) -> None:
        """Store the input under the lease that we have already."""
        document = self._first_document()
        if self._db.rows(self._sql.create, {"id": self._key, "snapshot": document}):
            self._written = Written(size=len(document), journal_is_empty=True)

    def _first_document(self) -> str:
        self.attempts = 1
        return self._document("running")

    def _acquire(self) -> None:
        if self._lease is None:
            self._may_have_lease = True
            try:
                ttl = self.policy.lock_ttl
                self._lease = leases.acquire(self._db, self.id, self._key, ttl, self._token)
            except AlreadyRunning:
                self._may_have_lease = False
                raise

    def _take_up(self, stored: WorkflowSnapshot, found: Row) -> WorkflowSnapshot | None:
        """Count this start before any of the user's code runs, and set when it is due again.

        So a run that kills its process comes to ``max_attempts`` like any other, and does not keep
        the head of the queue. Returns the state under the lease; None if it was touched since it
        was found. A second try of the same write writes the same.
        """
        metadata, journal = stored.metadata or {}, found[1]
        attempts = _count(metadata.get("attempts"))
        if attempts > 1 and journal and _has_success(journal):
            attempts = 1  # the last start got further: it was the first of a new count
        self.attempts = attempts + 1
        counted: dict[str, Any] = {"attempts": self.attempts}
        if isinstance(waits := metadata.get("waits"), Mapping):
            earlier = metadata.get("sleeps")
            counted["sleeps"] = dict(earlier) if isinstance(earlier, Mapping) else {}
            counted["sleeps"] |= {key: end for key, end in waits.items() if end is not None}
        params = {
            **self._next_write(),
            "seen": found[2],
            "metadata": _json.dumps(counted),
            "pause": _pause_after(self.attempts),
        }
        rows = self._db.rows(self._sql.take_up, params)
        if not rows:
            return None
        self._written = Written(1, 1, len(rows[0][0]), journal_is_empty=True)
        return decode_snapshot(self.id, rows[0][0], None)

    def _restore(self, stored: WorkflowSnapshot) -> None:
        ours = self._at_our_version(stored)
        if ours is None:
            self._must_rewrite = True
        else:
            self._stored = ours
            left_out = self._run.restore(ours)
            self._must_rewrite = left_out or ours is not stored

    def _is_finished(self, stored: WorkflowSnapshot) -> bool:
        """Tell whether there is an output to return; raise if the state is not this run's."""
        self._check_identity(stored)
        metadata = stored.metadata or {}
        if "cancelledAt" in metadata:
            raise WorkflowCancelled(self.id)
        return stored.execution.status == "completed" and "output" in metadata

    def _check_version(self, stored: WorkflowSnapshot) -> None:
        version = stored_version(stored.metadata or {})
        if version != self.entry.version and self.entry.on_version_mismatch == "error":
            raise VersionMismatch(self.id, version, self.entry.version)

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

    # -- running ---------------------------------------------------------------------------

    def _execute(self) -> Any:
        run, lease, codec = self._run, self._held, self.policy.codec
        failure: BaseException | None = None
        self.end = "run_stopped"
        renewal.keep_renewed(lease)
        try:
            try:
                input = _json.as_stored(self.input)
                args, kwargs = decode_input(codec, input, self.entry.fn, self.id)
                result = run.run(lambda: self.entry.fn(Step(run), *args, **kwargs))
                output = encode(codec, result, f"the output of workflow {self.entry.name!r}")
            except BaseException as error:
                self.end = self._end(error)
                raise
            self._finish(lambda: self._document("completed", output=output), forget=True)
            self.end = "run_completed"
        except BaseException as error:
            failure = error
            if isinstance(error, LeaseLost):
                self._raise_if_cancelled(error)
            raise
        finally:
            run.end()
            renewal.stop_renewing(lease)
            if os.getpid() == self._pid:
                run.emit(self.end, error=failure)
        return self._decode_output(_json.as_stored(output))

    def _end(self, error: BaseException) -> EventType:
        """Record how the run ended, as far as there is anything to record."""
        ours = error is self._run.interruption
        if ours and isinstance(error, WorkflowSuspended):
            self._finish(lambda: self._document("running", suspended=True))
            return "run_suspended"
        # Drift is not recorded: what is recorded is right, and the code is not. Nor can an end be
        # without the lease or the store; nor is it for a forked child to say.
        refused = ours and isinstance(error, (WorkflowDrift, LeaseLost, StoreError))
        if isinstance(error, Exception) and not refused and os.getpid() == self._pid:
            pause = _pause_after(self._counted_attempts)
            self._finish(lambda: self._document("failed", failure=error), pause)
            return "run_failed"
        return "run_stopped"

    def record(self, key: str, enter: Callable[[], str]) -> None:
        """Checkpoint one step: one statement, fenced by the lease."""
        step: str | None = None

        def work(conn: Connection) -> bool:
            nonlocal step
            with self._turn:
                self._refuse_to_write(key)
                step = enter() if step is None else step
                return self._checkpoint(conn, key, step)

        if not self._db.run(work):
            raise LeaseLost(self.id)

    def transact(self, key: str, body: Callable[[Any], T], enter: Callable[[T], str]) -> None:
        """Run ``body`` and checkpoint its step in one transaction, the fence last.

        From there until it is known what became of the commit, nothing else of the run is written.
        """
        step: str | None = None
        before: tuple[Written, bool, bool] | None = None  # this step, once we have the turn
        used: Connection | None = None
        # Read before the transaction begins: what it sees is not older.
        params = self._next_write()

        def work(conn: Connection) -> None:
            nonlocal step, before, used
            used = conn
            isolated = self._db.isolates(conn)
            if isolated and not fetch(conn, self._sql.check_history, params):
                raise LeaseLost(self.id)
            value = self._run_body(conn, key, body)
            self._turn.acquire()
            self._refuse_to_write(key)
            self._settle_rewrite()
            before = self._written, self._must_rewrite, self._has_got_further
            step = enter(value)
            if not self._checkpoint_in_transaction(conn, key, step, isolated):
                raise LeaseLost(self.id)
            self._in_doubt = key  # last: what follows is the commit

        try:
            try:
                self._db.transact(work, self.policy.transaction)
            except BaseException as error:
                refused = driver_error(error) is not None
                lost = refused and used is not None and used.closed
                committed = False
                if self._in_doubt == key and step is not None and (lost or not refused):
                    # What has not come to its COMMIT will not, and holds the lease's row no longer.
                    # One of the pool's has gone back by now, and may be at work for another thread.
                    if used is not None and self.policy.transaction is not None:
                        self._db.abandon(used)
                    used = None  # which, if struck on its way, it does when nobody holds it
                    committed = self._has_committed(key, step, error)
                if not committed:
                    self._run.forget(key)
                    if before is not None:
                        self._written, self._must_rewrite, self._has_got_further = before
                self._settle_doubt(key)
                if lost:
                    self._db.recover(error)
                if lost and not committed:
                    raise self._db.translated(error) from error
                if not (lost and committed):  # but for the reply, all went well
                    raise
            # Not by a call: Python looks for signals when it enters a function, and what a handler
            # raised there would leave in doubt what is committed.
            self._in_doubt = None
        finally:
            # Not asked for before: an exception may have struck right after it was taken, and could
            # strike right after the question.
            try:  # noqa: SIM105 - which is Python's code, to be struck in
                self._turn.release()
            except RuntimeError:  # not taken
                pass

    def _settle_doubt(self, key: str) -> None:
        if self._in_doubt == key:
            self._in_doubt = None

    def _run_body(self, conn: Connection, key: str, body: Callable[[Any], T]) -> T:
        try:
            return body(conn)
        except ROLLBACK as error:  # which the transaction would swallow
            raise RuntimeError(
                f"step {key!r} rolled its transaction back (psycopg.Rollback), so there is nothing "
                "to record; raise an exception of your own, or return"
            ) from error

    def signal(self, key: str) -> str | None:
        """Return the JSON text that was sent for ``key``."""
        rows = self._db.rows(self._sql.signal_for, {"id": self._key, "key": key})
        return rows[0][0] if rows else None

    def now(self) -> datetime:
        """Tell the server's time."""
        return moment(self._db.rows(self._sql.now, {})[0][0])

    # -- checkpoints -----------------------------------------------------------------------

    def _refuse_to_write(self, key: str) -> None:
        """Raise, with the turn, where nothing of this run may be written any more."""
        if os.getpid() != self._pid:
            raise WorkflowError(
                f"process {os.getpid()} was forked inside the run of {self.id!r} and records "
                f"nothing for it; leave it with os._exit() before step {key!r} returns"
            )
        self._run.refuse_if_over(key)
        self._refuse_if_in_doubt()

    def _refuse_if_in_doubt(self) -> None:
        if self._in_doubt is not None:
            raise StoreUnavailable(
                f"the connection was lost while step {self._in_doubt!r} was being committed, and "
                "whether it was is not known yet. Resume the run."
            )

    def _next_write(self) -> dict[str, Any]:
        """Return what the fence of the next write asks for."""
        written = self._written
        tokens = [self._numbered(nr) for nr in range(written.number, written.tried + 2)]
        return {
            "id": self._key,
            "ttl": self.policy.lock_ttl,
            "token": self._token,
            "number": written.number,
            "tokens": tokens,
            "base": tokens[0],
            "next": tokens[-1],
            "last": written.last_appended,
        }

    def _numbered(self, number: int) -> str:
        return f"{self._token}#{number}" if number else self._token

    def _checkpoint(self, conn: Connection, key: str, step: str) -> bool:
        """Write one step, fenced; tell whether the lease was still ours.

        While the snapshot fits into its row it is rewritten whole, for anybody to read in one
        table. Beyond that, rewriting it each time would be quadratic: steps are appended to the
        journal until they amount to as much again.
        """
        written = self._written
        self._note_progress(step)
        grown = written.appended + len(key) + len(step)
        small = written.size + grown <= IN_ROW
        due = grown >= max(FOLDED, written.size)
        if small or due or self._must_settle or not self._sql.journal:
            return self._rewrite(conn)
        return self._append(conn, self._sql.append, key, step)

    def _checkpoint_in_transaction(
        self, conn: Connection, key: str, step: str, isolated: bool
    ) -> bool:
        """Write one step in the transaction of its body; tell whether the lease was still ours.

        It is appended whatever the size: an isolated transaction could not write a snapshot that
        another thread or a signal has changed since it began.
        """
        self._note_progress(step)
        sql = self._sql
        if sql.journal:
            statement = sql.append_isolated if isolated else sql.append_in_transaction
            return self._append(conn, statement, key, step)
        if not isolated:
            return self._rewrite(conn)
        document = self._document("running")
        params = {**self._next_write(), "snapshot": document, "pause": self._pause()}
        self._written = evolve(self._written, size=len(document))
        return bool(execute(conn, sql.write_isolated, params, prepare=True))

    def _append(self, conn: Connection, statement: bytes, key: str, step: str) -> bool:
        written = self._written
        params = {**self._next_write(), "key": key, "step": step}
        params["tokens"] = [params["base"]]
        self._written = evolve(written, journal_is_empty=False)
        if not execute(conn, statement, params, prepare=True):
            return False
        grown = written.appended + len(key) + len(step)
        self._written = evolve(written, appended=grown, last_appended=key, journal_is_empty=False)
        return True

    def _note_progress(self, step: str) -> None:
        self._has_got_further = self._has_got_further or step.startswith('{"ok":true')

    @property
    def _must_settle(self) -> bool:
        """Whether no step may be appended before the snapshot is rewritten.

        While it is not known whether the last rewrite has landed, it could do so after the step,
        which it would erase.
        """
        return self._must_rewrite or self._written.tried > self._written.number

    def _settle_rewrite(self) -> None:
        """Rewrite the snapshot before a transaction appends, on a connection of its own."""
        if self._must_settle and not self._db.run_apart(self._rewrite):
            raise LeaseLost(self.id)

    def _rewrite(self, conn: Connection) -> bool:
        document = self._document("running")
        written = self._written
        statement = self._sql.write if written.journal_is_empty else self._sql.fold
        params = {**self._next_write(), "snapshot": document, "pause": self._pause()}
        number = written.tried + 1
        self._written = evolve(written, tried=number)
        if not execute(conn, statement, params, prepare=True):
            return False
        self._written = Written(number, number, len(document), journal_is_empty=True)
        self._must_rewrite = False
        return True

    @property
    def _counted_attempts(self) -> int:
        """How often it was started since it last got further; then this start is the first."""
        return 1 if self._has_got_further else self.attempts

    def _pause(self) -> float | None:
        """Return the pause before the next start, unless this one has got further."""
        return None if self._counted_attempts < 2 else _pause_after(self.attempts)

    def _has_committed(self, key: str, step: str, error: BaseException) -> bool:
        """Tell how a transaction has ended, waiting until it has.

        On a connection of its own: those of the pool may be held by threads of this run, which
        wait for the turn that we have.
        """

        def look(conn: Connection) -> bool:
            fetch(conn, self._sql.wait_for_commit, self._held.params)
            rows = fetch(conn, self._sql.load, {"id": self._key})
            stored = decode_snapshot(self.id, rows[0][0], rows[0][1]) if rows else None
            steps = {} if stored is None else stored.steps
            return key in steps and bool(steps[key].to_json() == _json.loads(step))

        try:
            return self._db.run_apart(look)
        except StoreUnavailable as unknown:
            if isinstance(error, Exception):
                raise unknown from error
            raise error from unknown

    # -- the end ---------------------------------------------------------------------------

    def _finish(
        self, compose: Callable[[], str], pause: float | None = None, *, forget: bool = False
    ) -> None:
        """Store how it ended, fold the journal and release the lease, in one statement."""
        forget = forget and self.policy.on_complete == "delete"
        tries = 0
        document = ""

        def work(conn: Connection) -> bool:
            nonlocal tries, document
            with self._turn:
                if os.getpid() != self._pid:
                    self._refuse_to_write("")
                self._refuse_if_in_doubt()
                # From here on, what another thread still does is neither kept nor acknowledged.
                self._run.end()
                document = document or compose()
                tries += 1
                params = self._next_write()
                if forget:
                    return bool(fetch(conn, self._sql.discard, params))
                written = self._written
                sql = self._sql
                finish = sql.finish if written.journal_is_empty else sql.finish_and_fold
                params |= {"snapshot": document, "pause": pause}
                return bool(execute(conn, finish, params, prepare=True))

        if not self._db.run(work):
            # An earlier try may have done it, and only its reply was lost.
            stored = self.store.load(self.id) if tries > 1 else None
            execution = _json.loads(document)["execution"]
            done = tries > 1 and (
                forget if stored is None else stored.execution.to_json() == execution
            )
            if not done:
                raise LeaseLost(self.id)
        self._lease, self._may_have_lease = None, False

    def _release(self) -> None:
        """Give the lease back if it is ours and the database can be reached; else it runs out."""
        if os.getpid() != self._pid or (self._lease is None and not self._may_have_lease):
            return
        lease, self._lease, self._may_have_lease = self._lease, None, False
        if lease is not None:
            renewal.stop_renewing(lease)
        params = {"id": self._key, "token": self._token}
        with suppress(AwaitlyError):
            self._db.run(lambda c: execute(c, self._sql.release, params), retry_for=FAREWELL)

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
        submitted_at: str | None = None,
    ) -> str:
        """Write the whole snapshot as it stands, from the texts of its steps."""
        now, last = timestamp(), self._run.last_key
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
            # The starts since it got further; a run that waits has not failed.
            "attempts": 0 if suspended else self._counted_attempts,
        }
        for of_this_moment in ("input", "output", *OF_THIS_MOMENT):
            metadata.pop(of_this_moment, None)
        metadata |= self._run.standing(status, suspended)
        if submitted_at is not None:
            metadata["submittedAt"] = submitted_at
        if last is not None:
            metadata["lastStepKey"] = last
        if failure is not None:
            metadata["failure"] = _failure.to_json(failure)["cause"]
        if suspended:
            metadata["wakeAt"] = min(due or NEVER for due in self._run.waits.values())
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


def _pause_after(attempts: int) -> float:
    """Return the seconds before a run that was started so often is due again."""
    return min(2.0 ** min(attempts - 1, 12), LONGEST_PAUSE)


def _has_success(journal: str) -> bool:
    return any(step.get("ok") is True for step in _json.loads(journal).values())


def _count(value: object) -> int:
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else 0


def _brief(text: str, most: int = 200) -> str:
    return text if len(text) <= most else f"{text[:most]}…"
