"""Runs statements: retries them during an outage, and creates the tables on first use.

`Database` runs work on a connection of its pool, or on the caller's connection. On the pool it
creates the tables first, and retries during an outage. The caller's connection is used as it is and
left unchanged. The driver's errors are translated here, except those of a step's transaction, which
belong to the user.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

import psycopg
from attrs import define
from psycopg import errors as pg
from psycopg_pool import PoolClosed, PoolTimeout

from ..errors import AwaitlyError, SchemaMissing, StoreError, StoreUnavailable, WrongType
from .connection import (
    Connection,
    Row,
    execute,
    fetch,
)
from .driver_errors import is_transient
from .pool import PATIENCE, Pool
from .statements import Statements

__all__ = ["ROLLBACK", "Connection", "Database", "Row", "execute", "fetch"]

T = TypeVar("T")

_DDL_PATIENCE = "5s"  # to wait for other sessions that create the tables

ROLLBACK = psycopg.Rollback

_MADE_BY_OTHERS = (pg.UniqueViolation, pg.DuplicateTable, pg.DuplicateObject)


@define(eq=False, repr=False)
class Database:
    """Runs the statements of one store.

    ``retry_for`` is the number of seconds for which a statement is retried during an outage.
    """

    sql: Statements
    pool: Pool
    _auto_create: bool
    retry_for: float
    isolates: bool = False  # a step's transaction was above READ COMMITTED
    _tables_seen: bool = False

    def run(
        self,
        work: Callable[[Connection], T],
        conn: Connection | None = None,
        *,
        retry_for: float | None = None,
    ) -> T:
        """Run ``work`` on a connection in autocommit mode, or on the caller's ``conn``.

        On the pool it is retried after transient errors, for ``retry_for`` seconds, so it must be
        idempotent. On ``conn`` it runs once, inside whatever transaction is open.

        Raises:
            StoreUnavailable: no connection lasted. StoreError: the server refused.
        """
        if conn is not None:
            return self._run_on(conn, work)
        started, backoff = time.monotonic(), None
        while True:
            try:
                return self._lend(work)
            except (psycopg.Error, UnicodeEncodeError) as error:
                if backoff is None:
                    patience = self.retry_for if retry_for is None else retry_for
                    backoff = Backoff(started + patience)
                self.pause_or_raise(error, backoff, explain=retry_for is None)

    def run_apart(self, work: Callable[[Connection], T]) -> T:
        """Like `run`, on a separate connection that is closed afterwards."""
        backoff = Backoff(time.monotonic() + self.retry_for)
        while True:
            try:
                conn = self.pool.new_connection()
                try:
                    return work(conn)
                finally:
                    conn.close()
            except psycopg.Error as error:
                if not is_transient(error) or not backoff.pause():
                    raise self.translate(error) from error

    def answers(self) -> bool:
        """Return whether the database can be reached, after an outage that may be over."""
        with suppress(StoreError):
            return bool(self.run(lambda c: fetch(c, b"SELECT 1", {}), retry_for=PATIENCE))
        return False

    def joined(self, conn: Connection | None) -> Connection | None:
        """Return the connection whose transaction to join, or None; see `Pool.joined`."""
        return self.pool.joined(conn)

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

    def run_once(self, work: Callable[[Connection], T], conn: Connection | None = None) -> T:
        """Run ``work`` exactly once, in its own transaction: the result survives a lost reply.

        When the reply to the commit is lost, the server is asked for the transaction's outcome. On
        ``conn`` it joins the transaction that is open there.
        """
        if conn is not None:
            return self._run_on(conn, lambda c: _at_once(c, work))
        done: list[tuple[str, T]] = []  # a transaction id and its result, before the commit

        def in_transaction(conn: Connection) -> T:
            for xid, answer in done:
                if self._has_committed(conn, xid):
                    return answer
            done.clear()
            with conn.transaction():
                answer = work(conn)
                ((xid,),) = fetch(conn, b"SELECT txid_current_if_assigned()::text", {})
                if xid is not None:  # otherwise it changed nothing
                    done.append((xid, answer))
            return answer

        return self.run(in_transaction)

    def _has_committed(self, conn: Connection, xid: str) -> bool:
        """Wait until the transaction has ended; return whether it was committed.

        Not for ever: a server that has not noticed the lost connection keeps it open.
        """
        backoff = Backoff(time.monotonic() + self.retry_for)
        while True:
            ((status,),) = fetch(conn, b"SELECT txid_status(%(xid)s::bigint)", {"xid": xid})
            if status != "in progress":
                return bool(status == "committed")
            if not backoff.pause():
                raise StoreUnavailable(
                    "the connection was lost during a commit, and after "
                    f"{self.retry_for:g} s its outcome is still unknown; check what is stored "
                    "before you repeat the call"
                )

    def _lend(self, work: Callable[[Connection], T]) -> T:
        def with_tables(conn: Connection) -> T:
            self.make_tables_at_first(conn)
            return work(conn)

        return self.pool.lend(work if self._tables_seen else with_tables, self.patience)

    @property
    def patience(self) -> float:
        """Seconds to wait for a pooled connection before finding out what is wrong."""
        return min(PATIENCE, self.retry_for) or PATIENCE

    def create_tables(self) -> None:
        """Create the tables and indexes that are missing."""
        self.run(lambda conn: self._create(conn, list(self.sql.ddl)))

    def close(self) -> None:
        """Close the pool if it is ours. The database cannot be used afterwards."""
        self.pool.close()

    # -- trouble ---------------------------------------------------------------------------

    @contextmanager
    def suppressing_errors(self) -> Iterator[None]:
        """Suppress errors of the driver and of this package, for work that is retried anyway."""
        with suppress(psycopg.Error, AwaitlyError):
            yield

    def pause_or_raise(self, error: Exception, backoff: Backoff, *, explain: bool = True) -> None:
        """Pause before the next try; raise our own error if retrying is useless or time is up.

        Without ``explain`` it takes no time to find out why the pool lends no connection.
        """
        if not self.recover(error) or not backoff.pause():
            if isinstance(error, PoolTimeout) and not explain:
                raise StoreUnavailable("no connection to PostgreSQL in time") from error
            raise self.translate(error) from error

    def recover(self, error: Exception) -> bool:
        """Discard broken connections; return whether retrying makes sense."""
        if isinstance(error, pg.UndefinedTable) and self._auto_create:
            self._tables_seen = False  # somebody dropped them: the retry creates them again
            return True
        if isinstance(error, PoolTimeout) and not self.pool.has_worked:
            try:
                self.pool.connect_once()
            except psycopg.Error as reason:
                raise self.translate(reason) from reason
            return True
        if not is_transient(error):
            return False
        if not isinstance(error, PoolTimeout):
            self.pool.purge()
        return True

    def translate(self, error: Exception) -> AwaitlyError:
        """Return our own error for an error of the driver."""
        if isinstance(error, UnicodeEncodeError):
            return StoreError(
                f"the connection's client encoding cannot carry this text ({error}); "
                "connect with client_encoding=utf8"
            )
        state = getattr(error, "sqlstate", None)
        diag = getattr(error, "diag", None)
        detail = (diag.message_primary if diag else None) or str(error)
        if isinstance(error, (pg.UndefinedTable, pg.InvalidSchemaName)):
            return self._schema_missing(f"a table or schema is missing ({detail}).")
        if isinstance(error, PoolTimeout):
            return self._why_there_is_no_connection()
        if isinstance(error, PoolClosed):
            return StoreError("the store's pool is closed, or was never opened; open it first")
        if state is None and isinstance(error, psycopg.OperationalError):
            return StoreUnavailable(f"no connection to PostgreSQL: {self.pool.scrub(detail)}")
        if is_transient(error):
            return StoreUnavailable(
                f"PostgreSQL is not available: {detail} (SQLSTATE {state}). Try again later."
            )
        refusal = f"PostgreSQL refused the statement: {detail} (SQLSTATE {state})"
        if isinstance(error, pg.ReadOnlySqlTransaction):
            refusal += (
                ". This server is read-only, perhaps a standby: connect to the primary, e.g. with "
                "target_session_attrs=read-write."
            )
        return StoreError(refusal)

    def _why_there_is_no_connection(self) -> AwaitlyError:
        """Return the error for a pool that lends no connection, which does not say why."""
        reason = "the server is not reachable, or every pooled connection is busy"
        try:
            if self.pool.connect_once():
                reason = "the server answers, but every pooled connection is busy"
        except psycopg.Error as refused:
            return self.translate(refused)
        except AwaitlyError as malformed:
            return malformed
        return StoreUnavailable(
            f"no connection to PostgreSQL within {self.retry_for:g} s: {reason} (raise max_size)."
        )

    def _run_on(self, conn: Connection, work: Callable[[Connection], T]) -> T:
        if not isinstance(conn, psycopg.Connection):
            raise WrongType(f"conn must be a psycopg.Connection, not {type(conn).__name__}")
        self.pool.joined(conn)  # raises for a connection to another database
        try:
            if self._auto_create and not self._tables_seen:
                # Tables that this very transaction has created may yet be rolled back.
                self._tables_seen = self._create_missing(conn)
            return work(conn)
        except (psycopg.Error, UnicodeEncodeError) as error:
            if isinstance(error, pg.UndefinedTable):
                self._tables_seen = False
            raise self.translate(error) from error

    # -- tables ----------------------------------------------------------------------------

    def ddl(self) -> str:
        """Return the statements that create the schema."""
        return "".join(self.sql.ddl.values())

    def _schema_missing(self, message: str) -> SchemaMissing:
        return SchemaMissing(message, self.ddl(), self.pool.migrate)

    def _missing(self, conn: Connection) -> tuple[list[str], bool]:
        """Return the missing tables, and whether all exist and are committed."""
        names = [name for name in self.sql.ddl if name]
        found = fetch(conn, self.sql.tables_exist, {"tables": list(self.sql.regclasses.values())})
        missing = [name for name, row in zip(names, found, strict=True) if not row[1]]
        return missing, not missing and all(row[2] for row in found)

    def make_tables_at_first(self, conn: Connection) -> None:
        # Threads may do this at the same time: `_create` serializes them, and finding a table that
        # another thread has created is no error.
        if self._auto_create and not self._tables_seen:
            self._create_missing(conn)
            self._tables_seen = True

    def _create_missing(self, conn: Connection) -> bool:
        missing, for_good = self._missing(conn)
        if missing:
            self._create(conn, ["", *missing] if "" in self.sql.ddl else missing)
        return for_good

    def _create(self, conn: Connection, names: Sequence[str]) -> None:
        """Create these tables, under a lock: IF NOT EXISTS alone races in the system catalogs."""
        try:
            with conn.transaction():
                self._serialize_ddl(conn)
                self._refuse_on_a_citus_worker(conn)
                for name in names:
                    if name or not fetch(conn, self.sql.schema_exists, {}):
                        for statement in self.sql.ddl[name].split(";\n"):
                            if statement:
                                execute(conn, statement.encode(), {})
        except (pg.InsufficientPrivilege, pg.ReadOnlySqlTransaction, *_MADE_BY_OTHERS) as error:
            if not self._missing(conn)[0]:
                return
            raise self._schema_missing(
                f"the tables are missing and cannot be created here ({error.diag.message_primary})."
            ) from error

    def _refuse_on_a_citus_worker(self, conn: Connection) -> None:
        """Tables created there would be local: an id could then run on two nodes at once."""
        if fetch(conn, self.sql.citus, {}) and fetch(conn, self.sql.citus_worker, {}):
            raise SchemaMissing(
                "tables are missing, and this server is a Citus worker node, where they would be "
                "local: create them on the coordinator and distribute them.",
                self.ddl(),
            )

    def _serialize_ddl(self, conn: Connection) -> None:
        """Wait for other sessions that create the tables, but not for ever.

        One of them may be the caller's own transaction, which stays open until this call returns.
        """
        ((before,),) = fetch(conn, b"SELECT current_setting('lock_timeout')", {})
        set_timeout = b"SELECT set_config('lock_timeout', %(value)s, true)"
        fetch(conn, set_timeout, {"value": _DDL_PATIENCE})
        fetch(conn, self.sql.serialize_ddl, {"name": ",".join(self.sql.regclasses.values())})
        fetch(conn, set_timeout, {"value": before})


@define
class Backoff:
    """Pauses between tries: none after the first failure, then exponential with jitter."""

    _give_up_at: float  # by the monotonic clock
    _delay: float = 0.0

    def pause(self) -> bool:
        """Sleep, or return False if time is up."""
        if time.monotonic() + self._delay >= self._give_up_at:
            return False
        time.sleep(self._delay * random.uniform(0.5, 1.0))  # noqa: S311 - jitter, no secret
        self._delay = min(max(0.05, self._delay * 2), 1.0)
        return True


def _at_once(conn: Connection, work: Callable[[Connection], T]) -> T:
    """Run ``work`` in one transaction: that of ``conn``, or a new one if ``conn`` autocommits."""
    if not conn.autocommit:
        return work(conn)
    with conn.transaction():
        return work(conn)
