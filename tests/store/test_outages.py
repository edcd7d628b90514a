"""Outages: servers that restart, connections that are cut, and replies that never arrive."""

from __future__ import annotations

import subprocess
import tempfile
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import psycopg
import pytest

from awaitly_postgres import (
    Durable,
    SnapshotStore,
    Step,
    StoreUnavailable,
    embedded,
    postgres,
)
from awaitly_postgres.store import lease
from tests.support import Loss, Proxy

# -- a server that restarts ----------------------------------------------------------------


class Server:
    """A server of these tests' own, fsync on, that may be restarted."""

    def __init__(self, folder: Path) -> None:
        self._handle = embedded.server(folder / "pgdata")
        self.url: str = self._handle.get_uri()

    def restart(self, mode: str) -> None:
        data = self._handle.pgdata
        options = ["-w", "-m", mode, "-D", data, "-l", data / "log"]
        subprocess.run(
            [self._handle.bin_path / "pg_ctl", "restart", *options],
            user=self._handle.system_user,
            cwd="/",
            stdout=subprocess.DEVNULL,
            check=True,
        )

    def stop(self) -> None:
        self._handle.cleanup()


@pytest.fixture(scope="module")
def own_server() -> Iterator[Server]:
    with tempfile.TemporaryDirectory(prefix="awaitly-restarts-") as folder:
        Path(folder).chmod(0o755)  # run by root, the server is another user
        server = Server(Path(folder))
        yield server
        server.stop()


@pytest.mark.parametrize("mode", ["fast", "immediate"])
def test_a_run_goes_on_through_a_restart_of_the_server(own_server: Server, mode: str) -> None:
    """Nothing is lost and nothing runs twice, whatever the restart has met with."""
    bodies: Counter[int] = Counter()

    def act(nr: int) -> str:
        bodies[nr] += 1
        return f"{nr}".ljust(300)

    def work(step: Step) -> int:
        """Goes on without a pause until a few steps after the restart."""
        nr = 0
        with ThreadPoolExecutor() as pool:
            restart = None
            while restart is None or not restart.done():
                nr += 1
                assert step(f"step-{nr}", act, nr) == f"{nr}".ljust(300)
                if nr == 50:
                    restart = pool.submit(own_server.restart, mode)
            restart.result()
        step("last", act, 0)
        return nr

    with postgres(own_server.url) as store:
        count = Durable(store).run(mode, work)
        steps = store.load(mode).steps
    assert {f"step-{nr}" for nr in range(1, count + 1)} | {"last"} == set(steps)
    assert set(bodies.values()) == {1}


def test_a_dead_pool_costs_a_run_nothing(
    make_store: Callable[..., SnapshotStore], db: psycopg.Connection, url: str
) -> None:
    """All its connections are terminated between two steps, again and again."""
    name = f"awaitly-{threading.get_ident()}"
    store = make_store(min_size=4, kwargs={"application_name": name})

    def terminate() -> int:
        return db.execute(
            "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity "
            "WHERE application_name = %s",
            (name,),
        ).fetchone()[0]

    def work(step: Step) -> list[int]:
        return [step(f"step-{nr}", terminate) for nr in range(5)]

    killed = Durable(store).run("a", work)
    assert sum(killed) >= 5
    assert [step.value for step in store.load("a").steps.values()] == killed


# -- a network that loses things -----------------------------------------------------------


class Orders:
    """A workflow that counts how often the body of each step has run."""

    def __init__(self, db: psycopg.Connection) -> None:
        db.execute("CREATE TABLE IF NOT EXISTS payments (id text)")
        self.bodies: Counter[str] = Counter()
        self.broken = False

    def act(self, key: str) -> str:
        self.bodies[key] += 1
        return key

    def pay(self, conn: psycopg.Connection, id: str) -> str:
        conn.execute("INSERT INTO payments VALUES (%s)", (id,))
        return self.act("pay")

    def refuse(self) -> None:
        raise LookupError(self.act("gift"))

    def order(self, step: Step, id: str) -> list[str]:
        done = [step("reserve", self.act, "reserve"), step.transaction("pay", self.pay, id)]
        try:
            step("gift", self.refuse)
        except LookupError as error:
            done.append(error.args[0])
        done.append(step("ship", self.act, "ship"))
        if self.broken:
            raise ZeroDivisionError
        return done


ALL_DONE = ["reserve", "pay", "gift", "ship"]
# What a run asks of the server, one after the other.
BEGIN, RESERVE, PAY_BEGIN, PAY_BODY, PAY_FENCE, PAY_COMMIT, GIFT, SHIP, END = range(9)


