"""What a run logs by itself, without an observer."""

from __future__ import annotations

import logging
from typing import Any

import pytest

from awaitly_postgres import Step, Workflow


class Unprintable(Exception):
    """Costs something to print, or cannot be."""

    def __repr__(self) -> str:
        raise AssertionError("nobody asked for it")


def job(step: Step, error: Exception | None) -> str:
    def work() -> str:
        if error is not None:
            raise error
        return "done"

    return step("a", work)


def test_every_turn_of_a_run_is_logged_at_debug(caplog: pytest.LogCaptureFixture) -> None:
    """One line each, under the package's name, with the step and how long it took."""
    caplog.set_level(logging.DEBUG, logger="awaitly_postgres")
    run = Workflow(job)
    with pytest.raises(LookupError):
        run(LookupError("gone"))
    again = Workflow(job, snapshot=run.snapshot())
    again(None)
    told = [record.getMessage().split(" after ")[0] for record in caplog.records]
    assert told == [
        "job: run_started",
        "job: step_started 'a'",
        "job: step_failed 'a'",
        "job: run_failed: LookupError('gone')",
        "job: run_started",
        "job: step_started 'a'",
        "job: step_completed 'a'",
        "job: run_completed",
    ]
    assert caplog.records[2].getMessage().endswith(" s: LookupError('gone')")
    assert {(r.name, r.levelname) for r in caplog.records} == {("awaitly_postgres", "DEBUG")}


def test_nothing_is_written_that_nobody_reads(caplog: pytest.LogCaptureFixture) -> None:
    """At the default level neither a line nor a text is made."""
    caplog.set_level(logging.INFO, logger="awaitly_postgres")
    run: Any = Workflow(job)
    with pytest.raises(Unprintable):
        run(Unprintable())
    assert caplog.records == []
