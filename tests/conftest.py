"""A real PostgreSQL for every test: yours, one in Docker, or the embedded wheel; in that order.

``--postgres-url`` or ``$DATABASE_URL`` names yours; its role must be a superuser, for the tests
that make roles and databases. Every test works in a schema of its own, dropped afterwards.
"""

from __future__ import annotations

import gc
import os
import secrets
import shutil
import signal
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from datetime import datetime, timedelta
from itertools import islice
from pathlib import Path
from typing import Any

import hypothesis
import psycopg
import pytest
from psycopg.conninfo import make_conninfo

from awaitly_postgres import Durable, SnapshotStore, embedded, postgres
from tests.support import HERE, Proxy, SlowBackend, distribute


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--postgres-url",
        default=os.environ.get("DATABASE_URL"),
        help="test on this server (default: $DATABASE_URL, else Docker, else the embedded one)",
    )
    parser.addoption(
        "--isolation",
        default="read committed",
        help='default_transaction_isolation of the embedded server, "serializable" for example',
    )

    parser.addoption(
        "--citus",
        action="store_true",
        help="run the tests of durable runs and leases on tables that are distributed; "
        "--postgres-url is the coordinator of a cluster",
    )


# Where the tests are that take seconds each, and share little that each worker had to make.
LONG = ("faults/test_faults.py", "test_examples.py")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--citus"):
        choose_for_citus(config, items)
    workers = getattr(config, "workerinput", {}).get("workercount")
    # Workers that share a server would ask it for too many connections, all at once.
    if workers and not config.getoption("--postgres-url"):
        begin_with_long_ones(items, workers)


def begin_with_long_ones(items: list[pytest.Item], workers: int) -> None:
    """Have each worker of pytest-xdist begin with long tests: last, one would keep it up alone.

    It is given as many in a row as any other, and may lose those at its end to one that is idle.
    """
    places = {HERE / place for place in LONG}
    long = [item for item in items if item.path in places]
    others = iter([item for item in items if item.path not in places])
    count, items[:] = len(items), []
    for nr in range(workers):
        first = long[nr::workers]
        share = (count - len(items)) // (workers - nr)
        items += [*first, *islice(others, max(share - len(first), 0))]


