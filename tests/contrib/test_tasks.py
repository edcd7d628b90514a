"""Django's tasks: what its own tests ask of a backend, and what this backend adds."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import sys
from collections.abc import Iterator
from datetime import datetime, timedelta, timezone
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from awaitly_postgres import Durable
from awaitly_postgres.testing import pass_time
from tests.contrib.project import alias, manage

BACKEND = "awaitly_postgres.contrib.django.tasks.Backend"
SETTINGS = {"DJANGO_SETTINGS_MODULE": "tests.workers.task_settings"}


def configured(**options: Any) -> Any:
    """Override the settings with backends, one of them of Django's own."""
    from django.test import override_settings

    default = {"BACKEND": BACKEND, "QUEUES": ["default", "mail"], **options}
    any_queue = {"BACKEND": BACKEND, "QUEUES": []}
    return override_settings(TASKS={"default": default, "any_queue": any_queue})


@pytest.fixture
def tasks(shop: SimpleNamespace) -> Iterator[Any]:
    """The tasks for these tests, with the backend configured."""
    try:
        import django.tasks  # noqa: F401
    except ImportError:
        pytest.importorskip("django_tasks")
    with configured():
        from tests.workers import tasks

        yield tasks


@pytest.fixture
def api(tasks: Any) -> Any:
    """Django's task API, or the backport's."""
    from awaitly_postgres.contrib.django import tasks as ours

    return ours


def work(*arguments: str) -> None:
    """Do what the worker does, in this process."""
    from django.core.management import CommandError, call_command

    try:
        call_command("resume_workflows", *arguments)
    except CommandError as error:
        assert "workflows failed" in str(error)  # noqa: PT017 - it may or may not be raised


def status(result: Any) -> str:
    """Return how a task stands now."""
    result.refresh()
    return str(result.status.value)


# -- enqueueing ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["noop", "noop_async"])
def test_a_task_is_enqueued_and_done_by_the_worker(tasks: Any, name: str) -> None:
    """It is ready, with its arguments, and then successful, with its times in order."""
    task = getattr(tasks, name)
    result = task.enqueue(1, two=3)
    assert (status(result), result.task, result.args) == ("READY", task, [1])
    assert (result.kwargs, result.backend, result.attempts) == ({"two": 3}, "default", 0)
    assert (result.started_at, result.finished_at, result.worker_ids) == (None, None, [])
    with pytest.raises(ValueError, match="not finished"):
        _ = result.return_value
    work()
    assert status(result) == "SUCCESSFUL"
    assert result.is_finished
    assert result.return_value is None
    assert result.enqueued_at <= result.started_at <= result.finished_at
    assert result.last_attempted_at == result.started_at
    assert (result.attempts, result.errors) == (1, [])


def test_it_is_enqueued_and_looked_up_asynchronously(tasks: Any) -> None:
    """``aenqueue``, ``aget_result`` and ``arefresh``."""

    async def go() -> Any:
        result = await tasks.noop.aenqueue(1)
        assert await tasks.noop.aget_result(result.id) == result
        await result.arefresh()
        return result

    from asgiref.sync import async_to_sync

    assert async_to_sync(go)().args == [1]
    assert asyncio.iscoroutinefunction(go)


def test_a_result_is_found_by_its_id(tasks: Any, api: Any) -> None:
    """Equal to what ``enqueue`` returned; one that is not there, or of another task, is refused."""
    result = tasks.noop.using(queue_name="mail").enqueue((1, 2), key={"a": b"text"})
    assert (result.args, result.kwargs) == ([[1, 2]], {"key": {"a": "text"}})
    assert dataclasses.asdict(tasks.noop.get_result(result.id)) == dataclasses.asdict(result)
    for unknown in ("123", "x" * 2000, "a\0b", ""):
        with pytest.raises(api.TaskResultDoesNotExist):
            tasks.noop.get_result(unknown)
    with pytest.raises(Exception, match="does not match"):
        tasks.noop_async.get_result(result.id)
    with pytest.raises(api.TaskResultDoesNotExist):
        tasks.noop.using(backend="any_queue").get_result(result.id)


def test_a_run_that_is_no_task_is_no_result(tasks: Any, api: Any, shop: SimpleNamespace) -> None:
    """Whatever else is in the table."""
    shop.workflows.durable.submit("checkout-1", shop.workflows.checkout, "1")
    shop.db.execute("INSERT INTO awaitly_snapshots VALUES ('broken', 'null')")
    for id in ("checkout-1", "broken"):
        with pytest.raises(api.TaskResultDoesNotExist):
            tasks.noop.get_result(id)


