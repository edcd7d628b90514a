"""Nothing is lost, doubled or left over, whatever is done to eight workers.

Each fault is made in processes of its own: ``python -m tests.faults``.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.faults.cluster import Cluster

ROOT = Path(__file__).parents[2]
NOUGHT = ("lost", "doubled", "unfinished", "overlaps", "leftovers", "broke")
FAULTS = [
    "kill",
    "boundary",
    "zombie",
    "fork",
    "interrupt",
    "threads",
    "poison",
    "clock",
    "terminate",
    "immediate restart",
    "fast restart",
    "connections",
    "full disk",
    "idle session",
    "network cut",
    "network delay",
    "network drop",
    "network reply",
    "slow backend",
    "failover",
    "mixed",
]


@pytest.fixture(scope="module")
def place(pytestconfig: pytest.Config) -> Iterator[str]:
    """The URL of a server for those faults that need none of their own."""
    if given := pytestconfig.getoption("--postgres-url"):
        yield given
        return
    cluster = Cluster(pytestconfig.getoption("--postgres-bin", default=None))
    cluster.init()
    cluster.start()
    yield cluster.url
    cluster.remove()


def play(config: pytest.Config, place: str, fault: str, *options: str) -> dict[str, Any]:
    """Make one fault and return its line of the report; print it for ``pytest -rA``."""
    command = [sys.executable, "-m", "tests.faults", "--json", "--seed", "20261122", *options]
    for option, value in (
        ("--postgres-url", place),
        ("--bin", config.getoption("--postgres-bin", default=None)),
        ("--long", config.getoption("--long", default=False)),
    ):
        if value:
            command += [option] if value is True else [option, value]
    with subprocess.Popen(
        [*command, fault], cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        try:
            out, err = process.communicate()
        finally:
            process.terminate()  # it takes its servers and workers with it
    assert out, err
    row = json.loads(out)
    print(row)
    if row["not_made"]:
        pytest.skip(row["not_made"])
    return row


@pytest.mark.parametrize("fault", FAULTS)
def test_nothing_is_lost_or_doubled_and_all_ends_without_help(
    pytestconfig: pytest.Config, place: str, fault: str
) -> None:
    """What was acknowledged is stored and equal, and each effect is there once."""
    row = play(pytestconfig, place, fault)
    assert {name: row[name] for name in NOUGHT} == dict.fromkeys(NOUGHT, 0), row["remarks"]
    assert row["injections"] > 0
    assert row["acknowledged"] > row["workflows"] > 0


def test_memory_threads_and_connections_do_not_grow(
    pytestconfig: pytest.Config, place: str
) -> None:
    """Workflow after workflow in one process, from eight threads."""
    row = play(pytestconfig, place, "soak")
    assert {name: row[name] for name in NOUGHT} == dict.fromkeys(NOUGHT, 0), row["remarks"]
