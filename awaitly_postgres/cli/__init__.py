"""The command ``awaitly-postgres``: look after stored workflows, and finish them.

Exit status 0: done. 1: it was tried and something failed. 2: wrong input, an address or a password
that does not connect included; nothing was done. 130 and 143: stopped by a signal.
"""

from __future__ import annotations

import functools
import json
import logging
import os
import re
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from datetime import timedelta
from typing import Any

import click
from attrs import frozen
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn
from rich.segment import Segments

from .. import __version__, _json
from .._checks import check_id
from .._printable import printable
from ..durable.durable import Durable
from ..errors import AwaitlyError, NotSerializable, SchemaMissing, StoreError
from ..snapshot import STATUSES
from ..store.postgres import postgres
from ..store.store import SnapshotStore
from . import _rows, _view
from ._resume import Stopped, Worker, import_durable
from ._text import err, out, segments, span, width, write

_ANY = 10**9  # rows

# -- what goes wrong -----------------------------------------------------------------------


class _WrongInput(click.ClickException):
    exit_code = 2


class _Commands(click.Group):
    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except SchemaMissing as error:
            raise _WrongInput(
                f"{error.message} 'awaitly-postgres init' makes the tables; if they are there "
                "under another name, give --table and --schema."
            ) from None
        except AwaitlyError as error:
            raise click.ClickException(printable(str(error), keep="\n\t")) from None
        except KeyboardInterrupt:
            ctx.exit(130)


# -- parameters ----------------------------------------------------------------------------


def _id(value: str) -> str:
    try:
        return check_id(value)
    except ValueError as error:
        raise click.BadParameter(str(error)) from None


def _json_value(value: str) -> tuple[Any]:
    """Parse JSON; in a tuple, because click takes None for "not given"."""
    try:
        parsed = _json.loads(value)
        _json.dumps(parsed)
    except (ValueError, RecursionError, NotSerializable) as error:
        raise click.BadParameter(
            f"{value[:60]!r} is not JSON: {error} (a string needs quotes: '\"yes\"')"
        ) from None
    return (parsed,)


def _duration(value: str) -> timedelta:
    units = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days", "w": "weeks"}
    parts = re.findall(r"(\d+)([smhdw])", value)
    if not parts or "".join(map("".join, parts)) != value:
        raise click.BadParameter(f"{value!r} is not a duration such as 30d, 12h, 1d12h, 90s or 2w")
    with suppress(OverflowError, ValueError):
        duration = sum((timedelta(**{units[u]: int(n)}) for n, u in parts), timedelta())
        if duration < timedelta(days=365 * 1000):
            return duration
    raise click.BadParameter(f"{value!r} is too long")


_PLACE = (
    click.option("--url", metavar="URL", help="PostgreSQL URL or conninfo [$DATABASE_URL]"),
    click.option("--schema", metavar="NAME", help="where the tables are [the search path]"),
    click.option("--table", metavar="NAME", help="the snapshots [awaitly_snapshots]"),
    click.option("--lock-table", metavar="NAME", help="the leases [awaitly_workflow_lock]"),
    click.option("--no-journal", is_flag=True, help="there is no <table>_steps (journal=False)"),
)


@frozen
class Place:
    """Where the tables are, as the options say it."""

    options: dict[str, Any]

    def store(self, prefix: str = "", needs_server: bool = True) -> SnapshotStore:
        """Make the store; see that its server answers, so that later errors are of other kinds."""
        options = {name: value for name, value in self.options.items() if value}
        url = options.pop("url", None) or os.environ.get("DATABASE_URL")
        if not url and needs_server:
            raise click.UsageError("no database given: pass --url or set $DATABASE_URL")
        journal = not options.pop("no_journal", False)
        try:
            store = postgres(
                url or "",
                prefix=prefix,
                journal=journal,
                auto_create_table=False,
                max_size=2,
                **options,
            )
        except ValueError as error:
            raise click.UsageError(str(error)) from None
        if needs_server:
            ping(store)
        return click.get_current_context().with_resource(store)


def ping(store: SnapshotStore) -> None:
    """Raise wrong input unless the server answers."""
    try:
        store.ping()
    except StoreError as error:
        raise _WrongInput(printable(str(error), keep="\n\t")) from None


def _place(command: Callable[..., None]) -> Callable[..., None]:
    for option in reversed(_PLACE):
        command = option(command)
    return command


