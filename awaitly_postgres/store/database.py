"""A connection when one is needed, and the only place that catches psycopg's errors.

`Database` runs pieces of work on a pooled connection, or on one of the caller's. On the pool it
makes the tables first, retries what an outage interrupts, and survives a fork. The caller's
connection it uses as it is, with cursors of its own, and leaves unchanged.
"""

from __future__ import annotations

import os
import random
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from threading import Lock
from typing import Any, TypeVar

import psycopg
from attrs import define, field
from psycopg import errors as pg
from psycopg.conninfo import conninfo_to_dict
from psycopg.rows import tuple_row
from psycopg_pool import ConnectionPool, PoolClosed, PoolTimeout, TooManyRequests

from ..errors import AwaitlyError, SchemaMissing, StoreError, StoreUnavailable, WrongType
from .statements import Statements

T = TypeVar("T")
Connection = psycopg.Connection[Any]
Row = tuple[Any, ...]

CONNECT_TIMEOUT = 5  # seconds, for one attempt to reach one host
_PATIENCE = 2.0  # seconds to wait for the pool before looking what is wrong
_SILENCE = 30  # seconds after which a connection that nothing comes through is given up
_DDL_PATIENCE = "5s"  # to wait for others who make the tables

# SQLSTATE classes and codes of what passes by itself: connection lost, transaction rolled back
# (serialization, deadlock), out of resources, shutdown or timeout, lock not available.
_TRANSIENT = ("08", "40", "53", "57", "55P03", "25P03", "25P04")

_NOT_ISOLATED = ("read committed", "read uncommitted")

ROLLBACK = psycopg.Rollback

_MADE_BY_OTHERS = (pg.UniqueViolation, pg.DuplicateTable, pg.DuplicateObject)


def fetch(
    conn: Connection,
    statement: bytes,
    params: Mapping[str, Any],
    *,
    prepare: bool | None = None,
    custom_plan: bool = False,
) -> list[Row]:
    """Run one statement and return its rows, whatever factories and adapters ``conn`` has.

    For a ``custom_plan`` the statement carries its values in itself: of parameters that are sent
    beside it the planner sees nothing when it is told to make one plan for all.
    """
    if custom_plan:
        cursor: psycopg.Cursor[Row] = psycopg.ClientCursor(conn, row_factory=tuple_row)
        cursor.execute(statement, params)
    else:
        cursor = psycopg.Cursor(conn, row_factory=tuple_row)
        cursor.execute(statement, params, prepare=prepare)
    rows = cursor.fetchall()
    if any(isinstance(value, bytes) for value in (rows[0] if rows else ())):
        # An SQL_ASCII database makes no promise about encoding, so psycopg leaves text alone.
        return [tuple(v.decode() if isinstance(v, bytes) else v for v in row) for row in rows]
    return rows


def execute(
    conn: Connection, statement: bytes, params: Mapping[str, Any], *, prepare: bool | None = None
) -> int:
    """Run one statement and return how many rows it changed."""
    cursor = psycopg.Cursor(conn, row_factory=tuple_row)
    cursor.execute(statement, params, prepare=prepare)
    return cursor.rowcount


