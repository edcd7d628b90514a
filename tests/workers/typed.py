"""A workflow of typed values, and a process that runs it: ``typed.py CONNINFO CODEC ID``.

It prints what came out, and which steps ran here.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from datetime import date, datetime, timezone
from decimal import Decimal
from enum import Enum
from uuid import UUID

from awaitly_postgres import Durable, Step, postgres
from awaitly_postgres.codecs import CattrsCodec, PydanticCodec

CODECS = {"cattrs": CattrsCodec, "pydantic": PydanticCodec}


class Colour(Enum):
    """An enumeration."""

    RED = "red"


@dataclass
class Item:
    """What is bought. Its tags come in another order in each process."""

    name: str
    price: Decimal
    tags: frozenset[str]
    colour: Colour


@dataclass
class Order:
    """What is made of it."""

    id: UUID
    items: list[Item]
    due: date | None
    numbers: tuple[int, str]


ITEM = Item("tea", Decimal("4.50"), frozenset({"hot", "green", "loose", "fair"}), Colour.RED)
NOON = datetime(2026, 11, 22, 12, 0, 0, 123456, tzinfo=timezone.utc)
ran: list[str] = []


def make_order(item: Item, at: datetime) -> Order:
    """Put an item into an order."""
    ran.append("make-order")
    return Order(UUID(int=7), [item], at.date(), (1, "x"))


def crash_once(ready: bool) -> Decimal:
    """Stand between the first run and its replay."""
    if not ready:
        raise InterruptedError
    ran.append("crash-once")
    return Decimal("1.10")


def checkout(step: Step, item: Item, *, at: datetime) -> tuple[Order, Decimal]:
    """Take and give objects."""
    order = step("make-order", make_order, item, at)
    return order, step("crash-once", crash_once, sys.argv[0] == __file__)


def told(result: tuple[Order, Decimal]) -> str:
    """Write a result the same in each process."""
    order, fee = result
    tags = [sorted(item.tags) for item in order.items]
    return f"{order.id!r} {order.due!r} {order.numbers!r} {tags!r} {order.items[0].price!r} {fee!r}"


if __name__ == "__main__":
    _, url, codec, id = sys.argv
    with postgres(url) as store:
        print(told(Durable(store, codec=CODECS[codec]()).run(id, checkout, ITEM, at=NOON)))
    print(ran)
