"""Where connections come from: the caller's pool, used as it is, or our own.

A `Pool` lends connections, and keeps track of those that are lent, because a fork or an exception
from a signal handler can happen meanwhile. It does not catch the driver's errors, which `Database`
retries or translates, except where a connection is discarded anyway.
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
PATIENCE = 2.0  # seconds to wait for the pool before finding out what is wrong
_SILENCE = 30  # seconds after which a connection without any traffic is considered lost


@define(eq=False, repr=False)
class Pool(ABC):
    """Lends connections; a subclass says where they come from."""

    migrate: str = field(default="", init=False)  # the command that creates the tables, if any
    has_worked: bool = field(default=False, init=False)
    _pool: ConnectionPool[Any] | None = field(default=None, init=False)
    _closed: bool = field(default=False, init=False)
    _inherited: bool = field(default=False, init=False)
    _is_known_to_be_small: bool = field(default=False, init=False)
    # Not a WeakSet: it runs Python code when a loan is collected, where Ctrl-C would be swallowed.
    _loans: set[Loan] = field(factory=set, init=False)
    # Connections from elsewhere on which a step's transaction is open.
    foreign: set[Connection] = field(factory=set, init=False)

    def __attrs_post_init__(self) -> None:
        _pools.add(self)

    def opened(self) -> ConnectionPool[Any]:
        """Return the psycopg pool; raise StoreError if it must not be used (closed, forked)."""
        if self._closed:
            raise StoreError("this store is closed; create a new one with postgres()")
        if self._inherited:
            raise StoreError(
                f"the store's pool was opened before this process ({os.getpid()}) was forked, and "
                "belongs to its parent; create a pool and a store in the child"
            )
        return self._open()

    @abstractmethod
    def _open(self) -> ConnectionPool[Any]: ...

    def refuse_to_run_here(self) -> None:  # noqa: B027 - only Django's pool refuses
        """Raise inside a transaction whose rollback would undo what recorded steps wrote."""

    def leave_thread(self) -> None:  # noqa: B027 - only Django keeps connections per thread
        """Close the connections of the current thread, which is about to end."""

    def make_room(self, count: int) -> None:
        """Make room for this many threads; log a warning, once, if the pool is too small."""
        most = self.opened().max_size
        if 0 < most < count and not self._is_known_to_be_small:
            self._is_known_to_be_small = True
            _log.warning(
                "the pool has at most %d connections, and %d threads share it: they may wait for "
                "each other. Raise its max_size.",
                most,
                count,
            )

    def joined(self, conn: Connection | None) -> Connection | None:
        """Return the connection whose transaction to join: ``conn``, if given.

        Django's pool raises if ``conn`` is to another database, and without ``conn`` returns the
        connection on which ``atomic()`` is open. None means: use a connection of the pool.
        """
        return conn

    def close(self) -> None:
        """Stop lending connections."""
        self._closed = True

    # -- lending ---------------------------------------------------------------------------

    def lend(self, work: Callable[[Connection], T], timeout: float) -> T:
        """Run ``work`` on a connection in autocommit mode; wait ``timeout`` seconds for one.

        Not a context manager: a signal handler can raise between the return of ``__enter__`` and
        the first line of the block, or before ``__exit__``.
        """
        loan = self.loan()
        try:
            try:
                return work(loan.take(timeout))
            finally:
                loan.give_back()
        except BaseException:
            loan.give_back()  # again: the exception may have been raised in the finally above
            raise

    def loan(self) -> Loan:
        """Return a `Loan`, which takes a connection and gives it back."""
        loan = Loan(self, self.opened())
        self._loans.add(loan)  # before it has a connection that could get lost
        return loan

    def new_connection(self) -> Connection:
        """Connect as the pool does, for work that must not wait for a pooled connection."""
        pool = self.opened()
        conninfo = pool.conninfo() if callable(pool.conninfo) else pool.conninfo
        kwargs = pool.kwargs() if callable(pool.kwargs) else pool.kwargs
        settings = {"connect_timeout": CONNECT_TIMEOUT, **(kwargs or {}), "autocommit": True}
        conn: Connection = psycopg.Connection.connect(conninfo, **settings)
        try:
            # Configure it as the pool configures its connections (a role, a search path).
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
        """Discard broken connections: if one is dead, others probably are too."""
        if self._pool is not None:
            with suppress(psycopg.Error):
                self._pool.check()

    def connect_once(self) -> bool:
        """Connect without the pool, which does not say why it cannot; return whether it was tried.

        A caller's pool may compute its settings for each connection, and then it is not tried.
        """
        pool = self._pool
        if pool is None or callable(pool.conninfo) or callable(pool.kwargs):
            return False
        parse_conninfo(pool.conninfo)
        kwargs = {"connect_timeout": CONNECT_TIMEOUT, **(pool.kwargs or {})}
        psycopg.connect(pool.conninfo, **kwargs).close()
        return True

    def scrub(self, text: str) -> str:
        """Remove the password from a message of the driver."""
        if self._pool is not None and isinstance(self._pool.conninfo, str):
            with suppress(psycopg.Error):
                if password := conninfo_to_dict(self._pool.conninfo).get("password"):
                    text = text.replace(str(password), "***")
        return text

    # -- fork ------------------------------------------------------------------------------

    def _leave_to_the_parent(self) -> None:
        """In a forked child, detach from the connections that the parent keeps using."""
        # If a step forks, the child is inside the step's transaction and would roll it back, on a
        # connection that it shares with the parent. So its copy of the descriptor is redirected to
        # /dev/null; the parent's copy is not affected.
        for conn in [*(loan.conn for loan in list(self._loans)), *self.foreign]:
            with suppress(OSError, psycopg.Error):
                if conn is not None:
                    descriptor = conn.fileno()  # first: it raises if the connection is closed
                    nowhere = os.open(os.devnull, os.O_RDWR)
                    os.dup2(nowhere, descriptor)
                    os.close(nowhere)
        self._loans, self.foreign = set(), set()
        self.has_worked = False
        self._inherited = self._inherited or (self._pool is not None and not self._pool.closed)


@define(eq=False, repr=False)
class GivenPool(Pool):
    """The caller's own pool: used as it is, and never closed."""

    _given: ConnectionPool[Any]

    def __attrs_post_init__(self) -> None:
        self._pool = self._given  # set now, so that a child forked before first use inherits it
        super().__attrs_post_init__()

    def _open(self) -> ConnectionPool[Any]:
        return self._given


