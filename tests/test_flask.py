"""The Flask example under a real gunicorn: two workers, prefork, the app loaded before the fork."""

from __future__ import annotations

import importlib
import json
import os
import re
import secrets
import signal
import socket
import subprocess
import sys
import threading
import urllib.error
import urllib.parse
import urllib.request
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from types import ModuleType, SimpleNamespace

import psycopg
import pytest
from psycopg.conninfo import make_conninfo

from awaitly_postgres import SnapshotStore
from awaitly_postgres.testing import crash_everywhere, drain, pass_time
from tests.chromium import chromium
from tests.support import EXAMPLES, eventually

GUNICORN = [sys.executable, "-m", "gunicorn", "--workers", "2", "--preload"]
TEA = {"item": "tea", "quantity": "2"}


def fetch(url: str, form: dict[str, str] | None = None) -> tuple[int, str]:
    """GET, or POST a form; return the status and the body."""
    data = None if form is None else urllib.parse.urlencode(form).encode()
    try:
        with urllib.request.urlopen(url, data, timeout=60) as answer:  # noqa: S310
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()


def flask(url: str, command: str) -> subprocess.CompletedProcess[str]:
    """Run one of the example's commands as cron does."""
    return subprocess.run(
        [sys.executable, "-m", "flask", "--app", str(EXAMPLES / "flask_checkout.py"), command],
        env={**os.environ, "DATABASE_URL": url},
        capture_output=True,
        text=True,
        timeout=60,
    )


