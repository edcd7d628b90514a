"""What items of `step.map`, and steps in threads, cost beside one INSERT and commit for each."""

from __future__ import annotations

from collections.abc import Iterator

from .contenders import Contenders, Work
from .figures import Table, Target
from .rounds import in_rounds
from .server import Server

ROWS = {
    "floor": ("bare INSERT", 1),
    "map_8": ("step.map", 8),
    "map_16": ("step.map", 16),
    "map_32": ("step.map", 32),
    "threads_8": ("step in threads", 8),
    "threads_16": ("step in threads", 16),
    "threads_32": ("step in threads", 32),
    "dbos_queue": ("DBOS, workflows on a queue", 16),
    "langgraph_map": ("LangGraph tasks", 16),
}
OF_PEERS = 10  # times fewer items: theirs take as much longer


def measure(server: Server, contenders: Contenders, rounds: int, quick: bool) -> Iterator[Table]:
    items = 1_000 if quick else 10_000
    table = Table(
        "fan_out",
        f"{items:,} items in one run, results of 300 bytes",
        ("way", "threads", "µs an item", "× floor", "CPU, µs", "× floor's CPU", "commits"),
    )
    table.notes = [
        "The whole run, its begin and end included, divided by the items. CPU: processor time of",
        "client and server. The floor makes one INSERT and commit for each item, in one thread.",
        f"The peers have {items // OF_PEERS:,} items; LangGraph writes them in the background.",
    ]
    work = {
        name: Work(items if contenders.are_ours(name) else items // OF_PEERS, runs=1)
        for name in contenders.names(*ROWS)
    }
    found = in_rounds(server, contenders, work, rounds)
    floor = found["floor"]
    for name, cost in found.items():
        ratios = cost.run / floor.run, cost.cpu / floor.cpu
        way, threads = ROWS[name]
        each = cost.run * 1e6, ratios[0], cost.cpu * 1e6, ratios[1]
        table.add(way, str(threads), *each, cost.commits)
    what = f"step.map of {items:,} items, 16 workers, times the floor a step"
    table.targets.append(Target(what, found["map_16"].run / floor.run, 0.5))
    yield table
