"""The transaction of one step, and how its outcome is determined after an error."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from types import TracebackType
from typing import TYPE_CHECKING

from attrs import define, field

from ..errors import LeaseLost, StoreUnavailable
from ..store.connection import is_isolated
from ..store.database import (
    ROLLBACK,
    Connection,
    driver_error,
    fetch,
    is_transaction_timeout,
)
from ..store.transaction import Transaction
from .written import Written

if TYPE_CHECKING:
    from .checkpoints import Checkpoints


@define(eq=False, repr=False)
class StepTransaction:
    """The transaction of one step: its body, then the fenced write of the step, then the commit.

    From that write until the outcome of the commit is known, nothing else of the run is written:
    this thread holds the turn, and `Checkpoints.in_doubt` names the step.
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
            with writer.turn:
                writer.refuse_if_not_ours(f"before step {self._key!r} returns")
                writer.rewrite_before_append()
        # Read before the transaction begins, so that what it sees is at least as new. Read later,
        # these could name a checkpoint of another thread that an isolated transaction, which began
        # before it, cannot see: the check would mistake it for lost history.
        params = writer.next_write()
        conn = self._conn = self._transaction.begin()
        self._isolated = is_isolated(conn)
        if self._isolated and not fetch(conn, writer.db.sql.check_history, params):
            raise LeaseLost(writer.id)
        return conn

    def record(self, enter: Callable[[], str]) -> None:
        """Write the step, as the last statement before the commit.

        Takes the turn and keeps it until the outcome of the commit is known. Only from here on, so
        that steps of other threads can be recorded while the body runs.
        """
        writer = self._checkpoints
        if self._conn is None:
            raise RuntimeError(f"step {self._key!r} cannot be recorded: no transaction is open")
        writer.turn.acquire()
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
            self._leave_turn()

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
            # An error from the server on a live connection means that it was rolled back. After a
            # lost connection or an interrupt (a signal handler, Ctrl-C), only a lookup can tell.
            if in_doubt and (closed or refused is None):
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
            if closed and refused is not None:
                writer.db.recover(refused)
                if committed:
                    return None
                if not is_transaction_timeout(refused):
                    return writer.db.translate(refused)
            return error
        finally:
            self._leave_turn()

    def _clear_doubt(self) -> None:
        if self._checkpoints.in_doubt == self._key:
            self._checkpoints.in_doubt = None

    def _leave_turn(self) -> None:
        # Without a flag that says whether it is held: an exception may have been raised after the
        # turn was acquired and before the flag was set.
        with suppress(RuntimeError):  # this thread does not hold it
            self._checkpoints.turn.release()