def choose_for_citus(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--postgres-url"):
        raise pytest.UsageError("--citus needs --postgres-url")
    places = (HERE / "durable", HERE / "store/test_lease.py")
    chosen = [item for item in items if any(item.path.is_relative_to(place) for place in places)]
    config.hook.pytest_deselected(items=[item for item in items if item not in chosen])
    items[:] = chosen


def pytest_collection_finish() -> None:
    """Leave the tests themselves out of every garbage collection, of which the store makes some."""
    gc.collect()
    gc.freeze()


# No test judges a time, not of a single example either.
hypothesis.settings.register_profile("patient", deadline=None)
hypothesis.settings.load_profile("patient")


def pytest_configure(config: pytest.Config) -> None:
    # A shell's ``&`` has Ctrl-C ignored, here and by all that the tests start.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    # The processes that tests start compile the package once, where it must not be done in place.
    if os.environ.pop("PYTHONDONTWRITEBYTECODE", None):
        folder = tempfile.TemporaryDirectory(prefix="awaitly-tests-pycache-")
        os.environ["PYTHONPYCACHEPREFIX"] = folder.name
        config.add_cleanup(folder.cleanup)


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """Run two workers a processor: tests spend half of their time waiting for leases to end."""
    return 2 * (os.cpu_count() or 1)


@pytest.fixture(scope="session")
def server(pytestconfig: pytest.Config) -> Iterator[str]:
    """The URL of a server on which the tests may do as they like."""
    given = pytestconfig.getoption("--postgres-url")
    if given:
        yield given
    elif _docker_answers():
        yield from _in_docker()
    else:
        yield from _embedded(pytestconfig.getoption("--isolation"))


def _docker_answers() -> bool:
    import docker

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # docker leaks a socket when refused
        try:
            return bool(docker.from_env(timeout=5).ping())
        except docker.errors.DockerException:
            return False
        finally:
            gc.collect()


def _in_docker() -> Iterator[str]:
    from testcontainers.community.postgres import PostgresContainer

    with PostgresContainer("postgres:17-alpine", driver=None) as container:
        yield container.get_connection_url()


def _embedded(isolation: str) -> Iterator[str]:
    folder = Path(tempfile.mkdtemp(prefix="awaitly-tests-"))
    folder.chmod(0o755)  # run by root, the server is another user
    running = embedded.server(folder / "pgdata")
    try:
        with psycopg.connect(running.get_uri(), autocommit=True) as conn:
            conn.execute("ALTER SYSTEM SET fsync = off")
            conn.execute(f"ALTER SYSTEM SET default_transaction_isolation = '{isolation}'")
            conn.execute("SELECT pg_reload_conf()")
        yield running.get_uri()
    finally:
        running.cleanup()
        shutil.rmtree(folder, ignore_errors=True)


READ_COMMITTED = r"-c default_transaction_isolation=read\ committed"


@pytest.fixture(scope="session")
def superuser(server: str) -> Iterator[psycopg.Connection]:
    """The connection on which every test's schema is made and dropped."""
    with psycopg.connect(server, autocommit=True) as conn:
        yield conn


@pytest.fixture
def url(
    server: str, superuser: psycopg.Connection, request: pytest.FixtureRequest
) -> Iterator[str]:
    """A conninfo whose search path is an empty schema of this test's own."""
    schema = f"test_{secrets.token_hex(6)}"
    pinned = READ_COMMITTED if request.node.get_closest_marker("read_committed") else ""
    superuser.execute(f"CREATE SCHEMA {schema}")
    url = make_conninfo(server, options=f"-c search_path={schema} {pinned}")
    if request.config.getoption("--citus"):
        distribute(url)
    yield url
    superuser.execute(f"DROP SCHEMA {schema} CASCADE")


@pytest.fixture
def make_store(url: str) -> Iterator[Callable[..., SnapshotStore]]:
    """Make stores on this test's schema; they are closed at its end."""
    stores = []

    def make(**options: object) -> SnapshotStore:
        stores.append(postgres(url, **{"max_size": 4, **options}))  # type: ignore[arg-type]
        return stores[-1]

    yield make
    for store in stores:
        store.close()


@pytest.fixture
def store(make_store: Callable[..., SnapshotStore]) -> SnapshotStore:
    """A store on this test's schema."""
    return make_store()


@pytest.fixture
def durable(store: SnapshotStore) -> Durable:
    """Durable runs on this test's schema."""
    return Durable(store)


@pytest.fixture
def db(url: str) -> Iterator[psycopg.Connection]:
    """A plain connection to look at what is stored."""
    with psycopg.connect(url, autocommit=True) as conn:
        yield conn


@pytest.fixture
def slow_backend(
    make_store: Callable[..., SnapshotStore], db: psycopg.Connection
) -> Iterator[SlowBackend]:
    """A store with one connection, whose backend can be stopped; it is awake at the end."""
    backend = SlowBackend(make_store(max_size=1), db)
    yield backend
    backend.wake()


@pytest.fixture
def slow_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Set this process's clock back by a day; the server's stays right."""

    class Yesterday(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> datetime:
            return datetime.now(tz) - timedelta(days=1)

    for module in ("snapshot", "workflow.run", "durable.submitting"):
        monkeypatch.setattr(f"awaitly_postgres.{module}.datetime", Yesterday)


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have a store look soon what is wrong when its pool gives it no connection."""
    monkeypatch.setattr("awaitly_postgres.store.database.PATIENCE", 0.2)
    monkeypatch.setattr("awaitly_postgres.store.pool.CONNECT_TIMEOUT", 2)  # libpq's least


@pytest.fixture
def proxy(url: str) -> Iterator[Proxy]:
    proxy = Proxy(url)
    yield proxy
    proxy.close()


@pytest.fixture
def connect(proxy: Proxy) -> Iterator[Callable[..., SnapshotStore]]:
    """Make stores with one connection or more, through the proxy, ready for use.

    Without prepared statements, so that each statement is one request.
    """
    with ExitStack() as stores:

        def make(**options: Any) -> SnapshotStore:
            settings = {"max_size": 1, "kwargs": {"prepare_threshold": None}, **options}
            store = stores.enter_context(postgres(proxy.url, **settings))
            store.ping()
            return store

        yield make
