"""What a value becomes on its way through JSONB, or why it is refused."""

from __future__ import annotations

import json
from collections import OrderedDict, namedtuple
from collections.abc import Iterator
from datetime import datetime, timedelta, timezone
from enum import IntEnum
from typing import Any

import psycopg
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from awaitly_postgres import (
    Durable,
    NotSerializable,
    SnapshotStore,
    Workflow,
    WorkflowSnapshot,
    _json,
)

# All examples of a property share one schema and connection; each overwrites the same row.
with_database = settings(
    deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
in_memory = settings(deadline=None, max_examples=500)

Point = namedtuple("Point", "x y")
Colour = IntEnum("Colour", ["RED", "BLUE"])


class Text(str):
    """A string of somebody's own class."""

    __slots__ = ()


texts = st.text(max_size=8) | st.text("a\0\ud800\udfff\x7f\u2028\\\"'\U0010ffffé", max_size=4)
storable = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=5)
floats = st.floats() | st.sampled_from([1e15, 1e16, 1.5e300, 5e-324, -0.0, -1e-7, 1e-16, 1e22])
plain = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(min_value=-(10**400), max_value=10**400)
    | floats.filter(lambda x: x == x and abs(x) != float("inf"))
    | storable
)
odd = (
    plain
    | floats
    | texts
    | texts.map(Text)
    | st.sampled_from([b"", Colour.RED, Point(1, 2.0), frozenset(), timedelta(1)])
)


