"""The Django page, followed to the letter in a project made with ``startproject``."""

from __future__ import annotations

import os
import re
import secrets
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest
from attrs import frozen
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from tests.contrib.project import SHOP, manage
from tests.support import ROOT

PAGE = (ROOT / "awaitly_postgres/contrib/django/README.md").read_text("utf-8")

# What the page leaves to its reader.
SETTINGS = """
DATABASES = {{"default": {{"ENGINE": "django.db.backends.postgresql", **{0}}}}}
DATABASES["reports"] = {{**DATABASES["default"], "NAME": {1!r}}}
DATABASES["default"]["ATOMIC_REQUESTS"] = True
"""

MORE_TESTS = """
from django.contrib.auth import get_user_model
from django.core.management import call_command
from django.db import connections, transaction
from django.http import HttpResponse
from django.test import TestCase, TransactionTestCase, override_settings
from django.urls import path
from uuid import UUID

from awaitly_postgres import Durable
from awaitly_postgres.contrib.django import atomic, connection, store

from .models import Order, Product
from .tasks import ship
from .tests import an_order
from .workflows import durable

plain = Durable(store())


@plain.workflow
def remember(step, word):
    return step("remember", str.upper, word)


def run(request):
    return HttpResponse(plain.run("x", remember, "a"))


@transaction.non_atomic_requests
def outside(request):
    return HttpResponse(plain.run("x", remember, "a"))


def submit(request):
    plain.submit("x", remember, "a")
    if "fail" in request.GET:
        raise ZeroDivisionError
    return HttpResponse(plain.get("x").state)


class urls:
    urlpatterns = [
        path("run", run),
        path("outside", outside),
        path("submit", submit),
    ]


@override_settings(ROOT_URLCONF=urls)
class Views(TransactionTestCase):
    def test_run_says_what_to_do_instead(self):
        with self.assertRaisesMessage(RuntimeError, "Call submit("):
            self.client.get("/run")
        self.assertIsNone(plain.get("x"))

    def test_run_outside(self):
        self.assertEqual(self.client.get("/outside").content, b"A")

    def test_submit_rolls_back(self):
        with self.assertRaises(ZeroDivisionError):
            self.client.get("/submit?fail")
        self.assertIsNone(plain.get("x"))

    def test_submit_commits(self):
        self.assertEqual(self.client.get("/submit").content, b"pending")
        self.assertEqual([outcome.result for outcome in plain.resume_pending()], ["A"])


class SameIdInTransactions(TransactionTestCase):
    def test_one(self):
        self.assertEqual(plain.run("same", remember, "one"), "ONE")

    def test_two(self):
        self.assertEqual(plain.run("same", remember, "two"), "TWO")


class Workers(TransactionTestCase):
    def test_several_at_once(self):
        for word in ("a", "b", "c"):
            plain.submit(word, remember, word)
        done = plain.resume_pending(workers=3)
        self.assertEqual(sorted(outcome.result for outcome in done), ["A", "B", "C"])


class SameIdInSavepoints(TestCase):
    def test_one(self):
        self.assertTrue(plain.submit("same", remember, "one"))

    def test_two(self):
        self.assertTrue(plain.submit("same", remember, "two"))
        with self.assertRaisesMessage(RuntimeError, "TransactionTestCase"):
            plain.resume("same")


class Tasks(TransactionTestCase):
    def test_a_task_is_done_by_the_worker(self):
        (order := an_order()).save()
        with transaction.atomic():
            result = ship.enqueue(str(order.pk))
        call_command("resume_workflows")
        result.refresh()
        self.assertEqual(result.status, "SUCCESSFUL")
        self.assertEqual(result.return_value, f"charged 900 for {result.id}/charge-card")
        self.assertEqual(Product.objects.get().stock, 1)


class TwoDatabases(TransactionTestCase):
    databases = {"default", "reports"}

    def run_with(self, using, opened):
        both = Durable(store(using), transaction=lambda: atomic(opened))
        select = lambda conn: conn.execute("SELECT current_database()").fetchone()[0]
        return both.run("x", lambda step: step.transaction("where", select))

    def test_store_and_transaction_go_together(self):
        for alias in self.databases:
            name = connections[alias].settings_dict["NAME"]
            self.assertEqual(self.run_with(alias, alias), name)
        for using, opened in (("default", "reports"), ("reports", "default")):
            durable = Durable(store(using))
            durable.delete_state("x")
            with self.assertRaisesMessage(ValueError, f"the store is on {using!r}"):
                self.run_with(using, opened)
            self.assertEqual(durable.get("x").step_count, 1)

    def test_submit_on_the_wrong_connection(self):
        reports = Durable(store("reports"))
        reports.workflow(remember)
        with self.assertRaisesMessage(ValueError, "pass connection('reports')"):
            reports.submit("x", remember, "a", conn=connection())
        with transaction.atomic(using="reports"):
            self.assertTrue(reports.submit("x", remember, "a", conn=connection("reports")))
            self.assertTrue(plain.submit("x", remember, "a"))  # of the other one: at once
            transaction.set_rollback(True, using="reports")
        self.assertIsNone(reports.get("x"))
        self.assertEqual(plain.get("x").state, "pending")
        with transaction.atomic(using="reports"), self.assertRaises(RuntimeError):
            plain.resume("x")  # what its steps write there would be rolled back

    def test_every_conn_of_the_wrong_database_is_refused(self):
        for using, other in (("default", "reports"), ("reports", "default")):
            durable = Durable(store(using))
            durable.workflow(remember)
            durable.submit("x", remember, "a")
            snapshot, conn = durable.store.load("x"), connection(other)
            for call in (
                lambda: durable.submit("y", remember, "a", conn=conn),
                lambda: durable.submit_many(remember, {"y": ("a",)}, conn=conn),
                lambda: durable.signal("x", "key", 1, conn=conn),
                lambda: durable.cancel("x", conn=conn),
                lambda: durable.get("x", conn=conn),
                lambda: durable.store.save("x", snapshot, conn=conn),
                lambda: durable.store.load("x", conn=conn),
                lambda: durable.store.delete("x", conn=conn),
                lambda: durable.store.details(["x"], conn=conn),
            ):
                with self.assertRaisesMessage(ValueError, f"pass connection({using!r})"):
                    call()
            self.assertEqual([run.state for run in durable.list()], ["pending"])
            durable.delete_state("x")

    def test_a_block_of_one_database_is_not_one_of_the_other(self):
        for using, other in (("default", "reports"), ("reports", "default")):
            durable = Durable(store(using))
            durable.workflow(remember)
            for opened, kept in ((using, set()), (other, {"s", "m"})):
                durable.submit("c", remember, "a")
                with transaction.atomic(using=opened):
                    self.assertTrue(durable.submit("s", remember, "a"))
                    self.assertEqual(durable.submit_many(remember, {"m": ("a",)}), ["m"])
                    self.assertTrue(durable.cancel("c"))
                    self.assertTrue(durable.signal("s", "key", 1))
                    self.assertEqual(durable.get("s").state, "pending")
                    transaction.set_rollback(True, using=opened)
                self.assertEqual({run.id for run in durable.list()}, {"c", *kept})
                self.assertEqual(durable.get("c").state, "cancelled" if kept else "pending")
                durable.clear_state()

    def test_tasks_are_kept_where_the_options_say(self):
        backend = {"BACKEND": "awaitly_postgres.contrib.django.tasks.Backend"}
        with override_settings(TASKS={"default": {**backend, "OPTIONS": {"database": "reports"}}}):
            for opened, count in (("reports", 0), ("default", 1)):
                with transaction.atomic(using=opened):
                    ship.enqueue("1")
                    transaction.set_rollback(True, using=opened)
                self.assertEqual(len(Durable(store("reports")).list()), count)
        self.assertEqual(durable.list(), [])

    def test_the_admin_goes_where_the_router_says(self):
        reports = Durable(store("reports"))
        reports.workflow(remember)
        for durable in (plain, reports):
            durable.submit("x", remember, "a")
        self.client.force_login(get_user_model().objects.create_superuser("admin"))
        with override_settings(DATABASE_ROUTERS=[f"{__name__}.Router"]):
            self.assertContains(self.client.get("/admin/awaitly/workflow/"), "pending")
            page = "/admin/awaitly/workflow/x/change/"
            self.assertContains(self.client.get(page), "remember")
            with transaction.atomic():  # as ATOMIC_REQUESTS has it
                done = self.client.post(page, {"act": "cancel"}, follow=True)
            self.assertContains(done, "Cancelled.")
        self.assertEqual([plain.get("x").state, reports.get("x").state], ["pending", "cancelled"])


class Router:
    def db_for_read(self, model, **hints):
        return "reports" if model._meta.app_label == "awaitly" else None

    db_for_write = db_for_read
"""

