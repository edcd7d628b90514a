"""Checking before a deploy that today's code can resume every unfinished run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Literal

from attrs import frozen

from .. import _json
from ..errors import SnapshotFormatError, VersionMismatch, WorkflowDrift, WorkflowNotFound
from ..snapshot import WorkflowSnapshot, as_mapping
from ..store.rows import SnapshotInfo, is_input
from ..workflow.codec import decode_input
from ..workflow.history import History
from ..workflow.replay import FirstNewStep, Replay
from ..workflow.step import Step
from .options import Options
from .registry import Entry

_PAGE = 500


@frozen
class Problem:
    """Why today's code cannot resume a run, from `Durable.check`.

    ``kind`` is one of

    - ``"drift"``: the code does not ask for the recorded steps in their order;
    - ``"version"``: the run is of another version of the workflow, or cannot be migrated;
    - ``"unregistered"``: no workflow is registered here under the name of the run's workflow;
    - ``"undecodable"``: the snapshot, the input, or the value of a step cannot be decoded;
    - ``"error"``: the code between the recorded steps raises an error that the run did not have.

    ``key`` is the step that the code asked for, or whose value cannot be decoded; None if there is
    no such step.
    """

    id: str
    workflow: str | None
    kind: Literal["drift", "version", "unregistered", "undecodable", "error"]
    message: str
    key: str | None = None


class Checking(Options):
    """The part of `Durable` that checks stored runs against the code."""

    def check(self, prefix: str = "") -> list[Problem]:
        """Replay every unfinished run against today's code, up to its first new step.

        No step runs, nothing is written, and no lease is acquired, so it can be used on a
        production database while runs are in progress. The code between the steps does run, as it
        does whenever a run is resumed, and so does a function given as ``on_version_mismatch``.

        Steps in threads that the workflow starts are checked as far as the replay gets: if their
        recorded steps are not asked for, that is drift only once the function returns.

        Args:
            prefix: only ids that start with exactly this.

        Returns:
            A `Problem` for each run that could not be resumed. Runs that were cancelled or given
            up, and snapshots that were saved by hand or by Node, are not checked.

        Raises:
            StoreUnavailable: the database could not be reached.
        """
        found: dict[str, Problem] = {}
        for info in self._unfinished(prefix):
            # A run that is written during the check is listed again; the last result counts.
            found.pop(info.id, None)
            if (problem := self._problem(info.id)) is not None:
                found[info.id] = problem
        return [*found.values()]

    def _unfinished(self, prefix: str) -> Iterator[SnapshotInfo]:
        store = self.store
        last: SnapshotInfo | None = None
        more = True
        while more:
            params = {
                **store._range(prefix),
                "after_time": last and last.updated_at.isoformat(),
                "after_id": last and store.prefix + last.id,
                "limit": _PAGE,
            }
            # As for pending: if it planned for these values, PostgreSQL would sort all the rows.
            page = store._infos(self._sql.unfinished, params, custom_plan=False)
            yield from page
            # Stop at the first short page, not at an empty one: runs in progress are written, and
            # so listed, again and again.
            more = len(page) == _PAGE
            last = page[-1] if page else None

    def _problem(self, id: str) -> Problem | None:
        """Load and replay one run. One at a time, so that memory never holds more than one."""
        try:
            snapshot = self.store.load(id)
        except SnapshotFormatError as error:
            return Problem(id, None, "undecodable", str(error))
        metadata = as_mapping(snapshot and snapshot.metadata)
        name, input = metadata.get("workflow"), metadata.get("input")
        if snapshot is None or snapshot.execution.status == "completed":
            return None  # deleted or completed since it was listed
        if not isinstance(name, str) or not is_input(input):
            return None  # saved by hand or by Node: `resume` would not find it either
        entry = self._workflows.get(name)
        if entry is None:
            return Problem(id, name, "unregistered", str(WorkflowNotFound(id, name)))
        try:
            ours = entry.at_its_version(id, snapshot)
        except VersionMismatch as error:
            return Problem(id, name, "version", str(error))
        except Exception as error:
            message = f"on_version_mismatch of {name!r} failed: {_told(error)}"
            return Problem(id, name, "version", message)
        return self._replay(id, entry, ours, metadata)

    def _replay(
        self,
        id: str,
        entry: Entry,
        snapshot: WorkflowSnapshot | None,
        metadata: Mapping[str, Any],
    ) -> Problem | None:
        history = History() if snapshot is None else History.of(snapshot)
        replay = Replay(entry.name, id, self.codec, None, self.on_drift, None, history)
        input = _json.as_stored(_json.dumps(metadata["input"]))
        try:
            args, kwargs = decode_input(self.codec, input, entry.fn, id)
        except SnapshotFormatError as error:
            return Problem(id, entry.name, "undecodable", str(error))
        try:
            entry.check_call(args, kwargs)
            replay.run(lambda: entry.fn(Step(replay), *args, **kwargs))
        except FirstNewStep:
            return None
        except (Exception, SystemExit) as error:
            ours = replay.is_interruption(error)
            if ours and isinstance(error, WorkflowDrift):
                return Problem(id, entry.name, "drift", str(error), error.key)
            if ours and isinstance(error, SnapshotFormatError):
                return Problem(id, entry.name, "undecodable", str(error), replay.undecodable)
            # If the run has already failed with this error, the new code is not the reason.
            if type(error).__name__ != as_mapping(metadata.get("failure")).get("name"):
                return Problem(id, entry.name, "error", _told(error))
        finally:
            replay.end()  # refuses the steps of threads that outlive the function
        return None


def _told(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"
