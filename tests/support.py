"""What several test files share: places, waiting, interrupts, the tables, slow and lossy peers."""

from __future__ import annotations

import _thread
import math
import os
import select
import signal
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any, Literal, TypeVar

import psycopg
from attrs import define, field
from psycopg.conninfo import make_conninfo

from awaitly_postgres import Durable, SnapshotStore, postgres

DB = psycopg.Connection
T = TypeVar("T")
HERE = Path(__file__).parent
ROOT = HERE.parent
DATA, WORKERS, EXAMPLES = HERE / "data", HERE / "workers", ROOT / "examples"

# -- waiting -------------------------------------------------------------------------------


def eventually(happened: Callable[[], Any], what: str = "it") -> Any:
    """Poll until something is true, and return it; a minute is for a busy machine."""
    give_up_at = time.monotonic() + 60
    while not (result := happened()):
        assert time.monotonic() < give_up_at, f"never came: {what}"
        time.sleep(0.01)
    return result


def wait_until(db: DB, moment: datetime) -> None:
    """Return when the server's clock has passed ``moment``."""
    while db.execute("SELECT clock_timestamp() <= %s", (moment,)).fetchone()[0]:
        db.execute("SELECT pg_sleep(0.02)")


# -- forks ---------------------------------------------------------------------------------


def run_in_the_parent(durable: Durable, id: str, fn: Callable[..., T]) -> T:
    """Run a workflow that forks; children that come out of it end here."""
    parent = os.getpid()
    try:
        return durable.run(id, fn)
    finally:
        if os.getpid() != parent:
            os._exit(0)


# -- interrupts ----------------------------------------------------------------------------


class TimeLimit(Exception):
    """What a soft time limit raises, as those of Celery and RQ do."""


def in_threads(work: Callable[[int], object], count: int) -> None:
    """Run ``work`` in so many threads, with nothing but locks of the interpreter's own.

    An interrupt in the middle of an executor or a condition leaves those locked for ever.
    """
    ended = [_thread.allocate_lock() for _ in range(count)]

    def run(nr: int) -> None:
        with suppress(BaseException):
            work(nr)
        ended[nr].release()

    for nr in range(count):
        ended[nr].acquire()
        _thread.start_new_thread(run, (nr,))
    for lock in ended:
        lock.acquire()


# -- the tables ----------------------------------------------------------------------------


def photograph(db: DB) -> dict[str, list[str]]:
    """Return every row of the three tables."""
    tables = ("awaitly_snapshots", "awaitly_snapshots_steps", "awaitly_workflow_lock")
    return {t: [r for (r,) in db.execute(f"SELECT t::text FROM {t} t").fetchall()] for t in tables}


def restore(db: DB, photo: dict[str, list[str]]) -> None:
    """Put everything back as it was; the leases have run out since."""
    for table, rows in photo.items():
        db.execute(f"DELETE FROM {table}")
        for text in rows:
            db.execute(f"INSERT INTO {table} SELECT (%s::{table}).*", [text])
    db.execute("UPDATE awaitly_workflow_lock SET expires_at = clock_timestamp()")


# -- a backend that is slow ----------------------------------------------------------------


@define
class SlowBackend:
    """The server's side of a store with one connection: stopped, it does what it was sent later."""

    store: SnapshotStore
    db: DB
    stopped: list[int] = field(factory=list)

    def stop(self) -> None:
        """Stop it, and have its connection cut when the next statement has been sent to it."""
        conn = next(iter(self.store._db.pool.opened()._pool))
        pid, descriptor = conn.info.backend_pid, conn.fileno()
        os.kill(pid, signal.SIGSTOP)
        self.stopped.append(pid)

        def cut() -> None:
            threading.Event().wait(0.3)  # for the statement to be on its way
            shut_down(descriptor)

        threading.Thread(target=cut).start()

    def wake(self) -> None:
        """Let those that were stopped go on, and wait until they have done it and are gone."""
        gone = "SELECT count(*) FROM pg_stat_activity WHERE pid = ANY(%s)"
        for pid in self.stopped:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)
        while self.db.execute(gone, (self.stopped,)).fetchone()[0]:
            self.db.execute("SELECT pg_sleep(0.01)")


