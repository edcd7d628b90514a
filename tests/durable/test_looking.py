"""What `Durable.get`, `list` and `result` tell of stored runs."""

from __future__ import annotations

import re
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from datetime import datetime, timedelta, timezone
from decimal import Decimal
from typing import Any

import psycopg
import pytest
from hypothesis import given
from hypothesis import strategies as st

from awaitly_postgres import (
    DuplicateStepKey,
    Durable,
    RunInfo,
    SnapshotFormatError,
    SnapshotStore,
    Step,
    StepFailed,
    WorkflowCancelled,
    WorkflowError,
    WorkflowNotFound,
    WorkflowSuspended,
    postgres,
)
from awaitly_postgres.codecs import CattrsCodec
from awaitly_postgres.store import statements
from awaitly_postgres.store.rows import STATES
from awaitly_postgres.testing import pass_time
from tests.support import ROOT, sorts_incrementally

DB = psycopg.Connection


class Declined(Exception):
    """With an attribute, which must survive."""

    def __init__(self, code: int) -> None:
        super().__init__(f"code {code}")
        self.code = code


def seen(durable: Durable, id: str) -> RunInfo:
    info = durable.get(id)
    assert info is not None
    return info


@pytest.fixture
def orders(durable: Durable) -> Durable:
    """Runs in each state but two: ``failed`` for good needs no run, ``running`` a lease."""

    @durable.workflow(version=3)
    def order(step: Step, what: str) -> dict[str, str]:
        step("reserve", str.upper, what)
        if what == "card":
            step("pay", decline)
        if what == "approval":
            step.wait("approve")
        return {"done": what}

    def decline() -> None:
        raise Declined(51)

    durable.submit("accepted", order, "later")
    durable.submit("ended", order, "later")
    durable.cancel("ended")
    durable.run("done", order, "now")
    for id in ("card", "approval"):
        with suppress(Declined, WorkflowSuspended):
            durable.run(id, order, id)
    durable.submit("held", order, "held")
    durable.store.try_acquire("held")
    return durable


def test_a_run_is_told_with_its_steps(orders: Durable) -> None:
    """In the order in which they were recorded, with values and times."""
    info = seen(orders, "done")
    assert (info.workflow, info.version, info.state) == ("order", 3, "completed")
    assert info.result == {"done": "now"}
    assert [(step.key, step.state, step.value) for step in info.steps] == [
        ("reserve", "completed", "NOW")
    ]
    assert info.steps[0].started_at is not None
    assert 0 <= (info.steps[0].duration or -1) < 60
    assert info.step_count == 1
    assert abs((info.updated_at - info.seen_at).total_seconds()) < 60


def test_what_was_given_is_told_as_it_is_stored(orders: Durable) -> None:
    """By ``get`` only, as every payload."""
    assert seen(orders, "done").input == {"args": ["now"], "kwargs": {}}
    assert orders.list(state="completed")[0].input is None


def test_a_run_is_read_in_the_callers_transaction(orders: Durable, url: str) -> None:
    """What was submitted there is told before it is committed."""
    with psycopg.connect(url) as conn:
        orders.submit("new", orders._workflows["order"].fn, "x", conn=conn)
        told = orders.get("new", conn=conn)
        assert told is not None
        assert told.state == "pending"
        assert orders.get("new") is None
        conn.rollback()


def test_what_is_not_stored_is_none(orders: Durable) -> None:
    """And not an error: a status page asks for any id."""
    assert orders.get("no-such") is None


def test_a_failure_is_told_as_the_exception_it_was(orders: Durable) -> None:
    """Its class, its attributes and the user's frames, of the run and of the step."""
    info = seen(orders, "card")
    assert info.state == "retrying"
    assert info.next_at is not None
    assert info.next_at > info.updated_at
    assert info.reasons == info.steps[-1].reasons == ("Declined: code 51",)
    for told in (info, info.steps[-1]):
        assert isinstance(told.error, Declined)
        assert told.error.code == 51
        assert "raise Declined(51)" in str(told.traceback)


def test_a_failure_of_version_0_1_is_told_as_a_failed_step(orders: Durable, db: DB) -> None:
    """It has no class to be rebuilt from."""
    db.execute(
        "UPDATE awaitly_snapshots SET snapshot = snapshot #- '{metadata,failure,exception}' "
        "WHERE id = 'card'"
    )
    error = seen(orders, "card").error
    assert isinstance(error, StepFailed)
    assert (error.name, error.reason) == ("Declined", "code 51")


