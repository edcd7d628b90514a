"""The commands that only read: list, show, stats and watch."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import suppress

import click
from rich.console import Group
from rich.live import Live

from .. import SnapshotStore
from ..store.rows import RunInfo
from .arguments import (
    Place,
    WrongInput,
    id_,
    json_option,
    limit_option,
    on_a_store,
    prefix_option,
    status_option,
    stored,
)
from .listing import listing, numbers, to_json
from .text import out, put, segments, width, write
from .timeline import one

_PAGE = 500


@click.command("list")
@on_a_store
@prefix_option
@status_option
@limit_option(100)
@json_option
def list_(place: Place, prefix: str, status: str | None, limit: int, as_json: bool) -> None:
    """List what is stored, newest first.

    LEASE is the process that is running it, as host:pid; NEXT is when it can be resumed.
    """
    rows = list(_walk(place.store(), prefix, status, limit))
    if as_json:
        click.echo(json.dumps([to_json(row) for row in rows], indent=2))
    elif rows:
        put(listing(rows, width()))
        if len(rows) == limit and out.is_terminal:
            click.echo(f"only {limit:,} are shown; --limit shows more", err=True)
    elif out.is_terminal:
        click.echo("nothing found", err=True)


@click.command()
@on_a_store
@click.argument("id", type=id_)
@click.option("--all", "everything", is_flag=True, help="every step, and values in full")
@json_option
def show(place: Place, id: str, everything: bool, as_json: bool) -> None:
    """Show one workflow with a timeline of its steps.

    Of more than 60 steps it shows the first, the last, the longest and the failed ones.
    """
    store = place.store()
    (row,) = stored(store, [id])
    snapshot = store.load(id)
    if snapshot is None:
        raise WrongInput(f"{id!r} has just been deleted")
    if as_json:
        click.echo(json.dumps({**to_json(row), "snapshot": snapshot.to_json()}, indent=2))
    else:
        write(one(row, snapshot, width(), everything))


@click.command()
@on_a_store
@prefix_option
@json_option
def stats(place: Place, prefix: str, as_json: bool) -> None:
    """Count what is stored. The size is that of all tables, whatever the prefix."""
    store = place.store(prefix)
    counted = store.stats()
    oldest = next(iter(store.details([info.id for info in store.pending(limit=1)])), None)
    if not as_json:
        write(numbers(counted, oldest, prefix))
        return
    told = {
        "total": counted.total,
        "by_status": dict(counted.by_status),
        "bytes": counted.bytes,
        "oldest_pending": oldest
        and {"id": prefix + oldest.id, "updated_at": oldest.updated_at.isoformat()},
    }
    click.echo(json.dumps(told, indent=2))


@click.command()
@on_a_store
@prefix_option
@status_option
@click.option("--interval", type=click.FloatRange(0.1), default=2.0, help="seconds [2]")
def watch(place: Place, prefix: str, status: str | None, interval: float) -> None:
    """Show the list and keep it up to date until Ctrl-C."""
    if not out.is_terminal:
        raise click.UsageError("watch needs a terminal; use 'list' in a pipe")
    store = place.store()

    def screen() -> Group:
        rows = list(_walk(store, prefix, status, max(out.height - 2, 1)))
        now = f"every {interval:g} s, {time.strftime('%H:%M:%S')}, Ctrl-C ends it"
        return Group(segments([[(now, "dim")]]), listing(rows, out.width))

    with suppress(KeyboardInterrupt), Live(console=out, screen=True, auto_refresh=False) as live:
        while True:
            live.update(screen(), refresh=True)
            time.sleep(interval)


def _walk(store: SnapshotStore, prefix: str, status: str | None, limit: int) -> Iterator[RunInfo]:
    """Yield the rows of the runs, newest first, reading one page at a time."""
    last = None
    while limit > 0 and (
        page := store.list(prefix, status=status, limit=min(limit, _PAGE), after=last)
    ):
        yield from store.details([info.id for info in page])
        last = page[-1]
        limit -= len(page)