PYTEST = """
import pytest
from shop.more_tests import plain, remember


@pytest.mark.django_db(transaction=True)
@pytest.mark.parametrize("word", ["one", "two"])
def test_the_same_id(word):
    assert plain.run("same", remember, word) == word.upper()


@pytest.mark.django_db
def test_submitted(client):
    assert plain.submit("same", remember, "three")
    assert plain.get("same").state == "pending"
"""


@frozen
class Project:
    """A Django project in a folder."""

    folder: Path
    url: str

    def run(self, *words: str, fails: bool = False) -> str:
        """Run Python there, and return what it prints."""
        done = subprocess.run(
            [sys.executable, "-W", "error::ResourceWarning", *words],
            cwd=self.folder,
            env={**os.environ, "PYTHONPATH": "."},
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert (done.returncode != 0) == fails, done.stdout + done.stderr
        return done.stdout + done.stderr


def blocks(language: str) -> list[str]:
    """Return the code blocks of the page."""
    return re.findall(rf"^```{language}\n(.*?)^```$", PAGE, re.M | re.S)


@pytest.fixture(scope="module")
def project(server: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Project]:
    """A new project with the files of the page, on two databases of its own."""
    import django

    folder = tmp_path_factory.mktemp("project")
    name = f"fresh_{secrets.token_hex(4)}"
    with psycopg.connect(server, autocommit=True) as admin:
        for database in (name, f"{name}_reports"):
            admin.execute(f"CREATE DATABASE {database}")
        project = Project(folder, make_conninfo(server, dbname=name))
        try:
            project.run("-m", "django", "startproject", "mysite", ".")
            project.run("manage.py", "startapp", "shop")
            shutil.copy(SHOP / "shop/models.py", folder / "shop/models.py")
            given = conninfo_to_dict(server)
            keys = {"USER": "user", "PASSWORD": "password", "HOST": "host", "PORT": "port"}
            database = {key: str(given[k]) for key, k in keys.items() if given.get(k)}
            database["NAME"] = name
            files = {"settings.py": SETTINGS.format(database, f"{name}_reports")}
            for block in blocks("python"):
                path = block.partition("\n")[0].removeprefix("# ")
                files[path] = files.get(path, "") + block.replace(
                    "# ...", '*INSTALLED_APPS, "shop",'
                )
            if django.VERSION < (6,):
                comment = r"from django\.tasks import task  # before Django 6: (.*)"
                files["shop/tasks.py"] = re.sub(comment, r"\1", files["shop/tasks.py"])
            files["mysite/settings.py"] = files.pop("settings.py")
            files["shop/more_tests.py"] = MORE_TESTS
            files["with_pytest.py"] = PYTEST
            files["pytest.ini"] = "[pytest]\nDJANGO_SETTINGS_MODULE = mysite.settings\n"
            for path, text in files.items():
                with (folder / path).open("a" if path == "mysite/settings.py" else "w") as file:
                    file.write(text)
            project.run("manage.py", "makemigrations", "shop")
            yield project
        finally:
            for database in (name, f"{name}_reports"):
                admin.execute(f"DROP DATABASE {database}")


def test_the_commands_of_the_page_succeed(site: object, project: Project) -> None:
    """In their order; what is submitted in between is finished by the worker."""
    lines = re.findall(r"^\$ python (.*)$", "".join(blocks("console")), re.M)
    assert [line.split()[1] for line in lines] == ["migrate", "resume_workflows", "test"]
    submit = "from shop.tests import an_order; from shop.views import accept; accept(an_order())"
    for line in lines:
        printed = project.run(*line.split())
        if "migrate" in line:
            assert project.run("manage.py", "check") == (
                "System check identified no issues (0 silenced).\n"
            )
            assert project.run("manage.py", "makemigrations", "--check") == "No changes detected\n"
            project.run("manage.py", "shell", "-c", submit)
    assert "OK" in printed
    with psycopg.connect(project.url) as db:
        states = "SELECT snapshot->'execution'->>'status' FROM awaitly_snapshots"
        assert db.execute(states).fetchall() == [("completed",)]
        assert db.execute("SELECT stock FROM shop_product").fetchall() == [(1,)]


@pytest.mark.parametrize("options", [[], ["--parallel", "2"], ["--reverse"]], ids=str)
def test_tests_leave_no_connection_and_no_runs(
    site: object, project: Project, options: list[str]
) -> None:
    """Views, ids used twice, tasks and two databases; the test databases can be dropped."""
    words = ["manage.py", "test", "shop.more_tests", "--noinput", *options]
    assert "\nOK" in project.run(*words)
    with psycopg.connect(project.url) as db:
        names = "SELECT datname FROM pg_database WHERE datname LIKE 'test%%' || %s || '%%'"
        assert db.execute(names, (db.info.dbname,)).fetchall() == []


def test_pytest_django_works_as_well(site: object, project: Project) -> None:
    """With and without a transaction of its own."""
    pytest.importorskip("pytest_django")
    printed = project.run("-m", "pytest", "-q", "-p", "no:cacheprovider", "with_pytest.py")
    assert "3 passed" in printed


def test_the_examples_own_tests_pass(site: object, server: str) -> None:
    """And their database can be dropped."""
    name = f"shop_{secrets.token_hex(4)}"
    with psycopg.connect(server, autocommit=True) as admin:
        admin.execute(f"CREATE DATABASE {name}")
        try:
            done = manage(make_conninfo(server, dbname=name), "test", "shop")
            assert done.returncode == 0, done.stderr
            assert "Ran 3 tests" in done.stderr
        finally:
            admin.execute(f"DROP DATABASE {name}")
