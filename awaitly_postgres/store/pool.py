"""Where connections come from: a pool of the caller's, used as it is, or one of our own.

A `Pool` lends connections, and knows which are lent: a fork, or an exception out of a signal
handler, may strike meanwhile. It lets the driver's errors pass, for `Database` to retry or to
translate, and catches them only where a connection is given up anyway.
"""

from __future__ import annotations

import logging
import os
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from contextlib import suppress
from threading import Lock
from typing import Any, TypeVar

import psycopg
from attrs import define, field
from psycopg.conninfo import conninfo_to_dict
from psycopg_pool import ConnectionPool

from .._checks import check_limit
from ..errors import StoreError
from .connection import (
    Connection,
    parse_conninfo,
    set_read_committed,
    set_up_session,
)
from .loan import Loan, OwnConnection

T = TypeVar("T")

_log = logging.getLogger("awaitly_postgres")

CONNECT_TIMEOUT = 5  # seconds, for one attempt to reach one host
PATIENCE = 2.0  # seconds to wait for the pool before looking what is wrong
_SILENCE = 30  # seconds after which a connection that nothing comes through is given up


@define(eq=False, repr=False)
class Pool(ABC):
    """What lends connections; a subclass says where it has them from."""

    has_worked: bool = field(default=False, init=False)
    _pool: ConnectionPool[Any] | None = field(default=None, init=False)
    _closed: bool = field(default=False, init=False)
    _inherited: bool = field(default=False, init=False)
    _is_known_to_be_small: bool = field(default=False, init=False)
    # No WeakSet: that calls Python code when a loan dies, and there Ctrl-C would be swallowed.
    _loans: set[Loan] = field(factory=set, init=False)

    def __attrs_post_init__(self) -> None:
        _pools.add(self)

    def opened(self) -> ConnectionPool[Any]:
        """Return the pool itself, or raise StoreError where it must not be used."""
        if self._closed:
            raise StoreError("this store is closed; make a new one with postgres()")
        if self._inherited:
            raise StoreError(
                f"the store's pool was opened before this process ({os.getpid()}) was forked and "
                "belongs to its parent; make a pool and a store in the child"
            )
        return self._open()

    @abstractmethod
    def _open(self) -> ConnectionPool[Any]: ...

    def refuse_to_run_here(self) -> None:  # noqa: B027 - most lend anywhere
        """Raise where a run would outlive what the caller is about to roll back."""

    def leave_thread(self) -> None:  # noqa: B027 - most keep nothing for a thread
        """Let go of what is kept for the current thread, which is about to end."""

    def make_room(self, count: int) -> None:
        """See to it that so many threads can have a connection, or say once what to change."""
        most = self.opened().max_size
        if 0 < most < count and not self._is_known_to_be_small:
            self._is_known_to_be_small = True
            _log.warning(
                "the pool has at most %d connections, and %d threads are to share it: they may "
                "wait for each other. Raise its max_size.",
                most,
                count,
            )

    def joined(self, conn: Connection | None) -> Connection | None:
        """Return where to run what may be part of the caller's transaction: ``conn``, if given.

        A pool that knows the caller's transactions refuses one of another database, and finds the
        one to join where none is given. None: on the pool.
        """
        return conn

    def close(self) -> None:
        """Lend nothing any more."""
        self._closed = True

    # -- lending ---------------------------------------------------------------------------

    def lend(self, work: Callable[[Connection], T], timeout: float) -> T:
        """Run ``work`` on a connection in autocommit mode, waiting so many seconds for one.

        No context manager: an exception out of a signal handler may strike after one is entered
        and before its block is, or before it is left.
        """
        loan = self.loan()
        try:
            try:
                return work(loan.take(timeout))
            finally:
                loan.give_back()
        except BaseException:
            loan.give_back()  # in case the exception has struck before or in the line above
            raise

    def loan(self) -> Loan:
        """Return a loan, with which a connection is taken and given back."""
        loan = Loan(self, self.opened())
        self._loans.add(loan)  # before there is anything to lose
        return loan

    def new_connection(self) -> Connection:
        """Connect as the pool does, for what must not wait for a connection of the pool."""
        pool = self.opened()
        conninfo = pool.conninfo() if callable(pool.conninfo) else pool.conninfo
        kwargs = pool.kwargs() if callable(pool.kwargs) else pool.kwargs
        settings = {"connect_timeout": CONNECT_TIMEOUT, **(kwargs or {}), "autocommit": True}
        conn: Connection = psycopg.Connection.connect(conninfo, **settings)
        try:
            # What the pool does to its connections, a role or a search path that it sets.
            if (configure := getattr(pool, "_configure", None)) is not None:
                configure(conn)
            conn.autocommit = True
            set_read_committed(conn)
        except BaseException:
            conn.close()
            raise
        return conn

    # -- trouble ---------------------------------------------------------------------------

    def purge(self) -> None:
        """Close what is broken: one dead connection means that the others probably are too."""
        if self._pool is not None:
            with suppress(psycopg.Error):
                self._pool.check()

    def connect_once(self) -> None:
        """Connect without the pool, which hides from its clients why it cannot."""
        pool = self._pool
        if pool is None or callable(pool.conninfo) or callable(pool.kwargs):
            return
        parse_conninfo(pool.conninfo)
        kwargs = {"connect_timeout": CONNECT_TIMEOUT, **(pool.kwargs or {})}
        psycopg.connect(pool.conninfo, **kwargs).close()

    def scrub(self, text: str) -> str:
        """Take the password out of what the driver says."""
        if self._pool is not None and isinstance(self._pool.conninfo, str):
            with suppress(psycopg.Error):
                if password := conninfo_to_dict(self._pool.conninfo).get("password"):
                    text = text.replace(str(password), "***")
        return text

    # -- fork ------------------------------------------------------------------------------

    def _leave_to_the_parent(self) -> None:
        """In a forked child, let go of what the parent goes on using."""
        # A step that forks leaves the child inside its transaction, which it would roll back, on a
        # connection that is shared. Its descriptor is redirected to /dev/null; the parent has its
        # own.
        for loan in list(self._loans):
            with suppress(OSError, psycopg.Error):
                if loan.conn is not None:
                    nowhere = os.open(os.devnull, os.O_RDWR)
                    os.dup2(nowhere, loan.conn.fileno())
                    os.close(nowhere)
        self._loans = set()
        self.has_worked = False
        self._inherited = self._inherited or (self._pool is not None and not self._pool.closed)


