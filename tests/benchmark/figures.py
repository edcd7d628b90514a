"""Figures with their spread, tables of them, and how both are written down."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from statistics import median
from typing import Any

from attrs import define, field, frozen


@frozen
class Figure:
    """One measured quantity: a sample from each round."""

    samples: tuple[float, ...] = field(converter=tuple)

    @property
    def median(self) -> float:
        return median(self.samples)

    def __truediv__(self, other: Figure) -> Figure:
        """The ratio, round by round: what disturbed the machine in a round disturbed both."""
        return Figure(a / b for a, b in zip(self.samples, other.samples, strict=True))

    def __sub__(self, other: Figure) -> Figure:
        return Figure(a - b for a, b in zip(self.samples, other.samples, strict=True))

    def __mul__(self, factor: float) -> Figure:
        return Figure(factor * sample for sample in self.samples)

    def __str__(self) -> str:
        low, high = short(min(self.samples)), short(max(self.samples))
        middle = short(self.median)
        return middle if low == high else f"{middle} ({low}–{high})"

    def to_json(self) -> dict[str, Any]:
        return {"median": self.median, "samples": list(self.samples)}


Cell = str | Figure


@frozen
class Target:
    """A figure with the limit it should keep to."""

    what: str
    figure: Figure
    limit: float
    at_least: bool = False
    why: str = ""  # it is missed, where it is

    @property
    def met(self) -> bool:
        """Of the figure as it is printed."""
        shown = float(short(self.figure.median).replace(",", ""))
        return shown >= self.limit if self.at_least else shown <= self.limit

    def __str__(self) -> str:
        sign = "≥" if self.at_least else "≤"
        verdict = "met   " if self.met else "MISSED"
        text = f"{verdict}  {self.what}: {self.figure}, should be {sign} {self.limit:g}"
        return text if self.met or not self.why else f"{text}\n        {self.why}"


@define
class Table:
    """What one part of the benchmark has found."""

    name: str
    title: str
    columns: Sequence[str]
    rows: list[dict[str, Cell]] = field(factory=list)
    targets: list[Target] = field(factory=list)
    notes: list[str] = field(factory=list)

    def add(self, *cells: Cell) -> None:
        self.rows.append(dict(zip(self.columns, cells, strict=True)))

    def __str__(self) -> str:
        lines = [list(self.columns), *([str(cell) for cell in row.values()] for row in self.rows)]
        widths = [max(len(line[nr]) for line in lines) for nr in range(len(self.columns))]
        text = [f"\n{self.title}\n"]
        for line in lines:
            cells = (cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True))
            text.append("  ".join([line[0].ljust(widths[0]), *cells]))
        text += ["", *self.notes] if self.notes else []
        text += ["", *map(str, self.targets)] if self.targets else []
        return "\n".join(text)

    def to_json(self) -> dict[str, Any]:
        return {
            "title": self.title,
            "rows": [
                {
                    name: cell.to_json() if isinstance(cell, Figure) else cell
                    for name, cell in row.items()
                }
                for row in self.rows
            ],
            "targets": [
                {
                    "what": target.what,
                    "limit": target.limit,
                    "at_least": target.at_least,
                    "met": target.met,
                    "why": target.why,
                }
                | target.figure.to_json()
                for target in self.targets
            ],
            "notes": self.notes,
        }


def figures(samples: Iterable[Sequence[float]]) -> list[Figure]:
    """Turn rounds of samples into one figure for each place in them."""
    return [Figure(place) for place in zip(*samples, strict=True)]


def short(value: float) -> str:
    """Three digits that count."""
    if abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"
