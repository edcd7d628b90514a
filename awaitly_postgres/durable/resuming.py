"""Resuming stored runs: one by its id, or all that are due."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from datetime import datetime
from typing import Any

from .. import _json
from .._checks import check_limit, moment
from ..errors import (
    AlreadyRunning,
    LeaseLost,
    SnapshotFormatError,
    StoreUnavailable,
    WorkflowCancelled,
    WorkflowDrift,
    WorkflowNotFound,
)
from ..store.rows import SnapshotInfo, is_input, read_time
from ..store.store import Infos
from .admission import ChangedMeanwhile, Found
from .options import Options
from .pending import Outcome, Queue
from .session import Session
from .workers import InProgress, Pass, Workers

_TAKEN = (ChangedMeanwhile, AlreadyRunning, LeaseLost, WorkflowCancelled)
_REFUSALS = (WorkflowDrift, SnapshotFormatError)  # of a run that was begun; no new step ran


class Resuming(Options):
    """The part of `Durable` that resumes stored runs."""

    def resume(self, id: str) -> Any:
        """Resume the run stored as ``id``, with its registered workflow and recorded input.

        It starts at once, even during the pause after a failure. A run that was given up starts
        again, too, and its attempts are counted from 1.

        Returns:
            what the workflow returned; for a completed run, its recorded output.

        Raises:
            WorkflowNotFound: no resumable run is stored as ``id``, or its workflow is not
                registered.
            whatever `run` raises.
        """
        # Checked first, because the run may be read on another connection.
        self._db.pool.refuse_to_run_here()
        session, found = self._resumable(id)
        return session.start(found)

    def try_resume(self, id: str) -> Outcome:
        """Resume ``id`` as `resume` does, but return an `Outcome` instead of raising.

        Returns:
            an `Outcome`: ``"skipped"`` if another process has the run or it was cancelled,
            ``"failed"`` with the error if the workflow raised or could not be started.

        Raises:
            StoreUnavailable: the database was away for longer than the store retries.
        """
        self._db.pool.refuse_to_run_here()
        return self._attempt(id)

    def resume_pending(
        self,
        *,
        prefix: str = "",
        limit: int = 100,
        workers: int = 1,
        on_progress: Callable[[Outcome], object] | None = None,
    ) -> list[Outcome]:
        """Resume the runs that are unfinished and due: submitted, crashed, failed, done sleeping.

        For cron. It resumes only runs of registered workflows whose lease no process holds, least
        recently updated first, or in random order while other workers compete for them. After a
        failure a run pauses for as long as its ``backoff`` says. A run that was started
        ``max_attempts`` times, and died each time without progress, is given up instead.

        Args:
            prefix: only ids that start with exactly this.
            limit: start at most this many runs. Runs that are skipped, given up, or refused because
                the code has changed do not count: otherwise they could keep others from ever
                starting.
            workers: run up to this many at once, in threads, with the context variables of the
                caller. The store's own pool grows to one connection per thread, plus one.
            on_progress: called in the caller's thread with each `Outcome` as it comes. If it
                raises, nothing more is started; the runs in progress end first, and are reported.

        Returns:
            one `Outcome` for each run tried. A run that fails does not stop the others.

        Raises:
            StoreUnavailable: the database was away for longer than the store retries.
            ValueError: ``limit`` or ``workers`` is not positive.
            whatever ``on_progress`` raises.
            KeyboardInterrupt: at once. Worker threads are abandoned: their runs record nothing more
                and can be taken over, while the code of their current steps keeps running.
        """
        check_limit(limit)
        pool = self._db.pool
        pool.refuse_to_run_here()
        if check_limit(workers, "workers") > 1:
            pool.make_room(workers + 1)  # one is for this thread
        names = list(self._workflows)
        pending = self.store.pending
        queue = Queue(
            lambda after, limit: pending(prefix, workflows=names, limit=limit, after=after)
        )
        crew = Workers(self._attempt_pending, workers, pool.leave_thread)
        return Pass(queue, crew, limit, on_progress).run()

    def list_pending(self, prefix: str = "", limit: int = 100) -> Infos:
        """List the runs that `resume_pending` would start now, least recently updated first.

        Args:
            prefix: only ids that start with exactly this.
            limit: list at most this many.

        Returns:
            a list of `SnapshotInfo`.
        """
        return self.store.pending(prefix, workflows=list(self._workflows), limit=limit)

    def _resumable(self, id: str, seen: datetime | None = None) -> tuple[Session, Found]:
        """Read the run without acquiring its lease, which costs more and would need a release.

        ``seen`` is the time of the row when it was listed as pending: raise if the run was written
        since, or if another process holds its lease. Both can still change before this process
        acquires the lease, so admission checks again under it.
        """
        rows = self._db.rows(self._sql.read_for_resume, {"id": self.store.key(id)})
        if seen is not None:
            if not rows or moment(rows[0][2]) != seen:
                raise ChangedMeanwhile(id)
            if rows[0][4] is not None:
                raise AlreadyRunning(id, rows[0][4], moment(rows[0][5]))
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

    def _attempt_pending(self, info: SnapshotInfo, in_progress: InProgress) -> Outcome:
        return self._attempt(info.id, info.updated_at, in_progress)

    def _attempt(
        self, id: str, seen: datetime | None = None, in_progress: InProgress = nullcontext
    ) -> Outcome:
        """Resume ``id``, unless it was written since it was ``seen`` as pending."""
        session: Session | None = None
        try:
            session, found = self._resumable(id, seen)
            with in_progress(session):
                result = session.start(found, automatic=seen is not None)
            return Outcome(id, "completed", result, None, session.attempts)
        except Exception as error:
            end = session and session.end
            attempts = session.attempts if session else 0
            if end == "run_suspended":
                return Outcome(id, "suspended", None, error, attempts)
            # A run recorded as failed is a failure even if the workflow itself raised one of these,
            # for instance from another store.
            if end != "run_failed":
                # If only one session was lost (its server process was terminated), that costs the
                # run that had it, which is due again after a pause, and no other.
                if isinstance(error, StoreUnavailable) and not (end and self._db.answers()):
                    raise
                if isinstance(error, _TAKEN):
                    return Outcome(id, "skipped", None, error, attempts)
            retry_at = self._retry_at(id) if session and not session.gave_up else None
            started = end == "run_failed" or (end and not isinstance(error, _REFUSALS))
            return Outcome(id, "failed", None, error, attempts, retry_at, bool(started))

    def _retry_at(self, id: str) -> datetime | None:
        rows = self._db.rows(self._sql.retry_at, {"id": self.store.key(id)})
        return read_time(rows[0][0]) if rows else None
