"""Leases: who may work on an id and for how long, and what one who lost it can still do."""

from __future__ import annotations

import json
import os
import pickle
import re
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from datetime import datetime, timedelta
from typing import Any

import psycopg
import pytest

from awaitly_postgres import (
    AlreadyRunning,
    Durable,
    LeaseLost,
    SnapshotStore,
    Step,
    WorkflowSnapshot,
)
from tests.support import WORKERS, wait_until

SNAPSHOT = WorkflowSnapshot.from_json(
    {
        "formatVersion": 1,
        "steps": {"a": {"ok": True, "value": 1}},
        "execution": {"status": "running", "lastUpdated": "2026-11-22T10:56:04.184Z"},
    }
)
OTHER = {**SNAPSHOT.to_json(), "steps": {}}


def clock(db: psycopg.Connection) -> datetime:
    """The server's time."""
    return db.execute("SELECT clock_timestamp()").fetchone()[0]


def lock_rows(db: psycopg.Connection) -> list[tuple[Any, ...]]:
    return db.execute("SELECT * FROM awaitly_workflow_lock").fetchall()


def expire(db: psycopg.Connection) -> None:
    """End every lease now."""
    db.execute("UPDATE awaitly_workflow_lock SET expires_at = clock_timestamp()")


def take_over(db: psycopg.Connection) -> None:
    """Do to every lease what a process does that found it expired."""
    db.execute(
        "UPDATE awaitly_workflow_lock SET owner_token = 'another:1:0', "
        "expires_at = clock_timestamp() + interval '1 minute'"
    )


def release(db: psycopg.Connection) -> None:
    """Give every lease back."""
    db.execute("DELETE FROM awaitly_workflow_lock")


losses = pytest.mark.parametrize("lose", [expire, take_over, release])


# -- taking one ----------------------------------------------------------------------------


def test_a_token_names_host_and_process_and_is_new_each_time(store: SnapshotStore) -> None:
    """A worker's name alone is no token: the same worker may come back after another had it."""
    tokens = set()
    for _ in range(3):
        lease = store.try_acquire("a")
        assert re.fullmatch(
            rf"{re.escape(socket.gethostname())}:{os.getpid()}:[0-9a-f]{{16}}", lease.token
        )
        tokens.add(lease.token)
        lease.release()
    assert len(tokens) == 3


@pytest.mark.parametrize("ttl", [0.25, 2.5, 60, 86_400.125])
def test_a_lease_ends_its_ttl_after_now_by_the_servers_clock(
    store: SnapshotStore, db: psycopg.Connection, ttl: float
) -> None:
    """What is stored is neither rounded nor the client's time, and the lease tells it."""
    store.create_tables()
    before = clock(db)
    lease = store.try_acquire("a", ttl=ttl)
    after = clock(db)
    ((id, token, expires_at),) = lock_rows(db)
    assert (id, token, expires_at) == ("a", lease.token, lease.expires_at)
    assert before + timedelta(seconds=ttl) <= expires_at <= after + timedelta(seconds=ttl)


def test_a_lease_that_stands_is_not_given_away(store: SnapshotStore) -> None:
    """Not even to the store, and the process, that has it."""
    lease = store.try_acquire("a")
    assert store.try_acquire("a") is None
    assert store.try_acquire("b") is not None
    assert lease.held()


def test_an_expired_lease_goes_to_the_next_one(
    store: SnapshotStore, db: psycopg.Connection
) -> None:
    """The row is taken over, with a new token and a new end."""
    first = store.try_acquire("a")
    expire(db)
    second = store.try_acquire("a", ttl=5)
    assert lock_rows(db) == [("a", second.token, second.expires_at)]
    assert second.token != first.token
    assert second.held()
    assert not first.held()


def test_the_lock_table_has_the_full_id(
    make_store: Callable[..., SnapshotStore], db: psycopg.Connection
) -> None:
    """Stores with different prefixes do not get into each other's way."""
    lease = make_store(prefix="x:").try_acquire("a")
    assert lease.id == "a"
    assert [row[0] for row in lock_rows(db)] == ["x:a"]
    assert make_store(prefix="y:").try_acquire("a") is not None


# -- keeping it ----------------------------------------------------------------------------


def test_renewing_moves_the_end_and_nothing_else(
    store: SnapshotStore, db: psycopg.Connection
) -> None:
    """By the ttl it was acquired with, or by another one, counted from now."""
    lease = store.try_acquire("a", ttl=1000)
    for ttl in (None, 5.5, 2000):
        before = clock(db)
        assert lease.renew(ttl)
        after = clock(db)
        assert lock_rows(db) == [("a", lease.token, lease.expires_at)]
        length = timedelta(seconds=ttl or 1000)
        assert before + length <= lease.expires_at <= after + length


