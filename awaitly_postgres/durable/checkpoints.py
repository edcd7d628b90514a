"""What each step of a durable run writes, and on which state of the run it may land."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from datetime import datetime
from typing import Any

from attrs import define, evolve, field, frozen

from .. import _json
from .._checks import moment
from ..errors import LeaseLost, StoreUnavailable, WorkflowError
from ..store.database import Connection, Database, execute, fetch
from ..store.statements import Statements
from ..store.store import decode_snapshot
from ..workflow.history import History
from .pending import pause_after
from .transaction import OpenTransaction, StepTransaction

# Characters. A larger row than IN_ROW is spread over PostgreSQL's TOAST table, which costs more to
# rewrite than a step to append; the journal is worth folding from FOLDED on.
IN_ROW, FOLDED = 2 * 1024, 8 * 1024


@frozen
class Written:
    """What a run has stored so far, as far as it is known to have landed.

    Each write of the snapshot has a number, which the lease's token bears; steps in the journal
    have none, so who follows one names its key.
    """

    number: int = 0  # of the last write of the snapshot
    tried: int = 0  # of the last one sent; more, while it is not known what became of it
    size: int = 0  # characters of the snapshot then
    appended: int = 0  # characters put into the journal since
    last_appended: str | None = None  # the key
    journal_is_empty: bool = False
    is_outdated: bool = False  # it has steps that this start does not take over
    has_progressed: bool = False  # this start has recorded a step that succeeded

    @property
    def must_be_rewritten(self) -> bool:
        """Whether no step may be appended before the snapshot is rewritten.

        While it is not known whether the last rewrite has landed, it could do so after the step,
        which it would erase.
        """
        return self.is_outdated or self.tried > self.number

    def takes_appended(self, size: int) -> bool:
        """Tell whether a step of ``size`` characters is appended to the journal.

        While the snapshot fits into its row it is rewritten whole, for anybody to read in one
        table. Beyond that, rewriting it each time would be quadratic: steps are appended to the
        journal until they amount to as much again.
        """
        grown = self.appended + size
        small = self.size + grown <= IN_ROW
        due = grown >= max(FOLDED, self.size)
        return not (small or due or self.must_be_rewritten)

    def trying_append(self) -> Written:
        """Return the state while a step is being appended: the journal may have it."""
        return evolve(self, journal_is_empty=False)

    def after_append(self, key: str, size: int) -> Written:
        """Return the state when the step has been appended."""
        return evolve(self, appended=self.appended + size, last_appended=key)

    def trying_rewrite(self) -> Written:
        """Return the state while the snapshot is being rewritten."""
        return evolve(self, tried=self.tried + 1)

    def after_rewrite(self, size: int) -> Written:
        """Return the state when the last rewrite sent has landed, and the journal is folded."""
        return Written(
            self.tried,
            self.tried,
            size,
            journal_is_empty=True,
            has_progressed=self.has_progressed,
        )


@define(eq=False)
class Checkpoints:
    """The recorder of one durable run: every write is fenced by the lease and by the last write.

    Args:
        db: where the run is stored.
        id: what the user calls it.
        key: its id in the tables, prefix included.
        token: the lease's.
        ttl: seconds for which each write renews the lease.
        history: what is recorded.
        document: composes the snapshot of the run as it stands.
        open_transaction: opens the transactions of steps; None: on a pooled connection.
    """

    db: Database
    id: str
    key: str
    token: str
    ttl: float
    history: History
    document: Callable[[], str]
    open_transaction: OpenTransaction | None
    attempts: int = 0  # starts since the run last got further, this one included
    written: Written = Written()
    in_doubt: str | None = None  # the step of a transaction whose outcome is not known
    # One write at a time. Taken after a connection, so that nobody who has it waits for one.
    # Reentrant: wherever an exception has struck, the thread that has it may settle and finish.
    turn: threading.RLock = field(factory=threading.RLock)
    _pid: int = field(factory=os.getpid)

    # -- the recorder of a run -------------------------------------------------------------

    def record(self, key: str, enter: Callable[[], str]) -> None:
        """Write one step: one statement, tried again when its reply is lost."""
        step: str | None = None

        def work(conn: Connection) -> bool:
            nonlocal step
            with self.turn:
                self.refuse_if_not_ours(f"before step {key!r} returns")
                # Once: a second try writes the same step, with the same number.
                step = enter() if step is None else step
                self._note_progress(step)
                if self._sql.journal and self.written.takes_appended(len(key) + len(step)):
                    return self._append(conn, self._sql.append, key, step)
                return self._rewrite(conn)

        if not self.db.run(work):
            raise LeaseLost(self.id)

    def transaction(self, key: str) -> StepTransaction:
        """Return the transaction in which step ``key`` runs and is written."""
        return StepTransaction(self, key)

    def signal(self, key: str) -> str | None:
        """Return the JSON text that was sent for ``key``."""
        rows = self.db.rows(self._sql.signal_for, {"id": self.key, "key": key})
        return rows[0][0] if rows else None

    def now(self) -> datetime:
        """Tell the server's time."""
        return moment(self.db.rows(self._sql.now, {})[0][0])

    # -- beginning and end -----------------------------------------------------------------

    def begun(self, size: int) -> None:
        """Note that the first snapshot is stored, of ``size`` characters."""
        self.written = Written(size=size, journal_is_empty=True)

    def taken_up(self, size: int) -> None:
        """Note that a stored run has been taken up, which is the first write of its start."""
        self.written = Written(1, 1, size, journal_is_empty=True)

    def finish(
        self, compose: Callable[[], str] | None, pause: float | None, ending: Callable[[], None]
    ) -> tuple[bool, int, str]:
        """Store the end, fold the journal and release the lease, in one statement.

        Args:
            compose: writes the last document; None deletes the run.
            pause: seconds until it is due again; None: it is not.
            ending: is called in turn with the steps, before the document is composed. What another
                thread still does from then on is neither kept nor acknowledged.

        Returns:
            Whether the last try has done it, how many tries there were, and the document.
        """
        tries, document = 0, ""

        def work(conn: Connection) -> bool:
            nonlocal tries, document
            with self.turn:
                self.refuse_if_not_ours("instead of returning")
                ending()
                tries += 1
                if compose is None:
                    return bool(fetch(conn, self._sql.discard, self.next_write()))
                document = document or compose()
                finish = (
                    self._sql.finish if self.written.journal_is_empty else self._sql.finish_and_fold
                )
                params = {**self.next_write(), "snapshot": document, "pause": pause}
                return bool(execute(conn, finish, params, prepare=True))

        return self.db.run(work), tries, document

    def refuse_if_not_ours(self, what: str) -> None:
        """Raise, with the turn, where nothing of this run may be written any more."""
        if os.getpid() != self._pid:
            raise WorkflowError(
                f"process {os.getpid()} was forked inside the run of {self.id!r} and records "
                f"nothing for it; leave it with os._exit() {what}"
            )
        if self.in_doubt is not None:
            raise StoreUnavailable(
                f"the connection was lost while step {self.in_doubt!r} was being committed, and "
                "whether it was is not known yet. Resume the run."
            )

    # -- what is written -------------------------------------------------------------------

    def next_write(self) -> dict[str, Any]:
        """Return what the fence of the next write asks for.

        It may follow the last write that is known to have landed, and any sent since.
        """
        written = self.written
        tokens = [self._numbered(nr) for nr in range(written.number, written.tried + 2)]
        return {
            "id": self.key,
            "ttl": self.ttl,
            "token": self.token,
            "number": written.number,
            "tokens": tokens,
            "base": tokens[0],
            "next": tokens[-1],
            "last": written.last_appended,
        }

    @property
    def counted_attempts(self) -> int:
        """The starts since the run last got further; once this one has, it is the first."""
        return 1 if self.written.has_progressed else self.attempts

    def _numbered(self, number: int) -> str:
        return f"{self.token}#{number}" if number else self.token

    def _note_progress(self, step: str) -> None:
        if step.startswith('{"ok":true'):
            self.written = evolve(self.written, has_progressed=True)

    def _append(self, conn: Connection, statement: bytes, key: str, step: str) -> bool:
        params = {**self.next_write(), "key": key, "step": step}
        # Only on the last rewrite that is known: a later one would not know of this step.
        params["tokens"] = [params["base"]]
        self.written = self.written.trying_append()
        if not execute(conn, statement, params, prepare=True):
            return False
        self.written = self.written.after_append(key, len(key) + len(step))
        return True

    def _rewrite(self, conn: Connection) -> bool:
        params = {**self.next_write(), "snapshot": self.document(), "pause": self._pause()}
        # Noted before it is sent: whatever becomes of it, the next write has a later number.
        self.written = self.written.trying_rewrite()
        statement = self._sql.write if self.written.journal_is_empty else self._sql.fold
        if not execute(conn, statement, params, prepare=True):
            return False
        self.written = self.written.after_rewrite(len(params["snapshot"]))
        return True

    def write_in_transaction(self, conn: Connection, key: str, step: str, isolated: bool) -> bool:
        """Write one step in the transaction of its body; tell whether the lease was still ours.

        It is appended whatever the size: an isolated transaction could not write a snapshot that
        another thread or a signal has changed since it began.
        """
        sql = self._sql
        self._note_progress(step)
        if sql.journal:
            statement = sql.append_isolated if isolated else sql.append_in_transaction
            return self._append(conn, statement, key, step)
        if not isolated:
            return self._rewrite(conn)
        params = {**self.next_write(), "snapshot": self.document(), "pause": self._pause()}
        self.written = evolve(self.written, size=len(params["snapshot"]))
        return bool(execute(conn, sql.write_isolated, params, prepare=True))

    def rewrite_before_append(self) -> None:
        """Rewrite the snapshot if a step may not be appended to it, on a connection of its own."""
        if self.written.must_be_rewritten and not self.db.run_apart(self._rewrite):
            raise LeaseLost(self.id)

    def has_committed(self, key: str, step: str) -> bool:
        """Tell how the transaction of a step has ended, waiting until it has.

        On a connection of its own: those of the pool may be held by threads of this run, which
        wait for the turn that we have.
        """

        def look(conn: Connection) -> bool:
            fetch(conn, self._sql.wait_for_commit, {"id": self.key, "token": self.token})
            rows = fetch(conn, self._sql.load, {"id": self.key})
            stored = decode_snapshot(self.id, rows[0][0], rows[0][1]) if rows else None
            steps = {} if stored is None else stored.steps
            return key in steps and bool(steps[key].to_json() == _json.loads(step))

        return self.db.run_apart(look)

    def _pause(self) -> float | None:
        """Return the pause before the next start, unless this one has got further."""
        return None if self.counted_attempts < 2 else pause_after(self.attempts)

    @property
    def _sql(self) -> Statements:
        return self.db.sql
