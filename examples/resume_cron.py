"""Resumes unfinished runs: crashed, failed and submitted ones. For cron.

    * * * * *  DATABASE_URL=postgresql://localhost/mydb python resume_cron.py

On a terminal it shows its progress. In cron it prints nothing unless a run fails; then it names the
run on stderr, which cron mails, and exits with status 1. Overlapping jobs do no harm: only one
process at a time can hold the lease on a run.
"""

import argparse
import logging
import os
import sys

import workflows

from awaitly_postgres import AwaitlyError, Durable, Event, Outcome, postgres

CLEAR_LINE = "\r\x1b[K"


def show_step(event: Event) -> None:
    if event.type == "step_started":
        print(f"{CLEAR_LINE}{event.workflow_id}: {event.key} ...", end="", file=sys.stderr)
        sys.stderr.flush()


def show_outcome(outcome: Outcome) -> None:
    print(f"{CLEAR_LINE}{outcome.status:9}  {outcome.id}", file=sys.stderr)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--url", default=os.environ.get("DATABASE_URL"), help="or $DATABASE_URL")
    parser.add_argument("--prefix", default="", help="only ids that start with this")
    parser.add_argument("--limit", type=int, default=100, help="at most this many (100)")
    options = parser.parse_args()
    if not options.url:
        parser.error("give --url or set $DATABASE_URL")

    # psycopg's pool warns about each connection that it replaces, which cron would mail.
    logging.getLogger("psycopg").addHandler(logging.NullHandler())
    terminal = sys.stderr.isatty()
    with postgres(options.url) as store:
        durable = Durable(store, on_event=show_step if terminal else None)
        workflows.register(durable)
        outcomes = durable.resume_pending(
            prefix=options.prefix,
            limit=options.limit,
            on_progress=show_outcome if terminal else None,
        )

    failed = [outcome for outcome in outcomes if outcome.status == "failed"]
    for outcome in failed:
        error = f"{type(outcome.error).__name__}: {outcome.error}"
        print(f"{outcome.id} failed at attempt {outcome.attempts}: {error}", file=sys.stderr)
    if terminal:
        print(f"{len(outcomes)} resumed, {len(failed)} failed", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (AwaitlyError, ValueError) as error:
        sys.exit(f"resume_cron: {error}")
