"""Reading stored runs: one with its steps, a listing, or the result of another process."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from datetime import timedelta
from typing import Any

from attrs import evolve

from .._checks import check_limit, check_seconds
from ..errors import WorkflowCancelled, WorkflowError, WorkflowNotFound
from ..snapshot import WorkflowSnapshot
from ..store.database import Connection
from ..store.rows import (
    RunInfo,
    State,
    StepInfo,
    decode_snapshot,
    in_state,
    maps_of,
    page_after,
    steps_of,
)
from ..store.text import traceback_of
from ..workflow import failure as _failure
from ..workflow.codec import decode
from .options import Options, check_metadata

RunInfos = list[RunInfo]  # inside Durable, ``list`` is a method

_ENDED = ("completed", "failed", "cancelled")
_POLL = 0.05, 1.0  # seconds between two reads of a run that has not ended: at first, at most


class Looking(Options):
    """The part of `Durable` that reads stored runs and changes nothing."""

    def get(self, id: str, *, conn: Connection | None = None) -> RunInfo | None:
        """Return the run stored as ``id`` with its steps, or None if there is none.

        Its result is decoded as `run` would return it, if its workflow is registered here; the
        values of its steps are JSON, as stored. Errors are exceptions of their own class if that is
        loaded, else `StepFailed`.

        Args:
            id: the id of the run.
            conn: a psycopg connection; the run is read in its transaction.

        Raises:
            SnapshotFormatError: the document is not a snapshot, or the codec cannot decode it.
        """
        return self._read(id, self._db.joined(conn))

    def _read(self, id: str, conn: Connection | None = None) -> RunInfo | None:
        store = self.store
        rows = self._db.rows(self._sql.get, {"id": store.key(id)}, conn)
        if not rows:
            return None
        *columns, text, journal = rows[0]
        snapshot = decode_snapshot(id, text, journal)
        info = RunInfo.from_columns(columns, store.prefix)
        steps = tuple(_with_error(step, snapshot) for step in steps_of(snapshot))
        metadata = snapshot.metadata or {}
        info = evolve(info, steps=steps, step_count=len(steps), maps=maps_of(steps))
        info = evolve(info, input=metadata.get("input"))
        if info.state == "completed":
            return evolve(info, result=self._result(info, metadata.get("output")))
        if info.state == "cancelled":
            return evolve(info, error=WorkflowCancelled(id))
        failure = metadata.get("refusal", metadata.get("failure"))  # the later one
        if not isinstance(failure, Mapping):
            return info
        return evolve(
            info,
            error=_failure.run_from_json(str(metadata.get("lastStepKey", "")), failure),
            traceback=traceback_of(failure),
            cause=failure,
        )

    def list(
        self,
        prefix: str = "",
        *,
        workflow: str | None = None,
        state: State | None = None,
        metadata: Mapping[str, Any] | None = None,
        limit: int = 100,
        after: RunInfo | None = None,
    ) -> RunInfos:
        """List stored runs, newest first, without their payloads and steps.

        Args:
            prefix: only ids that start with exactly this.
            workflow: only runs of the workflow with this name.
            state: only runs in this state, one of the states of `RunInfo`.
            metadata: only runs whose metadata contains this, as JSONB's ``@>`` does. All contain
                the empty mapping.
            limit: at most this many.
            after: the last entry of the previous page; None starts with the newest run.

        Raises:
            ValueError: the state is unknown, or the limit is not positive.
            TypeError: ``after`` is not an entry of a listing; the metadata is not a mapping.
        """
        store = self.store
        params = {
            **store._range(prefix),
            "workflow": workflow,
            "metadata": None if metadata in (None, {}) else check_metadata(metadata),
            **in_state(state),
            "limit": check_limit(limit),
            **page_after(after, store.prefix),
        }
        rows = store._listed(self._sql.runs, params)
        return [RunInfo.from_columns(row, store.prefix) for row in rows]

    def result(self, id: str, *, timeout: float | timedelta | None = None) -> Any:
        """Wait until the run stored as ``id`` has ended; return its result, or raise its error.

        A run that waits for a signal, or that will be retried, has not ended.

        Args:
            id: the id of the run, which another thread or process is running.
            timeout: seconds, or a timedelta, to wait at most; None waits until the run has ended.

        Raises:
            the error with which the run failed for good; `WorkflowError` if none is stored.
            TimeoutError: the run has not ended in time. It continues.
            WorkflowNotFound: nothing is stored as ``id``.
            WorkflowCancelled: the run was cancelled.
            ValueError: the id is invalid, or the timeout is negative or not a number.
        """
        pause, longest = _POLL
        seconds = math.inf if timeout is None else check_seconds(timeout, "timeout")
        give_up_at = time.monotonic() + seconds
        self.store.key(id)  # raises if it is invalid
        while True:
            rows = self.store.details([id])
            if not rows:
                raise WorkflowNotFound(id)
            if rows[0].state in _ENDED and (info := self._read(id)) and info.state in _ENDED:
                if info.error is not None:
                    raise info.error
                if info.state == "failed":  # saved by hand or by Node
                    raise WorkflowError(
                        f"{id!r} has failed, but no error is stored with it: it was saved by hand "
                        "or by Node. Its steps may say more: see get(id).steps"
                    )
                return info.result
            left = give_up_at - time.monotonic()
            if left <= 0:
                raise TimeoutError(
                    f"{id!r} has not ended within {seconds:g} s: it is {rows[0].state}. It was not "
                    "stopped; call result() again to keep waiting"
                )
            time.sleep(min(pause, left))
            pause = min(2 * pause, longest)

    def _result(self, info: RunInfo, output: Any) -> Any:
        entry = self._workflows.get(info.workflow or "")
        if entry is None:
            return output
        return decode(self.codec, output, entry.fn, info.id, "metadata.output")


def _with_error(step: StepInfo, snapshot: WorkflowSnapshot) -> StepInfo:
    if step.ok:
        return step
    return evolve(step, error=_failure.from_json(step.key, snapshot.steps[step.key].to_json()))