@define(eq=False)
class Database:
    """Where one store's statements run.

    Exactly one of ``conninfo`` (or a function that returns it) and ``given`` (a pool of the
    caller's) is set. ``retry_for`` is in seconds.
    """

    sql: Statements
    _conninfo: str | Callable[[], str] | None = field(repr=False)
    _given: ConnectionPool[Any] | None
    _auto_create: bool
    _min_size: int
    _max_size: int
    _kwargs: Mapping[str, Any] = field(repr=False)
    retry_for: float
    _pool: ConnectionPool[Any] | None = None
    _lock: Lock = field(factory=Lock, repr=False)
    _closed: bool = False
    _has_worked: bool = False
    _tables_seen: bool = False
    _inherited: bool = False
    _finalizer: weakref.finalize[Any, Any] | None = field(default=None, repr=False)
    # Each connection that is lent, and the thread it is lent to.
    _lent: weakref.WeakKeyDictionary[Connection, int] = field(
        factory=weakref.WeakKeyDictionary, repr=False
    )
    _isolating: weakref.WeakKeyDictionary[Connection, bool] = field(
        factory=weakref.WeakKeyDictionary, repr=False
    )

    def __attrs_post_init__(self) -> None:
        _databases.add(self)

    def run(
        self,
        work: Callable[[Connection], T],
        conn: Connection | None = None,
        *,
        retry_for: float | None = None,
    ) -> T:
        """Run ``work`` on a connection in autocommit mode, or on the caller's ``conn``.

        On the pool it is tried again while the trouble is transient, for ``retry_for`` seconds, so
        it must be idempotent. On ``conn`` it runs once, inside whatever transaction is open.

        Raises:
            StoreUnavailable: no connection lasted. StoreError: the server refused.
        """
        if conn is not None:
            return self._run_on(conn, work)
        started, backoff = time.monotonic(), None
        while True:
            try:
                with self.borrow() as pooled:
                    return work(pooled)
            except (psycopg.Error, UnicodeEncodeError) as error:
                if backoff is None:
                    patience = self.retry_for if retry_for is None else retry_for
                    backoff = _Backoff(started + patience)
                self._pause_or_raise(error, backoff)

    def run_apart(self, work: Callable[[Connection], T]) -> T:
        """Like `run`, on a connection of its own that is closed afterwards."""
        backoff = _Backoff(time.monotonic() + self.retry_for)
        while True:
            try:
                with self.connect() as conn:
                    return work(conn)
            except psycopg.Error as error:
                if not _is_transient(error) or not backoff.pause():
                    raise self._translate(error) from error

    def refuse_to_run_here(self) -> None:
        """Raise where a run would outlive what the caller is about to roll back."""

    def rows(
        self,
        statement: bytes,
        params: Mapping[str, Any],
        conn: Connection | None = None,
        **how: bool,
    ) -> list[Row]:
        """Run one idempotent statement and return its rows, as `fetch` does."""
        return self.run(lambda c: fetch(c, statement, params, **how), conn)

    def count(
        self, statement: bytes, params: Mapping[str, Any], conn: Connection | None = None
    ) -> int:
        """Run one idempotent statement and return how many rows it changed."""
        return self.run(lambda c: execute(c, statement, params), conn)

    def told(self, work: Callable[[Connection], T], conn: Connection | None = None) -> T:
        """Run ``work`` in a transaction of its own, once: the answer survives a lost reply.

        When the reply to the commit is lost, the server is asked what became of the transaction.
        """
        if conn is not None:
            return self._run_on(conn, work)
        done: list[tuple[str, T]] = []  # a transaction and what it told, before its commit

        def in_transaction(conn: Connection) -> T:
            for xid, answer in done:
                if self._has_committed(conn, xid):
                    return answer
            done.clear()
            with conn.transaction():
                answer = work(conn)
                ((xid,),) = fetch(conn, b"SELECT txid_current_if_assigned()::text", {})
                if xid is not None:  # otherwise it has changed nothing
                    done.append((xid, answer))
            return answer

        return self.run(in_transaction)

    def _has_committed(self, conn: Connection, xid: str) -> bool:
        """Wait until the transaction is over; tell whether it was committed."""
        while True:
            ((status,),) = fetch(conn, b"SELECT txid_status(%(xid)s::bigint)", {"xid": xid})
            if status != "in progress":
                return bool(status == "committed")
            time.sleep(0.05)

    @contextmanager
    def transaction(
        self, opener: Callable[[], AbstractContextManager[Connection]] | None = None
    ) -> Iterator[Connection]:
        """Open one transaction, which commits when it closes; only opening it is tried again.

        ``opener`` gives a connection inside a transaction; by default a pooled one. Errors of the
        block and of the commit pass through as they are.
        """
        backoff = _Backoff(time.monotonic() + self.retry_for)
        while True:
            opened = False
            try:
                with (opener or self._transaction)() as conn:
                    opened = True
                    yield conn
                return
            except psycopg.Error as error:
                if opened:
                    raise
                self._pause_or_raise(error, backoff)

    @contextmanager
    def _transaction(self) -> Iterator[Connection]:
        with self.borrow() as conn, conn.transaction():
            if (level := _levels.get(conn)) and conn.isolation_level is None:
                execute(conn, f"SET TRANSACTION ISOLATION LEVEL {level}".encode(), {})
            yield conn

    def isolates(self, conn: Connection) -> bool:
        """Tell whether the transaction on ``conn`` sees the rows as they were when it began.

        It follows from how the connection was set up, so it is asked at most once for each.
        """
        if conn.isolation_level is not None:
            return conn.isolation_level > psycopg.IsolationLevel.READ_COMMITTED
        if (level := _levels.get(conn)) is not None:
            return bool(level)
        if conn not in self._isolating:
            ((level,),) = fetch(conn, b"SELECT current_setting('transaction_isolation')", {})
            self._isolating[conn] = level not in _NOT_ISOLATED
        return self._isolating[conn]

    @contextmanager
    def borrow(self) -> Iterator[Connection]:
        """Lend a pooled connection in autocommit mode, the tables being there."""
        pool = self._open()
        conn = pool.getconn(timeout=min(_PATIENCE, self.retry_for) or _PATIENCE)
        autocommit = True
        try:
            self._has_worked = True
            self._lent[conn] = threading.get_ident()
            autocommit = conn.autocommit
            if not autocommit:
                conn.autocommit = True
            if self._given is not None:
                _set_read_committed(conn)
            if self._auto_create and not self._tables_seen:
                self._create_missing(conn)
                self._tables_seen = True
            yield conn
        finally:
            if not _is_clean(conn):
                _stop(conn)
            else:
                with suppress(psycopg.Error):  # broken
                    if self._given is not None:
                        _set_its_own_level(conn)
                    if not autocommit:
                        conn.autocommit = False
            pool.putconn(conn)
            if self._lent.get(conn) == threading.get_ident():  # not lent to another thread since
                del self._lent[conn]

    def abandon(self, conn: Connection | None) -> None:
        """Close a connection that an interrupt has kept this thread from giving back."""
        if conn is not None and self._lent.get(conn) == threading.get_ident():
            _stop(conn)
            with suppress(ValueError):  # it is on its way back already
                self._open().putconn(conn)
            self._lent.pop(conn, None)

    @contextmanager
    def connect(self) -> Iterator[Connection]:
        """Open a connection of its own, for what must not wait for one of the pool."""
        conn = self.new_connection()
        try:
            yield conn
        finally:
            conn.close()

    def new_connection(self) -> Connection:
        """Connect as the pool does, in autocommit mode."""
        pool = self._open()
        conninfo = pool.conninfo() if callable(pool.conninfo) else pool.conninfo
        kwargs = pool.kwargs() if callable(pool.kwargs) else pool.kwargs
        settings = {"connect_timeout": CONNECT_TIMEOUT, **(kwargs or {}), "autocommit": True}
        conn: Connection = psycopg.Connection.connect(conninfo, **settings)
        try:
            # What the pool does to its connections, a role or a search path that it sets.
            if (configure := getattr(pool, "_configure", None)) is not None:
                configure(conn)
            conn.autocommit = True
            _set_read_committed(conn)
        except BaseException:
            conn.close()
            raise
        return conn

    def create_tables(self) -> None:
        """Make what is missing of the schema, indexes included."""
        self.run(lambda conn: self._create(conn, list(self.sql.ddl)))

    def close(self) -> None:
        """Close the pool if it is ours. The database cannot be used afterwards."""
        with self._lock:
            self._closed = True
            finalizer, self._finalizer = self._finalizer, None
        if finalizer is not None:
            finalizer()

    def _disconnect_child(self) -> None:
        """In a forked child, keep the parent's sockets from being written to.

        A step that forks leaves the child inside its transaction, which the child would roll back,
        on the connection it shares. Its descriptor then leads to nowhere; the parent's is another.
        """
        for conn in list(self._lent):
            with suppress(OSError, psycopg.Error):
                nowhere = os.open(os.devnull, os.O_RDWR)
                os.dup2(nowhere, conn.fileno())
                os.close(nowhere)
        self._lent = weakref.WeakKeyDictionary()

    # -- opening ---------------------------------------------------------------------------

    def _open(self) -> ConnectionPool[Any]:
        if self._closed:
            raise StoreError("this store is closed; make a new one with postgres()")
        if self._inherited:
            raise StoreError(
                f"the store's pool was opened before this process ({os.getpid()}) was forked and "
                "belongs to its parent; make a pool and a store in the child"
            )
        if self._given is not None:
            return self._given
        with self._lock:
            if self._pool is None:
                self._pool = self._make_pool()
                # Not a method of self: a finalizer must not keep what it finalizes alive.
                self._finalizer = weakref.finalize(self, _close_pool, self._pool, os.getpid())
            return self._pool

    def _make_pool(self) -> ConnectionPool[Any]:
        conninfo = self._conninfo() if callable(self._conninfo) else self._conninfo
        known = _parse(conninfo or "")
        defaults = {
            "connect_timeout": CONNECT_TIMEOUT,
            "tcp_user_timeout": _SILENCE * 1000,  # ms: a network that swallows everything
            "keepalives_idle": _SILENCE,
            "client_encoding": "utf8",
            "fallback_application_name": "awaitly_postgres",
        }
        kwargs = {k: v for k, v in defaults.items() if k not in known}
        kwargs |= {**self._kwargs, "autocommit": True}
        home = weakref.ref(self)

        def configure(conn: _PooledConnection) -> None:
            conn.home = home
            _set_read_committed(conn)
            if "prepare_threshold" not in kwargs:
                _set_up_prepared_statements(conn)

        pool: ConnectionPool[Any] = ConnectionPool(
            conninfo or "",
            kwargs=kwargs,
            connection_class=_PooledConnection,
            min_size=self._min_size,
            max_size=self._max_size,
            open=False,
            configure=configure,
            # A short one: the pool doubles its pauses and would sleep through a recovery.
            reconnect_timeout=_PATIENCE,
        )
        pool.open(wait=False)
        return pool

    # -- trouble ---------------------------------------------------------------------------

    @contextmanager
    def tolerating_outages(self) -> Iterator[None]:
        """Let errors of the driver and of ours pass by, for work that is tried again anyway."""
        with suppress(psycopg.Error, AwaitlyError):
            yield

    def translated(self, error: BaseException) -> AwaitlyError:
        """Return ours for an error of the driver, or one that was made of it."""
        return self._translate(driver_error(error) or StoreError(str(error)))

    def recover(self, error: BaseException) -> None:
        """Clear away what the loss of a connection has broken."""
        if (lost := driver_error(error)) is not None:
            self._recover(lost)

    def _pause_or_raise(self, error: Exception, backoff: _Backoff) -> None:
        if not self._recover(error) or not backoff.pause():
            raise self._translate(error) from error

    def _recover(self, error: Exception) -> bool:
        """Tell whether trying again makes sense, having cleared away what is broken."""
        if isinstance(error, pg.UndefinedTable) and self._auto_create:
            self._tables_seen = False  # somebody dropped them: look again, as other threads may too
            return True
        if isinstance(error, PoolTimeout) and not self._has_worked:
            self._connect_once()
            return True
        if not _is_transient(error):
            return False
        pool = self._given or self._pool
        if pool is not None and not isinstance(error, PoolTimeout):
            # One dead connection means that its sisters are dead too: purge them all.
            with suppress(psycopg.Error):
                pool.check()
        return True

    def _connect_once(self) -> None:
        """Connect without the pool, which hides from its clients why it cannot."""
        pool = self._given or self._pool
        if pool is None or callable(pool.conninfo) or callable(pool.kwargs):
            return
        _parse(pool.conninfo)
        kwargs = {"connect_timeout": CONNECT_TIMEOUT, **(pool.kwargs or {})}
        try:
            psycopg.connect(pool.conninfo, **kwargs).close()
        except psycopg.Error as error:
            raise self._translate(error) from error

    def _translate(self, error: Exception) -> AwaitlyError:
        if isinstance(error, UnicodeEncodeError):
            return StoreError(
                f"the connection's client encoding cannot carry this text ({error}); "
                "connect with client_encoding=utf8"
            )
        state = getattr(error, "sqlstate", None)
        diag = getattr(error, "diag", None)
        detail = (diag.message_primary if diag else None) or str(error)
        if isinstance(error, (pg.UndefinedTable, pg.InvalidSchemaName)):
            return SchemaMissing(f"a table or schema is missing ({detail}).", self.ddl())
        if isinstance(error, PoolTimeout):
            return StoreUnavailable(
                f"no connection to PostgreSQL within {self.retry_for:g} s: the server is not "
                "reachable, or every pooled connection is busy (raise max_size)"
            )
        if isinstance(error, PoolClosed):
            return StoreError("the store's pool is closed, or was never opened; open it first")
        if state is None and isinstance(error, psycopg.OperationalError):
            return StoreUnavailable(f"no connection to PostgreSQL: {self._scrub(detail)}")
        if _is_transient(error):
            return StoreUnavailable(f"PostgreSQL is not available: {detail} (SQLSTATE {state})")
        return StoreError(f"PostgreSQL refused the statement: {detail} (SQLSTATE {state})")

    def _scrub(self, text: str) -> str:
        pool = self._given or self._pool
        if pool is not None and isinstance(pool.conninfo, str):
            with suppress(psycopg.Error):
                if password := conninfo_to_dict(pool.conninfo).get("password"):
                    text = text.replace(str(password), "***")
        return text

    def _run_on(self, conn: Connection, work: Callable[[Connection], T]) -> T:
        if not isinstance(conn, psycopg.Connection):
            raise WrongType(f"conn must be a psycopg.Connection, not {type(conn).__name__}")
        try:
            if self._auto_create and not self._tables_seen:
                # Tables that this very transaction has made may yet be rolled back.
                self._tables_seen = self._create_missing(conn)
            return work(conn)
        except (psycopg.Error, UnicodeEncodeError) as error:
            if isinstance(error, pg.UndefinedTable):
                self._tables_seen = False
            raise self._translate(error) from error

    # -- tables ----------------------------------------------------------------------------

    def ddl(self) -> str:
        """Return the statements that make the schema."""
        return "".join(self.sql.ddl.values())

    def _missing(self, conn: Connection) -> tuple[list[str], bool]:
        """Return the tables that are missing, and whether what is there is there for good."""
        names = [name for name in self.sql.ddl if name]
        found = fetch(conn, self.sql.tables_exist, {"tables": list(self.sql.regclasses.values())})
        missing = [name for name, row in zip(names, found, strict=True) if not row[1]]
        return missing, not missing and all(row[2] for row in found)

    def _create_missing(self, conn: Connection) -> bool:
        missing, for_good = self._missing(conn)
        if missing:
            self._create(conn, ["", *missing] if "" in self.sql.ddl else missing)
        return for_good

    def _create(self, conn: Connection, names: Sequence[str]) -> None:
        """Make these tables. Bare IF NOT EXISTS races in the system catalogs, hence the lock."""
        try:
            with conn.transaction():
                self._serialize_ddl(conn)
                for name in names:
                    if name or not fetch(conn, self.sql.schema_exists, {}):
                        for statement in self.sql.ddl[name].split(";\n"):
                            if statement:
                                execute(conn, statement.encode(), {})
        except (pg.InsufficientPrivilege, pg.ReadOnlySqlTransaction, *_MADE_BY_OTHERS) as error:
            if not self._missing(conn)[0]:
                return
            raise SchemaMissing(
                f"the tables are missing and cannot be made here ({error.diag.message_primary}).",
                self.ddl(),
            ) from error

    def _serialize_ddl(self, conn: Connection) -> None:
        """Wait for others who make the tables, but not for ever.

        One of them may be a transaction of the caller's that is open until this very call returns.
        """
        ((before,),) = fetch(conn, b"SELECT current_setting('lock_timeout')", {})
        set_timeout = b"SELECT set_config('lock_timeout', %(value)s, true)"
        fetch(conn, set_timeout, {"value": _DDL_PATIENCE})
        fetch(conn, self.sql.serialize_ddl, {"name": ",".join(self.sql.regclasses.values())})
        fetch(conn, set_timeout, {"value": before})


