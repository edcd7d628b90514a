"""Rewinding a run to one of its steps, forking it there, and making a run due."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import datetime, timezone
from typing import Any

from attrs import evolve, frozen

from .. import _json
from .._checks import as_count, check_id
from ..errors import AlreadyRunning, AwaitlyError, LeaseLost, WorkflowConflict, WorkflowNotFound
from ..snapshot import WorkflowSnapshot, as_mapping, compose
from ..store import lease as leases
from ..store.database import fetch
from ..workflow.history import History
from .options import Options

# Metadata that no longer applies to a run that was taken back. `compose` drops the transient rest.
_OUTDATED = ("cancelledAt", "lastStepKey")


class Rewinding(Options):
    """The part of `Durable` that returns runs to an earlier step, or makes them due."""

    def rewind(self, id: str, key: str, *, new_keys: bool = False) -> list[str]:
        """Forget step ``key`` of the run stored as ``id`` and all recorded after it.

        A map is forgotten as a whole, whether ``key`` is the map's or that of one of its items.

        The run is then pending, whether it was completed, failed, waiting or cancelled. Its next
        start replays what was recorded before ``key``, handled failures included, and runs the rest
        again. "After" means the order in which steps were recorded, those of other threads
        included. Forgetting a ``step.wait`` forgets its signal too, so that it can be answered
        again; signals that no step has received yet stay. What forgotten steps did in other systems
        is not undone.

        Args:
            id: the id of the run.
            key: the first step to forget. Steps recorded by the Node package have no order: they
                count as recorded before all others, and of several only the last step of a run can
                be forgotten.
            new_keys: if False, ``step.idempotency_key`` returns the same keys as before, so a
                provider that knows them does nothing twice. If True, it returns new ones from now
                on, and a provider charges again.

        Returns:
            The forgotten keys, in the order in which they were recorded.

        Raises:
            AlreadyRunning: a process is running it; nothing was changed.
            WorkflowNotFound: nothing is stored as ``id``.
            ValueError: the run has no step ``key``, or the order of its steps is not recorded.
            LeaseLost: it was cancelled or deleted meanwhile; nothing was changed.
        """
        check_id(key, "step key")
        with self._leased(id) as params:
            part = _Part.before(key, id, self._stored(id))
            generation = as_count(part.metadata.get("keyGeneration")) + 1
            document = part.document({"keyGeneration": generation} if new_keys else {})
            _json.check_size(document, f"the snapshot for {id!r}")
            params |= {"snapshot": document, "forgotten": part.forgotten}
            sql = self._sql
            if not self._db.run_once(lambda conn: fetch(conn, sql.rewind, params)):
                raise LeaseLost(id)
        return part.forgotten

    def fork(self, id: str, new_id: str, key: str) -> list[str]:
        """Copy the run stored as ``id``, up to its step ``key``, to a new pending run.

        The copy has the input, the metadata and all steps recorded before ``key``, and starts from
        there. The source stays as it is, and may be running. Idempotency keys in the copy begin
        with ``new_id``, so a provider treats its steps as new.

        Args:
            id: the id of the run to copy.
            new_id: the id of the copy.
            key: the first step that is not copied; see `rewind`.

        Returns:
            The keys of the copied steps, in the order in which they were recorded.

        Raises:
            WorkflowConflict: ``new_id`` is taken.
            WorkflowNotFound: nothing is stored as ``id``.
            ValueError: the run has no step ``key``, or the order of its steps is not recorded.
        """
        check_id(key, "step key")
        new_key = self.store.key(new_id)
        part = _Part.before(key, id, self._stored(id))
        part.metadata.pop("keyGeneration", None)
        if signals := as_mapping(part.metadata.get("signals")):
            # Only the signals that a copied wait has received. The others are for the source.
            taken = {name: signals[name] for name in signals if name in part.kept}
            part.metadata["signals"] = taken
        document = part.document({"submittedAt": datetime.now(timezone.utc).isoformat()})
        _json.check_size(document, f"the snapshot for {new_id!r}")
        params, sql = {"id": new_key, "snapshot": document, "pause": None}, self._sql
        if not self._db.run_once(lambda conn: fetch(conn, sql.create, params)):
            there = self.store.load(new_id)
            name = as_mapping(there and there.metadata).get("workflow")
            raise WorkflowConflict(new_id, "workflow", repr(name), f"a fork of {id!r}")
        return list(part.kept)

    def retry(self, id: str) -> bool:
        """Make the run stored as ``id`` due now, so that `resume_pending` resumes it.

        Its pause, its attempts and its delay no longer count. A sleep or wait that is not over
        suspends it again.

        Returns:
            True if it is now due; False if there is no such unfinished run.

        Raises:
            AlreadyRunning: a process is running it; nothing was changed.
        """
        sql = self._sql
        with self._leased(id) as params:
            due = self._db.run_once(lambda conn: fetch(conn, sql.make_due, params))
        return bool(due)

    def _stored(self, id: str) -> WorkflowSnapshot:
        snapshot = self.store.load(id)
        if snapshot is None:
            raise WorkflowNotFound(id)
        return snapshot

    @contextmanager
    def _leased(self, id: str) -> Iterator[dict[str, Any]]:
        """Acquire the lease on ``id`` for one write, which releases it; yield its parameters.

        The lease is acquired before the run is read, so that the run cannot change between the read
        and the write. After any exception the lease is released, by its token because the reply to
        `acquire` may have been lost; if the database cannot be reached, it expires.
        """
        db, token = self._db, leases.new_token()
        params: dict[str, Any] = {"id": self.store.key(id), "token": token}
        try:
            leases.acquire(db, id, params["id"], self.lock_ttl, token)
            yield params
        except AlreadyRunning:
            raise
        except BaseException:
            with suppress(AwaitlyError):
                leases.release(db, params, leases.RELEASE_TIMEOUT)
            raise


@frozen
class _Part:
    """The steps of a run recorded before one of them, and the keys of those recorded after."""

    base: WorkflowSnapshot
    kept: Mapping[str, Any]  # JSON by key, in the order in which they were recorded
    forgotten: list[str]
    last_key: str | None
    settled: int  # the number of the last failure in ``kept`` that was handled
    metadata: dict[str, Any]  # without what says how far the run had got

    @classmethod
    def before(cls, key: str, id: str, snapshot: WorkflowSnapshot) -> _Part:
        """Divide ``snapshot`` at ``key``; raise ValueError if that is impossible."""
        recorded = snapshot.to_json()["steps"]
        metadata = dict(snapshot.metadata or {})
        metas = {name: as_mapping(step.get("meta")) for name, step in recorded.items()}
        seqs = {name: as_count(meta.get("seq")) for name, meta in metas.items()}
        numbered = sorted(filter(seqs.__getitem__, seqs), key=seqs.__getitem__)
        unnumbered = [name for name in seqs if not seqs[name]]  # by Node; the successes last
        unnumbered.sort(key=lambda name: (recorded[name]["ok"], name))
        key = _first_of_map(key, recorded, seqs)
        if key not in recorded:
            shown = ", ".join(map(repr, [*unnumbered, *numbered][-5:])) or "none"
            raise ValueError(f"{id!r} has no recorded step {key!r}; its last steps are: {shown}")
        if seqs[key]:
            forgotten = numbered[numbered.index(key) :]
        elif unnumbered == [key] or (not numbered and metadata.get("lastStepKey") == key):
            forgotten = [key, *numbered]
        else:
            raise ValueError(
                f"step {key!r} of {id!r} was recorded by the Node package, which keeps no order, "
                "so it is not known which steps came after it. Choose a step that Python recorded, "
                f"or the last step: {metadata.get('lastStepKey')!r}"
            )
        gone = set(forgotten)
        kept = {name: recorded[name] for name in [*unnumbered, *numbered] if name not in gone}
        # A handled failure stays handled even if the steps after it are forgotten. For numbered
        # steps the highest such number is stored; for Node's, lastStepKey names another step.
        replayed = History.of(snapshot).steps
        handled = [seqs[name] for name in kept if name in replayed and not kept[name]["ok"]]
        last = next(reversed(kept), None)
        last_key = last if last and (seqs[last] or handled) else None
        metadata = {name: value for name, value in metadata.items() if name not in _OUTDATED}
        return cls(snapshot, kept, forgotten, last_key, max(handled, default=0), metadata)

    def document(self, metadata: Mapping[str, Any]) -> str:
        """Return the snapshot of a pending run with the kept steps, as JSON text."""
        settled = {"settled": self.settled} if self.settled else {}
        return compose(
            evolve(self.base, metadata=self.metadata),
            "running",
            steps={key: _json.dumps(step) for key, step in self.kept.items()},
            last_key=self.last_key,
            metadata={"attempts": 0, **settled, **metadata},
            texts={},
        )


def _first_of_map(key: str, recorded: Mapping[str, Any], seqs: Mapping[str, int]) -> str:
    """Return the step of the map that was recorded first, if ``key`` is a map or a step of one.

    A map has one place in the order of the steps, so it is forgotten as a whole.
    """
    maps = {name: as_mapping(step.get("meta")).get("map") for name, step in recorded.items()}
    named = maps.get(key) or key
    return min((name for name in maps if maps[name] == named), key=seqs.__getitem__, default=key)