def test_each_state_is_found_by_its_name(orders: Durable) -> None:
    """And by no other."""
    found = {
        state: [info.id for info in orders.list(state=state)]
        for state in ("pending", "running", "waiting", "retrying", "completed", "cancelled")
    }
    assert found == {
        "pending": ["accepted"],
        "running": ["held"],
        "waiting": ["approval"],
        "retrying": ["card"],
        "completed": ["done"],
        "cancelled": ["ended"],
    }
    assert all(seen(orders, id).state == state for state, ids in found.items() for id in ids)


def test_a_waiting_run_says_for_what(orders: Durable) -> None:
    """For a signal it has no time at which it goes on."""
    info = seen(orders, "approval")
    assert (info.waits_for, info.next_at, info.attempts) == (("approve",), None, 0)
    assert isinstance(seen(orders, "ended").error, WorkflowCancelled)


def test_a_held_run_says_by_whom(orders: Durable) -> None:
    """And until when, unless the lease is renewed."""
    info = seen(orders, "held")
    assert info.holder is not None
    assert info.holder.startswith(info.held_by)
    assert info.held_until is not None
    assert info.held_until > info.seen_at


def test_a_listing_goes_on_after_its_last_entry(orders: Durable) -> None:
    """Newest first, each once, whatever the size of the page."""
    pages, last = [], None
    while page := orders.list(limit=2, after=last):
        pages.append(page)
        last = page[-1]
    ids = [info.id for page in pages for info in page]
    assert ids == [info.id for info in orders.store.iter()]
    assert [len(page) for page in pages] == [2, 2, 2]


def test_a_listing_is_narrowed_by_prefix_and_workflow(orders: Durable) -> None:
    """Both are compared exactly."""
    assert {info.id for info in orders.list("a")} == {"accepted", "approval"}
    assert len(orders.list(workflow="order")) == 6
    assert orders.list(workflow="orde") == []


def test_a_listing_tells_no_payloads(orders: Durable) -> None:
    """Steps are counted, not read."""
    (info,) = orders.list(state="completed")
    assert (info.steps, info.step_count, info.result) == ((), 1, None)


def test_metadata_of_the_user_are_kept_apart(store: SnapshotStore, db: DB) -> None:
    """Whatever they are called, they are told as given and found by containment."""
    given = {"tenant": "acme", "attempts": "many", "tags": ["a", "b"]}
    durable = Durable(store, metadata=given)
    durable.run("a", lambda step: 1)
    Durable(store).run("b", lambda step: 1)
    assert seen(durable, "a").metadata == given
    assert seen(durable, "a").attempts == 1
    assert [i.id for i in durable.list(metadata={"tags": ["b"]})] == ["a"]
    assert durable.list(metadata={"tenant": "other"}) == []


def test_empty_metadata_are_contained_in_any(store: SnapshotStore) -> None:
    """In those of a run without any as well; what is no mapping is not taken for empty."""
    durable = Durable(store)
    durable.run("plain", lambda step: 1)
    durable.with_options(metadata={"a": 1}).run("tagged", lambda step: 1)
    assert [info.id for info in durable.list(metadata={})] == ["tagged", "plain"]
    for wrong in ([], 5, "", [("a", 1)]):
        with pytest.raises(TypeError, match="metadata must be a mapping"):
            durable.list(metadata=wrong)  # type: ignore[arg-type]


def test_metadata_of_version_0_1_are_told(store: SnapshotStore, durable: Durable, db: DB) -> None:
    """They stand among what the library writes."""
    durable.run("a", lambda step: 1)
    db.execute(
        "UPDATE awaitly_snapshots SET snapshot = jsonb_set(snapshot, '{metadata,tenant}', '7')"
    )
    assert seen(durable, "a").metadata == {"tenant": 7}


@given(state=st.text().filter(lambda text: text not in STATES))
def test_a_word_that_is_no_state_is_refused(state: str) -> None:
    """Before anything is asked of the database."""

    with (
        postgres("postgresql://nowhere.invalid") as store,
        pytest.raises(ValueError, match="state"),
    ):
        Durable(store).list(state=state)  # type: ignore[arg-type]


def test_a_result_is_decoded_as_run_returns_it(store: SnapshotStore) -> None:
    """By the codec and the workflow's annotation."""
    durable = Durable(store, codec=CattrsCodec())

    @durable.workflow
    def price(step: Step) -> Decimal:
        return Decimal("1.10")

    durable.run("a", price)
    assert seen(durable, "a").result == durable.result("a") == Decimal("1.10")
    assert seen(Durable(store), "a").result == "1.10"  # which does not know the function