def test_what_is_wrong_is_refused_when_it_is_enqueued(tasks: Any) -> None:
    """A priority, an unknown queue, a naive time, arguments that are not JSON."""
    for using, message in (
        ({"priority": 1}, "priority"),
        ({"queue_name": "unknown"}, "Queue 'unknown' is not valid"),
        ({"run_after": datetime.now()}, "aware"),  # noqa: DTZ005
    ):
        with pytest.raises(Exception, match=message):
            tasks.noop.using(**using)
    with pytest.raises(TypeError, match="Unsupported type"):
        tasks.noop.enqueue(datetime.now(timezone.utc))
    assert tasks.noop.using(queue_name="what else", backend="any_queue").enqueue().id


def test_a_task_is_validated_again_when_it_is_enqueued(tasks: Any) -> None:
    """The settings may have changed since it was made."""
    task = tasks.noop.using(queue_name="mail")
    with configured(QUEUES=["default"]), pytest.raises(Exception, match="'mail' is not valid"):
        task.enqueue()


@pytest.mark.parametrize("commits", [True, False])
def test_enqueue_commits_or_rolls_back_with_its_transaction(
    tasks: Any, shop: SimpleNamespace, commits: bool
) -> None:
    """Inside ``atomic()``, where its own process finds it, and no other does before the end."""
    from django.db import transaction

    try:
        with transaction.atomic():
            result = tasks.noop.enqueue()
            assert status(result) == "READY"
            count = "SELECT count(*) FROM awaitly_snapshots"
            assert shop.db.execute(count).fetchone() == (0,)
            if not commits:
                raise ZeroDivisionError
    except ZeroDivisionError:
        pass
    assert shop.db.execute(count).fetchone() == (int(commits),)


def test_a_task_is_not_run_before_its_time(tasks: Any, shop: SimpleNamespace) -> None:
    """``run_after`` is kept, and counted by the server's clock."""
    later = datetime.now(timezone.utc) + timedelta(days=1)
    result = tasks.noop.using(run_after=later).enqueue()
    work()
    assert status(result) == "READY"
    assert result.attempts == 0
    found = tasks.noop.get_result(result.id)
    assert abs(found.task.run_after - later) < timedelta(milliseconds=1)
    path = "'{metadata,wakeAt}', '\"2026-01-01T00:00:00.000Z\"'"
    shop.db.execute(f"UPDATE awaitly_snapshots SET snapshot = jsonb_set(snapshot, {path})")
    work()
    assert status(result) == "SUCCESSFUL"


def test_without_time_zones_times_are_local(tasks: Any, settings_without_tz: None) -> None:
    """``USE_TZ = False`` has naive times everywhere."""
    later = datetime.now() + timedelta(days=1)  # noqa: DTZ005
    result = tasks.noop.using(run_after=later).enqueue()
    assert result.enqueued_at.tzinfo is None
    assert tasks.noop.get_result(result.id).task.run_after == later
    other = tasks.noop.enqueue()
    work()
    assert status(other) == "SUCCESSFUL"
    assert other.enqueued_at <= other.started_at <= other.finished_at


@pytest.fixture
def settings_without_tz(tasks: Any) -> Iterator[None]:
    from django.test import override_settings

    with override_settings(USE_TZ=False):
        yield


# -- working -------------------------------------------------------------------------------


def test_values_are_returned_as_json_has_them(tasks: Any) -> None:
    """Of every queue, or of one by its prefix."""
    mail, shapes = tasks.meaning_of_life.enqueue(), tasks.shapes.enqueue()
    work("--prefix", "task:mail:")
    assert (status(mail), mail.return_value, status(shapes)) == ("SUCCESSFUL", 42, "READY")
    work(shapes.id)
    assert status(shapes) == "SUCCESSFUL"
    assert shapes.return_value == {"pair": [1, 2], "bytes": "text"}


@pytest.mark.parametrize(
    ("name", "arguments", "kind", "message"),
    [
        ("fail", ["no luck"], ValueError, "ValueError: no luck\n"),
        ("leave", [], SystemExit, "SystemExit: no more\n"),
        ("unsupported", [], TypeError, "TypeError: Unsupported type: <class 'object'>\n"),
        ("shapes", ["more"], TypeError, "takes 0 positional arguments but 1 was given\n"),
    ],
)
def test_a_task_that_raises_has_failed(
    tasks: Any, name: str, arguments: list[str], kind: type, message: str
) -> None:
    """After one try, with the class and the traceback of its error; the worker goes on."""
    result, other = getattr(tasks, name).enqueue(*arguments), tasks.noop.enqueue()
    work()
    assert (status(result), status(other)) == ("FAILED", "SUCCESSFUL")
    with pytest.raises(ValueError, match="Task failed"):
        _ = result.return_value
    (error,) = result.errors
    assert error.exception_class is kind
    assert error.traceback.startswith("Traceback (most recent call last):\n")
    assert error.traceback.endswith(message)
    assert (result.attempts, result.is_finished) == (1, True)
    assert result.started_at <= result.finished_at
    work()
    assert result.attempts == 1


