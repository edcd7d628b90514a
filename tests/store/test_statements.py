"""What is sent to the server: how many round trips and commits a run takes, and which rows a
statement names."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO

import psycopg
import pytest
from attrs import fields_dict
from psycopg_pool import ConnectionPool

import awaitly_postgres
from awaitly_postgres import (
    Durable,
    Outcome,
    SnapshotStore,
    Step,
    postgres,
)
from awaitly_postgres.store.statements import Statements, compose, expand, filtered, parse

pytestmark = pytest.mark.read_committed

# -- the wire ------------------------------------------------------------------------------


class Wire:
    """What libpq has written down of a connection's traffic."""

    def __init__(self, trace: IO[bytes]) -> None:
        self._trace = trace

    @contextmanager
    def counted(self) -> Iterator[dict[str, int]]:
        """Count round trips, and those of them that ended a transaction."""
        start = self._trace.seek(0, 2)
        counts: dict[str, int] = {}
        yield counts
        self._trace.seek(start)
        ready = re.findall(rb"^.*\tReadyForQuery\t (.)", self._trace.read(), re.M)
        counts |= {"round trips": len(ready), "transactions": ready.count(b"I")}


@pytest.fixture
def wire() -> Iterator[Wire]:
    with tempfile.TemporaryFile() as trace:
        yield Wire(trace)


@pytest.fixture
def traced(wire: Wire, url: str) -> Iterator[SnapshotStore]:
    """A store on one connection of which every message is written down."""

    def trace(conn: psycopg.Connection) -> None:
        conn.pgconn.trace(wire._trace.fileno())

    kwargs = {"autocommit": True}
    with ConnectionPool(url, min_size=1, max_size=1, kwargs=kwargs, configure=trace) as pool:
        store = postgres(pool=pool)
        # Tables are made, and statements prepared, once.
        for size in (10, 5000):
            Durable(store).run(f"first-{size}", work, 12, size)
        yield store


def work(step: Step, count: int, size: int) -> list[int]:
    return [step(f"step-{nr}", lambda nr=nr: f"{nr}".ljust(size)) for nr in range(count)]


@pytest.mark.parametrize("journal_used", [False, True])
@pytest.mark.parametrize("count", [0, 3, 10])
def test_a_run_of_n_steps_takes_n_and_two_commits_of_one_round_trip_each(
    traced: SnapshotStore, wire: Wire, count: int, journal_used: bool
) -> None:
    """Begin with lease and input; each step; end with output, fold and release."""
    with wire.counted() as counts:
        Durable(traced).run("a", work, count, 5000 if journal_used else 10)
    assert counts == {"round trips": count + 2, "transactions": count + 2}


@pytest.mark.parametrize("journal_used", [False, True])
def test_a_resumed_run_of_n_steps_takes_n_and_three_commits(
    traced: SnapshotStore, wire: Wire, journal_used: bool
) -> None:
    """One look at what is there, which commits nothing; lease; count; each step; end."""
    durable = Durable(traced)
    durable.workflow(work)
    durable.submit("a", work, 10, 5000 if journal_used else 10)
    with wire.counted() as counts:
        durable.resume("a")
    assert counts == {"round trips": 1 + 10 + 3, "transactions": 1 + 10 + 3}


def test_a_transaction_step_adds_only_begin_and_commit(traced: SnapshotStore, wire: Wire) -> None:
    """One commit, as any step; what else goes over the wire is the user's."""

    def pay(step: Step) -> None:
        step.transaction("pay", lambda conn: conn.execute("SELECT 1") and None)

    Durable(traced).run("first", pay)  # prepares its statement
    with wire.counted() as counts:
        Durable(traced).run("a", pay)
    assert counts == {"round trips": 2 + 4, "transactions": 2 + 1}


def test_saving_and_loading_take_one_round_trip_each(traced: SnapshotStore, wire: Wire) -> None:
    """With a lease as without."""
    lease = traced.try_acquire("a")
    durable = Durable(traced)
    durable.workflow(work)
    with wire.counted() as counts:
        durable.submit("b", work, 3, 10)
        snapshot = traced.load("b")
        traced.save("a", snapshot)
        traced.save("a", snapshot, lease=lease)
        lease.renew()
        lease.held()
        lease.release()
    assert counts == {"round trips": 7, "transactions": 7}


