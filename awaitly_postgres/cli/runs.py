"""The commands that act on runs: resume, signal, cancel and unlock."""

from __future__ import annotations

from typing import Any

import click

from .. import Durable, NotSerializable
from .._worker import ANY, Signals
from ..store.text import printable
from .arguments import (
    Place,
    command_line,
    id_,
    json_value,
    limit_option,
    on_a_store,
    ping,
    prefix_option,
    stored,
)
from .text import out, span
from .worker import Worker, import_durable


@click.command()
@click.argument("durable", metavar="MODULE:DURABLE", type=import_durable)
@click.argument("ids", metavar="[ID]...", nargs=-1, type=id_)
@prefix_option
@limit_option(None)
@click.option(
    "--loop",
    metavar="SECONDS",
    type=click.FloatRange(0.1),
    help="keep going, with a pause this long between passes",
)
@click.option(
    "--workers",
    metavar="N",
    type=click.IntRange(1),
    default=1,
    help="run up to this many at once (1)",
)
@click.option("--verbose", is_flag=True, help="a line for each workflow, tracebacks of failures")
@click.pass_context
def resume(
    ctx: click.Context,
    /,
    durable: Durable,
    ids: tuple[str, ...],
    prefix: str,
    limit: int | None,
    loop: float | None,
    workers: int,
    verbose: bool,
) -> None:
    """Finish pending workflows, or those given.

    It works with your own Durable and its store: MODULE:DURABLE is imported, the current
    directory first. Runs that were given up (see its max_attempts and backoff) are skipped, unless
    they are given: then they are started again. Failures are printed to stderr; if the output is
    not a terminal, nothing else is printed without --verbose.

    \b
    Cron:    awaitly-postgres resume shop.workflows:durable
    Worker:  awaitly-postgres resume shop.workflows:durable --loop 5 --workers 8

    Exits with 1 if any failed. SIGINT and SIGTERM stop it after the current workflows, a
    second one stops it at once; a worker that is stopped exits with 0.
    """
    if ids and (loop or limit or prefix or workers > 1):
        raise click.UsageError("give either ids, or --prefix, --limit, --workers and --loop")
    ping(durable.store, may_be_away=bool(loop))  # a loop says so in each pass, and goes on
    for row in stored(durable.store, ids) if ids else ():
        if row.state in ("completed", "cancelled", "running"):
            told = f"{row.id!r} is already {row.state}"
            if row.state == "running":
                unlock = command_line("unlock", durable.store.prefix + row.id)
                told += f" on {row.held_by}; if that process is dead, {unlock} frees it"
            click.echo(printable(told), err=True)
    worker = Worker(durable, Signals(loops=bool(loop)), verbose, workers)
    with worker.signals.listening():
        if loop:
            worker.loop(prefix, limit or ANY, loop)
        worker.once(ids, prefix, limit or ANY)
    ctx.exit(1 if worker.counts["failed"] else 0)


@click.command()
@on_a_store
@click.argument("id", type=id_)
@click.argument("key", type=id_)
@click.argument("value", metavar="JSON", type=json_value)
def signal(place: Place, id: str, key: str, value: tuple[Any]) -> None:
    """Answer a workflow's step.wait(KEY).

    The next 'resume' picks it up.
    """
    store = place.store()
    # Before it is sent: a worker may take the answer at once, and nothing waits for it then.
    (before,) = stored(store, [id])
    try:
        accepted = Durable(store).signal(id, key, *value)
    except NotSerializable as error:
        raise click.BadParameter(str(error), param_hint="JSON") from None
    if not accepted:
        (row,) = stored(store, [id])
        why = f"already has an answer for {key!r}, its wait timed out, or no Durable started it"
        if row.state in ("completed", "cancelled"):
            why = f"is {row.state}"
        raise click.ClickException(f"{id!r} {why}")
    if key in before.waits_for:
        out.print("accepted")
        return
    waiting = f"waiting for {', '.join(before.waits_for)}" if before.waits_for else before.state
    notice = f"accepted, but {id!r} is not waiting for {key!r}: it is {waiting}"
    click.echo(printable(notice), err=True)


@click.command()
@on_a_store
@click.argument("id", type=id_)
def cancel(place: Place, id: str) -> None:
    """End a workflow for good. If it is running, its next step is refused."""
    store = place.store()
    if not Durable(store).cancel(id):
        (row,) = stored(store, [id])
        raise click.ClickException(f"{id!r} is already {row.state}")
    out.print("cancelled")


@click.command()
@on_a_store
@click.argument("id", type=id_)
@click.option("--yes", is_flag=True, help="do not ask")
def unlock(place: Place, id: str, yes: bool) -> None:
    """Take the lease on a workflow away from its holder.

    For a holder that is known to be dead; otherwise wait for the lease to expire. A holder that is
    alive after all cannot write anything more.
    """
    store = place.store()
    (row,) = stored(store, [id])
    if row.holder is None or row.held_until is None:
        out.print("nobody holds its lease")
        return
    if not yes:
        left = span((row.held_until - row.seen_at).total_seconds())
        click.confirm(
            f"{printable(row.held_by)} holds the lease on {printable(id)} for another {left}. "
            "Take it away?",
            abort=True,
            err=True,
        )
    if not store.revoke_lease(id, row.holder):
        raise click.ClickException(
            f"the lease on {id!r} has been released or taken over in the meantime; nothing was done"
        )
    out.print("unlocked")
