"""The examples, started the way their users start them."""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest

from awaitly_postgres import Durable, SnapshotStore
from awaitly_postgres.testing import crash_everywhere
from tests.support import EXAMPLES, Proxy

RUN = "quickstart:checkout-123"


class Started(subprocess.CompletedProcess[str]):
    """What a script did; ``ran`` and ``replayed`` are the steps it printed as such."""

    @property
    def ran(self) -> list[str]:
        return re.findall(r"^ +ran +([\w-]+)$", self.stdout, re.M)

    @property
    def replayed(self) -> list[str]:
        return re.findall(r"^ +replayed +([\w-]+)$", self.stdout, re.M)


Start = Callable[..., Started]


def start_script(name: str, *arguments: str, **environment: str) -> Started:
    """Start an example as its own process."""
    env = {k: v for k, v in os.environ.items() if k not in ("DATABASE_URL", "XDG_RUNTIME_DIR")}
    done = subprocess.run(
        [sys.executable, "-W", "error", str(EXAMPLES / name), *arguments],
        env={**env, "PYTHONIOENCODING": "utf-8", **environment},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        encoding="utf-8",
        timeout=120,
    )
    return Started(done.args, done.returncode, done.stdout, done.stderr)


@pytest.fixture
def start(url: str) -> Start:
    """Start an example on this test's schema."""
    return lambda name, *arguments: start_script(name, *arguments, DATABASE_URL=url)


