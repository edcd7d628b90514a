"""How many workflows are shown at once: the listing, in text and in JSON, and the counts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from rich.cells import cell_len
from rich.filesize import decimal
from rich.segment import Segment, Segments
from rich.table import Table
from rich.text import Text

from ..store.rows import STATES, RunInfo, StoreStats
from ..store.text import age, printable
from .text import STYLES, Line, ellipsis, out, segments

Cells = Sequence[str]

_HEAD = ("ID", "STATE", "AGE", "STEPS", "LEASE", "NEXT", "WORKFLOW")
_LEASE = _HEAD.index("LEASE")
_LISTED = (
    *("id", "workflow", "version", "state", "attempts", "next_at", "waits_for"),
    *("holder", "held_until", "updated_at", "metadata", "step_count", "maps"),
)
_TO_THE_RIGHT = ("AGE", "STEPS")
_NARROW = 18  # columns; LEASE is not cut to less
_GAP = 2  # columns


def to_json(row: RunInfo, fields: Sequence[str] = _LISTED) -> dict[str, Any]:
    """Return what ``--json`` prints for a run: its fields under their own names."""
    return {name: getattr(row, name) for name in fields}


def listing(rows: Sequence[RunInfo], columns: int | None) -> Segments:
    """Show one line for each run: all columns in full in a pipe, what fits on a terminal."""
    table = [_HEAD, *map(_cells, rows)]
    if columns is None:
        return segments(_plain(table))
    return Segments(part for line in _fitted(table, columns) for part in (*line, Segment.line()))


def _cells(row: RunInfo) -> Cells:
    steps, next = row.progress or f"{row.step_count}", row.what_next
    cells = (row.id, row.state, age(row.age), steps, row.held_by, next, row.workflow)
    return tuple(printable(cell or "-") for cell in cells)


def _plain(table: Sequence[Cells]) -> Iterator[Line]:
    widths = _widths(table)
    for cells in table:
        padded = []
        for name, text, width in zip(_HEAD, cells, widths, strict=True):
            pad = " " * (width - cell_len(text))
            padded.append(pad + text if name in _TO_THE_RIGHT else text + pad)
        yield [((" " * _GAP).join(padded).rstrip(), "")]


def _fitted(table: Sequence[Cells], columns: int) -> Iterator[Sequence[Segment]]:
    """Lay out a table that fits. An id is never cut, so that it can be copied: one that is too long
    for its column gets its own line.
    """
    for narrower in _narrowing(table):
        _, *others = _widths(narrower)
        room = columns - sum(others) - _GAP * len(others)
        if max(cell_len(id) for id, *_ in narrower) <= room:
            break
    head, *rows = narrower
    shown = Table(box=None, pad_edge=False, padding=(0, _GAP, 0, 0), header_style=STYLES["head"])
    for name in head:
        to_the_right = name in _TO_THE_RIGHT
        shown.add_column(name, justify="right" if to_the_right else "left", no_wrap=True)
    for id, state, *rest in rows:
        fits = cell_len(id) <= room
        shown.add_row(id if fits else "", Text(state, STYLES.get(state, "")), *rest)
    header, *lines = out.render_lines(shown, pad=False)
    yield header
    for (id, *_), line in zip(rows, lines, strict=True):
        if cell_len(id) > room:
            yield [Segment(id)]
        yield line


def _narrowing(table: Sequence[Cells]) -> Iterator[Sequence[Cells]]:
    """Yield narrower and narrower tables: without WORKFLOW, with NEXT in LEASE, with LEASE cut.

    NEXT and LEASE can share a column: a run whose lease is held has nothing next.
    """
    yield table
    yield (table := [row[:-1] for row in table])
    head, *rows = table
    shared = [(*row[:_LEASE], row[-1] if row[_LEASE] == "-" else row[_LEASE]) for row in rows]
    yield (table := [(*head[:_LEASE], "LEASE/NEXT"), *shared])
    yield [(*row[:_LEASE], _end_of(row[_LEASE])) for row in table]


def _end_of(text: str) -> str:
    """Cut ``text`` on its left, because the host names of pods differ at their end."""
    return text if cell_len(text) <= _NARROW else ellipsis() + text[1 - _NARROW :]


def _widths(table: Sequence[Cells]) -> list[int]:
    return [max(map(cell_len, column)) for column in zip(*table, strict=True)]


def numbers(stats: StoreStats, oldest: RunInfo | None, prefix: str) -> Iterator[Line]:
    """Show what `SnapshotStore.stats` counts, and the run that has been pending longest."""
    by_state = [(state, stats.by_state[state]) for state in STATES if state in stats.by_state]
    counts = [("total", stats.total), *by_state]
    digits = max(len(f"{count:,}") for _, count in counts)
    for name, count in counts:
        yield [(f"{name:<14}  {count:>{digits},}", name)]
    yield [(f"{'size':<14}  {decimal(stats.bytes)}", "")]
    waiting = "none"
    if oldest is not None:
        waiting = f"{printable(prefix + oldest.id)}, unchanged for {age(oldest.age)}"
    yield [(f"{'oldest pending':<14}  {waiting}", "")]
