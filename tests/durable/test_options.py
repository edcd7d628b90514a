"""What is wrong about a `Durable` or a workflow function is said where it is written."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from types import MappingProxyType
from typing import Any

import pytest

from awaitly_postgres import Durable, NotSerializable, Step, postgres
from awaitly_postgres.codecs import CattrsCodec


@pytest.fixture
def durable() -> Iterator[Durable]:
    """One whose database nobody asks for anything."""
    with postgres("postgresql://nowhere.invalid") as store:
        yield Durable(store)


def work(step: Step) -> None: ...


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"on_event": 5}, TypeError, "on_event must be a function, not 5"),
        ({"transaction": 5}, TypeError, "transaction must be a function, not 5"),
        ({"codec": 5}, TypeError, r"codec must be an object with encode\(\) and decode\(\)"),
        ({"metadata": 5}, TypeError, "metadata must be a mapping, not 5"),
        ({"metadata": [("a", 1)]}, TypeError, "metadata must be a mapping"),
        ({"metadata": {"a": object()}}, NotSerializable, "metadata="),
        ({"lock_ttl": 0}, ValueError, "^lock_ttl must be more than 0"),
        ({"lock_ttl": "30"}, TypeError, "^lock_ttl must be in seconds, not str"),
    ],
)
def test_a_wrong_option_is_refused_at_once(
    durable: Durable, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    """By its name; a codec that is none would fail with the first result."""
    with pytest.raises(error, match=message):
        Durable(durable.store, **options)
    if "metadata" in options:
        with pytest.raises(error, match=message):
            durable.with_options(**options)


def test_options_that_look_unusual_are_taken(durable: Durable) -> None:
    """Any mapping is metadata, a class can stand for a function, and a codec can be its class."""
    given = MappingProxyType({"a": 1})
    other = Durable(durable.store, metadata=given, on_event=print, codec=CattrsCodec())
    assert other.with_options(metadata=given).metadata == {"a": 1}


@pytest.mark.parametrize(
    ("name", "error"),
    [(5, TypeError), ("", ValueError), ("a\0b", ValueError), ("\ud800", ValueError)],
)
def test_a_name_that_cannot_be_stored_is_refused(
    durable: Durable, name: Any, error: type[Exception]
) -> None:
    """Listing what is pending names all workflows, so one such name would break every pass."""
    with pytest.raises(error, match="name"):
        durable.workflow(name=name)


def yields(step: Step) -> Iterator[int]:
    yield step("a", int)


async def is_async(step: Step) -> None: ...


async def is_async_and_yields(step: Step) -> Any:
    yield 1


def takes_nothing() -> None: ...


def takes_the_step_by_name(*, step: Step) -> None: ...


@pytest.mark.parametrize(
    ("fn", "message"),
    [
        (yields, "'yields' is a generator"),
        (functools.partial(yields), "is a generator"),
        (is_async, "'is_async' is async"),
        (is_async_and_yields, "is async"),
        (takes_nothing, "'takes_nothing' takes no positional argument"),
        (takes_the_step_by_name, "takes no positional argument"),
        ("work", "must be a function, not 'work'"),
    ],
)
def test_a_function_that_is_no_workflow_is_refused(
    durable: Durable, fn: Callable[..., Any], message: str
) -> None:
    """Where it is decorated, and where it is run without being registered."""
    with pytest.raises(TypeError, match=message):
        durable.workflow(fn)
    with pytest.raises(TypeError, match=message):
        durable.run("a", fn)


def test_any_function_that_takes_a_step_is_a_workflow(durable: Durable) -> None:
    """Bound, partial, a class, an object, with defaults or with any arguments."""

    class Shop:
        def checkout(self, step: Step) -> None: ...

        def __call__(self, step: Step) -> None: ...

    class Order:
        def __init__(self, step: Step, id: int = 1) -> None: ...

    for nr, fn in enumerate(
        [
            Shop().checkout,
            Shop(),
            Order,
            functools.partial(work),
            functools.partial(lambda step, n: None, n=1),
            lambda *args: None,
            lambda step=None, /, *, a=1: None,
        ]
    ):
        assert durable.workflow(name=f"w{nr}")(fn) is fn


@pytest.mark.parametrize("call", ["run", "submit", "submit_many"])
@pytest.mark.parametrize(
    ("args", "error", "message"),
    [
        ((), TypeError, "workflow 'mail', run 'mail-7': missing a required argument: 'to'"),
        ((object(),), NotSerializable, r"the input of 'mail-7': \$.args\[0\] cannot be stored"),
    ],
)
def test_arguments_are_refused_by_the_id_of_the_run(
    durable: Durable, call: str, args: tuple[Any, ...], error: type[Exception], message: str
) -> None:
    """Of ten thousand, one has to be found."""

    @durable.workflow
    def mail(step: Step, to: str) -> None: ...

    calls: dict[str, Callable[[], object]] = {
        "run": lambda: durable.run("mail-7", mail, *args),
        "submit": lambda: durable.submit("mail-7", mail, *args),
        "submit_many": lambda: durable.submit_many(mail, {"mail-6": ("ada",), "mail-7": args}),
    }
    with pytest.raises(error, match=message):
        calls[call]()
