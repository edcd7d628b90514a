"""Durable runs: lease, load, workflow, checkpoint, release.

A run begins with one statement that takes the lease and stores its input, records each step with
one, and ends with one that stores the output, folds the journal and gives the lease back.
`Durable` is what the user holds; each run is a `Session`.
"""

from __future__ import annotations

import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime
from typing import Any, Concatenate, Literal, ParamSpec, TypeVar, overload

from attrs import define, field

from .. import _json
from .._checks import OnDrift, check_id, check_limit, check_on_drift, check_ttl, moment
from ..errors import (
    AlreadyRunning,
    LeaseLost,
    SnapshotFormatError,
    StoreUnavailable,
    VersionMismatch,
    WorkflowCancelled,
    WorkflowDrift,
    WorkflowNotFound,
)
from ..snapshot import timestamp
from ..store.database import Connection, execute, fetch
from ..store.lease import DEFAULT_TTL
from ..store.rows import SnapshotInfo, is_input
from ..store.store import Infos, SnapshotStore
from ..workflow.codec import Codec, encode
from ..workflow.event import OnEvent
from ..workflow.step import Step
from ..workflow.workflow import name_of
from .admission import Found, TouchedMeanwhile
from .pending import Outcome, Queue
from .registry import Entry, OnVersionMismatch, Registry
from .session import Policy, Session
from .transaction import OpenTransaction

P = ParamSpec("P")
T = TypeVar("T")
F = TypeVar("F", bound=Callable[..., Any])

_TAKEN = (TouchedMeanwhile, AlreadyRunning, LeaseLost, WorkflowCancelled)
_REFUSALS = (VersionMismatch, WorkflowDrift, SnapshotFormatError)  # nothing has run


