"""Django's tasks as durable runs: ``resume_workflows`` is their worker.

In the settings (Django 6, or the package django-tasks before):

    TASKS = {"default": {"BACKEND": "awaitly_postgres.contrib.django.tasks.Backend"}}

``enqueue`` submits a run: inside ``atomic()`` it commits or rolls back with the block. A task whose
worker dies is run again, and with durable steps it continues where it was:

    from awaitly_postgres.contrib.django.tasks import step

    @task
    def checkout(order_id):
        payment = step()("charge-card", charge_card, order_id)
        step().transaction("note-payment", note_payment, order_id, payment)
"""

from __future__ import annotations

import importlib.util
import os
import socket
import sys
import traceback
from asyncio import CancelledError
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextvars import ContextVar
from datetime import datetime, timezone
from functools import cached_property, partial, wraps
from typing import Any

from django.apps import apps
from django.conf import settings
from django.core import checks
from django.core.exceptions import ImproperlyConfigured, SuspiciousOperation
from django.utils.connection import ConnectionDoesNotExist
from django.utils.crypto import get_random_string
from django.utils.module_loading import import_string
from django.utils.timezone import is_naive, make_aware, make_naive

from ... import Durable, Event, RunInfo, SnapshotFormatError, Step
from ...store.rows import read_time
from . import atomic, open_transaction, shared_store

try:
    from django.tasks import TaskContext, TaskResult, TaskResultStatus, task_backends
    from django.tasks.backends.base import BaseTaskBackend
    from django.tasks.base import Task, TaskError
    from django.tasks.exceptions import TaskResultDoesNotExist
    from django.tasks.signals import task_enqueued, task_finished, task_started
    from django.utils.json import normalize_json
except ImportError:  # before Django 6: the backport
    if importlib.util.find_spec("django_tasks") is None:
        raise ImproperlyConfigured(
            "tasks need Django 6 or the package django-tasks: pip install django-tasks"
        ) from None
    from django_tasks import TaskContext, TaskResult, TaskResultStatus, task_backends
    from django_tasks.backends.base import BaseTaskBackend
    from django_tasks.base import Task, TaskError
    from django_tasks.exceptions import TaskResultDoesNotExist
    from django_tasks.signals import task_enqueued, task_finished, task_started
    from django_tasks.utils import normalize_json

__all__ = ["Backend", "step", "task_backends"]

# What a task's run keeps besides its steps, as signals that no step waits for: each start and each
# error, numbered. They survive every start of the run, and no step of the task sees them.
_STARTED = "task.started."
_ERROR = "task.error."

_STATUSES = {
    "running": TaskResultStatus.RUNNING,
    "completed": TaskResultStatus.SUCCESSFUL,
    "failed": TaskResultStatus.FAILED,
    "cancelled": TaskResultStatus.FAILED,
}

_step: ContextVar[Step] = ContextVar("awaitly_postgres_step")


def step() -> Step:
    """Return the `Step` of the task that is running here, for durable steps.

    Raises:
        RuntimeError: no task is running, or not by this backend.
    """
    try:
        return _step.get()
    except LookupError:
        raise RuntimeError(
            "no task is running here: step() works only inside a task that resume_workflows runs "
            "for the backend awaitly_postgres.contrib.django.tasks.Backend"
        ) from None