def test_replaying_a_completed_run_asks_once_and_writes_nothing(
    traced: SnapshotStore, wire: Wire, db: psycopg.Connection
) -> None:
    """No transaction id is used, no log is written; so a view may ask as often as it likes."""
    durable = Durable(traced)
    result = durable.run("a", work, 3, 10)

    def written(call: Callable[[], object]) -> int:
        """WAL bytes, of everybody on the server; hence the fewest of many tries count."""
        here = "SELECT pg_current_wal_insert_lsn()"
        (before,) = db.execute(here).fetchone()
        call()
        (growth,) = db.execute(f"SELECT ({here}) - %s::pg_lsn", (before,)).fetchone()
        return growth

    with wire.counted() as counts:
        assert durable.run("a", work, 3, 10) == result
    assert counts == {"round trips": 1, "transactions": 1}
    assert min(written(lambda: durable.run("a", work, 3, 10)) for _ in range(100)) == 0
    new = iter(range(100))
    assert min(written(lambda: durable.run(f"b-{next(new)}", work, 0, 0)) for _ in range(100)) > 0


def test_a_page_of_runs_is_one_statement(traced: SnapshotStore, wire: Wire) -> None:
    """Whatever it is narrowed by; and so is one run with its steps."""
    durable = Durable(traced)
    for nr in range(3):
        durable.run(f"run-{nr}", work, 3, 10)
    with wire.counted() as counts:
        page = durable.list("run-", state="completed", metadata=None, limit=2)
        assert len(durable.list("run-", after=page[-1])) == 1
        assert durable.get("run-1").step_count == 3
    assert counts == {"round trips": 3, "transactions": 3}


def test_finding_that_another_was_faster_asks_once_and_writes_nothing(
    traced: SnapshotStore, wire: Wire, url: str
) -> None:
    """Of a run that was pending when it was listed: no lease is taken that must be given back."""
    with postgres(url) as store, ExitStack() as stack:
        here, elsewhere = Durable(traced), Durable(store)
        for durable in (here, elsewhere):
            durable.workflow(work)
        for id in ("a", "b"):
            here.submit(id, work, 1, 10)
        counts: dict[str, int] = {}

        def meanwhile(outcome: Outcome) -> None:
            nonlocal counts
            if outcome.id == "a":
                elsewhere.resume("b")
                counts = stack.enter_context(wire.counted())
            else:
                stack.pop_all().close()

        here.resume_pending(on_progress=meanwhile)
    assert counts == {"round trips": 1, "transactions": 1}


# -- the statements ------------------------------------------------------------------------

WRITES = [
    *("save", "create", "begin", "take_up", "give_up", "refuse"),
    *("write", "fold", "write_anew", "expire"),
    *("finish", "finish_and_fold"),
    *("append", "append_isolated", "write_isolated"),
    *("wait_for_commit", "lock_lease_row"),
    *("discard", "delete", "cancel", "rewind", "make_due", "move_times", "signal"),
    *("acquire", "take_over", "save_under_lease", "renew", "release"),
]
READS_AND_HOUSEKEEPING = [
    *(
        "load",
        "read_for_resume",
        "check_history",
        "exists",
        "signal_for",
        "held",
        "holder",
        "now",
        "list",
        "runs",
        "get",
    ),
    *("pending", "retry_at", "unfinished", "where_state", "stats", "distributed_bytes"),
    *("stored_calls", "create_many"),
    *("prunable", "delete_many", "delete_many_journals"),
    *("sweep_journal", "sweep_locks", "tables_exist", "schema_exists", "serialize_ddl"),
    *("citus", "citus_worker"),
]
NEEDING_A_JOURNAL = {"append", "append_isolated"}
NEEDING_A_JOURNAL |= {"delete_many_journals", "sweep_journal"}
TABLES = {"snaps": "id", "snaps_steps": "id", "locks": "workflow_id"}


def composed(journal: bool) -> Statements:
    return compose("snaps", "locks", None, journal=journal)