@losses
def test_a_lost_lease_is_not_renewed(
    store: SnapshotStore, db: psycopg.Connection, lose: Callable[..., None]
) -> None:
    """One that ran out is not revived, even if nobody else has come yet."""
    lease = store.try_acquire("a")
    told = lease.expires_at
    lose(db)
    rows = lock_rows(db)
    assert lease.renew() is False
    assert lock_rows(db) == rows
    assert lease.expires_at == told


@losses
def test_a_lost_lease_is_not_held(
    store: SnapshotStore, db: psycopg.Connection, lose: Callable[..., None]
) -> None:
    """The server is asked, not the memory."""
    lease = store.try_acquire("a")
    assert lease.held()
    lose(db)
    assert not lease.held()


def test_releasing_lets_the_next_one_in_at_once(store: SnapshotStore) -> None:
    """Not only when the ttl is over; and a second release is none."""
    lease = store.try_acquire("a", ttl=1000)
    lease.release()
    lease.release()
    assert store.try_acquire("a") is not None


def test_releasing_a_lost_lease_leaves_the_new_owners(
    store: SnapshotStore, db: psycopg.Connection
) -> None:
    """It names its own token."""
    lease = store.try_acquire("a")
    take_over(db)
    rows = lock_rows(db)
    lease.release()
    assert lock_rows(db) == rows


# -- lock() --------------------------------------------------------------------------------


def test_already_running_says_who_holds_it_and_until_when(store: SnapshotStore) -> None:
    """In the message and as attributes, and it survives a pickle."""
    held = store.try_acquire("a", ttl=300)
    with pytest.raises(AlreadyRunning, match=re.escape(held.token)) as caught, store.lock("a"):
        pass
    error = pickle.loads(pickle.dumps(caught.value))  # noqa: S301
    assert (error.id, error.holder, error.expires_at) == ("a", held.token, held.expires_at)
    assert f"{held.expires_at:%H:%M:%S}" in str(error)


def test_lock_waits_for_a_holder_that_goes_away(
    store: SnapshotStore, db: psycopg.Connection
) -> None:
    """No longer than it has to: until the other lease has ended."""
    gone = store.try_acquire("a", ttl=0.5)
    with store.lock("a", wait=86_400):
        assert clock(db) >= gone.expires_at


def test_lock_does_not_wait_longer_than_told(store: SnapshotStore) -> None:
    """Then it says that another holds it."""
    store.try_acquire("a", ttl=300)
    with pytest.raises(AlreadyRunning), store.lock("a", wait=0.2):
        pass


def test_lock_gives_the_lease_back_when_its_block_fails(
    store: SnapshotStore, db: psycopg.Connection
) -> None:
    """The error passes through."""
    with pytest.raises(ZeroDivisionError), store.lock("a"):
        1 / 0  # noqa: B018
    assert lock_rows(db) == []


def renewal_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "awaitly-lease-renewal"]


def test_locks_are_renewed_in_the_background_by_one_thread_that_ends_with_the_last(
    store: SnapshotStore, db: psycopg.Connection
) -> None:
    """They outlive their ttls; no thread is left behind."""
    before = set(renewal_threads())  # of earlier tests' stores, about to end
    with store.lock("long", ttl=2) as long:
        with store.lock("short", ttl=2) as short:
            (thread,) = set(renewal_threads()) - before
            wait_until(db, clock(db) + timedelta(seconds=2))
            assert long.held()
            assert short.held()
        told = long.expires_at
        wait_until(db, told)
        assert long.held()
        assert set(renewal_threads()) - before == {thread}
    thread.join(30)
    assert not thread.is_alive()
    assert lock_rows(db) == []


# -- writing under it ----------------------------------------------------------------------


def test_save_under_a_lease_writes_while_it_is_held(store: SnapshotStore) -> None:
    """Inserting and replacing."""
    with store.lock("a") as lease:
        store.save("a", OTHER, lease=lease)
        store.save("a", SNAPSHOT, lease=lease)
    assert store.load("a") == SNAPSHOT


