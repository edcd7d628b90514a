"""The tree of errors: what they carry, and that they travel."""

from __future__ import annotations

import copy
import inspect
import pickle
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from datetime import datetime, timezone
from multiprocessing import get_context
from typing import Any

import attrs
import pytest

import awaitly_postgres
from awaitly_postgres import AwaitlyError, SnapshotFormatError, WorkflowSnapshot, errors
from awaitly_postgres.errors import WrongType

# One of each class, and what its message says to do next.
EXAMPLES: list[tuple[AwaitlyError, str]] = [
    (errors.StoreError("this store is closed; make a new one with postgres()"), "make a new one"),
    (errors.StoreUnavailable("every connection is busy (raise max_size)"), "raise max_size"),
    (errors.SchemaMissing("the tables are missing.", "CREATE TABLE x ();"), "run:\nCREATE TABLE x"),
    (
        errors.SchemaMissing("no tables.", "CREATE TABLE x ();", "manage.py migrate"),
        "Run 'manage.py",
    ),
    (errors.SnapshotFormatError("order-1", ["steps is missing", "x"]), "Correct the row"),
    (errors.SnapshotFormatError(None, ["steps is missing"]), "Correct it"),
    (errors.NotSerializable("$.a[0]", "a value of type set", "the input"), "convert it"),
    (errors.NotSerializable("$.a", "nan is not a JSON number"), "convert it"),
    (errors.AlreadyRunning("order-1", "host:1:ab", datetime.now(timezone.utc)), "Try again"),
    (errors.AlreadyRunning("order-1"), "Try again"),
    (errors.WorkflowNotFound("order-1"), "Start it with run"),
    (errors.WorkflowNotFound("order-1", "checkout"), "Import the module"),
    (errors.WorkflowConflict("order-1", "input", "[1]", "[2]"), "Use another id"),
    (errors.VersionMismatch("order-1", 1, 2), "Run the old code to finish it"),
    (errors.VersionMismatch(None, 1, 2), "migrate the snapshot"),
    (errors.WorkflowDrift("order-1", "new", ["a", "b"]), "Restore the old steps"),
    (errors.WorkflowDrift(None, None, [str(n) for n in range(9)]), "Restore the old steps"),
    (errors.DuplicateStepKey("order-1", "k"), "put the loop variable into it"),
    (errors.StepFailed("k", "Declined", "no cover", {"code": 7}), "import the module"),
    (errors.LeaseLost("order-1"), "can be resumed"),
    (errors.WorkflowSuspended("order-1", "nap"), "resume_pending() resumes it"),
    (errors.WaitTimedOut("order-1", "approval"), "Catch WaitTimedOut to go on"),
    (errors.WorkflowCancelled("order-1"), "to start it afresh"),
]
EACH = [pytest.param(*each, id=f"{type(each[0]).__name__}-{i}") for i, each in enumerate(EXAMPLES)]
GROUPS = {errors.AwaitlyError, errors.SnapshotError, errors.WorkflowError}
COPIES: list[Callable[[Any], Any]] = [copy.copy, copy.deepcopy] + [
    lambda error, protocol=protocol: pickle.loads(pickle.dumps(error, protocol))  # noqa: S301
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1)
]


def own(module: Any) -> set[type]:
    """The exception classes that a module defines."""
    kinds = inspect.getmembers(module, inspect.isclass)
    return {k for _, k in kinds if issubclass(k, Exception) and k.__module__ == module.__name__}


def attributes(error: AwaitlyError) -> dict[str, Any]:
    return {field.name: getattr(error, field.name) for field in attrs.fields(type(error))}


def test_every_error_stands_in_one_tree_and_is_public() -> None:
    """One except clause catches all that the package raises on purpose."""
    in_tree = {kind for kind in own(errors) if issubclass(kind, AwaitlyError)}
    assert own(errors) - in_tree == {WrongType}
    assert in_tree - GROUPS == {type(error) for error, _ in EXAMPLES}
    public = {getattr(awaitly_postgres, name) for name in awaitly_postgres.__all__}
    assert in_tree <= public


@pytest.mark.parametrize(("name", "group"), [
    *[(n, errors.StoreError) for n in ("StoreUnavailable", "SchemaMissing")],
    *[(n, errors.SnapshotError) for n in ("SnapshotFormatError", "NotSerializable")],
    *[(n, errors.WorkflowError) for n in (
        "AlreadyRunning", "WorkflowNotFound", "WorkflowConflict", "VersionMismatch",
        "WorkflowDrift", "DuplicateStepKey", "StepFailed", "LeaseLost", "WorkflowSuspended",
        "WorkflowCancelled", "WaitTimedOut",
    )],
])  # fmt: skip
def test_an_error_is_caught_with_its_group(name: str, group: type[Exception]) -> None:
    """The database, what is stored, or the run."""
    assert issubclass(getattr(errors, name), group)


def test_a_wrong_argument_is_both_type_error_and_value_error() -> None:
    """For ids and keys; it is no error of ours."""
    assert issubclass(WrongType, TypeError)
    assert issubclass(WrongType, ValueError)
    assert not issubclass(WrongType, AwaitlyError)


@pytest.mark.parametrize(("error", "action"), EACH)
def test_a_message_names_what_it_is_about_and_what_to_do(error: AwaitlyError, action: str) -> None:
    """The id, the key and the path, where there is one; and the next action."""
    message = str(error)
    assert action in message
    carried = attributes(error)
    for name in ("id", "key", "path", "subject", "workflow", "holder"):
        assert str(carried.get(name) or "") in message
    assert "None" not in message


def test_a_message_stays_short_however_many_steps_there_are() -> None:
    """Some are named, the rest counted."""
    drift = errors.WorkflowDrift("id", "new", [f"step-{n}" for n in range(10_000)])
    assert "and 9995 more" in str(drift)
    assert len(str(drift)) < 400


@pytest.mark.parametrize(("error", "action"), EACH)
def test_an_error_survives_pickling_and_copying(error: AwaitlyError, action: str) -> None:
    """With its class, message and attributes."""
    for duplicate in COPIES:
        twin = duplicate(error)
        assert type(twin) is type(error)
        assert (str(twin), attributes(twin)) == (str(error), attributes(error))


def test_an_error_comes_back_from_another_process() -> None:
    """As an executor sends it: with its attributes, and where it was raised as its cause."""
    with (
        ProcessPoolExecutor(1, mp_context=get_context("spawn")) as workers,
        pytest.raises(SnapshotFormatError, match="'order-1'") as raised,
    ):
        workers.submit(WorkflowSnapshot.from_json, {"steps": {}}, id="order-1").result()
    assert raised.value.id == "order-1"
    assert raised.value.errors == ["formatVersion is missing", "execution is missing"]


def test_a_refused_value_keeps_its_subject_when_pickled() -> None:
    """The subject is added on the way up, after the error was made."""

    def workflow(step: awaitly_postgres.Step) -> object:
        return step("k", lambda: {1})

    with pytest.raises(errors.NotSerializable) as raised:
        awaitly_postgres.Workflow(workflow)()
    twin = pickle.loads(pickle.dumps(raised.value))  # noqa: S301
    assert twin.subject == "the result of step 'k'"
    assert str(twin) == str(raised.value)
