"""One connection: running a statement on it, and the settings of its session.

A connection of the caller's pool is used as it is: it may have its own row factories and adapters,
and whatever is changed in its session is restored.
"""

from __future__ import annotations

import time
import weakref
from collections.abc import Mapping
from selectors import EVENT_READ, DefaultSelector
from typing import Any

import psycopg
from psycopg.conninfo import conninfo_to_dict
from psycopg.pq import TransactionStatus
from psycopg.rows import tuple_row

from ..errors import StoreError

Connection = psycopg.Connection[Any]
Row = tuple[Any, ...]

_STOP_TIMEOUT = 2.0  # seconds for a statement to end
_NOT_ISOLATED = ("read committed", "read uncommitted")

# What the server reported about a session. Both follow from how the connection was set up, so each
# is queried once; two threads that query at the same time get the same answer.
# The default isolation of a pool's connections: empty up to READ COMMITTED, None behind a pooler.
_default_levels: weakref.WeakKeyDictionary[Connection, str | None] = weakref.WeakKeyDictionary()
# Whether a transaction on a connection of another kind, Django's for example, is isolated.
_isolated: weakref.WeakKeyDictionary[Connection, bool] = weakref.WeakKeyDictionary()


def fetch(
    conn: Connection,
    statement: bytes,
    params: Mapping[str, Any],
    *,
    prepare: bool | None = None,
    custom_plan: bool = False,
) -> list[Row]:
    """Run one statement and return its rows, whatever factories and adapters ``conn`` has.

    For a ``custom_plan`` the values become part of the statement, because with
    ``plan_cache_mode=force_generic_plan`` the planner ignores the values of parameters.
    """
    if custom_plan:
        cursor: psycopg.Cursor[Row] = psycopg.ClientCursor(conn, row_factory=tuple_row)
        cursor.execute(statement, params)
    else:
        cursor = psycopg.Cursor(conn, row_factory=tuple_row)
        cursor.execute(statement, params, prepare=prepare)
    rows = cursor.fetchall()
    if any(isinstance(value, bytes) for value in (rows[0] if rows else ())):
        # An SQL_ASCII database has no known encoding, so psycopg returns text as bytes.
        return [tuple(v.decode() if isinstance(v, bytes) else v for v in row) for row in rows]
    return rows


def execute(
    conn: Connection, statement: bytes, params: Mapping[str, Any], *, prepare: bool | None = None
) -> int:
    """Run one statement and return how many rows it changed."""
    cursor = psycopg.Cursor(conn, row_factory=tuple_row)
    cursor.execute(statement, params, prepare=prepare)
    return cursor.rowcount


def parse_conninfo(conninfo: str) -> dict[str, Any]:
    """Parse a connection string. No error repeats it, because it contains the password."""
    try:
        known = conninfo_to_dict(conninfo)
    except psycopg.Error:
        known = None
    # After an unescaped @ or /, the rest of the password would be taken for the host or the port.
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


# -- stopping --------------------------------------------------------------------------------


def is_clean(conn: Connection) -> bool:
    """Return whether no transaction is open, neither on the server nor in psycopg's bookkeeping."""
    status = conn.pgconn.transaction_status
    if status == TransactionStatus.UNKNOWN:
        return True  # closed: the pool replaces it
    return status == TransactionStatus.IDLE and not getattr(conn, "_num_transactions", 0)


def stop(conn: Connection) -> None:
    """Close a connection whose use was interrupted by an exception from a signal handler.

    It was in the middle of a statement, or of psycopg's bookkeeping. First let the server finish or
    cancel the statement: otherwise it could take effect later, for example acquire a lease that has
    already been released.
    """
    pg, give_up_at = conn.pgconn, time.monotonic() + _STOP_TIMEOUT
    try:
        with DefaultSelector() as selector:
            selector.register(pg.socket, EVENT_READ)
            while pg.transaction_status == TransactionStatus.ACTIVE:
                if (left := give_up_at - time.monotonic()) <= 0:
                    break
                conn.cancel_safe(timeout=left)  # repeated: no effect until the statement has begun
                selector.select(0.1)
                pg.consume_input()
                while not pg.is_busy() and pg.get_result() is not None:
                    pass
    finally:
        conn.close()


# -- isolation -----------------------------------------------------------------------------


def set_read_committed(conn: Connection) -> None:
    """Run our statements at READ COMMITTED, whatever the default of the server or the pool is.

    They are written for that level. At SERIALIZABLE they could also abort the user's long
    transactions that have merely read neighbouring rows. A session behind a pooler, which reports
    a made-up process id, is not ours to change.
    """
    if conn not in _default_levels:
        rows = fetch(
            conn,
            b"SELECT current_setting('default_transaction_isolation') "
            b"WHERE pg_backend_pid() = %(pid)s",
            {"pid": conn.info.backend_pid},
        )
        level = str(rows[0][0]) if rows else None
        _default_levels[conn] = "" if level in _NOT_ISOLATED else level
    if _default_levels[conn]:
        _set_default_level(conn, "read committed")


def set_own_default_level(conn: Connection) -> None:
    """Undo `set_read_committed`, before a borrowed connection is returned."""
    if level := _default_levels.get(conn):
        _set_default_level(conn, level)


def set_own_level(conn: Connection) -> None:
    """Set the isolation level that the user configured, on a transaction that has just begun."""
    if (level := _default_levels.get(conn)) and conn.isolation_level is None:
        execute(conn, f"SET TRANSACTION ISOLATION LEVEL {level}".encode(), {})


def is_isolated(conn: Connection) -> bool:
    """Return whether the transaction on ``conn`` sees the rows as they were when it began."""
    if conn.isolation_level is not None:
        return conn.isolation_level > psycopg.IsolationLevel.READ_COMMITTED
    if (level := _default_levels.get(conn)) is not None:
        return bool(level)
    if conn not in _isolated:
        ((level,),) = fetch(conn, b"SELECT current_setting('transaction_isolation')", {})
        _isolated[conn] = level not in _NOT_ISOLATED
    return _isolated[conn]


def _set_default_level(conn: Connection, level: str) -> None:
    statement = b"SELECT set_config('default_transaction_isolation', %(level)s, false)"
    fetch(conn, statement, {"level": level})


# -- our own sessions ----------------------------------------------------------------------


def set_up_session(conn: Connection) -> None:
    """Use generic plans, and have the server notice lost clients; behind PgBouncer, neither.

    By default, a server needs two hours to notice that a client has disappeared in the middle of a
    transaction (dropped packets, a power cut). Until then it keeps the locks on the rows of the
    run, and with them the lease. With these keepalives it takes two minutes.

    Behind PgBouncer no statement may be prepared: the next client of the server connection would
    find our statements under its own names. A pooler is recognized by its made-up process id. Citus
    finds the shard of a row by its id, so no generic plan fits all ids.
    """
    direct = fetch(
        conn,
        b"SELECT set_config('plan_cache_mode', CASE WHEN EXISTS "
        b"(SELECT FROM pg_extension WHERE extname = 'citus') THEN 'auto' "
        b"ELSE 'force_generic_plan' END, false), "
        b"set_config('tcp_keepalives_idle', '30', false), "
        b"set_config('tcp_keepalives_interval', '10', false) "
        b"WHERE pg_backend_pid() = %(pid)s",
        {"pid": conn.info.backend_pid},
    )
    if not direct:
        conn.prepare_threshold = None
