"""The example shop in this process, migrated into a schema of the tests' own."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import psycopg
import pytest
from psycopg.conninfo import make_conninfo

from tests.contrib.project import SHOP

pytest.importorskip("django")


def _skip_if_django_refuses(server: str) -> None:
    """Django 5.2 wants PostgreSQL 14, 4.2 wants 12."""
    import django
    from django.db.backends.postgresql.features import DatabaseFeatures

    wanted = DatabaseFeatures.minimum_database_version[0]
    with psycopg.connect(server) as conn:
        found = conn.info.server_version // 10_000
    if found < wanted:
        pytest.skip(f"Django {django.__version__} wants PostgreSQL {wanted}, this is {found}")


@pytest.fixture(scope="session")
def site(server: str) -> Iterator[SimpleNamespace]:
    """The shop's project. Django can be set up once in a process."""
    _skip_if_django_refuses(server)
    schema = f"test_{secrets.token_hex(6)}"
    level = r"-c default_transaction_isolation=read\ committed"  # its views are made for this one
    url = make_conninfo(server, options=f"-c search_path={schema} {level}")
    with psycopg.connect(server, autocommit=True) as admin, pytest.MonkeyPatch.context() as path:
        admin.execute(f"CREATE SCHEMA {schema}")
        path.syspath_prepend(str(SHOP))
        with pytest.MonkeyPatch.context() as environment:
            environment.setenv("DATABASE_URL", url)
            environment.setenv("DJANGO_SETTINGS_MODULE", "shop.settings")
            import django
            from django.core.management import call_command
            from django.db import connections

            django.setup()
        call_command("migrate", verbosity=0)
        from shop import models, workflows

        from awaitly_postgres.contrib.django import shared_store

        yield SimpleNamespace(url=url, models=models, workflows=workflows)
        for store in (workflows.durable.store, shared_store("default")):
            store.close()
        connections.close_all()
        admin.execute(f"DROP SCHEMA {schema} CASCADE")


@pytest.fixture
def shop(site: SimpleNamespace) -> Iterator[SimpleNamespace]:
    """The shop with ten packets of tea and nothing ordered."""
    from django.db import connections

    tea = site.models.Product.objects.create(name="Tea", cents=450, stock=10)
    with psycopg.connect(site.url, autocommit=True) as db:
        yield SimpleNamespace(**vars(site), tea=tea, db=db)
        tables = "shop_order, shop_product, awaitly_snapshots, awaitly_snapshots_steps"
        db.execute(f"TRUNCATE {tables}, awaitly_workflow_lock, auth_user, django_admin_log CASCADE")
    connections["default"].close()


@pytest.fixture
def admin(shop: SimpleNamespace) -> Any:
    """A test client that an administrator has logged in with."""
    from django.contrib.auth import get_user_model
    from django.test import Client

    client = Client()
    client.force_login(get_user_model().objects.create_superuser("admin"))
    return client
