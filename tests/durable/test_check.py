"""Before a deploy: what `Durable.check` finds in unfinished runs, and that it only looks."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import date
from typing import Any

import psycopg
import pytest

from awaitly_postgres import Durable, Problem, SnapshotStore, Step, WorkflowDrift, WorkflowSnapshot
from awaitly_postgres.codecs import CattrsCodec
from tests.support import photograph

DB = psycopg.Connection
MakeStore = Callable[..., SnapshotStore]


class Deploys:
    """A run of yesterday's code, and the code of today."""

    def __init__(self, store: SnapshotStore) -> None:
        self.store = store
        self.ran: Counter[str] = Counter()
        self.fail_at: str | None = "ship"

    def act(self, key: str, *_: object) -> str:
        self.ran[key] += 1
        if key == self.fail_at:
            raise ConnectionError(key)
        return key

    def yesterday(self, step: Step, *_: object) -> str:
        step("reserve", self.act, "reserve")
        step.transaction("pay", lambda conn: self.act("pay", conn))
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(lambda key: step(key, self.act, key), ["item-1", "item-2"]))
        step("label", self.act, "label")
        return step("ship", self.act, "ship")

    def leave_one(self, id: str = "a", *args: object, **options: Any) -> Durable:
        """Leave a run that has failed in its last step."""
        durable = Durable(self.store, **options)
        durable.workflow(name="order")(self.yesterday)
        durable.submit(id, self.yesterday, *args)
        assert durable.try_resume(id).status == "failed"
        self.ran.clear()
        return durable

    def today(self, fn: Callable[..., Any], **options: Any) -> Durable:
        durable = Durable(self.store)
        durable.workflow(name="order", **options)(fn)
        return durable


@pytest.fixture
def deploys(store: SnapshotStore) -> Deploys:
    return Deploys(store)


def test_code_that_has_not_changed_has_no_problems(deploys: Deploys, db: DB) -> None:
    """And the check changes nothing, takes no lease and runs no step."""
    durable = deploys.leave_one()
    before = photograph(db)
    assert durable.check() == []
    assert photograph(db) == before
    assert not deploys.ran


def test_a_new_step_behind_the_recorded_ones_is_no_problem(deploys: Deploys) -> None:
    """It is the first new one, and does not run; nor does what follows it."""

    def today(step: Step) -> None:
        step("reserve", deploys.act, "reserve")
        step.transaction("pay", lambda conn: deploys.act("pay", conn))
        for key in ("item-1", "item-2", "label", "weigh"):
            try:
                step(key, deploys.act, key)
            except Exception:
                pytest.fail("nothing may catch the end of a replay")
        deploys.act("behind")

    deploys.leave_one()
    assert deploys.today(today).check() == []
    assert not deploys.ran


@pytest.mark.parametrize("kind", ["step", "transaction", "sleep", "wait"])
def test_nothing_new_runs_whatever_kind_of_step_it_is(deploys: Deploys, db: DB, kind: str) -> None:
    """Not even the observer hears of it."""
    heard = []

    def work(step: Step) -> None:
        if kind == "sleep":
            step.sleep("new", 0)
        elif kind == "wait":
            step.wait("new")
        else:
            (step.transaction if kind == "transaction" else step)("new", deploys.act, "new")

    durable = Durable(deploys.store, on_event=heard.append)
    durable.workflow(work)
    durable.submit("a", work)
    durable.signal("a", "new", "answer")
    before = photograph(db)
    assert durable.check() == []
    assert photograph(db) == before
    assert not heard
    assert not deploys.ran


@pytest.mark.parametrize("renamed", ["reserve", "pay", "label"])
def test_a_renamed_step_is_drift(deploys: Deploys, db: DB, renamed: str) -> None:
    """It names the new key, and what is recorded instead."""

    def today(step: Step) -> None:
        def name(key: str) -> str:
            return f"new {key}" if key == renamed else key

        step(name("reserve"), deploys.act, "reserve")
        step.transaction(name("pay"), lambda conn: deploys.act("pay", conn))
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(lambda key: step(key, deploys.act, key), ["item-1", "item-2"]))
        step(name("label"), deploys.act, "label")

    deploys.leave_one()
    before = photograph(db)
    (problem,) = deploys.today(today).check()
    assert (problem.id, problem.workflow) == ("a", "order")
    assert (problem.kind, problem.key) == ("drift", f"new {renamed}")
    assert repr(renamed) in problem.message
    assert photograph(db) == before
    assert not deploys.ran
    with pytest.raises(WorkflowDrift):
        deploys.today(today).resume("a")


def test_a_step_that_is_gone_is_drift(deploys: Deploys) -> None:
    """The function returns before it; in threads as well."""

    def today(step: Step) -> None:
        step("reserve", deploys.act, "reserve")
        step.transaction("pay", lambda conn: deploys.act("pay", conn))
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(lambda key: step(key, deploys.act, key), ["item-1"]))
        step("label", deploys.act, "label")

    deploys.leave_one()
    (problem,) = deploys.today(today).check()
    assert (problem.kind, problem.key) == ("drift", None)
    assert "item-2" in problem.message


