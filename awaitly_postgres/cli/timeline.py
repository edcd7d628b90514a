"""How one workflow is shown: its facts, and the timeline of its steps."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from attrs import define, frozen
from rich.cells import cell_len

from ..store.rows import RunInfo, StepInfo, is_input
from ..store.text import age, elide_steps, fold_maps, printable
from .listing import to_json
from .text import Line, as_json, fit, in_lines, out, span

_MANY = 60  # steps; a longer timeline leaves some out
_LAST = 12  # lines; a longer traceback shows its end
_BRIEF = 400  # characters of an input or output
_PIPE = 100  # columns of a timeline in a pipe

# -- one workflow --------------------------------------------------------------------------


def one(row: RunInfo, columns: int | None, everything: bool) -> Iterator[Line]:
    """Show a workflow within ``columns``; None is a pipe, where nothing is cut to fit."""
    yield [(printable(row.id), "head")]
    for label, text, style in _facts(row, None if everything else _BRIEF):
        indent = " " * 11
        for i, part in enumerate(in_lines(text, columns and columns - len(indent))):
            yield [(fit(label, 9) + "  " if i == 0 else indent, "dim"), (part, style)]
    yield []
    yield from timeline(row.steps, columns, everything)
    if row.traceback is not None:
        yield from _traceback(row.traceback, columns, everything)


def one_to_json(row: RunInfo) -> dict[str, Any]:
    """Return what ``--json`` prints for a workflow: the fields of `RunInfo` and `StepInfo`."""
    fields = ("input", "result", "traceback")
    steps = [
        {
            "key": step.key,
            "state": step.state,
            "started_at": step.started_at,
            "duration": step.duration,
            "value": step.value,
            "error": _error(step.reasons),
            "traceback": step.traceback,
        }
        for step in row.steps
    ]
    return {**to_json(row), **to_json(row, fields), "error": _error(row.reasons), "steps": steps}


def _facts(row: RunInfo, most: int | None) -> Iterator[tuple[str, str, str]]:
    when = f"{row.updated_at:%Y-%m-%d %H:%M:%S} UTC"
    yield "state", f"{row.state}, {age(row.age)} ago ({when})", row.state
    if row.workflow is not None:
        started = f", started {row.attempts} times" if row.attempts > 1 else ""
        yield "workflow", f"{row.workflow}, version {row.version}{started}", ""
    if row.holder is not None and row.held_until is not None:
        left = span((row.held_until - row.seen_at).total_seconds())
        yield "lease", f"held by {row.held_by}, {left} left unless renewed", "running"
    if row.state == "running":
        last = max(row.steps, key=_seq, default=None)
        current = f"the step after {last.key}" if last else "before the first step"
        yield "current", row.progress or current, ""
    if row.what_next:
        yield "next", row.what_next, "waiting"
    if row.metadata:
        yield "metadata", as_json(row.metadata, most), ""
    if row.input is not None:
        yield "input", _call(row.input, most), ""
    if row.state == "completed":
        yield "result", as_json(row.result, most), ""
    if error := _error(row.reasons):
        yield "error", error, "failed"


def _traceback(text: str, columns: int | None, everything: bool) -> Iterator[Line]:
    """Show where it failed: of a long traceback the end, which is nearest to the failure."""
    lines = in_lines(text.rstrip("\n"), columns and columns - 4)
    hidden = 0 if everything else max(len(lines) - _LAST, 0)
    yield []
    yield [("traceback", "head")]
    if hidden:
        yield [(f"{_dots()} {hidden} more lines; --all shows them", "dim")]
    yield from ([(f"    {line}", "failed")] for line in lines[hidden:])


def _error(reasons: Sequence[str]) -> str | None:
    return "\ncaused by ".join(reasons) or None


def _seq(step: StepInfo) -> float:
    return step.seq


def _dots() -> str:
    return ":" if out.options.ascii_only else "⋮"


def _call(value: Any, most: int | None) -> str:
    """Write an input as the arguments of a call."""
    if not is_input(value):
        return as_json(value, most)
    args = [as_json(arg, most) for arg in value["args"]]
    args += [f"{printable(name)}={as_json(arg, most)}" for name, arg in value["kwargs"].items()]
    return f"({', '.join(args)})"


# -- the timeline --------------------------------------------------------------------------


@define
class _Bar:
    """A step on the time axis; ``at`` is its start in seconds, None if it has no recorded time."""

    step: StepInfo
    at: float | None
    pause: float = 0.0  # seconds cut out of the axis before it


def timeline(steps: Sequence[StepInfo], columns: int | None, everything: bool) -> Iterator[Line]:
    """Show each step as a bar on a time axis; of many steps, only the interesting ones.

    A map is one bar, with how many of its items have completed; items that failed follow it.
    Long pauses (a sleep, a night until the next attempt) are cut out of the axis and shown as text.
    """
    count = f"{len(steps):,} step{'' if len(steps) == 1 else 's'}"
    work = span(sum(step.seconds for step in steps))
    steps = steps if everything else fold_maps(steps)
    bars = [_Bar(s, None if s.started_at is None else s.started_at.timestamp()) for s in steps]
    length = _lay_out(bars)
    measured = any(bar.at is not None for bar in bars)
    wall = length + sum(bar.pause for bar in bars)
    yield [(f"{count}, {work} of work in {span(wall)}" if measured else count, "head")]

    shown = elide_steps(steps, len(steps) if everything else _MANY)
    space = _space([bars[i] for i in shown], columns)
    dots = _dots()
    last = -1
    for i in shown:
        bar, hidden = bars[i], bars[last + 1 : i]
        if hidden:
            of_work = f", {_work(hidden)}" if measured else ""
            yield [(f"{dots} {len(hidden):,} more{of_work}", "dim")]
        if pause := sum(other.pause for other in (*hidden, bar)):
            yield [(f"{dots} {span(pause)} later", "dim")]
        yield _step(bar, length, space)
        if error := _error(bar.step.reasons):
            yield from (
                [(f"    {part}", "failed")] for part in in_lines(error, columns and columns - 4)
            )
        elif everything and bar.step.map_count == 0:
            value = as_json(bar.step.value, None)
            yield from (
                [(f"    {part}", "dim")] for part in in_lines(value, columns and columns - 4)
            )
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
    if space.value and step.ok and step.map_count == 0:
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
