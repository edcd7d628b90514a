"""The recorder of a durable run: what each checkpoint writes, and which write it may follow."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Mapping
from datetime import datetime
from typing import Any

from attrs import define, evolve, field

from .. import _json
from .._checks import moment
from ..errors import LeaseLost, StoreUnavailable, WorkflowError
from ..store.database import Connection, Database, execute, fetch
from ..store.rows import decode_snapshot
from ..store.statements import Statements
from ..store.transaction import OpenTransaction
from ..workflow.history import History
from .group import Group
from .pending import pause_after
from .step_transaction import StepTransaction
from .written import Written


@define(eq=False, repr=False)
class Checkpoints:
    """The recorder of one durable run: every write is fenced by the lease and by the last write.

    Args:
        db: the database that stores the run.
        id: the run's id as the user gave it, for messages.
        key: its id in the tables, prefix included.
        token: the token of its lease.
        ttl: seconds that the lease lasts after a write that renews it.
        history: the recorded steps.
        document: composes the snapshot of the run as it stands now.
        open_transaction: opens the transactions of ``step.transaction``; None uses a pooled
            connection.
    """

    db: Database
    id: str
    key: str
    token: str
    ttl: float
    history: History
    document: Callable[[], str]
    open_transaction: OpenTransaction | None
    attempts: int = 0  # starts since the run last made progress, this one included
    written: Written = field(factory=Written)
    in_doubt: str | None = None  # the step whose commit has an unknown outcome
    # Held for each write, so that a run's writes are sent one at a time. Always acquired after the
    # pooled connection: a thread that held it while waiting for a connection could deadlock with
    # threads that have the connections and wait for it. Reentrant, because an exception can be
    # raised anywhere, and the thread that holds it must still settle the commit and finish the run.
    write_lock: threading.RLock = field(factory=threading.RLock)
    _pid: int = field(factory=os.getpid)
    _group: Group = field(init=False)

    def __attrs_post_init__(self) -> None:
        self._group = Group(self._record_group)

    # -- the recorder of a run -------------------------------------------------------------

    def refuse_to_begin(self) -> None:
        """Raise where a rollback could undo what a step does, although the step is recorded."""
        self.db.pool.refuse_to_run_here()

    def leave_thread(self) -> None:
        """Close what is kept for the current thread, which is about to end."""
        self.db.pool.leave_thread()

    def record(self, key: str, enter: Callable[[], str]) -> None:
        """Write one step, in one statement with those of other threads that are waiting."""
        self._refuse_in_a_fork(f"before step {key!r} returns")  # locks may stay held in a child
        self._group.record(key, enter)

    def _record_group(self) -> None:
        """Write the waiting steps in one statement, which is retried if its reply is lost.

        A retry writes those of the first try again, unchanged, so it does not matter whether that
        succeeded; steps that have queued up since are added.
        """

        def work(conn: Connection) -> bool:
            with self.write_lock:
                self.refuse_if_not_ours("before its steps return")
                group = self._group.entered()
                steps = {step.key: str(step.step) for step in group}
                landed = not steps or self._write(conn, steps)
                for step in group if landed else ():
                    step.recorded = True
                return landed

        if not self.db.run(work):
            raise LeaseLost(self.id)

    def record_timeout(self, key: str, enter: Callable[[], str]) -> bool:
        """Record that a wait has timed out, in one statement; False if a signal has come first.

        Never appended: `Durable.signal` writes the snapshot's row, too, so whichever of the two
        comes second sees the first.
        """
        deadline = self.history.deadlines.get(key)

        def work(conn: Connection) -> bool:
            with self.write_lock:
                self.refuse_if_not_ours(f"before step {key!r} returns")
                enter()
                recorded = False
                try:
                    recorded = self._rewrite(conn, expired=key)
                finally:
                    if not recorded:
                        # Before the write lock is released: a write of another thread would store
                        # the timeout without checking for a signal. If a try whose reply was lost
                        # has succeeded, such a write removes the timeout again, but not the
                        # deadline: signals are still refused, and the next try decides the same.
                        self.history.forget(key)
                        if deadline is not None:
                            self.history.deadlines[key] = deadline
                return recorded

        if self.db.run(work):
            return True
        if self.signal(key) is None:
            raise LeaseLost(self.id)
        return False

    def transaction(self, key: str) -> StepTransaction:
        """Return the transaction in which step ``key`` runs and is recorded."""
        return StepTransaction(self, key)

    def signal(self, key: str) -> str | None:
        """Return the JSON text that was sent for ``key``, or None if no signal has come."""
        rows = self.db.rows(self._sql.signal_for, {"id": self.key, "key": key})
        return rows[0][0] if rows else None

    def now(self) -> datetime:
        """Return the server's time."""
        return moment(self.db.rows(self._sql.now, {})[0][0])

    # -- beginning and end -----------------------------------------------------------------

    def begun(self, size: int) -> None:
        """Note that the first snapshot, of ``size`` characters, is stored."""
        self.written = Written(size=size, journal_is_empty=True)

    def taken_up(self, size: int) -> None:
        """Note that a stored run was admitted: that is write number 1 under this lease."""
        self.written = Written(1, 1, size, journal_is_empty=True)

    def finish(
        self, compose: Callable[[], str] | None, pause: float | None, ending: Callable[[], None]
    ) -> tuple[bool, int, str]:
        """Store the end, fold the journal and release the lease, in one statement.

        Args:
            compose: composes the final snapshot; None deletes the run instead.
            pause: seconds until the run is due again; None sets no time.
            ending: closes the run to new records. It is called with the write lock held, before the
                snapshot is composed: a step of another thread is either already in the snapshot or
                refused, never acknowledged and then lost.

        Returns:
            Whether the last try changed the row, how many tries there were, and the snapshot. After
            several tries, False can mean that an earlier one succeeded and its reply was lost.
        """
        tries, document = 0, ""

        def work(conn: Connection) -> bool:
            nonlocal tries, document
            with self.write_lock:
                self.refuse_if_not_ours("instead of returning")
                ending()
                tries += 1
                # Their statement is being retried; the final snapshot has them.
                in_flight = self._group.in_flight()
                if compose is None:
                    return bool(fetch(conn, self._sql.discard, self.next_write()))
                # Composed once, so that after a retry the caller can tell by the document whether
                # an earlier try succeeded. A retry after that finds no lease and changes nothing.
                document = document or compose()
                sql, params = self._sql, {**self.next_write(), "snapshot": document, "pause": pause}
                finish = sql.finish if self.written.journal_is_empty else sql.finish_and_fold
                done = bool(execute(conn, finish, params, prepare=True))
                if not done and execute(conn, sql.write_anew, params):
                    # Somebody had deleted the snapshot. It is stored again now: finish it.
                    done = bool(execute(conn, finish, params, prepare=True))
                for step in in_flight if done else ():
                    step.recorded = True
                return done

        return self.db.run(work), tries, document

    def refuse_if_not_ours(self, what: str) -> None:
        """Raise if this process may write nothing more for the run; call with the write lock held.

        A forked child would write under its parent's lease. While the outcome of a step's commit is
        unknown, any other write could record the step although it was rolled back.
        """
        self._refuse_in_a_fork(what)
        if self.in_doubt is not None:
            raise StoreUnavailable(
                f"the connection was lost while step {self.in_doubt!r} of {self.id!r} was being "
                "committed, and the outcome of the commit is still unknown; resume the run"
            )

    def _refuse_in_a_fork(self, what: str) -> None:
        if os.getpid() != self._pid:
            raise WorkflowError(
                f"process {os.getpid()} was forked inside the run of {self.id!r} and must not "
                f"write to it; end the child process with os._exit() {what}"
            )

    # -- what is written -------------------------------------------------------------------

    def next_write(self) -> dict[str, Any]:
        """Return the parameters of the next write's fence.

        The stored token may be that of the last write known to have succeeded, or of any later one
        whose reply was lost. It may also be the next one itself: then an earlier try of the same
        write has succeeded.
        """
        written = self.written
        tokens = [self._numbered(nr) for nr in range(written.number, written.tried + 2)]
        return {
            "id": self.key,
            "ttl": self.ttl,
            "token": self.token,
            "number": written.number,
            "tokens": _array(tokens),
            "base": tokens[0],
            "next": tokens[-1],
            "last": written.last_appended,
        }

    @property
    def counted_attempts(self) -> int:
        """The starts since the run last made progress; 1 as soon as this start has made some."""
        return 1 if self.written.has_progressed else self.attempts

    def _numbered(self, number: int) -> str:
        return f"{self.token}#{number}" if number else self.token

    def _note_progress(self, steps: Iterable[str]) -> None:
        if not self.written.has_progressed and any(s.startswith('{"ok":true') for s in steps):
            self.written = evolve(self.written, has_progressed=True)

    def _write(self, conn: Connection, steps: Mapping[str, str]) -> bool:
        """Write these steps, by key, which are already in the history, in the cheaper way."""
        self._note_progress(steps.values())
        text, last_key = _json.join(steps), [*steps][-1]
        if self._sql.journal and self.written.takes_appended(len(text)):
            return self._append(conn, self._sql.append, text, last_key)
        return self._rewrite(conn)

    def _append(self, conn: Connection, statement: bytes, steps: str, last_key: str) -> bool:
        written = self.written = self.written.trying_append()
        params = {
            "id": self.key,
            "base": self._numbered(written.number),
            "last": written.last_appended,
            "steps": steps,
            "token": self.token,  # for append_isolated
        }
        if not execute(conn, statement, params, prepare=True):
            return False
        self.written = written.after_append(last_key, len(steps))
        return True

    def _rewrite(self, conn: Connection, expired: str | None = None) -> bool:
        params = {**self.next_write(), "snapshot": self.document(), "pause": self._pause()}
        params["key"] = expired
        # Counted before it is sent, so that the next write gets a later number in any case: if the
        # reply is lost and this statement arrives late, its number no longer matches.
        self.written = self.written.trying_rewrite()
        sql = self._sql
        if expired is not None:
            rewrite = sql.expire
        else:
            rewrite = sql.write if self.written.journal_is_empty else sql.fold
        if not execute(conn, rewrite, params, prepare=True):
            # Somebody has deleted the snapshot: store it again. If the fence has refused the write,
            # the token has not got its number, and this finds no lease.
            params["tokens"] = _array([params["next"]])
            if not execute(conn, sql.write_anew, params):
                return False
        self.written = self.written.after_rewrite(len(params["snapshot"]))
        return True

    def write_in_transaction(self, conn: Connection, key: str, step: str, isolated: bool) -> bool:
        """Write one step in the transaction of its body; return whether the fence let it through.

        The step is appended whatever its size: an isolated transaction could not update a snapshot
        that another thread or a signal has changed since the transaction began.
        """
        sql = self._sql
        self._note_progress([step])
        if sql.journal:
            statement = sql.append_isolated if isolated else sql.append
            return self._append(conn, statement, _json.join({key: step}), key)
        if not isolated:
            return self._rewrite(conn)
        params = {**self.next_write(), "snapshot": self.document(), "pause": self._pause()}
        self.written = evolve(self.written, size=len(params["snapshot"]))
        return bool(execute(conn, sql.write_isolated, params, prepare=True))

    def rewrite_before_append(self) -> None:
        """Rewrite the snapshot now if no step may be appended to it as it is.

        On a separate connection: in the step's transaction it would be rolled back with the step,
        and pooled connections may all be held by threads of this run that wait for the write lock,
        which this thread holds.
        """
        if self.written.must_be_rewritten and not self.db.run_apart(self._rewrite):
            raise LeaseLost(self.id)

    def has_committed(self, key: str, step: str) -> bool:
        """Wait until the transaction of a step has ended; return whether it was committed.

        On a separate connection: pooled ones may all be held by threads of this run that wait for
        the write lock, which this thread holds.
        """

        def read(conn: Connection) -> bool:
            # First wait for a commit in progress, which has the lease's row locked. Reading before
            # that could miss a step that is committed a moment later.
            fetch(conn, self._sql.wait_for_commit, {"id": self.key, "token": self.token})
            rows = fetch(conn, self._sql.load, {"id": self.key})
            steps = decode_snapshot(self.id, rows[0][0], rows[0][1]).steps if rows else {}
            return key in steps and bool(steps[key].to_json() == _json.loads(step))

        return self.db.run_apart(read)

    def _pause(self) -> float | None:
        """Return the seconds to pause before the next start; None if this start needs no pause."""
        return None if self.counted_attempts < 2 else pause_after(self.attempts)

    @property
    def _sql(self) -> Statements:
        return self.db.sql


def _array(tokens: Iterable[str]) -> str:
    """Return a PostgreSQL text array. Adapting a list would be the slowest part of a checkpoint."""
    return f"{{{','.join(map(_json.quote, tokens))}}}"
