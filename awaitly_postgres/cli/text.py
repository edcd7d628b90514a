"""Text for terminals and pipes: lines of styled parts, and how times and values are written."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from rich.cells import cell_len, set_cell_size
from rich.console import Console
from rich.segment import Segment, Segments
from rich.style import Style

from ..store.rows import elide, printable

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
    "suspended": Style(color="yellow"),
    "skipped": Style(dim=True),
}


def segments(lines: Iterable[Line]) -> Segments:
    """Convert lines to segments, which rich prints unchanged."""
    return Segments(
        Segment(text, STYLES.get(style, STYLES[""]))
        for line in lines
        for text, style in [*line, ("\n", "")]
    )


def write(lines: Iterable[Line]) -> None:
    """Print lines without cutting them."""
    put(segments(lines))


def put(what: Segments) -> None:
    """Print segments without cutting them."""
    out.print(what, crop=False, end="")


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
    """Write a duration: ``40µs``, ``12ms``, ``1.2s``, ``57s``, ``3m12s``, ``2h05m``, ``4d``."""
    if seconds < 0.9995:
        milliseconds = max(seconds, 0.0) * 1000
        if milliseconds < 0.9995:
            return f"{milliseconds * 1000:.0f}{'us' if out.options.ascii_only else 'µs'}"
        return f"{milliseconds:.1f}ms" if milliseconds < 9.95 else f"{milliseconds:.0f}ms"
    if seconds < 59.5:
        return f"{seconds:.1f}s" if seconds < 9.95 else f"{seconds:.0f}s"
    minutes, left = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes}m{left:02d}s"
    hours, minutes = divmod(minutes, 60)
    if hours < 24:
        return f"{hours}h{minutes:02d}m"
    days, hours = divmod(hours, 24)
    return f"{days}d{hours:02d}h" if days < 4 else f"{days}d"


def age(seconds: float) -> str:
    """Write how long ago something was, in one unit: ``0s``, ``119s``, ``3m``, ``2h``, ``4d``."""
    whole = max(int(seconds), 0)
    for unit, size in (("d", 86_400), ("h", 3_600), ("m", 60)):
        if whole >= 2 * size:
            return f"{whole // size}{unit}"
    return f"{whole}s"


def as_json(value: Any, most: int | None = None) -> str:
    """Write a stored value as JSON on one line, cut after ``most`` characters."""
    return elide(printable(json.dumps(value, ensure_ascii=False)), most, ellipsis())