@define(eq=False)
class Durable:
    """Runs workflows so that each step survives the process, one process at a time per id.

    Args:
        store: where the state lives.
        lock_ttl: seconds after which another process may take over from one that died.
        codec: turns arguments and results into JSON and back.
        on_event: called with an `Event` at every turn; its errors are logged.
        on_complete: ``"delete"`` forgets a run when it completes; its id can then run again.
        on_drift: ``"ignore"`` lets new steps run before all recorded ones were asked for.
        max_attempts: `resume_pending` skips runs already started this many times; None: never.
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

    store: SnapshotStore
    lock_ttl: float = field(default=DEFAULT_TTL, kw_only=True, converter=check_ttl)
    codec: Codec | None = field(default=None, kw_only=True)
    on_event: OnEvent | None = field(default=None, kw_only=True)
    on_complete: Literal["keep", "delete"] = field(default="keep", kw_only=True)
    on_drift: OnDrift = field(default="error", kw_only=True)
    max_attempts: int | None = field(default=100, kw_only=True)
    metadata: Mapping[str, Any] = field(factory=dict, kw_only=True)
    transaction: OpenTransaction | None = field(default=None, kw_only=True)
    _workflows: Registry = field(factory=Registry, init=False, repr=False)

    def __attrs_post_init__(self) -> None:
        check_on_drift(self.on_drift)
        if self.on_complete not in ("keep", "delete"):
            raise ValueError(f"on_complete must be 'keep' or 'delete', not {self.on_complete!r}")
        if self.max_attempts is not None:
            check_limit(self.max_attempts, "max_attempts")
        encode(None, self.metadata, "metadata=")

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
    ) -> Callable[[F], F]: ...

    def workflow(
        self,
        fn: F | None = None,
        /,
        *,
        name: str | None = None,
        version: int = 1,
        on_version_mismatch: OnVersionMismatch = "error",
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
        """
        if not isinstance(version, int) or isinstance(version, bool):
            raise TypeError(f"version must be an integer, not {version!r}")
        if on_version_mismatch not in ("error", "clear") and not callable(on_version_mismatch):
            raise ValueError("on_version_mismatch must be 'error', 'clear' or a function")

        def register(fn: F) -> F:
            self._workflows.add(Entry(name or name_of(fn), fn, version, on_version_mismatch))
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
            whatever the workflow raises; the run is then recorded as failed and can be resumed.
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

    def resume(self, id: str) -> Any:
        """Finish the run stored as ``id`` with the registered workflow and its recorded input.

        Ignores the pause after a failure. Returns the recorded output of a completed one.

        Raises:
            WorkflowNotFound: nothing is stored there, or its workflow is not registered.
            and what `run` raises.
        """
        session, found = self._resumable(id)
        return session.start(found)

    def try_resume(self, id: str) -> Outcome:
        """Resume ``id`` as `resume` does, and return what came of it instead of raising.

        Returns:
            an `Outcome`: ``"skipped"`` if another process has it or it was cancelled, ``"failed"``
            with the error if the workflow raised one or could not be started.

        Raises:
            StoreUnavailable: the database went away.
        """
        return self._attempt(id)

    def resume_pending(
        self,
        *,
        prefix: str = "",
        limit: int = 100,
        on_progress: Callable[[Outcome], object] | None = None,
    ) -> list[Outcome]:
        """Finish what is unfinished and due: crashed, failed, submitted. For cron.

        Takes the registered workflows only, and those that nobody holds the lease of: the longest
        untouched first, in a random order where other workers are at it too. After a failure a run
        pauses for 1 s, 2 s, 4 s ... 1 h.

        Args:
            prefix: only ids that start with exactly this.
            limit: run at most so many. What another process has, and what is refused because the
                code has changed, does not count: it must not block the rest for ever.
            on_progress: called with each `Outcome` as it comes.

        Returns:
            one `Outcome` for each; failures are among them and do not stop the rest.

        Raises:
            StoreUnavailable: the database went away.
        """
        check_limit(limit)
        names = list(self._workflows)
        queue = Queue(lambda behind, length: self._pending(prefix, length, names, behind))
        outcomes: list[Outcome] = []
        ran = 0
        for info in queue:
            outcome = self._attempt(info.id, info.updated_at)
            outcomes.append(outcome)
            if on_progress is not None:
                on_progress(outcome)
            if outcome.status == "skipped":
                queue.somebody_was_faster()
            ran += outcome.status != "skipped" and not isinstance(outcome.error, _REFUSALS)
            if ran == limit:
                break
        return outcomes

    # -- state -----------------------------------------------------------------------------

    def list_pending(self, prefix: str = "", limit: int = 100) -> Infos:
        """List what `resume_pending` would take up now, the longest untouched first."""
        return self._pending(prefix, limit, list(self._workflows))

    def has_state(self, id: str) -> bool:
        """Tell whether anything is stored as ``id``."""
        return bool(self.store._db.rows(self.store._sql.exists, {"id": self.store.key(id)}))

    def delete_state(self, id: str) -> bool:
        """Forget the run stored as ``id``; tell whether there was one.

        One that is running goes on, and stores its state again when it ends.
        """
        return self.store.delete(id)

    def delete_states(self, ids: Iterable[str]) -> int:
        """Forget these runs; return how many there were."""
        return self.store.delete_many(ids)

    def clear_state(self) -> int:
        """Forget everything in the store (under its prefix); return how much there was."""
        return self.store._clear()

    def signal(self, id: str, key: str, value: Any) -> bool:
        """Answer ``step.wait(key)`` of the run stored as ``id``; it may not have come there yet.

        Returns:
            True if the answer is taken; False if there is no such unfinished run, or it has one.
        """
        sql = self.store._sql
        value_json = encode(self.codec, value, f"the signal for step {key!r}")
        params = {
            "id": self.store.key(id),
            "key": check_id(key, "step key"),
            "value": value_json,
        }
        tries = 0

        def send(conn: Connection) -> bool:
            nonlocal tries
            tries += 1
            if execute(conn, sql.signal, params):
                return True
            # An earlier try may have done it, and only its reply was lost.
            taken = fetch(conn, sql.signal_for, params) if tries > 1 else []
            return bool(taken) and _json.as_stored(taken[0][0]) == _json.as_stored(value_json)

        return self.store._db.run(send)

    def cancel(self, id: str) -> bool:
        """End the run stored as ``id`` for good; tell whether there was an unfinished one.

        If it is running, its next step is refused and its caller gets `WorkflowCancelled`.
        """
        now = timestamp()
        ended = {"status": "failed", "lastUpdated": now, "completedAt": now}
        params = {
            "id": self.store.key(id),
            "execution": _json.dumps(ended),
            "metadata": _json.dumps({"cancelledAt": now}),
        }
        sql = self.store._sql

        def work(conn: Connection) -> bool:
            fetch(conn, sql.lock_lease_row, params)
            return bool(fetch(conn, sql.cancel, params))

        return self.store._db.told(work)

    # -- inside ----------------------------------------------------------------------------

    def _session_for(
        self, id: str, entry: Entry, args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> Session:
        """Make a session for a call; raise TypeError, as the call itself would, if it is wrong."""
        entry.check_call(args, kwargs)
        return self._session(id, entry, self._input(args, kwargs))

    def _input(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> str:
        return encode(self.codec, {"args": list(args), "kwargs": dict(kwargs)}, "the input")

    def _session(self, id: str, entry: Entry, input: str) -> Session:
        policy = Policy(
            self.lock_ttl,
            self.codec,
            self.on_event,
            self.on_complete,
            self.on_drift,
            self.metadata,
            self.transaction,
        )
        return Session(self.store, policy, id, entry, input)

    def _resumable(self, id: str, seen: datetime | None = None) -> tuple[Session, Found]:
        """Look ``id`` up: a look costs less than a lease that has to be given back.

        With the time at which it was ``seen`` as pending, raise if it no longer is.
        """
        rows = self.store._db.rows(self.store._sql.look, {"id": self.store.key(id)})
        if seen is not None:
            if not rows or moment(rows[0][2]) != seen:
                raise TouchedMeanwhile(id)
            if rows[0][3] is not None:
                raise AlreadyRunning(id, rows[0][3], moment(rows[0][4]))
        if not rows:
            raise WorkflowNotFound(id)
        found = Found.of(id, rows[0])
        metadata = found.snapshot.metadata or {}
        name, input = metadata.get("workflow"), metadata.get("input")
        if not isinstance(name, str) or not is_input(input):
            raise WorkflowNotFound(id)
        entry = self._workflows.get(name)
        if entry is None:
            raise WorkflowNotFound(id, name)
        return self._session(id, entry, _json.dumps(input)), found

    def _pending(
        self,
        prefix: str,
        limit: int,
        workflows: list[str] | None,
        behind: SnapshotInfo | None = None,
    ) -> Infos:
        return self.store.pending(
            prefix,
            workflows=workflows,
            max_attempts=self.max_attempts,
            limit=limit,
            after=behind,
        )

    def _attempt(self, id: str, seen: datetime | None = None) -> Outcome:
        """Resume ``id``, unless somebody has touched it since it was ``seen`` as pending."""
        session: Session | None = None
        try:
            session, found = self._resumable(id, seen)
            result = session.start(found, as_it_was=seen is not None)
            return Outcome(id, "completed", result, None, session.attempts)
        except Exception as error:
            end = session and session.end
            attempts = session.attempts if session else 0
            if end == "run_suspended":
                return Outcome(id, "suspended", None, error, attempts)
            # What a failed run has raised is its own affair, even if it looks like one of these.
            if end != "run_failed":
                if isinstance(error, StoreUnavailable):
                    raise
                if isinstance(error, _TAKEN):
                    return Outcome(id, "skipped", None, error, attempts)
            return Outcome(id, "failed", None, error, attempts)
