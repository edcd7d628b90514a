"""Durable runs: lease, load, workflow, checkpoint, release.

A run begins with one statement that takes the lease and stores its input, records each step with
one, and ends with one that stores the output, folds the journal and gives the lease back.
`Durable` is what the user holds; each run is a `Session`.
"""

from __future__ import annotations

import typing
from collections.abc import Callable, Mapping, Sequence
from types import EllipsisType
from typing import Any, Concatenate, ParamSpec, TypeVar, overload

from attrs import define

from ..errors import WorkflowNotFound
from ..store.database import Connection
from ..workflow.codec import encode
from ..workflow.step import Step
from ..workflow.workflow import name_of
from .options import check_verdicts
from .pending import Backoff
from .registry import Entry, OnVersionMismatch
from .resuming import Resuming
from .session import Session
from .steering import Steering

P = ParamSpec("P")
T = TypeVar("T")
F = TypeVar("F", bound=Callable[..., Any])


@define(eq=False, slots=False)
class Durable(Resuming, Steering):
    """Runs workflows so that each step survives the process, one process at a time per id.

    Args:
        store: where the state lives.
        lock_ttl: seconds after which another process may take over from one that died.
        codec: turns arguments and results into JSON and back.
        on_event: called with an `Event` at every turn; its errors are logged.
        on_complete: ``"delete"`` forgets a run when it completes; its id can then run again.
        on_drift: ``"ignore"`` lets new steps run before all recorded ones were asked for.
        max_attempts: a run is given up when it has been started this many times without getting
            further; None: never.
        backoff: says how long a run pauses that has failed: a function of the error and the number
            of the attempt (from 1) that returns seconds or a timedelta, or None to give the run
            up. Default: 1 s, 2 s, 4 s ... 1 h.
        metadata: stored with every run started here.
        transaction: opens the transactions of ``step.transaction``: a context manager that gives a
            psycopg connection and commits when it closes. Default: one of the store's connections.

    Example:
        >>> with postgres("embedded") as store:                          # doctest: +SKIP
        ...     durable = Durable(store)
        ...     @durable.workflow(version=1)
        ...     def checkout(step: Step, user_id: str) -> dict: ...
        ...     durable.run("checkout-123", checkout, "123")
    """

    # -- workflows -------------------------------------------------------------------------

    @overload
    def workflow(self, fn: F, /) -> F: ...

    @overload
    def workflow(
        self,
        fn: None = None,
        /,
        *,
        name: str | None = None,
        version: int = 1,
        on_version_mismatch: OnVersionMismatch = "error",
        max_attempts: int | EllipsisType | None = ...,
        backoff: Backoff | None = None,
    ) -> Callable[[F], F]: ...

    def workflow(
        self,
        fn: F | None = None,
        /,
        *,
        name: str | None = None,
        version: int = 1,
        on_version_mismatch: OnVersionMismatch = "error",
        max_attempts: int | EllipsisType | None = ...,
        backoff: Backoff | None = None,
    ) -> F | Callable[[F], F]:
        """Register a workflow function, so that its runs can be resumed; returns it unchanged.

        Args:
            fn: the function; its first parameter is a `Step`.
            name: what its runs are stored under (default: the function's name). Keep it when you
                rename the function.
            version: raise it when the steps change.
            on_version_mismatch: what to do with unfinished state of another version: ``"error"``,
                ``"clear"`` (start afresh), or a function of the snapshot and the version wanted
                that returns the snapshot to go on from.
            max_attempts: as of `Durable`, for the runs of this workflow (default: as there).
            backoff: as of `Durable`, for the runs of this workflow (default: as there).
        """
        if not isinstance(version, int) or isinstance(version, bool):
            raise TypeError(f"version must be an integer, not {version!r}")
        if on_version_mismatch not in ("error", "clear") and not callable(on_version_mismatch):
            raise ValueError("on_version_mismatch must be 'error', 'clear' or a function")
        check_verdicts(None if isinstance(max_attempts, EllipsisType) else max_attempts, backoff)

        def register(fn: F) -> F:
            rules = (version, on_version_mismatch, max_attempts, backoff)
            self._workflows.add(Entry(name or name_of(fn), fn, *rules))
            return fn

        return register if fn is None else register(fn)

    # -- running ---------------------------------------------------------------------------

    def run(
        self, id: str, fn: Callable[Concatenate[Step, P], T], /, *args: P.args, **kwargs: P.kwargs
    ) -> T:
        """Run ``fn`` under ``id``, or resume it, or return what it returned before.

        The function gets its arguments, and the caller the result, as a resume would: after a
        round trip through JSON (and the codec).

        Raises:
            whatever the workflow raises; the run is then recorded as failed and can be resumed,
                even if it was given up.
            AlreadyRunning: another process has it.
            WorkflowConflict: the id belongs to another workflow or input.
            VersionMismatch, WorkflowDrift: the code has changed; nothing ran.
            LeaseLost: this process stalled past ``lock_ttl`` and another took over.
            StoreUnavailable: the database went away for longer than the store retries.
            NotSerializable: an argument or a result is not JSON; nothing of it was recorded.
            TypeError: ``fn`` does not take these arguments; nothing was stored.
        """
        session = self._session_for(id, self._workflows.of(fn), args, kwargs)
        return typing.cast(T, session.start())

    def submit(
        self,
        id: str,
        fn: Callable[..., Any],
        /,
        *args: Any,
        conn: Connection | None = None,
        **kwargs: Any,
    ) -> bool:
        """Accept a run without starting it: `resume_pending` will.

        Args:
            id: what to run it as.
            fn: the workflow function.
            args: its arguments.
            conn: join the transaction of this connection: accepted when it commits.

        Returns:
            True if it is new, False if the same run is there already.

        Raises:
            WorkflowConflict: the id belongs to another workflow or input.
            WorkflowNotFound: ``fn`` is not registered, so nothing could resume it.
            TypeError: ``fn`` does not take these arguments.
        """
        entry = self._workflows.of(fn)
        session = self._session_for(id, entry, args, kwargs)
        if entry not in self._workflows.values():
            raise WorkflowNotFound(id, entry.name)
        return session.submit(conn)

    def _session_for(
        self, id: str, entry: Entry, args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> Session:
        """Make a session for a call; raise TypeError, as the call itself would, if it is wrong."""
        entry.check_call(args, kwargs)
        return Session(self, id, entry, self._input(args, kwargs))

    def _input(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> str:
        return encode(self.codec, {"args": list(args), "kwargs": dict(kwargs)}, "the input")
