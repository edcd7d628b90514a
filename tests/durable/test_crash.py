"""Processes that are killed or stopped in the middle of a durable run, and those that go on."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
from collections import Counter, defaultdict
from datetime import timedelta
from pathlib import Path
from typing import Any

import psycopg
import pytest

from awaitly_postgres import Durable, SnapshotStore, Step
from tests.support import WORKERS, wait_until

KEYS = ["reserve", "label", "pay", "gift", "ship"]


def start(script: str, *args: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, WORKERS / script, *map(str, args)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def run(script: str, *args: object, timeout: float = 240) -> list[str]:
    """Run a script to its end; return the lines it prints."""
    with start(script, *args) as process:
        try:
            out, _ = process.communicate(timeout=timeout)
        finally:
            process.kill()
    assert process.returncode == 0
    return out.splitlines()


# -- killed --------------------------------------------------------------------------------


@pytest.fixture
def killed(store: SnapshotStore, db: psycopg.Connection, url: str, tmp_path: Path) -> Path:
    """Runs of which each was killed before or after another of its statements; returns the log."""
    store.create_tables()
    db.execute("CREATE TABLE payments (id text, value text)")
    log = tmp_path / "log"
    counts = [int(line.split()[1]) - 1 for line in run("orders.py", "crash", url, log)]
    # Begin, four steps, four statements of the transaction, end; seen before and after.
    assert counts == [10, 10]
    return log


def told(log: Path) -> dict[str, list[tuple[str, str, str]]]:
    """What the log says of each run: "ran" or "got", the key and the value."""
    runs = defaultdict(list)
    for line in log.read_text().splitlines():
        id, *words = line.split()
        runs[id].append(tuple(words))
    return runs


@pytest.mark.read_committed
def test_a_run_killed_at_any_statement_is_found_and_finished_by_another_process(
    killed: Path, store: SnapshotStore, db: psycopg.Connection, url: str
) -> None:
    """What the workflow had got is replayed and never runs again, and each payment is made once."""
    before = told(killed)
    run("orders.py", "resume", url, killed)
    after = told(killed)

    stored = {info.id: store.load(info.id) for info in store.iter()}
    assert len(stored) == 21  # all but the one that was killed before it began
    for id, snapshot in stored.items():
        assert snapshot.execution.status == "completed"
        output = snapshot.metadata["output"]
        assert set(output) == set(KEYS)
        got = {key: value for what, key, value in before[id] if what == "got"}
        if "ship" not in got:
            got.pop("gift", None)  # a failure with nothing after it is tried again
        ran = Counter(key for what, key, _ in after[id] if what == "ran")
        assert got.items() <= output.items()
        assert all(ran[key] == 1 for key in got)
        assert max(ran.values()) <= 2
    payments = db.execute("SELECT id, value FROM payments").fetchall()
    assert sorted(payments) == sorted(
        (id, snapshot.steps["pay"].value) for id, snapshot in stored.items()
    )


@pytest.mark.read_committed
def test_a_killed_run_is_taken_up_when_its_lease_ends_and_not_before(
    killed: Path, db: psycopg.Connection, url: str
) -> None:
    """Nobody has to tell; and what is alive would have renewed its lease."""
    leases = dict(db.execute("SELECT workflow_id, expires_at FROM awaitly_workflow_lock"))
    assert len(leases) > 10
    resumed = [line.split() for line in run("orders.py", "resume", url, killed)]
    assert {id for id, _ in resumed} == set(leases)
    assert {attempts for _, attempts in resumed} == {"2"}
    finished = dict(db.execute("SELECT id, updated_at FROM awaitly_snapshots"))
    for id, ended in leases.items():
        assert ended <= finished[id]


@pytest.mark.read_committed
def test_money_moved_by_processes_that_are_killed_at_random_moves_once(
    durable: Durable, db: psycopg.Connection, url: str
) -> None:
    """Five hundred transfers, eight processes, and each is killed again and again."""
    chance = random.Random(20261122)  # noqa: S311 - has to be the same each time
    db.execute("CREATE TABLE accounts (nr int PRIMARY KEY, cents bigint)")
    db.execute("INSERT INTO accounts SELECT nr, 1000000 FROM generate_series(1, 20) nr")
    db.execute("CREATE TABLE transfers (id text, source int, target int, cents int)")

    def transfer(step: Step, id: str, source: int, target: int, amount: int) -> int: ...

    wanted = []
    for nr in range(500):
        source, target = chance.sample(range(1, 21), 2)
        wanted.append((f"transfer-{nr:03}", source, target, chance.randint(1, 5000)))
        assert durable.submit(wanted[-1][0], durable.workflow(transfer), *wanted[-1])

    (killed,) = run("transfers.py", url, 8, 7)

    assert int(killed) >= 8
    assert db.execute("SELECT * FROM transfers ORDER BY id").fetchall() == wanted
    balances = Counter(dict.fromkeys(range(1, 21), 1_000_000))
    for _, source, target, amount in wanted:
        balances[source] -= amount
        balances[target] += amount
    assert dict(db.execute("SELECT * FROM accounts")) == balances
    assert {info.status for info in durable.store.iter()} == {"completed"}


# -- stopped -------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["step", "transaction"])
def test_a_stopped_process_that_wakes_after_a_takeover_changes_nothing(
    durable: Durable, db: psycopg.Connection, url: str, kind: str
) -> None:
    """It is told that its lease is lost, and its transaction is rolled back."""
    durable.store.create_tables()
    db.execute("CREATE TABLE paid (who text)")

    def stored() -> list[Any]:
        tables = "awaitly_snapshots", "awaitly_snapshots_steps", "awaitly_workflow_lock"
        return [db.execute(f"SELECT * FROM {table}").fetchall() for table in tables]

    with start("sleeper.py", url, 1.5, kind) as sleeper:
        try:
            assert sleeper.stdout.readline() == "in the step\n"
            sleeper.send_signal(signal.SIGSTOP)
            ((expires_at,),) = db.execute("SELECT expires_at FROM awaitly_workflow_lock").fetchall()
            wait_until(db, expires_at)

            def wake(conn: psycopg.Connection | None = None) -> str:
                before = stored()
                sleeper.send_signal(signal.SIGCONT)
                out, _ = sleeper.communicate("go on\n", timeout=60)
                assert out == "LeaseLost\n"
                assert stored() == before
                if conn is not None:
                    conn.execute("INSERT INTO paid VALUES ('the other')")
                return "the other"

            @durable.workflow
            def work(step: Step, kind: str) -> list[str]:
                first = step("first", lambda: "the other")
                run_second = step.transaction if kind == "transaction" else step
                return [first, run_second("second", wake)]

            ((info),) = durable.resume_pending()
            assert (info.status, info.result) == ("completed", ["the sleeper", "the other"])
        finally:
            sleeper.kill()
    assert db.execute("SELECT * FROM paid").fetchall() == [("the other",)] * (kind != "step")


@pytest.mark.parametrize("kind", ["step", "transaction"])
def test_a_step_longer_than_its_ttl_keeps_its_lease(
    store: SnapshotStore, db: psycopg.Connection, kind: str
) -> None:
    """It is renewed in the background, so nobody takes over and the step is recorded."""
    durable = Durable(store, lock_ttl=2)

    def take_long(*_: object) -> str:
        (now,) = db.execute("SELECT clock_timestamp()").fetchone()
        wait_until(db, now + timedelta(seconds=2))
        assert durable.list_pending() == []
        assert store.try_acquire("a") is None
        return "done"

    def work(step: Step) -> str:
        return (step.transaction if kind == "transaction" else step)("long", take_long)

    assert durable.run("a", work) == "done"
    assert store.load("a").steps["long"].value == "done"
