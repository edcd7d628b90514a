"""The README is true: its code runs, its SQL works, its commands and links lead somewhere."""

from __future__ import annotations

import importlib.util
import inspect
import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import psycopg
import pytest
from attrs import fields, frozen

import awaitly_postgres
from awaitly_postgres import (
    AwaitlyError,
    Durable,
    SnapshotStore,
    Step,
    postgres,
    validate_snapshot,
)

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


@frozen
class Block:
    """A fenced block: its language, its text, the section it is in, and its first line."""

    language: str
    text: str
    section: str
    line: int


def fenced_blocks() -> list[Block]:
    """Return every fenced block in order."""
    blocks = []
    for match in re.finditer(r"^```(\w*)\n(.*?)^```$", README, re.M | re.S):
        headings = re.findall(r"^## (.+)$", README[: match.start()], re.M)
        line = README.count("\n", 0, match.start(2)) + 1
        blocks.append(Block(match[1], match[2], headings[-1] if headings else "top", line))
    return blocks


BLOCKS = fenced_blocks()


def blocks_in(language: str) -> list[Block]:
    """Return the blocks of one language."""
    return [block for block in BLOCKS if block.language == language]


def commands() -> list[list[str]]:
    """Return the words of every command that the README tells its reader to type."""
    text = "".join(block.text for block in blocks_in("console"))
    lines = re.findall(r"^\$ (.+)$", text, re.M)
    assert len(lines) == len(text.splitlines()), "a console block has more than commands in it"
    return [command.split() for line in lines for command in line.split(" && ")]


def test_every_block_is_of_a_kind_that_is_tested() -> None:
    """No block escapes the tests below by its language."""
    assert README.count("```") == 2 * len(BLOCKS)
    assert {b.language for b in BLOCKS} == {"python", "sql", "json", "console", "crontab"}


@pytest.mark.parametrize("section", dict.fromkeys(b.section for b in blocks_in("python")))
def test_python_runs(section: str, url: str) -> None:
    """The blocks of a section run in order, and each ``expression  # -> value`` is so."""
    namespace: dict[str, Any] = {"__name__": "readme", "is_": is_}
    try:
        for block in blocks_in("python"):
            if block.section == section:
                code = re.sub(r'"(postgresql://[^"]*|embedded)"', lambda _: repr(url), block.text)
                code = re.sub(r"^( *)(\S.*?)  # -> (.+)$", r"\1is_(\2, \3)", code, flags=re.M)
                # Padded, so that a traceback shows the line of the README.
                padded = "\n" * (block.line - 1) + code
                exec(compile(padded, "README.md", "exec"), namespace)  # noqa: S102
    finally:
        for value in namespace.values():
            if isinstance(value, SnapshotStore):
                value.close()


def is_(actual: object, expected: object) -> None:
    """Stand for ``actual  # -> expected`` in a block."""
    assert actual == expected


def test_schema_is_the_one_that_is_made(store: SnapshotStore) -> None:
    """The DDL on the page is the DDL that the store would run."""
    assert store.ddl() in [block.text for block in blocks_in("sql")]


def test_sql_finds_something(
    durable: Durable, store: SnapshotStore, db: psycopg.Connection
) -> None:
    """Each query on the page has an answer where runs are completed, failed and under way."""

    def checkout(step: Step, divisor: int) -> float:
        return step("divide", lambda: 1 / divisor)

    durable.run("checkout-123", checkout, 2)
    with pytest.raises(ZeroDivisionError):
        durable.run("checkout-124", checkout, 0)
    statements = [s for block in blocks_in("sql") for s in block.text.split(";\n") if s.strip()]
    with store.lock("checkout-125"):
        answers = [db.execute(statement) for statement in statements]
    found = [cursor.fetchall() for cursor in answers if cursor.description]
    assert len(found) == 5
    assert all(found)


def test_snapshot_on_the_page_is_valid() -> None:
    """The JSON example is a snapshot, and its metadata and meta are those the tables explain."""
    (block,) = blocks_in("json")
    document = json.loads(block.text)
    assert validate_snapshot(document) == []
    for name in document["metadata"]:
        assert f"`{name}`" in README


def test_commands_exist() -> None:
    """Every program is there or comes with an extra, and every file that is named exists."""
    for program, *words in commands():
        name = program.removeprefix(".venv/bin/")
        if program.startswith((".ci/", "examples/")):
            words.append(program)
        elif name != "python3":
            beside_python = Path(sys.executable).with_name(name)
            module = importlib.util.find_spec(name)
            assert beside_python.exists() or shutil.which(name) or module, program
        for word in words:
            if "/" in word and "://" not in word:
                assert (ROOT / word).exists(), word
    for block in blocks_in("crontab"):
        (script,) = re.findall(r"\w+\.py", block.text)
        assert (ROOT / "examples" / script).exists()


def test_links_lead_somewhere() -> None:
    """Links are to headings of this page or to files of this project."""
    headings = re.findall(r"^#+ (.+)$", README, re.M)
    anchors = {re.sub(r"[^\w -]", "", h).lower().replace(" ", "-") for h in headings}
    for target in re.findall(r"\]\(([^)]+)\)", README):
        if target.startswith("#"):
            assert target[1:] in anchors, target
        else:
            assert (ROOT / target).exists(), target


def test_errors_table_is_the_tree() -> None:
    """Each error has its line, under the one that it is a kind of."""
    listed = re.findall(r"^\| (· )?`(\w+)` \|", README.partition("\n## Errors\n")[2], re.M)
    public = [getattr(awaitly_postgres, name) for name in awaitly_postgres.__all__]
    errors = {kind for kind in public if isinstance(kind, type) and issubclass(kind, AwaitlyError)}
    assert {name for _, name in listed} == {kind.__name__ for kind in errors - {AwaitlyError}}
    parent = AwaitlyError
    for dot, name in listed:
        kind = getattr(awaitly_postgres, name)
        parent = parent if dot else AwaitlyError
        assert kind.__base__ is parent
        parent = parent if dot else kind


def test_every_public_name_is_explained() -> None:
    """What can be imported, called or set is on the page."""
    missing = [name for name in awaitly_postgres.__all__ if not re.search(rf"\b{name}\b", README)]
    for kind in (SnapshotStore, Durable):
        methods = {name for name, value in vars(kind).items() if inspect.isfunction(value)}
        public = {name for name in methods if not name.startswith("_")} - {"key"}
        missing += [f"{kind.__name__}.{name}" for name in public if f"`{name}(" not in README]
    options = set(inspect.signature(postgres).parameters)
    options |= {field.name for field in fields(Durable) if field.init and field.kw_only}
    missing += [name for name in options if f"`{name}`" not in README]
    assert missing == []
