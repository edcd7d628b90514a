"""``manage.py resume_workflows``: resume runs that crashed, failed or were submitted. For cron."""

from __future__ import annotations

from typing import Any

from django.conf import settings
from django.core.management.base import BaseCommand, CommandError
from django.utils.module_loading import import_string

from awaitly_postgres import Durable, Outcome, StoreError
from awaitly_postgres.store.rows import printable


class Command(BaseCommand):
    """Prints failures only, unless on a terminal or verbose; exit status 1 if anything failed."""

    help = "Finish pending workflows: crashed, failed and submitted ones."

    def add_arguments(self, parser: Any) -> None:
        """Add the arguments: the Durable, and which of its runs to resume."""
        parser.add_argument(
            "durable",
            nargs="?",
            help="dotted path of the Durable (default: settings.AWAITLY_DURABLE)",
        )
        parser.add_argument("--prefix", default="", help="only ids that start with this")
        parser.add_argument("--limit", type=int, default=100, help="at most this many (100)")

    def handle(self, *args: Any, **options: Any) -> None:
        """Resume pending runs, and report each as it ends."""
        durable = _durable(options["durable"] or getattr(settings, "AWAITLY_DURABLE", None))
        watched = self.stdout.isatty() or options["verbosity"] > 1
        styles = {"completed": self.style.SUCCESS, "suspended": self.style.WARNING}

        def tell(outcome: Outcome) -> None:
            if outcome.status == "failed":
                error = outcome.error
                self.stderr.write(
                    f"failed     {printable(outcome.id)} (attempt {outcome.attempts}): "
                    f"{type(error).__name__}: {printable(str(error))}"
                )
            elif watched:
                style = styles.get(outcome.status, str)
                self.stdout.write(f"{style(f'{outcome.status:<10}')} {printable(outcome.id)}")

        try:
            outcomes = durable.resume_pending(
                prefix=options["prefix"], limit=options["limit"], on_progress=tell
            )
        except (StoreError, ValueError) as error:
            raise CommandError(str(error)) from error
        failed = sum(outcome.status == "failed" for outcome in outcomes)
        if watched:
            self.stdout.write(f"{len(outcomes)} taken up, {failed} failed")
        if failed:
            raise CommandError(f"{failed} of {len(outcomes)} workflows failed")


def _durable(path: str | None) -> Durable:
    if not path:
        raise CommandError(
            "which Durable? Give its dotted path, or set AWAITLY_DURABLE = 'shop.workflows.durable'"
        )
    try:
        found = import_string(path)
    except ImportError as error:
        raise CommandError(str(error)) from error
    if not isinstance(found, Durable):
        raise CommandError(f"{path} is {type(found).__name__}, not a Durable")
    return found