@pytest.mark.parametrize("kind", ["SystemExit", "CancelledError"])
@pytest.mark.parametrize("where", ["step", "map", "transaction"])
@pytest.mark.parametrize("workers", ["1", "2"])
def test_a_step_that_would_end_the_process_fails_its_task(
    tasks: Any, where: str, kind: str, workers: str
) -> None:
    """Its worker goes on with the other tasks, and the error is what was raised."""
    tasks.left.clear()
    result, other = tasks.leave_in.enqueue(where, kind), tasks.noop.enqueue()
    work("--workers", workers)
    assert (status(result), status(other)) == ("FAILED", "SUCCESSFUL")
    (error,) = result.errors
    assert error.exception_class.__name__ == kind
    assert error.traceback.endswith(f"{kind}: no more\n")
    assert result.attempts == 1
    work(result.id)
    assert (status(result), result.return_value, result.attempts) == ("SUCCESSFUL", "again", 2)


@pytest.mark.parametrize("where", ["step", "map", "transaction"])
def test_ctrl_c_ends_the_worker_and_not_the_task(tasks: Any, api: Any, where: str) -> None:
    """It is ready again, and due after the pause of any run whose worker ended."""
    tasks.left.clear()
    result = tasks.leave_in.enqueue(where, "KeyboardInterrupt")
    with pytest.raises(KeyboardInterrupt):
        work()
    assert (status(result), result.attempts, result.errors) == ("READY", 1, [])
    pass_time(api.task_backends["default"].durable, timedelta(seconds=1))
    work()
    assert (status(result), result.attempts, result.errors) == ("SUCCESSFUL", 2, [])


@pytest.mark.parametrize(("how", "code"), [("exit", 7), ("raise", 1), ("return", 1)])
def test_a_child_that_a_task_forks_is_no_second_worker(
    tasks: Any, shop: SimpleNamespace, how: str, code: int
) -> None:
    """It ends where it leaves the task or the step, and writes nothing for either."""
    result, others = tasks.fork.enqueue(how), [tasks.noop.enqueue() for _ in range(3)]
    done = manage(shop.url, "resume_workflows", **SETTINGS)
    assert done.returncode == 0, done.stderr
    assert status(result) == "SUCCESSFUL"
    assert result.return_value == [code, code]
    assert (result.attempts, result.errors) == (1, [])
    assert len({*result.worker_ids, *(w for o in others if status(o) for w in o.worker_ids)}) == 1


def test_a_task_is_tried_as_often_as_the_options_say(tasks: Any) -> None:
    """Each try has its worker and its error, and the last one is final."""
    with configured(OPTIONS={"max_attempts": 3, "backoff": lambda error, attempt: 0}):
        result = tasks.fail.enqueue("no luck")
        seen = []
        for _ in range(4):
            work()
            seen.append((status(result), result.attempts, len(result.errors)))
    assert seen == [("READY", 1, 1), ("READY", 2, 2), ("FAILED", 3, 3), ("FAILED", 3, 3)]
    assert result.started_at < result.last_attempted_at < result.finished_at


def test_the_context_tells_the_id_and_the_attempt(tasks: Any) -> None:
    """For a task that takes it."""
    result = tasks.context_of.enqueue()
    work()
    assert status(result) == "SUCCESSFUL"
    assert result.return_value == [result.id, 1, True]


def test_a_task_that_is_cancelled_has_failed(tasks: Any, api: Any) -> None:
    """And says so, though it never began."""
    result = tasks.noop.enqueue()
    assert api.task_backends["default"].durable.cancel(result.id)
    assert status(result) == "FAILED"
    assert [error.exception_class.__name__ for error in result.errors] == ["WorkflowCancelled"]


