"""The options and arguments that commands share: where the tables are, and which runs."""

from __future__ import annotations

import functools
import json
import os
import re
import shlex
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import timedelta
from typing import Any

import click
from attrs import frozen

from .. import SnapshotStore, StoreError, StoreUnavailable, postgres
from ..store.rows import STATES, RunInfo, check_id
from ..store.text import printable


class WrongInput(click.ClickException):
    """Wrong input: nothing was done, and the message says what to do instead."""

    exit_code = 2


# -- values --------------------------------------------------------------------------------


def id_(value: str) -> str:
    """Check an id or a step key."""
    try:
        return check_id(value)
    except ValueError as error:
        raise click.BadParameter(str(error)) from None


def json_value(value: str) -> tuple[Any]:
    """Parse JSON. Returns a tuple of one, because click takes None to mean "not given"."""
    try:
        return (json.loads(value),)
    except (ValueError, RecursionError) as error:
        raise click.BadParameter(
            f"{value[:60]!r} is not JSON: {error} (a string needs quotes: '\"yes\"')"
        ) from None


def duration(value: str) -> timedelta:
    """Parse ``30d``, ``1d12h`` and the like."""
    units = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days", "w": "weeks"}
    parts = re.findall(r"(\d+)([smhdw])", value)
    if not parts or "".join(map("".join, parts)) != value:
        raise click.BadParameter(f"{value!r} is not a duration such as 30d, 12h, 1d12h, 90s or 2w")
    with suppress(OverflowError, ValueError):
        total = sum((timedelta(**{units[u]: int(n)}) for n, u in parts), timedelta())
        if total < timedelta(days=365 * 1000):
            return total
    raise click.BadParameter(f"{value!r} is too long; the limit is 1,000 years")


# -- where the tables are ------------------------------------------------------------------

_PLACE = (
    click.option("--url", metavar="URL", help="PostgreSQL URL or conninfo [$DATABASE_URL]"),
    click.option("--schema", metavar="NAME", help="schema of the tables [the search path]"),
    click.option("--table", metavar="NAME", help="table of the snapshots [awaitly_snapshots]"),
    click.option(
        "--lock-table", metavar="NAME", help="table of the leases [awaitly_workflow_lock]"
    ),
    click.option("--no-journal", is_flag=True, help="no <table>_steps exists (journal=False)"),
)


@frozen
class Place:
    """Where the tables are, from the options."""

    options: dict[str, Any]

    def store(self, prefix: str = "", needs_server: bool = True) -> SnapshotStore:
        """Create the store; raise `WrongInput` if its server does not answer."""
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


def ping(store: SnapshotStore, *, may_be_away: bool = False) -> None:
    """Raise `WrongInput` unless the server answers, or ``may_be_away`` and cannot be reached."""
    try:
        store.ping()
    except StoreError as error:
        if may_be_away and isinstance(error, StoreUnavailable):
            return
        raise WrongInput(printable(str(error), keep="\n\t")) from None


def place_options(command: Callable[..., None]) -> Callable[..., None]:
    """Add the options of `Place` to a command."""
    for option in reversed(_PLACE):
        command = option(command)
    return command


def on_a_store(command: Callable[..., None]) -> Callable[..., None]:
    """Add the options of `Place` to a command, and pass it a `Place` as its first argument."""

    @functools.wraps(command)
    def wrapper(**kwargs: Any) -> None:
        names = ("url", "schema", "table", "lock_table", "no_journal")
        command(Place({name: kwargs.pop(name) for name in names}), **kwargs)

    return place_options(wrapper)


# -- which runs ----------------------------------------------------------------------------

prefix_option = click.option("--prefix", default="", help="only ids that start with this")
state_option = click.option(
    "--state", "--status", "state", type=click.Choice(STATES), help="only in this state"
)
json_option = click.option("--json", "as_json", is_flag=True, help="JSON instead of text")


def limit_option(default: int | None) -> Callable[..., Any]:
    """Make the option ``--limit``."""
    help = "at most this many" + ("" if default is None else f" [{default}]")
    return click.option("--limit", metavar="N", type=click.IntRange(1), default=default, help=help)


def stored(store: SnapshotStore, ids: Sequence[str]) -> list[RunInfo]:
    """Return the rows of these runs; raise `WrongInput` if one of them is not stored."""
    rows = store.details(ids)
    found = {row.id for row in rows}
    if unknown := [id for id in ids if id not in found]:
        raise not_stored(unknown)
    return rows


def command_line(name: str, id: str) -> str:
    """Return a command line to type, for a message; ``id`` is the one in the table."""
    return f"'awaitly-postgres {name} {shlex.quote(id)}'"


def not_stored(ids: Sequence[str]) -> WrongInput:
    """Return the error for ids that are not stored."""
    return WrongInput(
        f"nothing is stored as {', '.join(map(repr, ids))}; 'awaitly-postgres list' shows what is"
    )
