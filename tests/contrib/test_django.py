"""The Django app in its example shop: views, the command, the store and the migrations."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import threading
import uuid
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, suppress
from types import SimpleNamespace

import psycopg
import pytest

from awaitly_postgres import Durable, SchemaMissing, SnapshotStore, Step, StoreError, postgres
from tests.contrib.project import PAST, SHOP, alias, manage, order, payments, resume, stock
from tests.support import Proxy, eventually

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
    assert f"failed     checkout-{id} (attempt 1, again in 1.0 s): IntegrityError: " in done.stderr
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
    assert plain == f"completed  checkout-{id}\r\n1 resumed, 0 failed\r\n"


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


def test_the_command_takes_ids(shop: SimpleNamespace) -> None:
    """After the Durable or without it, dots and all; also of runs that were given up."""
    durable, checkout = shop.workflows.durable, shop.workflows.checkout
    ids = [order(shop), order(shop), order(shop)]
    first, second, third = (f"checkout-{id}" for id in ids)
    dotted = f"invoice.{ids[2]}"
    durable.submit(dotted, checkout, ids[2])
    shop.db.execute(
        "UPDATE awaitly_snapshots SET snapshot = jsonb_set(snapshot, '{metadata,gaveUpAt}', "
        "to_jsonb(%s::text)) WHERE id = %s",
        (PAST, first),
    )
    states = [lambda id=id: durable.get(id).state for id in (first, second, third, dotted)]
    assert manage(shop.url, "resume_workflows", first).returncode == 0
    assert [state() for state in states] == ["completed", "pending", "pending", "pending"]
    done = manage(shop.url, "resume_workflows", "shop.workflows.durable", second, "--verbose")
    assert (done.returncode, done.stdout.split("\n")[0]) == (0, f"completed  {second}")
    assert manage(shop.url, "resume_workflows", dotted).returncode == 0
    assert [state() for state in states] == ["completed", "completed", "pending", "completed"]
    for arguments, message in (
        (["no-such"], "CommandError: nothing is stored as 'no-such'\n"),
        ([third, "--limit", "1"], "CommandError: give either ids, or"),
    ):
        done = manage(shop.url, "resume_workflows", *arguments)
        assert done.returncode == 1
        assert done.stderr.startswith(message)
    assert durable.get(third).state == "pending"


def test_the_command_says_that_an_id_is_not_resumed(shop: SimpleNamespace) -> None:
    """Silence would look like a start; nothing has failed, so the exit status is 0."""
    durable, checkout = shop.workflows.durable, shop.workflows.checkout
    first, second = order(shop), order(shop)
    for id in ("over", "held"):
        durable.submit(id, checkout, second)
    durable.resume(f"checkout-{first}")
    durable.cancel("over")
    held = durable.store.try_acquire("held", ttl=600)
    done = manage(shop.url, "resume_workflows", f"checkout-{first}", "over", "held")
    assert (done.returncode, done.stdout) == (0, "")
    assert done.stderr.splitlines() == [
        f"'checkout-{first}' is already completed",
        "'over' is already cancelled",
        f"'held' is already running on {held.token.rpartition(':')[0]}",
    ]


@pytest.mark.parametrize("option", ["--loop", "--limit", "--workers"])
@pytest.mark.parametrize("value", ["0", "-1"])
def test_the_command_refuses_numbers_that_make_no_sense(
    shop: SimpleNamespace, option: str, value: str
) -> None:
    """Before it starts anything; 0 is not taken for no limit, nor for no loop."""
    from django.core.management import CommandError, call_command

    order(shop)
    with pytest.raises(CommandError, match=f"{option} must be more than 0, not {value}"):
        call_command("resume_workflows", f"{option}={value}")
    assert stock(shop) == 10


def test_the_command_says_in_one_line_that_the_database_is_away(shop: SimpleNamespace) -> None:
    """Also if ids are given, which it looks up before it starts them."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        nowhere = f"host=127.0.0.1 port={taken.getsockname()[1]} dbname=x"
        for arguments in ([], ["an-id"]):
            done = manage(nowhere, "resume_workflows", *arguments)
            assert (done.returncode, done.stdout) == (1, "")
            assert done.stderr.startswith("CommandError: no connection to PostgreSQL: ")
            assert "Traceback" not in done.stderr


def test_the_command_takes_a_prefix_and_a_limit(shop: SimpleNamespace) -> None:
    """As the command line does; and shows tracebacks if it is asked to."""
    durable, checkout = shop.workflows.durable, shop.workflows.checkout
    for id in ("a-1", "a-2", "b-1"):
        durable.submit(id, checkout, str(uuid.UUID(int=0)))  # there is no such order
    done = manage(shop.url, "resume_workflows", "--prefix", "a-", "--limit", "1", "--verbose")
    assert done.returncode == 1
    failed, *others = done.stderr.splitlines()
    assert failed.startswith("failed     a-1 (attempt 1, again in ")
    assert others[0] == "Traceback (most recent call last):"
    assert "CommandError: 1 of 1 workflows failed" in done.stderr
    assert {run.id: run.attempts for run in durable.list()} == {"a-1": 1, "a-2": 0, "b-1": 0}


