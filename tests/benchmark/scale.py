"""Whether the calls that look for something grow with what is stored."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import ClassVar

from awaitly_postgres import Durable, SnapshotStore, Step, postgres

from .figures import Figure, Table, Target
from .server import Server

PENDING = 1_000
PRUNED = 1_000  # rows, each round
TAKEN = 100  # pending runs, each round
FILL = """
INSERT INTO {schema}.awaitly_snapshots
SELECT 'user-' || nr % ({count} / 100) || '/order-' || nr,
  jsonb_build_object('formatVersion', 1,
    'steps', jsonb_build_object('charge', jsonb_build_object('ok', true, 'value', md5(nr::text)),
      'ship', jsonb_build_object('ok', true, 'value', md5((-nr)::text))),
    'execution', jsonb_build_object('status', 'completed',
      'lastUpdated', '2026-01-01T00:00:00.000Z', 'completedAt', '2026-01-01T00:00:00.000Z'),
    'metadata', jsonb_build_object('version', 1, 'workflow', 'work', 'output', nr)),
  now() - make_interval(
    days => CASE WHEN nr <= {old} THEN 100 - (nr - 1) / {pruned} ELSE 0 END,
    secs => abs(hashint4(nr) / 1e9) * 10000)
FROM generate_series(1, {count}) nr
"""


def measure(server: Server, _: object, rounds: int, quick: bool) -> Iterator[Table]:
    counts = (10_000, 50_000) if quick else (10_000, 1_000_000)
    stores = [Filled(server, f"benchmark_scale_{count}", count, rounds) for count in counts]
    server.settle()
    few, many = (f"{count:,}" for count in counts)
    table = Table(
        "scale",
        f"Among {few} and {many} snapshots, {PENDING:,} of them pending",
        ("call", f"ms at {few}", f"ms at {many}", "ratio", f"rows at {few}", f"rows at {many}"),
    )
    table.notes = [
        "Each call is the first on a connection. Rows: rows of tables and entries of indexes that",
        "the server has read for it. list_prefix finds 100 in either.",
        f"resume_pending takes {TAKEN} runs of one step each, prune deletes {PRUNED:,} rows.",
    ]
    for name in Filled.CALLS:
        found = [[stored.measured(name) for stored in stores] for _ in range(rounds)]
        seconds = [Figure(of[nr][0] for of in found) for nr in (0, 1)]
        rows = [Figure(of[nr][1] for of in found) for nr in (0, 1)]
        ratio = seconds[1] / seconds[0]
        table.add(name, seconds[0] * 1e3, seconds[1] * 1e3, ratio, *rows)
        if name == "list_pending":
            what = f"list_pending at {many}, times that at {few}"
            table.targets.append(Target(what, ratio, 1.5))
    yield table


def work(step: Step, nr: int) -> int:
    return step("double", lambda: 2 * nr)


class Filled:
    """A store with so many snapshots."""

    def __init__(self, server: Server, schema: str, count: int, rounds: int) -> None:
        self.server, self.schema = server, server.fresh_schema(schema)
        with self.opened() as store:
            store.create_tables()
            old = (rounds + 1) * PRUNED  # in groups of the same day; one more than is pruned
            fill = FILL.format(schema=schema, old=old, pruned=PRUNED, count=count - PENDING)
            server.db.execute(fill)
            self.submitted = 0
            self.submit(store, PENDING)
        self.age = 100

    def opened(self) -> SnapshotStore:
        return postgres(self.server.url, schema=self.schema, max_size=1)

    def durable(self, store: SnapshotStore) -> Durable:
        durable = Durable(store)
        durable.workflow(work)
        return durable

    def submit(self, store: SnapshotStore, count: int) -> None:
        durable = self.durable(store)
        for _ in range(count):
            self.submitted += 1
            durable.submit(f"pending-{self.submitted}", durable.workflow(work), self.submitted)

    def measured(self, name: str) -> tuple[float, int]:
        """Return the seconds and the rows read of one call."""
        before = self.server.rows_read(self.schema)
        with self.opened() as store:
            store.ping()
            began = time.perf_counter()
            Filled.CALLS[name](self, store)
            seconds = time.perf_counter() - began
        # A connection reports what it has read when it is closed.
        rows = self.server.rows_read(self.schema) - before
        if name == "resume_pending":
            with self.opened() as store:
                self.submit(store, TAKEN)
        return seconds, rows

    def list_pending(self, store: SnapshotStore) -> None:
        assert len(self.durable(store).list_pending()) == 100

    def resume_pending(self, store: SnapshotStore) -> None:
        assert len(self.durable(store).resume_pending(limit=TAKEN)) == TAKEN

    def list_newest(self, store: SnapshotStore) -> None:
        assert len(store.list()) == 100

    def list_prefix(self, store: SnapshotStore) -> None:
        assert len(store.list("user-50/")) >= 90

    def stats(self, store: SnapshotStore) -> None:
        assert store.stats().total

    def prune(self, store: SnapshotStore) -> None:
        self.age -= 1
        assert store.prune(timedelta(days=self.age, hours=12)) == PRUNED

    CALLS: ClassVar[dict[str, Callable[[Filled, SnapshotStore], None]]] = {
        call.__name__: call
        for call in (list_pending, resume_pending, list_newest, list_prefix, stats, prune)
    }