def test_a_fan_out_that_is_half_done_is_no_problem(deploys: Deploys) -> None:
    """What the threads have recorded is replayed, what they have not ends the replay."""
    broken = ["item-3", "item-7"]

    @(durable := Durable(deploys.store)).workflow
    def work(step: Step) -> None:
        def one(nr: int) -> str:
            deploys.fail_at = f"item-{nr}" if f"item-{nr}" in broken else None
            return step(f"item-{nr}", deploys.act, f"item-{nr}")

        with ThreadPoolExecutor(1) as pool:
            parts = [pool.submit(one, nr) for nr in range(10)]
        step("sum", len, [part.result() for part in parts])

    durable.submit("a", work)
    assert durable.try_resume("a").status == "failed"
    deploys.ran.clear()
    for _ in range(20):
        assert durable.check() == []
    assert not deploys.ran


def test_a_raised_version_is_told(deploys: Deploys) -> None:
    """Unless something is said about the old ones: a migration is tried, and replayed."""
    deploys.leave_one()
    (problem,) = deploys.today(deploys.yesterday, version=2).check()
    assert (problem.kind, problem.key) == ("version", None)
    assert "version 1" in problem.message

    clear = deploys.today(deploys.yesterday, version=2, on_version_mismatch="clear")
    assert clear.check() == []

    def rename(snapshot: WorkflowSnapshot, version: int) -> dict[str, Any]:
        document = snapshot.to_json()
        document["steps"]["hold"] = document["steps"].pop("reserve")
        return document

    migrated = deploys.today(deploys.yesterday, version=2, on_version_mismatch=rename)
    (problem,) = migrated.check()
    assert (problem.kind, problem.key) == ("drift", "reserve")

    def fail(snapshot: WorkflowSnapshot, version: int) -> dict[str, Any]:
        raise KeyError("hold")

    failing = deploys.today(deploys.yesterday, version=2, on_version_mismatch=fail)
    (problem,) = failing.check()
    assert problem.kind == "version"
    assert "KeyError: 'hold'" in problem.message
    assert not deploys.ran


def test_a_workflow_that_is_missing_is_told(deploys: Deploys) -> None:
    """Under the name that its runs have."""
    deploys.leave_one()
    (problem,) = Durable(deploys.store).check()
    assert problem == Problem("a", "order", "unregistered", problem.message)
    assert "'order', which is not registered" in problem.message


def test_what_a_changed_codec_cannot_decode_is_told(deploys: Deploys) -> None:
    """A value that does not fit today's annotation: a step's, and the input."""
    deploys.fail_at = None
    durable = Durable(deploys.store, codec=CattrsCodec())

    def day() -> str:
        return "the day after tomorrow"

    @durable.workflow(name="order")
    def yesterday(step: Step, amount: str) -> None:
        step("day", day)
        step.wait("never")

    durable.submit("a", yesterday, "a lot")
    assert durable.try_resume("a").status == "suspended"
    assert durable.check() == []

    def today(step: Step, amount: str) -> None:
        def day() -> date:
            raise AssertionError

        step("day", day)

    changed = Durable(deploys.store, codec=CattrsCodec())
    changed.workflow(name="order")(today)
    (problem,) = changed.check()
    assert (problem.kind, problem.key) == ("undecodable", "day")
    assert "steps['day'].value" in problem.message

    def of_money(step: Step, amount: int) -> None: ...

    changed = Durable(deploys.store, codec=CattrsCodec())
    changed.workflow(name="order")(of_money)
    (problem,) = changed.check()
    assert (problem.kind, problem.key) == ("undecodable", None)
    assert "metadata.input" in problem.message


def test_a_row_that_is_no_snapshot_is_told_and_stops_nothing(deploys: Deploys, db: DB) -> None:
    """Whatever has damaged it."""
    durable = deploys.leave_one("a")
    deploys.leave_one("b")
    db.execute("UPDATE awaitly_snapshots SET snapshot = snapshot - 'steps' WHERE id = 'a'")
    (problem,) = durable.check()
    assert (problem.id, problem.kind) == ("a", "undecodable")
    assert "steps is missing" in problem.message


def test_code_between_the_steps_that_raises_is_told(deploys: Deploys) -> None:
    """But not for a run that has failed in the same way before, whatever the code is."""

    def today(step: Step) -> None:
        found = step("reserve", deploys.act, "reserve")
        found["order"]  # type: ignore[call-overload]

    deploys.leave_one()
    (problem,) = deploys.today(today).check()
    assert problem.kind == "error"
    assert problem.message.startswith("TypeError: string indices")
    with pytest.raises(TypeError):
        deploys.today(today).resume("a")
    assert deploys.today(today).check() == []

    def exits(step: Step) -> None:
        raise SystemExit(0)

    (problem,) = deploys.today(exits).check()
    assert problem.message == "SystemExit: 0"


def test_arguments_that_no_longer_fit_the_function_are_told(deploys: Deploys) -> None:
    """A parameter that came later, without a default."""

    def today(step: Step, user: str, currency: str) -> None: ...

    deploys.leave_one("a", "ada")
    (problem,) = deploys.today(today).check()
    assert (problem.kind, "currency" in problem.message) == ("error", True)


