"""The snapshot store: saves, loads, lists and cleans up snapshots, and hands out leases."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any

from attrs import define

from .._checks import check_id, check_limit, check_status, moment
from ..errors import AlreadyRunning, AwaitlyError, LeaseLost
from ..snapshot import WorkflowSnapshot
from . import lease as leases
from . import renewal
from .database import Connection, Database, execute, fetch
from .lease import DEFAULT_TTL, Lease
from .rows import (
    RunInfo,
    SnapshotInfo,
    State,
    StoreStats,
    check_state,
    decode_snapshot,
    encode_snapshot,
    in_state,
    page_after,
)
from .statements import Statements, filtered, prefix_bounds

_PAGE = 500

Infos = list[SnapshotInfo]  # inside the store, ``list`` is a method
RunInfos = list[RunInfo]
Rows = list[tuple[Any, ...]]


@define(eq=False, repr=False)
class SnapshotStore:
    """Workflow snapshots in PostgreSQL. Created by `postgres`; it connects on first use.

    Threads can share it, and it survives a fork. As a context manager it closes itself.

    Where a method takes ``conn``, your own psycopg connection, its statement joins the transaction
    that is open on that connection, and commits or rolls back with it.

    All methods raise `StoreUnavailable` when the database cannot be reached (after retrying for
    ``retry_for`` seconds if it was reachable before), `SchemaMissing` when the tables do not exist
    and cannot be created, and ValueError for an invalid id. Ids are non-empty strings without NUL,
    at most 1,000 bytes long with the store's prefix.
    """

    _db: Database
    prefix: str

    def save(
        self,
        id: str,
        snapshot: WorkflowSnapshot | Mapping[str, Any],
        *,
        lease: Lease | None = None,
        conn: Connection | None = None,
    ) -> None:
        """Insert or replace the snapshot stored as ``id``.

        Args:
            id: the id to store it under.
            snapshot: a `WorkflowSnapshot`, or its JSON as a mapping.
            lease: write only while this lease on ``id`` is held.
            conn: join the transaction of this connection.

        Raises:
            NotSerializable, SnapshotFormatError: the snapshot is invalid; nothing was written.
            LeaseLost: the lease is no longer held; nothing was written.
            ValueError: the lease is on another id.
        """
        params: dict[str, Any] = {"id": self.key(id), "snapshot": encode_snapshot(id, snapshot)}
        if lease is None:
            self._db.count(self._sql.save, params, conn)
            return
        if lease.params["id"] != params["id"]:
            raise ValueError(f"the lease is on {lease.id!r}, not on {id!r}; acquire one on that id")
        params |= lease.params
        if not self._db.count(self._sql.save_under_lease, params, conn):
            raise LeaseLost(id)

    def load(self, id: str, *, conn: Connection | None = None) -> WorkflowSnapshot | None:
        """Return the snapshot stored as ``id``, or None.

        It includes the steps that are still in the journal.

        Raises:
            SnapshotFormatError: the stored document is not a snapshot; ``errors`` lists the faults.
        """
        rows = self._db.rows(self._sql.load, {"id": self.key(id)}, conn)
        return decode_snapshot(id, rows[0][0], rows[0][1]) if rows else None

    def delete(self, id: str, *, conn: Connection | None = None) -> bool:
        """Delete the snapshot stored as ``id``; return whether there was one."""
        params = {"id": self.key(id)}
        rows = self._db.run_once(lambda conn: fetch(conn, self._sql.delete, params), conn)
        return bool(rows[0][0])

    def delete_many(self, ids: Iterable[str]) -> int:
        """Delete the snapshots stored under these ids; return how many there were."""
        if isinstance(ids, str):
            raise TypeError("ids must be an iterable of ids, not one string; for one, use delete()")
        return self._delete_keys([self.key(id) for id in ids])

    def _clear(self) -> int:
        """Delete everything (under the store's prefix); return how many snapshots there were."""
        deleted = 0
        while page := self.list(limit=_PAGE):
            deleted += self._delete_keys([self.prefix + info.id for info in page])
        return deleted

    def _delete_keys(self, keys: Sequence[str]) -> int:
        batches = [keys[i : i + _PAGE] for i in range(0, len(keys), _PAGE)]
        return sum(self._delete_batch(batch, None) for batch in batches)

    def list(
        self,
        prefix: str = "",
        *,
        status: str | None = None,
        limit: int = 100,
        after: SnapshotInfo | None = None,
    ) -> Infos:
        """List the stored snapshots, newest first, without loading the documents.

        Args:
            prefix: only ids that start with exactly this.
            status: only ``"running"``, ``"completed"`` or ``"failed"`` ones.
            limit: at most this many.
            after: the last entry of the previous page; None starts with the newest.
        """
        params = {
            **self._range(prefix),
            "status": check_status(status),
            "limit": check_limit(limit),
            **page_after(after, self.prefix),
        }
        return self._infos(self._sql.list, params)

    def iter(self, prefix: str = "", *, status: str | None = None) -> Iterator[SnapshotInfo]:
        """Iterate over everything that `list` would return, reading a page at a time."""
        last = None
        while page := self.list(prefix, status=status, limit=_PAGE, after=last):
            yield from page
            last = page[-1]

    def pending(
        self,
        prefix: str = "",
        *,
        workflows: Iterable[str] | None = None,
        limit: int = 100,
        after: SnapshotInfo | None = None,
    ) -> Infos:
        """List the unfinished runs that are due and not held, least recently updated first.

        Args:
            prefix: only ids that start with exactly this.
            workflows: only runs of workflows with these names; None for any.
            limit: at most this many.
            after: the last entry of the previous page; None starts with the oldest.
        """
        params = {
            **self._range(prefix),
            **page_after(after, self.prefix),
            "limit": check_limit(limit),
            "workflows": None if workflows is None else [*workflows],
        }
        # If it saw the values, the planner would expect few rows and sort all pending runs.
        return self._infos(self._sql.pending, params, custom_plan=False)

    def details(self, ids: Iterable[str], *, conn: Connection | None = None) -> RunInfos:
        """Return the `RunInfo` of these runs, in this order, without payloads and steps.

        Ids that are not stored are left out. An invalid id is not an error here, just not found:
        listings show whatever the table holds.
        """
        keys = [self.prefix + id for id in ids]
        rows = self._listed(self._sql.runs, {"ids": keys, "limit": None}, conn)
        found = {row[0]: RunInfo.from_columns(row, self.prefix) for row in rows}
        return [found[key] for key in keys if key in found]

    def prune(
        self,
        older_than: timedelta,
        *,
        status: str | None = "completed",
        state: State | None = None,
        batch_size: int = 1000,
        dry_run: bool = False,
        on_progress: Callable[[int], object] | None = None,
    ) -> int:
        """Delete snapshots that have not changed for ``older_than``, in short transactions.

        It may be interrupted and called again. Runs in progress are skipped. Journal rows whose
        snapshot is gone, and leases that expired that long ago, are deleted as well.

        Args:
            older_than: minimum age, by the server's clock.
            status: only snapshots with this stored status; None for any.
            state: instead of ``status``: only runs that are in this one of the seven states.
            batch_size: snapshots per transaction.
            dry_run: only count, delete nothing.
            on_progress: called after each batch with the number deleted (or counted) so far.

        Returns:
            how many snapshots were, or would be, deleted.
        """
        age = older_than.total_seconds()
        if age < 0:
            raise ValueError(f"older_than must not be negative, but is {older_than}")
        batch_size = check_limit(batch_size, "batch_size")
        params = {
            **self._range(""),
            **in_state(state),
            "status": check_status(status) if state is None else None,
            "age": age,
            "limit": None if dry_run else batch_size,
        }
        report = on_progress or (lambda done: None)
        if dry_run:
            report(done := len(self._listed(self._sql.prunable, params)))
            return done
        done = 0
        while found := self._listed(self._sql.prunable, params):
            done += self._delete_batch([row[0] for row in found], age)
            report(done)
        if self._sql.journal:
            self._db.count(self._sql.sweep_journal, {})
        self._db.count(self._sql.sweep_locks, {"age": age})
        return done

    def stats(self) -> StoreStats:
        """Count the stored snapshots, by status and by state, and the bytes they take."""
        params = {**self._range(""), "tables": list(self._sql.regclasses.values())}
        rows = self._listed(self._sql.stats, params)
        if rows[-1][1] == "citus":
            bytes = self._db.rows(self._sql.distributed_bytes, params)[0]
            rows[-1] = ("bytes", None, None, *bytes)
        return StoreStats.from_rows(rows)

    def where_state(self, state: State) -> str:
        """Return an SQL condition, for your own queries on the snapshots table.

        It is true for runs in ``state``, whatever the store's prefix.
        """
        which = "completed" if state == "completed" else "unfinished"
        params = {which: f"'{check_state(state)}'"}
        return filtered(self._sql.where_state, params).decode() % params

    def ping(self) -> bool:
        """Return True if the database answers; otherwise raise `StoreError`."""
        return bool(self._db.rows(b"SELECT 1", {}))

    def create_tables(self) -> None:
        """Create the tables and indexes that are missing, in one transaction.

        Only needed with ``auto_create_table=False``, or for tables that Node created: it adds the
        index that finds unfinished runs. Building that blocks writes to a large table for seconds.

        Raises:
            SchemaMissing: they are missing, and this role may not create them.
        """
        self._db.create_tables()

    def ddl(self) -> str:
        """Return the SQL that `create_tables` would run, for your own migrations."""
        return self._db.ddl()

    def try_acquire(self, id: str, *, ttl: float = DEFAULT_TTL) -> Lease | None:
        """Acquire the lease on ``id`` for ``ttl`` seconds; return None if it is taken.

        Renew and release it yourself, with `Lease.renew` and `Lease.release`; `lock` does both.
        """
        try:
            return leases.acquire(self._db, id, self.key(id), ttl)
        except AlreadyRunning:
            return None

    @contextmanager
    def lock(self, id: str, *, ttl: float = DEFAULT_TTL, wait: float = 0.0) -> Iterator[Lease]:
        """Hold the lease on ``id`` while the block runs, renewing it in the background.

        Args:
            id: the id to lock. Durable runs use the same leases.
            ttl: seconds after which others can take over if this process dies.
            wait: seconds to wait for another holder to release it.

        Raises:
            AlreadyRunning: it is still taken; the error says by whom, and until when.
        """
        give_up_at, holder = time.monotonic() + wait, os.getpid()
        held: Lease | None = None
        left = False
        try:
            while held is None:
                try:
                    held = leases.acquire(self._db, id, self.key(id), ttl)
                except AlreadyRunning:
                    pause = min(give_up_at - time.monotonic(), 0.1)
                    if pause <= 0:
                        raise
                    time.sleep(pause)
            renewal.keep_renewed(held)
            yield held
            left = True
            renewal.stop_renewing(held)
            if os.getpid() == holder:  # a child forked inside the block leaves it as well
                held.release()
        except BaseException:
            # Raised by the block, or by a signal handler anywhere above. It matters more than
            # whatever the release raises, which may be the second release.
            if held is not None:
                renewal.stop_renewing(held)
                if os.getpid() == holder:
                    with suppress(AwaitlyError):
                        leases.release(
                            self._db, held.params, leases.RELEASE_TIMEOUT if left else None
                        )
            raise

    def revoke_lease(self, id: str, token: str) -> bool:
        """Revoke the lease on ``id`` if it has this ``token``; return whether it had.

        For a holder that is known to be dead. If it is alive after all, it can write nothing more.
        """
        params = {"id": self.key(id), "token": token}
        return bool(self._db.run_once(lambda conn: execute(conn, self._sql.release, params)))

    def close(self) -> None:
        """Close the pool, unless it is your own. The store cannot be used afterwards."""
        self._db.close()

    def key(self, id: str) -> str:
        """Return ``id`` as stored in the tables, with the prefix; raise ValueError if invalid."""
        return self.prefix + check_id(id, room=len(self.prefix.encode()))

    def __enter__(self) -> SnapshotStore:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"SnapshotStore(table={next(iter(self._sql.regclasses))!r}, prefix={self.prefix!r})"

    @property
    def _sql(self) -> Statements:
        return self._db.sql

    def _range(self, prefix: str) -> dict[str, Any]:
        if not isinstance(prefix, str):
            raise TypeError(f"prefix must be a string, not {type(prefix).__name__}")
        full = self.prefix + prefix
        if prefix:
            check_id(prefix, "prefix")
        low, high = prefix_bounds(full) if full else ("", None)
        # An id is never empty: a row whose id is the bare prefix does not belong to this store.
        return {"low" if prefix else "above": low, "high": high}

    def _infos(
        self, statement: bytes, params: Mapping[str, Any], *, custom_plan: bool = True
    ) -> Infos:
        rows = self._listed(statement, params, custom_plan=custom_plan)
        skip = len(self.prefix)
        return [SnapshotInfo(id[skip:], status, moment(time)) for id, status, time in rows]

    def _listed(
        self,
        statement: bytes,
        params: Mapping[str, Any],
        conn: Connection | None = None,
        *,
        custom_plan: bool = True,
    ) -> Rows:
        # A custom plan: which index is best depends on the values of the prefix and the age.
        return self._db.rows(filtered(statement, params), params, conn, custom_plan=custom_plan)

    def _delete_batch(self, keys: Sequence[str], age: float | None) -> int:
        params = {"ids": keys, "age": age}

        def work(conn: Connection) -> int:
            gone = [row[0] for row in fetch(conn, filtered(sql.delete_many, params), params)]
            if sql.journal:
                execute(conn, sql.delete_many_journals, {"ids": gone})
            return len(gone)

        sql = self._sql
        return self._db.run_once(work)
