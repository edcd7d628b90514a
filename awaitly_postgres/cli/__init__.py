"""The command ``awaitly-postgres``: inspects stored workflows, manages them, and resumes them.

Exit status 0: done. 1: something failed. 2: wrong input, which includes an address or a password
that does not connect; nothing was done. 130 and 143: stopped by a signal.
"""

from __future__ import annotations

import sys
from typing import Any

import click

from .. import AlreadyRunning, AwaitlyError, SchemaMissing, __version__
from .._worker import quiet_the_driver
from ..store.text import printable
from .arguments import WrongInput, command_line, place_options
from .checking import check
from .housekeeping import delete, init, prune
from .looking import list_, show, stats, watch
from .rewinding import fork, retry, rewind
from .runs import cancel, resume, signal, unlock

__all__ = ["cli"]


class _Commands(click.Group):
    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except SchemaMissing as error:
            raise WrongInput(
                f"{error.message} 'awaitly-postgres init' creates the tables; if they exist under "
                "another name, give --table and --schema."
            ) from None
        except AlreadyRunning as error:
            at_once = f"{command_line('unlock', error.id)} frees it at once."
            raise click.ClickException(printable(f"{error} {at_once}")) from None
        except AwaitlyError as error:
            raise click.ClickException(printable(str(error), keep="\n\t")) from None
        except KeyboardInterrupt:
            ctx.exit(130)


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@place_options
@click.version_option(__version__, prog_name="awaitly-postgres")
@click.pass_context
def cli(ctx: click.Context, /, **place: Any) -> None:
    """Inspect, manage and resume stored workflows.

    Exit status: 0 done; 1 something failed; 2 wrong input, or no connection: nothing was done.
    """
    quiet_the_driver()  # it logs each attempt to connect; the command prints one message instead
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    given = {name: value for name, value in place.items() if value}
    if given and ctx.invoked_subcommand in ("resume", "check"):
        options = ", ".join("--" + name.replace("_", "-") for name in given)
        raise click.UsageError(
            f"'{ctx.invoked_subcommand}' takes no {options}: it uses the store of MODULE:DURABLE"
        )
    ctx.default_map = dict.fromkeys(cli.commands, given)


for _command in (
    *(init, list_, show, watch, stats),
    *(resume, signal, cancel, unlock),
    *(retry, rewind, fork, check),
    *(delete, prune),
):
    cli.add_command(_command)