@define(eq=False, repr=False)
class OwnPool(Pool):
    """Our own pool: opened on first use, and closed with the store or at exit.

    ``conninfo`` may be a function, which is then called on first use.
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
        """Return the pool; the first thread that gets here creates it."""
        with self._lock:  # includes the check for closed, so that `close` is final
            return super().opened()

    def _open(self) -> ConnectionPool[Any]:
        if self._pool is None:
            self._pool = self._make()
            # Not a method of self: a finalizer must not keep its object alive.
            self._finalizer = weakref.finalize(self, _close_pool, self._pool, os.getpid())
        return self._pool

    def _make(self, kind: type[ConnectionPool[Any]] = ConnectionPool) -> ConnectionPool[Any]:
        conninfo = self._conninfo() if callable(self._conninfo) else self._conninfo
        known = parse_conninfo(conninfo)
        defaults = {
            "connect_timeout": CONNECT_TIMEOUT,
            "tcp_user_timeout": _SILENCE * 1000,  # ms, for a network that drops all packets
            "keepalives_idle": _SILENCE,
            "client_encoding": "utf8",
            "fallback_application_name": "awaitly_postgres",
        }
        kwargs = {k: v for k, v in defaults.items() if k not in known}
        kwargs |= {**self._kwargs, "autocommit": True}
        home = weakref.ref(self)  # weak: the pool keeps `configure`, which would keep us alive

        def configure(conn: OwnConnection) -> None:
            set_read_committed(conn)
            if "prepare_threshold" not in kwargs:
                set_up_session(conn)
            conn.home = home  # last: a connection that fails above is replaced by the pool itself

        pool: ConnectionPool[Any] = kind(
            conninfo,
            kwargs=kwargs,
            connection_class=OwnConnection,
            min_size=self._min_size,
            max_size=self._max_size,
            open=False,
            configure=configure,
            # Short: the pool doubles its pauses, and with a long one would miss a recovery.
            reconnect_timeout=PATIENCE,
        )
        pool.open(wait=False)
        return pool

    def make_room(self, count: int) -> None:
        """Let the pool grow to this many connections; idle ones above ``min_size`` close again."""
        with self._lock:
            self._max_size = max(self._max_size, count)
            if self._pool is not None and self._finalizer is not None:  # our own, not Django's
                self._pool.resize(self._min_size, self._max_size)
        super().make_room(count)

    def close(self) -> None:
        """Close the pool, once."""
        with self._lock:  # another thread may be opening it
            self._closed = True
            finalizer, self._finalizer = self._finalizer, None
        if finalizer is not None:
            finalizer()  # outside the lock, because it waits for the pool's threads

    def _leave_to_the_parent(self) -> None:
        self._lock = Lock()  # the old one may be held by a thread that the child does not have
        if self._finalizer is not None:  # our own pool: the child opens a new one
            _left_to_the_parent.extend([self._pool, self._finalizer])
            self._finalizer.detach()
            self._pool = self._finalizer = None
        super()._leave_to_the_parent()


# -- fork and exit -------------------------------------------------------------------------

_pools: weakref.WeakSet[Pool] = weakref.WeakSet()
_left_to_the_parent: list[object] = []  # never collected: closing them would affect the parent


def _close_pool(pool: ConnectionPool[Any], pid: int) -> None:
    if os.getpid() == pid:
        # A connection attempt may hang, but exit must not. The timeout applies to each of three
        # threads.
        pool.close(timeout=0.5)


def _after_fork_in_child() -> None:
    for pool in list(_pools):
        pool._leave_to_the_parent()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)
