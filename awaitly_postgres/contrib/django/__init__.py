"""The store on Django's database, and durable runs over the ORM.

Add ``"awaitly_postgres.contrib.django"`` to ``INSTALLED_APPS``: ``migrate`` then creates the
tables, ``resume_workflows`` resumes pending runs, and the admin shows all runs. In your own module:

    from awaitly_postgres import Durable
    from awaitly_postgres.contrib.django import atomic, store

    durable = Durable(store(), transaction=atomic)

    with transaction.atomic():                       # in a view: accepted if the block commits
        durable.submit("checkout-1", checkout, 1)

    step.transaction("take-stock", take_stock, 1)    # in a workflow: the ORM writes commit with it
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import attrs
import django.db
import psycopg
from django.core import mail
from django.core.exceptions import ImproperlyConfigured
from django.db import connections
from django.db import transaction as transactions
from psycopg.conninfo import make_conninfo
from psycopg_pool import ConnectionPool, NullConnectionPool

from ...store.database import Connection
from ...store.pool import OwnPool
from ...store.postgres import postgres
from ...store.store import SnapshotStore

__all__ = ["atomic", "connection", "store"]


def store(using: str = "default", **options: Any) -> SnapshotStore:
    """Return a `SnapshotStore` on one of the databases in Django's settings.

    The store has its own pool, so that a checkpoint is committed whatever the view's transaction
    does. If ``OPTIONS["pool"]`` is set (Django 5.1+), it takes connections from Django's pool
    instead, which then needs two for each thread. The settings are read on first use, so tests run
    on the test database.

    Args:
        using: the alias in ``DATABASES``.
        options: those of `postgres`; ``auto_create_table`` is False by default here, because
            ``migrate`` creates the tables.

    Raises:
        ImproperlyConfigured: the database is not PostgreSQL.
    """
    wrapper = connections[using]
    if wrapper.vendor != "postgresql":
        raise ImproperlyConfigured(f"the database {using!r} is {wrapper.vendor}, not PostgreSQL")
    # Django turns prepared statements off by default, because of poolers. The store does not: it
    # notices a pooler when it connects. So only a value set by the user is passed on.
    kwargs = {k: v for k, v in wrapper.settings_dict["OPTIONS"].items() if k == "prepare_threshold"}
    kwargs |= options.pop("kwargs", None) or {}
    sizes = {name: options.pop(name) for name in ("min_size", "max_size") if name in options}
    pool = _DjangoPool(lambda: _conninfo(using), kwargs=kwargs, using=using, **sizes)
    return postgres(pool=pool, **{"auto_create_table": False, **options})


def connection(using: str = "default") -> Connection:
    """Return Django's psycopg connection, to be passed as ``conn=``.

    What is done on it is part of the ``transaction.atomic()`` block that is open there, if any.

    Args:
        using: the alias in ``DATABASES``.
    """
    wrapper = connections[using]
    wrapper.ensure_connection()
    return cast(Connection, wrapper.connection)


@contextmanager
def atomic(using: str = "default") -> Iterator[Connection]:
    """Open a transaction for ``step.transaction`` on Django's connection, so that the ORM is in it.

    For ``Durable(transaction=atomic)``.

    Args:
        using: the alias in ``DATABASES``.

    Raises:
        RuntimeError: a ``transaction.atomic()`` block is open, so leaving this one would not
            commit; or the step marked the transaction for rollback.
    """
    wrapper = connections[using]
    if wrapper.in_atomic_block:
        raise RuntimeError(
            "step.transaction commits, so a workflow that has one cannot run inside "
            "transaction.atomic(), ATOMIC_REQUESTS or a TestCase. Submit it there, or decorate the "
            "view with non_atomic_requests; test it in a TransactionTestCase."
        )
    wrapper.close_if_unusable_or_obsolete()  # as Django does between requests
    opened = False
    try:
        with transactions.atomic(using=using):
            conn = connection(using)
            opened = True
            yield conn
            if transactions.get_rollback(using=using):
                raise RuntimeError(
                    "the step marked its transaction for rollback (set_rollback), so there is "
                    "nothing to record; raise an exception to fail the step, or return a value"
                )
    except django.db.Error as error:
        # `Transaction.begin` retries this while the server is unavailable, which it recognizes by
        # psycopg's own error, not by Django's.
        if opened or not isinstance(error.__cause__, psycopg.Error):
            raise
        raise error.__cause__ from error


def open_transaction(using: str) -> Connection | None:
    """Return Django's connection if this thread has a transaction open on it, else None."""
    wrapper = connections[using]
    return None if wrapper.connection is None or wrapper.get_autocommit() else wrapper.connection


