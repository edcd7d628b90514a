"""Renews leases in the background, in one thread per store.

It uses its own connection, because those of the pool may all be in long transactions. A lease that
cannot be renewed does not keep others from being renewed.
"""

from __future__ import annotations

import os
import threading
import time
import weakref

from attrs import define, field

from .connection import Connection, fetch
from .database import Database
from .lease import Lease

_LINGER = 1.0  # seconds for which the thread waits for another lease before it ends


@define(eq=False, repr=False)
class _Renewer:
    """Renews each lease every third of its ttl, until `drop` or until it is garbage collected.

    The thread starts with the first lease and ends soon after the last.
    """

    # Both are weak: the thread keeps neither the store nor a lease alive.
    _db: weakref.ref[Database]
    _due: weakref.WeakKeyDictionary[Lease, float] = field(factory=weakref.WeakKeyDictionary)
    # Acquired directly, not through the condition: `Condition.__enter__` is Python code, and a
    # signal handler that raises in it would leave the lock held.
    _lock: threading.RLock = field(factory=threading.RLock)
    _changed: threading.Condition = field(init=False)
    _thread: threading.Thread | None = None
    _wakes_at: float = 0.0

    def __attrs_post_init__(self) -> None:
        self._changed = threading.Condition(self._lock)

    def keep(self, lease: Lease) -> None:
        with self._lock:
            due = self._due[lease] = time.monotonic() + lease.ttl / 3
            # A thread that failed to start, or was interrupted while starting, is not alive either.
            if self._thread is None or not self._thread.is_alive():
                self._thread = threading.Thread(
                    target=self._work, name="awaitly-lease-renewal", daemon=True
                )
                try:
                    self._thread.start()
                except KeyError as error:
                    # A signal handler raised in Thread.start(), which hides it behind a KeyError.
                    raise error.__context__ or error from None
            elif due < self._wakes_at:
                self._changed.notify()

    def drop(self, lease: Lease) -> None:
        with self._lock:
            self._due.pop(lease, None)

    def _work(self) -> None:
        conn: Connection | None = None
        try:
            while (lease := self._next()) is not None:
                db = self._db()
                if db is None:
                    return
                kept, pause = True, lease.ttl / 10  # retry soon if this renewal fails
                with db.suppressing_errors():
                    if conn is None or conn.closed:
                        conn = db.pool.new_connection()
                    # Without the lock: leases may be added and dropped while the server works.
                    rows = fetch(conn, db.sql.renew, {**lease.params, "ttl": lease.ttl})
                    kept = lease.renewed(rows)
                    if rows and rows[0][1] is not None:
                        pause = lease.ttl / 3
                with self._lock:
                    # If it was dropped meanwhile, it is not added again: its holder has released it
                    # or is about to. A renewal before the release is harmless, because the release
                    # deletes the row; a renewal after it finds no row.
                    if kept and lease in self._due:
                        self._due[lease] = time.monotonic() + pause
                    else:
                        self._due.pop(lease, None)
                del lease, db  # they must not be kept alive by the wait below
        finally:
            if conn is not None:
                conn.close()

    def _next(self) -> Lease | None:
        """Wait for the next lease that is due; return None if there is none for a while."""
        idle = False
        with self._lock:
            while True:
                lease = min(self._due, key=lambda kept: self._due[kept], default=None)
                if lease is None and idle:
                    # Under the lock: a `keep` after this finds no thread and starts one.
                    self._thread = None
                    return None
                now = time.monotonic()
                # No longer than this, because nothing wakes us when the last lease is collected.
                self._wakes_at = now + _LINGER
                if lease is not None:
                    self._wakes_at = min(self._due[lease], self._wakes_at)
                    if self._wakes_at <= now:
                        return lease
                idle = lease is None
                del lease  # so that it can be collected during the wait
                self._changed.wait(self._wakes_at - now)


_renewers: weakref.WeakKeyDictionary[Database, _Renewer] = weakref.WeakKeyDictionary()
_renewers_lock = threading.Lock()


def keep_renewed(lease: Lease) -> None:
    """Renew ``lease`` in the background until `stop_renewing` or until it is garbage collected."""
    db = lease._db
    with _renewers_lock:  # only one thread creates the store's renewer
        renewer = _renewers.get(db)
        if renewer is None:
            renewer = _renewers[db] = _Renewer(weakref.ref(db))
    renewer.keep(lease)


def stop_renewing(lease: Lease) -> None:
    """Stop renewing ``lease``, which then expires or is released. Safe to repeat."""
    # Without the lock: the renewer of a lease was stored before `keep_renewed` returned.
    if (renewer := _renewers.get(lease._db)) is not None:
        renewer.drop(lease)


def _after_fork_in_child() -> None:
    global _renewers, _renewers_lock
    # The parent keeps renewing its leases, on a connection that the child must not close. The
    # child does not have its threads, one of which may have held the lock.
    _left_to_the_parent.append(_renewers)
    _renewers, _renewers_lock = weakref.WeakKeyDictionary(), threading.Lock()


_left_to_the_parent: list[object] = []

if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)
