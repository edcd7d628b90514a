"""One connection on its way out of a pool and back, wherever an exception may strike meanwhile."""

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
    """One connection from being taken out of a pool to being given back, by one thread."""

    _lender: Pool
    _pool: ConnectionPool[Any]
    conn: Connection | None = None
    _autocommit: bool = True

    def take(self, timeout: float) -> Connection:
        """Get a connection, at READ COMMITTED and in autocommit mode."""
        try:
            conn: Connection = self._pool.getconn(timeout=timeout)
        except BaseException as error:
            # One that the pool had in hand would live as long as the traceback. Let go of, it finds
            # its way back at once: it may be the only one, and a lease is to be given back.
            _let_go(error)
            raise
        self.conn = conn  # nothing can strike between the two: no function is called
        self._lender.has_worked = True
        self._autocommit = conn.autocommit
        if not self._autocommit:
            conn.autocommit = True
        if not isinstance(conn, OwnConnection):  # which is set up like this for good
            set_read_committed(conn)
        return conn

    def give_back(self) -> None:
        """Give the connection back, if that is not done already."""
        conn, loans = self.conn, self._lender._loans
        if conn is None:
            loans.discard(self)
            return
        with suppress(psycopg.Error):  # broken: the pool will see it, too
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
            # Struck in the pool: either it is in there, where another thread may have got hold of
            # it, or nobody has it, and it finds its way back as soon as we let go of it.
            self.conn = conn = None
            loans.discard(self)
            _let_go(error)
            raise
        if closed:
            # Replaced already. The pool leaves ``_pool`` set, so __del__ would take it for lost.
            conn._pool = None
        self.conn = None  # last: on its way it is still ours, in a forked child too
        loans.discard(self)


class OwnConnection(psycopg.Connection[Any]):
    """Finds its way back to the pool.

    An exception out of a signal handler may strike inside the pool, or between its giving a
    connection and our taking it. Nobody would know of the connection then, and the pool would be
    smaller by one for good.
    """

    home: weakref.ref[OwnPool] | None = None

    def __del__(self, *args: Any) -> None:
        home = self.home and self.home()
        pool = home and home._pool
        # One that went back has no ``_pool``, one that the pool has discarded is closed besides.
        lost = getattr(self, "pgconn", None) and (self._pool is pool or not self.closed)
        if pool and not pool.closed and lost:
            # In another thread: this one may be anywhere, the pool's own locks included. And in one
            # call: Python swallows exceptions raised in __del__, and the connection would be lost.
            try:  # noqa: SIM105 - suppress() could itself be interrupted
                _thread.start_new_thread(self._replace, (pool,))
            except RuntimeError:  # at the end of the process
                pass
        else:
            super().__del__(*args)

    def _replace(self, pool: ConnectionPool[Any]) -> None:
        self.close()  # nobody knows in which state it is; the pool opens another
        self._pool = pool
        pool.putconn(self)
        self._pool = None


def _let_go(error: BaseException) -> None:
    """Drop what the frames that an exception has struck refer to."""
    clear_frames(error.__traceback__)
    gc.collect()  # a cursor that has adapted a list is in a cycle, and keeps its connection
