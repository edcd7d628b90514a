"""The Django app in its example shop: views, the command, the migration and the admin."""

from __future__ import annotations

import os
import re
import secrets
import signal
import socket
import subprocess
import sys
import threading
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from html import unescape
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psycopg
import pytest
from psycopg.conninfo import make_conninfo

from awaitly_postgres import Durable, SnapshotStore, Step, StoreError
from tests.chromium import chromium
from tests.support import EXAMPLES, eventually

pytest.importorskip("django")

SHOP = EXAMPLES / "django_shop"
PAST = "2026-01-01T00:00:00.000Z"
DECLINED = "purchase_2Fdeclined%20_26%20odd"  # as the admin writes "purchase/declined & odd"


def manage(url: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the shop's manage.py."""
    return subprocess.run(
        [sys.executable, str(SHOP / "manage.py"), *arguments],
        env={**os.environ, "DATABASE_URL": url, **environment},
        capture_output=True,
        text=True,
        timeout=60,
    )


@pytest.fixture(scope="module", autouse=True)
def _django_supports_the_server(server: str) -> None:
    """Skip where Django itself refuses to: 5.2 wants PostgreSQL 14, 4.2 wants 12."""
    import django
    from django.db.backends.postgresql.features import DatabaseFeatures

    wanted = DatabaseFeatures.minimum_database_version[0]
    with psycopg.connect(server) as conn:
        found = conn.info.server_version // 10_000
    if found < wanted:
        pytest.skip(f"Django {django.__version__} wants PostgreSQL {wanted}, this is {found}")


@pytest.fixture(scope="module")
def site(server: str) -> Iterator[SimpleNamespace]:
    """The shop's project in this process, migrated into a schema of this file's own."""
    schema = f"test_{secrets.token_hex(6)}"
    level = r"-c default_transaction_isolation=read\ committed"  # its views are made for this one
    url = make_conninfo(server, options=f"-c search_path={schema} {level}")
    with psycopg.connect(server, autocommit=True) as admin, pytest.MonkeyPatch.context() as patch:
        admin.execute(f"CREATE SCHEMA {schema}")
        patch.setenv("DATABASE_URL", url)
        patch.setenv("DJANGO_SETTINGS_MODULE", "shop.settings")
        patch.syspath_prepend(str(SHOP))
        import django
        from django.core.management import call_command
        from django.db import connections

        django.setup()
        call_command("migrate", verbosity=0)
        from shop import models, workflows

        yield SimpleNamespace(url=url, models=models, workflows=workflows, tables=[])
        workflows.durable.store.close()
        connections.close_all()
        admin.execute(f"DROP SCHEMA {schema} CASCADE")


@pytest.fixture
def shop(site: SimpleNamespace) -> Iterator[SimpleNamespace]:
    """The shop with ten packets of tea and nothing ordered."""
    from django.db import connections

    tea = site.models.Product.objects.create(name="Tea", cents=450, stock=10)
    with psycopg.connect(site.url, autocommit=True) as db:
        yield SimpleNamespace(**vars(site), tea=tea, db=db)
        tables = "shop_order, shop_product, awaitly_snapshots, awaitly_snapshots_steps"
        db.execute(f"TRUNCATE {tables}, awaitly_workflow_lock, auth_user CASCADE")
    connections["default"].close()


@pytest.fixture
def admin(shop: SimpleNamespace) -> Any:
    """A test client that an administrator has logged in with."""
    from django.contrib.auth import get_user_model
    from django.test import Client

    client = Client()
    client.force_login(get_user_model().objects.create_superuser("admin"))
    return client


def order(shop: SimpleNamespace, quantity: int = 1, id: uuid.UUID | None = None) -> str:
    """Buy tea as a browser does; return the order's id."""
    from django.test import Client

    id = id or uuid.uuid4()
    form = {"product": shop.tea.pk, "quantity": quantity}
    assert Client().post(f"/orders/{id}", form).status_code == 302
    return str(id)


def stock(shop: SimpleNamespace) -> int:
    """How much tea is left."""
    return shop.db.execute("SELECT stock FROM shop_product").fetchone()[0]


def payments(shop: SimpleNamespace) -> list[str]:
    """What is noted on the orders."""
    return [payment for (payment,) in shop.db.execute("SELECT payment FROM shop_order")]


def resume(shop: SimpleNamespace) -> subprocess.CompletedProcess[str]:
    """Do what cron does."""
    return manage(shop.url, "resume_workflows")


# -- accepted in a view, finished by the command -------------------------------------------


def test_a_view_accepts_and_the_command_finishes(shop: SimpleNamespace) -> None:
    """The order is there at once; its stock and payment after the command, which says nothing."""
    from django.test import Client

    id = order(shop, 3)
    assert (stock(shop), payments(shop)) == (10, [""])
    assert "We are working on it: pending." in Client().get(f"/orders/{id}").content.decode()
    done = resume(shop)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert (stock(shop), payments(shop)) == (7, [f"paid 13.50 for checkout-{id}/charge-card"])
    assert resume(shop).returncode == 0
    assert stock(shop) == 7


def test_simultaneous_posts_with_one_id_make_one_order(shop: SimpleNamespace) -> None:
    """Both are answered with the same page, and the stock goes down once."""
    from django.db import connections

    together = threading.Barrier(2)

    def post(id: uuid.UUID) -> None:
        together.wait()
        order(shop, id=id)
        connections.close_all()  # those of this thread

    ids = [uuid.uuid4() for _ in range(5)]
    with ThreadPoolExecutor(2) as pool:
        for id in ids:
            list(pool.map(post, [id] * 2))
    assert len(payments(shop)) == 5
    assert resume(shop).returncode == 0
    assert stock(shop) == 5


def test_a_view_that_raises_under_atomic_requests_leaves_nothing_behind(
    shop: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it has submitted is rolled back with the rest of its request."""
    from django.db import connections
    from django.http import HttpRequest, HttpResponse
    from django.test import Client, override_settings
    from django.urls import path

    from awaitly_postgres.contrib.django import connection

    durable, checkout = shop.workflows.durable, shop.workflows.checkout

    def view(request: HttpRequest, fail: int) -> HttpResponse:
        id = f"request-{fail}"
        assert durable.submit(id, durable.workflow(checkout), "1", conn=connection())
        assert durable.store.load(id, conn=connection()) is not None
        if fail:
            raise ZeroDivisionError
        return HttpResponse()

    class Urls:
        urlpatterns = (path("<int:fail>", view),)

    monkeypatch.setitem(connections.settings["default"], "ATOMIC_REQUESTS", True)
    client = Client(raise_request_exception=False)
    with override_settings(ROOT_URLCONF=Urls):
        assert [client.get(f"/{fail}").status_code for fail in (1, 0)] == [500, 200]
    assert shop.db.execute("SELECT id FROM awaitly_snapshots").fetchall() == [("request-0",)]


def test_an_order_that_does_not_commit_leaves_no_promise_behind(shop: SimpleNamespace) -> None:
    """The view submits in the transaction of the order, so a commit that is refused takes both."""
    from django.test import Client

    shop.db.execute(
        "CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS "
        "$$BEGIN RAISE EXCEPTION 'refused'; END$$"
    )
    shop.db.execute(
        "CREATE CONSTRAINT TRIGGER refuse AFTER INSERT ON shop_order "
        "DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION refuse()"
    )
    try:
        client = Client(raise_request_exception=False)
        answer = client.post(f"/orders/{uuid.uuid4()}", {"product": shop.tea.pk})
    finally:
        shop.db.execute("DROP FUNCTION refuse CASCADE")
    assert answer.status_code == 500
    assert payments(shop) == []
    assert shop.db.execute("SELECT * FROM awaitly_snapshots").fetchall() == []


def test_a_killed_command_is_finished_once_by_the_next(shop: SimpleNamespace) -> None:
    """SIGKILL in the middle of a transaction over the ORM takes the stock neither 0 nor 2 times."""
    id = order(shop, 2)
    with psycopg.connect(shop.url) as blocker:
        blocker.execute("SELECT FROM shop_product FOR UPDATE")
        command = subprocess.Popen(
            [sys.executable, str(SHOP / "manage.py"), "resume_workflows"],
            env={**os.environ, "DATABASE_URL": shop.url},
        )
        waiting = (
            "SELECT 1 FROM pg_stat_activity WHERE %s = ANY(pg_blocking_pids(pid)) "
            "AND query LIKE 'UPDATE%%shop_product%%'"
        )
        blocked_by = (blocker.info.backend_pid,)
        eventually(lambda: shop.db.execute(waiting, blocked_by).fetchone(), "an update that waits")
        command.send_signal(signal.SIGKILL)
        command.wait(timeout=60)
    assert resume(shop).returncode == 0
    assert stock(shop) == 10  # the lease of the dead process stands
    shop.db.execute("UPDATE awaitly_workflow_lock SET expires_at = clock_timestamp()")
    assert [resume(shop).returncode for _ in range(2)] == [0, 0]
    assert (stock(shop), payments(shop)) == (8, [f"paid 9.00 for checkout-{id}/charge-card"])


def test_a_failure_over_the_orm_is_rolled_back_and_reported(shop: SimpleNamespace) -> None:
    """Too little stock: exit status 1 and a line on stderr; after a delivery it goes through."""
    id = order(shop, 11)
    done = resume(shop)
    assert (done.returncode, done.stdout) == (1, "")
    assert f"failed     checkout-{id} (attempt 1): IntegrityError: " in done.stderr
    assert "CommandError: 1 of 1 workflows failed" in done.stderr
    assert (stock(shop), payments(shop)) == (10, [""])
    shop.db.execute("UPDATE shop_product SET stock = 20")
    snapshot = "jsonb_set(snapshot, '{metadata,wakeAt}', to_jsonb(%s::text))"
    shop.db.execute(f"UPDATE awaitly_snapshots SET snapshot = {snapshot}", (PAST,))
    assert resume(shop).returncode == 0
    assert stock(shop) == 9


# -- the command ---------------------------------------------------------------------------


def test_the_command_shows_progress_on_a_terminal(shop: SimpleNamespace) -> None:
    """A line for each workflow as it ends, and a summary."""
    pty = pytest.importorskip("pty")
    id = order(shop)
    ours, theirs = pty.openpty()
    with subprocess.Popen(
        [sys.executable, str(SHOP / "manage.py"), "resume_workflows", "shop.workflows.durable"],
        env={**os.environ, "DATABASE_URL": shop.url, "NO_COLOR": "1"},
        stdout=theirs,
    ) as process:
        os.close(theirs)
        screen = b""
        try:
            while part := os.read(ours, 4096):
                screen += part
        except OSError:  # Linux ends a terminal with EIO
            pass
        finally:
            os.close(ours)
    assert process.returncode == 0
    plain = re.sub(r"\x1b\[[\d;]*m", "", screen.decode())
    assert plain == f"completed  checkout-{id}\r\n1 taken up, 0 failed\r\n"


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("shop.nowhere.durable", "No module named 'shop.nowhere'"),
        ("shop.workflows.checkout", "shop.workflows.checkout is function, not a Durable"),
    ],
)
def test_the_command_refuses_what_is_no_durable(
    site: SimpleNamespace, path: str, message: str
) -> None:
    """In words, with exit status 1 and without a traceback."""
    done = manage(site.url, "resume_workflows", path)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.strip() == f"CommandError: {message}"


# -- the store and the transactions --------------------------------------------------------


def test_a_step_over_the_orm_commits_with_its_record_or_not_at_all(shop: SimpleNamespace) -> None:
    """A commit that the server refuses leaves neither, and is the step's failure."""
    from django.db import IntegrityError

    Order = shop.models.Order  # noqa: N806 - a class
    durable = Durable(shop.workflows.durable.store, transaction=shop.workflows.atomic)

    def insert(conn: psycopg.Connection, product: int) -> str:
        return str(Order.objects.create(id=uuid.uuid4(), product_id=product, quantity=1).pk)

    def work(step: Step, product: int) -> str:
        return step.transaction("insert", insert, product)

    assert durable.run("good", work, shop.tea.pk) == str(Order.objects.get().pk)
    with pytest.raises(IntegrityError):  # Django's foreign keys are checked at the commit
        durable.run("bad", work, 0)
    assert len(payments(shop)) == 1
    assert durable.store.load("bad").steps["insert"].error == "IntegrityError"


def test_a_transaction_step_is_refused_inside_an_atomic_block(shop: SimpleNamespace) -> None:
    """It could not commit there, and its own checkpoint would wait for it for ever."""
    from django.db import transaction

    durable, checkout = shop.workflows.durable, shop.workflows.checkout
    id = order(shop)
    with (
        transaction.atomic(),
        pytest.raises(RuntimeError, match="cannot run inside"),
    ):
        durable.run("inside", checkout, id)
    assert stock(shop) == 10


@pytest.mark.parametrize("call", ["run", "resume"])
def test_a_run_is_refused_inside_an_atomic_block(shop: SimpleNamespace, call: str) -> None:
    """Its ordinary steps would stay recorded when what they wrote is rolled back."""
    from django.db import transaction

    durable, Order = Durable(shop.workflows.durable.store), shop.models.Order  # noqa: N806

    def insert() -> str:
        return str(Order.objects.create(id=uuid.uuid4(), product=shop.tea, quantity=1).pk)

    @durable.workflow
    def work(step: Step) -> str:
        return step("insert", insert)

    durable.submit("a", work)
    with transaction.atomic(), pytest.raises(RuntimeError, match="submit"):
        durable.run("a", work) if call == "run" else durable.resume("a")
    assert dict(durable.store.load("a").steps) == {}
    assert durable.run("a", work) == str(Order.objects.get().pk)


@pytest.mark.parametrize("caught", [False, True])
def test_a_transaction_that_the_step_marked_for_rollback_is_a_failure(
    shop: SimpleNamespace, caught: bool
) -> None:
    """``set_rollback(True)``: nothing is in the table, so nothing is recorded as done."""
    from django.db import transaction

    Order = shop.models.Order  # noqa: N806 - a class
    durable = Durable(shop.workflows.durable.store, transaction=shop.workflows.atomic)

    def insert(conn: psycopg.Connection) -> str:
        Order.objects.create(id=uuid.uuid4(), product=shop.tea, quantity=1)
        transaction.set_rollback(True)
        return "paid"

    def work(step: Step) -> str:
        try:
            return step.transaction("insert", insert)
        except RuntimeError:
            if caught:
                return step("instead", str)
            raise

    if caught:
        assert durable.run("a", work) == ""
    else:
        with pytest.raises(RuntimeError, match="set_rollback"):
            durable.run("a", work)
    assert not Order.objects.exists()
    assert durable.store.load("a").steps["insert"].ok is False


def test_a_commit_that_the_server_refuses_can_be_caught(shop: SimpleNamespace) -> None:
    """As Django's own ``IntegrityError``; it has its pause, and no pass repeats it at once."""
    from django.db import IntegrityError

    Order = shop.models.Order  # noqa: N806 - a class
    durable = Durable(shop.workflows.durable.store, transaction=shop.workflows.atomic)
    ran: list[int] = []

    def insert(conn: psycopg.Connection, product: int) -> str:
        ran.append(product)
        return str(Order.objects.create(id=uuid.uuid4(), product_id=product, quantity=1).pk)

    @durable.workflow
    def work(step: Step, catch: bool) -> str:
        try:
            return step.transaction("insert", insert, 0)
        except IntegrityError:
            if catch:
                return step("instead", str)
            raise

    assert durable.run("caught", work, True) == ""
    durable.submit("raised", work, False)
    assert [outcome.status for outcome in durable.resume_pending()] == ["failed"]
    assert durable.resume_pending() == []
    assert ran == [0, 0]


def alias(monkeypatch: pytest.MonkeyPatch, name: str, **changes: Any) -> None:
    """Add another entry to ``DATABASES``, like the default one but for some changes."""
    from django.db import connections

    default = connections.settings["default"]
    options = {**default["OPTIONS"], **changes.pop("OPTIONS", {})}
    monkeypatch.setitem(connections.settings, name, {**default, **changes, "OPTIONS": options})


def test_the_store_reads_the_settings_when_it_is_first_used(
    site: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A test runner gives the database another name after the modules are imported."""
    from awaitly_postgres.contrib.django import store

    alias(monkeypatch, "renamed", NAME="there_is_no_such_database", PASSWORD="s3cret")  # noqa: S106
    with store("renamed", retry_for=0) as early, store("renamed", retry_for=0) as late:
        with pytest.raises(StoreError) as caught:
            early.ping()
        assert "s3cret" not in f"{caught.value}{early!r}{early._db!r}"
        from django.db import connections

        for setting in ("NAME", "PASSWORD"):
            right = connections.settings["default"][setting]
            monkeypatch.setitem(connections.settings["renamed"], setting, right)
        assert late.ping()
        assert late.list() == []
    connections["renamed"].close()


def test_the_store_takes_on_the_role_that_django_assumes(
    site: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """OPTIONS["assume_role"] is the role that owns what a migration makes."""
    from awaitly_postgres.contrib.django import store

    alias(monkeypatch, "other", OPTIONS={"assume_role": "pg_monitor"})
    with store("other") as made:
        assert made._db.rows(b"SELECT current_user::text", {}) == [("pg_monitor",)]


def test_the_store_uses_djangos_own_pool(
    shop: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With OPTIONS["pool"] it opens none of its own, and survives that Django makes a new one."""
    from django import VERSION
    from django.db import connections

    from awaitly_postgres.contrib.django import atomic, store

    if VERSION < (5, 1):
        pytest.skip("Django has no pool before 5.1")
    alias(monkeypatch, "pooled", OPTIONS={"pool": {"min_size": 1, "max_size": 2}})
    wrapper = connections["pooled"]
    with store("pooled") as made:
        durable = Durable(made, transaction=lambda: atomic("pooled"))

        def work(step: Step) -> int:
            first = step("one", lambda: 1)
            select = "SELECT %s::int AS two"
            return step.transaction("two", lambda c: c.execute(select, (first + 1,)).fetchone()[0])

        assert durable.run("a", work) == 2
        before = wrapper.pool.get_stats()["requests_num"]
        made.ping()
        assert wrapper.pool.get_stats()["requests_num"] == before + 1
        wrapper.close()
        wrapper.close_pool()  # as Django's test runner does
        assert durable.run("b", work) == 2
        wrapper.close()
    assert not wrapper.pool.closed  # it is not ours to close
    wrapper.close_pool()


# -- the migration -------------------------------------------------------------------------


def tables(db: psycopg.Connection) -> set[str]:
    """Return the store's tables that are there."""
    found = db.execute(
        "SELECT tablename FROM pg_tables WHERE schemaname = current_schema() "
        "AND tablename LIKE 'awaitly%'"
    )
    return {name for (name,) in found}


def test_the_migration_makes_the_tables_and_takes_them_away(
    url: str, db: psycopg.Connection
) -> None:
    """Forward and back; ``sqlmigrate`` prints what it would do."""
    three = {"awaitly_snapshots", "awaitly_snapshots_steps", "awaitly_workflow_lock"}
    assert "CREATE TABLE IF NOT EXISTS" in manage(url, "sqlmigrate", "awaitly", "0001").stdout
    assert tables(db) == set()
    assert manage(url, "migrate", "awaitly").returncode == 0
    assert tables(db) == three
    assert manage(url, "migrate", "awaitly", "zero").returncode == 0
    assert tables(db) == set()


def test_the_migration_leaves_tables_that_are_there_as_they_are(
    url: str, store: SnapshotStore
) -> None:
    """A project that used the store before keeps its workflows."""
    Durable(store).run("before", lambda step: 1)
    assert manage(url, "migrate", "awaitly").returncode == 0
    assert [info.id for info in store.list()] == ["before"]


def test_no_model_has_changed_without_a_migration(site: SimpleNamespace) -> None:
    """Neither the app's nor the shop's."""
    done = manage(site.url, "makemigrations", "--check", "--dry-run")
    assert (done.returncode, done.stdout) == (0, "No changes detected\n")


# -- the admin -----------------------------------------------------------------------------


def a_bit_of_everything(shop: SimpleNamespace) -> None:
    """Store a workflow in each state, and rows that others have made or broken."""
    durable = Durable(shop.workflows.durable.store, metadata={"tenant": "acme"})

    def purchase(step: Step, item: str, quantity: int = 1) -> dict[str, Any]:
        step("reserve-stock", gate(0.02), item)
        step("charge-card", gate(0.09), quantity)
        step("send-receipt", gate(0.03), "<script>document.title = 'owned'</script>")
        return {"item": item, "quantity": quantity, "receipt": "sent"}

    def gate(seconds: float) -> Callable[[object], object]:
        def body(value: object) -> object:
            shop.db.execute("SELECT pg_sleep(%s)", (seconds,))
            return value

        return body

    def decline(step: Step) -> None:
        step("reserve-stock", gate(0.05), "teapot")
        try:
            step("check-limit", lambda: {}["limit"])
        except KeyError:
            step("charge-card", charge)

    def charge() -> None:
        try:
            raise ConnectionError("the bank hung up")
        except ConnectionError as error:
            raise ValueError("card declined") from error

    durable.run("purchase-1", purchase, "tea", quantity=2)
    with pytest.raises(ValueError, match="card declined"):
        durable.run("purchase/declined & odd", decline)
    durable.submit("purchase-submitted", durable.workflow(purchase), "cosy")
    with pytest.raises(Exception, match="suspended"):
        durable.run("purchase-suspended", lambda step: step.wait("approval"))
    durable.submit("purchase-cancelled", durable.workflow(purchase), "tea")
    durable.cancel("purchase-cancelled")
    gave_up = {"workflow": "purchase", "gaveUpAt": PAST, "attempts": 8}
    execution = {"status": "failed", "lastUpdated": PAST}
    given_up = {"formatVersion": 1, "steps": {}, "execution": execution, "metadata": gave_up}
    durable.store.save("purchase-given-up", given_up)
    durable.store.try_acquire("purchase-running", ttl=600)
    durable.submit("purchase-running", durable.workflow(purchase), "tea")
    resume_state = '{"kind": "ResumeState", "steps": [["a", {"ok": true, "value": 1}]]}'
    for id, snapshot in (("node", resume_state), ("broken", '{"metadata": [1]}'), ("null", "null")):
        shop.db.execute("INSERT INTO awaitly_snapshots VALUES (%s, %s)", (id, snapshot))


def listed(admin: Any, query: str = "") -> dict[str, list[str]]:
    """Return what the list tells of each workflow: its name, steps, age, state and lease."""
    html = admin.get(f"/admin/awaitly/workflow/?{query}").content.decode()
    rows = re.findall(r"<tr><th.*?</tr>", html, re.S)
    texts = [re.findall(r">([^<>]+)</(?:a|span|small|td)>", row) for row in rows]
    return {unescape(id): rest for id, *rest in texts}


def test_the_list_tells_where_each_workflow_stands(shop: SimpleNamespace, admin: Any) -> None:
    """State, steps, and what comes next; whatever else is in the table does not break the page."""
    a_bit_of_everything(shop)
    page = listed(admin)
    assert {id: (texts[3], texts[1]) for id, texts in page.items()} == {
        "purchase-1": ("completed", "3"),
        "purchase/declined & odd": ("retrying", "3"),
        "purchase-submitted": ("pending", "0"),
        "purchase-suspended": ("waiting", "0"),
        "purchase-cancelled": ("cancelled", "0"),
        "purchase-given-up": ("failed", "0"),
        "purchase-running": ("running", "0"),
        "node": ("pending", "1"),
        "broken": ("pending", "0"),
        "null": ("pending", "0"),
    }
    assert page["purchase-running"][4] == f"held by {socket.gethostname()}:{os.getpid()}"
    assert page["purchase-submitted"][4] == "due"
    assert page["purchase-suspended"][4] == "waits for approval"
    assert [len(page[id]) for id in ("purchase-1", "purchase-given-up", "node")] == [4, 4, 4]


def test_the_list_is_filtered_and_searched(shop: SimpleNamespace, admin: Any) -> None:
    """By state and by a part of the id."""
    a_bit_of_everything(shop)
    for query, ids in (
        ("state=pending", {"purchase-submitted", "node", "broken", "null"}),
        ("state=running", {"purchase-running"}),
        ("state=waiting", {"purchase-suspended"}),
        ("state=retrying", {"purchase/declined & odd"}),
        ("state=completed", {"purchase-1"}),
        ("state=failed", {"purchase-given-up"}),
        ("state=cancelled", {"purchase-cancelled"}),
        ("q=declined", {"purchase/declined & odd"}),
        ("q=SUB&state=pending", {"purchase-submitted"}),
    ):
        assert set(listed(admin, query)) == ids, query


def test_the_list_leaves_the_snapshots_in_the_database(shop: SimpleNamespace, admin: Any) -> None:
    """A page of workflows of megabytes each is as small as any other."""
    from django.db import connection
    from django.test.utils import CaptureQueriesContext

    a_bit_of_everything(shop)
    with CaptureQueriesContext(connection) as queries:
        admin.get("/admin/awaitly/workflow/?state=pending&q=purchase")
    ours = [q["sql"] for q in queries if 'FROM "awaitly_snapshots"' in q["sql"]]
    assert ours
    assert not [sql for sql in ours if '"awaitly_snapshots"."snapshot"' in sql]


def test_one_workflow_is_shown_with_all_that_is_stored(shop: SimpleNamespace, admin: Any) -> None:
    """Metadata, input, result, steps, and a failure with its cause and traceback; escaped."""
    a_bit_of_everything(shop)
    bought = admin.get("/admin/awaitly/workflow/purchase-1/change/").content.decode()
    for text in (
        "&quot;tenant&quot;: &quot;acme&quot;",
        "&quot;quantity&quot;: 2",
        "&quot;receipt&quot;: &quot;sent&quot;",
        "charge-card",
    ):
        assert text in bought
    assert "&lt;script&gt;document.title" in bought
    assert "<script>document.title" not in bought
    assert bought.count("<rect ") == 3
    declined = admin.get(f"/admin/awaitly/workflow/{DECLINED}/change/")
    told = declined.content.decode()
    assert "ValueError: card declined" in told
    assert "caused by ConnectionError: the bank hung up" in told
    assert "KeyError: &#x27;limit&#x27;" in told
    assert "raise ConnectionError(&quot;the bank hung up&quot;)" in told
    assert "ValueError: card declined\n</pre>" in told
    broken = admin.get("/admin/awaitly/workflow/broken/change/").content.decode()
    assert "Not a valid snapshot: formatVersion is missing" in broken
    gone = admin.get("/admin/awaitly/workflow/no-such/change/")
    assert gone.status_code == 404


def test_of_a_long_run_the_telling_steps_are_shown(shop: SimpleNamespace, admin: Any) -> None:
    """Of 3,000 steps those at both ends and the failed one, with how many are left out between."""
    steps: dict[str, Any] = {f"step-{i:04}": {"ok": True, "value": i} for i in range(3000)}
    steps["step-1500"] = {"ok": False, "error": "NOT_FOUND", "cause": None}
    execution = {"status": "running", "lastUpdated": "2026-01-01T00:00:00.000Z"}
    document = {"formatVersion": 1, "steps": steps, "execution": execution}
    shop.workflows.durable.store.save("long", document)
    html = admin.get("/admin/awaitly/workflow/long/change/").content.decode()
    shown = set(re.findall(r'class="key" title="(.*?)"', html))
    assert {"step-0000", "step-1500", "step-2999"} <= shown
    assert len(shown) < 60
    hidden = [int(n) for n in re.findall(r">(\d+) more<", html)]
    assert sum(hidden) + len(shown) == 3000
    assert "<p>&quot;NOT_FOUND&quot;</p>" in html


def test_an_id_that_is_none_here_has_a_page_all_the_same(shop: SimpleNamespace, admin: Any) -> None:
    """Others may store ids that are too long for us; a NUL is in none."""
    shop.db.execute("INSERT INTO awaitly_snapshots VALUES (%s, 'null')", ("x" * 1200,))
    page = admin.get(f"/admin/awaitly/workflow/{'x' * 1200}/change/")
    assert page.status_code == 200
    assert "the limit is 1,000" in page.content.decode()
    assert admin.get("/admin/awaitly/workflow/a_00b/change/").status_code == 404


def test_the_admin_changes_nothing_and_shows_nothing_to_strangers(
    shop: SimpleNamespace, admin: Any
) -> None:
    """No adding, changing or deleting, even for a superuser; staff need the view permission."""
    from django.contrib.auth import get_user_model
    from django.contrib.auth.models import Permission
    from django.test import Client

    a_bit_of_everything(shop)
    list_, one = "/admin/awaitly/workflow/", "/admin/awaitly/workflow/purchase-1/change/"
    before = shop.db.execute("SELECT * FROM awaitly_snapshots ORDER BY id").fetchall()
    assert admin.get(f"{list_}add/").status_code == 403
    assert (
        admin.post("/admin/awaitly/workflow/purchase-1/delete/", {"post": "yes"}).status_code == 403
    )
    admin.post(one, {"snapshot": "{}"})
    admin.post(
        list_, {"action": "delete_selected", "_selected_action": "purchase-1", "post": "yes"}
    )
    assert shop.db.execute("SELECT * FROM awaitly_snapshots ORDER BY id").fetchall() == before

    staff = Client()
    assert [staff.get(page).status_code for page in (list_, one)] == [302, 302]
    user = get_user_model().objects.create_user("staff", is_staff=True)
    staff.force_login(user)
    assert [staff.get(page).status_code for page in (list_, one)] == [403, 403]
    user.user_permissions.add(Permission.objects.get(codename="view_workflow"))
    assert [staff.get(page).status_code for page in (list_, one)] == [200, 200]


@pytest.fixture
def address(shop: SimpleNamespace) -> Iterator[str]:
    """Where ``manage.py runserver`` answers."""
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        host = f"127.0.0.1:{unused.getsockname()[1]}"
    server = subprocess.Popen(
        [sys.executable, str(SHOP / "manage.py"), "runserver", "--noreload", host],
        env={**os.environ, "DATABASE_URL": shop.url},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )

    def answers() -> bool:
        try:
            with urllib.request.urlopen(f"http://{host}/", timeout=5) as answer:
                return answer.status == 200
        except OSError:
            return False

    try:
        eventually(answers, "the shop's home page")
        yield f"http://{host}"
    finally:
        server.terminate()
        server.wait(timeout=60)


def test_the_pages_in_a_browser(
    shop: SimpleNamespace, admin: Any, address: str, tmp_path: Path
) -> None:
    """The list and the timeline fit the window, with their styles, and obey nothing stored."""
    a_bit_of_everything(shop)
    session = {"sessionid": admin.cookies["sessionid"].value}
    fits = "document.documentElement.scrollWidth <= innerWidth"
    with chromium() as page:
        page.open(f"{address}/admin/awaitly/workflow/", **session)
        page.screenshot(tmp_path / "list.png")
        assert page.evaluate("document.querySelectorAll('#result_list tbody tr').length") == 10
        assert page.evaluate(fits)
        table = "document.querySelector('.results')"
        assert page.evaluate(f"{table}.scrollWidth <= {table}.clientWidth")
        colour = "getComputedStyle(document.querySelector('.awaitly-state.{}')).backgroundColor"
        assert page.evaluate(colour.format("completed")) == "rgb(38, 112, 74)"

        page.open(f"{address}/admin/awaitly/workflow/purchase-1/change/")
        page.screenshot(tmp_path / "timeline.png")
        assert "owned" not in page.evaluate("document.title")
        boxes = "[...document.querySelectorAll('rect')].map(r => r.getBoundingClientRect())"
        lefts = page.evaluate(f"{boxes}.map(box => box.left)")
        widths = page.evaluate(f"{boxes}.map(box => box.width)")
        assert lefts == sorted(lefts)
        assert widths[1] == max(widths)
        assert min(widths) > 2
        assert page.evaluate(fits)

        page.open(f"{address}/admin/awaitly/workflow/{DECLINED}/change/")
        page.screenshot(tmp_path / "failed.png")
        assert page.evaluate("document.querySelectorAll('details.failed[open]').length") == 2
        page.open(address)
        page.screenshot(tmp_path / "shop.png")
        assert "10 left" in page.evaluate("document.body.innerText")
