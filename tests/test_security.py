"""What somebody who may write to the tables can do to a worker: give it wrong data, never code."""

from __future__ import annotations

import importlib.util
import json
import logging
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest

from awaitly_postgres import (
    AwaitlyError,
    Durable,
    SnapshotStore,
    Step,
    StepFailed,
    postgres,
)

ran: list[str] = []  # code that a row has caused to run


def _ran(what: str) -> Callable[..., Any]:
    def note(*args: Any, **kwargs: Any) -> Any:
        ran.append(what)
        raise RuntimeError(what)

    return note


class Meta(type):
    """A metaclass that notes each look at one of its classes, but for that of ``raise`` itself."""

    armed = False

    def __getattribute__(cls, name: str) -> Any:
        if type.__getattribute__(Meta, "armed"):
            ran.append(f"Meta.__getattribute__({name})")
        return type.__getattribute__(cls, name)

    def __instancecheck__(cls, instance: object) -> bool:
        ran.append("Meta.__instancecheck__")
        return True

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        ran.append("Meta.__call__")
        return type.__call__(cls, *args, **kwargs)

    def __hash__(cls) -> int:
        if type.__getattribute__(Meta, "armed"):
            ran.append("Meta.__hash__")
        return 1

    def __eq__(cls, other: object) -> bool:
        ran.append("Meta.__eq__")
        return cls is other


class Odd(Exception, metaclass=Meta):
    """Everything that might run when an exception is made from the outside."""

    __new__ = _ran("__new__")  # type: ignore[assignment]
    __init__ = _ran("__init__")  # type: ignore[assignment]
    __setattr__ = _ran("__setattr__")  # type: ignore[assignment]
    __setstate__ = _ran("__setstate__")  # type: ignore[assignment]
    __reduce__ = _ran("__reduce__")  # type: ignore[assignment]
    __getattr__ = _ran("__getattr__")
    __dict__ = property(_ran("__dict__"))  # type: ignore[assignment]
    __class__ = property(_ran("__class__"))  # type: ignore[assignment]
    args = property(_ran("args"), _ran("args ="))  # type: ignore[assignment]
    price = property(_ran("price"), _ran("price ="))

    def __str__(self) -> str:
        return "odd"


class Lazy:
    """An object that does something when it is looked at, as proxies and settings do."""

    __class__ = property(_ran("Lazy.__class__"))  # type: ignore[assignment]

    def __getattribute__(self, name: str) -> Any:
        ran.append(f"Lazy.{name}")
        raise RuntimeError(name)


lazy = Lazy()


class Harmless(Exception):
    """One that may be named, with an attribute."""

    cents = 0


@pytest.fixture(autouse=True)
def _nothing_has_run() -> Iterator[None]:
    ran.clear()
    yield
    Meta.armed = False


@pytest.fixture
def replay(durable: Durable, db: psycopg.Connection) -> Callable[..., BaseException]:
    """Put a failed step into the table by hand; return what its replay raises."""

    def fail_and_go_on(step: Step) -> str:
        try:
            step("pay", lambda: None)
        except Exception as error:
            seen.append(error)
        return step("next", lambda: "done")

    seen: list[BaseException] = []

    def replay(exception: Any, cause: Any = None) -> BaseException:
        durable.submit("a", durable.workflow(fail_and_go_on))
        steps = {
            "pay": {
                "ok": False,
                "error": "Odd",
                "cause": cause or {"type": "error", "name": "Odd", "message": "from the table"},
                "meta": {"origin": "throw", "seq": 1, "exception": exception},
            },
            "next": {"ok": True, "value": "done", "meta": {"seq": 2}},
        }
        db.execute(
            "UPDATE awaitly_snapshots SET snapshot = jsonb_set(snapshot, '{steps}', %s::jsonb)",
            (json.dumps(steps),),
        )
        assert durable.run("a", fail_and_go_on) == "done"
        (error,) = seen
        return error

    return replay