def test_a_thread_that_outlives_the_replay_runs_nothing(deploys: Deploys) -> None:
    """The pool is the process's; what it asks for later is refused."""
    gate = threading.Event()
    futures = []

    def yesterday(step: Step) -> str:
        step("reserve", deploys.act, "reserve")
        raise ConnectionError

    def today(step: Step) -> str:
        step("reserve", deploys.act, "reserve")

        def later() -> str:
            assert gate.wait(60)
            return step("later", deploys.act, "later")

        futures.append(pool.submit(later))
        return step("new", deploys.act, "new")

    before = deploys.today(yesterday)
    before.submit("a", yesterday)
    assert before.try_resume("a").status == "failed"
    deploys.ran.clear()
    with ThreadPoolExecutor(1) as pool:
        assert deploys.today(today).check() == []
        gate.set()
        assert futures[0].exception(60) is not None
    assert not deploys.ran


def test_only_unfinished_runs_of_a_durable_are_looked_at(deploys: Deploys, db: DB) -> None:
    """Not completed, cancelled or given up, nor what was saved by hand; and only of a prefix."""
    for id in ("cancelled", "given up", "completed", "other"):
        deploys.leave_one(id)
    durable = Durable(deploys.store)
    durable.cancel("cancelled")
    db.execute(
        """UPDATE awaitly_snapshots SET snapshot = jsonb_set(
        snapshot, '{metadata,gaveUpAt}', '"2026-11-22T10:56:04.184Z"') WHERE id = 'given up'"""
    )
    deploys.fail_at = None
    deploys.today(deploys.yesterday).resume("completed")
    document = deploys.store.load("other").to_json()
    deploys.store.save("by hand", {**document, "metadata": {}})
    by_node = {**document["metadata"], "input": {"user": 1}}
    deploys.store.save("of node", {**document, "metadata": by_node})
    assert [problem.id for problem in durable.check()] == ["other"]
    assert durable.check("o") == durable.check()
    assert durable.check("x") == []


def test_a_run_that_is_at_work_is_checked_without_its_lease(deploys: Deploys) -> None:
    """What it has only appended so far is replayed as well."""
    inside, gate = threading.Event(), threading.Event()

    def pass_gate() -> None:
        inside.set()
        assert gate.wait(60)

    def work(step: Step, extra: str) -> str:
        for key in ("a", "b", extra):
            step(key, str.ljust, key, 3_000)
        step("gate", pass_gate)
        return "done"

    durable = deploys.today(work)
    durable.submit("a", work, "c")
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(durable.resume, "a")
        assert inside.wait(60)
        assert durable.check() == []
        (problem,) = deploys.today(lambda step, extra: step("a", str) and step("c", str)).check()
        assert (problem.kind, problem.key) == ("drift", "c")
        gate.set()
        assert running.result(60) == "done"


def test_a_role_that_may_only_read_can_check(
    deploys: Deploys, make_store: MakeStore, db: DB
) -> None:
    """Nor would a standby refuse anything."""
    deploys.leave_one()
    (path,) = db.execute("SELECT current_schema()").fetchone()
    options = f"-c search_path={path} -c default_transaction_read_only=on"
    durable = Durable(make_store(kwargs={"options": options}))
    durable.workflow(name="order")(deploys.yesterday)
    assert durable.check() == []
    (problem,) = Durable(durable.store).check()
    assert problem.kind == "unregistered"


def test_every_run_is_checked_however_many_there_are(deploys: Deploys, db: DB) -> None:
    """Pages of the listing go on where the last one ended, those of one time among them."""
    deploys.leave_one()
    for seconds in ("0", "n % 7"):
        db.execute(
            f"""INSERT INTO awaitly_snapshots
            SELECT 'b' || n || {seconds!r}, snapshot, updated_at + make_interval(secs => {seconds})
            FROM awaitly_snapshots, generate_series(1, 600) AS n WHERE id = 'a'"""
        )
    problems = Durable(deploys.store).check()
    assert len({problem.id for problem in problems}) == len(problems) == 1201
    assert deploys.today(deploys.yesterday).check() == []


def test_a_run_that_is_written_meanwhile_is_told_once(deploys: Deploys, db: DB) -> None:
    """It moves behind the others while they are checked, and comes again."""
    deploys.leave_one("a")
    db.execute(
        """INSERT INTO awaitly_snapshots SELECT 'b' || n, snapshot, updated_at
        FROM awaitly_snapshots, generate_series(1, 600) AS n WHERE id = 'a'"""
    )
    migrations = 0

    def touch(snapshot: WorkflowSnapshot, version: int) -> Any:
        nonlocal migrations
        migrations += 1
        if migrations == 10:
            db.execute("UPDATE awaitly_snapshots SET updated_at = clock_timestamp() WHERE id = 'a'")
        raise LookupError

    problems = deploys.today(deploys.yesterday, version=2, on_version_mismatch=touch).check()
    assert migrations == 602
    assert len({problem.id for problem in problems}) == len(problems) == 601
