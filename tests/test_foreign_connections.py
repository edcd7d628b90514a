"""A good guest: any connection of the caller's works, and is left as it was."""

from __future__ import annotations

import json
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime, timedelta, timezone
from typing import Any

import psycopg
import pytest
from psycopg import IsolationLevel, sql
from psycopg.conninfo import conninfo_to_dict, make_conninfo
from psycopg.rows import dict_row, namedtuple_row, scalar_row, tuple_row
from psycopg.types.json import Jsonb, set_json_dumps, set_json_loads
from psycopg.types.string import TextLoader
from psycopg_pool import ConnectionPool

from awaitly_postgres import Durable, SnapshotStore, Step, StoreError, WorkflowSnapshot, postgres

Db = psycopg.Connection
Configure = Callable[[Db], None]


def snapshot(**values: Any) -> WorkflowSnapshot:
    return WorkflowSnapshot.from_json(
        {
            "formatVersion": 1,
            "steps": {key: {"ok": True, "value": value} for key, value in values.items()},
            "execution": {"status": "running", "lastUpdated": "2026-01-02T03:04:05.678Z"},
        }
    )


def jsonb_as_text(conn: Db) -> None:
    conn.adapters.register_loader("jsonb", TextLoader)  # as Django does


def json_their_way(conn: Db) -> None:
    set_json_loads(lambda text: ("theirs", json.loads(text)), conn)
    set_json_dumps(lambda value: json.dumps({"theirs": value}), conn)


def isolated(level: IsolationLevel) -> Configure:
    def configure(conn: Db) -> None:
        conn.isolation_level = level

    return configure


def with_settings(conn: Db) -> None:
    autocommit, conn.autocommit = conn.autocommit, True
    conn.execute(
        "SELECT set_config('TimeZone', 'Asia/Kathmandu', false), "
        "set_config('DateStyle', 'German, DMY', false), "
        "set_config('IntervalStyle', 'sql_standard', false), "
        "set_config('standard_conforming_strings', 'on', false), "
        "set_config('lock_timeout', '59s', false)"
    )
    conn.autocommit = autocommit


FOREIGN: dict[str, tuple[dict[str, Any], Configure | None]] = {
    "plain": ({}, None),
    "dict_row": ({"row_factory": dict_row}, None),
    "namedtuple_row": ({"row_factory": namedtuple_row}, None),
    "scalar_row": ({"row_factory": scalar_row}, None),
    "RawCursor": ({"cursor_factory": psycopg.RawCursor}, None),
    "ClientCursor": ({"cursor_factory": psycopg.ClientCursor}, None),
    "autocommit": ({"autocommit": True}, None),
    "never prepared": ({"prepare_threshold": None}, None),
    "prepared at once": ({"prepare_threshold": 0}, None),
    "jsonb as text": ({}, jsonb_as_text),
    "json their way": ({}, json_their_way),
    "REPEATABLE READ": ({}, isolated(IsolationLevel.REPEATABLE_READ)),
    "SERIALIZABLE": ({}, isolated(IsolationLevel.SERIALIZABLE)),
    "session settings": ({}, with_settings),
}
foreign = pytest.mark.parametrize(("kwargs", "configure"), FOREIGN.values(), ids=FOREIGN.keys())


def look(conn: Db) -> dict[str, object]:
    """All that we could have changed on a connection."""
    names = ["autocommit", "row_factory", "cursor_factory", "server_cursor_factory"]
    names += ["isolation_level", "read_only", "deferrable", "prepare_threshold", "prepared_max"]
    seen: dict[str, object] = {name: getattr(conn, name) for name in names}
    with psycopg.Cursor(conn, row_factory=tuple_row) as cursor:
        cursor.execute("SELECT name, setting FROM pg_settings ORDER BY name")
        seen["settings"] = cursor.fetchall()
        cursor.execute("SELECT '{\"a\": [1]}'::jsonb, '[2]'::json, %s::text", [Jsonb({"b": 3})])
        seen["adapters"] = cursor.fetchall()
        if conn.prepare_threshold is None:
            cursor.execute("SELECT statement FROM pg_prepared_statements")
            seen["prepared"] = cursor.fetchall()
    seen["status"] = conn.info.transaction_status
    return seen


# -- configurations ------------------------------------------------------------------------


@foreign
def test_a_foreign_connection_works_and_is_left_as_it_was(
    store: SnapshotStore, url: str, kwargs: dict[str, Any], configure: Configure | None
) -> None:
    """The methods that take a connection, from the making of the tables on."""
    with psycopg.connect(url, **kwargs) as conn:
        if configure:
            configure(conn)
        before = look(conn)
        for n in range(6):  # psycopg prepares at the fifth
            store.save("order", snapshot(a=n, b="ü😀"), conn=conn)
            assert store.load("order", conn=conn) == snapshot(a=n, b="ü😀")
        assert store.delete("order", conn=conn)
        durable = Durable(store)
        durable.workflow(workflow)
        assert durable.submit("run", workflow, 7, conn=conn)
        assert not durable.submit("run", workflow, 7, conn=conn)
        assert look(conn) == before
    assert [info.id for info in store.list()] == ["run"]