def on_a_store(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command the options of `Place`, and the place as its first argument."""

    @functools.wraps(command)
    def wrapper(**kwargs: Any) -> None:
        names = ("url", "schema", "table", "lock_table", "no_journal")
        command(Place({name: kwargs.pop(name) for name in names}), **kwargs)

    return _place(wrapper)


_prefix = click.option("--prefix", default="", help="only ids that start with this")
_as_json = click.option("--json", "as_json", is_flag=True, help="JSON instead of text")
_status = click.option("--status", type=click.Choice(STATUSES), help="only these")


def _limit(default: int | None) -> Callable[..., Any]:
    help = "at most so many" if default is None else f"at most so many [{default}]"
    return click.option("--limit", metavar="N", type=click.IntRange(1), default=default, help=help)


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@_place
@click.version_option(__version__, prog_name="awaitly-postgres")
@click.pass_context
def cli(ctx: click.Context, /, **place: Any) -> None:
    """Look after the workflows that awaitly-postgres has stored, and finish them.

    Exit status: 0 done; 1 something failed; 2 wrong input, or no connection: nothing was done.
    """
    # A pool that cannot connect logs it, and we say it.
    logging.getLogger("psycopg").addHandler(logging.NullHandler())
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    given = {name: value for name, value in place.items() if value}
    ctx.default_map = dict.fromkeys(cli.commands, given)


# -- looking -------------------------------------------------------------------------------


@cli.command("list")
@on_a_store
@_prefix
@_status
@_limit(100)
@_as_json
def list_(place: Place, prefix: str, status: str | None, limit: int, as_json: bool) -> None:
    """List what is stored, newest first.

    LEASE is who works on it, as host:pid; NEXT when it is to be resumed.
    """
    rows = list(_rows.walk(place.store(), prefix, status, limit))
    if as_json:
        _echo_json([row.to_json() for row in rows])
    elif rows:
        write(_view.listing(rows, width()))
        if len(rows) == limit and out.is_terminal:
            click.echo(f"only {limit:,} are shown; --limit shows more", err=True)
    elif out.is_terminal:
        click.echo("nothing found", err=True)


@cli.command()
@on_a_store
@click.argument("id", type=_id)
@click.option("--all", "everything", is_flag=True, help="every step, and values in full")
@_as_json
def show(place: Place, id: str, everything: bool, as_json: bool) -> None:
    """Show one workflow with a timeline of its steps.

    Of more than 60 steps it shows the first, the last, the longest and the failed ones.
    """
    store = place.store()
    row, snapshot = _row(store, id), store.load(id)
    if snapshot is None:
        raise _unknown([id])
    if as_json:
        _echo_json({**row.to_json(), "snapshot": snapshot.to_json()})
    else:
        write(_view.one(row, snapshot, width(), everything))


@cli.command()
@on_a_store
@_prefix
@_as_json
def stats(place: Place, prefix: str, as_json: bool) -> None:
    """Count what is stored. The size is that of all tables, whatever the prefix."""
    store = place.store(prefix)
    counted = store.stats()
    pending = Durable(store, max_attempts=None)._pending("", 1, None)
    oldest = next(iter(_rows.find(store, [info.id for info in pending])), None)
    if as_json:
        _echo_json(
            {
                "total": counted.total,
                "by_status": dict(counted.by_status),
                "bytes": counted.bytes,
                "oldest_pending": oldest
                and {"id": prefix + oldest.id, "updated_at": oldest.updated_at.isoformat()},
            }
        )
    else:
        write(_view.numbers(counted, oldest, prefix))


@cli.command()
@on_a_store
@_prefix
@_status
@click.option("--interval", type=click.FloatRange(0.1), default=2.0, help="seconds [2]")
def watch(place: Place, prefix: str, status: str | None, interval: float) -> None:
    """Show the list, live, until Ctrl-C."""
    if not out.is_terminal:
        raise click.UsageError("watch needs a terminal; 'list' is for pipes")
    store = place.store()

    def screen() -> Segments:
        rows = list(_rows.walk(store, prefix, status, max(out.height - 2, 1)))
        now = f"every {interval:g} s, {time.strftime('%H:%M:%S')}, Ctrl-C ends it"
        return segments([[(now, "dim")], *_view.listing(rows, out.width)])

    with suppress(KeyboardInterrupt), Live(console=out, screen=True, auto_refresh=False) as live:
        while True:
            live.update(screen(), refresh=True)
            time.sleep(interval)


# -- tables and housekeeping ---------------------------------------------------------------


@cli.command()
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
            f"{error.message} Have a role that may run what 'init --sql' prints."
        ) from None
    out.print("the tables are there")


@cli.command()
@on_a_store
@click.argument("ids", metavar="ID...", nargs=-1, required=True, type=_id)
def delete(place: Place, ids: tuple[str, ...]) -> None:
    """Delete workflows; none if one of the ids is unknown."""
    store = place.store()
    _check_known(store, ids)
    out.print(f"{store.delete_many(ids):,} deleted")


@cli.command()
@on_a_store
@_prefix
@click.option(
    "--status", type=click.Choice([*STATUSES, "any"]), default="completed", help="[completed]"
)
@click.option(
    "--older-than", metavar="AGE", type=_duration, required=True, help="30d, 12h, 1d12h, 2w"
)
@click.option("--batch-size", metavar="N", type=click.IntRange(1, 100_000), default=1000)
@click.option("--dry-run", is_flag=True, help="only count")
def prune(
    place: Place, prefix: str, status: str, older_than: timedelta, batch_size: int, dry_run: bool
) -> None:
    """Delete what has not changed for so long, in batches.

    It may be interrupted and run again. What is running is left alone.
    """
    chosen = None if status == "any" else status
    clear = functools.partial(place.store(prefix).prune, older_than, status=chosen)
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
        click.echo(f"interrupted when {done:,.0f} were deleted; run it again to go on", err=True)
        raise
    out.print(f"{deleted:,} deleted")


# -- workflows -----------------------------------------------------------------------------


@cli.command()
@click.argument("durable", metavar="MODULE:DURABLE", type=import_durable)
@click.argument("ids", metavar="[ID]...", nargs=-1, type=_id)
@_prefix
@_limit(None)
@click.option(
    "--loop", metavar="SECONDS", type=click.FloatRange(0.1), help="go on, with pauses so long"
)
@click.pass_context
def resume(
    ctx: click.Context,
    /,
    durable: Durable,
    ids: tuple[str, ...],
    prefix: str,
    limit: int | None,
    loop: float | None,
) -> None:
    """Finish pending workflows, or those given.

    It works with your own Durable and its store: MODULE:DURABLE is imported, the current
    directory first.

    \b
    Cron:    awaitly-postgres resume shop.workflows:durable
    Worker:  awaitly-postgres resume shop.workflows:durable --loop 5

    Exits with 1 if any failed. SIGINT and SIGTERM stop it after the current workflow, a second
    one at once; a worker that is stopped exits with 0.
    """
    if ids and (loop or limit or prefix):
        raise click.UsageError("give either ids, or --prefix, --limit and --loop")
    ping(durable.store)
    if ids:
        _check_known(durable.store, ids)
    worker = Worker(durable)
    try:
        with worker.listening():
            if loop:
                worker.loop(prefix, limit or _ANY, loop)
            worker.once(ids, prefix, limit or _ANY)
    except Stopped:
        ctx.exit(0 if loop else 128 + worker.stopped_by)
    ctx.exit(1 if worker.counts["failed"] else 0)


@cli.command()
@on_a_store
@click.argument("id", type=_id)
@click.argument("key", type=_id)
@click.argument("value", metavar="JSON", type=_json_value)
def signal(place: Place, id: str, key: str, value: tuple[Any]) -> None:
    """Answer a workflow's step.wait(KEY).

    The next 'resume' takes it up.
    """
    store = place.store()
    if not Durable(store).signal(id, key, *value):
        row = _row(store, id)
        why = f"has an answer for {key!r} already, or was not started by a Durable"
        if row.status == "completed" or row.is_cancelled:
            why = f"is {'cancelled' if row.is_cancelled else 'completed'}"
        raise click.ClickException(f"{id!r} {why}")
    out.print("taken")


@cli.command()
@on_a_store
@click.argument("id", type=_id)
def cancel(place: Place, id: str) -> None:
    """End a workflow for good. If it is running, its next step is refused."""
    store = place.store()
    if not Durable(store).cancel(id):
        raise click.ClickException(f"{id!r} is {_row(store, id).status} already")
    out.print("cancelled")


@cli.command()
@on_a_store
@click.argument("id", type=_id)
@click.option("--yes", is_flag=True, help="do not ask")
def unlock(place: Place, id: str, yes: bool) -> None:
    """Take the lease on a workflow away from its holder.

    For a holder that is known to be dead; otherwise leases run out by themselves. One that is
    alive after all cannot write any more.
    """
    store = place.store()
    row = _row(store, id)
    if row.holder is None or row.held_until is None:
        out.print("nobody holds its lease")
        return
    if not yes:
        click.confirm(
            f"{printable(_view.holder_of(row.holder))} holds the lease on {printable(id)} for "
            f"another {span((row.held_until - row.now).total_seconds())}. Take it away?",
            abort=True,
            err=True,
        )
    params = {"id": store.key(id), "token": row.holder}
    if not store._db.count(store._sql.release, params):
        raise click.ClickException("it has been released or taken over meanwhile")
    out.print("unlocked")


# -- inside --------------------------------------------------------------------------------


def _row(store: SnapshotStore, id: str) -> _rows.Row:
    for row in _rows.find(store, [id]):
        return row
    raise _unknown([id])


def _check_known(store: SnapshotStore, ids: Sequence[str]) -> None:
    durable = Durable(store)
    if unknown := [id for id in ids if not durable.has_state(id)]:
        raise _unknown(unknown)


def _unknown(ids: Sequence[str]) -> click.ClickException:
    return _WrongInput(f"nothing is stored as {', '.join(map(repr, ids))}")


def _echo_json(value: Any) -> None:
    click.echo(json.dumps(value, indent=2))
