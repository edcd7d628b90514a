"""Loads the statements and the DDL of one store from ``schema.sql`` and ``queries.sql``.

The comments there say what each statement is for; ``queries.sql`` begins with format and rules.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from importlib import resources
from typing import Any

from attrs import frozen
from psycopg import sql

from .._checks import MAX_ID

Block = tuple[str, str]  # its header, and the lines below without comments

_BLOCK = re.compile(r"^-- (?=(?:ddl|fragment|name): )", re.M)
_COMMENT = re.compile(r"^\s*(?:--.*)?\n", re.M)
_MARK = " -- if "  # part of every condition, for a fast check before the regular expression
_CONDITION = re.compile(r"^(.*\S) +-- if (no )?(\w+)$", re.M)
_PADDING = re.compile(r"(?<=\() | (?=[),])")
_WORD = re.compile(r"\{(\w+)\}")


@frozen(eq=False, repr=False)
class Statements:
    """The statements of one store, ready to send: ``statements.append`` is "-- name: append".

    ``ddl`` has the statements that create each table, by its name; the schema's are under ``""``.
    """

    journal: bool
    texts: Mapping[str, bytes]
    ddl: Mapping[str, str]
    regclasses: Mapping[str, str]

    def __getattr__(self, name: str) -> bytes:
        try:
            return self.texts[name]
        except KeyError:
            raise AttributeError(f"this store has no statement {name!r}") from None


def compose(table: str, lock_table: str, schema: str | None, *, journal: bool) -> Statements:
    """Fill in these names, already checked; without ``journal`` no statement uses that table."""

    def qualified(name: str) -> sql.Identifier:
        return sql.Identifier(schema, name) if schema else sql.Identifier(name)

    tables = {"snapshots": table, "journal": f"{table}_steps", "leases": lock_table}
    words = {name: qualified(named).as_string(None) for name, named in tables.items()}
    others: dict[str, sql.Composable] = {
        "table": sql.Identifier(table),
        "updated_at_idx": sql.Identifier(f"{table}_updated_at_idx"),
        "pending_idx": sql.Identifier(f"{table}_pending_idx"),
        "schema": sql.Identifier(schema or ""),
        "schema_name": sql.Literal(schema),
        "max_id": sql.Literal(MAX_ID),
    }
    words |= {name: value.as_string(None) for name, value in others.items()}
    known = {"journal": journal, "schema": schema is not None}
    texts = expand(_blocks(), words, known)
    return Statements(
        journal=journal,
        texts={name: text.encode() for name, text in texts["name"].items()},
        ddl={tables.get(name, ""): text for name, text in texts["ddl"].items()},
        regclasses={tables[name]: words[name] for name in texts["ddl"] if name in tables},
    )


def filtered(statement: bytes, params: Mapping[str, Any]) -> bytes:
    """Drop the conditional lines whose parameter is None or missing."""
    text = _choose(statement.decode(), lambda name: params.get(name) is not None)
    return _on_one_line(text).encode()


def prefix_bounds(prefix: str) -> tuple[str, str | None]:
    """Return the half-open range of strings that start with ``prefix``, in code point order.

    The upper bound is the prefix with its last character incremented, skipping surrogates.
    """
    stem = prefix.rstrip("\U0010ffff")
    if not stem:
        return prefix, None
    last = ord(stem[-1]) + 1
    return prefix, stem[:-1] + chr(0xE000 if last == 0xD800 else last)


@cache
def _blocks() -> list[Block]:
    here = resources.files(__package__)  # may be in a zip file
    text = "".join((here / file).read_text("utf-8") for file in ("schema.sql", "queries.sql"))
    return parse(text)


def parse(text: str) -> list[Block]:
    """Split a file into its blocks; whatever precedes the first one is prose."""
    parts = (part.partition("\n") for part in _BLOCK.split(text)[1:])
    return [(header, _COMMENT.sub("", body)) for header, _, body in parts]


def expand(
    blocks: Iterable[Block], words: Mapping[str, str], known: Mapping[str, bool]
) -> dict[str, dict[str, str]]:
    """Return the text of each block, by kind and name: ``{"ddl": …, "fragment": …, "name": …}``.

    ``words`` are substituted like fragments. Conditions that ``known`` decides are resolved; the
    others stay, one per line, for `filtered`.

    Raises:
        ValueError: a block uses a fragment that is not above it.
    """
    texts: dict[str, dict[str, str]] = {"ddl": {}, "fragment": {**words}, "name": {}}
    for header, body in blocks:
        kind, _, name = _choose(header, known.get).partition(": ")
        if not name:
            continue  # not in this store
        try:
            text = _WORD.sub(lambda found: texts["fragment"][found[1]], _choose(body, known.get))
        except KeyError as unknown:
            raise ValueError(f"{kind} {name!r} uses {{{unknown.args[0]}}}, not above it") from None
        # DDL keeps its lines for readers; a line with a condition can be dropped on its own.
        keeps_lines = kind == "ddl" or _MARK in text
        texts[kind][name] = text if keeps_lines else _on_one_line(text)
    return texts


def _choose(text: str, holds: Callable[[str], bool | None]) -> str:
    """Blank the lines that end with ``-- if x`` where x does not hold; None: not known yet."""

    def chosen(line: re.Match[str]) -> str:
        code, no, name = line.groups()
        held = holds(name)
        if held is None:
            return line[0]
        return code if held is not bool(no) else ""

    return _CONDITION.sub(chosen, text) if _MARK in text else text


def _on_one_line(text: str) -> str:
    return _PADDING.sub("", " ".join(text.split()))
