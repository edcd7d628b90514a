"""Rows that version 0.1 wrote load, and resume: nothing recorded runs again."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import psycopg
import pytest

from awaitly_postgres import Durable, Step, WorkflowCancelled, WorkflowSuspended
from tests.support import DATA

DB = psycopg.Connection
ROWS = json.loads((DATA / "rows-0.1.json").read_text())
RESULTS = {"waiting": "answer", "signalled": "answer"}
RAN = {
    "completed": [],
    "failed": ["ship"],
    "crashed": ["ship"],
    "waiting": [],
    "sleeping": ["ship"],
    "declined": ["pay", "ship"],
    "fanout": ["part-0", "part-1", "pay", "ship"],
    "signalled": ["reserve", "gift", "part-0", "part-1", "pay"],
}


@pytest.fixture
def ran() -> list[str]:
    return []


@pytest.fixture
def resuming(durable: Durable, db: DB, ran: list[str]) -> Durable:
    """All these rows, and the workflow that wrote them, mended."""
    durable.store.create_tables()
    for id, snapshot in ROWS["snapshots"]:
        db.execute(
            "INSERT INTO awaitly_snapshots VALUES (%s, %s, '2026-11-24')",
            (id, json.dumps(snapshot)),
        )
    for id, key, step in ROWS["steps"]:
        db.execute(
            "INSERT INTO awaitly_snapshots_steps VALUES (%s, %s, %s)", (id, key, json.dumps(step))
        )

    def act(key: str, size: int = 0) -> str:
        ran.append(key)
        return key + "." * size

    def pay(conn: DB) -> str:
        return act("pay")

    @durable.workflow
    def order(step: Step, kind: str, size: int) -> Any:
        step("reserve", act, "reserve", size)
        try:
            step("gift", act, "gift")
        except LookupError:
            step("no-gift", act, "no-gift")
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(lambda nr: step(f"part-{nr}", act, f"part-{nr}"), range(2)))
        step.transaction("pay", pay)
        if kind == "long":
            for nr in range(50):
                step(f"item-{nr}", act, f"item-{nr}")
        if kind in ("waiting", "signalled"):
            return step.wait("go")
        if kind == "sleeping":
            step.sleep("nap", 3600)
        return step("ship", act, "ship")

    return durable


@pytest.mark.parametrize("size", [0, 6000], ids=["small", "with a journal"])
@pytest.mark.parametrize("kind", RAN)
def test_a_run_of_0_1_goes_on_where_it_was(
    resuming: Durable, db: DB, ran: list[str], kind: str, size: int
) -> None:
    """Completed, failed (in a step, a transaction, two threads), crashed, waiting, asleep."""
    id = f"{kind}-{size}"
    before = {key: step.to_json() for key, step in resuming.store.load(id).steps.items()}
    if kind == "waiting":
        assert resuming.signal(id, "go", "answer")
    if kind == "sleeping":
        let_it_sleep_until(db, id, "2999-01-01T00:00:00.000Z")
        with pytest.raises(WorkflowSuspended):
            resuming.resume(id)
        let_it_sleep_until(db, id, "2000-01-01T00:00:00.000Z")
    assert resuming.resume(id) == RESULTS.get(kind, "ship")
    assert sorted(ran) == sorted(RAN[kind])
    after = {key: step.to_json() for key, step in resuming.store.load(id).steps.items()}
    kept = {key: step for key, step in before.items() if step["ok"] or key == "gift"}
    assert {key: after[key] for key in kept} == kept


def test_a_journal_that_0_1_left_behind_is_replayed(resuming: Durable, ran: list[str]) -> None:
    """Its process died in the 46th of 50 items; some are in the snapshot, some in the journal."""
    assert 0 < sum(id == "long-0" for id, _, _ in ROWS["steps"]) < 45
    assert resuming.resume("long-0") == "ship"
    assert ran == [*(f"item-{nr}" for nr in range(45, 50)), "ship"]
    assert resuming.get("long-0").step_count == 57
    assert resuming.store.load("long-0").metadata["tenant"] == "acme"


def test_what_0_1_cancelled_stays_cancelled(resuming: Durable, ran: list[str]) -> None:
    """It is told so, and nothing of it runs."""
    assert resuming.get("cancelled-0").state == "cancelled"
    with pytest.raises(WorkflowCancelled):
        resuming.resume("cancelled-0")
    assert ran == []


def let_it_sleep_until(db: DB, id: str, time: str) -> None:
    """Move the end of the sleep that the row of 0.1 began."""
    db.execute(
        "UPDATE awaitly_snapshots SET snapshot = "
        "jsonb_set(snapshot, '{metadata,waits,nap}', to_jsonb(%s::text)) WHERE id = %s",
        (time, id),
    )


def test_what_0_1_left_unfinished_is_found_by_cron(resuming: Durable, ran: list[str]) -> None:
    """Submitted, crashed, failed and answered ones; not those that wait or were cancelled."""
    outcomes = {outcome.id: outcome.status for outcome in resuming.resume_pending()}
    kinds = ("failed", "crashed", "submitted", "declined", "fanout", "signalled")
    expected = {f"{kind}-{size}": "completed" for kind in kinds for size in (0, 6000)}
    expected["long-0"] = "completed"
    # Whose sleep is over by now; a row's age is that of the fixture.
    assert {id: status for id, status in outcomes.items() if "sleeping" not in id} == expected
