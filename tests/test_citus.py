"""What is done differently where the extension citus is there. There is no cluster here, only the
traces that one leaves in a database; ``--citus`` runs the suite's core on a real one."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator

import psycopg
import pytest
from psycopg.conninfo import make_conninfo

from awaitly_postgres import (
    Durable,
    SchemaMissing,
    SnapshotStore,
    Step,
    StoreError,
    StoreUnavailable,
    postgres,
)
from tests.support import distribute

TRACES = """
INSERT INTO pg_extension
SELECT 999999, 'citus', extowner, extnamespace, false, '13.0-1', NULL, NULL
FROM pg_extension WHERE extname = 'plpgsql';
CREATE TABLE pg_dist_local_group (groupid int);
INSERT INTO pg_dist_local_group VALUES (0);
CREATE TABLE pg_dist_partition (logicalrelid regclass);
CREATE FUNCTION citus_total_relation_size(regclass) RETURNS bigint LANGUAGE sql
AS 'SELECT 1000000000::bigint';
"""


@pytest.fixture
def cluster(server: str) -> Iterator[str]:
    """The URL of a database that looks like the coordinator of a cluster."""
    name = f"test_{secrets.token_hex(6)}"
    with psycopg.connect(server, autocommit=True) as admin:
        admin.execute(f"CREATE DATABASE {name}")
        url = make_conninfo(server, dbname=name)
        try:
            with psycopg.connect(url, autocommit=True) as conn:
                conn.execute(TRACES)
            yield url
        finally:
            admin.execute(f"DROP DATABASE {name}")


def work(step: Step) -> str:
    return step("a", lambda: "x" * 5000) + step("b", str)


def test_a_plan_is_made_for_each_id(cluster: str, store: SnapshotStore) -> None:
    """A generic one, which is cheaper, knows no shard."""
    with postgres(cluster) as distributed:
        assert distributed._db.rows(b"SHOW plan_cache_mode", {}) == [("auto",)]
        assert Durable(distributed).run("a", work) == "x" * 5000
    assert store._db.rows(b"SHOW plan_cache_mode", {}) == [("force_generic_plan",)]


def test_no_tables_are_made_on_a_worker_node(cluster: str) -> None:
    """They would be local, and the same id could run there and on the coordinator."""
    with psycopg.connect(cluster, autocommit=True) as conn, postgres(cluster) as store:
        conn.execute("UPDATE pg_dist_local_group SET groupid = 2")
        for use in (store.create_tables, store.list, lambda: Durable(store).run("a", work)):
            with pytest.raises(SchemaMissing, match="on the coordinator and distribute") as caught:
                use()
            assert caught.value.ddl == store.ddl()
        with pytest.raises(SchemaMissing):
            store.list()
        conn.execute(store.ddl())  # as distributed from the coordinator
        assert Durable(store).run("a", work) == "x" * 5000


def test_the_recipe_distributes_what_a_run_needs(cluster: str) -> None:
    """It is what ``--citus`` has the tables distributed by; runs under way wait for its end."""
    with psycopg.connect(cluster, autocommit=True) as conn, postgres(cluster) as store:
        conn.execute(
            "CREATE FUNCTION create_distributed_table(text, text, colocate_with text, "
            "shard_count int DEFAULT NULL) RETURNS text LANGUAGE sql AS "
            "'INSERT INTO pg_dist_partition VALUES ($1::regclass) RETURNING $1'"
        )
        distribute(cluster)
        distributed = conn.execute("SELECT logicalrelid::text FROM pg_dist_partition").fetchall()
        assert {name for (name,) in distributed} == {*store._db.sql.regclasses}
        assert Durable(store).run("a", work) == "x" * 5000


def test_the_size_of_distributed_tables_is_that_of_their_shards(cluster: str) -> None:
    """Of one that is not distributed, its own."""
    with psycopg.connect(cluster, autocommit=True) as conn, postgres(cluster) as store:
        store.create_tables()
        assert 0 < store.stats().bytes < 1_000_000
        conn.execute("INSERT INTO pg_dist_partition VALUES ('awaitly_snapshots'::regclass)")
        assert 1_000_000_000 < store.stats().bytes < 1_001_000_000


@pytest.mark.parametrize(
    ("message", "error"),
    [
        ("failure on connection marked as essential: worker-1:5432", StoreUnavailable),
        ("server closed the connection unexpectedly", StoreUnavailable),
        ("cache lookup failed for type 16", StoreError),
    ],
)
def test_a_lost_worker_node_is_an_outage(
    make_store: Callable[..., SnapshotStore],
    db: psycopg.Connection,
    message: str,
    error: type[StoreError],
) -> None:
    """Citus tells it as an internal error; others of that kind are none."""
    store = make_store(retry_for=0)
    store.create_tables()
    db.execute(
        "CREATE FUNCTION lose() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN "
        f"RAISE EXCEPTION '{message}' USING ERRCODE = 'XX000'; END $$"
    )
    db.execute("CREATE TRIGGER lose BEFORE INSERT ON awaitly_workflow_lock EXECUTE FUNCTION lose()")
    with pytest.raises(StoreError) as caught:
        store.try_acquire("a")
    assert type(caught.value) is error
    db.execute("DROP TRIGGER lose ON awaitly_workflow_lock")
    assert store.try_acquire("a") is not None
