"""What an error of the driver means: a passing outage, a timeout of a transaction, or a refusal."""

from __future__ import annotations

import psycopg
from psycopg import errors as pg
from psycopg_pool import PoolClosed, PoolTimeout, TooManyRequests

# SQLSTATE classes and codes of transient errors: connection lost, transaction rolled back
# (serialization, deadlock), out of resources, shutdown or timeout, lock not available.
_TRANSIENT = ("08", "40", "53", "57", "55P03", "25P03", "25P04")

# How Citus reports, as an internal error, that it has lost a worker node.
_NODE_LOST = ("failure on connection marked as essential", "server closed the connection")


def is_transient(error: Exception) -> bool:
    """Return whether retrying may help: an outage, or a transaction that lost against another."""
    if isinstance(error, (PoolTimeout, TooManyRequests)):
        return True
    if isinstance(error, PoolClosed) or not isinstance(error, psycopg.Error):
        return False
    if error.sqlstate is None:
        return isinstance(error, psycopg.OperationalError)  # the connection went away
    if error.sqlstate == "XX000":
        return any(words in str(error) for words in _NODE_LOST)
    return error.sqlstate.startswith(_TRANSIENT)


def is_transaction_timeout(error: psycopg.Error) -> bool:
    """Return whether the server ended a transaction because it was idle or open for too long.

    In the transaction of a step that is the step's own failure, not an outage.
    """
    return isinstance(error, (pg.IdleInTransactionSessionTimeout, pg.TransactionTimeout))


def driver_error(error: BaseException) -> psycopg.Error | None:
    """Return ``error`` if it is psycopg's, or its cause if that is, as in Django's errors."""
    for candidate in (error, error.__cause__):
        if isinstance(candidate, psycopg.Error):
            return candidate
    return None
