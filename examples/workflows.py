"""The workflows of a small shop. Every process that runs or resumes them imports this module."""

from awaitly_postgres import Durable, Step

LIMIT = 1000


class CardDeclined(Exception):
    """The bank declined the payment."""


def charge_card(user: str, amount: int) -> str:
    if amount > LIMIT:
        raise CardDeclined(f"{user} may spend {LIMIT}, not {amount}")
    return f"paid-{user}-{amount}"


def create_order(user: str, payment: str) -> dict:
    return {"user": user, "payment": payment}


def checkout(step: Step, user: str, amount: int) -> dict:
    payment = step("charge-card", charge_card, user, amount)
    return step("create-order", create_order, user, payment)


def register(durable: Durable) -> None:
    """Register these workflows with ``durable``, so that it can resume them."""
    durable.workflow(checkout, version=1)
