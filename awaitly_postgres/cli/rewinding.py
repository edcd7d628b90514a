"""The commands that return runs to an earlier step: rewind, fork and retry."""

from __future__ import annotations

from collections.abc import Callable

import click

from .. import Durable
from ..store.text import printable
from .arguments import Place, WrongInput, id_, on_a_store, stored
from .text import out, write


@click.command()
@on_a_store
@click.argument("id", type=id_)
@click.argument("key", type=id_)
@click.option("--new-keys", is_flag=True, help="new idempotency keys: a provider charges again")
def rewind(place: Place, id: str, key: str, new_keys: bool) -> None:
    """Forget step KEY of a workflow and all that it recorded later.

    The next 'resume' runs them again. It may be completed, failed, waiting or cancelled.
    """
    store = place.store()
    stored(store, [id])
    forgotten = _at_a_step(lambda: Durable(store).rewind(id, key, new_keys=new_keys))
    _print("forgotten", forgotten)


@click.command()
@on_a_store
@click.argument("id", type=id_)
@click.argument("new_id", metavar="NEW-ID", type=id_)
@click.argument("key", type=id_)
def fork(place: Place, id: str, new_id: str, key: str) -> None:
    """Copy a workflow up to its step KEY, as NEW-ID.

    The next 'resume' continues the copy from there. The workflow itself stays as it is.
    """
    store = place.store()
    stored(store, [id])
    _print("copied", _at_a_step(lambda: Durable(store).fork(id, new_id, key)))


@click.command(short_help="Make a workflow due now, whatever its pause and attempts.")
@on_a_store
@click.argument("id", type=id_)
def retry(place: Place, id: str) -> None:
    """Make a workflow due now, whatever pause it has and however often it failed.

    The next 'resume' starts it.
    """
    store = place.store()
    if not Durable(store).retry(id):
        (row,) = stored(store, [id])
        ended = row.state in ("completed", "cancelled")
        why = f"is {row.state}" if ended else "was not started by a Durable"
        raise click.ClickException(f"{id!r} {why}")
    out.print("due")


def _at_a_step(work: Callable[[], list[str]]) -> list[str]:
    try:
        return work()
    except ValueError as error:  # there is no such step, or its place is not known
        raise WrongInput(printable(str(error))) from None


def _print(what: str, keys: list[str]) -> None:
    write([[(f"{what}: {', '.join(map(printable, keys)) or 'nothing'}", "")]])
