"""Finishing what is stored: one run by its id, or all that are due."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime
from typing import Any

from attrs import define

from .. import _json
from .._checks import check_limit, moment
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
from ..store.rows import SnapshotInfo, is_input, read_time
from ..store.store import Infos
from .admission import Found, NoStartsLeft, TouchedMeanwhile
from .options import Options
from .pending import Outcome, Queue
from .session import Session

_TAKEN = (TouchedMeanwhile, AlreadyRunning, LeaseLost, WorkflowCancelled)
_REFUSALS = (VersionMismatch, WorkflowDrift, SnapshotFormatError, NoStartsLeft)  # nothing has run


@define(eq=False, slots=False)
class Resuming(Options):
    """The part of `Durable` that takes up stored runs."""

    def resume(self, id: str) -> Any:
        """Finish the run stored as ``id`` with the registered workflow and its recorded input.

        Ignores the pause after a failure, and starts one that was given up, its attempts counted
        afresh. Returns the recorded output of a completed one.

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
        pauses, as ``backoff`` says. One that died ``max_attempts`` times without getting further is
        given up.

        Args:
            prefix: only ids that start with exactly this.
            limit: run at most so many. What another process has, what is refused because the code
                has changed, and what is given up unstarted does not count: it must not block the
                rest for ever.
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

    def list_pending(self, prefix: str = "", limit: int = 100) -> Infos:
        """List what `resume_pending` would take up now, the longest untouched first."""
        return self._pending(prefix, limit, list(self._workflows))

    def _resumable(self, id: str, seen: datetime | None = None) -> tuple[Session, Found]:
        """Look ``id`` up: a look costs less than a lease that has to be given back.

        With the time at which it was ``seen`` as pending, raise if it no longer is.
        """
        rows = self.store._db.rows(self.store._sql.read_for_resume, {"id": self.store.key(id)})
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
        return Session(self, id, entry, _json.dumps(input)), found

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
            retry_at = self._retry_at(id) if session and not session.gave_up else None
            return Outcome(id, "failed", None, error, attempts, retry_at)

    def _retry_at(self, id: str) -> datetime | None:
        rows = self.store._db.rows(self.store._sql.retry_at, {"id": self.store.key(id)})
        return read_time(rows[0][0]) if rows else None