@foreign
def test_a_foreign_pool_works_and_is_left_as_it_was(
    url: str, kwargs: dict[str, Any], configure: Configure | None
) -> None:
    """The whole store and durable runs, on the one connection of a caller's pool."""
    with ConnectionPool(
        url, min_size=1, max_size=1, kwargs=kwargs, configure=settled(configure)
    ) as pool:
        with pool.connection() as conn:
            before, number = look(conn), conn.info.backend_pid
        store = postgres(pool=pool)
        for n in range(6):
            store.save("order", snapshot(a=n, b="ü😀"))
            assert store.load("order") == snapshot(a=n, b="ü😀")
        durable = Durable(store)
        assert durable.run("run", workflow, 7) == [7, "x" * 9000, 3]
        with pytest.raises(ZeroDivisionError):
            durable.run("failing", lambda step: step.transaction("a", lambda conn: 1 / 0))
        assert [info.id for info in store.list(limit=2, status="running")] == ["order"]
        assert {info.id for info in store.iter()} == {"order", "run", "failing"}
        assert store.try_acquire("order")
        assert store.try_acquire("order") is None
        assert store.stats().by_status == {"running": 1, "completed": 1, "failed": 1}
        assert store.prune(timedelta(0)) == 1
        with pool.connection() as conn:
            assert conn.info.backend_pid == number
            assert look(conn) == before


def workflow(step: Step, number: int) -> list[object]:
    def in_transaction(conn: Db) -> int:
        with psycopg.Cursor(conn, row_factory=tuple_row) as cursor:
            cursor.execute("SELECT 3")
            return int((cursor.fetchone() or (0,))[0])

    return [
        step("plain", lambda: number),
        step("large", lambda: "x" * 9000),
        step.transaction("transaction", in_transaction),
    ]


def settled(configure: Configure | None) -> Configure | None:
    """A pool wants its connections configured and in no transaction."""
    if configure is None:
        return None

    def run(conn: Db) -> None:
        configure(conn)
        conn.rollback()

    return run


@foreign
def test_a_foreign_transaction_carries_a_step(
    store: SnapshotStore, url: str, kwargs: dict[str, Any], configure: Configure | None
) -> None:
    """step.transaction on a connection of the caller's commits with it and leaves it as it was."""
    with psycopg.connect(url, **kwargs) as conn:
        if configure:
            configure(conn)
        conn.rollback()
        before = look(conn)
        conn.rollback()
        durable = Durable(store, transaction=lambda: in_transaction(conn))
        assert durable.run("run", workflow, 7) == [7, "x" * 9000, 3]
        assert look(conn) == before
    loaded = store.load("run")
    assert loaded is not None
    assert loaded.steps["transaction"].value == 3


@contextmanager
def in_transaction(conn: Db) -> Iterator[Db]:
    with conn.transaction():
        yield conn


def test_a_search_path_elsewhere_does_not_matter_to_a_schema(url: str, db: Db) -> None:
    """A store with a schema finds its tables on connections that look elsewhere."""
    (schema,) = db.execute("SELECT current_schema()").fetchone() or ()
    elsewhere = make_conninfo(url, options="-c search_path=pg_catalog")
    with (
        ConnectionPool(elsewhere, min_size=1, max_size=1) as pool,
        psycopg.connect(elsewhere) as conn,
    ):
        store = postgres(pool=pool, schema=schema, table="runs", lock_table="leases")
        assert Durable(store).run("run", workflow, 7) == [7, "x" * 9000, 3]
        store.save("order", snapshot(a=1), conn=conn)
        assert conn.execute("SHOW search_path").fetchone() == ("pg_catalog",)
        conn.commit()
        assert store.load("order") == snapshot(a=1)
    assert db.execute("SELECT id FROM runs ORDER BY id").fetchall() == [("order",), ("run",)]


# -- encodings -----------------------------------------------------------------------------


def database(server: str, encoding: str) -> Iterator[str]:
    name = f"test_{secrets.token_hex(6)}"
    create = "CREATE DATABASE {} ENCODING {} TEMPLATE template0 LC_COLLATE 'C' LC_CTYPE 'C'"
    with psycopg.connect(server, autocommit=True) as admin:
        admin.execute(sql.SQL(create).format(sql.Identifier(name), encoding))
        yield make_conninfo(server, dbname=name)
        admin.execute(sql.SQL("DROP DATABASE {}").format(sql.Identifier(name)))


@pytest.fixture
def sql_ascii(server: str) -> Iterator[str]:
    """A database that knows no encoding, as a container without a locale makes it."""
    yield from database(server, "SQL_ASCII")


