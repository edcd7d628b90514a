"""The store on Django's database, and durable runs over the ORM.

Put ``"awaitly_postgres.contrib.django"`` into ``INSTALLED_APPS``: ``migrate`` then makes the
tables, ``resume_workflows`` finishes what is pending, and the admin shows it. In a module of yours:

    from awaitly_postgres import Durable
    from awaitly_postgres.contrib.django import atomic, connection, store

    durable = Durable(store(), transaction=atomic)

    with transaction.atomic():                       # in a view: accepted if the block commits
        durable.submit("checkout-1", checkout, 1, conn=connection())

    step.transaction("take-stock", take_stock, 1)    # in a workflow: the ORM is in the transaction
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import attrs
import django.db
import psycopg
from django.core.exceptions import ImproperlyConfigured
from django.db import connections
from django.db import transaction as transactions
from psycopg.conninfo import make_conninfo
from psycopg_pool import ConnectionPool

from ...store.database import Connection
from ...store.pool import OwnPool
from ...store.postgres import postgres
from ...store.store import SnapshotStore

__all__ = ["atomic", "connection", "store"]


def store(using: str = "default", **options: Any) -> SnapshotStore:
    """Make a `SnapshotStore` on the database that Django's settings call ``using``.

    It has a pool of its own, so that a checkpoint is committed whatever the view's transaction
    does; or it takes connections from Django's own pool where ``OPTIONS["pool"]`` asks for one
    (Django 5.1+), which then needs two for each thread. The settings are read at first use, so
    tests run on the test database.

    Args:
        using: the alias in ``DATABASES``.
        options: those of `postgres`. ``auto_create_table`` is off: ``migrate`` makes the tables.
    """
    wrapper = connections[using]
    if wrapper.vendor != "postgresql":
        raise ImproperlyConfigured(f"the database {using!r} is {wrapper.vendor}, not PostgreSQL")
    # Django's reason to turn prepared statements off, a pooler in between, is seen at connecting.
    kwargs = {k: v for k, v in wrapper.settings_dict["OPTIONS"].items() if k == "prepare_threshold"}
    kwargs |= options.pop("kwargs", None) or {}
    sizes = {name: options.pop(name) for name in ("min_size", "max_size") if name in options}
    pool = _DjangoPool(lambda: _conninfo(using), kwargs=kwargs, using=using, **sizes)
    return postgres(pool=pool, **{"auto_create_table": False, **options})


def connection(using: str = "default") -> Connection:
    """Return Django's psycopg connection, for ``conn=``: what is done there joins ``atomic()``."""
    wrapper = connections[using]
    wrapper.ensure_connection()
    return cast(Connection, wrapper.connection)


@contextmanager
def atomic(using: str = "default") -> Iterator[Connection]:
    """Open a transaction for ``step.transaction`` on Django's connection: the ORM works inside.

    For ``Durable(transaction=atomic)``. Raises RuntimeError inside ``transaction.atomic()``, where
    nothing would be committed.
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
                    "nothing to record; raise an exception of your own, or return"
                )
    except django.db.Error as error:
        # Opening is tried again while the server is away, which takes psycopg's own error.
        if opened or not isinstance(error.__cause__, psycopg.Error):
            raise
        raise error.__cause__ from error


@attrs.define(eq=False)
class _DjangoPool(OwnPool):
    """Django's own pool where its settings ask for one, else one by its settings; at first use."""

    using: str = attrs.field(kw_only=True)

    def refuse_to_run_here(self) -> None:
        """Raise inside a transaction of Django's: its rollback would undo what steps have done."""
        for wrapper in connections.all(initialized_only=True):
            if wrapper.in_atomic_block:
                raise RuntimeError(
                    f"a workflow cannot run inside transaction.atomic() on {wrapper.alias!r} (or "
                    "ATOMIC_REQUESTS, or a TestCase): its steps would stay recorded when what they "
                    "wrote is rolled back. Call submit(..., conn=connection()) here and let "
                    "resume_workflows run it, or decorate the view with non_atomic_requests; test "
                    "it in a TransactionTestCase."
                )

    def _open(self) -> ConnectionPool[Any]:
        pool = getattr(connections[self.using], "pool", None)
        if pool is None:
            return super()._open()
        pool.open()  # which does nothing but the first time; Django may have made a new one
        self._pool = pool
        return self._pool


def _conninfo(using: str) -> str:
    """Write Django's settings as libpq's, leaving out what is meant for Django or for psycopg."""
    wrapper = connections[using]
    known = {option.keyword.decode() for option in psycopg.pq.Conninfo.get_defaults()}
    params = {k: v for k, v in wrapper.get_connection_params().items() if k in known}
    if role := wrapper.settings_dict["OPTIONS"].get("assume_role"):
        escaped = role.replace("\\", "\\\\").replace(" ", "\\ ")
        params["options"] = f"{params.get('options', '')} -c role={escaped}".strip()
    return make_conninfo("", **params)
