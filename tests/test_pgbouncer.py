"""Behind PgBouncer in transaction mode, with nothing set for it."""

from __future__ import annotations

import os
import secrets
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import psycopg
import pytest
from psycopg.conninfo import make_conninfo

from awaitly_postgres import AlreadyRunning, Durable, SnapshotStore, Step, Workflow, postgres

PGBOUNCER = shutil.which("pgbouncer", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")

pytestmark = pytest.mark.skipif(PGBOUNCER is None, reason="pgbouncer is not installed")

CONFIG = """
[databases]
pooled = host={host} port={port} dbname={dbname} user={user} {password}
[pgbouncer]
listen_addr = 127.0.0.1
listen_port = {listen_port}
unix_socket_dir =
auth_type = any
pool_mode = transaction
default_pool_size = 2
server_connect_timeout = 5
query_wait_timeout = 30
"""


@pytest.fixture(scope="module")
def pooled(server: str) -> Iterator[str]:
    """The URL of a pooler with two connections to the server."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        listen_port = free.getsockname()[1]
    with ExitStack() as stack:
        prefix = "awaitly-pgbouncer-"
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix=prefix)))
        folder.chmod(0o755)
        config = folder / "pgbouncer.ini"
        info = stack.enter_context(psycopg.connect(server)).info
        config.write_text(
            CONFIG.format(
                host=info.host,
                port=info.port,
                dbname=info.dbname,
                user=info.user,
                password=f"password={info.password}" if info.password else "",
                listen_port=listen_port,
            )
        )
        # It refuses to be root; a folder with a socket may be its owner's only.
        owner = Path(info.host).owner() if info.host.startswith("/") else "nobody"
        as_other = ["-u", owner] if os.geteuid() == 0 else []
        log = stack.enter_context((folder / "log").open("wb"))
        pooler = subprocess.Popen([PGBOUNCER, *as_other, config], stderr=log, cwd="/")
        try:
            url = make_conninfo("", host="127.0.0.1", port=listen_port, dbname="pooled", user="any")
            wait_for(url, pooler)
            yield url
        finally:
            pooler.terminate()
            pooler.wait(30)


def wait_for(url: str, pooler: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 30
    while True:
        try:
            psycopg.connect(url).close()
            return
        except psycopg.OperationalError:
            if pooler.poll() is not None or time.monotonic() > deadline:
                raise
        time.sleep(0.05)


@pytest.fixture
def schema(server: str) -> Iterator[str]:
    """A schema of this test's own; a pooler takes no search path at the start."""
    schema = f"test_{secrets.token_hex(6)}"
    yield schema
    with psycopg.connect(server, autocommit=True) as admin:
        admin.execute(f"DROP SCHEMA IF EXISTS {schema} CASCADE")


@pytest.fixture
def pooled_store(pooled: str, schema: str) -> Iterator[SnapshotStore]:
    with postgres(pooled, schema=schema) as store:
        yield store


def test_the_pooler_really_changes_connections_between_statements(pooled: str) -> None:
    """Or the tests beside this one would show nothing."""
    with (
        psycopg.connect(pooled, autocommit=True) as first,
        psycopg.connect(pooled, autocommit=True) as second,
    ):
        with second.transaction():
            (others,) = second.execute("SELECT pg_backend_pid()").fetchone()
            with first.transaction():
                (one,) = first.execute("SELECT pg_backend_pid()").fetchone()
        assert one != others
        with second.transaction(), first.transaction():
            pids = {c.execute("SELECT pg_backend_pid()").fetchone()[0] for c in (first, second)}
        assert pids == {one, others}


def test_many_threads_run_durably_with_default_settings(
    pooled_store: SnapshotStore, server: str, schema: str
) -> None:
    """Eight threads, forty steps each in two runs, over two connections to the server."""
    durable = Durable(pooled_store)
    pooled_store.create_tables()
    with psycopg.connect(server, autocommit=True) as db:
        db.execute(f"CREATE TABLE {schema}.paid (id text, nr int)")

    def pay(conn: psycopg.Connection, id: str, nr: int) -> int:
        conn.execute(f"INSERT INTO {schema}.paid VALUES (%s, %s)", (id, nr))
        return nr

    def work(step: Step, id: str) -> list[int]:
        plain = [step(f"step-{nr}", int, nr) for nr in range(15)]
        return plain + [step.transaction(f"pay-{nr}", pay, id, nr) for nr in range(5)]

    def run(nr: int) -> list[list[int]]:
        return [durable.run(id, work, id) for id in (f"{nr}-a", f"{nr}-b", f"{nr}-a")]

    with ThreadPoolExecutor(8) as threads:
        results = list(threads.map(run, range(8)))
    assert results == [[[*range(15), *range(5)]] * 3] * 8
    snapshots = [pooled_store.load(info.id) for info in pooled_store.iter()]
    assert [len(snapshot.steps) for snapshot in snapshots] == [20] * 16
    with psycopg.connect(server) as db:
        paid = db.execute(f"SELECT count(*), count(DISTINCT (id, nr)) FROM {schema}.paid")
        assert paid.fetchone() == (80, 80)


def test_leases_hold(pooled_store: SnapshotStore) -> None:
    """They are rows, not locks of a session."""
    with pooled_store.lock("a") as lease:
        for _ in range(10):
            assert lease.renew()
            assert lease.held()
            with pytest.raises(AlreadyRunning), pooled_store.lock("a"):
                pass
    for _ in range(10):
        with pooled_store.lock("a"):
            pass


def test_snapshots_are_saved_and_loaded(pooled_store: SnapshotStore) -> None:
    """Over and over, well past the point where psycopg would prepare the statements."""

    def double(step: Step, nr: int) -> int:
        return step("double", lambda: 2 * nr)

    def save_and_load(nr: int) -> object:
        run = Workflow(double)
        run(nr)
        pooled_store.save(f"id-{nr}", run.snapshot())
        return pooled_store.load(f"id-{nr}").steps["double"].value

    with ThreadPoolExecutor(8) as threads:
        assert list(threads.map(save_and_load, range(100))) == [2 * nr for nr in range(100)]
    assert len(pooled_store.list("id-", limit=1000)) == 100
    assert pooled_store.delete_many(f"id-{nr}" for nr in range(100)) == 100
