"""`Step`, the first argument of every workflow function.

A workflow is a function whose first parameter is a `Step`. Each ``step(key, fn, ...)`` runs
``fn`` once and records the outcome. When the workflow runs again over what is recorded, it gets the
same results, and no recorded step runs a second time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from datetime import datetime, timedelta
from typing import Any, Concatenate, ParamSpec, TypeVar

from .._checks import check_id, check_limit, check_moment, check_seconds
from ..errors import WorkflowError
from .map import Map
from .run import Run

A = TypeVar("A")
P = ParamSpec("P")
T = TypeVar("T")


class Step:
    """Runs the steps of a workflow, each under its own key. The first argument of the function.

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

        ``fn`` runs again if the process dies before the step is recorded. May be called from
        several threads of one run, but not inside another step.

        Args:
            key: the name of the step, unique within the run.
            fn: the function to call.
            args: its arguments. They are not recorded.
            kwargs: its keyword arguments, likewise.

        Returns:
            what a replay would return: the value after a round trip through JSON (and the codec).

        Raises:
            whatever ``fn`` raises, unchanged, after it is recorded as a failure; on replay the same
            class if it is loaded, else `StepFailed`.
            ValueError: the key is empty, has a NUL or more than 1,000 bytes.
        """
        return self._run.step(key, fn, lambda: fn(*args, **kwargs))

    def map(
        self,
        key: str,
        fn: Callable[[A], T],
        items: Iterable[A],
        *,
        workers: int = 8,
        name: Callable[[A], object] | None = None,
    ) -> list[T]:
        """Run ``fn(item)`` for each item as a step of its own, in threads.

        The steps are ``key[0]``, ``key[1]`` and so on, or ``key[<name(item)>]``. All of them are
        run, even if some fail. A resumed run repeats only what is not recorded, and failed items.
        Steps that end during a commit are committed together by the next one, so there are fewer
        commits than items.

        Each thread sees a copy of the caller's context variables. Ctrl-C, or whatever else ends the
        run, stops the map: no further item begins, and the map waits for those that have begun.

        Args:
            key: the name of the map, unique within the run.
            fn: called with one item. It may be called in several threads at once.
            items: the items; the same ones whenever the run is resumed. They are not recorded.
            workers: the number of threads, at most.
            name: returns a unique name for an item, used in the key of its step; None numbers them
                from 0. With names, the order of the items may change.

        Returns:
            The results in the order of the items, each as ``step(key, fn, item)`` returns it.

        Raises:
            the failure of the first item that failed, in the order of the items. A result that is
                not JSON (`NotSerializable`) is a failure of its item.
            DuplicateStepKey: two items have the same name. No item has begun.
            WorkflowDrift: a recorded item is missing, or there are more or fewer items than when
                the map was recorded. No item has begun.
            ValueError: a key is too long or has a NUL; ``workers`` is not positive.
        """
        check_limit(workers, "workers")
        check_id(key, "step key")
        given = list(items)
        names = range(len(given)) if name is None else [name(item) for item in given]
        keys = [check_id(f"{key}[{each}]", "step key") for each in names]
        return Map(self._run, key, fn, given, keys)(workers)

    def transaction(
        self,
        key: str,
        fn: Callable[Concatenate[Any, P], T],
        /,
        *args: P.args,
        **kwargs: P.kwargs,
    ) -> T:
        """Like ``step(key, fn, ...)``, but exactly once: what ``fn`` writes commits with the step.

        For durable runs only.

        Args:
            key: the name of the step, unique within the run.
            fn: called as ``fn(conn, ...)`` with a psycopg connection, inside a transaction that
                commits when it returns and is rolled back when it raises.
            args: its further arguments. They are not recorded.
            kwargs: its keyword arguments, likewise.

        Returns:
            what a replay would return, as for ``step(key, fn, ...)``.

        Raises:
            whatever ``fn`` or the commit raises, recorded as a failure.
            RuntimeError: ``fn`` rolled the transaction back itself.
            WorkflowError: the workflow runs in memory.
        """
        return self._run.step_transaction(key, fn, lambda conn: fn(conn, *args, **kwargs))

    def sleep(
        self,
        key: str,
        duration: float | timedelta | None = None,
        *,
        until: datetime | None = None,
    ) -> None:
        """Suspend the run until ``duration`` has passed since this step was first reached.

        No process waits for that: the caller of the run gets `WorkflowSuspended`, and
        `Durable.resume_pending` resumes the run when the time has come.

        Args:
            key: the name of the step, unique within the run.
            duration: seconds, or a timedelta; less than 1,000,000,000 seconds.
            until: an aware datetime, instead of a duration. Only its value when this step is first
                reached counts.

        Raises:
            TypeError: neither or both are given.
            ValueError: the duration is negative or too long; the datetime has no time zone.
        """
        if (duration is None) == (until is None):
            raise TypeError(f"step.sleep({key!r}) takes either a duration or until=, not both")
        if until is not None:
            end = check_moment(until, "until")
            self._run.sleep(key, lambda now: end)
        elif duration is not None:
            span = timedelta(seconds=check_seconds(duration))
            self._run.sleep(key, lambda now: now + span)

    def wait(self, key: str, *, timeout: float | timedelta | None = None) -> Any:
        """Suspend the run until ``Durable.signal(id, key, value)`` is called; return that value.

        As with `sleep`, no process waits. A signal may also come before the run gets here.

        Args:
            key: the name of the step, unique within the run.
            timeout: seconds, or a timedelta, from when this step was first reached, by the server's
                clock; None waits for ever.

        Raises:
            WaitTimedOut: no signal came in time; later ones are refused. This is recorded, so that
                a replay raises it, too. If the workflow does not catch it, the run is given up.
            ValueError: the timeout is negative or too long.
        """
        if timeout is None:
            return self._run.wait(key)
        return self._run.wait(key, timedelta(seconds=check_seconds(timeout, "timeout")))

    @property
    def workflow_id(self) -> str | None:
        """The id of the durable run; None in memory."""
        return self._run.id

    def idempotency_key(self, key: str) -> str:
        """Return ``"<workflow id>/<key>"``, for an API that accepts such a key.

        It stays the same however often the step is retried. A rewind with ``new_keys=True`` appends
        ``#1`` to it, the next such rewind ``#2``.

        Raises:
            WorkflowError: the workflow runs in memory, where it has no id.
        """
        if self.workflow_id is None:
            raise WorkflowError(
                f"there is no idempotency key for {key!r}: this workflow runs in memory and has no "
                "id. Run it with Durable.run(id, ...)"
            )
        generation = self._run.history.key_generation
        suffix = f"#{generation}" if generation else ""
        return f"{self.workflow_id}/{check_id(key, 'step key')}{suffix}"
