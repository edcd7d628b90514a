"""The lock table: one row per id that somebody works on, with a token and an end.

A lease is taken by inserting the row, or by locking an expired one with ``SELECT ... FOR UPDATE``
and writing a new token into it. Only the server's clock decides. Whoever writes under a lease
names its token in the same statement, so a holder that has slept past the end changes nothing.
"""

from __future__ import annotations

import os
import socket
import threading
import time
import weakref
from collections.abc import Sequence
from datetime import datetime

from attrs import define, field

from .._checks import check_ttl, moment
from ..errors import AlreadyRunning
from .database import Connection, Database, Row, execute, fetch

DEFAULT_TTL = 60.0  # seconds
_LINGER = 1.0  # seconds for which the renewing thread waits for another lease before it ends


@define(eq=False)
class Lease:
    """The right to work on one id until ``expires_at``, by the server's clock.

    It stands a little longer while a write under it is being committed. ``token`` is new at each
    acquisition and reads ``host:pid:random``. ``ttl`` is in seconds.
    """

    id: str
    token: str
    expires_at: datetime
    ttl: float
    _key: str  # the id in the lock table, prefix included
    _db: Database = field(repr=False)

    def renew(self, ttl: float | None = None) -> bool:
        """Move the end to ``ttl`` seconds from now (default: as acquired).

        Returns False if the lease is lost; one that has run out is not revived. It waits for
        nobody: while a write under this lease is being committed, the lease stands as it is.
        """
        return self._renew(check_ttl(self.ttl if ttl is None else ttl))

    def release(self) -> None:
        """Give the lease back. Does nothing if it is lost already."""
        self._release(None)

    def held(self) -> bool:
        """Ask the server whether the lease still stands."""
        return bool(self._db.rows(self._db.sql.held, self.params))

    @property
    def params(self) -> dict[str, str]:
        """What a fenced statement needs to name this lease."""
        return {"id": self._key, "token": self.token}

    def _release(self, retry_for: float | None) -> None:
        statement = self._db.sql.release
        self._db.run(lambda conn: execute(conn, statement, self.params), retry_for=retry_for)

    def _renew(self, ttl: float) -> bool:
        params = {**self.params, "ttl": ttl}
        rows = self._db.run(lambda conn: fetch(conn, self._db.sql.renew, params))
        return self._renewed(rows)

    def _renewed(self, rows: Sequence[Row]) -> bool:
        """Take over the new end, if there is one: a row that a write has locked keeps the old."""
        if rows and rows[0][1] is not None:
            self.expires_at = moment(rows[0][1])
        return bool(rows)


def new_token() -> str:
    """Make a token that no other acquisition has: ``host:pid:random``."""
    return f"{socket.gethostname()}:{os.getpid()}:{os.urandom(8).hex()}"


def acquire(db: Database, id: str, key: str, ttl: float, token: str | None = None) -> Lease:
    """Take the lease on ``key``, called ``id`` by its user, or raise `AlreadyRunning`.

    ``token`` is that of a first try of which the reply may have been lost.
    """
    token = token or new_token()
    ttl = check_ttl(ttl)
    params = {"id": key, "token": token, "ttl": ttl}

    def take(conn: Connection) -> str:
        while True:
            for statement in (db.sql.acquire, db.sql.take_over):
                if rows := fetch(conn, statement, params):
                    return str(rows[0][0])
            if rows := fetch(conn, db.sql.holder, params):
                raise AlreadyRunning(id, rows[0][0], moment(rows[0][1]))
            # Released in between.

    return Lease(id, token, moment(db.run(take)), ttl, key, db)


# -- renewal in the background -------------------------------------------------------------


@define(eq=False)
class _Renewer:
    """One thread for each database that renews what is kept, every third of its ttl.

    It starts with the first lease and ends soon after the last. It keeps no lease alive by itself.
    It works on a connection of its own: those of the pool may all be in long transactions.
    """

    _db: weakref.ref[Database]
    _due: weakref.WeakKeyDictionary[Lease, float] = field(factory=weakref.WeakKeyDictionary)
    _changed: threading.Condition = field(factory=threading.Condition)
    _thread: threading.Thread | None = None
    _wakes_at: float = 0.0

    def keep(self, lease: Lease) -> None:
        with self._changed:
            due = self._due[lease] = time.monotonic() + lease.ttl / 3
            if self._thread is None:
                thread = threading.Thread(
                    target=self._work, name="awaitly-lease-renewal", daemon=True
                )
                thread.start()  # may fail; the next lease then tries again
                self._thread = thread
            elif due < self._wakes_at:
                self._changed.notify()

    def drop(self, lease: Lease) -> None:
        with self._changed:
            self._due.pop(lease, None)

    def _work(self) -> None:
        conn: Connection | None = None
        try:
            while (lease := self._next()) is not None:
                db = self._db()
                if db is None:
                    return
                params = {**lease.params, "ttl": lease.ttl}
                kept, pause = True, lease.ttl / 10  # so soon again, as long as it has not run out
                with db.tolerating_outages():
                    if conn is None or conn.closed:
                        conn = db.new_connection()
                    rows = fetch(conn, db.sql.renew, params)
                    kept = lease._renewed(rows)
                    if rows and rows[0][1] is not None:
                        pause = lease.ttl / 3
                with self._changed:
                    if kept and lease in self._due:
                        self._due[lease] = time.monotonic() + pause
                    else:
                        self._due.pop(lease, None)
                del lease, db
        finally:
            if conn is not None:
                conn.close()

    def _next(self) -> Lease | None:
        """Wait for the first lease that is due; None when there has been none for a while."""
        idle = False
        with self._changed:
            while True:
                lease = min(self._due, key=lambda kept: self._due[kept], default=None)
                if lease is None and idle:
                    self._thread = None
                    return None
                now = time.monotonic()
                # At most so long, for nobody tells when the last one goes.
                self._wakes_at = now + _LINGER
                if lease is not None:
                    self._wakes_at = min(self._due[lease], self._wakes_at)
                    if self._wakes_at <= now:
                        return lease
                idle = lease is None
                del lease  # so that one which nobody holds any more goes away meanwhile
                self._changed.wait(self._wakes_at - now)


_renewers: weakref.WeakKeyDictionary[Database, _Renewer] = weakref.WeakKeyDictionary()
_renewers_lock = threading.Lock()


def keep_renewed(lease: Lease) -> None:
    """Renew ``lease`` in the background until `stop_renewing` or until nobody holds it."""
    db = lease._db
    with _renewers_lock:
        renewer = _renewers.get(db)
        if renewer is None:
            renewer = _renewers[db] = _Renewer(weakref.ref(db))
    renewer.keep(lease)


def stop_renewing(lease: Lease) -> None:
    """Leave ``lease`` to run out, or to be released."""
    if (renewer := _renewers.get(lease._db)) is not None:
        renewer.drop(lease)


def _after_fork_in_child() -> None:
    global _renewers, _renewers_lock
    _left_to_the_parent.append(_renewers)  # it renews its own, on connections of its own
    _renewers, _renewers_lock = weakref.WeakKeyDictionary(), threading.Lock()


_left_to_the_parent: list[object] = []

if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)