def test_a_row_that_names_an_odd_class_runs_none_of_its_code(replay: Any) -> None:
    """Neither its __new__, __init__, properties, __setattr__ nor its metaclass; only its str()."""
    Meta.armed = True
    state = {"price": 1, "args": [1], "__dict__": {}, "__class__": "x", "__setstate__": 1}
    error = replay({"type": f"{__name__}:Odd", "args": ["x", 2], "state": state})
    Meta.armed = False
    assert type(error) is Odd
    assert BaseException.__str__(error) == "('x', 2)"
    assert ran == []


@pytest.mark.parametrize(
    "type",
    [
        f"{__name__}:lazy",
        f"{__name__}:lazy.Odd",
        f"{__name__}:_ran",
        f"{__name__}:Meta",
        f"{__name__}:Odd.__new__",
        f"{__name__}:Odd.price",
        f"{__name__}:",
        "builtins:SystemExit",
        "builtins:KeyboardInterrupt",
        "builtins:eval",
        "builtins:object",
        "builtins:ExceptionGroup",
        "os:system",
        "os:path.join",
        "subprocess:Popen",
        "sys:modules.os.error",
        "",
        ":",
        "a.b:c:d",
        "..:..",
        "x" * 100_000,
        7,
        None,
        [],
        {"module": "os"},
    ],
)
def test_a_row_may_name_loaded_exceptions_and_nothing_else(replay: Any, type: Any) -> None:
    """Whatever else it names, the replay is a StepFailed that tells what was recorded."""
    error = replay({"type": type, "args": [["id"]], "state": {}})
    assert isinstance(error, StepFailed)
    assert "from the table" in str(error)
    assert ran == []


def test_a_row_imports_nothing(replay: Any, monkeypatch: Any, tmp_path: Path) -> None:
    """Neither a module that is not loaded, nor by the __getattr__ of one, nor a lazy one."""
    (tmp_path / "unloaded_module.py").write_text("class Failure(Exception): pass\n")
    (tmp_path / "lazily_loaded.py").write_text("class Failure(Exception): pass\n")
    monkeypatch.syspath_prepend(tmp_path)

    giving = types.ModuleType("giving")
    giving.__getattr__ = _ran("module __getattr__")  # type: ignore[method-assign]
    monkeypatch.setitem(sys.modules, "giving", giving)

    spec = importlib.util.find_spec("lazily_loaded")
    assert spec is not None
    assert spec.loader is not None
    spec.loader = importlib.util.LazyLoader(spec.loader)
    lazily_loaded = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "lazily_loaded", lazily_loaded)
    spec.loader.exec_module(lazily_loaded)

    error = None
    for module in ("unloaded_module", "giving", "lazily_loaded"):
        error = _from_row(module)
        assert isinstance(error, StepFailed)
    assert "unloaded_module" not in sys.modules
    assert "Failure" not in object.__getattribute__(lazily_loaded, "__dict__")
    assert ran == []


