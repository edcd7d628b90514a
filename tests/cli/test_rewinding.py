"""The commands that take runs back, and the one for before a deploy."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import psycopg
import pytest
from click.testing import CliRunner, Result

from awaitly_postgres import Durable, SnapshotStore, Step
from awaitly_postgres.cli import cli

Run = Callable[..., Result]

SHOP = """
import os
from awaitly_postgres import Durable, postgres

durable = Durable(postgres(os.environ["DATABASE_URL"]))

@durable.workflow
def letters(step):
    return [step(key, str, key) for key in {keys!r}]
"""


@pytest.fixture
def run(url: str, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run the command on this test's database."""
    monkeypatch.setenv("DATABASE_URL", url)
    return lambda *arguments: CliRunner().invoke(cli, arguments, catch_exceptions=False)


@pytest.fixture
def letters(durable: Durable) -> Durable:
    """A store with a completed run of steps a, b and c."""

    @durable.workflow
    def letters(step: Step) -> list[str]:
        return [step(key, str, key) for key in "abc"]

    durable.run("run", letters)
    return durable


def test_rewind_forgets_and_says_what(run: Run, letters: Durable) -> None:
    """The run is pending then, with its old idempotency keys or new ones."""
    done = run("rewind", "run", "b")
    assert (done.exit_code, done.stdout) == (0, "forgotten: b, c\n")
    assert letters.get("run").state == "pending"
    assert list(letters.store.load("run").steps) == ["a"]
    assert run("rewind", "run", "a", "--new-keys").stdout == "forgotten: a\n"
    assert letters.store.load("run").metadata["keyGeneration"] == 1


def test_fork_copies_and_says_what(run: Run, letters: Durable) -> None:
    """A place that is taken is a failure."""
    done = run("fork", "run", "copy", "c")
    assert (done.exit_code, done.stdout) == (0, "copied: a, b\n")
    assert letters.get("copy").state == "pending"
    assert letters.get("run").state == "completed"
    assert run("fork", "run", "other", "a").stdout == "copied: nothing\n"
    again = run("fork", "run", "copy", "c")
    assert (again.exit_code, again.stdout) == (1, "")
    assert "'copy' is taken" in again.stderr


@pytest.mark.parametrize("command", ["rewind run", "fork run copy"])
def test_an_unknown_step_or_run_is_wrong_input(run: Run, letters: Durable, command: str) -> None:
    """Nothing was done, and the message says which steps there are."""
    before = letters.store.load("run")
    done = run(*command.split(), "x")
    assert (done.exit_code, done.stdout) == (2, "")
    assert "its last steps are: 'a', 'b', 'c'" in done.stderr
    done = run(*command.replace(" run", " nope").split(), "a")
    assert done.exit_code == 2
    assert "'nope'" in done.stderr
    assert letters.store.load("run") == before
    assert not letters.has_state("copy")


def test_a_run_that_is_held_is_left_alone(run: Run, letters: Durable, store: SnapshotStore) -> None:
    """It says who has it, and what to do if that process is dead."""
    with store.lock("run") as lease:
        for command in (["rewind", "run", "a"], ["retry", "run"]):
            done = run(*command)
            assert done.exit_code == 1
            assert lease.token in done.stderr
            assert "'awaitly-postgres unlock run'" in done.stderr


def test_retry_makes_a_run_due(
    run: Run, durable: Durable, db: psycopg.Connection, store: SnapshotStore
) -> None:
    """One that pauses or was given up; with all its starts before it again."""

    @durable.workflow
    def divide(step: Step, by: int) -> float:
        return step("divide", lambda: 1 / by)

    for id in ("pausing", "given up", "cancelled"):
        durable.submit(id, divide, 0)
        durable.try_resume(id)
    durable.cancel("cancelled")
    durable.run("completed", divide, 1)
    db.execute(
        """UPDATE awaitly_snapshots SET snapshot = jsonb_set(
        snapshot, '{metadata,gaveUpAt}', '"2026-11-22T10:56:04.184Z"') WHERE id = 'given up'"""
    )
    store.save("by hand", {**store.load("completed").to_json(), "metadata": None})
    for id in ("pausing", "given up"):
        done = run("retry", id)
        assert (done.exit_code, done.stdout) == (0, "due\n")
        assert store.load(id).metadata["attempts"] == 0
    assert {info.id for info in durable.list_pending()} == {"pausing", "given up"}
    before = [store.load(id) for id in ("cancelled", "completed", "by hand")]
    for id, why in (("cancelled", "is cancelled"), ("completed", "is completed")):
        done = run("retry", id)
        assert (done.exit_code, why in done.stderr) == (1, True)
    assert run("retry", "nope").exit_code == 2
    assert [store.load(id) for id in ("cancelled", "completed", "by hand")] == before
    assert db.execute("SELECT count(*) FROM awaitly_workflow_lock").fetchone() == (0,)


def test_retry_does_not_end_a_sleep(run: Run, durable: Durable) -> None:
    """It is taken up, and suspended until the same time."""

    @durable.workflow
    def nap(step: Step) -> None:
        step.sleep("nap", 3600)

    durable.submit("a", nap)
    durable.try_resume("a")
    ends = durable.store.load("a").metadata["waits"]
    assert run("retry", "a").stdout == "due\n"
    (outcome,) = durable.resume_pending()
    assert outcome.status == "suspended"
    assert durable.store.load("a").metadata["waits"] == ends


def test_check_exits_with_1_if_there_is_a_problem(
    run: Run, letters: Durable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each has its line, and with --json all there is to know of it."""
    letters.rewind("run", "c")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "shop_of_today.py").write_text(SHOP.format(keys="abcd"))
    (tmp_path / "shop_of_tomorrow.py").write_text(SHOP.format(keys="axc"))
    done = run("check", "shop_of_today:durable")
    assert (done.exit_code, done.stdout) == (0, "no problems\n")
    assert json.loads(run("check", "shop_of_today:durable", "--json").stdout) == []

    done = run("check", "shop_of_tomorrow:durable")
    assert done.exit_code == 1
    (line,) = done.stdout.splitlines()
    assert line.split()[:2] == ["drift", "run"]
    assert "'x'" in line
    (problem,) = json.loads(run("check", "shop_of_tomorrow:durable", "--json").stdout)
    assert (problem["id"], problem["workflow"], problem["key"]) == ("run", "letters", "x")
    assert run("check", "shop_of_tomorrow:durable", "--prefix", "x").exit_code == 0
    assert letters.get("run").state == "pending"
