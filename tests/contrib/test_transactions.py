"""Django cannot lose what a step has done: blocks around steps, hooks after a commit, threads."""

from __future__ import annotations

import gc
import uuid
from types import SimpleNamespace

import psycopg
import pytest

from awaitly_postgres import Durable, Step
from tests.support import eventually


def order(shop: SimpleNamespace) -> str:
    made = shop.models.Order.objects.create(id=uuid.uuid4(), product=shop.tea, quantity=1)
    return str(made.pk)


@pytest.mark.parametrize("kind", ["step", "map", "transaction"])
def test_steps_are_refused_inside_an_atomic_block_of_the_workflow(
    shop: SimpleNamespace, kind: str
) -> None:
    """The block's rollback would undo what they wrote, and a replay would skip them."""
    from django.db import transaction

    durable = Durable(shop.workflows.durable.store, transaction=shop.workflows.atomic)

    def work(step: Step) -> object:
        with transaction.atomic():
            if kind == "map":
                return step.map("insert", lambda item: order(shop), range(2))
            if kind == "transaction":
                return step.transaction("insert", lambda conn: order(shop))
            return step("insert", order, shop)

    with pytest.raises(RuntimeError, match="cannot run inside"):
        durable.run("a", work)
    assert not shop.models.Order.objects.exists()
    assert dict(durable.store.load("a").steps) == {}


def test_a_run_is_refused_where_django_does_not_autocommit(shop: SimpleNamespace) -> None:
    """Nothing would commit what its steps write."""
    from django.db import transaction

    durable = Durable(shop.workflows.durable.store)
    transaction.set_autocommit(False)
    try:
        with pytest.raises(RuntimeError, match="does not autocommit"):
            durable.run("a", lambda step: step("insert", order, shop))
    finally:
        transaction.rollback()
        transaction.set_autocommit(True)
    assert durable.get("a") is None


def test_a_hook_that_fails_after_the_commit_does_not_undo_the_record(
    shop: SimpleNamespace,
) -> None:
    """Its IntegrityError is not the COMMIT's: the order is there, and is made once."""
    from django.db import IntegrityError, transaction

    durable = Durable(shop.workflows.durable.store, transaction=shop.workflows.atomic)

    def insert(conn: psycopg.Connection) -> str:
        made = order(shop)
        again = shop.models.Order(id=made, product=shop.tea, quantity=1)
        transaction.on_commit(lambda: again.save(force_insert=True))
        return made

    def work(step: Step) -> str:
        return step.transaction("insert", insert)

    with pytest.raises(IntegrityError):
        durable.run("a", work)
    assert durable.run("a", work) == str(shop.models.Order.objects.get().pk)


def test_the_threads_of_a_map_leave_no_connection_behind(shop: SimpleNamespace) -> None:
    """Django opens one for each thread that uses the ORM."""
    durable = Durable(shop.workflows.durable.store)

    def names(item: int) -> str:
        return shop.models.Product.objects.get(pk=shop.tea.pk).name

    sessions = "SELECT count(*)::int FROM pg_stat_activity WHERE query LIKE '%shop_product%'"
    sessions += " AND pid <> pg_backend_pid()"
    shop.models.Product.objects.get(pk=shop.tea.pk)  # this thread's
    (before,) = shop.db.execute(sessions).fetchone()
    gc.disable()  # it would close them, sooner or later
    try:
        durable.run("a", lambda step: step.map("names", names, range(20), workers=5))
        eventually(lambda: shop.db.execute(sessions).fetchone() == (before,), "the end of theirs")
    finally:
        gc.enable()