statements = pytest.mark.parametrize(
    ("name", "text"),
    [
        pytest.param(name, getattr(composed(journal), name).decode(), id=f"{name}-{journal}")
        for name in WRITES
        for journal in (True, False)
        if journal or name not in NEEDING_A_JOURNAL
    ],
)


def test_every_statement_is_judged_here() -> None:
    """A new one has to be put into one of the two lists."""
    named = composed(True).texts
    assert sorted(named) == sorted(WRITES + READS_AND_HOUSEKEEPING)
    changing = re.compile(rb"\b(INSERT|UPDATE|DELETE)\b")
    changes = {name for name in READS_AND_HOUSEKEEPING if changing.search(named[name])}
    assert changes == {
        *("create_many", "delete_many", "delete_many_journals"),
        *("sweep_journal", "sweep_locks"),
    }


def test_every_statement_is_used_and_every_one_used_is_there() -> None:
    """They are attributes by name only, so no type checker sees a slip."""
    package = Path(awaitly_postgres.__file__).parent
    used = {
        name
        for file in package.rglob("*.py")
        if file.name != "statements.py"  # where sql is psycopg's
        for name in re.findall(r"\b_?sql\.(\w+)", file.read_text("utf-8"))
    }
    fields = fields_dict(Statements).keys()
    assert used - fields == composed(True).texts.keys()
    assert not fields & composed(True).texts.keys()  # it would hide the statement


def test_without_a_journal_no_statement_names_its_table() -> None:
    """It is not there: not asked, not swept, not made. What needs it is no attribute."""
    without = composed(False)
    assert composed(True).texts.keys() - without.texts.keys() == NEEDING_A_JOURNAL
    assert "snaps_steps" not in repr((without.texts, without.ddl, without.regclasses))
    with pytest.raises(AttributeError, match="'append'"):
        _ = without.append


@pytest.mark.parametrize("journal", [True, False])
def test_what_is_sent_has_no_comments_and_no_braces_of_ours(journal: bool) -> None:
    """A comment on one line with the SQL would hide the rest of it; a condition is dropped with
    its mark, and is about a parameter of its statement."""
    statements = composed(journal)
    for name, text in statements.texts.items():
        conditions = re.findall(r" -- if (\w+)$", text.decode(), re.M)
        assert all(f"%({condition})s".encode() in text for condition in conditions), name
        for given in ({}, dict.fromkeys(conditions, "x")):
            sent = filtered(text, given).decode()
            assert not re.search(r"--|\n|  |\{\w+\}", sent), name
    assert not re.search(r"--|\{\w+\}", "".join(statements.ddl.values()))


def test_every_statement_says_what_it_is_for() -> None:
    """In a comment below its name."""
    folder = Path(awaitly_postgres.__file__).parent / "store"
    for file in ("schema.sql", "queries.sql"):
        text = (folder / file).read_text("utf-8")
        assert max(map(len, text.splitlines())) <= 100
        assert not re.findall(r"^-- (?:name|ddl): (.*)\n(?!-- \w)", text, re.M)


def test_an_unknown_fragment_is_refused_with_the_name_of_the_statement() -> None:
    """A slip in a file is seen when the first store is made, whatever it does later."""
    text = "-- fragment: one\n1\n-- name: count\nSELECT {one}, {two}\n-- fragment: two\n2\n"
    with pytest.raises(ValueError, match=r"name 'count' uses \{two\}, not above it"):
        expand(parse(text), {}, {})


@statements
def test_every_write_names_exactly_one_id(name: str, text: str) -> None:
    """Whatever table a part of it reads or changes, it does so for ``%(id)s``: so the tables can
    be distributed by it."""
    assert "%(ids)s" not in text
    for part in parts_with_a_table(text):
        table = re.search(r'(?:FROM|INTO|UPDATE) "(\w+)"', part)[1]
        if part.startswith("INSERT"):
            columns, values = re.search(r"\(([\w, ]+)\) (?:SELECT|VALUES) ?\(?(.*)", part).groups()
            assert columns.split(", ")[0] == TABLES[table]
            if values.startswith("workflow_id,"):  # of the lease's row, which is that of the id
                fence = r'.* FROM "locks"( AS lease, .*)? WHERE workflow_id = %\(id\)s'
                assert re.match(fence, values)
            else:
                assert values.startswith("%(id)s") or (name == "save" and values.startswith("id,"))
        else:
            assert re.search(rf"WHERE (\w\.)?{TABLES[table]} = %\(id\)s( |\)|$)", part), part