def test_the_result_of_another_thread_is_waited_for(orders: Durable) -> None:
    """The run is answered while somebody waits for its result."""
    with ThreadPoolExecutor(1) as pool:
        result = pool.submit(orders.result, "approval", timeout=60)
        assert orders.signal("approval", "approve", True)
        assert orders.resume("approval") == {"done": "approval"}
        assert result.result() == {"done": "approval"}


@pytest.mark.parametrize(
    ("id", "error"),
    [("ended", WorkflowCancelled), ("no-such", WorkflowNotFound), ("card", TimeoutError)],
)
def test_a_result_that_never_comes_is_an_error(
    orders: Durable, id: str, error: type[Exception]
) -> None:
    """Cancelled, not there, or not ended in time: one that is tried again has not ended."""
    with pytest.raises(error):
        orders.result(id, timeout=0)


@pytest.mark.parametrize(
    ("id", "timeout", "error", "message"),
    [
        ("", 0, ValueError, "id must not be empty"),
        ("a\0b", 0, ValueError, "NUL"),
        ("x" * 1001, 0, ValueError, "1,000 is the limit"),
        (7, 0, TypeError, "id must be a string, not int"),
        ("held", float("nan"), ValueError, "timeout must be from 0"),
        ("held", -1, ValueError, "timeout must be from 0"),
        ("held", "1", TypeError, "timeout must be in seconds or a timedelta, not str"),
    ],
)
def test_a_result_is_not_waited_for_with_wrong_arguments(
    orders: Durable, id: Any, timeout: Any, error: type[Exception], message: str
) -> None:
    """A timeout that is no number would never be over; `get` checks the id as well."""
    with pytest.raises(error, match=message):
        orders.result(id, timeout=timeout)
    if id != "held":
        with pytest.raises(error, match=message):
            orders.get(id)


def test_the_timeout_of_a_result_may_be_a_timedelta(orders: Durable) -> None:
    """As everywhere else."""
    with pytest.raises(TimeoutError, match=r"within 0\.001 s: it is running"):
        orders.result("held", timeout=timedelta(milliseconds=1))


@pytest.mark.parametrize("listing", ["durable.list", "store.list", "store.pending"])
def test_a_page_begins_after_an_entry_only(orders: Durable, listing: str) -> None:
    """An id does not tell the place in the listing; a limit has to fit the server's integers."""
    owner, name = listing.split(".")
    look = getattr({"durable": orders, "store": orders.store}[owner], name)
    with pytest.raises(TypeError, match="after must be the last entry of the previous page"):
        look(after="held")
    with pytest.raises(ValueError, match=r"limit must be a positive integer below 2\*\*63"):
        look(limit=2**63)


def test_a_misuse_is_told_with_its_place_in_the_code(durable: Durable) -> None:
    """To whoever calls it, and to whoever looks at the stored run."""

    @durable.workflow
    def twice(step: Step) -> None:
        step("a", str)
        step("a", int)

    with pytest.raises(DuplicateStepKey) as caught:
        durable.run("a", twice)
    assert "twice" in [entry.name for entry in caught.traceback]
    assert 'step("a", int)' in str(seen(durable, "a").traceback)


def test_a_failure_whose_reason_is_not_stored_is_raised_all_the_same(
    durable: Durable,
) -> None:
    """As other programs save it; None would look like a result."""
    execution = {"status": "failed", "lastUpdated": "2000-01-01T00:00:00.000Z"}
    durable.store.save("theirs", {"formatVersion": 1, "steps": {}, "execution": execution})
    assert seen(durable, "theirs").state == "failed"
    with pytest.raises(WorkflowError, match="'theirs' has failed"):
        durable.result("theirs", timeout=0)


def test_a_page_among_many_is_found_by_an_index(store: SnapshotStore, db: DB) -> None:
    """Of 20,000 completed runs, a page of one reads a handful, and so does one waiting run."""
    store.create_tables()
    db.execute(
        "INSERT INTO awaitly_snapshots SELECT 'r' || n, jsonb_build_object('formatVersion', 1, "
        "'steps', '{}'::jsonb, 'execution', jsonb_build_object('status', 'completed', "
        "'lastUpdated', ''), 'metadata', '{\"workflow\": \"w\"}'::jsonb), "
        "clock_timestamp() + make_interval(secs => n) FROM generate_series(1, 20000) n"
    )
    durable = Durable(store)
    with suppress(WorkflowSuspended):
        durable.run("waits", lambda step: step.wait("go"))
    db.execute("ANALYZE awaitly_snapshots")
    plans: list[Any] = []
    for filters in ({"state": "waiting"}, {}, {"prefix": "r1", "limit": 1}):
        plans.append(explained(durable, db, **filters))
    if not sorts_incrementally(db):
        del plans[1:]
    assert [plan for plan in plans if "Seq Scan on awaitly_snapshots" in plan] == []


