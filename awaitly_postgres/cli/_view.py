"""How workflows look: the listing, one with its timeline, and the numbers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from attrs import define, frozen
from rich.cells import cell_len
from rich.filesize import decimal
from rich.text import Text

from .._printable import printable
from ..snapshot import WorkflowSnapshot
from ..store.rows import StoreStats, is_input
from ._rows import Row, read_time
from ._text import Line, age, as_json, ellipsis, fit, out, span

_MANY = 60  # steps up to which a timeline shows them all
_SOME = 10  # first, last, longest and failed ones that it shows of more
_BRIEF = 400  # characters of an input or output
_PIPE = 100  # columns of a timeline in a pipe

# -- the listing ---------------------------------------------------------------------------

_HEAD = ("ID", "STATUS", "AGE", "STEPS", "LEASE", "NEXT", "WORKFLOW")
_LEASE = _HEAD.index("LEASE")
_NARROW = 18  # columns at least for LEASE, if it has so many


def listing(rows: Sequence[Row], columns: int | None) -> Iterator[Line]:
    """Show one line for each: in a pipe all columns and nothing cut, on a terminal what fits."""
    table, widths = _fitting([_HEAD, *map(_cells, rows)], columns)
    for i, cells in enumerate(table):
        line: Line = []
        for name, text, width in zip(_HEAD, cells, widths, strict=False):
            style = "head" if i == 0 else text if name == "STATUS" else ""
            if name == "ID" and cell_len(text) > width:
                # Never cut: it is there to be copied. The rest follows on the next line.
                yield [(text, style)]
                text = ""
            if name == "LEASE" and cell_len(text) > width:
                text = ellipsis() + text[1 - width :]  # pods of one name differ at its end
            pad = " " * (width - cell_len(text))
            line += [(pad + text if name in ("AGE", "STEPS") else text + pad, style), ("  ", "")]
        line.pop()
        line[-1] = (line[-1][0].rstrip(), line[-1][1])
        yield line


def _cells(row: Row) -> tuple[str, ...]:
    holder = holder_of(row.holder) if row.holder else ""
    cells = (row.id, row.status, age(row.age), f"{row.steps}", holder, row.next, row.workflow)
    return tuple(printable(cell or "-") for cell in cells)


def _fitting(
    table: Sequence[tuple[str, ...]], columns: int | None
) -> tuple[Sequence[tuple[str, ...]], list[int]]:
    """Leave out WORKFLOW, put NEXT into LEASE, narrow LEASE and then ID, until a line fits.

    NEXT and LEASE share a column well: what somebody holds has nothing next.
    """

    def widths() -> list[int]:
        return [max(map(cell_len, column)) for column in zip(*table, strict=True)]

    def excess() -> int:
        return 0 if columns is None else max(sum(fitted) + 2 * len(fitted) - 2 - columns, 0)

    fitted = widths()
    if excess():
        table = [row[:-1] for row in table]
        fitted = widths()
    if excess():
        table = [
            (*row[:_LEASE], f"{row[_LEASE]}/{row[-1]}" if i == 0 else _either(*row[_LEASE:]))
            for i, row in enumerate(table)
        ]
        fitted = widths()
    fitted[_LEASE] -= min(excess(), max(fitted[_LEASE] - _NARROW, 0))
    fitted[0] = max(fitted[0] - excess(), len("ID"))
    return table, fitted


def _either(lease: str, next: str) -> str:
    return next if lease == "-" else lease


def holder_of(token: str) -> str:
    """Return ``host:pid`` of a lease's token; the rest is only there to be unlike any other."""
    return token.rpartition(":")[0] or token


# -- one workflow --------------------------------------------------------------------------


def one(
    row: Row, snapshot: WorkflowSnapshot, columns: int | None, everything: bool
) -> Iterator[Line]:
    """Show a workflow: what it is, how it stands, and the timeline of its steps."""
    yield [(printable(row.id), "head")]
    for label, text, style in _facts(row, snapshot, everything):
        indent = " " * 10
        lines = [text] if columns is None else _wrapped(text, columns - len(indent))
        for i, part in enumerate(lines):
            yield [(fit(label, 8) + "  " if i == 0 else indent, "dim"), (part, style)]
    yield []
    yield from timeline(snapshot, columns, everything)


