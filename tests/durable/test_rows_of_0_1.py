"""Rows that version 0.1 wrote load, and resume: nothing recorded runs again."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import psycopg
import pytest

from awaitly_postgres import Durable, Step, WorkflowSuspended
from tests.support import DATA

DB = psycopg.Connection
ROWS = json.loads((DATA / "rows-0.1.json").read_text())
RESULTS = {"waiting": "answer", "sleeping": "ship", "completed": "ship"}
RAN = {
    "completed": [],
    "failed": ["ship"],
    "crashed": ["ship"],
    "waiting": [],
    "sleeping": ["ship"],
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
        if kind == "waiting":
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
    """Completed, failed, crashed half way, waiting, asleep."""
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
    assert ran == RAN[kind]
    after = {key: step.to_json() for key, step in resuming.store.load(id).steps.items()}
    kept = {key: step for key, step in before.items() if step["ok"] or key == "gift"}
    assert {key: after[key] for key in kept} == kept


def let_it_sleep_until(db: DB, id: str, time: str) -> None:
    """Move the end of the sleep that the row of 0.1 began."""
    db.execute(
        "UPDATE awaitly_snapshots SET snapshot = "
        "jsonb_set(snapshot, '{metadata,waits,nap}', to_jsonb(%s::text)) WHERE id = %s",
        (time, id),
    )


def test_what_0_1_left_unfinished_is_found_by_cron(resuming: Durable, ran: list[str]) -> None:
    """Submitted, crashed and failed ones, whose time has come; not those that wait."""
    outcomes = {outcome.id: outcome.status for outcome in resuming.resume_pending()}
    kinds = ("failed", "crashed", "submitted")
    expected = {f"{kind}-{size}": "completed" for kind in kinds for size in (0, 6000)}
    # Whose sleep is over by now; a row's age is that of the fixture.
    assert {id: status for id, status in outcomes.items() if "sleeping" not in id} == expected