@define
class _Backoff:
    """Pauses between tries: none after the first failure, then longer and out of step."""

    _give_up_at: float  # by the monotonic clock
    _delay: float = 0.0

    def pause(self) -> bool:
        """Sleep, or return False if time is up."""
        if time.monotonic() + self._delay >= self._give_up_at:
            return False
        time.sleep(self._delay * random.uniform(0.5, 1.0))  # noqa: S311 - jitter, no secret
        self._delay = min(max(0.05, self._delay * 2), 1.0)
        return True


def _parse(conninfo: str) -> dict[str, Any]:
    """Take a connection string apart; no error repeats it, and with it the password."""
    try:
        known = conninfo_to_dict(conninfo)
    except psycopg.Error:
        known = None
    # Left unescaped, an @ or / of the password makes its rest pass for the host or the port.
    if (
        known is None
        or any(host.find("@") > 0 for host in str(known.get("host", "")).split(","))
        or not set(str(known.get("port", ""))) <= set("0123456789,")
    ):
        raise StoreError(
            "the connection string is malformed; expected "
            "'postgresql://user:password@host:port/dbname', special characters of the password "
            "percent-encoded, or 'host=... dbname=...'"
        )
    return known


def _is_transient(error: Exception) -> bool:
    if isinstance(error, (PoolTimeout, TooManyRequests)):
        return True
    if isinstance(error, PoolClosed) or not isinstance(error, psycopg.Error):
        return False
    if error.sqlstate is None:
        return isinstance(error, psycopg.OperationalError)  # the connection went away
    return error.sqlstate.startswith(_TRANSIENT)