def shut_down(descriptor: int) -> None:
    with socket.socket(fileno=os.dup(descriptor)) as connection:
        connection.shutdown(socket.SHUT_RDWR)


def distribute(url: str) -> None:
    """Make the tables, and distribute them as the recipe for Citus says."""
    page = (EXAMPLES / "README.md").read_text("utf-8")
    recipe = page.partition("### Citus\n")[2].partition("```sql\n")[2].partition("```")[0]
    with postgres(url) as store, psycopg.connect(url, autocommit=True) as conn:
        store.create_tables()
        conn.execute(recipe)


def sorts_incrementally(db: DB) -> bool:
    """Tell whether the server can walk along the index of times, and sort equal ones by id."""
    return db.info.server_version >= 130_000


# -- a network that loses things -----------------------------------------------------------

Loss = Literal["request", "reply"]


class Proxy:
    """Stands between client and server, and loses one request, or the reply to it, on demand.

    What loses it also cuts the connection. A lost reply is one that the server has sent.
    """

    def __init__(self, url: str) -> None:
        with psycopg.connect(url) as conn:
            host, port = conn.info.host, conn.info.port
        self._address = f"{host}/.s.PGSQL.{port}" if host.startswith("/") else (host, port)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = make_conninfo(
            url,
            host="127.0.0.1",
            port=self._listener.getsockname()[1],
            sslmode="disable",
            gssencmode="disable",
        )
        self._lock = threading.Lock()
        self._open: set[socket.socket] = set()
        self._doomed: tuple[Loss, int] | None = None
        self._refuse = 0.0
        self.requests = 0
        self._threads = [threading.Thread(target=self._accept)]
        self._threads[0].start()

    def lose(self, what: Loss, nr: int) -> None:
        """Lose the ``nr``-th request from now on (from 0), or its reply."""
        self.requests, self._doomed = 0, (what, nr)

    @property
    def has_lost(self) -> bool:
        return self._doomed is None

    def cut(self, refuse: float = math.inf) -> None:
        """Cut all connections and refuse the next so many."""
        with self._lock:
            self._refuse = refuse
            for connection in self._open:
                with suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.cut()
        for thread in self._threads:
            thread.join()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                with self._lock:
                    refused = self._refuse > 0
                    self._refuse -= refused
                if refused:
                    client.close()
                    continue
                thread = threading.Thread(target=self._serve, args=(client,))
                self._threads.append(thread)
                thread.start()

    def _serve(self, client: socket.socket) -> None:
        family = socket.AF_UNIX if isinstance(self._address, str) else socket.AF_INET
        server = socket.socket(family)
        with client, server, suppress(OSError, EOFError):
            with self._lock:
                self._open.add(client)
            try:
                server.connect(self._address)
                if family == socket.AF_INET:
                    server.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                server.sendall(_message(client, header=4))
                self._relay(client, server)
            finally:
                with self._lock:
                    self._open.discard(client)

    def _relay(self, client: socket.socket, server: socket.socket) -> None:
        request, losing = b"", None
        while True:
            readable, _, _ = select.select([client, server], [], [])
            if server in readable:
                message = _message(server)
                if losing is None:
                    client.sendall(message)
                elif message[:1] == b"Z":  # ready for the next request: all of this one is done
                    return
            if client in readable:
                request += (message := _message(client))
                if message[:1] in b"QS":  # a whole request: Query, or Parse ... Sync
                    losing = self._fate()
                    if losing == "request":
                        return
                if message[:1] in b"QSpX":
                    server.sendall(request)
                    request = b""

    def _fate(self) -> Loss | None:
        with self._lock:
            nr, self.requests = self.requests, self.requests + 1
            if self._doomed is None or self._doomed[1] != nr:
                return None
            (what, _), self._doomed = self._doomed, None
            return what


def _message(connection: socket.socket, header: int = 5) -> bytes:
    head = _exactly(connection, header)
    return head + _exactly(connection, int.from_bytes(head[-4:], "big") - 4)


def _exactly(connection: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        if not (more := connection.recv(size - len(data))):
            raise EOFError
        data += more
    return data
