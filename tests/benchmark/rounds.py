"""Contenders that do their work in turn, round by round, and what each of them takes."""

from __future__ import annotations

from collections.abc import Mapping

from attrs import frozen

from .contenders import Contender, Contenders, Work
from .figures import Figure, figures
from .server import Server


@frozen
class Cost:
    """What a step takes."""

    step: Figure  # seconds from one step to the next: the median of a run
    run: Figure  # seconds of the whole run, divided by its steps
    cpu: Figure  # seconds of processor time of client and server, likewise
    wal: Figure  # bytes of write-ahead log, likewise
    commits: Figure  # transaction ids, likewise


def in_rounds(
    server: Server, contenders: Contenders, work: Mapping[str, Work], rounds: int
) -> dict[str, Cost]:
    """Have each contender do its work once a round, in another order each round."""
    server.settle()
    samples: dict[str, list[tuple[float, ...]]] = {name: [] for name in work}
    with contenders.running(list(work)) as team:
        for nr in range(rounds):
            for contender in team[nr % len(team) :] + team[: nr % len(team)]:
                samples[contender.name].append(cost(server, contender, work[contender.name]))
    return {name: Cost(*figures(samples[name])) for name in work}


def cost(server: Server, contender: Contender, work: Work) -> tuple[float, ...]:
    """Return one sample of what is in a `Cost`."""
    wal, transactions, cpu = server.wal(), server.transactions(), server.cpu()
    done = contender.do(work)
    cpu, wal = done["cpu"] + server.cpu() - cpu, server.wal() - wal
    commits = server.transactions() - transactions - 1
    run = done["seconds"] / done["steps"]
    between = run if contender.name == "rewrite" else done["between"]
    return between, run, *(total / done["steps"] for total in (cpu, wal, commits))
