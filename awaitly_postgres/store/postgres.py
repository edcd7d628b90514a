"""``postgres()``: creates a store from a URL, from your own pool, or on a private server."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from psycopg_pool import ConnectionPool

from .._checks import check_id, check_name
from .database import Database
from .pool import GivenPool, OwnPool, Pool
from .statements import compose
from .store import SnapshotStore


def postgres(
    url: str | None = None,
    *,
    pool: ConnectionPool[Any] | Pool | None = None,
    table: str = "awaitly_snapshots",
    lock_table: str = "awaitly_workflow_lock",
    schema: str | None = None,
    prefix: str = "",
    auto_create_table: bool = True,
    journal: bool = True,
    min_size: int = 0,
    max_size: int = 10,
    kwargs: Mapping[str, Any] | None = None,
    retry_for: float = 30.0,
) -> SnapshotStore:
    """Create a `SnapshotStore`. It connects on first use, so only then can the database fail.

    Args:
        url: a PostgreSQL URL or libpq conninfo; ``"embedded"`` starts a private server from the
            ``[embedded]`` extra, for development and tests.
        pool: your own pool instead, used as it is and never closed. Give either this or ``url``.
        table: the table of the snapshots; the journal is ``<table>_steps``.
        lock_table: the table of the leases.
        schema: the schema of the tables (default: the search path decides).
        prefix: prepended to every id in the tables, and removed from ids that are returned.
        auto_create_table: create missing tables on first use.
        journal: False rewrites the whole snapshot at each step, for tables that Node reads while
            a workflow runs; the journal table is then neither needed nor created.
        min_size: connections that stay open while idle; others close after ten idle minutes, one
            at a time.
        max_size: connections at most.
        kwargs: further arguments of ``psycopg.connect``.
        retry_for: seconds for which a statement is retried during an outage.

    Raises:
        ValueError, TypeError: an argument is wrong.

    Example:
        >>> store = postgres("postgresql://localhost/mydb", prefix="orders:")
    """
    _check_source(url, pool)
    if prefix != "":
        check_id(prefix, "prefix")
    if retry_for < 0:
        raise ValueError(f"retry_for must be 0 or more seconds, not {retry_for!r}")
    if lock_table in (table, f"{table}_steps"):
        raise ValueError(f"lock_table {lock_table!r} is another table already; choose another")
    sql = compose(
        check_name(table, "table"),
        check_name(lock_table, "lock_table"),
        None if schema is None else check_name(schema, "schema"),
        journal=journal,
    )
    if isinstance(pool, ConnectionPool):
        pool = GivenPool(pool)
    elif pool is None:
        conninfo = _start_embedded if url == "embedded" else url or ""
        pool = OwnPool(conninfo, min_size, max_size, dict(kwargs or {}))
    return SnapshotStore(Database(sql, pool, auto_create_table, float(retry_for)), prefix)


def _check_source(url: object, pool: object) -> None:
    if (url is None) == (pool is None):
        raise TypeError("postgres() takes either a url or a pool=, not both and not neither")
    if url is not None and not isinstance(url, str):
        raise TypeError(f"url must be a string, not {type(url).__name__}")
    if pool is not None and not isinstance(pool, (ConnectionPool, Pool)):
        raise TypeError(f"pool must be a psycopg_pool.ConnectionPool, not {type(pool).__name__}")


def _start_embedded() -> str:
    from .. import embedded  # imports its extra, so only when it is needed

    return embedded.start()