@losses
def test_save_under_a_lost_lease_writes_nothing(
    store: SnapshotStore, db: psycopg.Connection, lose: Callable[..., None]
) -> None:
    """Whoever holds it now finds what it has written itself."""
    store.save("a", SNAPSHOT)
    lease = store.try_acquire("a")
    lose(db)
    before = db.execute("SELECT * FROM awaitly_snapshots").fetchall()
    with pytest.raises(LeaseLost):
        store.save("a", OTHER, lease=lease)
    assert db.execute("SELECT * FROM awaitly_snapshots").fetchall() == before


def test_a_lease_that_ran_out_during_the_callers_transaction_is_lost(
    store: SnapshotStore, db: psycopg.Connection, url: str
) -> None:
    """``now()`` stands still in there, and would still be before the end of the lease."""
    store.save("a", SNAPSHOT)
    with psycopg.connect(url) as caller:
        (began,) = caller.execute("SELECT now()").fetchone()
        lease = store.try_acquire("a")
        expire(db)
        ((_, _, ended),) = lock_rows(db)
        assert began < ended
        with pytest.raises(LeaseLost):
            store.save("a", OTHER, lease=lease, conn=caller)
    assert store.load("a") == SNAPSHOT


def test_a_lease_on_another_id_does_not_count(store: SnapshotStore) -> None:
    """A mistake of the program, told before anything is sent."""
    lease = store.try_acquire("b")
    with pytest.raises(ValueError, match="'b'"):
        store.save("a", SNAPSHOT, lease=lease)
    assert store.load("a") is None


# -- races ---------------------------------------------------------------------------------


def test_of_sixteen_processes_that_want_an_expired_lease_one_gets_it(
    store: SnapshotStore, url: str
) -> None:
    """Two hundred times, all sixteen at once."""
    store.create_tables()
    script = WORKERS / "racers.py"
    done = subprocess.run(
        [sys.executable, script, url, "16", "200"], stdout=subprocess.PIPE, timeout=300, check=True
    )
    rounds = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(rounds) == 200
    assert all(result["winners"] == [result["stored"]] for result in rounds)


def blocked(db: psycopg.Connection, by: int) -> bool:
    """Whether somebody waits for a lock of the session ``by``."""
    return db.execute(
        "SELECT EXISTS (SELECT FROM pg_stat_activity WHERE wait_event_type = 'Lock' "
        "AND %s = ANY(pg_blocking_pids(pid)))",
        (by,),
    ).fetchone()[0]


@pytest.mark.parametrize("moment", ["rewrite", "append", "transaction", "failure", "finish"])
def test_a_zombie_that_waits_for_the_row_of_a_takeover_writes_nothing(
    durable: Durable, url: str, db: psycopg.Connection, moment: str
) -> None:
    """Its statement began while the lease was its own; what counts is whose it is in the end."""
    db.execute("CREATE TABLE paid (amount int)")
    with ExitStack() as stack:
        rival = stack.enter_context(psycopg.connect(url))

        def lose(*_: object) -> None:
            """Another process takes over and goes on, as yet uncommitted."""
            rival.execute("DELETE FROM awaitly_workflow_lock")
            rival.execute(
                "INSERT INTO awaitly_workflow_lock "
                "VALUES ('a', 'rival:1:0', clock_timestamp() + interval '1 minute')"
            )
            # Shorter than the zombie's, so that it shows if that one puts its own back.
            rival.execute(
                """UPDATE awaitly_snapshots SET snapshot = snapshot || '{"rival": true}'"""
            )

        def pay(conn: psycopg.Connection) -> None:
            conn.execute("INSERT INTO paid VALUES (1)")
            lose()

        def fail() -> None:
            lose()
            raise ZeroDivisionError

        def work(step: Step) -> None:
            step("first", lambda: "x" * 20_000)
            if moment == "append":
                step("second", lose)
            elif moment == "rewrite":
                step("second", lambda: lose() or "x" * 40_000)
            elif moment == "transaction":
                step.transaction("second", pay)
            elif moment == "failure":
                step("second", fail)
            else:
                lose()

        pool = stack.enter_context(ThreadPoolExecutor())
        zombie = pool.submit(durable.run, "a", work)
        while not blocked(db, rival.info.backend_pid):
            assert not zombie.done(), zombie.result()
        rival.commit()
        with pytest.raises(LeaseLost):
            zombie.result(60)

    snapshot = durable.store.load("a")
    assert list(snapshot.steps) == ["first"]
    assert snapshot.extra == {"rival": True}
    assert snapshot.execution.status == "running"
    assert [row[1] for row in lock_rows(db)] == ["rival:1:0"]
    assert db.execute("SELECT * FROM paid").fetchall() == []
