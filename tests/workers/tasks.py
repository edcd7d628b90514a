"""Tasks for the tests of the backend."""

import builtins
import os
import signal
import sys
from asyncio import CancelledError
from pathlib import Path
from typing import Any

import psycopg
from django.db import connection

from awaitly_postgres.contrib.django.tasks import step

try:
    from django.tasks import TaskContext, task
except ImportError:
    from django_tasks import TaskContext, task


@task
def noop(*args: object, **kwargs: object) -> None:
    """Take anything."""


@task
async def noop_async(*args: object, **kwargs: object) -> None:
    """Take anything, as a coroutine."""


@task(queue_name="mail")
def meaning_of_life() -> int:
    """Return something."""
    return 42


@task
def shapes() -> Any:
    """Return what is JSON once it is normalized."""
    return {"pair": (1, 2), "bytes": b"text"}


@task
def fail(message: str) -> None:
    """Raise an exception that has a cause."""
    try:
        raise KeyError("cause")
    except KeyError as error:
        raise ValueError(message) from error


@task
def leave() -> None:
    """Do what a task must not do to its worker."""
    raise SystemExit("no more")


@task
def leave_in(where: str, kind: str) -> str:
    """Do that in a step: what is raised there is no ``Exception``."""

    def leave(*args: object) -> None:
        raise getattr(builtins, kind, CancelledError)("no more")

    def again(*args: object) -> str:
        return "again"

    body = leave if where not in left else again
    left.append(where)
    if where == "map":
        return step().map("leave", body, ["a"])[0]
    return {"step": step(), "transaction": step().transaction}[where]("leave", body)


left: list[str] = []  # where `leave_in` has been left


@task
def fork(how: str) -> list[object]:
    """Have a child that leaves by itself; return its exit status, and what a step returned."""

    def child() -> int:
        if pid := os.fork():
            return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # its traceback
        if how == "exit":
            sys.exit(7)
        if how == "raise":
            raise ValueError("in the child")
        return -1

    in_task = child()
    if in_task == -1:
        return []
    return [in_task, step()("child", child)]


@task
def unsupported() -> object:
    """Return what is not JSON."""
    return object()


@task(takes_context=True)
def context_of(context: TaskContext) -> list[object]:
    """Return what the context tells."""
    return [context.task_result.id, context.attempt, isinstance(context, TaskContext)]


@task
def in_steps(path: str, kill_in: str = "") -> list[str]:
    """Write a line to a file in each of three steps; the second can be the last of its worker."""

    def write(name: str) -> str:
        with Path(path).open("a") as file:
            file.write(f"{name}\n")
        if name == kill_in and Path(path).read_text().count(name) == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return name

    return [step()(name, write, name) for name in ("one", "two", "three")]


@task
async def in_steps_async() -> list[str]:
    """Have durable steps in a coroutine."""
    return [step()(name, str.upper, name) for name in ("one", "two")]


@task
def over_the_orm(name: str) -> int:
    """Have a step that commits with what the ORM writes."""

    def insert(conn: psycopg.Connection) -> int:
        from shop.models import Product

        assert connection.in_atomic_block
        return Product.objects.create(name=name, cents=1, stock=1).pk

    return step().transaction("insert", insert)


@task
def approve() -> str:
    """Wait for somebody."""
    return step().wait("approval")


NOT_A_TASK = len
