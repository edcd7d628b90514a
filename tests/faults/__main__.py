"""``python -m tests.faults``: make the faults, and print what became of the workflows.

Without names all faults are made, each on a PostgreSQL of its own that is thrown away afterwards.
Exit status 1 if anything was lost, doubled, unfinished or left over.
"""

from __future__ import annotations

import argparse
import json
import secrets
import signal
import sys
from dataclasses import asdict, fields

from .check import Row
from .cluster import Cluster
from .faults import FAULTS
from .field import Field, NotHere
from .soak import soak

SOAK = "soak"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    parser.add_argument("fault", nargs="*", help=f"of: {', '.join([*FAULTS, SOAK])}")
    parser.add_argument("--long", action="store_true", help="as many injections as in a long run")
    parser.add_argument("--share", type=float, default=1.0, help="only this share of them")
    parser.add_argument("--seed", type=int, default=None, help="repeat the choices of this run")
    parser.add_argument("--bin", help="folder of PostgreSQL binaries (default: the wheel's)")
    parser.add_argument("--postgres-url", help="use this server where a fault allows it")
    parser.add_argument("--json", action="store_true", help="print JSON, one line per fault")
    options = parser.parse_args()
    if unknown := set(options.fault) - {*FAULTS, SOAK}:
        parser.error(f"there is no fault {', '.join(unknown)}")
    seed = secrets.randbits(16) if options.seed is None else options.seed

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # servers and workers end with us
    rows = []
    for name in options.fault or [*FAULTS, SOAK]:
        try:
            rows.append(play(name, seed, options))
        except NotHere as reason:
            rows.append(Row(name, not_made=str(reason)))
        if options.json:
            print(json.dumps(asdict(rows[-1])), flush=True)
        else:
            print_line(rows[-1], first=len(rows) == 1)
    if not options.json:
        print(f"seed {seed}")
    return int(any(row.flaws for row in rows))


def play(name: str, seed: int, options: argparse.Namespace) -> Row:
    given = options.postgres_url
    cluster = None
    if given is None or (name in FAULTS and FAULTS[name].own_server):
        cluster = Cluster(options.bin)
        cluster.init()
        cluster.start()
        given = cluster.url
    try:
        if name == SOAK:
            return soak(given, 10_000 if options.long else 800)
        fault = FAULTS[name]
        number = max(1, round((fault.long if options.long else fault.short) * options.share))
        return Field(fault, given, cluster, seed).play(name, number)
    finally:
        if cluster is not None:
            cluster.remove()


def print_line(row: Row, *, first: bool) -> None:
    names = [each.name for each in fields(Row)][1:-2]
    if first:
        print(f"{'fault':18}" + "".join(f"{name:>13}" for name in names))
    if row.not_made:
        print(f"{row.fault:18} not made: {row.not_made}", flush=True)
        return
    print(f"{row.fault:18}" + "".join(f"{getattr(row, name):>13,}" for name in names), flush=True)
    for remark in row.remarks:
        print(f"  {remark}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
