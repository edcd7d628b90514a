"""Text for terminals and pipes: lines of styled parts, and how times and values are written."""

from __future__ import annotations

import json
from collections.abc import Iterable
from datetime import datetime
from typing import Any

import click
from rich.cells import cell_len, set_cell_size
from rich.console import Console
from rich.segment import Segment, Segments
from rich.style import Style
from rich.text import Text

from ..store.text import elide, printable
from ..store.text import span as in_units

Line = list[tuple[str, str]]  # text and the name of its style

out = Console(highlight=False, markup=False, emoji=False)
err = Console(stderr=True, highlight=False, markup=False, emoji=False)

STYLES = {
    "": Style(),
    "head": Style(bold=True),
    "dim": Style(dim=True),
    "running": Style(color="cyan"),
    "completed": Style(color="green"),
    "failed": Style(color="red"),
    "retrying": Style(color="magenta"),
    "waiting": Style(color="yellow"),
    "suspended": Style(color="yellow"),
    "cancelled": Style(dim=True),
    "skipped": Style(dim=True),
}


def segments(lines: Iterable[Line]) -> Segments:
    """Convert lines to segments, which rich prints unchanged."""
    return Segments(
        Segment(text, STYLES.get(style, STYLES[""]))
        for line in lines
        for text, style in [*line, ("\n", "")]
    )


def write(lines: Iterable[Line], console: Console = out) -> None:
    """Print lines without cutting them."""
    put(segments(lines), console)


def put(what: Segments, console: Console = out) -> None:
    """Print segments without cutting them."""
    console.print(what, crop=False, end="")


def width() -> int | None:
    """Return the columns of the terminal, or None in a pipe, where nothing is cut to fit."""
    return out.width if out.is_terminal else None


def fit(text: str, columns: int) -> str:
    """Cut or pad ``text`` to exactly ``columns`` columns of the terminal."""
    if cell_len(text) > columns:
        return set_cell_size(text, columns - 1) + ellipsis()
    return set_cell_size(text, columns)


def ellipsis() -> str:
    """Return the sign for omitted text that the terminal's encoding supports."""
    return "~" if out.options.ascii_only else "…"


def span(seconds: float) -> str:
    """Write a duration, in characters that the terminal's encoding supports."""
    text = in_units(seconds)
    return text.replace("µ", "u") if out.options.ascii_only else text


def in_lines(text: str, columns: int | None = None) -> list[str]:
    """Split a text into lines to print: escaped, and not wrapped when ``columns`` is None."""
    lines = printable(text.expandtabs(), keep="\n").split("\n")
    if columns is None:
        return lines
    wrapped = (Text(line).wrap(out, max(columns, 20)) or [Text()] for line in lines)
    return [part.plain.rstrip() for parts in wrapped for part in parts]


def echo_json(value: Any) -> None:
    """Print what ``--json`` asks for, times in ISO 8601."""
    click.echo(json.dumps(value, indent=2, default=datetime.isoformat))


def as_json(value: Any, most: int | None = None) -> str:
    """Write a stored value as JSON on one line, cut after ``most`` characters."""
    return elide(printable(json.dumps(value, ensure_ascii=False)), most, ellipsis())
