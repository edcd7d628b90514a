"""Accepting runs for later: one, or thousands in one transaction."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import datetime, timezone
from itertools import islice
from typing import Any

from .. import _json
from ..errors import WorkflowNotFound
from ..snapshot import compose, timestamp
from ..store.database import Connection, execute, fetch
from .options import Options
from .registry import Entry

_BATCH = 1000  # runs in one statement


class Submitting(Options):
    """The part of `Durable` that stores runs without starting them."""

    def submit(
        self,
        id: str,
        fn: Callable[..., Any],
        /,
        *args: Any,
        conn: Connection | None = None,
        **kwargs: Any,
    ) -> bool:
        """Accept a run without starting it; `resume_pending` starts it.

        Args:
            id: the id of the run; at most 1,000 bytes with the store's prefix.
            fn: the workflow function; it must be registered.
            args: its arguments.
            conn: your psycopg connection; the run is stored in its transaction. Default: a pooled
                connection and a separate commit.
            kwargs: its keyword arguments.

        Returns:
            True if the run is new, False if the same run already exists.

        Raises:
            WorkflowConflict: the id belongs to another workflow or input.
            WorkflowNotFound: ``fn`` is not registered, so nothing could resume it.
            NotSerializable: an argument is not JSON.
            TypeError: ``fn`` does not take these arguments.
        """
        entry = self._workflows.of(fn)
        input = entry.encode_call(id, self.codec, args, kwargs)
        self._refuse_unregistered(entry, id)
        now = datetime.now(timezone.utc).isoformat()
        document = self._accepted(entry, now, input)
        _json.check_size(document, f"the snapshot for {id!r}")
        params = {"id": self.store.key(id), "snapshot": document, "pause": self._delay}
        conn = self._db.joined(conn)
        tries = 0

        def create(conn: Connection) -> bool:
            nonlocal tries
            tries += 1
            return bool(fetch(conn, self._sql.create, params))

        # A run that is deleted when it completes may be gone before a retry, which would store it
        # again. Then the outcome of the first try is looked up, at three more round trips.
        run = self._db.run_once if self.on_complete == "delete" else self._db.run
        for _ in range(10):  # again, if the run that was there has been deleted since
            if run(create, conn):
                return True
            if (stored := self.store.load(id, conn=conn)) is not None:
                break
        else:
            return False
        metadata = stored.metadata or {}
        entry.check_identity(id, metadata, input)
        # After a retry, this may be what the first try stored, if only its reply was lost: then it
        # has the time of this very call.
        return tries > 1 and metadata.get("submittedAt") == now

    def submit_many(
        self,
        fn: Callable[..., Any],
        runs: Mapping[str, Sequence[Any]],
        conn: Connection | None = None,
    ) -> list[str]:
        """Accept many runs of one workflow, all or none, as `submit` does each.

        They are stored in one transaction, with one statement for each thousand.

        Args:
            fn: the workflow function; it must be registered.
            runs: the positional arguments of each run, a tuple or a list, by the id of the run.
            conn: your psycopg connection; the runs are stored in its transaction. Default: a pooled
                connection and a separate commit.

        Returns:
            the ids that are new, in the order of ``runs``; the other runs already exist.

        Raises:
            WorkflowConflict: one of the ids belongs to another workflow or input; nothing was
                stored.
            WorkflowNotFound: ``fn`` is not registered, so nothing could resume the runs.
            TypeError: ``fn`` does not take the arguments of one of the runs, or they are neither a
                tuple nor a list.

        Example:
            >>> durable.submit_many(mail, {f"mail-{n}": (n,) for n in range(500)})  # doctest: +SKIP
        """
        entry = self._workflows.of(fn)
        if not isinstance(runs, Mapping):
            raise TypeError(f"runs must be a mapping of ids to arguments, not {runs!r}")
        inputs: dict[str, str] = {}
        ids: dict[str, str] = {}  # of runs, by their ids in the table
        for id, args in runs.items():
            if not isinstance(args, (tuple, list)):
                raise TypeError(f"the arguments of {id!r} must be a tuple or a list, not {args!r}")
            key = self.store.key(id)
            ids[key], inputs[key] = id, entry.encode_call(id, self.codec, args, {})
            _json.check_size(inputs[key], f"the snapshot for {id!r}")
        if not runs:
            return []
        self._refuse_unregistered(entry, next(iter(runs)))
        created = set(self._create_many(entry, dict(sorted(inputs.items())), ids, conn))
        return [id for key, id in ids.items() if key in created]

    def _create_many(
        self,
        entry: Entry,
        inputs: Mapping[str, str],
        ids: Mapping[str, str],
        conn: Connection | None,
    ) -> list[str]:
        """Store a run for each input, by its id in the table; return the ids that are new there."""
        sql = self._sql
        document = self._accepted(entry, datetime.now(timezone.utc).isoformat())

        def known(conn: Connection, keys: Sequence[str]) -> set[str]:
            rows = fetch(conn, sql.stored_calls, {"ids": keys})
            for key, *texts in rows:
                pairs = zip(("workflow", "input"), texts, strict=True)
                stored = {name: _json.loads(text) for name, text in pairs if text is not None}
                entry.check_identity(ids[key], stored, inputs[key])
            return {row[0] for row in rows}

        def create(conn: Connection, keys: Sequence[str]) -> list[str]:
            texts = [inputs[key] for key in keys]
            params = {"ids": keys, "inputs": texts, "snapshot": document, "pause": self._delay}
            created = [row[0] for row in fetch(conn, sql.create_many, params)]
            if len(created) < len(keys):  # another process has stored some since they were read
                known(conn, [*set(keys).difference(created)])
            if sql.journal and created:
                execute(conn, sql.delete_many_journals, {"ids": created})
            return created

        def work(conn: Connection) -> list[str]:
            # Read first, which begins the caller's transaction if none is open: otherwise the block
            # below would begin and commit one itself. In an open transaction the block is a
            # savepoint, so that a caller who catches the conflict and commits has stored none.
            old = set().union(*(known(conn, batch) for batch in _batches(inputs)))
            with conn.transaction():
                batches = _batches(key for key in inputs if key not in old)
                return [key for batch in batches for key in create(conn, batch)]

        return self._db.run_once(work, self._db.joined(conn))

    def _accepted(self, entry: Entry, now: str, input: str | None = None) -> str:
        """Compose the snapshot of a run that is stored and not started."""
        metadata: dict[str, Any] = {
            "workflow": entry.name,
            "version": entry.version,
            "attempts": 0,
            "submittedAt": now,
        }
        if self.metadata:
            metadata["custom"] = dict(self.metadata)
        if self._at is not None:
            metadata["wakeAt"] = timestamp(self._at)
        texts = {} if input is None else {"input": input}
        return compose(None, "running", steps={}, last_key=None, metadata=metadata, texts=texts)

    def _refuse_unregistered(self, entry: Entry, id: str) -> None:
        if entry not in self._workflows.values():
            raise WorkflowNotFound(id, entry.name)


def _batches(keys: Iterable[str]) -> Iterator[list[str]]:
    rest = iter(keys)
    while batch := [*islice(rest, _BATCH)]:
        yield batch