def driver_error(error: BaseException) -> psycopg.Error | None:
    """Return psycopg's error that ``error`` is, or was made from as Django does."""
    for candidate in (error, error.__cause__):
        if isinstance(candidate, psycopg.Error):
            return candidate
    return None


def _is_clean(conn: Connection) -> bool:
    status = conn.pgconn.transaction_status
    if status == psycopg.pq.TransactionStatus.UNKNOWN:
        return True  # closed: the pool sees to it
    nested = getattr(conn, "_num_transactions", 0)
    return status == psycopg.pq.TransactionStatus.IDLE and not nested


def _stop(conn: Connection) -> None:
    """Close a connection in whose use an exception out of a signal handler has struck.

    It is in the middle of a statement, or of psycopg's book-keeping. What the server is doing is
    stopped first, lest it be done after what follows here.
    """
    with suppress(psycopg.Error):
        conn.cancel_safe(timeout=_PATIENCE)
    conn.close()


class _PooledConnection(psycopg.Connection[Any]):
    """Finds its way back to the pool.

    An exception out of a signal handler may strike inside the pool, or between its giving a
    connection and our taking it. Nobody would know of the connection then, and the pool would be
    smaller by one for good.
    """

    home: weakref.ref[Database] | None = None

    def __del__(self, *args: Any) -> None:
        database = self.home and self.home()
        pool = database and database._pool
        # One that went back has no ``_pool``, one that the pool has discarded is closed besides.
        lost = getattr(self, "pgconn", None) and (self._pool is pool or not self.closed)
        if pool and not pool.closed and lost:
            self.close()  # nobody knows in which state it is; the pool replaces it
            self._pool = pool
            # In another thread: this one may be anywhere, the pool's own locks included.
            with suppress(RuntimeError):  # at the end of the process
                threading.Thread(target=pool.putconn, args=(self,), daemon=True).start()
        else:
            super().__del__(*args)


