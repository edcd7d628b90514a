"""The shape of the package: imports point downward, and little is needed to import it."""

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

# Each floor uses those above it in this list, and within a floor what stands before it.
FLOORS = [
    ["errors", "_json", "_printable"],
    ["snapshot", "event", "_sql", "_failure", "codec"],
    ["_db"],
    ["lease", "store", "_run", "step", "workflow"],
    ["_session", "_queue", "durable"],
    ["codecs", "embedded", "factory"],
    ["__init__"],
    ["contrib", "cli", "__main__"],  # entry points: users of the package, like any other
]
ORDER = [unit for floor in FLOORS for unit in floor]
KNOW_PSYCOPG = {"_sql", "_db", "factory", "contrib"}
MAY_LOAD = {"awaitly-postgres", "psycopg", "psycopg-binary", "psycopg-pool", "attrs"}
MAY_LOAD |= {"typing-extensions"}  # of psycopg, on older Pythons

PUBLIC = """
    postgres SnapshotStore SnapshotInfo StoreStats Lease Workflow Step Event Durable Outcome Codec
    WorkflowSnapshot StepResult Execution validate_snapshot merge_snapshots
    AwaitlyError StoreError StoreUnavailable SchemaMissing
    SnapshotError SnapshotFormatError NotSerializable
    WorkflowError AlreadyRunning WorkflowNotFound WorkflowConflict VersionMismatch WorkflowDrift
    DuplicateStepKey StepFailed LeaseLost WorkflowSuspended WorkflowCancelled
""".split()  # noqa: SIM905


def unit_of(file: Path) -> str:
    """The module, or the subpackage as a whole, that a file belongs to."""
    return file.relative_to(PACKAGE).parts[0].removesuffix(".py")


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


def units_used(file: Path) -> Iterator[str]:
    for module, name in imports(file):
        if module[0] == "awaitly_postgres":
            inner = module[1:] or [name if name in ORDER else "__init__"]
            yield str(inner[0])


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


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_imports_point_downward(file: Path) -> None:
    """No module knows one that stands above it; none is missing from the table."""
    own = ORDER.index(unit_of(file))
    used = set(units_used(file)) - {unit_of(file)}
    assert {unit for unit in used if ORDER.index(unit) > own} == set()


def test_the_table_lists_no_module_that_is_gone() -> None:
    """So that it stays a map of what there is."""
    assert set(ORDER) == {unit_of(file) for file in FILES}


def test_psycopg_is_known_to_few_modules() -> None:
    """The statements, the connections, the factory, and the bridges to frameworks."""
    knowing = {unit_of(file) for file in FILES if names_from_psycopg(file)}
    assert knowing <= KNOW_PSYCOPG


def test_only_one_module_catches_the_drivers_errors() -> None:
    """Everywhere else they are ours already."""
    catching = {unit_of(file) for file in FILES if names_from_psycopg(file) & caught_names(file)}
    assert catching == {"_db"}


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
    assert {re.split(r"[^\w-]", entry)[0] for entry in declared} == {"psycopg", "attrs"}
    loaded = python(
        "import sys, json; before = set(sys.modules); import awaitly_postgres;"
        "print(json.dumps(sorted({n.split('.')[0] for n in set(sys.modules) - before})))"
    )
    owners = packages_distributions()
    used = {owner for name in json.loads(loaded) for owner in owners.get(name, ())}
    assert {owner.lower().replace("_", "-") for owner in used} <= MAY_LOAD
