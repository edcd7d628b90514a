"""Forks: parent and child each have connections of their own, and neither disturbs the other.

Each test is a script of its own, for a fork copies whatever else the process has.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import psycopg
import pytest

from awaitly_postgres import SnapshotStore

MakeStore = Callable[..., SnapshotStore]

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")

PRELUDE = """
import multiprocessing, os, secrets, signal, sys, threading, traceback
from psycopg_pool import ConnectionPool
from awaitly_postgres import Durable, StoreError, postgres

url = sys.argv[1]
SNAPSHOT = {
    "formatVersion": 1, "steps": {}, "execution": {"status": "running", "lastUpdated": "now"}
}


def backend(store):
    \"\"\"The process id of the server's end of the store's connection.\"\"\"
    def ask(step):
        return step.transaction("ask", lambda conn: conn.info.backend_pid)

    return Durable(store, on_complete="delete").run(f"ask-{secrets.token_hex(8)}", ask)


def fork(action, leave=sys.exit):
    \"\"\"Run the action in a child that then leaves in this way; it must not fail or hang.\"\"\"
    pid = os.fork()
    if pid == 0:
        signal.alarm(60)
        try:
            action()
        except Exception:
            traceback.print_exc()
            os._exit(1)
        leave(0)
    _, status = os.waitpid(pid, 0)
    assert status == 0, f"the child ended with status {status}"
"""


@pytest.fixture
def run(url: str, tmp_path: Path, make_store: MakeStore) -> Callable[[str], None]:
    """Run a script after the prelude; it must end well."""
    make_store().create_tables()

    def run(script: str) -> None:
        path = tmp_path / "script.py"
        path.write_text(PRELUDE + script)
        done = subprocess.run(
            [sys.executable, str(path), url],
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        assert "Traceback" not in done.stderr

    return run


Run = Callable[[str], None]


@pytest.mark.parametrize("leave", ["sys.exit", "os._exit"])
def test_a_used_store_works_on_both_sides_of_a_fork(
    run: Run, store: SnapshotStore, leave: str
) -> None:
    """The child connects anew; its exit leaves the parent the connection that it had."""
    run(f"""
store = postgres(url, max_size=1)
mine = backend(store)

def child():
    theirs = backend(store)
    assert theirs != mine
    store.save("child", SNAPSHOT)
    assert backend(store) == theirs
    fork(lambda: store.save("grandchild", SNAPSHOT), {leave})
    assert backend(store) == theirs

for _ in range(3):
    fork(child, {leave})
    assert backend(store) == mine
store.save("parent", SNAPSHOT)
""")
    assert {info.id for info in store.list()} == {"child", "grandchild", "parent"}


def test_closing_the_store_in_the_child_leaves_the_parents_alone(run: Run) -> None:
    """Closed in the child, before or after use, it is still open in the parent."""
    run("""
store = postgres(url, max_size=1)
mine = backend(store)
fork(store.close)
fork(lambda: (store.ping(), store.close()))
assert backend(store) == mine
""")


def test_a_store_that_was_not_used_yet_is_opened_by_each_child(run: Run) -> None:
    """As under a server that forks its workers after importing the application."""
    run("""
store = postgres(url, max_size=1)
for _ in range(3):
    fork(lambda: store.save("child", SNAPSHOT))
assert store.load("child")
""")


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_multiprocessing_children_work(run: Run, store: SnapshotStore, method: str) -> None:
    """Whichever way multiprocessing starts them."""
    run(f"""
store = postgres(url, max_size=2)

def work(n):
    assert Durable(store).run(f"run-{{n}}", lambda step: step("a", lambda: n)) == n

if __name__ == "__main__":
    mine = backend(postgres(url))
    store.ping()
    context = multiprocessing.get_context("{method}")
    children = [context.Process(target=work, args=(n,)) for n in range(4)]
    for child in children:
        child.start()
    for child in children:
        child.join(60)
        assert child.exitcode == 0, child.exitcode
    work(4)