@pytest.fixture
def shop(durable: Durable, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The examples' workflows, registered so that a test can submit them."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    workflows = importlib.import_module("workflows")
    workflows.register(durable)
    return workflows


def stored(db: psycopg.Connection) -> tuple[Any, ...]:
    """Return all that the database holds of the quick start."""
    query = "SELECT snapshot, updated_at FROM awaitly_snapshots WHERE id = %s"
    row = db.execute(query, (RUN,)).fetchone()
    assert row is not None
    return row


# -- quickstart.py -------------------------------------------------------------------------


def test_quickstart_tells_the_whole_story_at_its_first_start_and_runs_nothing_at_its_second(
    start: Start, db: psycopg.Connection
) -> None:
    """One process dies after two steps, the next replays these two and runs only the others."""
    first = start("quickstart.py")
    assert (first.returncode, first.stderr) == (0, "")
    assert first.ran == ["reserve-stock", "charge-card", "create-order", "send-receipt"]
    assert first.replayed == ["reserve-stock", "charge-card"]
    died = first.stdout.index("killed")
    assert first.stdout.index("ran       charge-card") < died < first.stdout.index("replayed")
    before = stored(db)
    snapshot, _ = before
    assert snapshot["execution"]["status"] == "completed"
    assert snapshot["metadata"]["attempts"] == 1  # it has got further since

    second = start("quickstart.py")
    assert (second.returncode, second.ran, second.replayed) == (0, [], [])
    assert "'order': 'A-1001'" in second.stdout
    assert (
        second.stdout.split("The database holds")[1] == first.stdout.split("The database holds")[1]
    )
    assert stored(db) == before


def test_quickstart_resumes_what_an_earlier_start_left_half_done_and_begins_anew_when_told_to(
    start: Start, db: psycopg.Connection
) -> None:
    """Two steps are left of a start that dies halfway, and nothing with --fresh."""
    died = start("quickstart.py", "--die")
    assert (died.returncode, died.ran) == (9, ["reserve-stock", "charge-card"])
    half = stored(db)[0]
    assert set(half["steps"]) == {"reserve-stock", "charge-card"}
    second = start("quickstart.py")
    assert second.replayed == ["reserve-stock", "charge-card"]
    assert second.ran == ["create-order", "send-receipt"]
    whole = stored(db)[0]
    assert {key: whole["steps"][key] for key in half["steps"]} == half["steps"]

    again = start("quickstart.py", "--fresh")
    assert again.ran == ["reserve-stock", "charge-card", "create-order", "send-receipt"]


@pytest.fixture
def newcomer() -> Iterator[dict[str, str]]:
    """The environment of a user of a shared machine who has no PostgreSQL."""
    with tempfile.TemporaryDirectory(prefix="awaitly-tests-") as name:
        folder = Path(name)
        folder.chmod(0o755)  # run by root, the server is another user
        temp = folder / "tmp"
        temp.mkdir()
        (temp / ".lockfile").mkdir()  # somebody else's: it cannot be opened
        yield {"AWAITLY_POSTGRES_DATA": str(folder / "pgdata"), "TMPDIR": str(temp)}


def test_quickstart_needs_no_server(newcomer: dict[str, str]) -> None:
    """Without $DATABASE_URL it brings its own server, keeps its data, and stops it again."""
    first = start_script("quickstart.py", **newcomer)
    assert (first.returncode, first.stderr) == (0, "")
    assert first.replayed == ["reserve-stock", "charge-card"]
    assert max(map(len, first.stdout.splitlines())) <= 80
    second = start_script("quickstart.py", **newcomer)
    assert (second.returncode, second.ran) == (0, [])
    data = Path(newcomer["AWAITLY_POSTGRES_DATA"])
    assert (data / "PG_VERSION").exists()
    assert not (data / "postmaster.pid").exists()


# -- resume_cron.py ------------------------------------------------------------------------


def statuses(store: SnapshotStore) -> dict[str, str]:
    """Return the status of everything stored."""
    return {info.id: info.status for info in store.iter()}


def test_resume_cron_is_silent_when_all_goes_well(
    start: Start, durable: Durable, store: SnapshotStore, shop: Any
) -> None:
    """In cron it finishes what was submitted, says nothing and exits with status 0."""
    for i in range(3):
        durable.submit(f"order-{i}", shop.checkout, "ada", 10 + i)
    done = start("resume_cron.py")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert statuses(store) == dict.fromkeys(["order-0", "order-1", "order-2"], "completed")
    assert durable.resume("order-2") == {"user": "ada", "payment": "paid-ada-12"}


def test_resume_cron_is_silent_about_a_connection_that_is_replaced(
    start: Start, durable: Durable, store: SnapshotStore, shop: Any, proxy: Proxy
) -> None:
    """A lost connection that cost nothing is no reason for a mail."""
    durable.submit("order-1", shop.checkout, "ada", 10)
    proxy.lose("reply", 5)
    done = start_script("resume_cron.py", DATABASE_URL=proxy.url)
    assert proxy.has_lost
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert statuses(store) == {"order-1": "completed"}


def test_resume_cron_reports_what_failed(
    start: Start, durable: Durable, store: SnapshotStore, shop: Any
) -> None:
    """A failure is named on stderr and in the exit status, and keeps nothing else from running."""
    durable.submit("order-1", shop.checkout, "bob", 5000)
    durable.submit("order-2", shop.checkout, "ada", 10)
    done = start("resume_cron.py")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == (
        "order-1 failed at attempt 1: CardDeclined: bob may spend 1000, not 5000\n"
    )
    assert statuses(store) == {"order-1": "failed", "order-2": "completed"}


def test_resume_cron_shows_progress_on_a_terminal(
    url: str, durable: Durable, store: SnapshotStore, shop: Any
) -> None:
    """On a terminal it shows the step it is at, each outcome as it comes, and a summary."""
    pty = pytest.importorskip("pty")
    durable.submit("order-1", shop.checkout, "ada", 10)
    durable.submit("order-2", shop.checkout, "bob", 5000)
    ours, theirs = pty.openpty()
    with subprocess.Popen(
        [sys.executable, str(EXAMPLES / "resume_cron.py")],
        env={**os.environ, "DATABASE_URL": url},
        stderr=theirs,
    ) as process:
        os.close(theirs)
        screen = read_all(ours)
    assert process.returncode == 1
    assert "order-1: charge-card ..." in screen
    assert "completed  order-1\r\n" in screen
    assert "failed     order-2\r\n" in screen
    assert screen.endswith("2 resumed, 1 failed\r\n")
    assert statuses(store) == {"order-1": "completed", "order-2": "failed"}


def read_all(terminal: int) -> str:
    """Read what is written to a pseudo-terminal until its other end is closed."""
    parts = []
    try:
        while part := os.read(terminal, 4096):
            parts.append(part)
    except OSError:  # Linux ends a terminal with EIO
        pass
    finally:
        os.close(terminal)
    return b"".join(parts).decode()


def test_resume_cron_takes_only_what_it_is_told_to(
    start: Start, durable: Durable, store: SnapshotStore, shop: Any
) -> None:
    """--prefix and --limit leave the other runs as they were."""
    for id in ("a-1", "b-1", "b-2"):
        durable.submit(id, shop.checkout, "ada", 10)
    assert start("resume_cron.py", "--prefix", "b-", "--limit", "1").returncode == 0
    assert statuses(store) == {"a-1": "running", "b-1": "completed", "b-2": "running"}


def test_resume_cron_says_in_one_line_that_the_database_is_away(
    unused_port: int,
) -> None:
    """Without a database it exits with status 1 and a message instead of a traceback."""
    done = start_script("resume_cron.py", "--url", f"postgresql://127.0.0.1:{unused_port}/x")
    assert done.returncode == 1
    assert "resume_cron: no connection to PostgreSQL: " in done.stderr
    assert "Traceback" not in done.stderr


@pytest.fixture
def unused_port() -> int:
    """A port on which nothing listens."""
    import socket

    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


# -- transactional_step.py -----------------------------------------------------------------


def balances(db: psycopg.Connection) -> dict[str, int]:
    """Return the money by account."""
    return dict(db.execute("SELECT name, balance FROM example_accounts").fetchall())


def test_transactional_step_moves_money_once(start: Start, db: psycopg.Connection) -> None:
    """The transfer is retried after a failure and started twice, and yet moves 30 once."""
    first = start("transactional_step.py")
    assert (first.returncode, first.stderr) == (0, "")
    assert re.findall(r"^(\w+).*ada: +(\d+) +bob: +(\d+)$", first.stdout, re.M) == [
        ("before", "100", "0"),
        ("failed", "70", "30"),
        ("completed", "70", "30"),
    ]
    assert start("transactional_step.py").returncode == 0
    assert balances(db) == {"ada": 70, "bob": 30}


def test_transactional_step_moves_nothing_when_it_fails(
    start: Start, db: psycopg.Connection
) -> None:
    """A step whose second update is refused takes its first one back."""
    start("transactional_step.py", "transfer-1")
    db.execute("UPDATE example_accounts SET balance = 10 WHERE name = 'ada'")
    assert start("transactional_step.py", "transfer-2").returncode == 1
    assert balances(db) == {"ada": 10, "bob": 30}
    db.execute("UPDATE example_accounts SET balance = 40 WHERE name = 'ada'")
    assert start("transactional_step.py", "transfer-2").returncode == 0
    assert balances(db) == {"ada": 10, "bob": 60}


# -- all of their workflows ----------------------------------------------------------------


def test_the_checkout_survives_a_crash_everywhere(shop: Any) -> None:
    """That of the cron job: the card is declined, or it is charged and the order written."""
    for amount in (shop.LIMIT, shop.LIMIT + 1):
        charged = crash_everywhere(shop.checkout, "ada", amount)
        assert ("create-order" in charged) is (amount == shop.LIMIT)


def test_the_quickstart_survives_a_crash_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not only after its second step."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    example = importlib.import_module("quickstart")
    ran = crash_everywhere(example.checkout, "ada")
    assert ran.keys() == {"reserve-stock", "charge-card", "create-order", "send-receipt"}


def test_the_transfer_survives_a_crash_everywhere(
    db: psycopg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the trial has moved is rolled back."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    example = importlib.import_module("transactional_step")
    db.execute(example.ACCOUNTS)
    monkeypatch.setitem(example.mail_server, "up", True)
    assert crash_everywhere(example.transfer, "ada", "bob", 1, conn=db)["move"] > 1
    assert balances(db) == {"ada": 100, "bob": 0}
