"""``manage.py test``: the shop's tests, some of which crash its workflow wherever it can die."""

import uuid

from django.test import TestCase, TransactionTestCase

from awaitly_postgres.contrib.django import connection
from awaitly_postgres.testing import crash_everywhere, drain

from .models import Order, Product
from .workflows import checkout, durable


def tea() -> Product:
    """Something to buy."""
    return Product.objects.create(name="Tea", cents=450, stock=10)


class OrderTest(TestCase):
    """What happens in the request."""

    def test_an_order_is_accepted_and_shown(self) -> None:
        """Its workflow is submitted with it; a second click changes nothing."""
        page, form = f"/orders/{uuid.uuid4()}", {"product": tea().pk, "quantity": 2}
        for _ in range(2):
            self.assertContains(self.client.post(page, form, follow=True), "pending")
        assert Order.objects.get().quantity == 2

    def test_wherever_the_checkout_dies_the_stock_is_taken_once(self) -> None:
        """The bodies run again, the transactions do not."""
        order = Order.objects.create(pk=uuid.uuid4(), product=tea(), quantity=2)
        ran = crash_everywhere(checkout, str(order.pk), conn=connection())
        assert "charge-card" in ran


class CheckoutTest(TransactionTestCase):
    """What happens in the worker."""

    def test_the_worker_finishes_an_order(self) -> None:
        """It takes the stock, notes the payment, and packs."""
        order = Order.objects.create(pk=uuid.uuid4(), product=tea(), quantity=2)
        durable.submit(f"checkout-{order.pk}", checkout, str(order.pk))
        (outcome,) = drain(durable)
        assert outcome.result["parcels"] == [f"{order.pk}/1", f"{order.pk}/2"]
        order.refresh_from_db()
        assert (order.product.stock, bool(order.payment)) == (8, True)
