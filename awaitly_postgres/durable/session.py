"""One start of one durable run: admitted, executed, ended."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

from attrs import define, evolve, field

from .. import _json
from .._checks import as_count
from ..errors import (
    AwaitlyError,
    LeaseLost,
    StoreError,
    WaitTimedOut,
    WorkflowCancelled,
    WorkflowDrift,
    WorkflowSuspended,
)
from ..snapshot import Status, WorkflowSnapshot, as_mapping, compose
from ..store import lease as leases
from ..store import renewal
from ..store.database import Database
from ..workflow import failure as _failure
from ..workflow.codec import decode, decode_input, encode
from ..workflow.event import EventType
from ..workflow.history import History
from ..workflow.run import Run
from ..workflow.step import Step
from .admission import Admission, Finished, Found, GivenUp, TakenUp
from .checkpoints import Checkpoints
from .options import Options
from .pending import GIVE_UP, retry_delay
from .registry import Entry

FAR_FUTURE = "9999-12-31T23:59:59.999Z"  # the wakeAt of a run that waits for a signal: never


@define(eq=False, repr=False)
class Session:
    """One start of one durable run: it is admitted, executed, and ended."""

    options: Options
    id: str
    entry: Entry
    input: str  # JSON text
    end: EventType | None = None  # how the start ended; None: the workflow was never called
    gave_up: bool = False
    _run: Run = field(init=False)
    _checkpoints: Checkpoints = field(init=False)
    _admission: Admission = field(init=False)
    _stored: WorkflowSnapshot | None = None
    _pid: int = field(factory=os.getpid)

    def __attrs_post_init__(self) -> None:
        options, history = self.options, History()
        self._checkpoints = Checkpoints(
            self._db,
            self.id,
            self.options.store.key(self.id),
            leases.new_token(),
            options.lock_ttl,
            history,
            lambda: self._document("running"),
            options.transaction,
        )
        self._run = Run(
            self.entry.name,
            self.id,
            options.codec,
            options.on_event,
            options.on_drift,
            self._checkpoints,
            history,
        )
        self._admission = Admission(
            self.id,
            self.entry,
            self.input,
            self.entry.max_attempts_or(options.max_attempts),
            checkpoints=self._checkpoints,
        )

    @property
    def attempts(self) -> int:
        """How often the run was started since it last made progress, this start included."""
        return self._checkpoints.attempts

    # -- beginning -------------------------------------------------------------------------

    def start(self, found: Found | None = None, *, automatic: bool = False) -> Any:
        """Run to an end and return the result, or return the recorded output.

        Args:
            found: the run as it was looked up, which saves reading it again.
            automatic: started by `resume_pending`, not by a call for this run: raise
                `ChangedMeanwhile` if it was written since, and apply ``max_attempts``.
        """
        self._db.pool.refuse_to_run_here()
        try:
            admission = self._admission.admit(found, automatic)
            if isinstance(admission, Finished):
                return self._output(admission.snapshot)
            if isinstance(admission, GivenUp):
                self._run.emit("run_given_up", error=admission.error)
                raise admission.error
            if isinstance(admission, TakenUp):
                try:
                    self._restore(admission.snapshot)
                except Exception as error:  # another version, or what a migration raises
                    self._admission.refuse(error)
                    raise
            return self._execute()
        finally:
            # After any exception, raised anywhere above: release the lease if it is still held.
            self._admission.release()

    def refuse_further_steps(self) -> None:
        """Stop this start from another thread, as Ctrl-C would: no further step begins."""
        self._run.stop(KeyboardInterrupt())

    def release(self) -> None:
        """Release the lease, so that nothing more can be recorded."""
        self._admission.release()

    def _restore(self, stored: WorkflowSnapshot) -> None:
        """Load the recorded steps, migrated to this version if necessary.

        If that drops or changes any (a migration, open failures), the first write of this start
        must rewrite the snapshot: an append would leave the old steps in it.
        """
        checkpoints, ours = self._checkpoints, self.entry.at_its_version(self.id, stored)
        if ours is not None:
            self._stored = ours
            checkpoints.history = self._run.history = History.of(ours)
        if ours is not stored or self._run.history.has_left_out:
            checkpoints.written = evolve(checkpoints.written, is_outdated=True)

    # -- running ---------------------------------------------------------------------------

    def _execute(self) -> Any:
        run, lease, codec = self._run, self._admission.lease, self.options.codec
        if lease is None:
            raise RuntimeError(f"the run of {self.id!r} cannot be executed without its lease")
        failure: BaseException | None = None
        self.end = "run_stopped"
        renewal.keep_renewed(lease)
        try:
            try:
                input = _json.as_stored(self.input)
                args, kwargs = decode_input(codec, input, self.entry.fn, self.id)
                result = run.run(lambda: self.entry.fn(Step(run), *args, **kwargs))
                output = encode(codec, result, f"the output of workflow {self.entry.name!r}")
            except BaseException as error:
                self.end = self._end(error)
                raise
            # Outside the inner try: if the completion cannot be stored, the run has not failed.
            self._finish(lambda: self._document("completed", output=output), completed=True)
            self.end = "run_completed"
        except BaseException as error:
            failure = error
            if isinstance(error, LeaseLost):
                self._raise_if_cancelled(error)
            raise
        finally:
            run.end()
            renewal.stop_renewing(lease)
            if os.getpid() == self._pid:
                run.emit(self.end, error=failure)
                if self.gave_up:
                    run.emit("run_given_up", error=failure)
        return self._decode_output(_json.as_stored(output))

    def _end(self, error: BaseException) -> EventType:
        """Record how the run ended, if that may be recorded; return the type of the event."""
        ours = self._run.is_interruption(error)
        if ours and isinstance(error, WorkflowSuspended):
            self._finish(lambda: self._document("running", suspended=True))
            return "run_suspended"
        # Drift is not recorded as a failure: the code is wrong, not the record. Without the lease
        # or the store no end can be recorded, and a forked child must not record its parent's.
        refused = ours and isinstance(error, (WorkflowDrift, LeaseLost, StoreError))
        if ours and isinstance(error, WorkflowDrift):
            self._admission.refuse(error)
        if isinstance(error, Exception) and not refused and os.getpid() == self._pid:
            pause = self._pause_after(error)
            self._finish(lambda: self._document("failed", failure=error), pause)
            self.gave_up = pause == GIVE_UP
            return "run_failed"
        return "run_stopped"

    def _pause_after(self, error: Exception) -> float:
        if isinstance(error, WaitTimedOut) and error.id == self.id:
            return GIVE_UP  # a replay would only raise it again
        backoff = self.entry.backoff or self.options.backoff
        return retry_delay(
            error, self._checkpoints.counted_attempts, self._admission.max_attempts, backoff
        )

    # -- the end ---------------------------------------------------------------------------

    def _finish(
        self, compose: Callable[[], str], pause: float | None = None, *, completed: bool = False
    ) -> None:
        """Store the end of the run, or delete the run; release the lease in the same statement."""
        forget = completed and self.options.on_complete == "delete"
        done, tries, document = self._checkpoints.finish(
            None if forget else compose, pause, self._run.end
        )
        if not done and tries > 1:
            # An earlier try may have succeeded and lost its reply. Then the lease is released, so
            # the retry changed nothing. The time in the stored end tells whether it is this one.
            stored = self.options.store.load(self.id)
            if forget or stored is None:
                done = forget and stored is None
            else:
                done = stored.execution.to_json() == _json.loads(document)["execution"]
        if not done:
            raise LeaseLost(self.id)
        self._admission.finished()

    def _raise_if_cancelled(self, error: LeaseLost) -> None:
        # `cancel` revokes the lease, so the run's next write fails with `LeaseLost`. That remains
        # the error if the database cannot be asked for the reason.
        stored = None
        with suppress(AwaitlyError):
            stored = self.options.store.load(self.id)
        if stored is not None and "cancelledAt" in (stored.metadata or {}):
            raise WorkflowCancelled(self.id) from error

    # -- the document ----------------------------------------------------------------------

    def _document(
        self,
        status: Status,
        *,
        output: str | None = None,
        failure: Exception | None = None,
        suspended: bool = False,
    ) -> str:
        """Compose the whole snapshot as it stands now, from the JSON texts of its steps."""
        history = self._run.history
        metadata: dict[str, Any] = {
            "workflow": self.entry.name,
            "version": self.entry.version,
            # The starts since it last made progress; suspending itself is progress, too.
            "attempts": 0 if suspended else self._checkpoints.counted_attempts,
        }
        if status != "completed":
            metadata |= history.unfinished_metadata(suspended)
        if given := {**self._given_before(), **self.options.metadata}:
            metadata["custom"] = given
        if failure is not None:
            metadata["failure"] = _failure.run_to_json(failure)
        if suspended:
            metadata["wakeAt"] = min(due or FAR_FUTURE for due in metadata["waits"].values())
        text = compose(
            self._stored,
            status,
            steps=history.steps,
            last_key=history.last_key,
            metadata=metadata,
            texts={"input": self.input} | ({} if output is None else {"output": output}),
        )
        _json.check_size(text, f"the snapshot for {self.id!r}")
        return text

    def _given_before(self) -> Mapping[str, Any]:
        """Return the metadata that the user gave to earlier starts of this run."""
        stored = self._stored.metadata if self._stored else None
        return as_mapping(as_mapping(stored).get("custom"))

    def _output(self, stored: WorkflowSnapshot) -> Any:
        metadata = stored.metadata or {}
        self._checkpoints.attempts = as_count(metadata.get("attempts"))
        return self._decode_output(metadata.get("output"))

    def _decode_output(self, output: Any) -> Any:
        return decode(self.options.codec, output, self.entry.fn, self.id, "metadata.output")

    @property
    def _db(self) -> Database:
        return self.options._db