class Backend(BaseTaskBackend):
    """Keeps tasks as durable runs. Each is a run ``task:<queue>:<random>``.

    ``OPTIONS`` may have ``database``, the alias in ``DATABASES``, and the options of `Durable`. A
    task that raises has failed, unless ``max_attempts`` or ``backoff`` allow retries. A task whose
    process died is run again in any case.

    Priorities are refused. All queues are worked through by ``resume_workflows``, and one of them
    with ``--prefix task:<queue>:``.
    """

    supports_defer = True
    supports_async_task = True
    supports_get_result = True

    def __init__(self, alias: str, params: Mapping[str, Any]) -> None:
        super().__init__(alias, params)
        self._durable_options = dict(self.options)
        self.database = self._durable_options.pop("database", "default")

    @cached_property
    def durable(self) -> Durable:
        """The `Durable` that runs the tasks.

        Raises:
            ImproperlyConfigured: ``OPTIONS`` are wrong, or the database is not PostgreSQL.
        """
        options = self._durable_options
        if not options.keys() & {"max_attempts", "backoff"}:
            options = {**options, "backoff": _never}
        try:
            durable = Durable(
                shared_store(self.database),
                transaction=partial(atomic, self.database),
                on_event=self._tell,
                **options,
            )
        except (TypeError, ValueError, ConnectionDoesNotExist) as error:
            raise ImproperlyConfigured(f"TASKS[{self.alias!r}]['OPTIONS']: {error}") from error
        durable.workflow(name=f"tasks.{self.alias}")(self._run)
        return durable

    # -- Django's API ------------------------------------------------------------------------

    def enqueue(self, task: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """Submit a run of ``task``, in the transaction that is open on its database, if any."""
        self.validate_task(task)
        now = _now()
        result = TaskResult(
            task=task,
            id=f"task:{task.queue_name}:{get_random_string(32)}",
            status=TaskResultStatus.READY,
            enqueued_at=_read(now),
            started_at=None,
            last_attempted_at=None,
            finished_at=None,
            args=args,
            kwargs=kwargs,
            backend=self.alias,
            errors=[],
            worker_ids=[],
        )
        run_after = _aware(task.run_after)
        metadata = {
            "task": task.module_path,
            "queue": task.queue_name,
            "enqueued_at": now,
            **({"run_after": run_after.isoformat()} if run_after else {}),
        }
        durable = self.durable.with_options(metadata=metadata, at=run_after)
        durable.submit(result.id, self._run, task.module_path, result.args, result.kwargs)
        task_enqueued.send(type(self), task_result=result)
        return result

    def get_result(self, result_id: str) -> Any:
        """Return the result of a task so far.

        Raises:
            TaskResultDoesNotExist: this backend has no task with this id.
        """
        conn = open_transaction(self.database)
        try:
            info = self.durable.get(str(result_id), conn=conn)
            stored = self.durable.store.load(str(result_id), conn=conn)
        except (ValueError, SnapshotFormatError):  # it cannot be an id of ours
            info = stored = None
        if info is None or stored is None or info.workflow != f"tasks.{self.alias}":
            raise TaskResultDoesNotExist(result_id)
        signals = (stored.metadata or {}).get("signals") or {}
        starts = {key: signals[key] for key in sorted(signals) if key.startswith(_STARTED)}
        errors = {key: signals[key] for key in sorted(signals) if key.startswith(_ERROR)}
        times = [_read(start["at"]) for start in starts.values()]
        path, args, kwargs = info.input["args"]
        result = TaskResult(
            task=self._task(info, path),
            id=info.id,
            status=_STATUSES.get(info.state, TaskResultStatus.READY),
            enqueued_at=_read(info.metadata.get("enqueued_at")),
            started_at=times[0] if times else None,
            last_attempted_at=times[-1] if times else None,
            finished_at=None,
            args=args,
            kwargs=kwargs,
            backend=self.alias,
            errors=[TaskError(**error) for error in errors.values()],
            worker_ids=[start["worker"] for start in starts.values()],
        )
        if result.is_finished:
            # By the server's clock, which may be behind the worker's.
            ended = max(filter(None, [*times, _read(info.updated_at.isoformat())]))
            object.__setattr__(result, "finished_at", ended)
            object.__setattr__(result, "_return_value", info.result)
            # It may have ended without raising: cancelled, or killed too often.
            was_noted = _ERROR + next(reversed(starts), "")[len(_STARTED) :] in errors
            if info.error is not None and not was_noted:
                result.errors.append(_task_error(info.error, info.traceback))
        return result

    def check(self, **kwargs: Any) -> Iterable[checks.CheckMessage]:
        """Check ``OPTIONS`` and that the app is installed."""
        setting = f"TASKS[{self.alias!r}]"
        if not apps.is_installed("awaitly_postgres.contrib.django"):
            yield checks.Error(
                f"{setting} keeps its tasks in tables that no migration makes.",
                hint='Add "awaitly_postgres.contrib.django" to INSTALLED_APPS.',
                id="awaitly.E001",
            )
        try:
            self.durable  # noqa: B018
        except ImproperlyConfigured as error:
            yield checks.Error(str(error), id="awaitly.E002")

    # -- the worker --------------------------------------------------------------------------

    def _run(self, step: Step, path: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """Call the task: the workflow of all runs of this backend."""
        id = str(step.workflow_id)
        result = self.get_result(id)
        start = {"worker": f"{socket.gethostname()}:{os.getpid()}", "at": _now()}
        number = f"{result.attempts + 1:06}"
        self.durable.signal(id, _STARTED + number, start)
        result.worker_ids.append(start["worker"])
        for name in ("started_at", "last_attempted_at"):
            if name != "started_at" or result.started_at is None:
                object.__setattr__(result, name, _read(start["at"]))
        object.__setattr__(result, "status", TaskResultStatus.RUNNING)
        task_started.send(type(self), task_result=result)
        context = [TaskContext(task_result=result)] if result.task.takes_context else []
        pid, token = os.getpid(), _step.set(_StepOfTask(step))
        try:
            return normalize_json(_contained(result.task.call)(*context, *args, **kwargs))
        except Exception as error:
            if os.getpid() == pid:
                left = error.__cause__ if isinstance(error, _Left) else None
                noted = _task_error(left or error)
                self.durable.signal(
                    id,
                    _ERROR + number,
                    {
                        "exception_class_path": noted.exception_class_path,
                        "traceback": noted.traceback,
                    },
                )
            raise
        finally:
            _step.reset(token)
            if os.getpid() != pid:
                _end_forked_child()

    def _tell(self, event: Event) -> None:
        """Send ``task_finished`` once the end is recorded."""
        if event.type in ("run_completed", "run_given_up"):
            task_finished.send(type(self), task_result=self.get_result(str(event.workflow_id)))

    def _task(self, info: RunInfo, path: str) -> Any:
        task = import_string(path)
        if not isinstance(task, Task):  # the row names something else: it is never called
            raise SuspiciousOperation(
                f"{info.id!r} names {path!r}, which is not a task and was not called; "
                "delete the run, or correct its row"
            )
        return task.using(
            queue_name=info.metadata.get("queue"),
            run_after=_read(info.metadata.get("run_after")),
            backend=self.alias,
        )


class _Left(Exception):
    """A task, or one of its steps, called ``sys.exit()``, which must not end the worker."""


class _StepOfTask(Step):
    """A `Step` in which ``sys.exit()`` is a failure of the step, as it is in a task.

    In a plain `Step` it ends the process. That would leave the task unfinished, and end every
    worker that runs it again.
    """

    def __init__(self, step: Step) -> None:
        vars(self).update(vars(step))

    def __call__(self, key: str, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        return super().__call__(key, _contained(fn), *args, **kwargs)

    def map(self, key: str, fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return super().map(key, _contained(fn), *args, **kwargs)

    def transaction(self, key: str, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        return super().transaction(key, _contained(fn), *args, **kwargs)


def _contained(fn: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap ``fn`` so that exceptions that would end the worker become ordinary ones."""

    @wraps(fn)
    def call(*args: Any, **kwargs: Any) -> Any:
        pid = os.getpid()
        try:
            return fn(*args, **kwargs)
        except (SystemExit, CancelledError) as error:
            if os.getpid() != pid:  # a forked child may exit
                raise
            raise _Left(f"the task raised {error!r}, which would have ended the worker") from error

    return call


def _end_forked_child() -> None:
    """End a child that the task forked and did not end: it must not become a second worker."""
    error = sys.exc_info()[1]
    if not isinstance(error, SystemExit):
        traceback.print_exc()
        raise SystemExit(1)


def _now() -> str:
    return datetime.now(timezone.utc).isoformat()


def _read(text: object) -> datetime | None:
    """Parse a stored time into Django's form: aware, or local with ``USE_TZ = False``."""
    time = read_time(text)
    return make_naive(time) if time is not None and not settings.USE_TZ else time


def _aware(time: datetime | None) -> datetime | None:
    return make_aware(time) if time is not None and is_naive(time) else time


def _never(error: Exception, attempt: int) -> None:
    """Give up: the ``backoff`` of tasks that are tried once."""


def _task_error(error: BaseException, text: str | None = None) -> Any:
    kind = type(error)
    return TaskError(
        exception_class_path=f"{kind.__module__}.{kind.__qualname__}",
        traceback=text or "".join(traceback.format_exception(error)),
    )
