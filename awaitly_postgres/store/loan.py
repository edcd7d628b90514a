"""Borrows a connection from a pool and returns it, wherever a signal handler's exception hits."""

from __future__ import annotations

import _thread
import gc
import weakref
from contextlib import suppress
from traceback import clear_frames
from typing import TYPE_CHECKING, Any

import psycopg
from attrs import define
from psycopg_pool import ConnectionPool

from .connection import (
    Connection,
    is_clean,
    set_own_default_level,
    set_read_committed,
    stop,
)

if TYPE_CHECKING:
    from .pool import OwnPool, Pool


@define(eq=False, repr=False)
class Loan:
    """One connection that one thread has taken from a pool and will give back."""

    _lender: Pool
    _pool: ConnectionPool[Any]
    conn: Connection | None = None
    _autocommit: bool = True

    def take(self, timeout: float) -> Connection:
        """Get a connection, at READ COMMITTED and in autocommit mode."""
        try:
            conn: Connection = self._pool.getconn(timeout=timeout)
        except BaseException as error:
            # The traceback would keep alive a connection that the pool was about to return. Without
            # references it returns to the pool at once: it may be the only one, and is needed to
            # release the lease.
            _let_go(error)
            raise
        self.conn = conn  # no signal handler runs in between: no function is called
        self._lender.has_worked = True
        self._autocommit = conn.autocommit
        if not self._autocommit:
            conn.autocommit = True
        if not isinstance(conn, OwnConnection):  # our own are configured once, by the pool
            set_read_committed(conn)
        return conn

    def give_back(self) -> None:
        """Give the connection back, unless that has been done already."""
        conn, loans = self.conn, self._lender._loans
        if conn is None:
            loans.discard(self)
            return
        with suppress(psycopg.Error):  # broken: the pool notices and replaces it
            if not is_clean(conn):
                stop(conn)
            else:
                if not isinstance(conn, OwnConnection):
                    set_own_default_level(conn)
                if not self._autocommit:
                    conn.autocommit = False
        closed = conn.closed
        try:
            self._pool.putconn(conn)
        except BaseException as error:
            # Raised inside the pool: either the connection is back, and another thread may already
            # use it, or nobody has it, and `OwnConnection.__del__` returns it once the last
            # reference is gone.
            self.conn = conn = None
            loans.discard(self)
            _let_go(error)
            raise
        if closed:
            # The pool has replaced it, but left ``_pool`` set, so __del__ would consider it lost.
            conn._pool = None
        self.conn = None  # last: until putconn returns, a forked child must know about it
        loans.discard(self)


class OwnConnection(psycopg.Connection[Any]):
    """Returns to its pool when the last reference to it is gone.

    A signal handler can raise inside the pool, or after ``getconn`` has returned and before we
    store the result. Without this, nobody would know about the connection, and the pool would be
    one connection smaller for good.
    """

    home: weakref.ref[OwnPool] | None = None

    def __del__(self, *args: Any) -> None:
        home = self.home and self.home()
        pool = home and home._pool
        # A returned connection has no ``_pool``; one that the pool discarded is also closed.
        lost = getattr(self, "pgconn", None) and (self._pool is pool or not self.closed)
        if pool and not pool.closed and lost:
            # In another thread, because this one may hold the pool's own locks. In a single call,
            # because Python swallows an exception raised in __del__: the connection would be lost.
            try:  # noqa: SIM105 - suppress() could itself be interrupted
                _thread.start_new_thread(self._replace, (pool,))
            except RuntimeError:  # the interpreter is shutting down
                pass
        else:
            super().__del__(*args)

    def _replace(self, pool: ConnectionPool[Any]) -> None:
        self.close()  # its state is unknown; the pool opens another
        self._pool = pool
        pool.putconn(self)
        self._pool = None


def _let_go(error: BaseException) -> None:
    """Drop the references that the frames of a traceback hold."""
    clear_frames(error.__traceback__)
    gc.collect()  # a cursor that has adapted a list is in a reference cycle with its connection
