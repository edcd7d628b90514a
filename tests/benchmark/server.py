"""The server all contenders share: a PostgreSQL of the benchmark's own, and what it counts."""

from __future__ import annotations

import socket
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psycopg
from attrs import define, field

from awaitly_postgres import embedded

SETTINGS = ("max_connections = 400", "checkpoint_timeout = '1d'", "max_wal_size = '30GB'")


@contextmanager
def own_server() -> Iterator[str]:
    """Start an embedded server, with fsync on as it comes; yield its URL.

    Checkpoints are put off: one that falls into a measurement multiplies the WAL after it.
    """
    with tempfile.TemporaryDirectory(prefix="awaitly-benchmark-") as folder:
        Path(folder).chmod(0o755)  # run by root, the server is another user
        data = Path(folder) / "pgdata"
        server = embedded.server(data)
        try:
            with psycopg.connect(server.get_uri(), autocommit=True) as db:
                for setting in SETTINGS:
                    db.execute(f"ALTER SYSTEM SET {setting}")
            server.cleanup()
            server = embedded.server(data)
            yield server.get_uri()
        finally:
            server.cleanup()


@define
class Server:
    """What the benchmark asks the server itself."""

    url: str
    db: psycopg.Connection[Any] = field(init=False)

    def __attrs_post_init__(self) -> None:
        self.db = psycopg.connect(self.url, autocommit=True)

    def value(self, query: str) -> Any:
        row = self.db.execute(query).fetchone()
        assert row is not None
        return row[0]

    def wal(self) -> int:
        """Bytes of write-ahead log so far."""
        return int(self.value("SELECT pg_current_wal_insert_lsn() - '0/0'::pg_lsn"))

    def transactions(self) -> int:
        """Take a transaction id, as each commit that writes does."""
        return int(self.value("SELECT txid_current()"))

    def cpu(self) -> float:
        """Seconds of processor time that the server's processes have taken; 0 if not on Linux."""
        processes = {
            int(path.parent.name): path.read_text().rpartition(")")[2].split()
            for path in Path("/proc").glob("[0-9]*/stat")
            if path.exists()
        }
        if not processes:
            return 0.0
        postmaster = processes[self.db.info.backend_pid][1]
        ours = [pid for pid, (_, parent, *_rest) in processes.items() if parent == postmaster]
        return sum(int(Path(f"/proc/{pid}/schedstat").read_text().split()[0]) / 1e9 for pid in ours)

    @contextmanager
    def slower_commits(self, seconds: float) -> Iterator[None]:
        """Have each commit take so much longer, as it does on a disk across a network."""
        for name, value in (("commit_delay", f"{seconds * 1e6:.0f}"), ("commit_siblings", "0")):
            self.db.execute(f"ALTER SYSTEM SET {name} = {value}")
        self.db.execute("SELECT pg_reload_conf()")
        try:
            yield
        finally:
            self.db.execute("ALTER SYSTEM RESET commit_delay")
            self.db.execute("ALTER SYSTEM RESET commit_siblings")
            self.db.execute("SELECT pg_reload_conf()")

    def rows_read(self, schema: str) -> int:
        """Rows and index entries read in a schema so far; a connection tells when it closes."""
        others = "SELECT count(*) FROM pg_stat_activity WHERE backend_type = 'client backend'"
        while self.value(others) > 1:
            time.sleep(0.001)
        return int(
            self.value(
                "SELECT (SELECT sum(seq_tup_read) FROM pg_stat_user_tables "
                f"WHERE schemaname = '{schema}') + (SELECT sum(idx_tup_read) "
                f"FROM pg_stat_user_indexes WHERE schemaname = '{schema}')"
            )
        )

    def fresh_schema(self, name: str) -> str:
        self.db.execute(f"DROP SCHEMA IF EXISTS {name} CASCADE")
        self.db.execute(f"CREATE SCHEMA {name}")
        return name

    def settle(self) -> None:
        """Do now what the server would else do at some moment of the measurement."""
        self.db.execute("VACUUM ANALYZE")


@define
class Wire:
    """A TCP port in front of the server that counts round trips: answers that follow a request."""

    url: str
    round_trips: int = 0

    @contextmanager
    def counted(self) -> Iterator[str]:
        """Yield the URL of the port."""
        with psycopg.connect(self.url) as conn:
            path = f"{conn.info.host}/.s.PGSQL.{conn.info.port}"
        listener = socket.create_server(("127.0.0.1", 0))
        threading.Thread(target=self._serve, args=(listener, path), daemon=True).start()
        host, port = listener.getsockname()
        try:
            yield f"postgresql://postgres@{host}:{port}/postgres?sslmode=disable&gssencmode=disable"
        finally:
            listener.close()

    def _serve(self, listener: socket.socket, path: str) -> None:
        with suppress(OSError):  # closed
            while True:
                client, _ = listener.accept()
                server = socket.socket(socket.AF_UNIX)
                server.connect(path)
                asked = threading.Event()
                for pair in ((client, server, True), (server, client, False)):
                    threading.Thread(target=self._pump, args=(*pair, asked), daemon=True).start()

    def _pump(
        self, source: socket.socket, target: socket.socket, asks: bool, asked: threading.Event
    ) -> None:
        with suppress(OSError):
            while data := source.recv(1 << 16):
                if asks:
                    asked.set()
                elif asked.is_set():
                    asked.clear()
                    self.round_trips += 1
                target.sendall(data)
            target.shutdown(socket.SHUT_WR)
