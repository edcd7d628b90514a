"""`step.map` in durable runs: stored, resumed, killed, rewound, looked at."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable
from typing import Any

import psycopg
import pytest

from awaitly_postgres import (
    Durable,
    SnapshotStore,
    Step,
    WorkflowCancelled,
    WorkflowDrift,
    WorkflowSuspended,
)
from tests.support import WORKERS, photograph

DB = psycopg.Connection


class Import:
    """A workflow with a map between two steps, whose bodies are counted."""

    def __init__(self, count: int = 20, size: int = 0) -> None:
        self.ran: Counter[str] = Counter()
        self.items = [f"item-{nr}" for nr in range(count)]
        self.broken: set[str] = set()
        self.size = size

    def act(self, item: str) -> str:
        self.ran[item] += 1
        if item in self.broken:
            raise LookupError(item)
        return item.ljust(self.size, ".")

    def work(self, step: Step) -> int:
        step("read", self.act, "read")
        done = step.map("load", self.act, self.items, workers=4)
        assert done == [item.ljust(self.size, ".") for item in self.items]
        step("report", self.act, "report")
        return len(done)


SIZES = pytest.mark.parametrize("size", [0, 3_000], ids=["small", "large"])


@SIZES
def test_a_resumed_map_repeats_only_what_is_missing(durable: Durable, size: int) -> None:
    """Failed items are tried again, the others are not."""
    job = Import(size=size)
    job.broken = {"item-3", "item-7"}
    with pytest.raises(LookupError, match="item-3"):
        durable.run("a", job.work)
    job.broken = set()
    assert durable.run("a", job.work) == 20
    assert job.ran == Counter([*job.items, "item-3", "item-7", "read", "report"])
    assert durable.run("a", job.work) == 20
    assert durable.get("a").step_count == 22


def test_a_map_costs_fewer_commits_than_items(durable: Durable, db: DB) -> None:
    """With sixteen workers far fewer; the exact number is a matter of luck."""
    before = db.execute("SELECT txid_current()").fetchone()[0]
    durable.run("a", lambda step: len(step.map("m", str, range(2_000), workers=16)))
    after = db.execute("SELECT txid_current()").fetchone()[0]
    assert after - before < 1_000
    assert photograph(db)["awaitly_snapshots_steps"] == []


@pytest.mark.parametrize("items", [["item-0"], [*"ab"]])
def test_drift_of_the_items_stops_the_run_before_any_work(
    durable: Durable, db: DB, items: list[str]
) -> None:
    """Nothing is erased, and it goes on with the old ones."""
    job = Import()
    job.broken = {"item-3"}
    with pytest.raises(LookupError):
        durable.run("a", job.work)
    before, job.ran, job.items, items = Counter(job.ran), Counter(), items, job.items
    steps = set(durable.store.load("a").steps)
    with pytest.raises(WorkflowDrift, match="'load' over"):
        durable.run("a", job.work)
    assert not job.ran
    job.broken, job.items = set(), items
    assert durable.run("a", job.work) == 20
    assert steps < set(durable.store.load("a").steps)
    assert before + job.ran == Counter([*items, "item-3", "read", "report"])


def test_check_says_what_would_be_drift_and_begins_no_item(durable: Durable) -> None:
    """As for steps."""
    job = Import()

    @durable.workflow(name="import")
    def work(step: Step) -> int:
        return job.work(step)

    job.broken = {"item-3"}
    with pytest.raises(LookupError):
        durable.run("a", work)
    job.ran.clear()
    assert durable.check() == []
    job.items = ["item-0"]
    (problem,) = durable.check()
    assert (problem.kind, problem.key) == ("drift", "load")
    assert not job.ran


@pytest.mark.parametrize("key", ["load", "load[0]", "load[11]"])
def test_a_rewind_to_a_map_or_to_one_of_its_items_forgets_it_whole(
    durable: Durable, key: str
) -> None:
    """And what came after; what was before is replayed. A fork copies that."""
    job = Import()
    durable.workflow(job.work)
    durable.run("a", job.work)
    assert durable.fork("a", "copy", key) == ["read"]
    forgotten = durable.rewind("a", key)
    assert set(forgotten) == {f"load[{nr}]" for nr in range(20)} | {"report"}
    job.ran.clear()
    assert durable.resume("a") == 20
    assert job.ran == Counter([*job.items, "report"])


def test_a_cancelled_run_begins_no_further_item(
    make_store: Callable[..., SnapshotStore],
) -> None:
    """The next record finds the lease gone; all workers stop."""
    durable = Durable(make_store())
    ran: list[int] = []

    def act(item: int) -> int:
        ran.append(item)
        if item == 10:
            durable.cancel("a")
        return item

    with pytest.raises(WorkflowCancelled):
        durable.run("a", lambda step: step.map("m", act, range(10_000), workers=4))
    assert len(ran) < 10_000
    stored = set(durable.store.load("a").steps)
    assert {f"m[{nr}]" for nr in range(5)} <= stored
    assert stored <= {f"m[{nr}]" for nr in ran}


def test_a_large_map_is_folded_and_read_in_linear_time(durable: Durable) -> None:
    """Twenty thousand items; nothing grows with what is there but by doubling."""
    ran: list[int] = []
    broken = [True]

    def act(item: int) -> int:
        ran.append(item)
        if broken and item == 19_999:
            raise LookupError
        return item

    def work(step: Step) -> int:
        return sum(step.map("m", act, range(20_000), workers=16))

    with pytest.raises(LookupError):
        durable.run("a", work)
    broken.clear()
    assert durable.run("a", work) == sum(range(20_000))
    assert len(ran) == 20_001


def test_a_process_killed_at_any_statement_of_a_map_loses_nothing_acknowledged(
    store: SnapshotStore, db: DB, url: str
) -> None:
    """Killed before and after each; whoever resumes repeats only what nobody was told of."""
    store.create_tables()
    db.execute("CREATE TABLE ran (id text, item int)")
    db.execute("CREATE TABLE got (id text, item int)")
    script = [sys.executable, WORKERS / "mapper.py", url]
    ids = subprocess.run(
        [*script, "crash"], check=True, capture_output=True, text=True, timeout=240
    ).stdout.split()
    assert len(ids) > 10
    told = set(db.execute("SELECT id, item FROM got").fetchall())
    assert told
    subprocess.run([*script, "resume"], check=True, timeout=240)
    assert {info.status for info in store.iter()} == {"completed"}
    for id, item in told:
        ((times,),) = db.execute("SELECT count(*) FROM ran WHERE (id, item) = (%s, %s)", (id, item))
        assert times == 1


# -- looking -------------------------------------------------------------------------------


@SIZES
def test_a_run_says_how_far_its_maps_have_got(
    durable: Durable, store: SnapshotStore, url: str, size: int
) -> None:
    """While it runs, with what stands in the journal; after a failure; and when it is done."""
    job = Import(12, size)
    seen: list[Any] = []
    half = threading.Barrier(4)

    def act(item: str) -> str:
        if item in job.items[8:]:
            half.wait(30)  # the first eight are recorded when all four workers are here
            if half.wait(30) == 0:
                seen.extend([durable.get("a"), durable.list()[0], show(url, "list")])
            half.wait(30)
        return Import.act(job, item)

    job.act = act  # type: ignore[method-assign]
    job.broken = {"item-8", "item-9"}
    with pytest.raises(LookupError):
        durable.run("a", job.work)
    got, listed, text = seen
    assert got.maps == listed.maps == {"load": (8, 12)}
    assert "load 8/12" in text
    for info in (durable.get("a"), durable.list()[0]):
        assert info.maps == {"load": (10, 12)}
    job.act, job.broken = lambda item: Import.act(job, item), set()  # type: ignore[method-assign]
    durable.run("a", job.work)
    assert durable.get("a").maps == {"load": (12, 12)}
    assert durable.list()[0].maps == {}


def test_show_folds_the_items_of_a_map_but_not_those_that_failed(
    durable: Durable, url: str
) -> None:
    """One line with the progress; --all shows each item, and JSON has both."""
    job = Import(30)
    job.broken = {"item-8", "item-9"}
    with pytest.raises(LookupError):
        durable.run("a", job.work)
    text = show(url, "show", "a")
    assert "31 steps" in text
    assert "load 28/30" in text
    assert "load[8]" in text
    assert "load[7]" not in text
    assert "load[7]" in show(url, "show", "a", "--all")
    told = json.loads(show(url, "show", "a", "--json"))
    assert told["maps"] == {"load": [28, 30]}
    assert len(told["steps"]) == 31


def show(url: str, *arguments: str) -> str:
    command = [sys.executable, "-m", "awaitly_postgres", *arguments]
    environment = {**os.environ, "DATABASE_URL": url, "PYTHONUTF8": "1"}
    done = subprocess.run(
        command, env=environment, check=True, capture_output=True, encoding="utf-8", timeout=60
    )
    return done.stdout


def test_a_map_without_a_journal_rewrites_the_snapshot(
    make_store: Callable[..., SnapshotStore], db: DB
) -> None:
    """As single steps do, only less often."""
    durable = Durable(make_store(journal=False))
    job = Import(50, 500)
    job.broken = {"item-8"}
    with pytest.raises(LookupError):
        durable.run("a", job.work)
    assert durable.list()[0].maps == {"load": (49, 50)}
    job.broken = set()
    assert durable.run("a", job.work) == 50


def test_a_wait_after_a_map_replays_the_map(durable: Durable) -> None:
    """The map is settled by it, failures included."""
    job = Import(5)
    job.broken = {"item-2"}

    @durable.workflow
    def work(step: Step) -> str:
        try:
            step.map("load", job.act, job.items)
        except LookupError as error:
            failed = str(error)
        return f"{failed} {step.wait('answer')}"

    with pytest.raises(WorkflowSuspended):
        durable.run("a", work)
    durable.signal("a", "answer", "ok")
    assert durable.resume("a") == "item-2 ok"
    assert job.ran == Counter(job.items)
    assert durable.get("a").maps == {"load": (4, 5)}
