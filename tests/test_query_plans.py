"""Finding work: its cost follows what is unfinished, and no row can break it."""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Callable, Iterator, Mapping
from datetime import datetime, timedelta, timezone
from typing import Any

import psycopg
import pytest
from psycopg import sql

from awaitly_postgres import Durable, Outcome, SnapshotInfo, SnapshotStore, Step
from awaitly_postgres.store.statements import filtered
from tests.support import eventually, sorts_incrementally

DB = psycopg.Connection
MakeStore = Callable[..., SnapshotStore]
Plan = dict[str, Any]

FINISHED, PENDING = 10_000, 50
INDEX = "awaitly_snapshots_pending_idx"
JOURNAL = "awaitly_snapshots_steps"  # is asked of crashed runs that pause, one by one
LOOKS = [
    pytest.param(lambda durable: durable.list_pending(), id="list_pending"),
    pytest.param(lambda durable: durable.resume_pending(), id="resume_pending"),
    pytest.param(lambda durable: durable.list_pending("wf-"), id="list_pending with a prefix"),
    pytest.param(
        lambda durable: durable.resume_pending(prefix="wf-"), id="resume_pending with a prefix"
    ),
    pytest.param(
        lambda durable: durable.store.pending(workflows=["job"], after=LONG_AGO),
        id="resume_pending, next page",
    ),
    pytest.param(lambda durable: durable.check(), id="check"),
    pytest.param(lambda durable: durable.check("wf-"), id="check with a prefix"),
]
LONG_AGO = SnapshotInfo("wf-", "running", datetime(2000, 1, 1, tzinfo=timezone.utc))


