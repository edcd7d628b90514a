"""A transaction of a step: begun with patience, run once, and let go of whatever interrupts it."""

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
    """One transaction whose connection is not lost, wherever an interrupt strikes.

    No context manager holds the connection, for an exception out of a signal handler may strike
    after one is entered and before its block is, or before it is left. Whoever begins one calls
    `give_up` when anything has been raised since.
    """

    _db: Database
    _opener: OpenTransaction | None  # gives one that commits when it closes; None: from the pool
    _loan: Loan | None = None
    _conn: Connection | None = None
    _open: ExitStack = field(factory=ExitStack)

    def begin(self) -> Connection:
        """Open it. Only that is tried again while the trouble is transient."""
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
            conn = self._open.enter_context(self._opener())
            self._db.joined(conn)  # or refused
            return conn
        self._loan = self._db.pool.loan()
        conn = self._loan.take(self._db.patience)
        self._db.make_tables_at_first(conn)
        self._open.enter_context(conn.transaction())
        set_own_level(conn)
        return conn

    def end(self, error: BaseException | None) -> None:
        """Commit, or roll back if there was an error; its errors pass through as they are."""
        kind, traceback = (type(error), error.__traceback__) if error else (None, None)
        self._open.__exit__(kind, error, traceback)
        if self._loan is not None:
            self._loan.give_back()

    def give_up(self, error: BaseException) -> bool:
        """Roll back what is still open and let go of the connection; return whether it was lost."""
        lost = self._conn is not None and self._conn.closed
        with suppress(Exception):
            self._open.__exit__(type(error), error, error.__traceback__)
        if self._loan is not None:
            self._loan.give_back()
        elif self._conn is not None and not is_clean(self._conn):
            with suppress(psycopg.Error):  # it is closed in any case
                stop(self._conn)  # the opener's: it was kept from ending its transaction
        # One that was struck on its way back to the pool gets there when nobody holds it any more.
        self._conn, self._open = None, ExitStack()
        return lost
