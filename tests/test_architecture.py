"""The shape of the package: a workflow, a store, and durable, which joins them."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import packages_distributions, requires
from pathlib import Path

import pytest

import awaitly_postgres

PACKAGE = Path(awaitly_postgres.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))

MAY_LOAD = {"awaitly-postgres", "psycopg", "psycopg-binary", "psycopg-pool", "attrs"}
MAY_LOAD |= {"typing-extensions"}  # of psycopg, on older Pythons

PUBLIC = """
    postgres SnapshotStore SnapshotInfo StoreStats Lease Workflow Step Event Durable Outcome Codec
    RunInfo StepInfo Problem
    WorkflowSnapshot StepResult Execution validate_snapshot merge_snapshots
    AwaitlyError StoreError StoreUnavailable SchemaMissing
    SnapshotError SnapshotFormatError NotSerializable
    WorkflowError AlreadyRunning WorkflowNotFound WorkflowConflict VersionMismatch WorkflowDrift
    DuplicateStepKey StepFailed LeaseLost WorkflowSuspended WorkflowCancelled WaitTimedOut
""".split()  # noqa: SIM905


def room_of(file: Path) -> str:
    """The folder of a file, or the empty string of one that stands beside the rooms."""
    return file.relative_to(PACKAGE).parts[0] if file.parent != PACKAGE else ""


# Django's store makes the core's database of Django's settings, which takes more than public names.
EDGES = [
    file.relative_to(PACKAGE)
    for file in FILES
    if room_of(file) in ("cli", "contrib") and file != PACKAGE / "contrib/django/__init__.py"
]


def imports(file: Path) -> Iterator[tuple[list[str], str | None]]:
    """All that a file imports, inside functions too: (absolute module, name or None)."""
    here = ["awaitly_postgres", *file.relative_to(PACKAGE).parent.parts]
    for node in ast.walk(ast.parse(file.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((alias.name.split("."), None) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = here[: len(here) - node.level + 1] if node.level else []
            base = base + (node.module.split(".") if node.module else [])
            yield from ((base, alias.name) for alias in node.names)


def is_private(name: str) -> bool:
    """Whether it starts with an underscore, and is none of Python's own."""
    return name.startswith("_") and not name.endswith("__")


def rooms_used(room: str) -> set[str]:
    """What of the package, and which driver, the files of a room import."""
    used = set()
    for file in FILES:
        if room_of(file) == room:
            for module, _ in imports(file):
                used.add(module[1] if module[0] == "awaitly_postgres" and module[1:] else module[0])
    return used


def caught_names(file: Path) -> set[str]:
    """Every name in an except clause or in ``suppress(...)``, the first part of dotted ones."""
    caught: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text("utf-8"))):
        parts: list[ast.expr] = []
        if isinstance(node, ast.ExceptHandler) and node.type is not None:
            parts = [node.type]
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("suppress"):
            parts = node.args
        caught |= {n.id for part in parts for n in ast.walk(part) if isinstance(n, ast.Name)}
    return caught


def names_from_psycopg(file: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text("utf-8"))):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            source = node.module or "" if isinstance(node, ast.ImportFrom) else ""
            for alias in node.names:
                if (source or alias.name).startswith("psycopg"):
                    names.add(alias.asname or alias.name.split(".")[0])
    return names


def python(program: str) -> str:
    """What a fresh interpreter prints."""
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        check=True,
        cwd=PACKAGE.parent,
    )
    return done.stdout


def test_a_workflow_needs_neither_the_store_nor_the_driver() -> None:
    """Seen in a fresh process, in which the package's face has imported nothing."""
    assert rooms_used("workflow").isdisjoint({"store", "durable", "psycopg", "psycopg_pool"})
    modules = sorted(file.stem for file in FILES if room_of(file) == "workflow")
    loaded = python(
        "import sys, types, importlib; face = types.ModuleType('awaitly_postgres');"
        f"face.__path__ = [{str(PACKAGE)!r}]; sys.modules['awaitly_postgres'] = face;"
        f"[importlib.import_module('awaitly_postgres.workflow.' + name) for name in {modules}];"
        "print(*sys.modules)"
    ).split()
    assert "awaitly_postgres.workflow.run" in loaded
    assert not [name for name in loaded if name.startswith(("psycopg", "awaitly_postgres.store"))]


