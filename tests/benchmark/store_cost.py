"""What the store's calls cost, beside the bare statement through the same pool."""

from __future__ import annotations

import gc
import json
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from statistics import median
from typing import Any

from psycopg_pool import ConnectionPool

from awaitly_postgres import SnapshotStore, WorkflowSnapshot, postgres

from .contender import step_json, text
from .figures import Cell, Table, Target, figures
from .server import Server

WHY_BARE = "The bare statement has its JSON already, or leaves it as text."
WHY_JSON = "Every key, float and string is checked: JSONB refuses or changes some of them."
TIMES = {1_000: 300, 100_000: 60, 1_000_000: 8}  # bytes of a snapshot: calls of a round
ROWS = 100
SCHEMA = "benchmark_store"
UPSERT = (
    f"INSERT INTO {SCHEMA}.awaitly_snapshots VALUES (%s, %s::jsonb, now()) ON CONFLICT (id) "
    "DO UPDATE SET snapshot = EXCLUDED.snapshot, updated_at = EXCLUDED.updated_at"
)
SELECT = f"SELECT snapshot::text FROM {SCHEMA}.awaitly_snapshots WHERE id = %s"
LIST = (
    f"SELECT id, snapshot->'execution'->>'status', updated_at FROM {SCHEMA}.awaitly_snapshots "
    "WHERE id >= %s AND id < %s ORDER BY updated_at DESC LIMIT 100"
)
PRUNE = f"DELETE FROM {SCHEMA}.awaitly_snapshots WHERE updated_at < now() - interval '1 day'"
MAKE_OLD = (
    f"INSERT INTO {SCHEMA}.awaitly_snapshots SELECT 'old-' || nr, snapshot, "
    f"now() - interval '2 days' FROM {SCHEMA}.awaitly_snapshots, generate_series(1, %s) nr "
    "WHERE id = 'a-0'"
)


def measure(server: Server, _: object, rounds: int, quick: bool) -> Iterator[Table]:
    table = Table(
        "store",
        "The store, µs a call",
        ("call", "bytes", "ours", "bare", "× bare", "bare + json", "× bare + json"),
    )
    table.notes = [
        "bare: the statement alone, of a text that is there, its answer left as text; json: with",
        f"json.dumps or json.loads. list: a page of {ROWS}; prune: {ROWS} rows, or 20 of 1 MB.",
    ]
    kwargs = {"autocommit": True}
    with ConnectionPool(server.url, min_size=1, max_size=1, kwargs=kwargs, open=True) as pool:
        for size, times in TIMES.items():
            server.fresh_schema(SCHEMA)
            calls = Calls(postgres(pool=pool, schema=SCHEMA), pool, snapshot(size))
            for name in ("save", "load", "list", "list_prefix", "prune"):
                server.settle()
                has_json = name in ("save", "load")
                ways = ("ours", "bare", "json")[: 3 if has_json else 2]
                calls.in_turn(name, ways, 1)
                each = 1 if name == "prune" else times
                found = figures([calls.in_turn(name, ways, each) for _ in range(rounds)])
                ours, bare = found[:2]
                cells: list[Cell] = [ours * 1e6, bare * 1e6, ours / bare, "", ""]
                if has_json:
                    cells[3:] = found[2] * 1e6, ours / found[2]
                    what = f"{name} of {size:,} bytes, times the bare statement"
                    table.targets.append(Target(what, ours / bare, 1.2, why=WHY_BARE))
                    both = Target(f"{what} and json", ours / found[2], 1.2, why=WHY_JSON)
                    table.targets.append(both)
                table.add(name.replace("_", " "), f"{size:,}", *cells)
    yield table


def snapshot(size: int) -> dict[str, Any]:
    """Return a snapshot of about so many bytes, in steps of 300."""
    count = max(1, size // 395)
    steps = {f"step-{nr}": step_json(nr, text(nr, 300)) for nr in range(count)}
    execution = {"status": "completed", "lastUpdated": "2026-01-01T00:00:00.000Z"}
    return {"formatVersion": 1, "steps": steps, "execution": execution}


class Calls:
    """Each call of the store, and the statement a caller would write instead."""

    def __init__(
        self, store: SnapshotStore, pool: ConnectionPool[Any], document: dict[str, Any]
    ) -> None:
        self.store, self.pool, self.document = store, pool, document
        self.text = json.dumps(document)
        self.snapshot = WorkflowSnapshot.from_json(document)
        for group in "ab":
            for nr in range(ROWS // 2):
                store.save(f"{group}-{nr}", document)
        gc.freeze()  # a collection of all that would fall into the turn of any one of them
        self.old = 20 if len(self.text) > 500_000 else ROWS

    def in_turn(self, name: str, ways: Sequence[str], times: int) -> list[float]:
        """Return the median of the seconds that a call takes in each of the ways."""
        seconds: dict[str, list[float]] = {way: [] for way in ways}
        for nr in range(times):
            for way in (*ways[nr % len(ways) :], *ways[: nr % len(ways)]):
                seconds[way].append(self.seconds(f"{name}_{way}"))
        return [median(of_way) for of_way in seconds.values()]

    def seconds(self, name: str) -> float:
        call: Callable[[], object] = getattr(self, name)
        if name.startswith("prune"):
            with self.pool.connection() as conn:
                conn.execute(MAKE_OLD, (self.old,))
        began = time.perf_counter()
        call()
        return time.perf_counter() - began

    def save_ours(self) -> None:
        self.store.save("a-0", self.snapshot)

    def save_bare(self) -> None:
        with self.pool.connection() as conn:
            conn.execute(UPSERT, ("a-0", self.text))

    def save_json(self) -> None:
        text = json.dumps(self.document)
        with self.pool.connection() as conn:
            conn.execute(UPSERT, ("a-0", text))

    def load_ours(self) -> None:
        self.store.load("a-0")

    def load_bare(self) -> str:
        with self.pool.connection() as conn:
            row = conn.execute(SELECT, ("a-0",)).fetchone()
            assert row
            return str(row[0])

    def load_json(self) -> None:
        json.loads(self.load_bare())

    def list_ours(self) -> None:
        self.store.list()

    def list_bare(self) -> None:
        with self.pool.connection() as conn:
            conn.execute(LIST, ("", "z")).fetchall()

    def list_prefix_ours(self) -> None:
        self.store.list("b-")

    def list_prefix_bare(self) -> None:
        with self.pool.connection() as conn:
            conn.execute(LIST, ("b-", "b.")).fetchall()

    def prune_ours(self) -> None:
        assert self.store.prune(timedelta(days=1)) == self.old

    def prune_bare(self) -> None:
        with self.pool.connection() as conn:
            assert conn.execute(PRUNE).rowcount == self.old
