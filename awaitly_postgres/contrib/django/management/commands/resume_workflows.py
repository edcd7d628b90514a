"""``manage.py resume_workflows``: the worker of runs and tasks, for cron or until it is stopped."""

from __future__ import annotations

import traceback
from collections import Counter
from collections.abc import Sequence
from typing import Any

from django.conf import settings
from django.core.management.base import BaseCommand, CommandError
from django.db import close_old_connections
from django.utils.module_loading import import_string

from awaitly_postgres import Durable, Outcome, StoreError, StoreUnavailable, WorkflowNotFound
from awaitly_postgres._worker import ANY, Signals, quiet_the_driver
from awaitly_postgres.store.text import printable, verdict


class Command(BaseCommand):
    """Prints failures only, unless on a terminal or verbose; exit status 1 if anything failed."""

    help = (
        "Finish pending workflows and tasks: submitted, crashed and failed ones. With ids, start "
        "those runs, even if they were given up. SIGINT and SIGTERM stop it after the current "
        "workflow, a second one stops it at once."
    )
    _counts: Counter[str]
    _signals: Signals

    def add_arguments(self, parser: Any) -> None:
        """Add the arguments: the Durable, and which of its runs to resume."""
        parser.add_argument(
            "args",
            nargs="*",
            metavar="DURABLE | ID",
            help="the dotted path of the Durable (default: settings.AWAITLY_DURABLE), then ids",
        )
        parser.add_argument("--prefix", default="", help="only ids that start with this")
        parser.add_argument("--limit", type=int, help="at most this many in each pass")
        parser.add_argument(
            "--loop",
            type=float,
            metavar="SECONDS",
            help="keep going, with a pause this long between passes",
        )
        parser.add_argument("--workers", type=int, default=1, help="this many at once (1)")
        parser.add_argument(
            "--verbose",
            action="store_true",
            help="a line for each workflow, tracebacks of failures",
        )

    def handle(self, *args: str, **options: Any) -> None:
        """Resume runs, and report each as it ends."""
        quiet_the_driver()
        for name in ("limit", "loop", "workers"):
            if options[name] is not None and not options[name] > 0:
                raise CommandError(f"--{name} must be more than 0, not {options[name]:g}")
        try:
            self._resume(args, options)
        except (StoreError, ValueError) as error:
            raise CommandError(str(error)) from error
        failed, total = self._counts["failed"], self._counts.total()
        if self._is_watched(options):
            self.stdout.write(f"{total} resumed, {failed} failed")
        if failed:
            raise CommandError(f"{failed} of {total} workflows failed")

    def _resume(self, args: Sequence[str], options: dict[str, Any]) -> None:
        durables, ids = _durables_and_ids(args)
        alone = any(options[name] for name in ("prefix", "limit", "loop"))
        if ids and (alone or options["workers"] > 1):
            raise CommandError("give either ids, or --prefix, --limit and --loop")
        self._counts, pause = Counter(), options["loop"]
        self._signals = Signals(loops=bool(pause))
        with self._signals.listening():
            while True:
                try:
                    self._pass(durables, ids, options)
                except StoreUnavailable as error:
                    if not pause:
                        raise
                    self.stderr.write(printable(f"{error}; trying again in {pause:g} s"))
                if not pause:
                    break
                self._signals.sleep(pause)

    def _pass(
        self, durables: Sequence[Durable], ids: Sequence[str], options: dict[str, Any]
    ) -> None:
        def report(outcome: Outcome) -> None:
            self._counts[outcome.status] += 1
            self._tell(outcome, options)
            close_old_connections()  # as Django does between requests
            self._signals.exit_if_stopped()

        close_old_connections()
        for id in ids:
            self._tell_if_over(durables, id)
            report(_resume(durables, id))
        for durable in durables if not ids else ():
            durable.resume_pending(
                prefix=options["prefix"],
                limit=options["limit"] or ANY,
                workers=options["workers"],
                on_progress=report,
            )

    def _tell_if_over(self, durables: Sequence[Durable], id: str) -> None:
        rows = next(filter(None, (durable.store.details([id]) for durable in durables)), [])
        for row in rows:
            if row.state in ("completed", "cancelled", "running"):
                held = f" on {row.held_by}" if row.state == "running" else ""
                self.stderr.write(printable(f"{id!r} is already {row.state}{held}"))

    def _tell(self, outcome: Outcome, options: dict[str, Any]) -> None:
        if outcome.status == "failed":
            error = outcome.error
            text = f"{type(error).__name__}: {printable(str(error))}"
            if options["verbose"] and error is not None:
                text = printable("\n" + "".join(traceback.format_exception(error)), keep="\n")
            told = verdict(outcome.attempts, outcome.retry_at)
            told = f" ({told})" if told else ""
            self.stderr.write(f"failed     {printable(outcome.id)}{told}: {text}")
        elif self._is_watched(options):
            styles = {"completed": self.style.SUCCESS, "suspended": self.style.WARNING}
            style = styles.get(outcome.status, str)
            self.stdout.write(f"{style(f'{outcome.status:<10}')} {printable(outcome.id)}")

    def _is_watched(self, options: dict[str, Any]) -> bool:
        return bool(self.stdout.isatty() or options["verbose"] or options["verbosity"] > 1)


def _resume(durables: Sequence[Durable], id: str) -> Outcome:
    """Resume a run with the Durable that knows its workflow."""
    for durable in durables:
        outcome = durable.try_resume(id)
        if not isinstance(outcome.error, WorkflowNotFound):
            break
    return outcome


def _durables_and_ids(args: Sequence[str]) -> tuple[list[Durable], Sequence[str]]:
    """Return the Durables to work for, those of the tasks included, and the ids to resume."""
    named = [args[0]] if args and "." in args[0] else []
    path = named[0] if named else getattr(settings, "AWAITLY_DURABLE", None)
    tasks, found, ids = _of_the_tasks(), [], args[len(named) :]
    if path:
        try:
            found.append(_import(path))
        except CommandError:
            # The first argument may also be an id with a dot in it.
            default = getattr(settings, "AWAITLY_DURABLE", None)
            others = [*([_import(default)] if default and named else []), *tasks]
            if not any(durable.has_state(path) for durable in others):
                raise
            return others, args
    if not found and not tasks:
        raise CommandError(
            "no Durable to work for: give its dotted path, or set AWAITLY_DURABLE in the settings, "
            "for example to 'shop.workflows.durable'"
        )
    durables = [*found, *tasks]
    if unknown := [id for id in ids if not any(durable.has_state(id) for durable in durables)]:
        raise CommandError(f"nothing is stored as {', '.join(map(repr, unknown))}")
    return durables, ids


def _import(path: str) -> Durable:
    try:
        found = import_string(path)
    except ImportError as error:
        raise CommandError(str(error)) from error
    if not isinstance(found, Durable):
        raise CommandError(f"{path} is {type(found).__name__}, not a Durable")
    return found


def _of_the_tasks() -> list[Durable]:
    if not getattr(settings, "TASKS", None):
        return []
    from awaitly_postgres.contrib.django.tasks import Backend, task_backends

    return [backend.durable for backend in task_backends.all() if isinstance(backend, Backend)]
