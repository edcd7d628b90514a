"""Resuming pending runs: from cron, by hand, or as a worker that runs until it is stopped."""

from __future__ import annotations

import importlib
import os
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import click
from attrs import define, field
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from .. import Durable, Outcome, StoreUnavailable, WorkflowSuspended
from .._worker import Signals
from ..store.text import printable, verdict
from .text import Line, err, in_lines, out, span, write


def import_durable(target: str) -> Durable:
    """Import a Durable by ``package.module:name``, looking in the current directory first."""
    module_name, _, path = target.partition(":")
    if not module_name or not path:
        raise click.BadParameter(f"{target!r} is not of the form package.module:durable")
    sys.path.insert(0, os.getcwd())
    try:
        found: Any = importlib.import_module(module_name)
    except Exception as error:
        where = [f for f in traceback.extract_tb(error.__traceback__) if f.filename[0] != "<"][2:]
        at = f" ({where[-1].filename}:{where[-1].lineno})" if where else ""
        raise click.BadParameter(
            f"importing {module_name!r} failed: {type(error).__name__}: {error}{at}"
        ) from None
    for name in path.split("."):
        if not hasattr(found, name):
            raise click.BadParameter(f"{module_name!r} has no {path!r}")
        found = getattr(found, name)
    if not isinstance(found, Durable):
        raise click.BadParameter(f"{target!r} is {type(found).__name__}, not a Durable")
    return found


@define
class Worker:
    """Resumes workflows and reports each. After a signal it starts no more."""

    durable: Durable
    signals: Signals
    verbose: bool = False
    workers: int = 1
    counts: Counter[str] = field(factory=Counter)

    def once(self, ids: Sequence[str], prefix: str, limit: int) -> None:
        """Resume these ids, or else all pending runs; with a progress bar on a terminal."""
        durable = self.durable
        if self.verbose or not err.is_terminal:
            self._pass(ids, prefix, limit, self._print)
            return
        total = len(ids or durable.list_pending(prefix, limit))
        columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        with Progress(TextColumn("resuming"), *columns, console=err, transient=True) as progress:
            task = progress.add_task("", total=total)

            def report(outcome: Outcome, lines: Sequence[Line]) -> None:
                progress.advance(task)
                if outcome.status != "completed":
                    write(lines, err)

            self._pass(ids, prefix, limit, report)
        told = ", ".join(f"{count} {status}" for status, count in sorted(self.counts.items()))
        err.print(told or "nothing is pending")

    def loop(self, prefix: str, limit: int, pause: float) -> None:
        """Resume pending runs again and again, ``pause`` seconds apart, surviving outages."""
        while True:
            try:
                self._pass((), prefix, limit, self._print)
            except StoreUnavailable as error:
                click.echo(printable(f"{error}; trying again in {pause:g} s"), err=True)
            self.signals.sleep(pause)

    def _print(self, outcome: Outcome, lines: Sequence[Line]) -> None:
        if outcome.status == "failed":
            write(lines, err)
        elif self.verbose or out.is_terminal:
            write(lines)

    def _pass(
        self,
        ids: Sequence[str],
        prefix: str,
        limit: int,
        show: Callable[[Outcome, Sequence[Line]], None],
    ) -> None:
        started = time.monotonic()

        def report(outcome: Outcome) -> None:
            nonlocal started
            now = time.monotonic()
            self.counts[outcome.status] += 1
            seconds = now - started if self.workers == 1 else None
            show(outcome, _lines(outcome, seconds, self.verbose))
            started = now
            self.signals.exit_if_stopped()

        if not ids:
            self.durable.resume_pending(
                prefix=prefix, limit=limit, workers=self.workers, on_progress=report
            )
        for id in ids:
            report(self.durable.try_resume(id))


def _lines(outcome: Outcome, seconds: float | None, verbose: bool) -> list[Line]:
    """Describe an outcome in one line, or more if its error has several."""
    line: Line = [(f"{outcome.status:<9}", outcome.status), (f"  {printable(outcome.id)}", "")]
    line += [] if seconds is None else [(f"  {span(seconds)}", "dim")]
    error = outcome.error
    if error is None:
        return [line]
    if outcome.status == "suspended" and isinstance(error, WorkflowSuspended):
        return [[*line, (f"  in step {error.key!r}", "")]]
    first, *others = in_lines(f"{type(error).__name__}: {error}")
    if verbose and outcome.status == "failed":
        others = in_lines("".join(traceback.format_exception(error)).rstrip("\n"))
    line.append((f"  {first}", ""))
    if outcome.status == "failed" and (told := verdict(outcome.attempts, outcome.retry_at)):
        line.append((f" ({told})", ""))
    return [line, *([(f"    {other}", "")] for other in others)]
