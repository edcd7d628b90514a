"""How fast it is, and how the cost grows, beside the floor and beside others.

    python -m tests.benchmark [--quick] [--only PART ...] [--rounds N] [--before REVISION]

Starts a PostgreSQL of its own with fsync on, and installs the others in an environment of their
own; both are gone afterwards. Everything is measured side by side in one run, in rounds; each
figure is the median of the rounds, with the lowest and highest in brackets. The whole of it takes
about half an hour, means something on a machine that does nothing else, and is
written into ``results.json``, ``results.svg`` and ``README.md`` beside this file, and into the
project's README.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psycopg

import awaitly_postgres

from . import (
    bulk_runs,
    contention,
    fan_out,
    picture,
    scale,
    short_run,
    start_up,
    step_cost,
    store_cost,
    summary,
    whole_runs,
)
from .contenders import prepare
from .server import Server, own_server

HERE = Path(__file__).parent
PARTS = {
    "steps": step_cost,
    "short": short_run,
    "runs": whole_runs,
    "fan_out": fan_out,
    "bulk": bulk_runs,
    "store": store_cost,
    "scale": scale,
    "start": start_up,
    "contention": contention,
}


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tests.benchmark", description=__doc__.partition("\n")[0]
    )
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="only to see that it works")
    parser.add_argument("--without-peers", action="store_true", help="install nothing")
    parser.add_argument("--before", metavar="REVISION", help="an earlier version, to compare with")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that nothing is left behind
    with own_server() as url:
        results = measured(url, options)
    if options.only == list(PARTS) and not options.quick and not options.without_peers:
        write(results)


def write(results: dict[str, Any]) -> None:
    (HERE / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    picture.draw(results, HERE / "results.svg")
    tables = summary.markdown(results)
    for page, text in (
        (HERE / "README.md", tables),
        (HERE.parents[1] / "README.md", summary.headline(results)),
    ):
        page.write_text(summary.into(page.read_text(), text))
    print(tables)


def measured(url: str, options: argparse.Namespace) -> dict[str, Any]:
    server, began = Server(url), time.monotonic()
    results: dict[str, Any] = {"machine": machine(server), "rounds": options.rounds}
    print(*(f"{name}: {value}" for name, value in results["machine"].items()), sep="\n")
    with tempfile.TemporaryDirectory(prefix="awaitly-benchmark-peers-") as folder:
        contenders = prepare(url, Path(folder), options.without_peers, options.before)
        print(*contenders.notes, sep="\n")
        results["tables"], results["peers"] = {}, contenders.notes
        for part in options.only:
            for table in PARTS[part].measure(server, contenders, options.rounds, options.quick):
                print(table, flush=True)
                results["tables"][table.name] = table.to_json()
    print(f"\n{(time.monotonic() - began) / 60:.0f} minutes")
    return results


def machine(server: Server) -> dict[str, str]:
    return {
        "awaitly-postgres": awaitly_postgres.__version__,
        "PostgreSQL": f"{server.value('SHOW server_version')}, fsync {server.value('SHOW fsync')}",
        "Python": f"{platform.python_version()}, psycopg {psycopg.__version__}",
        "machine": f"{os.cpu_count()} processors, {platform.system()} {platform.machine()}",
    }


if __name__ == "__main__":
    main()