def _from_row(module: str) -> BaseException:
    from awaitly_postgres import Workflow

    def again(step: Step) -> BaseException:
        try:
            step("pay", lambda: None)
        except Exception as error:
            return error
        raise AssertionError("it was to fail")

    snapshot = {
        "formatVersion": 1,
        "steps": {
            "pay": {
                "ok": False,
                "error": "x",
                "cause": None,
                "meta": {"seq": 1, "exception": {"type": f"{module}:Failure", "args": []}},
            },
            "next": {"ok": True, "value": 1, "meta": {"seq": 2}},
        },
        "execution": {"status": "running", "lastUpdated": "2026-11-22T10:56:04.184Z"},
    }
    return Workflow(again, snapshot=snapshot, on_drift="ignore")()  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "exception",
    [
        {"type": "builtins:ValueError", "args": "text", "state": {}},
        {"type": "builtins:ValueError", "args": {"0": 1}, "state": {}},
        {"type": "builtins:ValueError", "args": None},
        {"type": f"{__name__}:Harmless", "args": [], "state": [1]},
        {"type": f"{__name__}:Harmless", "args": [], "state": "text"},
        {"type": f"{__name__}:Harmless", "args": [], "state": {"cents": 5, "": 1, "a b": 2}},
        {"type": f"{__name__}:Harmless", "args": [], "state": {"__cause__": 1, "__notes__": 2}},
        {"type": f"{__name__}:Harmless", "args": [], "state": {"__traceback__": {}}},
        {"type": "builtins:OSError", "args": [{}, [], "x", "y", "z", "w"], "state": {}},
        {"type": "builtins:UnicodeDecodeError", "args": [1, 2, 3], "state": {}},
        {"type": "builtins:UnicodeDecodeError", "args": [], "state": {}},
        {"type": "builtins:SyntaxError", "args": ["x", [1, 2, 3, 4]], "state": {}},
        {"type": "builtins:StopIteration", "args": [[]], "state": {}},
        {"type": "builtins:ImportError", "args": [], "state": {"name": {}, "path": []}},
        [],
        "x",
        7,
    ],
)
def test_a_failure_of_nonsense_is_an_ordinary_exception(replay: Any, exception: Any) -> None:
    """It can be printed, logged with its traceback and raised on."""
    error = replay(exception)
    assert isinstance(error, Exception)
    str(error), repr(error)
    logging.getLogger(__name__).error("told", exc_info=error)


@pytest.mark.parametrize(
    "cause",
    [
        {"name": {"a": 1}, "message": ["x"]},
        {"type": "thrown", "stringRepresentation": {"deep": [[[]]]}},
        {"type": "error", "name": "x" * 1_000_000, "message": "y" * 1_000_000},
        {"cause": {"cause": {"cause": {"cause": 1}}}},
    ],
)
def test_a_cause_of_nonsense_is_told_as_it_is(replay: Any, cause: Any) -> None:
    """Large, nested or of another type."""
    assert isinstance(replay({"type": "nowhere:Nothing"}, cause), StepFailed)


def test_a_cause_nested_deeper_than_python_goes_is_a_typed_error(
    durable: Durable, db: psycopg.Connection
) -> None:
    """Or is read, where Python goes as deep: the stack never overflows."""
    durable.submit("a", durable.workflow(lambda step: step("pay", int)))
    nested = '{"cause":' * 5000 + "1" + "}" * 5000
    step = f'{{"ok": false, "error": 1, "cause": {nested}}}'
    edit = "jsonb_set(snapshot, '{steps,pay}', %s::jsonb)"
    db.execute(f"UPDATE awaitly_snapshots SET snapshot = {edit}", (step,))
    outcome = durable.try_resume("a")
    assert outcome.status == "completed" or isinstance(outcome.error, AwaitlyError)


INJECTION = [
    "a'; DROP TABLE awaitly_snapshots; --",
    'a"; DROP TABLE awaitly_snapshots; --',
    "a%s",
    "%(id)s",
    "a$$b",
    "\\'; SELECT pg_sleep(10)",
    "a\nb",
    "{id}",
    "/*filters*/",
]


@pytest.mark.parametrize("text", INJECTION)
def test_ids_keys_and_values_reach_the_server_as_parameters(
    store: SnapshotStore, text: str
) -> None:
    """SQL in them is text; so it is in prefixes, listings, signals and locks."""
    durable = Durable(store)
    assert durable.run(text, lambda step: step(text, lambda: text)) == text
    assert [info.id for info in store.list(text)] == [text]
    assert store.load(text).steps[text].value == text
    assert not durable.signal(text, text, text)
    with store.lock(f"lock {text}"):
        assert store.stats().total == 1
    assert store.delete(text)


@pytest.mark.parametrize("name", [*INJECTION, "", "a b", "a.b", "a-b", "é", "1a", "a" * 49, "a\0"])
@pytest.mark.parametrize("what", ["table", "lock_table", "schema"])
def test_names_of_tables_are_words_or_refused(name: str, what: str) -> None:
    """They are the only thing that becomes part of a statement's text."""
    with pytest.raises(ValueError, match=what):
        postgres("postgresql://localhost/x", **{what: name})  # type: ignore[arg-type]