def test_signals_are_sent_and_logged(
    tasks: Any, api: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """Enqueued, started, finished: as Django's own backends do."""
    seen: list[tuple[str, str, int]] = []

    def note(signal: Any, task_result: Any, **kwargs: Any) -> None:
        seen.append((task_result.id, task_result.status.value, task_result.attempts))

    signals = (api.task_enqueued, api.task_started, api.task_finished)
    for signal in signals:
        signal.connect(note)
    try:
        with caplog.at_level(logging.DEBUG):
            good, bad = tasks.noop.enqueue(), tasks.fail.enqueue("no luck")
            work()
    finally:
        for signal in signals:
            signal.disconnect(note)
    assert [seen_ for seen_ in seen if seen_[0] == good.id] == [
        (good.id, "READY", 0),
        (good.id, "RUNNING", 1),
        (good.id, "SUCCESSFUL", 1),
    ]
    assert [state for id, state, _ in seen if id == bad.id] == ["READY", "RUNNING", "FAILED"]
    logged = [r.getMessage() for r in caplog.records if bad.id in r.getMessage()]
    assert [text for text in logged if "state=FAILED" in text]


def test_a_row_that_names_something_else_calls_nothing(tasks: Any, shop: SimpleNamespace) -> None:
    """Whoever can write to the table cannot have any function called."""
    from django.core.exceptions import SuspiciousOperation

    result = tasks.noop.enqueue()
    path = "'{metadata,input,args,0}', '\"tests.workers.tasks.NOT_A_TASK\"'"
    shop.db.execute(f"UPDATE awaitly_snapshots SET snapshot = jsonb_set(snapshot, {path})")
    with pytest.raises(SuspiciousOperation, match="is not a task"):
        result.refresh()
    work()
    with pytest.raises(SuspiciousOperation, match="is not a task"):
        result.refresh()


# -- durable steps -------------------------------------------------------------------------


def test_a_worker_killed_in_the_second_step_repeats_nothing_before_it(
    tasks: Any, shop: SimpleNamespace, tmp_path: Path
) -> None:
    """The next one goes on with that step, and the task knows both."""
    result = tasks.in_steps.enqueue(str(tmp_path / "lines"), "two")
    killed = manage(shop.url, "resume_workflows", "--loop", "1", **SETTINGS)
    assert killed.returncode == -9, killed.stderr
    shop.db.execute("UPDATE awaitly_workflow_lock SET expires_at = clock_timestamp()")
    assert status(result) == "READY"
    done = manage(shop.url, "resume_workflows", **SETTINGS)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "lines").read_text().split() == ["one", "two", "two", "three"]
    assert status(result) == "SUCCESSFUL"
    assert result.return_value == ["one", "two", "three"]
    assert (result.attempts, len(set(result.worker_ids))) == (2, 2)
    assert result.started_at < result.last_attempted_at <= result.finished_at


def test_steps_work_in_coroutines_and_over_the_orm(tasks: Any, shop: SimpleNamespace) -> None:
    """Recorded, and in one transaction with what the ORM writes."""
    steps, inserted = tasks.in_steps_async.enqueue(), tasks.over_the_orm.enqueue("Mug")
    work()
    assert (status(steps), steps.return_value) == ("SUCCESSFUL", ["ONE", "TWO"])
    assert status(inserted) == "SUCCESSFUL"
    (pk,) = shop.db.execute("SELECT id FROM shop_product WHERE name = 'Mug'").fetchone()
    assert inserted.return_value == pk


def test_a_task_can_wait_for_an_answer(tasks: Any, api: Any) -> None:
    """Meanwhile it is ready, and no worker has it."""
    durable: Durable = api.task_backends["default"].durable
    result = tasks.approve.enqueue()
    work()
    assert status(result) == "READY"
    assert durable.get(result.id).waits_for == ("approval",)
    durable.signal(result.id, "approval", "yes")
    work()
    assert (status(result), result.return_value, result.errors) == ("SUCCESSFUL", "yes", [])


def test_step_is_refused_where_no_task_runs(api: Any) -> None:
    """In words."""
    with pytest.raises(RuntimeError, match="inside a task"):
        api.step()


def test_a_missing_package_is_named(api: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where neither Django nor the backport has tasks, the settings ask for what is not there."""
    from django.core.exceptions import ImproperlyConfigured
    from django.core.management import call_command

    for name in ("django.tasks", "django_tasks"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, api.__name__)
    with pytest.raises(ImproperlyConfigured, match="pip install django-tasks"):
        call_command("resume_workflows")


# -- checks --------------------------------------------------------------------------------


def test_the_checks_find_what_is_wrong(
    tasks: Any, api: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing if all is well; the app, the options and the database otherwise."""
    from django.apps import apps
    from django.test import override_settings

    def checked() -> list[str]:
        return [str(message.msg) for message in api.task_backends["default"].check()]

    assert checked() == []
    for options, part in (
        ({"max_attempts": 0}, "max_attempts"),
        ({"colour": "red"}, "colour"),
        ({"database": "nowhere"}, "nowhere"),
    ):
        with configured(OPTIONS=options):
            (message,) = checked()
        assert part in message
        assert "TASKS['default']['OPTIONS']" in message
    alias(monkeypatch, "lite", ENGINE="django.db.backends.sqlite3")
    with configured(OPTIONS={"database": "lite"}):
        assert "is sqlite, not PostgreSQL" in checked()[0]
    others = [c.name for c in apps.get_app_configs() if c.label not in ("awaitly", "admin")]
    with override_settings(INSTALLED_APPS=others):
        assert "no migration makes" in checked()[0]