@pytest.fixture
def latin1(server: str) -> Iterator[str]:
    """A database in which most of Unicode has no place."""
    yield from database(server, "LATIN1")


def test_sql_ascii_keeps_all_text(sql_ascii: str) -> None:
    """Ids, values and listings come back as text on our own connections."""
    with postgres(sql_ascii, max_size=1) as store:
        store.save("ördër-😀", snapshot(schlüssel="ü😀"))
        assert store.load("ördër-😀") == snapshot(schlüssel="ü😀")
        assert [info.id for info in store.list("ö")] == ["ördër-😀"]
        assert Durable(store).run("run-ü", workflow, 7) == [7, "x" * 9000, 3]
        assert store.stats().by_status == {"running": 1, "completed": 1}
        assert store.prune(timedelta(0)) == 1


def test_sql_ascii_connections_of_the_callers_keep_all_text(sql_ascii: str) -> None:
    """psycopg returns bytes for text there; the store still returns text."""
    with (
        ConnectionPool(sql_ascii, min_size=1, max_size=1) as pool,
        psycopg.connect(sql_ascii) as conn,
    ):
        assert conn.execute("SELECT 'text'::text").fetchone() == (b"text",)
        conn.rollback()
        store = postgres(pool=pool)
        store.save("ördër-😀", snapshot(schlüssel="ü😀"), conn=conn)
        assert store.load("ördër-😀", conn=conn) == snapshot(schlüssel="ü😀")
        conn.commit()
        assert store.load("ördër-😀") == snapshot(schlüssel="ü😀")
        assert [info.id for info in store.list("ö", status="running")] == ["ördër-😀"]
        assert Durable(store).run("run-ü", workflow, 7) == [7, "x" * 9000, 3]
        lease = store.try_acquire("ördër-😀")
        assert lease is not None
        assert lease.renew()
        assert store.stats().by_status == {"running": 1, "completed": 1}


def test_latin1_takes_what_it_has_and_refuses_the_rest(latin1: str) -> None:
    """Text outside of the database's encoding is a StoreError, and nothing is written."""
    with postgres(latin1, max_size=1) as store:
        store.save("ördër", snapshot(a="ü"))
        refused: list[Callable[[], object]] = [
            lambda: store.save("ördër", snapshot(a="😀")),
            lambda: store.save("😀", snapshot()),
            lambda: store.load("😀"),
            lambda: Durable(store).run("run", lambda step: step("a", lambda: "😀")),
        ]
        for use in refused:
            with pytest.raises(StoreError) as caught:
                use()
            assert isinstance(caught.value.__cause__, psycopg.errors.UntranslatableCharacter)
        assert store.load("ördër") == snapshot(a="ü")
        assert [info.id for info in store.list("ö")] == ["ördër"]


def test_a_latin1_connection_refuses_before_it_sends(latin1: str) -> None:
    """A client encoding that cannot carry the text is a StoreError that says what to set."""
    with postgres(latin1) as store, psycopg.connect(latin1, client_encoding="latin1") as conn:
        store.save("ördër", snapshot(a="ü"), conn=conn)
        with pytest.raises(StoreError, match="client_encoding=utf8"):
            store.save("ördër", snapshot(a="😀"), conn=conn)
        assert store.load("ördër", conn=conn) == snapshot(a="ü")


@pytest.mark.parametrize("style", ["German", "SQL,DMY", "SQL,MDY", "Postgres,DMY", "ISO,DMY"])
def test_the_date_style_of_a_connection_does_not_matter(
    store: SnapshotStore, url: str, style: str
) -> None:
    """Neither on the caller's connection nor in the pool: no time goes through it as text."""
    store.create_tables()
    styled = make_conninfo(url, options=conninfo_to_dict(url)["options"] + f" -c DateStyle={style}")
    with psycopg.connect(styled) as conn, postgres(styled) as other:
        durable = Durable(other)

        @durable.workflow
        def work(step: Step) -> Any:
            return step.wait("go", timeout=3600)

        moment = datetime(2030, 12, 30, 17, tzinfo=timezone.utc)
        assert durable.submit("a", work, conn=conn)
        assert not durable.submit("a", work, conn=conn)
        assert durable.with_options(at=moment).submit("b", work, conn=conn)
        assert durable.with_options(delay=3600).submit("c", work, conn=conn)
        assert [info.next_at for info in store.details(["b"], conn=conn)] == [moment]
        conn.commit()
        (outcome,) = durable.resume_pending()
        assert outcome.status == "suspended"
        assert durable.signal("a", "go", 1)
        (outcome,) = durable.resume_pending()
        assert outcome.result == 1
        newest, *_ = durable.list()
        assert newest.id == "a"
        assert sorted(info.id for info in durable.list(after=newest)) == ["b", "c"]
        assert other.prune(timedelta(0)) == 1
