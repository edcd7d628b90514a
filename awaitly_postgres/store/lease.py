"""Leases: one row of the lock table per id that a process is working on, with token and expiry.

A lease is acquired by inserting its row. An expired row is locked with ``SELECT ... FOR UPDATE``,
deleted and inserted again; ``take_over`` in queries.sql says why it is not updated. Only the
server's clock counts. Every write under a lease checks its token in the same statement, so a holder
that has stalled past the expiry changes nothing.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence
from contextlib import suppress
from datetime import datetime
from typing import Any

from attrs import define, field

from .._checks import check_ttl, moment
from ..errors import AlreadyRunning, AwaitlyError
from .database import Connection, Database, Row, execute, fetch

DEFAULT_TTL = 60.0  # seconds
RELEASE_TIMEOUT = 2.0  # seconds to try to release a lease after an interrupt or an outage


@define(eq=False)
class Lease:
    """The exclusive right to work on one id until ``expires_at``, by the server's clock.

    While a write under it is being committed, it cannot be taken over even if it expires. ``token``
    is new for each acquisition, ``host:pid:random``. ``ttl`` is in seconds.
    """

    id: str
    token: str
    expires_at: datetime
    ttl: float
    _key: str  # the id in the lock table, prefix included
    _db: Database = field(repr=False)

    def renew(self, ttl: float | None = None) -> bool:
        """Extend the lease to ``ttl`` seconds from now (default: the ttl it was acquired with).

        It never waits for a row lock: while a write under this lease is being committed, the
        expiry stays as it is.

        Returns:
            False if the lease is lost; an expired one is not revived.

        Raises:
            ValueError: ``ttl`` is not positive.
            StoreUnavailable: the database was away for longer than the store retries.
        """
        params = {**self.params, "ttl": check_ttl(self.ttl if ttl is None else ttl)}
        # Safe to repeat: a second try counts from its own time on the server.
        return self.renewed(self._db.rows(self._db.sql.renew, params))

    def release(self) -> None:
        """Release the lease. Does nothing if it is already lost."""
        release(self._db, self.params)

    def held(self) -> bool:
        """Ask the server whether the lease is still held."""
        return bool(self._db.rows(self._db.sql.held, self.params))

    @property
    def params(self) -> dict[str, str]:
        """The parameters by which a fenced statement identifies this lease."""
        return {"id": self._key, "token": self.token}

    def renewed(self, rows: Sequence[Row]) -> bool:
        """Note the new expiry, if there is one: a row that a write has locked keeps the old."""
        if rows and rows[0][1] is not None:
            self.expires_at = moment(rows[0][1])
        return bool(rows)


def new_token() -> str:
    """Return a token that no other acquisition has: ``host:pid:random``."""
    return f"{socket.gethostname()}:{os.getpid()}:{os.urandom(8).hex()}"


def acquire(db: Database, id: str, key: str, ttl: float, token: str | None = None) -> Lease:
    """Acquire the lease on ``key`` (the user's ``id`` with the prefix), or raise `AlreadyRunning`.

    ``token`` is that of an earlier try whose reply may have been lost.
    """
    token = token or new_token()
    ttl = check_ttl(ttl)
    params = {"id": key, "token": token, "ttl": ttl}

    def take(conn: Connection) -> str:
        # Safe to repeat, after an outage or by the caller: take_over treats a lease that has this
        # very token like one that has expired.
        while True:
            for statement in (db.sql.acquire, db.sql.take_over):
                if rows := fetch(conn, statement, params):
                    return str(rows[0][0])
            if rows := fetch(conn, db.sql.holder, params):
                raise AlreadyRunning(id, rows[0][0], moment(rows[0][1]))
            # It was taken when we tried, and released before we could read by whom: try again.

    try:
        return Lease(id, token, moment(db.run(take)), ttl, key, db)
    except AwaitlyError:
        raise
    except BaseException:
        # Raised by a signal handler. The statement may have succeeded, and nobody else knows the
        # token that the lease then has.
        with suppress(AwaitlyError):
            release(db, params, RELEASE_TIMEOUT)
        raise


def release(db: Database, params: dict[str, Any], retry_for: float | None = None) -> None:
    """Release the lease that has this token; retry for ``retry_for`` seconds (None: the store's).

    Safe to repeat: no later holder has the same token.
    """
    db.run(lambda conn: execute(conn, db.sql.release, params), retry_for=retry_for)
