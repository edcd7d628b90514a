"""``postgres()``: a store from a URL, from a pool of yours, or from a server of its own."""

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
    """Make a `SnapshotStore`. Nothing is opened, and no error of the database comes, until its use.

    Args:
        url: a PostgreSQL URL or libpq conninfo; ``"embedded"`` starts a private server from the
            ``[embedded]`` extra, for trying out and for tests.
        pool: a pool of yours instead, used as it is and never closed. Exactly one of the two.
        table: where the snapshots are; the journal is beside it, as ``<table>_steps``.
        lock_table: where the leases are.
        schema: where the tables are (default: as the search path has it).
        prefix: put before every id in the tables, and taken off in what comes back.
        auto_create_table: make missing tables on first use.
        journal: False rewrites the whole snapshot at each step, for tables that Node reads while
            a workflow runs; the third table is then neither needed nor made.
        min_size: connections kept open for good; of the others one closes after ten idle minutes,
            then the next.
        max_size: connections at most.
        kwargs: further arguments of ``psycopg.connect``.
        retry_for: seconds for which a statement that an outage interrupts is tried again.

    Raises:
        ValueError, TypeError: an argument is wrong.

    Example:
        >>> store = postgres("postgresql://localhost/mydb", prefix="orders:")
    """
    _check_source(url, pool)
    if prefix:
        check_id(prefix, "prefix")
    if retry_for < 0:
        raise ValueError(f"retry_for must not be negative, is {retry_for!r}")
    if lock_table in (table, f"{table}_steps"):
        raise ValueError(f"lock_table {lock_table!r} is taken: the snapshots or journal are there")
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
        raise TypeError("give either a url or a pool")
    if url is not None and not isinstance(url, str):
        raise TypeError(f"url must be a string, not {type(url).__name__}")
    if pool is not None and not isinstance(pool, (ConnectionPool, Pool)):
        raise TypeError(f"pool must be a psycopg_pool.ConnectionPool, not {type(pool).__name__}")


def _start_embedded() -> str:
    from .. import embedded  # its extra is imported when it is asked for, and only then

    return embedded.start()
