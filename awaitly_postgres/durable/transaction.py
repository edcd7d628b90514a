"""The transaction of one step, and what became of it when an error came out of it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, suppress
from types import TracebackType
from typing import TYPE_CHECKING

from attrs import define, field

from ..errors import LeaseLost, StoreUnavailable
from ..store.database import ROLLBACK, Connection, driver_error, fetch

if TYPE_CHECKING:
    from .checkpoints import Checkpoints, Written

OpenTransaction = Callable[[], AbstractContextManager[Connection]]


@define(eq=False)
class StepTransaction:
    """The transaction of one step: its body, then the fenced write of the step, then the commit.

    From that write until it is known what became of the commit, nothing else of the run is written:
    the thread keeps the turn, and `Checkpoints.in_doubt` names the step.
    """

    _run: Checkpoints
    _key: str
    _open: ExitStack = field(factory=ExitStack)
    _conn: Connection | None = None
    _isolated: bool = False
    _step: str | None = None  # its JSON, once it is in the history
    _before: Written | None = None  # what was stored before it, once we have the turn
    _committed: bool = False

    def __enter__(self) -> Connection:
        run = self._run
        # Read before the transaction begins: what it sees is not older.
        params = run.next_write()
        conn = self._conn = self._open.enter_context(run.db.transaction(run.open_transaction))
        self._isolated = run.db.isolates(conn)
        if self._isolated and not fetch(conn, run.db.sql.check_history, params):
            raise LeaseLost(run.id)
        return conn

    def record(self, enter: Callable[[], str]) -> None:
        """Write the step, as the last statement before the commit."""
        run = self._run
        if self._conn is None:
            raise RuntimeError("nothing is written before the transaction is open")
        run.turn.acquire()
        run.refuse_if_not_ours(f"before step {self._key!r} returns")
        run.rewrite_before_append()
        self._before = run.written
        self._step = enter()
        if not run.write_in_transaction(self._conn, self._key, self._step, self._isolated):
            raise LeaseLost(run.id)
        run.in_doubt = self._key  # last: what follows is the commit

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if isinstance(error, ROLLBACK):  # which the transaction would swallow
            raise RuntimeError(
                f"step {self._key!r} rolled its transaction back (psycopg.Rollback), so there is "
                "nothing to record; raise an exception of your own, or return"
            ) from error
        self._open.__exit__(kind, error, traceback)
        if error is None:
            # Before the doubt goes: an exception may strike between any two of these, and `settle`
            # must not take what is neither in doubt nor known to be committed for rolled back.
            self._committed = True
            self._clear_doubt()
            self._leave_turn()

    def settle(self, error: BaseException) -> BaseException | None:
        """Find out what became of the transaction when ``error`` came out of it.

        The error may have struck anywhere: in the body, in the commit, or between the two.
        Afterwards the history has the step only if it was committed.

        Returns:
            What to raise; None if all went well but for the reply to the commit.
        """
        run = self._run
        try:
            # What is still open will not be committed.
            with suppress(Exception):
                self._open.__exit__(type(error), error, error.__traceback__)
            refused = driver_error(error) is not None
            lost = refused and self._conn is not None and self._conn.closed
            run.db.abandon(self._conn)
            committed = self._committed
            in_doubt = not committed and run.in_doubt == self._key and self._step is not None
            if in_doubt and (lost or not refused):
                try:
                    committed = run.has_committed(self._key, str(self._step))
                except StoreUnavailable as unknown:  # and so it stays in doubt
                    if not isinstance(error, Exception):
                        return error
                    unknown.__cause__ = error
                    return unknown
            if not committed and self._before is not None:
                run.history.forget(self._key)
                run.written = self._before
            self._clear_doubt()
            if lost:
                run.db.recover(error)
                return None if committed else run.db.translated(error)
            return error
        finally:
            self._leave_turn()

    def _clear_doubt(self) -> None:
        if self._run.in_doubt == self._key:
            self._run.in_doubt = None

    def _leave_turn(self) -> None:
        # Not asked for before: an exception may have struck right after it was taken.
        with suppress(RuntimeError):  # not taken
            self._run.turn.release()