def test_the_command_is_silent_about_a_connection_that_is_replaced(shop: SimpleNamespace) -> None:
    """A lost connection of the store that cost nothing is no reason for a mail of cron's."""
    durable = shop.workflows.durable
    id = f"checkout-{order(shop)}"
    with closing(Proxy(shop.url)) as proxy:
        proxy.lose("reply", 5)
        done = manage(proxy.url, "resume_workflows")
        assert proxy.has_lost
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert durable.get(id).state == "completed"


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_the_command_loops_until_it_is_stopped(
    shop: SimpleNamespace, signum: signal.Signals
) -> None:
    """It takes up what is submitted meanwhile, and a signal ends it after the current run."""
    with (
        subprocess.Popen(
            [sys.executable, str(SHOP / "manage.py"), "resume_workflows", "--loop", "0.05"],
            env={**os.environ, "DATABASE_URL": shop.url},
            stderr=subprocess.PIPE,
            text=True,
        ) as command,
        ExitStack() as stack,
    ):
        stack.callback(command.kill)  # if anything fails in here
        for count in (1, 2):
            order(shop)
            eventually(lambda n=count: len(list(filter(None, payments(shop)))) == n, "a payment")
        with psycopg.connect(shop.url) as blocker:
            blocker.execute("SELECT FROM shop_product FOR NO KEY UPDATE")
            order(shop)
            waiting = "SELECT 1 FROM pg_stat_activity WHERE %s = ANY(pg_blocking_pids(pid))"
            pid = (blocker.info.backend_pid,)
            eventually(lambda: shop.db.execute(waiting, pid).fetchone(), "an update that waits")
            command.send_signal(signum)
            assert "stopping after the current workflow" in command.stderr.readline()
        assert command.wait(timeout=60) == 0
    assert payments(shop).count("") == 0
    assert stock(shop) == 7


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_stops_the_command_at_once(
    shop: SimpleNamespace, signum: signal.Signals
) -> None:
    """The exit status says which one it was, and there is no traceback."""
    order(shop)
    with (
        psycopg.connect(shop.url) as blocker,
        subprocess.Popen(
            [sys.executable, str(SHOP / "manage.py"), "resume_workflows", "--loop", "1"],
            env={**os.environ, "DATABASE_URL": shop.url},
            stderr=subprocess.PIPE,
            text=True,
        ) as command,
        ExitStack() as stack,
    ):
        stack.callback(command.kill)  # if anything fails in here
        blocker.execute("SELECT FROM shop_product FOR NO KEY UPDATE")
        waiting = "SELECT 1 FROM pg_stat_activity WHERE %s = ANY(pg_blocking_pids(pid))"
        pid = (blocker.info.backend_pid,)
        eventually(lambda: shop.db.execute(waiting, pid).fetchone(), "an update that waits")
        command.send_signal(signum)
        assert "stopping after the current workflow" in command.stderr.readline()
        command.send_signal(signum)
        assert command.communicate(timeout=60)[1] == ""
        assert command.returncode == 128 + signum
    assert stock(shop) == 10


def test_the_command_runs_several_at_once(shop: SimpleNamespace) -> None:
    """With ``--workers``, each thread on connections of its own."""
    for _ in range(4):
        order(shop)
    done = manage(shop.url, "resume_workflows", "--workers", "3", "-v", "2")
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("4 resumed, 0 failed\n")
    assert stock(shop) == 6


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


@pytest.mark.parametrize("commits", [True, False])
def test_answers_and_cancellations_commit_or_roll_back_with_the_block(
    shop: SimpleNamespace, commits: bool
) -> None:
    """Nobody else sees them before, and rolled back they can be made again."""
    from django.db import transaction

    durable = Durable(shop.workflows.durable.store)

    @durable.workflow
    def work(step: Step) -> object:
        return step.wait("approval")

    def seen() -> list[tuple[str, int]]:
        columns = "snapshot->'metadata' ? 'cancelledAt', snapshot->'metadata' ? 'signals'"
        return shop.db.execute(f"SELECT {columns} FROM awaitly_snapshots ORDER BY id").fetchall()

    for id in ("answered", "cancelled"):
        with pytest.raises(Exception, match="suspended"):
            durable.run(id, work)
    before = seen()
    assert before == [(False, False)] * 2
    with suppress(ZeroDivisionError), transaction.atomic():
        assert durable.signal("answered", "approval", "yes")
        assert durable.cancel("cancelled")
        assert not durable.signal("answered", "approval", "no")
        assert durable.get("cancelled").state == "cancelled"
        assert seen() == before
        if not commits:
            raise ZeroDivisionError
    assert seen() == ([(False, True), (True, False)] if commits else before)
    assert durable.signal("answered", "approval", "again") is not commits
    assert durable.cancel("cancelled") is not commits
    assert durable.resume("answered") == ("yes" if commits else "again")


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


