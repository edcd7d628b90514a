"""Codecs: what a step returns as an object comes back as one, and is plain JSON in between."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from enum import IntEnum
from pathlib import Path
from typing import Any, NamedTuple, TypeVar
from uuid import UUID

import psycopg
import pytest
from attrs import frozen
from pydantic import BaseModel, ConfigDict, Field, RootModel

from awaitly_postgres import Durable, NotSerializable, SnapshotFormatError, SnapshotStore, Step
from tests.workers import typed
from tests.workers.typed import CODECS, ITEM, NOON, Colour, Item, Order

T = TypeVar("T")
WORKER = Path(typed.__file__)
ORDER = Order(UUID(int=7), [ITEM, ITEM], None, (1, "x"))


class Size(IntEnum):
    """An enumeration of numbers."""

    LARGE = 3


class Span(NamedTuple):
    """A named tuple."""

    since: date
    until: date


@frozen
class Parcel:
    """An attrs class with an object in it, and keys that are no strings."""

    order: Order
    by_number: dict[int, Item]


class Model(BaseModel):
    """A strict model with an alias."""

    model_config = ConfigDict(strict=True)
    at: datetime = Field(alias="placedAt")
    tags: set[str]
    item: Item


class Tags(RootModel[set[str]]):
    """A model that is a set."""


COMMON: list[tuple[Any, Any]] = [
    (None, None),
    (1, object),
    ("x", T),
    (ORDER, Order),
    ([ITEM, ITEM], list[Item]),
    (ITEM, Item | None),
    (NOON, datetime),
    (NOON.replace(tzinfo=None), datetime),
    (date(2026, 11, 22), date | None),
    (time(12, 30), time),
    (timedelta(days=40, microseconds=3), timedelta),
    (Decimal("1.10"), Decimal),
    (UUID(int=9), UUID),
    (Colour.RED, Colour),
    (Size.LARGE, Size),
    ((1, "a", NOON), tuple[int, str, datetime]),
    (Span(date(2026, 1, 1), date(2026, 2, 1)), Span),
    ({3, 1, 2}, set[int]),
    (frozenset({"b", "a"}), frozenset[str]),
    ({UUID(int=1): NOON}, dict[UUID, datetime]),
    ({1: "one"}, dict[int, str]),
    (b"bytes", bytes),
    (10**30, int),
    (1e300, float),
    ({"a": [1, 2.5, None]}, dict[str, Any]),
]
CASES = {
    "cattrs": [*COMMON, (Parcel(ORDER, {1: ITEM}), Parcel)],
    "pydantic": [
        *COMMON,
        (Model(placedAt=NOON, tags={"a", "b", "c"}, item=ITEM), Model),
        (Tags({"x", "y"}), Tags),
    ],
}


@pytest.fixture(params=CODECS)
def codec(request: pytest.FixtureRequest) -> str:
    """The name of each codec in turn."""
    return request.param


@pytest.fixture
def durable(store: SnapshotStore, codec: str) -> Durable:
    """Durable runs with the codec of this turn."""
    return Durable(store, codec=CODECS[codec]())


def returns(value: Any, type: Any) -> Callable[..., Any]:
    """Make a step function that is annotated with ``type``."""

    def fn(*_: object) -> Any:
        return value

    fn.__annotations__["return"] = type
    return fn


def test_results_are_the_same_objects_at_first_and_on_replay(durable: Durable, codec: str) -> None:
    """Whatever their types, of steps and of transactions."""
    cases = CASES[codec]
    seen: list[list[Any]] = []

    def work(step: Step) -> None:
        steps = [step(f"{i}", returns(*case)) for i, case in enumerate(cases)]
        steps += [step.transaction(f"tx-{i}", returns(*case)) for i, case in enumerate(cases)]
        seen.append(steps)
        if len(seen) == 1:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        durable.run("a", work)
    durable.run("a", work)
    values = [value for value, _ in cases] * 2
    assert seen == [values, values]
    assert [type(v) for v in seen[0] + seen[1]] == [type(v) for v in values * 2]


def start(url: str, codec: str, id: str, seed: int) -> list[str]:
    """Run the worker to its end in a process with a hash seed of its own."""
    done = subprocess.run(
        [sys.executable, str(WORKER), url, codec, id],
        env={**os.environ, "PYTHONHASHSEED": f"{seed}"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_another_process_resumes_with_the_same_objects(
    durable: Durable, url: str, codec: str, db: psycopg.Connection
) -> None:
    """Input, steps and output; sets do not make it another input; the table holds plain JSON."""
    with pytest.raises(InterruptedError):
        durable.run("a", typed.checkout, ITEM, at=NOON)
    ((before,),) = db.execute(
        "SELECT snapshot->'steps'->'make-order'->'value' FROM awaitly_snapshots"
    )
    assert before == {
        "id": "00000000-0000-0000-0000-000000000007",
        "items": [
            {"name": "tea", "price": "4.50", "tags": sorted(ITEM.tags), "colour": "red"},
        ],
        "due": "2026-11-22",
        "numbers": [1, "x"],
    }
    expected = typed.make_order(ITEM, NOON), Decimal("1.10")
    assert start(url, codec, "a", 1) == [typed.told(expected), "['crash-once']"]
    assert start(url, codec, "a", 2) == [typed.told(expected), "[]"]
    assert durable.run("a", typed.checkout, ITEM, at=NOON) == expected


def test_without_an_annotation_a_value_stays_json(durable: Durable) -> None:
    """As JSON it was stored, and as JSON it comes back, at once and later."""
    seen = []

    def work(step: Step, given):  # type: ignore[no-untyped-def]
        seen.append([step("order", lambda: ORDER), given])
        return ITEM

    durable.run("a", work, NOON)
    assert isinstance(durable.run("a", work, NOON), dict)
    ((order, given),) = seen
    assert (order["numbers"], order["items"][0]["price"]) == ([1, "x"], "4.50")
    assert datetime.fromisoformat(given.replace("Z", "+00:00")) == NOON


def test_a_value_that_cannot_be_encoded_is_named_by_step_and_path(durable: Durable) -> None:
    """What was recorded before stays, and the next run tries again."""
    result: list[Any] = [{"lines": [1, {"price": object()}]}]

    def work(step: Step) -> Any:
        step("good", lambda: Decimal(1))
        return step("bad", lambda: result[-1])

    with pytest.raises(NotSerializable) as caught:
        durable.run("a", work)
    assert (caught.value.path, caught.value.subject) == (
        "$.lines[1].price",
        "the result of step 'bad'",
    )
    assert list(durable.store.load("a").steps) == ["good"]
    result.append("now it can")
    assert durable.run("a", work) == "now it can"


def test_a_value_that_cannot_be_decoded_is_named_by_step_and_path(durable: Durable) -> None:
    """It stays as it is in the database, for code that knows how to read it."""
    item = {"name": "tea", "price": "cheap", "tags": [], "colour": "red"}
    calls = []

    def buy() -> Item:
        calls.append(1)
        return item  # type: ignore[return-value]

    def work(step: Step) -> Any:
        return step("buy", buy)

    with pytest.raises(SnapshotFormatError, match=r"steps\['buy'\]\.value: .* @ \$\.price"):
        durable.run("a", work)
    assert durable.store.load("a").steps["buy"].value == item
    buy.__annotations__["return"] = dict[str, Any]
    assert durable.run("a", work) == item
    assert calls == [1]


def test_a_wrong_type_is_refused_and_not_converted(durable: Durable) -> None:
    """A float is no int and a number no text: what a step returned is not silently changed."""
    for value, type in ((1.5, int), (5, str), ("maybe", bool), (1, None)):
        fn = returns(value, type)
        with pytest.raises(SnapshotFormatError, match=r"steps\['a'\]\.value"):
            durable.run(f"{value}-{type}", lambda step, fn=fn: step("a", fn))


def test_a_missing_extra_is_named(codec: str) -> None:
    """When the codec is made, in one line; importing the module needs neither."""
    program = (
        f"import sys; sys.modules['{codec}'] = None\n"
        "from awaitly_postgres import codecs\n"
        f"try: codecs.{codec.capitalize()}Codec()\n"
        "except ImportError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout == (
        f"{codec} is not installed; pip install 'awaitly-postgres[{codec}]'\n"
    ), done.stderr