@pytest.fixture
def crowded(store: SnapshotStore, db: DB) -> SnapshotStore:
    """A store with 10,000 finished workflows of 1.3 kB, and 50 pending ones scattered among them.

    They lie in no order of time, or a scan in that order would seem cheap.
    """
    store.create_tables()
    db.execute(
        """
        INSERT INTO awaitly_snapshots (id, snapshot, updated_at)
        SELECT 'wf-' || lpad(n::text, 6, '0'), jsonb_build_object(
            'formatVersion', 1,
            'steps', jsonb_build_object('a', jsonb_build_object(
                'ok', true, 'value', repeat(md5(n::text), 40))),
            'execution', jsonb_build_object(
                'status', CASE WHEN n %% %(every)s = 0 THEN 'running' ELSE 'completed' END,
                'lastUpdated', '2026-11-22T10:56:04.184Z'),
            'metadata', jsonb_build_object(
                'workflow', 'job', 'version', 1, 'attempts', 0,
                'input', jsonb_build_object('args', '[]'::jsonb, 'kwargs', '{}'::jsonb))),
            clock_timestamp() - make_interval(secs => abs(hashtext(n::text)) %% 1000000)
        FROM generate_series(1, %(rows)s) AS n
        """,
        {"rows": FINISHED + PENDING, "every": (FINISHED + PENDING) // PENDING},
    )
    db.execute("ANALYZE awaitly_snapshots")
    return store


@pytest.fixture
def statement(
    crowded: SnapshotStore, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> tuple[bytes, Mapping[str, Any]]:
    """Catch the very statement that one of the LOOKS sends, and its parameters."""
    caught = []

    def catch(
        store: SnapshotStore, statement: bytes, params: Mapping[str, Any], **_: bool
    ) -> list[Any]:
        caught.append((filtered(statement, params), params))
        return []

    durable = Durable(crowded)
    durable.workflow(name="job")(lambda step: None)
    with monkeypatch.context() as patch:
        patch.setattr(SnapshotStore, "_infos", catch)
        request.param(durable)
    assert len(caught) == 1
    return caught[0]


def scans(plan: Plan) -> Iterator[Plan]:
    """Walk over those parts of the plan that read the table or an index of it."""
    reads = plan.get("Relation Name", "") + plan.get("Index Name", "")
    if plan["Node Type"].endswith("Scan") and "awaitly_snapshots" in reads.replace(JOURNAL, ""):
        yield plan
    for part in plan.get("Plans", ()):
        yield from scans(part)


def indexes(plan: Plan) -> set[str]:
    """Return the indexes by which the plan reads the table; "none" for a scan of it all."""
    bitmaps = [scan for scan in scans(plan) if scan["Node Type"] != "Bitmap Heap Scan"]
    return {scan.get("Index Name", "none") for scan in bitmaps}


@pytest.mark.parametrize("statement", LOOKS, indirect=True)
def test_pending_is_found_by_the_partial_index(
    statement: tuple[bytes, Mapping[str, Any]], db: DB
) -> None:
    """Finished rows are not in it, so their number does not matter."""
    text, params = statement
    plan = db.execute(b"EXPLAIN (FORMAT JSON) " + text, params).fetchone()[0][0]["Plan"]
    assert indexes(plan) == {INDEX}


@pytest.mark.parametrize("statement", LOOKS, indirect=True)
def test_pending_is_found_by_the_partial_index_under_a_generic_plan(
    statement: tuple[bytes, Mapping[str, Any]], db: DB
) -> None:
    """A statement that is prepared and planned once, for any parameters, keeps the index."""
    text, params = statement
    names = list(dict.fromkeys(re.findall(r"%\((\w+)\)s", text.decode())))
    numbered = re.sub(r"%\((\w+)\)s", lambda m: f"${names.index(m[1]) + 1}", text.decode())
    db.execute(f"PREPARE pending AS {numbered}".encode())
    db.execute("SET plan_cache_mode = force_generic_plan")
    values = sql.SQL(", ").join([sql.Literal(params[name]) for name in names])
    explained = sql.SQL("EXPLAIN (FORMAT JSON) EXECUTE pending ({})").format(values)
    plan = db.execute(explained).fetchone()[0][0]["Plan"]
    if "workflows" in names:
        assert f"ANY (${names.index('workflows') + 1})" in json.dumps(plan)  # generic indeed
    assert indexes(plan) == {INDEX}


@pytest.mark.parametrize("statement", LOOKS, indirect=True)
def test_pending_reads_rows_in_proportion_to_the_pending(
    statement: tuple[bytes, Mapping[str, Any]], db: DB
) -> None:
    """Measured, not estimated: of 10,050 rows it looks at the fifty."""
    text, params = statement
    explained = b"EXPLAIN (ANALYZE, FORMAT JSON) " + text
    plan = db.execute(explained, params).fetchone()[0][0]["Plan"]
    read = [
        scan["Actual Loops"] * (scan["Actual Rows"] + scan.get("Rows Removed by Filter", 0))
        for scan in scans(plan)
    ]
    assert set(read) == {PENDING}


def list_of_all(store: SnapshotStore) -> int:
    return len(store.list("wf-", limit=10))


@pytest.mark.parametrize(
    "look",
    [
        pytest.param(lambda store: len(store.list("wf-00001")), id="list with a prefix"),
        pytest.param(list_of_all, id="list of all"),
        pytest.param(lambda store: store.prune(timedelta(seconds=995_000)), id="prune"),
        pytest.param(
            lambda store: store.prune(timedelta(0), state="pending", dry_run=True),
            id="prune in a state",
        ),
    ],
)
def test_looking_for_few_among_many_reads_few(
    crowded: SnapshotStore,
    make_store: MakeStore,
    db: DB,
    url: str,
    look: Callable[[SnapshotStore], int],
) -> None:
    """Whatever plan the server has made: of 10,050 rows it reads about as many as it finds."""
    name = secrets.token_hex(8)
    if look is list_of_all and not sorts_incrementally(db):
        pytest.skip("PostgreSQL 12 sorts all that there is")
    before = rows_read(db)
    with make_store(kwargs={"application_name": name}) as store:
        found = look(store)
    wait_for_counts(db, url, name)
    assert 10 <= found <= rows_read(db) - before < 10 * found


def wait_for_counts(db: DB, url: str, application_name: str) -> None:
    """Return when all is counted that the connections of this name, now closed, have read.

    A connection tells its counts as it ends. Up to PostgreSQL 14 it tells a process that passes
    them on half a second later; those who tell it are heard one after another.
    """
    gone = "SELECT count(*) = 0 FROM pg_stat_activity WHERE application_name = %s"
    eventually(lambda: db.execute(gone, [application_name]).fetchone()[0])
    db.execute("CREATE TABLE heard (x int)")
    with psycopg.connect(url) as last:
        last.execute("INSERT INTO heard VALUES (1)")
    heard = "SELECT n_tup_ins FROM pg_stat_user_tables WHERE relid = 'heard'::regclass"
    eventually(lambda: (db.execute(heard).fetchone() or (0,))[0])


def rows_read(db: DB) -> int:
    """Tell how many rows of the table, and entries of its indexes, have been read so far."""
    query = """
        SELECT seq_tup_read + (
            SELECT sum(idx_tup_read) FROM pg_stat_user_indexes i WHERE i.relid = t.relid)
        FROM pg_stat_user_tables t WHERE relid = 'awaitly_snapshots'::regclass
    """
    return int(db.execute(query).fetchone()[0])


def test_fifty_pending_among_ten_thousand_finished_are_run(crowded: SnapshotStore, db: DB) -> None:
    """Each once, the longest untouched first, and none of the finished."""
    durable, ran = Durable(crowded), []

    @durable.workflow
    def job(step: Step) -> str:
        assert step("a", str)  # recorded
        ran.append(step.workflow_id)
        return "done"

    found = durable.list_pending()
    listed = [info.id for info in found]
    assert len(found) == PENDING
    assert found == sorted(found, key=lambda info: info.updated_at)
    assert durable.resume_pending() == [Outcome(id, "completed", "done", None, 1) for id in listed]
    assert ran == listed
    assert durable.list_pending() == durable.resume_pending() == []


# -- rows that somebody edited -------------------------------------------------------------

NONSENSE = ["null", "true", "17", '"text"', "[]", '["signals", "go"]', '{"a": {}}']
PLACES = [
    "{}",
    "{execution}",
    "{execution,status}",
    "{steps}",
    "{metadata}",
    "{metadata,workflow}",
    "{metadata,version}",
    "{metadata,input}",
    "{metadata,attempts}",
    "{metadata,wakeAt}",
    "{metadata,waits}",
    "{metadata,waits,go}",
    "{metadata,signals}",
    "{metadata,cancelledAt}",
]


@pytest.mark.parametrize("time", ["NULL", "'infinity'", "'-infinity'"])
@pytest.mark.parametrize(("version", "status"), [(1, "completed"), (2, "failed")])
def test_row_without_a_proper_time_is_run_or_refused_once(
    durable: Durable, db: DB, time: str, version: int, status: str
) -> None:
    """The column allows for it, and a listing must come to its end all the same."""

    @durable.workflow(version=version)
    def job(step: Step) -> None:
        step("a", str)

    earlier = Durable(durable.store)
    earlier.submit("a", earlier.workflow(job))
    db.execute(f"UPDATE awaitly_snapshots SET updated_at = {time}")
    assert [outcome.status for outcome in durable.resume_pending()] == [status]


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("nonsense", NONSENSE)
def test_nonsense_in_a_row_disturbs_no_other(
    durable: Durable, db: DB, place: str, nonsense: str
) -> None:
    """Rows are anybody's to edit: one may be lost for it, the rest are found and run."""

    @durable.workflow
    def job(step: Step) -> Any:
        return step.wait("go")

    for id in ("edited", "sound"):
        durable.submit(id, job)
        durable.signal(id, "go", "went")
    if place == "{}":
        db.execute("UPDATE awaitly_snapshots SET snapshot = %s WHERE id = 'edited'", [nonsense])
    else:
        db.execute(
            "UPDATE awaitly_snapshots SET updated_at = updated_at - interval '1 hour', "
            "snapshot = jsonb_set(jsonb_set(snapshot, '{metadata}', snapshot->'metadata' || %s), "
            "%s, %s) WHERE id = 'edited'",
            ['{"waits": {"go": null}, "wakeAt": "2999-01-01T00:00:00.000Z"}', place, nonsense],
        )
    listed = {info.id for info in durable.list_pending()}
    assert "sound" in listed
    outcomes = {outcome.id: outcome for outcome in durable.resume_pending()}
    assert outcomes["sound"] == Outcome("sound", "completed", "went", None, 1)
    assert outcomes.keys() <= {"edited", "sound"}
