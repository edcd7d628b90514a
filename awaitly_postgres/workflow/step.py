"""`Step`, what a workflow function receives first.

A workflow is a function whose first parameter is a `Step`. Each ``step(key, fn, ...)`` runs
``fn`` once and records what came out; run again over what is recorded, the function gets the same
answers without anything running a second time.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any, Concatenate, ParamSpec, TypeVar

from .._checks import check_id, check_seconds
from ..errors import WorkflowError
from .run import Run

P = ParamSpec("P")
T = TypeVar("T")


class Step:
    """What a workflow function receives first: runs its steps, each under a key of its own.

    Example:
        >>> from awaitly_postgres import Step, Workflow
        >>> def checkout(step: Step, user_id: str) -> str:
        ...     name = step("fetch-user", str.upper, user_id)
        ...     return step("greet", "hello {}".format, name)
        >>> Workflow(checkout)("ada")
        'hello ADA'
    """

    def __init__(self, run: Run) -> None:
        self._run = run

    def __call__(self, key: str, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
        """Return the result recorded under ``key``, or call ``fn`` and record it.

        The result is what a replay would return: the value after a round trip through JSON (and
        the codec). ``fn`` may run again if the process dies before the step is recorded. May be
        called from several threads of one run.

        Raises:
            whatever ``fn`` raises, recorded as a failure and unchanged; on replay the same class
            if it is loaded, else `StepFailed`.
            ValueError: the key is empty, has a NUL or more than 1,000 bytes.
        """
        return self._run.step(key, fn, lambda: fn(*args, **kwargs))

    def transaction(
        self,
        key: str,
        fn: Callable[Concatenate[Any, P], T],
        /,
        *args: P.args,
        **kwargs: P.kwargs,
    ) -> T:
        """Like ``step(key, fn, ...)``, exactly once: what ``fn`` writes commits with the step.

        ``fn(conn, ...)`` gets a psycopg connection inside a transaction. For durable runs only.
        """
        return self._run.step_transaction(key, fn, lambda conn: fn(conn, *args, **kwargs))

    def sleep(self, key: str, duration: float | timedelta) -> None:
        """Suspend the run, and let it go on ``duration`` (seconds) after this was first reached.

        Nothing waits meanwhile: the process gets `WorkflowSuspended`, and `Durable.resume_pending`
        takes the run up when its time has come.
        """
        self._run.sleep(key, timedelta(seconds=check_seconds(duration)))

    def wait(self, key: str) -> Any:
        """Suspend the run until ``Durable.signal(id, key, value)``, and return that value."""
        return self._run.wait(key)

    @property
    def workflow_id(self) -> str | None:
        """The id of the durable run; None in memory."""
        return self._run.id

    def idempotency_key(self, key: str) -> str:
        """Return ``"<workflow id>/<key>"``, for an API that accepts such a key.

        It stays the same however often the step is tried.
        """
        if self.workflow_id is None:
            raise WorkflowError("an in-memory workflow has no id; use Durable.run(id, ...)")
        return f"{self.workflow_id}/{check_id(key, 'step key')}"