@functools.cache
def shared_store(using: str) -> SnapshotStore:
    """Return the store that the admin and the tasks share, so that they share a pool."""
    return store(using)


@attrs.define(eq=False)
class _DjangoPool(OwnPool):
    """Django's own pool if its settings ask for one, else a pool made from them, on first use."""

    using: str = attrs.field(kw_only=True)
    _made_for: tuple[Any, ...] = attrs.field(default=(), init=False)

    def __attrs_post_init__(self) -> None:
        where = "" if self.using == "default" else f" --database {self.using}"
        self.migrate = f"manage.py migrate{where}"
        super().__attrs_post_init__()

    def refuse_to_run_here(self) -> None:
        """Raise inside a transaction of Django's: its rollback would undo what the steps wrote."""
        for wrapper in {*connections.all(initialized_only=True), connections[self.using]}:
            by_default = wrapper.settings_dict["AUTOCOMMIT"]
            commits = by_default if wrapper.connection is None else wrapper.autocommit
            if wrapper.in_atomic_block:
                raise RuntimeError(
                    f"a workflow cannot run inside transaction.atomic() on {wrapper.alias!r} (or "
                    "ATOMIC_REQUESTS, or a TestCase): its steps would stay recorded when what they "
                    "wrote is rolled back. Call submit(...) here and let "
                    "resume_workflows run it, or decorate the view with non_atomic_requests; test "
                    "it in a TransactionTestCase."
                )
            if not commits:
                raise RuntimeError(
                    f"a workflow cannot run while {wrapper.alias!r} does not autocommit: its steps "
                    "would stay recorded when what they wrote is rolled back. Leave AUTOCOMMIT on "
                    "in its settings, or call set_autocommit(True) first."
                )

    def leave_thread(self) -> None:
        """Close the connections that Django has opened for this thread."""
        connections.close_all()

    def joined(self, conn: Connection | None) -> Connection | None:
        """Return ``conn``, or Django's connection inside ``transaction.atomic()``.

        Raises:
            ValueError: ``conn`` is Django's connection to another database.
        """
        if conn is None:
            return open_transaction(self.using)
        for wrapper in connections.all(initialized_only=True):
            if wrapper.connection is conn and _place(wrapper.alias) != _place(self.using):
                raise ValueError(
                    f"this connection is to DATABASES[{wrapper.alias!r}], and the store is on "
                    f"{self.using!r}: pass connection({self.using!r}), or for step.transaction "
                    f"Durable(store({self.using!r}), transaction=lambda: atomic({self.using!r}))"
                )
        return conn

    def _open(self) -> ConnectionPool[Any]:
        pool = getattr(connections[self.using], "pool", None)
        if pool is not None:
            pool.open()  # does nothing if it is open; Django may have made a new one since
            self._pool = pool
            return self._pool
        made_for = (*_place(self.using), _in_tests())
        if made_for != self._made_for and self._finalizer is not None:
            # The store was used before the tests began, on the real database.
            self._finalizer()
            self._pool = None
        self._made_for = made_for
        return super()._open()

    def _make(self, kind: type[ConnectionPool[Any]] = ConnectionPool) -> ConnectionPool[Any]:
        # A database with an idle connection cannot be dropped at the end of the tests, and Django
        # has no hook for that moment. So in tests, connections close when they are given back.
        return super()._make(NullConnectionPool if _in_tests() else kind)


def _place(using: str) -> tuple[Any, ...]:
    """Return the settings that identify a database."""
    settings = connections.settings[using]
    return tuple(settings.get(name) for name in ("HOST", "PORT", "NAME"))


def _in_tests() -> bool:
    """Return whether Django's test environment is set up, which adds this attribute."""
    return hasattr(mail, "outbox")


def _conninfo(using: str) -> str:
    """Return Django's settings as a libpq conninfo, without those meant for Django or psycopg."""
    wrapper = connections[using]
    known = {option.keyword.decode() for option in psycopg.pq.Conninfo.get_defaults()}
    params = {k: v for k, v in wrapper.get_connection_params().items() if k in known}
    if role := wrapper.settings_dict["OPTIONS"].get("assume_role"):
        escaped = role.replace("\\", "\\\\").replace(" ", "\\ ")
        params["options"] = f"{params.get('options', '')} -c role={escaped}".strip()
    return make_conninfo("", **params)