@pytest.mark.read_committed
@pytest.mark.parametrize("on_complete", ["keep", "delete"])
@pytest.mark.parametrize("what", ["request", "reply"])
def test_a_run_ends_right_whatever_the_network_loses(
    connect: Callable[..., SnapshotStore],
    proxy: Proxy,
    db: psycopg.Connection,
    what: Loss,
    on_complete: Literal["keep", "delete"],
) -> None:
    """Each request, or its reply, is lost once: no step is lost or doubled, nor the payment.

    Only an open transaction is lost with its connection. Its run stops, and resumes.
    """
    durable = Durable(connect(), on_complete=on_complete)
    stopped_at = []
    for nr in range(END + 1):
        id = f"order-{nr}"
        orders = Orders(db)
        durable.workflow(name=f"order-{nr}")(order := orders.order)
        proxy.lose(what, nr)
        try:
            result = durable.run(id, order, id)
        except (StoreUnavailable, psycopg.OperationalError):
            stopped_at.append(nr)
            result = durable.resume(id)

        assert proxy.has_lost
        assert result == ALL_DONE
        assert orders.bodies - Counter(ALL_DONE) <= Counter(["pay"] * (nr in stopped_at))
        paid = db.execute("SELECT count(*) FROM payments WHERE id = %s", (id,)).fetchone()
        assert paid == (1,)
        snapshot = durable.store.load(id)
        if on_complete == "delete":
            assert snapshot is None
        else:
            assert set(snapshot.steps) == set(ALL_DONE)
            assert snapshot.execution.status == "completed"
    assert db.execute("SELECT * FROM awaitly_workflow_lock").fetchall() == []
    lost_with_it = [PAY_BODY, PAY_FENCE] + [PAY_COMMIT] * (what == "request")
    assert stopped_at == lost_with_it


def test_a_commit_that_is_still_under_way_when_its_connection_is_cut_counts(
    connect: Callable[..., SnapshotStore], proxy: Proxy, db: psycopg.Connection, url: str
) -> None:
    """Nobody writes the snapshot without that step before it is known how the commit has ended."""
    durable = Durable(connect(max_size=3))
    orders = Orders(db)
    with ThreadPoolExecutor() as pool, psycopg.connect(url, autocommit=True) as gate:
        key = gate.info.backend_pid
        gate.execute("SELECT pg_advisory_lock(%s)", (key,))
        # What makes a commit take its time: a constraint that is checked only then.
        db.execute(
            "CREATE FUNCTION wait() RETURNS trigger LANGUAGE plpgsql AS "
            f"$$BEGIN PERFORM pg_advisory_xact_lock({key}); RETURN NULL; END$$"
        )
        db.execute(
            "CREATE CONSTRAINT TRIGGER wait AFTER INSERT ON payments "
            "DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION wait()"
        )

        def blocked_by(pid: int) -> int:
            """Wait until somebody waits for ``pid``; return who."""
            while True:
                waiting = db.execute(
                    "SELECT pid FROM pg_stat_activity WHERE %s = ANY(pg_blocking_pids(pid))", (pid,)
                ).fetchall()
                if waiting:
                    return waiting[0][0]
                assert not run.done(), run.result()

        commits = threading.Event()

        def act_meanwhile() -> str:
            assert commits.wait(60)
            return orders.act("meanwhile")

        @durable.workflow
        def work(step: Step) -> list[str]:
            other = pool.submit(step, "meanwhile", act_meanwhile)
            try:
                return [step.transaction("pay", orders.pay, "a"), other.result(60)]
            finally:
                other.exception(60)

        run = pool.submit(durable.run, "a", work)
        committing = blocked_by(key)
        commits.set()
        proxy.cut(refuse=0)
        blocked_by(committing)
        gate.execute("SELECT pg_advisory_unlock(%s)", (key,))

        assert run.result(60) == ["pay", "meanwhile"]
    assert set(durable.store.load("a").steps) == {"pay", "meanwhile"}
    assert db.execute("SELECT count(*) FROM payments").fetchone() == (1,)


@pytest.mark.parametrize("what", ["request", "reply"])
def test_a_failed_run_resumes_whatever_the_network_loses(
    connect: Callable[..., SnapshotStore], proxy: Proxy, db: psycopg.Connection, what: Loss
) -> None:
    """Load, acquisition, the count of the attempt, steps and end: each is lost once."""
    durable = Durable(connect())
    nr, lost = 0, True
    while lost:
        id = f"order-{nr}"
        orders = Orders(db)
        durable.workflow(name=id)(order := orders.order)
        orders.broken = True
        with pytest.raises(ZeroDivisionError):
            durable.run(id, order, id)
        orders.broken = False
        proxy.lose(what, nr)

        assert durable.resume(id) == ALL_DONE
        lost = proxy.has_lost
        assert orders.bodies == Counter(ALL_DONE)
        assert durable.store.load(id).metadata["attempts"] == 2
        nr += 1
    assert nr > 4