def test_the_store_knows_nothing_of_workflows() -> None:
    """It keeps snapshots and leases, whoever writes them."""
    assert rooms_used("store").isdisjoint({"workflow", "durable"})


def test_only_durable_joins_the_two() -> None:
    """Beside the rooms, the face names what is public, and `testing` needs no store of its own."""
    joining = {"workflow", "store"}
    rooms = {room_of(file) for file in FILES} - {"", "cli", "contrib"}
    assert rooms == {*joining, "durable"}
    assert rooms_used("durable") >= joining
    for file in FILES:
        if room_of(file) == "" and file.name not in ("__init__.py", "__main__.py"):
            used = {part for module, _ in imports(file) for part in module[1:2]}
            allowed = {"workflow", "durable"} if file.name == "testing.py" else set()
            assert not used & {*joining, "durable"} - allowed, file


@pytest.mark.parametrize("file", EDGES, ids=str)
def test_the_edges_use_public_names(file: Path) -> None:
    """What they lack becomes a public method: of the rooms they import rows and their text.

    `_worker` is what the command line and the management command share.
    """
    found = PACKAGE / file
    for module, name in imports(found):
        if module[0] != "awaitly_postgres" or module[1:2] == [room_of(found)]:
            continue
        assert ".".join(module[1:]) in (
            "",
            "errors",
            "codecs",
            "embedded",
            "store.rows",
            "store.text",
            "_worker",
        ), module
        if module == ["awaitly_postgres"]:
            assert name in {*PUBLIC, "__version__"}
        assert not is_private(name or "")


@pytest.mark.parametrize("file", EDGES, ids=str)
def test_the_edges_reach_into_nothing(file: Path) -> None:
    """``x._y`` is for ``self`` and ``cls``; Django documents ``_meta``."""
    for node in ast.walk(ast.parse((PACKAGE / file).read_text("utf-8"))):
        if isinstance(node, ast.Attribute) and is_private(node.attr) and node.attr != "_meta":
            assert ast.unparse(node.value) in ("self", "cls"), ast.unparse(node)


def test_only_what_works_on_connections_catches_the_drivers_errors() -> None:
    """The pool and a transaction where they give one up; elsewhere they are ours already."""
    catching = {file.stem for file in FILES if names_from_psycopg(file) & caught_names(file)}
    assert catching == {"connection", "database", "loan", "pool", "transaction"}


@pytest.mark.parametrize("name", PUBLIC)
def test_a_public_name_is_importable_and_documented(name: str) -> None:
    """From the package itself, and it is in ``__all__``."""
    assert name in awaitly_postgres.__all__
    assert getattr(awaitly_postgres, name).__doc__


def test_nothing_else_is_public() -> None:
    """A name in ``__all__`` is a promise."""
    assert sorted(awaitly_postgres.__all__) == sorted(PUBLIC)


def test_the_run_time_dependencies_are_psycopg_and_attrs() -> None:
    """As declared, and as loaded: no extra's package is imported before it is asked for."""
    declared = [entry for entry in requires("awaitly-postgres") or () if "extra ==" not in entry]
    assert {re.split(r"[^\w-]", entry)[0] for entry in declared} == {
        "psycopg",
        "psycopg-pool",
        "attrs",
    }
    loaded = python(
        "import sys, json; before = set(sys.modules); import awaitly_postgres;"
        "print(json.dumps(sorted({n.split('.')[0] for n in set(sys.modules) - before})))"
    )
    owners = packages_distributions()
    used = {owner for name in json.loads(loaded) for owner in owners.get(name, ())}
    assert {owner.lower().replace("_", "-") for owner in used} <= MAY_LOAD


def test_no_file_is_long_and_no_function_is() -> None:
    """Whoever opens one reads it in minutes."""
    long = []
    for file in FILES:
        text = file.read_text("utf-8")
        functions = [n for n in ast.walk(ast.parse(text)) if isinstance(n, ast.FunctionDef)]
        long += [n.name for n in functions if (n.end_lineno or 0) - n.lineno >= 60]
        if text.count("\n") > 400:
            long.append(file.name)
    assert long == []