""")
    assert {info.id for info in store.list(status="completed")} == {f"run-{n}" for n in range(5)}


def test_a_fork_while_a_thread_has_the_only_connection(run: Run) -> None:
    """The child does not wait for a connection, or a lock, of a thread that it does not have."""
    run("""
store = postgres(url, max_size=1)
inside, go_on = threading.Event(), threading.Event()

def workflow(step):
    def hold(conn):
        inside.set()
        assert go_on.wait(60)
        return conn.info.backend_pid

    return step.transaction("hold", hold)

results = []
thread = threading.Thread(target=lambda: results.append(Durable(store).run("run", workflow)))
thread.start()
inside.wait()

def child():
    store.save("child", SNAPSHOT)
    with store.lock("child") as lease:
        assert lease.held()

fork(child)
go_on.set()
thread.join()
assert results == [backend(store)]
""")


def test_a_fork_while_a_thread_opens_the_store(run: Run) -> None:
    """The child does not wait for the lock under which the thread was making the pool."""
    run("""
inside, go_on = threading.Event(), threading.Event()

class Slow(str):
    def encode(self, *args):
        inside.set()
        assert go_on.wait(60)
        return super().encode(*args)

store = postgres(Slow(url))
thread = threading.Thread(target=store.ping)
thread.start()
inside.wait()
fork(lambda: (go_on.set(), store.save("child", SNAPSHOT)))
go_on.set()
thread.join()
assert store.load("child")
""")


def test_forks_at_any_moment_of_busy_threads(run: Run, store: SnapshotStore) -> None:
    """Wherever in the store the other threads are, no child hangs and no thread is disturbed."""
    run("""
store = postgres(url, max_size=2)
stop, faults = threading.Event(), []

def work(name):
    try:
        n = 0
        while not stop.is_set():
            n += 1
            with postgres(url, max_size=1) as fresh:  # being opened, too, is a moment
                fresh.save(name, SNAPSHOT)
            with store.lock(name, ttl=0.3):
                store.save(name, SNAPSHOT)
            assert Durable(store).run(f"{name}-{n}", lambda step: step("a", lambda: n)) == n
    except BaseException as error:
        faults.append(error)

threads = [threading.Thread(target=work, args=(f"thread-{n}",)) for n in range(3)]
for thread in threads:
    thread.start()
for n in range(30):
    fork(lambda: store.save(f"child-{n}", SNAPSHOT), os._exit)
stop.set()
for thread in threads:
    thread.join()
assert not faults, faults
""")
    assert sum(info.id.startswith("child-") for info in store.iter()) == 30


def test_a_lease_stays_with_the_parent(run: Run, db: psycopg.Connection) -> None:
    """The child neither gets what the parent holds nor, ending, gives it back."""
    run("""
store = postgres(url)

def child():
    assert store.try_acquire("order") is None
    with store.lock("other", ttl=0.3):
        pass

with store.lock("order", ttl=60) as lease:
    fork(child)
    assert lease.held()
assert not lease.held()
""")
    assert db.execute("SELECT count(*) FROM awaitly_workflow_lock").fetchone() == (0,)


def test_a_callers_pool_from_before_the_fork_is_refused(run: Run) -> None:
    """Its sockets are the parent's: the child gets an error that says what to do instead."""
    run("""
with ConnectionPool(url, min_size=1, max_size=1, open=True) as pool:
    store = postgres(pool=pool)
    mine = backend(store)

    def child():
        for use in (store.ping, lambda: store.save("child", SNAPSHOT)):
            try:
                use()
            except StoreError as error:
                assert "create a pool and a store in the child" in str(error)
            else:
                raise AssertionError("the parent's socket was used")
        with ConnectionPool(url, min_size=1, open=True) as fresh:
            assert postgres(pool=fresh).ping()

    fork(child, os._exit)
    assert backend(store) == mine
""")


def test_a_callers_pool_that_the_child_opens_works_there(run: Run) -> None:
    """A pool that was not open at the fork has nothing of the parent's."""
    run("""
pool = ConnectionPool(url, min_size=1, open=False)
store = postgres(pool=pool)

def child():
    with pool:
        assert store.ping()

fork(child)
""")
