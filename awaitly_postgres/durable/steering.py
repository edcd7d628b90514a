"""Operations on stored runs that do not run them: signal, cancel, delete."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from .. import _json
from .._checks import check_id
from ..snapshot import timestamp
from ..store.database import ROLLBACK, Connection, execute, fetch
from ..workflow.codec import encode
from .options import Options


class Steering(Options):
    """The part of `Durable` that acts on stored runs without running them."""

    def has_state(self, id: str) -> bool:
        """Return whether a run or a saved snapshot is stored as ``id``."""
        return bool(self._db.rows(self._sql.exists, {"id": self.store.key(id)}))

    def delete_state(self, id: str) -> bool:
        """Delete the run stored as ``id``; return whether there was one.

        This does not stop a run: if it is running, it continues, and stores its state again with
        its next write, or ends with `LeaseLost` if it had steps in the journal. To end it for good,
        use `cancel`.
        """
        return self.store.delete(id)

    def delete_states(self, ids: Iterable[str]) -> int:
        """Delete these runs, as `delete_state` does; return how many there were."""
        return self.store.delete_many(ids)

    def clear_state(self) -> int:
        """Delete everything in the store (under its prefix); return how many runs there were."""
        return self.store._clear()

    def signal(self, id: str, key: str, value: Any, *, conn: Connection | None = None) -> bool:
        """Answer ``step.wait(key)`` of the run stored as ``id``, even before it gets there.

        Args:
            id: the id of the run.
            key: the key of the wait.
            value: what ``step.wait`` returns; JSON, or a value that the codec converts to JSON.
            conn: your psycopg connection; the signal is stored in its transaction.

        Returns:
            True if the answer was stored; False if there is no such unfinished run, it already has
            an answer for this key, or its wait has timed out.

        Raises:
            NotSerializable: the value is not JSON.
            ValueError: the id or the key is invalid.
        """
        sql = self._sql
        value_json = encode(self.codec, value, f"the signal for step {key!r}")
        params = {
            "id": self.store.key(id),
            "key": check_id(key, "step key"),
            "value": value_json,
        }

        def send(conn: Connection) -> bool:
            return bool(execute(conn, sql.signal, params))

        return self._db.run_once(send, self._db.joined(conn))

    def cancel(self, id: str, *, conn: Connection | None = None) -> bool:
        """End the run stored as ``id`` for good; return whether there was an unfinished one.

        If it is running, its next checkpoint is refused and its caller gets `WorkflowCancelled`.
        With ``conn``, your psycopg connection, this joins the transaction that is open there.
        """
        now = timestamp()
        ended = {"status": "failed", "lastUpdated": now, "completedAt": now}
        params = {
            "id": self.store.key(id),
            "execution": _json.dumps(ended),
            "metadata": _json.dumps({"cancelledAt": now}),
        }
        sql = self._sql

        def work(conn: Connection) -> bool:
            while True:
                # Lock the lease's row first, as every write of a run does. This waits for a
                # checkpoint that is being committed, so that the cancelled snapshot includes it.
                fetch(conn, sql.lock_lease_row, params)
                with conn.transaction() as attempt:
                    if not fetch(conn, sql.cancel, params):
                        return False
                    if not fetch(conn, sql.holder, params):
                        return True
                    # A start has acquired the lease in between. Undo this, and lock its row first:
                    # the start may be waiting for the one that this has changed.
                    raise ROLLBACK(attempt)

        return self._db.run_once(work, self._db.joined(conn))