def containers(items: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    keys = texts | st.integers(0, 9) | st.none() | texts.map(Text)
    return (
        st.lists(items, max_size=5)
        | st.lists(items, max_size=3).map(tuple)
        | st.dictionaries(texts, items, max_size=5)
        | st.dictionaries(keys, items, max_size=5)
        | st.dictionaries(texts, items, max_size=3).map(OrderedDict)
    )


anything = st.recursive(odd, containers, max_leaves=20)
json_values = st.recursive(
    plain,
    lambda items: st.lists(items, max_size=5) | st.dictionaries(storable, items, max_size=6),
    max_leaves=25,
)


def nested(depth: int) -> Any:
    value: Any = 0
    for _ in range(depth):
        value = [value]
    return value


def circular() -> list[Any]:
    value: list[Any] = [1]
    value.append({"again": value})
    return value


def holding(value: Any) -> dict[str, Any]:
    """The JSON of a snapshot with one step that has returned ``value``."""
    return {
        "formatVersion": 1,
        "steps": {"k": {"ok": True, "value": value}},
        "execution": {"status": "running", "lastUpdated": "2026-11-22T10:56:04.184Z"},
    }


def exactly(value: Any) -> str:
    """Tell apart what ``==`` does not: 1 and 1.0, 0.0 and -0.0, orders of keys."""
    return repr(value)


def encoded(value: Any) -> str | None:
    try:
        return _json.dumps(value)
    except NotSerializable:
        return None


@with_database
@given(value=anything)
@example(value={"bb": 1, "a": 2, "é": 3, "": 4})
@example(value=[1e16, -0.0, 5e-324, 1.5e300, -1e22, 123456789012345680.0])
def test_postgresql_gives_back_what_as_stored_says(db: psycopg.Connection, value: Any) -> None:
    """Types of numbers, signs and the order of keys included."""
    text = encoded(value)
    if text is not None:
        (given_back,) = db.execute("SELECT %s::jsonb::text", [text]).fetchone()
        assert exactly(_json.as_stored(text)) == exactly(json.loads(given_back))


@with_database
@given(value=anything)
def test_a_value_replays_as_the_first_run_had_it_or_is_refused(
    store: SnapshotStore, value: Any
) -> None:
    """Through a step, a save, a load and a replay; a refused one leaves the stored row alone."""
    run = Workflow(lambda step: step("k", lambda: value), name="w")
    if encoded(value) is None:
        store.save("id", holding("before"))
        with pytest.raises(NotSerializable, match="result of step 'k'"):
            run()
        with pytest.raises(NotSerializable, match=r"steps\.k\.value"):
            store.save("id", holding(value))
        assert store.load("id") == WorkflowSnapshot.from_json(holding("before"))
    else:
        first = run()
        store.save("id", run.snapshot())
        replay = Workflow(lambda step: step("k", pytest.fail), name="w", snapshot=store.load("id"))
        assert exactly(replay()) == exactly(first)


@in_memory
@given(value=json_values)
def test_plain_json_is_never_refused(value: Any) -> None:
    """And comes back equal, whatever the order of its keys."""
    assert _json.as_stored(_json.dumps(value)) == value


@pytest.fixture(scope="module")
def connection(server: str) -> Iterator[psycopg.Connection[Any]]:
    with psycopg.connect(server, autocommit=True) as conn:
        yield conn


@settings(max_examples=60, deadline=None)
@given(
    document=st.dictionaries(storable, json_values, max_size=4),
    steps=st.dictionaries(storable, json_values, max_size=4),
)
def test_what_the_server_has_written_is_read_with_the_text_of_each_step(
    connection: psycopg.Connection[Any], document: Any, steps: Any
) -> None:
    """As the server writes objects, aggregated ones too; the text of a step decodes to the step."""
    document["steps"] = steps
    written, aggregated = connection.execute(
        "SELECT %(document)s::jsonb::text, "
        "(SELECT json_object_agg(key, value)::text FROM jsonb_each(%(document)s::jsonb->'steps'))",
        {"document": _json.dumps(document)},
    ).fetchone()
    for members, texts in (
        _json.loads_members(aggregated or "{}"),
        _json.loads_members("{ }"),
        (_json.loads_document(written)[0]["steps"], _json.loads_document(written)[1]),
    ):
        assert {key: _json.loads(text) for key, text in texts.items()} == members
        assert exactly(members) in (exactly(_json.loads(written)["steps"]), "{}")
    assert exactly(_json.loads_document(written)[0]) == exactly(_json.loads(written))


@in_memory
@given(value=anything)
def test_the_fast_way_writes_what_the_definition_writes(value: Any) -> None:
    """Or refuses the same thing for the same reason."""

    def outcome(write: Any) -> object:
        try:
            return write(value, "$")
        except NotSerializable as refused:
            return refused.path, refused.reason

    assert outcome(_json.dumps) == outcome(_json._write)


@in_memory
@given(
    parts=st.lists(st.integers(0, 3) | storable, max_size=6),
    culprit=st.sampled_from([float("nan"), "\0", "\ud800", b"x", {1: 2}, set()]),
)
def test_the_path_leads_to_the_value_that_does_not_fit(
    parts: list[int | str], culprit: Any
) -> None:
    """However deep it lies, and among however many that do."""
    value, path = culprit, "$"
    for part in reversed(parts):
        value = [0] * part + [value] if isinstance(part, int) else {"x" * 9: 0, part: value}
    for part in parts:
        named = isinstance(part, str) and part.isidentifier()
        path += f".{part}" if named else f"[{part!r}]"
    with pytest.raises(NotSerializable) as refused:
        _json.dumps(value)
    assert refused.value.path == path


KEPT = [
    pytest.param(1e16, "1e+16", id="1e16"),
    pytest.param(1.5e300, "1.5e+300", id="1.5e300"),
    pytest.param(5e-324, "5e-324", id="5e-324"),
    pytest.param(-0.0, "0.0", id="minus zero"),
    pytest.param(1.0, "1.0", id="1.0"),
    pytest.param(2**70, str(2**70), id="2**70"),
    pytest.param(10**4299, str(10**4299), id="an integer of 4,300 digits"),
    pytest.param((1, (2,)), "[1, [2]]", id="tuple"),
    pytest.param(Point(1, 2), "[1, 2]", id="namedtuple"),
    pytest.param(Colour.BLUE, "2", id="IntEnum"),
    pytest.param(Text("é😀"), "'é😀'", id="subclass of str"),
    pytest.param({"bb": 1, "b": 2, "a": 3}, "{'a': 3, 'b': 2, 'bb': 1}", id="order of keys"),
    pytest.param("\\u0000", r"'\\u0000'", id="a NUL's escape as text"),
    pytest.param("-0.0 and e+", "'-0.0 and e+'", id="text that looks like a float"),
    pytest.param(nested(240), repr(nested(240)), id="240 levels"),
]


@pytest.mark.parametrize(("value", "stored"), KEPT)
def test_a_value_that_fits_is_what_a_durable_run_and_its_resume_see(
    durable: Durable, value: Any, stored: str
) -> None:
    """The step's first result, the result it replays, and the run's output are one value."""
    seen = []

    def workflow(step: Any) -> Any:
        seen.append(step("k", lambda: value))
        if len(seen) == 1:
            raise RuntimeError("stop here once")
        return value

    with pytest.raises(RuntimeError):
        durable.run("id", workflow)
    output = durable.run("id", workflow)
    again = durable.run("id", workflow)
    assert [exactly(each) for each in (*seen, output, again)] == [stored] * 4


REFUSED = [
    pytest.param({"a": float("nan")}, "$.a", "nan is not", id="NaN"),
    pytest.param([float("inf")], "$[0]", "inf is not", id="infinity"),
    pytest.param({"a": ["x\0"]}, "$.a[0]", "NUL", id="NUL in a value"),
    pytest.param({"a\0b": 1}, r"$['a\x00b']", "NUL", id="NUL in a key"),
    pytest.param({"a": "\ud800"}, "$.a", "lone surrogate", id="lone surrogate"),
    pytest.param({"\udc00": 1}, r"$['\udc00']", "lone surrogate", id="lone surrogate in a key"),
    pytest.param({"a": {1: 2}}, "$.a", "key 1 is not a string", id="int key"),
    pytest.param({"a": {None: 2}}, "$.a", "key None is not a string", id="None key"),
    pytest.param({"a b": b"x"}, "$['a b']", "type bytes", id="bytes"),
    pytest.param(
        {"user": {"created_at": datetime.now(timezone.utc)}},
        "$.user.created_at",
        "datetime.datetime",
        id="datetime",
    ),
    pytest.param([{1, 2}], "$[0]", "type set", id="set"),
    pytest.param(object, "$", "type type", id="class"),
    pytest.param([10**5000], "$[0]", "4,300 digits", id="an integer of 5,000 digits"),
    pytest.param(circular(), "$[1].again", "contains itself", id="circular list"),
    pytest.param(nested(5000), "$[0][0][0]", "nested", id="depth 5,000"),
    pytest.param(nested(241), "$[0][0][0]", "nested more than 240", id="depth 241"),
]


@pytest.mark.parametrize(("value", "path", "reason"), REFUSED)
def test_a_step_result_that_does_not_fit_names_itself_and_changes_no_recorded_step(
    durable: Durable, store: SnapshotStore, value: Any, path: str, reason: str
) -> None:
    """The run fails with the path; what was recorded before is there to be resumed."""

    def workflow(step: Any, good: bool) -> str:
        step("before", lambda: "kept")
        step("k", lambda: 1 if values.pop() else value)
        return "done"

    values = [True, False]
    with pytest.raises(NotSerializable, match=reason) as refused:
        durable.run("id", workflow, True)
    assert refused.value.path.startswith(path)
    assert refused.value.subject == "the result of step 'k'"
    assert list(store.load("id").steps) == ["before"]
    assert durable.run("id", workflow, True) == "done"


@pytest.mark.parametrize(("value", "path", "reason"), REFUSED)
def test_a_snapshot_or_an_input_that_does_not_fit_leaves_the_row_as_it_was(
    durable: Durable,
    store: SnapshotStore,
    db: psycopg.Connection,
    value: Any,
    path: str,
    reason: str,
) -> None:
    """Not even the time of its last change moves."""
    store.save("id", holding("kept"))
    before = db.execute("TABLE awaitly_snapshots").fetchall()
    if reason != "nested more than 240":  # a saved document has no room to keep
        with pytest.raises(NotSerializable) as refused:
            store.save("id", holding(value))
        assert refused.value.path.startswith("$.steps.k.value" + path[1:])
    with pytest.raises(NotSerializable, match="the input"):
        durable.run("id", pytest.fail, value)
    assert db.execute("TABLE awaitly_snapshots").fetchall() == before
