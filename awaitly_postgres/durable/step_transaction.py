"""The transaction of one step, and how its outcome is determined after an error."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from types import TracebackType
from typing import TYPE_CHECKING

from attrs import define, field
from psycopg.pq import TransactionStatus

from ..errors import LeaseLost, StoreUnavailable, WorkflowError
from ..store.connection import is_isolated
from ..store.database import ROLLBACK, Connection, fetch
from ..store.driver_errors import driver_error, is_transaction_timeout, is_transient
from ..store.transaction import Transaction
from .written import Written

if TYPE_CHECKING:
    from .checkpoints import Checkpoints


@define(eq=False, repr=False)
class StepTransaction:
    """The transaction of one step: its body, then the fenced write of the step, then the commit.

    From that write until the outcome of the commit is known, nothing else of the run is written:
    this thread holds the write lock, and `Checkpoints.in_doubt` names the step.
    """

    _checkpoints: Checkpoints
    _key: str
    _transaction: Transaction = field(init=False)
    _conn: Connection | None = None
    _isolated: bool = False
    _step: str | None = None  # its JSON, once the history has it
    _before: Written | None = None  # the state to restore if the step is rolled back
    _committed: bool = False

    def __attrs_post_init__(self) -> None:
        self._transaction = Transaction(self._checkpoints.db, self._checkpoints.open_transaction)

    def __enter__(self) -> Connection:
        writer = self._checkpoints
        # As early as possible: `record` would do it while the transaction is open, and would wait
        # for ever if the body has locked a row of this run, for example by signalling itself.
        if writer.written.must_be_rewritten:
            with writer.write_lock:
                writer.refuse_if_not_ours(f"before step {self._key!r} returns")
                writer.rewrite_before_append()
        # Read before the transaction begins, so that what it sees is at least as new. Read later,
        # these could name a checkpoint of another thread that an isolated transaction, which began
        # before it, cannot see: the check would mistake it for lost history.
        params = writer.next_write()
        # Where transactions are isolated, the history is checked before this one begins: in it, the
        # reads of the journal would conflict with the appends of all other runs. A failover between
        # the check and the begin is missed, unless it has lost the lease too.
        sql, isolates = writer.db.sql, writer.db.isolates  # read once: other threads set it
        if isolates and not writer.db.rows(sql.check_history, params):
            raise LeaseLost(writer.id)
        conn = self._conn = self._transaction.begin()
        if not conn.autocommit and conn.info.transaction_status == TransactionStatus.IDLE:
            fetch(conn, b"SELECT 1", {})  # psycopg begins one now, so that `record` sees its end
        self._refuse_without_transaction("transaction= must yield a connection that is in one")
        self._isolated = is_isolated(conn)
        if self._isolated and not isolates:  # found out just now
            writer.db.isolates = True
            # On a separate connection: this thread may hold the only one of the pool.
            if not writer.db.run_apart(lambda c: fetch(c, sql.check_history, params)):
                raise LeaseLost(writer.id)
        return conn

    def _refuse_without_transaction(self, problem: str) -> None:
        """Raise if the step's writes would not commit together with its record."""
        conn = self._conn
        if conn is not None and conn.info.transaction_status == TransactionStatus.IDLE:
            raise RuntimeError(f"step {self._key!r} is in no transaction: {problem}")

    def record(self, enter: Callable[[], str]) -> None:
        """Write the step, as the last statement before the commit.

        Takes the write lock and keeps it until the outcome of the commit is known. Only from here
        on, so that steps of other threads can be recorded while the body runs.
        """
        writer = self._checkpoints
        if self._conn is None:
            raise RuntimeError(f"step {self._key!r} cannot be recorded: no transaction is open")
        self._refuse_without_transaction("it has ended it, with COMMIT or ROLLBACK in SQL")
        # Not for ever: the thread that holds the write lock may be waiting for a row that the body
        # has locked, for example by signalling its own run. The server cannot see that deadlock.
        # Half of the ttl leaves time to record the failure.
        if not writer.write_lock.acquire(timeout=writer.ttl / 2):
            raise WorkflowError(
                f"step {self._key!r} of {writer.id!r} cannot be recorded: other threads of the run "
                f"have been writing for {writer.ttl / 2:g} s, or cannot reach the database. If one "
                "waits for a row that this step has locked, change that row in another step. Then "
                "resume the run."
            )
        writer.refuse_if_not_ours(f"before step {self._key!r} returns")
        writer.rewrite_before_append()
        # Saved before the history is changed: an exception can be raised after any line, and
        # `settle` undoes both changes if it finds a saved state.
        self._before = writer.written
        self._step = enter()
        if not writer.write_in_transaction(self._conn, self._key, self._step, self._isolated):
            raise LeaseLost(writer.id)
        writer.in_doubt = self._key  # last: until here a rollback is certain, next comes the commit

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if isinstance(error, ROLLBACK):  # psycopg would swallow it, as if the step had committed
            raise RuntimeError(
                f"step {self._key!r} rolled its transaction back (psycopg.Rollback), so there is "
                "nothing to record; raise another exception to fail the step, or return a value"
            ) from error
        self._transaction.end(error)
        if error is None:
            # In this order, because an exception can be raised between any two lines, and `settle`
            # treats a step that is neither in doubt nor marked as committed as rolled back.
            self._committed = True
            self._clear_doubt()
            self._release_write_lock()

    def settle(self, error: BaseException) -> BaseException | None:
        """Find out whether the transaction that ended with ``error`` was committed.

        The error may have been raised anywhere: in the body, in the commit, or in between.
        Afterwards the history has the step only if it was committed, or if that is still unknown.

        Returns:
            The exception to raise; None if the step was committed and only the reply was lost.
        """
        writer = self._checkpoints
        try:
            # First end the transaction if it is still open. If the commit was not sent, this rolls
            # back, so that the lookup below does not wait for a transaction of this very thread.
            closed, self._conn = self._transaction.give_up(error), None
            refused = driver_error(error)
            committed = self._committed
            in_doubt = not committed and writer.in_doubt == self._key and self._step is not None
            # Only a lookup can tell, even if the server has reported an error on a live connection:
            # that need not be about the COMMIT. A hook that runs after it, such as Django's
            # on_commit, may have used the database too.
            if in_doubt:
                try:
                    committed = writer.has_committed(self._key, str(self._step))
                except StoreUnavailable as unknown:  # the step stays in doubt: nothing may follow
                    if not isinstance(error, Exception):
                        return error
                    unknown.__cause__ = error
                    return unknown
            if not committed and self._before is not None:
                writer.history.forget(self._key)
                writer.written = self._before
            self._clear_doubt()
            # An opener may close its connection, so that is no outage unless the error is one.
            if closed and refused is not None and is_transient(refused):
                writer.db.recover(refused)
                if committed:
                    return None
                if not is_transaction_timeout(refused):
                    return writer.db.translate(refused)
            return error
        finally:
            self._release_write_lock()

    def _clear_doubt(self) -> None:
        if self._checkpoints.in_doubt == self._key:
            self._checkpoints.in_doubt = None

    def _release_write_lock(self) -> None:
        # Without a flag that says whether it is held: an exception may have been raised after the
        # lock was acquired and before the flag was set.
        with suppress(RuntimeError):  # this thread does not hold it
            self._checkpoints.write_lock.release()