# The default isolation of a pool's connections: empty up to READ COMMITTED, None behind a pooler.
_levels: weakref.WeakKeyDictionary[Connection, str | None] = weakref.WeakKeyDictionary()


def _set_read_committed(conn: Connection) -> None:
    """Have our statements run at READ COMMITTED, whatever the server's or the pool's default is.

    They are made for it. As SERIALIZABLE ones, they would besides make long transactions of the
    user's fail that have only read what happens to be beside. A session behind a pooler, which
    answers with a process id of its own making, is not ours to change.
    """
    if conn not in _levels:
        rows = fetch(
            conn,
            b"SELECT current_setting('default_transaction_isolation') "
            b"WHERE pg_backend_pid() = %(pid)s",
            {"pid": conn.info.backend_pid},
        )
        level = str(rows[0][0]) if rows else None
        _levels[conn] = "" if level in _NOT_ISOLATED else level
    if _levels[conn]:
        _set_level(conn, "read committed")


def _set_its_own_level(conn: Connection) -> None:
    if level := _levels.get(conn):
        _set_level(conn, level)


def _set_level(conn: Connection, level: str) -> None:
    statement = b"SELECT set_config('default_transaction_isolation', %(level)s, false)"
    fetch(conn, statement, {"level": level})


def _set_up_prepared_statements(conn: Connection) -> None:
    """Have statements planned once; behind PgBouncer, have none prepared.

    There the next one to use the server connection would find ours under its names. A pooler
    answers with a process id of its own making.
    """
    direct = fetch(
        conn,
        b"SELECT set_config('plan_cache_mode', 'force_generic_plan', false) "
        b"WHERE pg_backend_pid() = %(pid)s",
        {"pid": conn.info.backend_pid},
    )
    if not direct:
        conn.prepare_threshold = None


# -- fork and exit -------------------------------------------------------------------------

_databases: weakref.WeakSet[Database] = weakref.WeakSet()
_left_to_the_parent: list[object] = []  # referenced for ever: closing them would reach the parent


def _close_pool(pool: ConnectionPool[Any], pid: int) -> None:
    if os.getpid() == pid:
        # An attempt to connect may hang; exit must not. The time is for each of three workers.
        pool.close(timeout=0.5)


def _after_fork_in_child() -> None:
    for database in list(_databases):
        database._disconnect_child()
        database._lock = Lock()  # the old one may be held by a thread that is not here
        _left_to_the_parent.extend([database._pool, database._finalizer])
        if database._finalizer is not None:
            database._finalizer.detach()
        database._pool = database._finalizer = None
        database._has_worked = False
        given = database._given
        database._inherited = database._inherited or (given is not None and not given.closed)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)
