"""The database transaction of a step: the begin is retried, the body is not."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, suppress

import psycopg
from attrs import define, field

from .connection import Connection, is_clean, set_own_level, stop
from .database import Backoff, Database
from .loan import Loan

OpenTransaction = Callable[[], AbstractContextManager[Connection]]


@define(eq=False, repr=False)
class Transaction:
    """One transaction whose connection is never leaked, wherever a signal handler raises.

    Not a context manager: a signal handler can raise between the return of ``__enter__`` and the
    first line of the block, or before ``__exit__``. The caller of `begin` must call `give_up` if
    anything is raised afterwards.
    """

    _db: Database
    _opener: OpenTransaction | None  # the user's `transaction=` option; None: use the pool
    _loan: Loan | None = None
    _conn: Connection | None = None
    _open: ExitStack = field(factory=ExitStack)

    def begin(self) -> Connection:
        """Begin the transaction. Only this is retried after transient errors."""
        backoff = Backoff(time.monotonic() + self._db.retry_for)
        while True:
            try:
                self._conn = self._begin()
                return self._conn
            except psycopg.Error as error:
                self.give_up(error)
                self._db.pause_or_raise(error, backoff)

    def _begin(self) -> Connection:
        if self._opener is not None:
            conn = self._conn = self._open.enter_context(self._opener())
            self._db.joined(conn)  # raises if it is another database's
            self._db.pool.foreign.add(conn)  # a forked child must not end its transaction
            return conn
        self._loan = self._db.pool.loan()
        conn = self._loan.take(self._db.patience)
        self._db.make_tables_at_first(conn)
        self._open.enter_context(conn.transaction())
        set_own_level(conn)
        return conn

    def end(self, error: BaseException | None) -> None:
        """Commit, or roll back if there was an error; the driver's errors are not translated."""
        kind, traceback = (type(error), error.__traceback__) if error else (None, None)
        self._open.__exit__(kind, error, traceback)
        if self._loan is not None:
            self._loan.give_back()
        elif self._conn is not None:
            self._db.pool.foreign.discard(self._conn)

    def give_up(self, error: BaseException) -> bool:
        """Roll back if it is still open, and return the connection; tell whether it was lost."""
        lost = self._conn is not None and self._conn.closed
        with suppress(Exception):
            self._open.__exit__(type(error), error, error.__traceback__)
        if self._loan is not None:
            self._loan.give_back()
        elif self._conn is not None:
            self._db.pool.foreign.discard(self._conn)
        if self._loan is None and self._conn is not None and not is_clean(self._conn):
            with suppress(psycopg.Error):  # it is closed in any case
                stop(self._conn)  # the user's: the interrupt kept it from ending its transaction
        # If giving the connection back was interrupted, it returns once nothing refers to it.
        self._conn, self._open = None, ExitStack()
        return lost