def test_metadata_are_found_by_the_index_of_the_readme(durable: Durable, db: DB) -> None:
    """A tenant's few runs among 20,000 are looked up, not searched for."""
    durable.store.create_tables()
    db.execute(
        "INSERT INTO awaitly_snapshots SELECT 'r' || n, jsonb_build_object('formatVersion', 1, "
        "'steps', '{}'::jsonb, 'execution', jsonb_build_object('status', 'completed', "
        "'lastUpdated', ''), 'metadata', jsonb_build_object('workflow', 'w', 'custom', "
        "jsonb_build_object('tenant', 'tenant-' || n % 1000))) FROM generate_series(1, 20000) n"
    )
    page = (ROOT / "examples/README.md").read_text("utf-8")
    (ddl,) = re.findall(r"^CREATE INDEX ON awaitly_snapshots USING gin .*;$", page, re.M)
    db.execute(ddl)
    db.execute("ANALYZE awaitly_snapshots")
    (index,) = db.execute(
        "SELECT indexname FROM pg_indexes WHERE tablename = 'awaitly_snapshots' "
        "AND schemaname = current_schema AND indexdef LIKE '%jsonb_path_ops%'"
    ).fetchone()
    plan = explained(durable, db, metadata='{"tenant": "tenant-7"}')
    assert f"Index Scan on {index}" in plan
    assert "Seq Scan on awaitly_snapshots" not in plan
    assert len(durable.list(metadata={"tenant": "tenant-7"})) == 20


def explained(durable: Durable, db: DB, **filters: Any) -> str:
    """Return the plan of a listing."""
    store = durable.store
    params = {
        **store._range(filters.pop("prefix", "")),
        "limit": 100,
        "unfinished": ("state" in filters) or None,
        **filters,
    }
    text = statements.filtered(store._sql.runs, params)
    rows = psycopg.ClientCursor(db).execute(b"EXPLAIN " + text, params).fetchall()
    return "\n".join(line for (line,) in rows)


def test_a_time_is_told_in_utc(orders: Durable) -> None:
    """Aware, whatever the session's time zone."""
    assert seen(orders, "done").updated_at.tzinfo == timezone.utc
    assert seen(orders, "done").updated_at <= datetime.now(timezone.utc).replace(year=9999)


HUGE, TOO_LONG = (
    "1" + "0" * 400,
    "9" * 5000,
)  # no float is as large; Python reads no integer as long
SET = "UPDATE awaitly_snapshots SET snapshot = {} WHERE id = 'odd'"
EDITS = {
    "document": SET.format("%s::jsonb"),
    "metadata": SET.format(
        "jsonb_set(snapshot, '{metadata}', (snapshot->'metadata') || %s::jsonb)"
    ),
    "journal": "INSERT INTO awaitly_snapshots_steps VALUES ('odd', 'a', %s::jsonb)",
}
ODD = [
    *(("document", text) for text in ("1", '"s"', "[]", "null", "{}")),
    ("metadata", f'{{"version": {HUGE}, "attempts": {HUGE}.5}}'),
    ("metadata", f'{{"attempts": {TOO_LONG}}}'),
    ("metadata", f'{{"custom": {"[" * 3000}{"]" * 3000}}}'),
    ("metadata", '{"wakeAt": "0001-01-01T00:00:00+14:00"}'),
    ("metadata", '{"wakeAt": "0001-01-01T00:00:00+00:00"}'),
    *(("journal", text) for text in ("1", '"s"', "[]", "null", "true")),
    ("journal", f'{{"ok": true, "meta": {{"map": "m", "of": {HUGE}, "durationMs": {HUGE}.5}}}}'),
    ("journal", f'{{"ok": true, "meta": {{"map": "m", "of": {TOO_LONG}}}}}'),
]


@pytest.mark.parametrize(("where", "what"), ODD, ids=range(len(ODD)))
def test_one_odd_row_ends_no_listing(durable: Durable, db: DB, where: str, what: str) -> None:
    """It is listed among the others, and reading it alone is at most a typed error."""

    @durable.workflow
    def work(step: Step) -> None: ...

    for id in ("odd", "good"):
        durable.submit(id, work)
    db.execute(EDITS[where], (what,))
    assert {info.id for info in durable.list()} == {"odd", "good"}
    for look in (durable.get, lambda id: durable.result(id, timeout=0)):
        with suppress(SnapshotFormatError, TimeoutError):
            look("odd")
    pass_time(durable, timedelta(days=1))