@define(eq=False, repr=False)
class GivenPool(Pool):
    """A pool of the caller's: used as it is, and never closed."""

    _given: ConnectionPool[Any]

    def __attrs_post_init__(self) -> None:
        self._pool = self._given  # there before its first use, and to a child not its own
        super().__attrs_post_init__()

    def _open(self) -> ConnectionPool[Any]:
        return self._given


@define(eq=False, repr=False)
class OwnPool(Pool):
    """A pool that is opened when it is first used, and closed at the end.

    ``conninfo`` may be a function, which is then called at first use.
    """

    _conninfo: str | Callable[[], str]
    _min_size: int = 0
    _max_size: int = 10
    _kwargs: Mapping[str, Any] = field(factory=dict)
    _lock: Lock = field(factory=Lock, init=False)
    _finalizer: weakref.finalize[Any, Any] | None = field(default=None, init=False)

    def __attrs_post_init__(self) -> None:
        if not 0 <= self._min_size <= check_limit(self._max_size, "max_size"):
            raise ValueError(f"min_size must be between 0 and max_size, not {self._min_size!r}")
        super().__attrs_post_init__()

    def opened(self) -> ConnectionPool[Any]:
        """Return the pool, which one of the threads that meet here has made."""
        with self._lock:  # the question whether it is closed included: none is made after that
            return super().opened()

    def _open(self) -> ConnectionPool[Any]:
        if self._pool is None:
            self._pool = self._make()
            # Not a method of self: a finalizer must not keep what it finalizes alive.
            self._finalizer = weakref.finalize(self, _close_pool, self._pool, os.getpid())
        return self._pool

    def _make(self, kind: type[ConnectionPool[Any]] = ConnectionPool) -> ConnectionPool[Any]:
        conninfo = self._conninfo() if callable(self._conninfo) else self._conninfo
        known = parse_conninfo(conninfo)
        defaults = {
            "connect_timeout": CONNECT_TIMEOUT,
            "tcp_user_timeout": _SILENCE * 1000,  # ms: a network that swallows everything
            "keepalives_idle": _SILENCE,
            "client_encoding": "utf8",
            "fallback_application_name": "awaitly_postgres",
        }
        kwargs = {k: v for k, v in defaults.items() if k not in known}
        kwargs |= {**self._kwargs, "autocommit": True}
        home = weakref.ref(self)  # the pool keeps its configuration, and would keep us alive

        def configure(conn: OwnConnection) -> None:
            set_read_committed(conn)
            if "prepare_threshold" not in kwargs:
                set_up_session(conn)
            conn.home = home  # last: one that cannot be set up, the pool replaces by itself

        pool: ConnectionPool[Any] = kind(
            conninfo,
            kwargs=kwargs,
            connection_class=OwnConnection,
            min_size=self._min_size,
            max_size=self._max_size,
            open=False,
            configure=configure,
            # A short one: the pool doubles its pauses and would sleep through a recovery.
            reconnect_timeout=PATIENCE,
        )
        pool.open(wait=False)
        return pool

    def make_room(self, count: int) -> None:
        """Let the pool grow to so many connections; with ``_min_size`` it shrinks again."""
        with self._lock:
            self._max_size = max(self._max_size, count)
            if self._pool is not None and self._finalizer is not None:  # made here, not given
                self._pool.resize(self._min_size, self._max_size)
        super().make_room(count)

    def close(self) -> None:
        """Close the pool, once."""
        with self._lock:  # another thread may be making it
            self._closed = True
            finalizer, self._finalizer = self._finalizer, None
        if finalizer is not None:
            finalizer()  # not under the lock: it waits for the pool's threads

    def _leave_to_the_parent(self) -> None:
        self._lock = Lock()  # the old one may be held by a thread that is not here
        if self._finalizer is not None:  # the pool is ours, and the child opens its own
            _left_to_the_parent.extend([self._pool, self._finalizer])
            self._finalizer.detach()
            self._pool = self._finalizer = None
        super()._leave_to_the_parent()


# -- fork and exit -------------------------------------------------------------------------

_pools: weakref.WeakSet[Pool] = weakref.WeakSet()
_left_to_the_parent: list[object] = []  # referenced for ever: closing them would reach the parent


def _close_pool(pool: ConnectionPool[Any], pid: int) -> None:
    if os.getpid() == pid:
        # An attempt to connect may hang; exit must not. The time is for each of three workers.
        pool.close(timeout=0.5)


def _after_fork_in_child() -> None:
    for pool in list(_pools):
        pool._leave_to_the_parent()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)
