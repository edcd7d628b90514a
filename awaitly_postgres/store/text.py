"""Text for people: durations, ages, failures, the steps worth showing, escaped text."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from typing import TYPE_CHECKING

from attrs import evolve

if TYPE_CHECKING:  # rows.py imports this module
    from .rows import StepInfo

_CAUSED = "\nThe above exception was the direct cause of the following exception:\n\n"
_FEW = 10  # of many steps, this many of the first, last, longest and failed are shown


def printable(text: str, keep: str = "") -> str:
    """Escape control characters: ids and messages can contain any text."""
    if text.isprintable():
        return text
    return "".join(
        c if c.isprintable() or c in keep else c.encode("unicode_escape").decode() for c in text
    )


def span(seconds: float) -> str:
    """Write a duration: ``40 µs``, ``0.3 ms``, ``12 ms``, ``1.2 s``, ``3m12s``, ``4d``."""
    if seconds < 0.9995:
        milliseconds = max(seconds, 0.0) * 1000
        if milliseconds < 0.0995:
            return f"{milliseconds * 1000:.0f} µs"
        return f"{milliseconds:.1f} ms" if milliseconds < 9.95 else f"{milliseconds:.0f} ms"
    if seconds < 59.5:
        return f"{seconds:.1f} s" if seconds < 9.95 else f"{seconds:.0f} s"
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


def verdict(attempts: int, retry_at: datetime | None) -> str:
    """Write what becomes of a failed run: ``attempt 3, again in 4.0 s`` or that it was given up.

    Empty if it was not started at all.
    """
    if not attempts:
        return ""
    if retry_at is None:
        return f"given up after {attempts} attempt{'' if attempts == 1 else 's'}"
    left = (retry_at - datetime.now(timezone.utc)).total_seconds()
    return f"attempt {attempts}, again in {span(max(left, 1.0))}"  # the clocks may differ


def elide(text: str, most: int | None, sign: str = "…") -> str:
    """Cut ``text`` to at most ``most`` characters, ``sign`` included; None does not cut."""
    return text if most is None or len(text) <= most else text[: most - len(sign)] + sign


def reasons(failure: object) -> tuple[str, ...]:
    """Describe a recorded failure and its causes, one line each, nearest first."""
    told = []
    while isinstance(failure, Mapping):
        name = failure.get("name") or failure.get("originalType")
        message = failure.get("message", failure.get("stringRepresentation"))
        if name or message:
            told.append(": ".join(str(part) for part in (name, message) if part))
        failure = failure.get("cause")
    return tuple(told)


def traceback_of(failure: object) -> str | None:
    """Return the stored traceback of a failure, preceded by those of its causes as in Python."""
    stacks: list[str] = []
    while isinstance(failure, Mapping):
        if isinstance(stack := failure.get("stack"), str):
            stacks.insert(0, stack)
        failure = failure.get("cause")
    return _CAUSED.join(stacks) or None


def fold_maps(steps: Sequence[StepInfo]) -> list[StepInfo]:
    """Replace the completed items of each map by one entry, such as ``resize 317/1000``."""
    shown: dict[str, StepInfo] = {}
    completed = Counter(step.map for step in steps if step.ok)
    for step in steps:
        folded = shown.get(f"\0{step.map}")
        if step.map is None or not step.ok:
            shown[step.key] = step
        elif folded is None:
            progress = f"{step.map} {completed[step.map]}/{step.map_count}"
            shown[f"\0{step.map}"] = evolve(step, key=progress, value=None)
        elif folded.started_at is not None and step.started_at is not None:
            lasted = (step.started_at - folded.started_at).total_seconds() + step.seconds
            shown[f"\0{step.map}"] = evolve(folded, duration=max(folded.seconds, lasted))
    return [*shown.values()]


def elide_steps(steps: Sequence[StepInfo], most: int) -> list[int]:
    """Return the indices of the steps to show: all, or a selection if there are over ``most``.

    The selection is the first, the last, the failed, and those that took longest.
    """
    order = range(len(steps))
    if len(steps) <= most:
        return [*order]
    share = sum(step.seconds for step in steps) / 100
    longest = sorted(order, key=lambda i: steps[i].seconds, reverse=True)[:_FEW]
    longest = [i for i in longest if steps[i].seconds > share]
    failed = [i for i in order if not steps[i].ok][-_FEW:]
    return sorted({*order[:_FEW], *order[-_FEW:], *longest, *failed})
