"""The commands that create the tables and delete runs from them: init, delete and prune."""

from __future__ import annotations

import functools
from contextlib import nullcontext
from datetime import timedelta
from typing import Any

import click
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

from .. import SchemaMissing
from ..store.rows import STATES
from ..store.text import printable
from .arguments import Place, command_line, duration, id_, on_a_store, prefix_option, stored
from .text import err, out


@click.command()
@on_a_store
@click.option("--sql", is_flag=True, help="only print the SQL; needs no database")
def init(place: Place, sql: bool) -> None:
    """Create the tables and indexes that are missing."""
    store = place.store(needs_server=not sql)
    if sql:
        click.echo(store.ddl(), nl=False)
        return
    try:
        store.create_tables()
    except SchemaMissing as error:
        raise click.ClickException(
            f"{error.message} With a role that may create them, run what 'init --sql' prints."
        ) from None
    out.print("all tables exist")


@click.command()
@on_a_store
@click.argument("ids", metavar="ID...", nargs=-1, required=True, type=id_)
def delete(place: Place, ids: tuple[str, ...]) -> None:
    """Delete workflows; none if one of the ids is unknown or running."""
    store = place.store()
    for row in stored(store, ids):
        if row.holder is not None:  # it would store the run again with its next step
            raise click.ClickException(
                printable(
                    f"{row.id!r} is held by {row.held_by}, so nothing was deleted. First end it: "
                    f"{command_line('cancel', row.id)}; or, if that process is dead, "
                    f"{command_line('unlock', row.id)}"
                )
            )
    out.print(f"{store.delete_many(ids):,} deleted")


@click.command()
@on_a_store
@prefix_option
@click.option(
    "--state",
    "--status",
    "state",
    type=click.Choice([*STATES, "any"]),
    default="completed",
    help="only in this state [completed]",
)
@click.option(
    "--older-than", metavar="AGE", type=duration, required=True, help="30d, 12h, 1d12h, 2w"
)
@click.option("--batch-size", metavar="N", type=click.IntRange(1, 100_000), default=1000)
@click.option("--dry-run", is_flag=True, help="only count")
def prune(
    place: Place, prefix: str, state: Any, older_than: timedelta, batch_size: int, dry_run: bool
) -> None:
    """Delete workflows that have not changed for AGE, in batches.

    It can be interrupted and run again. Workflows that are running are not deleted.
    """
    chosen = None if state == "any" else state
    clear = functools.partial(place.store(prefix).prune, older_than, status=None, state=chosen)
    if dry_run:
        out.print(f"{clear(dry_run=True):,} would be deleted")
        return
    total = clear(dry_run=True) if err.is_terminal else None
    columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    bar = Progress(*columns, console=err, transient=True)
    task = bar.add_task("", total=total)
    try:
        with bar if err.is_terminal else nullcontext():
            deleted = clear(
                batch_size=batch_size, on_progress=lambda n: bar.update(task, completed=n)
            )
    except KeyboardInterrupt:
        done = bar.tasks[0].completed
        click.echo(f"interrupted, {done:,.0f} deleted so far; run it again to continue", err=True)
        raise
    out.print(f"{deleted:,} deleted")
