"""How one workflow is shown: its facts, and the timeline of its steps."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from attrs import define, frozen
from rich.cells import cell_len
from rich.text import Text

from .. import WorkflowSnapshot
from ..store.rows import RunInfo, StepInfo, elide_steps, is_input, printable, reasons, steps_of
from .listing import what_next
from .text import Line, age, as_json, fit, out, span

_MANY = 60  # steps; a longer timeline leaves some out
_BRIEF = 400  # characters of an input or output
_PIPE = 100  # columns of a timeline in a pipe

# -- one workflow --------------------------------------------------------------------------


def one(
    row: RunInfo, snapshot: WorkflowSnapshot, columns: int | None, everything: bool
) -> Iterator[Line]:
    """Show a workflow within ``columns``; None is a pipe, where nothing is cut to fit."""
    steps = steps_of(snapshot)
    yield [(printable(row.id), "head")]
    for label, text, style in _facts(row, snapshot, steps, everything):
        indent = " " * 10
        lines = [text] if columns is None else _wrapped(text, columns - len(indent))
        for i, part in enumerate(lines):
            yield [(fit(label, 8) + "  " if i == 0 else indent, "dim"), (part, style)]
    yield []
    yield from timeline(steps, columns, everything)


def _facts(
    row: RunInfo, snapshot: WorkflowSnapshot, steps: Sequence[StepInfo], everything: bool
) -> Iterator[tuple[str, str, str]]:
    metadata = snapshot.metadata or {}
    most = None if everything else _BRIEF
    when = f"{row.updated_at:%Y-%m-%d %H:%M:%S} UTC"
    yield "status", f"{row.status}, {age(row.age)} ago ({when})", row.status
    if row.workflow is not None:
        version, attempts = metadata.get("version", 1), metadata.get("attempts")
        started = f", started {attempts} times" if attempts not in (None, 0, 1) else ""
        yield "workflow", printable(f"{row.workflow}, version {version}{started}"), ""
    if row.holder is not None and row.held_until is not None:
        left = span((row.held_until - row.seen_at).total_seconds())
        held = f"held by {row.held_by}, {left} left unless renewed"
        yield "lease", printable(held), "running"
    if next := what_next(row):
        yield "next", printable(next), "suspended"
    for name in ("input", "output"):
        if name in metadata:
            yield name, _call(metadata[name], most), ""
    failure = reasons(metadata.get("failure"))
    if not any(step.reasons == failure for step in steps):  # otherwise the timeline shows it
        for i, reason in enumerate(_chain(failure)):
            yield "" if i else "failure", reason, "failed"


def _call(value: Any, most: int | None) -> str:
    """Write an input as the arguments of a call."""
    if not is_input(value):
        return as_json(value, most)
    args = [as_json(arg, most) for arg in value["args"]]
    args += [f"{printable(name)}={as_json(arg, most)}" for name, arg in value["kwargs"].items()]
    return f"({', '.join(args)})"


def _chain(reasons: Sequence[str]) -> list[str]:
    return [printable(f"caused by {text}" if i else text) for i, text in enumerate(reasons)]


# -- the timeline --------------------------------------------------------------------------


@define
class _Bar:
    """A step on the time axis; ``at`` is its start in seconds, None if it has no recorded time."""

    step: StepInfo
    at: float | None
    pause: float = 0.0  # seconds cut out of the axis before it


def timeline(steps: Sequence[StepInfo], columns: int | None, everything: bool) -> Iterator[Line]:
    """Show each step as a bar on a time axis; of many steps, only the interesting ones.

    Long pauses (a sleep, a night until the next attempt) are cut out of the axis and shown as text.
    """
    bars = [_Bar(s, None if s.started_at is None else s.started_at.timestamp()) for s in steps]
    length = _lay_out(bars)
    measured = any(bar.at is not None for bar in bars)
    wall = length + sum(bar.pause for bar in bars)
    count = f"{len(bars):,} step{'' if len(bars) == 1 else 's'}"
    yield [(f"{count}, {_work(bars)} of work in {span(wall)}" if measured else count, "head")]

    shown = elide_steps(steps, len(steps) if everything else _MANY)
    space = _space([bars[i] for i in shown], columns)
    dots = ":" if out.options.ascii_only else "⋮"
    last = -1
    for i in shown:
        bar, hidden = bars[i], bars[last + 1 : i]
        if hidden:
            work = f", {_work(hidden)}" if measured else ""
            yield [(f"{dots} {len(hidden):,} more{work}", "dim")]
        if pause := sum(other.pause for other in (*hidden, bar)):
            yield [(f"{dots} {span(pause)} later", "dim")]
        yield _step(bar, length, space)
        for reason in _chain(bar.step.reasons):
            lines = [reason] if columns is None else _wrapped(reason, columns - 4)
            yield from ([(f"    {part}", "failed")] for part in lines)
        last = i
    if len(shown) < len(bars):
        yield [("first, last, longest and failed steps only; --all shows every one", "dim")]


@frozen
class _Space:
    """The widths, in columns, of the keys, bars and values of a timeline."""

    key: int
    bar: int
    value: int


def _space(bars: Sequence[_Bar], columns: int | None) -> _Space:
    key = max((cell_len(printable(bar.step.key)) for bar in bars), default=0)
    if columns is None:  # a pipe: keys are not cut, and there is no right margin
        return _Space(key, max(_PIPE - key - 13, 20), 0)
    key = min(key, columns * 2 // 5)
    left = columns - key - 13
    value = left // 2 if left > 80 else 0
    return _Space(key, max(left - value - (2 if value else 0), 8), value)


def _step(bar: _Bar, length: float, space: _Space) -> Line:
    step = bar.step
    ascii_only = out.options.ascii_only
    good, bad = ("+", "!") if ascii_only else ("✓", "✗")
    style = "completed" if step.ok else "failed"
    line = [(f"{good if step.ok else bad} ", style), (fit(printable(step.key), space.key), "")]
    drawn = ""
    if bar.at is not None:
        stroke, dot = ("=", "-") if ascii_only else ("━", "╸")
        scale = space.bar / length if length else 0.0
        start = min(int(bar.at * scale), space.bar - 1)
        drawn = " " * start + stroke * min(round(step.seconds * scale), space.bar - start)
        drawn = drawn if drawn.strip() else drawn + dot
        line += [(f"  {_work([bar]):>7}", "dim"), (f"  {drawn}", style)]
    if space.value and step.ok:
        value = fit(as_json(step.value, 4 * space.value), space.value)
        line.append((" " * (space.bar + 2 - len(drawn)) + value.rstrip(), "dim"))
    return line


def _lay_out(bars: Sequence[_Bar]) -> float:
    """Place the bars on an axis without long pauses; return its length in seconds."""
    measured = [bar for bar in bars if bar.at is not None]
    if not measured:
        return 0.0
    long = max(1.0, sum(bar.step.seconds for bar in measured) / 4)
    start = end = measured[0].at or 0.0
    cut = 0.0
    for bar in measured:
        at = (bar.at or 0.0) - cut
        if at - end > long:
            bar.pause = at - end
            cut += bar.pause
            at = end
        bar.at = at - start
        end = max(end, at + bar.step.seconds)
    return end - start


def _work(bars: Sequence[_Bar]) -> str:
    return span(sum(bar.step.seconds for bar in bars))


def _wrapped(text: str, columns: int) -> list[str]:
    return [line.plain.rstrip() for line in Text(text).wrap(out, max(columns, 20))]