def _facts(
    row: Row, snapshot: WorkflowSnapshot, everything: bool
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
        left = span((row.held_until - row.now).total_seconds())
        held = f"held by {holder_of(row.holder)}, {left} left unless renewed"
        yield "lease", printable(held), "running"
    if row.next:
        yield "next", printable(row.next), "suspended"
    for name in ("input", "output"):
        if name in metadata:
            yield name, _call(metadata[name], most), ""
    if isinstance(failure := metadata.get("failure"), Mapping):
        reasons = list(_reasons({"cause": failure}))
        failed = (step for step in snapshot.to_json()["steps"].values() if not step["ok"])
        if reasons not in map(list, map(_reasons, failed)):  # else the timeline tells it
            for i, reason in enumerate(reasons):
                yield "" if i else "failure", reason, "failed"


def _call(value: Any, most: int | None) -> str:
    """Write an input as the arguments that it was."""
    if not is_input(value):
        return as_json(value, most)
    args = [as_json(arg, most) for arg in value["args"]]
    args += [f"{printable(name)}={as_json(arg, most)}" for name, arg in value["kwargs"].items()]
    return f"({', '.join(args)})"


def _reasons(step: Mapping[str, Any]) -> Iterator[str]:
    """Say why a step failed, and why that, one line each."""
    cause, before = step.get("cause"), ""
    if not isinstance(cause, Mapping):
        yield as_json(step.get("error"), _BRIEF)
        return
    while isinstance(cause, Mapping):
        name = cause.get("name") or cause.get("originalType")
        message = cause.get("message", cause.get("stringRepresentation"))
        yield before + printable(": ".join(str(part) for part in (name, message) if part))
        cause, before = cause.get("cause"), "caused by "


# -- the timeline --------------------------------------------------------------------------


@define
class _Bar:
    """A step on the axis of time, in seconds; ``at`` is None if nobody measured it."""

    key: str
    step: Mapping[str, Any]
    seq: float
    at: float | None
    seconds: float
    pause: float = 0.0  # cut out of the axis before it

    @property
    def ok(self) -> bool:
        return bool(self.step.get("ok"))


def timeline(snapshot: WorkflowSnapshot, columns: int | None, everything: bool) -> Iterator[Line]:
    """Show each step as a bar where and as long as it ran; of many, the telling ones.

    Long pauses (a sleep, a night until the next attempt) are cut out and told of instead.
    """
    bars = _bars(snapshot)
    length = _lay_out(bars)
    measured = any(bar.at is not None for bar in bars)
    wall = length + sum(bar.pause for bar in bars)
    count = f"{len(bars):,} step{'' if len(bars) == 1 else 's'}"
    yield [(f"{count}, {_work(bars)} of work in {span(wall)}" if measured else count, "head")]

    few = everything or len(bars) <= _MANY
    shown = [*range(len(bars))] if few else sorted(_telling(bars))
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
        for reason in () if bar.ok else _reasons(bar.step):
            lines = [reason] if columns is None else _wrapped(reason, columns - 4)
            yield from ([(f"    {part}", "failed")] for part in lines)
        last = i
    if not few:
        yield [("first, last, longest and failed steps only; --all shows every one", "dim")]


@frozen
class _Space:
    """Columns of a timeline for the keys, the bars and the values."""

    key: int
    bar: int
    value: int


def _space(bars: Sequence[_Bar], columns: int | None) -> _Space:
    key = max((cell_len(printable(bar.key)) for bar in bars), default=0)
    if columns is None:  # keys are not cut, and lines end where they end
        return _Space(key, max(_PIPE - key - 13, 20), 0)
    key = min(key, columns * 2 // 5)
    left = columns - key - 13
    value = left // 2 if left > 80 else 0
    return _Space(key, max(left - value - (2 if value else 0), 8), value)


def _step(bar: _Bar, length: float, space: _Space) -> Line:
    ascii_only = out.options.ascii_only
    good, bad = ("+", "!") if ascii_only else ("✓", "✗")
    style = "completed" if bar.ok else "failed"
    line = [(f"{good if bar.ok else bad} ", style), (fit(printable(bar.key), space.key), "")]
    drawn = ""
    if bar.at is not None:
        stroke, dot = ("=", "-") if ascii_only else ("━", "╸")
        scale = space.bar / length if length else 0.0
        start = min(int(bar.at * scale), space.bar - 1)
        drawn = " " * start + stroke * min(round(bar.seconds * scale), space.bar - start)
        drawn = drawn if drawn.strip() else drawn + dot
        line += [(f"  {_work([bar]):>7}", "dim"), (f"  {drawn}", style)]
    if space.value and bar.ok:
        value = fit(as_json(bar.step.get("value"), 4 * space.value), space.value)
        line.append((" " * (space.bar + 2 - len(drawn)) + value.rstrip(), "dim"))
    return line


def _bars(snapshot: WorkflowSnapshot) -> list[_Bar]:
    """Return the steps in the order in which they began."""
    bars = []
    for key, step in snapshot.to_json()["steps"].items():
        meta = step.get("meta") or {}
        started = read_time(meta.get("startedAt"))
        seconds = _number(meta.get("durationMs")) / 1000
        seq = _number(meta.get("seq")) or float("inf")
        at = None if started is None else started.timestamp()
        bars.append(_Bar(key, step, seq, at, seconds))
    bars.sort(key=lambda bar: bar.seq)
    return sorted(bars, key=lambda bar: float("inf") if bar.at is None else bar.at)


def _lay_out(bars: Sequence[_Bar]) -> float:
    """Move the bars to where they are on an axis without long pauses; return its length."""
    measured = [bar for bar in bars if bar.at is not None]
    if not measured:
        return 0.0
    long = max(1.0, sum(bar.seconds for bar in measured) / 4)
    start = end = measured[0].at or 0.0
    cut = 0.0
    for bar in measured:
        at = (bar.at or 0.0) - cut
        if at - end > long:
            bar.pause = at - end
            cut += bar.pause
            at = end
        bar.at = at - start
        end = max(end, at + bar.seconds)
    return end - start


def _telling(bars: Sequence[_Bar]) -> set[int]:
    """Choose of many steps the first, the last, the failed, and the longest that matter."""
    order = range(len(bars))
    share = sum(bar.seconds for bar in bars) / 100
    longest = sorted(order, key=lambda i: bars[i].seconds, reverse=True)[:_SOME]
    longest = [i for i in longest if bars[i].seconds > share]
    failed = [i for i in order if not bars[i].ok][-_SOME:]
    return {*order[:_SOME], *order[-_SOME:], *longest, *failed}


def _work(bars: Sequence[_Bar]) -> str:
    return span(sum(bar.seconds for bar in bars))


def _number(value: object) -> float:
    return float(value) if isinstance(value, (int, float)) and value > 0 else 0.0


def _wrapped(text: str, columns: int) -> list[str]:
    return [line.plain.rstrip() for line in Text(text).wrap(out, max(columns, 20))]


# -- the numbers ---------------------------------------------------------------------------


def numbers(stats: StoreStats, oldest: Row | None, prefix: str) -> Iterator[Line]:
    """Show what `SnapshotStore.stats` counts, and what has waited longest."""
    counts = [("total", stats.total), *sorted(stats.by_status.items())]
    digits = max(len(f"{count:,}") for _, count in counts)
    for name, count in counts:
        yield [(f"{printable(name):<14}  {count:>{digits},}", name)]
    yield [(f"{'size':<14}  {decimal(stats.bytes)}", "")]
    waiting = "none"
    if oldest is not None:
        waiting = f"{printable(prefix + oldest.id)}, untouched for {age(oldest.age)}"
    yield [(f"{'oldest pending':<14}  {waiting}", "")]