@pytest.fixture(scope="module")
def site(server: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[SimpleNamespace]:
    """The example with two workers ready, on a schema of this file's own."""
    schema = f"test_{secrets.token_hex(6)}"
    url = make_conninfo(server, options=f"-c search_path={schema}")
    with psycopg.connect(server, autocommit=True) as admin, socket.socket() as listener:
        admin.execute(f"CREATE SCHEMA {schema}")
        assert flask(url, "init").returncode == 0
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        os.set_inheritable(listener.fileno(), True)
        address = f"http://127.0.0.1:{listener.getsockname()[1]}"
        folder = str(tmp_path_factory.mktemp("gunicorn"))
        process = subprocess.Popen(
            [*GUNICORN, "--bind", f"fd://{listener.fileno()}", "flask_checkout:app"],
            cwd=EXAMPLES,
            env={**os.environ, "DATABASE_URL": url, "XDG_RUNTIME_DIR": folder},
            pass_fds=(listener.fileno(),),
            stderr=subprocess.PIPE,
            text=True,
        )
        log: list[str] = []
        reader = threading.Thread(target=lambda: log.extend(process.stderr))
        reader.start()
        try:
            assert fetch(f"{address}/health")[0] == 200
            yield SimpleNamespace(url=url, address=address, log=log)
        finally:
            process.terminate()
            process.wait(timeout=60)
            reader.join()
            process.stderr.close()
            admin.execute(f"DROP SCHEMA {schema} CASCADE")


@pytest.fixture
def url(site: SimpleNamespace) -> str:
    """The database of the example."""
    return site.url


@pytest.fixture
def shop(site: SimpleNamespace, db: psycopg.Connection) -> Iterator[str]:
    """The address of the example, of which nothing was ordered yet."""
    yield site.address
    tables = "awaitly_snapshots, awaitly_snapshots_steps, awaitly_workflow_lock"
    db.execute(f"TRUNCATE shop_orders, {tables}")
    assert "Traceback" not in "".join(site.log), "".join(site.log)


@pytest.fixture
def example(url: str, shop: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The example in this process, on the same database."""
    monkeypatch.setenv("DATABASE_URL", url)
    monkeypatch.syspath_prepend(str(EXAMPLES))
    module = importlib.import_module("flask_checkout")
    yield module
    module.store.close()
    del sys.modules["flask_checkout"]


@pytest.fixture
def blocker(url: str, shop: str) -> Iterator[psycopg.Connection]:
    """A transaction that keeps every checkout from making its order, until it is rolled back."""
    with psycopg.connect(url) as conn:
        conn.execute("LOCK TABLE shop_orders IN SHARE MODE")
        yield conn


def orders(db: psycopg.Connection) -> int:
    """Count the orders made."""
    return db.execute("SELECT count(*) FROM shop_orders").fetchone()[0]


def wait_for_a_blocked_order(db: psycopg.Connection) -> None:
    """Return when a checkout hangs in making its order."""
    query = (
        "SELECT 1 FROM pg_locks WHERE NOT granted AND relation = 'shop_orders'::regclass "
        "AND mode = 'RowExclusiveLock'"
    )
    eventually(lambda: db.execute(query).fetchone(), "an order that waits")


def test_a_repeated_post_returns_the_same_order(shop: str, db: psycopg.Connection) -> None:
    """The client may try as often as it likes; there is one order."""
    checkout = f"{shop}/checkouts/{uuid.uuid4()}"
    status, first = fetch(checkout, TEA)
    assert (status, json.loads(first)["cents"]) == (200, 900)
    assert [fetch(checkout, TEA) for _ in range(4)] == [(200, first)] * 4
    assert orders(db) == 1


def test_of_two_simultaneous_posts_one_makes_the_order(
    shop: str, db: psycopg.Connection, blocker: psycopg.Connection
) -> None:
    """While the first is at work the second gets 409, and on repeating the order of the first."""
    checkout = f"{shop}/checkouts/{uuid.uuid4()}"
    with ThreadPoolExecutor() as pool:
        first = pool.submit(fetch, checkout, TEA)
        wait_for_a_blocked_order(db)
        assert fetch(checkout, TEA)[0] == 409
        blocker.rollback()
        assert first.result()[0] == 200
    assert fetch(checkout, TEA) == first.result()
    assert orders(db) == 1


def test_a_race_of_two_posts_makes_one_order_each_time(shop: str, db: psycopg.Connection) -> None:
    """However they fall, nobody gets an error, and the answers with an order agree."""
    together = threading.Barrier(2)

    def post(checkout: str) -> tuple[int, str]:
        together.wait()
        return fetch(checkout, TEA)

    with ThreadPoolExecutor(2) as pool:
        for _ in range(10):
            checkout = f"{shop}/checkouts/{uuid.uuid4()}"
            answers = list(pool.map(post, [checkout] * 2))
            assert {status for status, _ in answers} <= {200, 409}
            made = {body for status, body in answers if status == 200}
            assert made == {fetch(checkout, TEA)[1]}
    assert orders(db) == 10


def test_cron_finishes_once_what_a_killed_worker_left(
    url: str, shop: str, db: psycopg.Connection, blocker: psycopg.Connection
) -> None:
    """The card stays charged once, the order is made once, and the next POST returns it."""
    checkout = f"{shop}/checkouts/{uuid.uuid4()}"
    with ThreadPoolExecutor() as pool:
        broken = pool.submit(fetch, checkout, TEA)
        wait_for_a_blocked_order(db)
        ((token,),) = db.execute("SELECT owner_token FROM awaitly_workflow_lock").fetchall()
        os.kill(int(token.split(":")[1]), signal.SIGKILL)
        with pytest.raises(OSError):  # however the connection breaks
            broken.result()
    charged = "SELECT snapshot->'steps'->'charge-card' FROM awaitly_snapshots"
    before = db.execute(charged).fetchone()
    assert before[0]["ok"]
    blocker.rollback()

    assert flask(url, "resume").returncode == 0
    assert orders(db) == 0  # the lease of the dead worker stands
    db.execute("UPDATE awaitly_workflow_lock SET expires_at = clock_timestamp()")
    done = [flask(url, "resume") for _ in range(2)]
    assert [(d.returncode, d.stdout, d.stderr.count("failed")) for d in done] == [(0, "", 0)] * 2
    assert orders(db) == 1
    assert db.execute(charged).fetchone() == before
    status, order = fetch(checkout, TEA)
    assert (status, json.loads(order)["quantity"]) == (200, 2)
    assert orders(db) == 1


def test_an_id_that_stands_for_another_order_is_refused(shop: str, db: psycopg.Connection) -> None:
    """422 and no second order, rather than the wrong one."""
    checkout = f"{shop}/checkouts/{uuid.uuid4()}"
    fetch(checkout, TEA)
    assert fetch(checkout, {**TEA, "quantity": "3"})[0] == 422
    assert orders(db) == 1


def test_a_declined_card_is_final_after_one_try(
    url: str, shop: str, db: psycopg.Connection
) -> None:
    """402 says why, and cron leaves it alone; the customer's own second try is one."""
    checkout = f"{shop}/checkouts/{uuid.uuid4()}"
    for _ in range(2):
        status, body = fetch(checkout, {"item": "teapot", "quantity": "100"})
        assert (status, json.loads(body)["error"]) == (402, "3,900.00 is more than the card allows")
        ((metadata,),) = db.execute("SELECT snapshot->'metadata' FROM awaitly_snapshots").fetchall()
        assert metadata.keys() & {"gaveUpAt", "wakeAt"} == {"gaveUpAt"}
        assert metadata["attempts"] == 1
        done = flask(url, "resume")
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert orders(db) == 0


def test_a_lost_connection_to_the_provider_is_tried_again(
    example: ModuleType, db: psycopg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a pause, by cron; the order is made once."""

    def lose(cents: int, key: str) -> str:
        raise ConnectionError("the provider is away")

    example.durable.submit("checkout:1", example.checkout, "tea", 2)
    with monkeypatch.context() as away:
        away.setattr(example, "charge_card", lose)
        (outcome,) = drain(example.durable)
    assert outcome.retry_at is not None
    pass_time(example.durable, timedelta(seconds=10))
    assert [outcome.status for outcome in drain(example.durable)] == ["completed"]
    assert orders(db) == 1


def test_the_checkout_survives_a_crash_everywhere(
    example: ModuleType, db: psycopg.Connection
) -> None:
    """The card is charged again with the same key, and the order is made once."""
    ran = crash_everywhere(example.checkout, "tea", 2, conn=db)
    assert ran.keys() == {"charge-card", "create-order", "pack[0]", "pack[1]", "send-receipt"}
    assert crash_everywhere(example.checkout, "teapot", 100, conn=db).keys() == {"charge-card"}
    assert orders(db) == 0


def test_a_wrong_form_is_refused(shop: str, store: SnapshotStore) -> None:
    """400, and nothing is stored."""
    for form in ({}, {"item": "gold", "quantity": "1"}, {"item": "tea", "quantity": "many"}):
        assert fetch(f"{shop}/checkouts/{uuid.uuid4()}", form)[0] == 400
    assert store.list() == []


def test_the_status_page_in_a_browser(
    shop: str, db: psycopg.Connection, store: SnapshotStore, tmp_path: Path
) -> None:
    """It shows the order, a bar for each step and its failure, and obeys nothing that is stored."""
    id = uuid.uuid4()
    fetch(f"{shop}/checkouts/{id}", TEA)
    hostile = "<script>document.title = 'owned'</script>"
    stored = store.load(f"checkout:{id}").to_json()
    cause = {"type": "error", "name": hostile, "message": hostile}
    stored["steps"][hostile] = {"ok": False, "error": hostile, "cause": cause}
    store.save(f"checkout:{id}", stored)
    with chromium() as page:
        page.open(f"{shop}/checkouts/{id}")
        page.screenshot(tmp_path / "status.png")
        text = page.evaluate("document.body.innerText")
        assert "2 × tea, 9.00" in text
        assert text.count(hostile) == 4  # its key, and in its error: key, name and message
        assert page.evaluate("document.title") == f"Checkout {id}: completed"
        widths = page.evaluate("[...document.querySelectorAll('i')].map(i => i.offsetWidth)")
        assert len(widths) == 4
        assert min(widths) >= 2
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")


def test_the_status_page_has_a_progress_bar_for_the_map(
    example: ModuleType, shop: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Half way it is half full; when the run has ended, full."""
    gate = threading.Event()

    def pack(number: int, nr: int) -> None:
        assert nr <= 3 or gate.wait(60)

    monkeypatch.setattr(example, "pack", pack)
    id, durable = uuid.uuid4(), example.durable
    durable.submit(f"checkout:{id}", example.checkout, "tea", 6)
    with ThreadPoolExecutor() as pool, chromium() as page:
        worker = pool.submit(drain, durable)
        try:
            run = lambda: durable.get(f"checkout:{id}")  # noqa: E731
            eventually(lambda: run().maps == {"pack": (3, 6)}, "three of six")
            page.open(f"{shop}/checkouts/{id}")
            page.screenshot(tmp_path / "half.png")
            assert page.evaluate("document.querySelector('progress').position") == 0.5
            text = page.evaluate("document.body.innerText")
            assert "3 of 6" in text
            assert "pack[" not in text
        finally:
            gate.set()
        assert [outcome.status for outcome in worker.result()] == ["completed"]
        page.open(f"{shop}/checkouts/{id}")
        page.screenshot(tmp_path / "whole.png")
        assert page.evaluate("document.querySelector('progress').position") == 1
        assert page.evaluate("document.querySelector('meta[http-equiv]')") is None


def test_the_status_page_has_what_was_ordered_and_each_step(shop: str) -> None:
    """In a state, with the time that each took; no longer refreshed when the run has ended."""
    checkout = f"{shop}/checkouts/{uuid.uuid4()}"
    fetch(checkout, TEA)
    status, page = fetch(checkout)
    assert (status, 'class="completed">completed<' in page) == (200, True)
    assert "http-equiv" not in page
    assert "2 × tea" in page
    assert re.findall(r"<td>([a-z-]+)</td>", page) == [
        "charge-card",
        "create-order",
        "send-receipt",
        "pack",
    ]
    assert len(re.findall(r"<td>\d+\.\d\d ms</td>", page)) == 3


def test_the_status_page_of_an_unknown_checkout(shop: str) -> None:
    """404, in words."""
    status, body = fetch(f"{shop}/checkouts/{uuid.uuid4()}")
    assert (status, "Nothing was ordered" in body) == (404, True)


def test_the_health_check_tells_when_the_database_is_away() -> None:
    """503 within seconds, so that a load balancer can turn elsewhere."""
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        away = f"postgresql://127.0.0.1:{unused.getsockname()[1]}/x"
        asked = "import flask_checkout as f; print(f.app.test_client().get('/health').status_code)"
        done = subprocess.run(
            [sys.executable, "-c", asked],
            cwd=EXAMPLES,
            env={**os.environ, "DATABASE_URL": away},
            capture_output=True,
            text=True,
            timeout=60,
        )
    assert done.stdout == "503\n"