def parts_with_a_table(text: str) -> list[str]:
    """Take out what stands in parentheses, innermost first; keep what names a table."""
    text = re.sub(r"%\((\w+)\)s", r"%<\1>s", text).replace("', '", "','")
    text = re.sub(r'INTO "(\w+)" \(([\w, ]+)\)', r'INTO "\1" <\2>', text)
    text = re.sub(r"VALUES \((%<id>s)", r"VALUES \1 (", text)
    parts = []
    while inner := re.search(r"\(([^()]*)\)", text):
        parts.append(inner[1])
        text = text[: inner.start()] + "…" + text[inner.end() :]
    parts.append(re.sub(r"^WITH .*?… (?=INSERT|UPDATE|SELECT|DELETE)", "", text))
    naming = [part for part in parts if re.search(r'(FROM|INTO|UPDATE) "', part)]
    return [part.replace("<", "(").replace(">", ")") for part in naming]


@statements
def test_no_write_asks_for_a_time_that_stands_still(name: str, text: str) -> None:
    """``now()`` is that of the beginning of the caller's transaction."""
    still = r"\b(now\(\)|current_timestamp|localtimestamp|transaction_timestamp)"
    assert not re.search(still, text, re.IGNORECASE)


@statements
def test_a_write_is_one_that_citus_takes(name: str, text: str, db: psycopg.Connection) -> None:
    """It calls nothing volatile; and nothing that depends on the session with a column of a row
    that it changes. Such a call may stand in a query that only reads."""
    called = {call[1].lower() for call in CALL.finditer(text)}
    query = "SELECT proname, provolatile FROM pg_proc WHERE prokind = 'f' AND proname = ANY(%s)"
    kinds: dict[str, set[str]] = {}
    for function, kind in db.execute(query, [list(called)]):
        kinds.setdefault(function, set()).add(kind)
    assert [function for function, found in kinds.items() if "v" in found] == []
    for function, arguments, command in calls(text):
        if "s" in kinds.get(function, set()) and command != "SELECT":
            assert not COLUMN.search(re.sub(r"'[^']*'|%\(\w+\)s", "", arguments)), function


CALL = re.compile(r"\b(\w+)\(")
COLUMN = re.compile(
    r"\b(id|snapshot|updated_at|key|step|workflow_id|owner_token|expires_at|EXCLUDED)\b"
)


def calls(text: str) -> Iterator[tuple[str, str, str]]:
    """What a statement calls, with which arguments, and what the query around the call does."""
    text = re.sub(r"%\((\w+)\)s", "%s", text)
    depths, depth = [], 0
    for character in text:
        depth += character == "("
        depths.append(depth)
        depth -= character == ")"
    for call in CALL.finditer(text):
        inside = depths[call.end() - 1]
        end = next(
            i for i in range(call.end(), len(text)) if depths[i] == inside and text[i] == ")"
        )
        commands = [
            found
            for found in re.finditer(
                r"\b(SELECT|INSERT|UPDATE|DELETE|RETURNING)\b(?! SET| SKIP)", text
            )
            if found.start() < call.start()
            and min(depths[found.start() : call.start() + 1]) == depths[found.start()]
        ]
        # The innermost query around it; a subquery in what an UPDATE sets belongs to the UPDATE.
        outer = [c[1] for c in commands if depths[c.start()] <= 1]
        yield call[1].lower(), text[call.end() : end], outer[-1] if outer else "SELECT"