@pytest.mark.parametrize("what", ["request", "reply"])
@pytest.mark.parametrize("row", [None, "the:dead:one"])
def test_an_acquisition_keeps_its_token_whatever_the_network_loses(
    connect: Callable[..., SnapshotStore],
    proxy: Proxy,
    db: psycopg.Connection,
    what: Loss,
    row: str | None,
) -> None:
    """A try of which only the reply was lost is no rival of the next one."""
    store = connect()
    nr, lost = 0, True
    while lost:
        db.execute("DELETE FROM awaitly_workflow_lock")
        if row is not None:
            db.execute("INSERT INTO awaitly_workflow_lock VALUES ('a', %s, '2000-01-01')", (row,))
        proxy.lose(what, nr)
        lease = store.try_acquire("a")
        lost = proxy.has_lost
        assert lease is not None
        stored = db.execute("SELECT owner_token, expires_at FROM awaitly_workflow_lock").fetchall()
        assert stored == [(lease.token, lease.expires_at)]
        nr += 1
    assert nr == (2 if row is None else 3)


# -- an outage -----------------------------------------------------------------------------


def test_an_outage_shorter_than_retry_for_is_waited_out(
    connect: Callable[..., SnapshotStore], proxy: Proxy, db: psycopg.Connection
) -> None:
    """The server refuses a few connections in the middle of a run, then comes back."""
    orders = Orders(db)

    def cut() -> str:
        proxy.cut(refuse=3)
        return orders.act("cut")

    def work(step: Step) -> list[str]:
        return [step("before", orders.act, "before"), step("cut", cut)]

    assert Durable(connect()).run("a", work) == ["before", "cut"]
    assert orders.bodies == Counter(["before", "cut"])


def test_a_run_that_an_outage_stops_can_be_resumed(
    connect: Callable[..., SnapshotStore],
    proxy: Proxy,
    store: SnapshotStore,
    db: psycopg.Connection,
) -> None:
    """Longer than ``retry_for``: its caller is told, and what was recorded is not run again."""
    orders = Orders(db)
    cut_off = Durable(connect(retry_for=0.5), lock_ttl=1)
    elsewhere = Durable(store)

    def cut() -> str:
        proxy.cut()
        return orders.act("cut")

    @elsewhere.workflow
    def work(step: Step) -> list[str]:
        return [step("before", orders.act, "before"), step("cut", cut)]

    with pytest.raises(StoreUnavailable):
        cut_off.run("a", work)
    while not (outcomes := elsewhere.resume_pending()):
        db.execute("SELECT pg_sleep(0.05)")  # until the lease that could not be given back ends
    assert [outcome.result for outcome in outcomes] == [["before", "cut"]]
    assert orders.bodies == {"before": 1, "cut": 2}


def test_a_run_that_an_outage_stops_waits_for_it_once(
    connect: Callable[..., SnapshotStore], proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its caller is told after ``retry_for``, not after as much again to give the lease back."""
    given: list[float | None] = []
    release = lease.release

    def spy(db: Any, params: dict[str, Any], retry_for: float | None = None) -> None:
        given.append(retry_for)
        release(db, params, retry_for)

    monkeypatch.setattr(lease, "release", spy)
    with pytest.raises(StoreUnavailable):
        Durable(connect(retry_for=0.5)).run("a", lambda step: step("cut", proxy.cut))
    assert given == [lease.RELEASE_TIMEOUT]


def test_without_retries_a_cut_connection_is_reported_at_once(
    connect: Callable[..., SnapshotStore], proxy: Proxy
) -> None:
    """``retry_for=0``; the store works again as soon as the server does."""
    store = connect(retry_for=0)
    assert store.load("a") is None
    proxy.lose("request", 0)
    with pytest.raises(StoreUnavailable):
        store.load("a")
    assert store.load("a") is None


def test_a_transaction_that_does_not_end_is_not_waited_for_for_ever(
    make_store: Callable[..., SnapshotStore], url: str
) -> None:
    """A server that has not noticed that the connection is gone keeps it open."""
    db = make_store(retry_for=0.2)._db
    with psycopg.connect(url) as orphan:
        (xid,) = orphan.execute("SELECT txid_current()::text").fetchone()
        with pytest.raises(StoreUnavailable, match="outcome is still unknown"):
            db.pool.lend(lambda conn: db._has_committed(conn, xid), 60)


def test_a_server_notices_soon_that_a_client_has_vanished(store: SnapshotStore) -> None:
    """Its default is two hours, for which it would keep the locks of a transaction."""
    query = b"SELECT source FROM pg_settings WHERE name LIKE 'tcp_keepalives_i%%'"
    assert store._db.rows(query, {}) == [("session",), ("session",)]
