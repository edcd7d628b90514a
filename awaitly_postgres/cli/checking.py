"""The pre-deploy command: check."""

from __future__ import annotations

import json

import attrs
import click

from .. import Durable
from ..store.text import printable
from .arguments import json_option, ping, prefix_option
from .text import out, write
from .worker import import_durable


@click.command()
@click.argument("durable", metavar="MODULE:DURABLE", type=import_durable)
@prefix_option
@json_option
@click.pass_context
def check(ctx: click.Context, /, durable: Durable, prefix: str, as_json: bool) -> None:
    """Report the unfinished workflows that this code could not continue.

    Each is replayed up to its first new step. No step runs and nothing is written; the code
    between the steps does run. MODULE:DURABLE is imported, the current directory first.

    Exits with 1 if there is a problem: run it in CI, before a deploy.
    """
    ping(durable.store)
    problems = durable.check(prefix)
    if as_json:
        click.echo(json.dumps([attrs.asdict(problem) for problem in problems], indent=2))
    else:
        for problem in problems:
            told = f"  {printable(problem.id)}  {printable(problem.message)}"
            write([[(f"{problem.kind:<12}", "failed"), (told, "")]])
        if not problems:
            out.print("no problems")
    ctx.exit(1 if problems else 0)
