"""The workflow of an order after it was accepted."""

from django.db.models import F

from awaitly_postgres import Durable, Step
from awaitly_postgres.contrib.django import atomic, store

from .models import Order, Product

durable = Durable(store(), transaction=atomic)


@durable.workflow(version=1)
def checkout(step: Step, order_id: str) -> dict:
    """Take the stock, charge the card, note the payment, pack the parcels."""
    quantity, cents = step.transaction("take-stock", take_stock, order_id)
    payment = step("charge-card", charge_card, cents, step.idempotency_key("charge-card"))
    step.transaction("note-payment", note_payment, order_id, payment)
    parcels = step.map("pack", lambda number: pack(order_id, number), range(1, quantity + 1))
    return {"order": order_id, "cents": cents, "payment": payment, "parcels": parcels}


def take_stock(conn, order_id: str) -> list[int]:
    """Decrement the stock through the ORM, in the transaction that records the step."""
    order = Order.objects.select_related("product").get(pk=order_id)
    Product.objects.filter(pk=order.product_id).update(stock=F("stock") - order.quantity)
    return [order.quantity, order.quantity * order.product.cents]


def charge_card(cents: int, idempotency_key: str) -> str:
    """Stand in for a payment provider, which charges once for each idempotency key."""
    return f"paid {cents / 100:.2f} for {idempotency_key}"


def note_payment(conn, order_id: str, payment: str) -> None:
    """Store the receipt with the order."""
    Order.objects.filter(pk=order_id).update(payment=payment)


def pack(order_id: str, number: int) -> str:
    """Stand in for whoever packs the parcels, several at once."""
    return f"{order_id}/{number}"
