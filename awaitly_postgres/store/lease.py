"""The lock table: one row per id that somebody works on, with a token and an end.

A lease is acquired by inserting its row. An expired row is locked with ``SELECT ... FOR UPDATE``,
deleted and inserted again; ``take_over`` in queries.sql says why it is not updated. Only the
server's clock decides. Whoever writes under a lease names its token in the same statement, so a
holder that has stalled past the end changes nothing.
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
RELEASE_TIMEOUT = 2.0  # seconds to give a lease back in, where its caller has waited already


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
        params = {**self.params, "ttl": check_ttl(self.ttl if ttl is None else ttl)}
        # May be repeated: a second try counts from the server's time of its own.
        return self.renewed(self._db.rows(self._db.sql.renew, params))

    def release(self) -> None:
        """Give the lease back. Does nothing if it is lost already."""
        release(self._db, self.params)

    def held(self) -> bool:
        """Ask the server whether the lease still stands."""
        return bool(self._db.rows(self._db.sql.held, self.params))

    @property
    def params(self) -> dict[str, str]:
        """What a fenced statement needs to name this lease."""
        return {"id": self._key, "token": self.token}

    def renewed(self, rows: Sequence[Row]) -> bool:
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
        # May be repeated, after an outage or by the caller: to take_over, a lease that this very
        # token has taken already is as free as one that has expired.
        while True:
            for statement in (db.sql.acquire, db.sql.take_over):
                if rows := fetch(conn, statement, params):
                    return str(rows[0][0])
            if rows := fetch(conn, db.sql.holder, params):
                raise AlreadyRunning(id, rows[0][0], moment(rows[0][1]))
            # Taken when we asked for it, and released before we asked by whom.

    try:
        return Lease(id, token, moment(db.run(take)), ttl, key, db)
    except AwaitlyError:
        raise
    except BaseException:
        # Out of a signal handler. The statement may have been carried out, and nobody else knows
        # the token that the lease then has.
        with suppress(AwaitlyError):
            release(db, params, RELEASE_TIMEOUT)
        raise


def release(db: Database, params: dict[str, Any], retry_for: float | None = None) -> None:
    """Give back the lease that has this token, trying for so many seconds (default: the store's).

    May be repeated: no later holder has the same token.
    """
    db.run(lambda conn: execute(conn, db.sql.release, params), retry_for=retry_for)
