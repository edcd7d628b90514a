"""What the tests of the Django app share: the example shop, as its users and its cron use it."""

from __future__ import annotations

import os
import subprocess
import sys
import uuid
from types import SimpleNamespace
from typing import Any

import pytest

from tests.support import EXAMPLES, ROOT

SHOP = EXAMPLES / "django_shop"
PAST = "2026-01-01T00:00:00.000Z"


def manage(url: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the shop's manage.py."""
    return subprocess.run(
        [sys.executable, str(SHOP / "manage.py"), *arguments],
        env={**os.environ, "DATABASE_URL": url, "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
        timeout=60,
    )


def alias(monkeypatch: pytest.MonkeyPatch, name: str, **changes: Any) -> None:
    """Add another entry to ``DATABASES``, like the default one but for some changes."""
    from django.db import connections

    default = connections.settings["default"]
    options = {**default["OPTIONS"], **changes.pop("OPTIONS", {})}
    monkeypatch.setitem(connections.settings, name, {**default, **changes, "OPTIONS": options})


def order(shop: SimpleNamespace, quantity: int = 1, id: uuid.UUID | None = None) -> str:
    """Buy tea as a browser does; return the order's id."""
    from django.test import Client

    id = id or uuid.uuid4()
    form = {"product": shop.tea.pk, "quantity": quantity}
    assert Client().post(f"/orders/{id}", form).status_code == 302
    return str(id)


def stock(shop: SimpleNamespace) -> int:
    """How much tea is left."""
    return shop.db.execute("SELECT stock FROM shop_product").fetchone()[0]


def payments(shop: SimpleNamespace) -> list[str]:
    """What is noted on the orders."""
    return [payment for (payment,) in shop.db.execute("SELECT payment FROM shop_order")]


def resume(shop: SimpleNamespace) -> subprocess.CompletedProcess[str]:
    """Do what cron does."""
    return manage(shop.url, "resume_workflows")