def test_what_asks_every_shard_is_listed_in_one_place() -> None:
    """At the top of the file; all else names one id."""
    file = Path(awaitly_postgres.__file__).parent / "store/queries.sql"
    listed = re.search(r"These ask every shard.*?:\n((?:--     .*\n)+)", file.read_text("utf-8"))
    tables = re.compile("|".join(f'"{table}"' for table in TABLES))
    naming_none = {
        name
        for name, text in composed(True).texts.items()
        if tables.search(text.decode()) and b"%(id)s" not in text
    }
    assert set(re.findall(r"\w+", listed[1])) == naming_none


def test_what_citus_pulls_to_the_coordinator_is_listed_in_one_place() -> None:
    """Its router plans no INSERT that has a WITH, nor a WITH that has an INSERT, and no INSERT of a
    query whose id is not a column."""
    file = Path(awaitly_postgres.__file__).parent / "store/queries.sql"
    listed = re.search(
        r"It pulls the rows of these.*?:\n((?:--     .*\n)+)", file.read_text("utf-8")
    )
    pulls = re.compile(rb"^WITH .*\bINSERT\b|^INSERT .*?\) SELECT (?!workflow_id,)")
    pulled = {name for name in WRITES if pulls.search(composed(True).texts[name])}
    assert set(re.findall(r"\w+", listed[1])) == pulled


@statements
def test_a_case_that_an_update_sets_calls_what_is_immutable(
    name: str, text: str, db: psycopg.Connection
) -> None:
    """And a COALESCE likewise; else the call stands in a query of its own, which Citus computes
    first."""
    query = "SELECT proname FROM pg_proc WHERE prokind = 'f' AND provolatile <> 'i'"
    mutable = {function for (function,) in db.execute(query)}
    for update in re.finditer(r"UPDATE \S+ SET", text):
        part = text[update.end() : end_of_clause(text, update.end())]
        while subquery := re.search(r"\(SELECT ", part):
            part = f"{part[: subquery.start()]}…{part[end_of_clause(part, subquery.end()) + 1 :]}"
        for call in re.finditer(r"(\w+)\(", part):
            before = part[: call.start()]
            while (without := re.sub(r"\([^()]*\)", "", before)) != before:
                before = without  # of calls that have ended
            is_choice = "COALESCE(" in before or before.count("CASE ") > before.count(" END")
            assert not (is_choice and call[1] in mutable), call[1]


def end_of_clause(text: str, at: int) -> int:
    """Where a closing parenthesis, or a WHERE, ends what begins at ``at``."""
    depth = 0
    for token in re.finditer(r"[()]|\bWHERE\b|$", text[at:]):
        if depth == 0 and token[0] != "(":
            break
        depth += {"(": 1, ")": -1}.get(token[0], 0)
    return at + token.start()


@statements
def test_an_infinite_pause_fails_in_no_branch(name: str, text: str, db: psycopg.Connection) -> None:
    """Nor does none at all: Citus computes every branch of a CASE, also those not taken."""
    for interval in re.finditer(r"make_interval\(", text):
        call = text[interval.start() : end_of_clause(text, interval.end()) + 1]
        for pause in (None, float("inf")):
            db.execute(f"SELECT {call}", {"pause": pause, "ttl": 60.0})


@pytest.mark.parametrize("name", READS_AND_HOUSEKEEPING)
def test_a_subquery_can_be_handed_on_to_the_shards(name: str) -> None:
    """Citus takes no LIMIT in one that names a column of the query around it, nor a bare
    aggregate over a table; and no UNION below the top."""
    text = getattr(composed(True), name).decode()
    assert not re.search(r"\([^()]*\bUNION\b", text)
    for part in parts_with_a_table(text):
        if re.search(r"\b(s|snaps)\.id\b", part) and re.search(r'FROM "\w+" [jl] WHERE', part):
            assert "LIMIT" not in part
            assert part.startswith("SELECT FROM") or "GROUP BY j.id" in part


@statements
def test_rows_are_locked_by_their_id_only(name: str, text: str) -> None:
    """Citus knows then which node to ask."""
    lock = re.compile("FOR (UPDATE|NO KEY UPDATE|KEY SHARE)")
    locking = [part for part in parts_with_a_table(text) if lock.search(part)]
    assert len(lock.findall(text)) == len(locking)
    assert all(re.search(r"WHERE (workflow_)?id = %\(id\)s", part) for part in locking)