def test_a_store_used_before_the_tests_moves_to_their_database(
    site: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And keeps no connection there, whatever was opened before."""
    from django.core import mail
    from django.db import connections

    from awaitly_postgres.contrib.django import store

    alias(monkeypatch, "moving")
    with store("moving", min_size=0, max_size=1) as made:  # one: a slow server would get another
        before = made._db.rows(b"SELECT current_database()::text, pg_backend_pid()", {})
        assert made._db.rows(b"SELECT current_database()::text, pg_backend_pid()", {}) == before
        monkeypatch.setattr(mail, "outbox", [], raising=False)
        monkeypatch.setitem(connections.settings["moving"], "NAME", "template1")
        name, pid = made._db.rows(b"SELECT current_database()::text, pg_backend_pid()", {})[0]
        assert name == "template1"
        with psycopg.connect(site.url, autocommit=True) as db:
            alive = "SELECT count(*) FROM pg_stat_activity WHERE pid = ANY(%s)"
            pids = [pid, before[0][1]]
            eventually(lambda: db.execute(alive, (pids,)).fetchone() == (0,), "their ends")


def test_the_store_takes_on_the_role_that_django_assumes(
    site: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """OPTIONS["assume_role"] is the role that owns what a migration makes."""
    from awaitly_postgres.contrib.django import store

    alias(monkeypatch, "other", OPTIONS={"assume_role": "pg_monitor"})
    with store("other") as made:
        assert made._db.rows(b"SELECT current_user::text", {}) == [("pg_monitor",)]


@pytest.mark.parametrize("name", ["default", "reports"])
def test_missing_tables_are_a_matter_of_migrate(
    site: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """The error names the command, and not the SQL, which a migration has to run."""
    from awaitly_postgres.contrib.django import store

    alias(monkeypatch, "reports")
    with store(name, schema="nowhere") as made, pytest.raises(SchemaMissing) as caught:
        made.load("a")
    command = "manage.py migrate" if name == "default" else "manage.py migrate --database reports"
    assert str(caught.value).endswith(f" Run '{command}'.")
    assert "CREATE TABLE" in caught.value.ddl


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


@pytest.mark.usefixtures("site")  # skips where this Django refuses the server
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


@pytest.mark.usefixtures("site")  # skips where this Django refuses the server
def test_the_migration_leaves_tables_that_are_there_as_they_are(
    url: str, store: SnapshotStore
) -> None:
    """A project that used the store before keeps its workflows."""
    Durable(store).run("before", lambda step: 1)
    assert manage(url, "migrate", "awaitly").returncode == 0
    assert [info.id for info in store.list()] == ["before"]


@pytest.mark.usefixtures("site")  # skips where this Django refuses the server
def test_the_second_migration_changes_no_table(url: str, db: psycopg.Connection) -> None:
    """Of a project that has the first one: its runs stay, and there are permissions to grant."""
    columns = (
        "SELECT table_name, column_name, data_type, column_default FROM information_schema.columns "
        "WHERE table_schema = current_schema() AND table_name LIKE 'awaitly%' ORDER BY 1, 2"
    )
    assert manage(url, "migrate", "awaitly", "0001").returncode == 0
    before = db.execute(columns).fetchall()
    with postgres(url) as store:
        Durable(store).run("before", lambda step: 1)
        assert manage(url, "migrate").returncode == 0
        assert [run.state for run in Durable(store).list()] == ["completed"]
    assert db.execute(columns).fetchall() == before != []
    granted = "SELECT codename FROM auth_permission WHERE codename LIKE '%_workflow' ORDER BY 1"
    assert [name.partition("_")[0] for (name,) in db.execute(granted)] == [
        "answer",
        "cancel",
        "retry",
        "rewind",
        "view",
    ]
    assert manage(url, "migrate", "awaitly", "0001").returncode == 0
    assert db.execute("SELECT id FROM awaitly_snapshots").fetchall() == [("before",)]


def test_no_model_has_changed_without_a_migration(site: SimpleNamespace) -> None:
    """Neither the app's nor the shop's."""
    done = manage(site.url, "makemigrations", "--check", "--dry-run")
    assert (done.returncode, done.stdout) == (0, "No changes detected\n")
