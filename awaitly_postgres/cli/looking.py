"""The commands that only read: list, show, stats and watch."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import suppress

import click
from rich.console import Group
from rich.live import Live

from .. import Durable
from ..store.rows import RunInfo, State
from .arguments import (
    Place,
    id_,
    json_option,
    limit_option,
    not_stored,
    on_a_store,
    prefix_option,
    state_option,
)
from .listing import listing, numbers, to_json
from .text import echo_json, out, put, segments, width, write
from .timeline import one, one_to_json

_PAGE = 500


@click.command("list")
@on_a_store
@prefix_option
@state_option
@limit_option(100)
@json_option
def list_(place: Place, prefix: str, state: State | None, limit: int, as_json: bool) -> None:
    """List what is stored, newest first.

    LEASE is the process that is running it, as host:pid; NEXT is when it continues.
    """
    rows = list(_walk(Durable(place.store()), prefix, state, limit))
    if as_json:
        echo_json([to_json(row) for row in rows])
    elif rows:
        put(listing(rows, width()))
        if len(rows) == limit and out.is_terminal:
            click.echo(f"only {limit:,} are shown; --limit shows more", err=True)
    elif out.is_terminal:
        click.echo("nothing found", err=True)


@click.command()
@on_a_store
@click.argument("id", type=id_)
@click.option("--all", "everything", is_flag=True, help="every step, values and tracebacks in full")
@json_option
def show(place: Place, id: str, everything: bool, as_json: bool) -> None:
    """Show one workflow with a timeline of its steps.

    Of more than 60 steps it shows the first, the last, the longest and the failed ones.
    """
    row = Durable(place.store()).get(id)
    if row is None:
        raise not_stored([id])
    if as_json:
        echo_json(one_to_json(row))
    else:
        write(one(row, width(), everything))


@click.command()
@on_a_store
@prefix_option
@json_option
def stats(place: Place, prefix: str, as_json: bool) -> None:
    """Count what is stored, by state. The size is that of all tables, whatever the prefix."""
    store = place.store(prefix)
    counted = store.stats()
    oldest = next(iter(store.details([info.id for info in store.pending(limit=1)])), None)
    if not as_json:
        write(numbers(counted, oldest, prefix))
        return
    untouched = oldest and {"id": prefix + oldest.id, "updated_at": oldest.updated_at}
    numbers_by_name = {
        "total": counted.total,
        "by_state": counted.by_state,
        "bytes": counted.bytes,
        "oldest_pending": untouched,
    }
    echo_json(numbers_by_name)


@click.command()
@on_a_store
@prefix_option
@state_option
@click.option("--interval", type=click.FloatRange(0.1), default=2.0, help="seconds [2]")
def watch(place: Place, prefix: str, state: State | None, interval: float) -> None:
    """Show the list and keep it up to date until Ctrl-C."""
    if not out.is_terminal:
        raise click.UsageError("watch needs a terminal; use 'list' in a pipe")
    durable = Durable(place.store())

    def screen() -> Group:
        rows = list(_walk(durable, prefix, state, max(out.height - 2, 1)))
        now = f"every {interval:g} s, {time.strftime('%H:%M:%S')}, Ctrl-C to quit"
        return Group(segments([[(now, "dim")]]), listing(rows, out.width))

    with suppress(KeyboardInterrupt), Live(console=out, screen=True, auto_refresh=False) as live:
        while True:
            live.update(screen(), refresh=True)
            time.sleep(interval)


def _walk(durable: Durable, prefix: str, state: State | None, limit: int) -> Iterator[RunInfo]:
    """Yield the runs, newest first, read a page at a time."""
    last = None
    while limit > 0 and (
        page := durable.list(prefix, state=state, limit=min(limit, _PAGE), after=last)
    ):
        yield from page
        last = page[-1]
        limit -= len(page)
