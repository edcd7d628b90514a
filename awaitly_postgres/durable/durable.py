"""`Durable`, the object users work with: registers workflows, and runs or submits them.

A new run begins with one statement that acquires the lease and stores its input. It records each
step with one statement, and ends with one that stores the output, folds the journal and releases
the lease. Each start of a run is a `Session`.
"""

from __future__ import annotations

import copy
import typing
from collections.abc import Callable, Mapping
from datetime import datetime, timedelta
from types import EllipsisType
from typing import Any, Concatenate, ParamSpec, TypeVar, overload

from .._checks import check_id, check_moment, check_seconds
from ..workflow.step import Step
from ..workflow.workflow import name_of
from .checking import Checking
from .looking import Looking
from .options import check_metadata, check_retry_options
from .pending import Backoff
from .registry import Entry, OnVersionMismatch
from .resuming import Resuming
from .rewinding import Rewinding
from .session import Session
from .steering import Steering
from .submitting import Submitting

P = ParamSpec("P")
T = TypeVar("T")
F = TypeVar("F", bound=Callable[..., Any])


class Durable(Submitting, Resuming, Looking, Steering, Rewinding, Checking):
    """Runs workflows whose recorded steps survive the process, one process at a time per id.

    Args:
        store: the `SnapshotStore` that stores the runs.
        lock_ttl: seconds after which another process can take over from one that died.
        codec: converts arguments and results to JSON and back.
        on_event: called with an `Event` whenever a run or a step starts, ends or is replayed; its
            errors are logged.
        on_complete: ``"delete"`` deletes a run when it completes; its id can then run again.
        on_drift: ``"ignore"`` lets new steps run before all recorded ones were asked for.
        max_attempts: a run is given up when it has been started this often without progress; None
            sets no limit.
        backoff: a function of the error and the attempt (counted from 1) that returns how long a
            failed run pauses, in seconds or as a timedelta, or None to give it up. Default: 1 s,
            2 s, 4 s ... up to 1 h.
        metadata: a mapping of JSON values, stored with every run started here.
        transaction: opens the transactions of ``step.transaction``: a function that returns a
            context manager which yields a psycopg connection and commits on exit. Default: a
            connection of the store's pool.

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
        """Register a workflow function, so that its runs can be resumed. For use as a decorator.

        Args:
            fn: the function; its first parameter is a `Step`.
            name: the name its runs are stored under (default: the function's name). Keep it when
                you rename the function.
            version: increase it when the steps change.
            on_version_mismatch: what to do with an unfinished run of another version: ``"error"``
                raises `VersionMismatch`, ``"clear"`` starts it afresh, and a function is called
                with the stored snapshot and this version, and returns the snapshot to resume from.
            max_attempts: as for `Durable`, for runs of this workflow (default: that of `Durable`).
            backoff: as for `Durable`, for runs of this workflow (default: that of `Durable`).

        Returns:
            the function, unchanged.

        Raises:
            ValueError: another function is registered under that name; an option is wrong.
            TypeError: the version is not an integer, or the name not a string; the function is
                async, a generator, or does not take a `Step`.
        """
        if name is not None:
            check_id(name, "name")
        if not isinstance(version, int) or isinstance(version, bool):
            raise TypeError(f"version must be an integer, not {version!r}")
        if on_version_mismatch not in ("error", "clear") and not callable(on_version_mismatch):
            raise ValueError(
                "on_version_mismatch must be 'error', 'clear' or a function, "
                f"not {on_version_mismatch!r}"
            )
        check_retry_options(
            None if isinstance(max_attempts, EllipsisType) else max_attempts, backoff
        )

        def register(fn: F) -> F:
            rules = (version, on_version_mismatch, max_attempts, backoff)
            self._workflows.add(Entry(name_of(fn) if name is None else name, fn, *rules))
            return fn

        return register if fn is None else register(fn)

    def with_options(
        self,
        *,
        metadata: Mapping[str, Any] | None = None,
        delay: float | timedelta | None = None,
        at: datetime | None = None,
    ) -> Durable:
        """Return a `Durable` for the next `run` or `submit`; it shares the store and the workflows.

        Args:
            metadata: stored with the run, added to the ``metadata`` of this `Durable`.
            delay: seconds, or a timedelta, from `submit` until the run is due, by the server's
                clock.
            at: an aware datetime, before which the run is not due.

        Raises:
            TypeError: both ``delay`` and ``at`` are given; the metadata is not a mapping.
            ValueError: the delay is negative or too long; the datetime has no time zone.
            NotSerializable: the metadata is not JSON.

        Example:
            >>> durable.with_options(delay=60).submit("mail-7", mail, 7)  # doctest: +SKIP
        """
        if delay is not None and at is not None:
            raise TypeError("with_options() takes delay= or at=, not both")
        other = copy.copy(self)
        if metadata is not None:
            check_metadata(metadata)
            other.metadata = {**self.metadata, **metadata}
        if delay is not None:
            other._delay, other._at = check_seconds(delay, "delay"), None
        if at is not None:
            other._delay, other._at = None, check_moment(at, "at")
        return other

    # -- running ---------------------------------------------------------------------------

    def run(
        self, id: str, fn: Callable[Concatenate[Step, P], T], /, *args: P.args, **kwargs: P.kwargs
    ) -> T:
        """Run ``fn`` under ``id``, or resume that run, or return its recorded output.

        Arguments and result make a round trip through JSON (and the codec) on the first run too, so
        that it sees what a resumed run would see.

        Args:
            id: the id of the run; at most 1,000 bytes with the store's prefix.
            fn: the workflow function, called with a `Step` and the arguments. If it is not
                registered, only `run` with the same function can continue the run.
            args: its arguments; part of the run's identity.
            kwargs: its keyword arguments, likewise.

        Returns:
            what ``fn`` returned, now or when the run completed.

        Raises:
            whatever the workflow raises; the run is then recorded as failed and can be resumed,
                even if it was given up.
            AlreadyRunning: another process is running it.
            WorkflowConflict: the id belongs to another workflow or input.
            VersionMismatch, WorkflowDrift: the code has changed; nothing was erased.
            WorkflowSuspended: the run waits for a time or a signal.
            WorkflowCancelled: the run was cancelled.
            LeaseLost: this process stalled past ``lock_ttl`` and another took over, or the database
                has lost steps it had recorded.
            StoreUnavailable: the database was away for longer than the store retries.
            NotSerializable: an argument or a result is not JSON; it was not recorded.
            TypeError: ``fn`` does not take these arguments, or ``with_options`` has set a delay;
                nothing was stored.
            ValueError: another function is registered under the name of ``fn``.
        """
        if self._delay is not None or self._at is not None:
            raise TypeError(
                f"run({id!r}) starts at once, without delay: use submit() with delay= or at="
            )
        entry = self._workflows.of(fn)
        session = Session(self, id, entry, entry.encode_call(id, self.codec, args, kwargs))
        return typing.cast(T, session.start())
