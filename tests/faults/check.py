"""What is looked at when the faults are over: the database, and the notes of the workers."""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime, timedelta, timezone
from pathlib import Path

import psycopg

from awaitly_postgres import Durable, postgres

from . import proxy, workload
from .turns import GOOD, MAX_ATTEMPTS
from .workload import Setup, value_of

SCHEMA = """
CREATE TABLE effects (id text, key text, token text);
CREATE TABLE audit (
  seq bigserial PRIMARY KEY, tx bigint DEFAULT txid_current(),
  id text, what text, who text DEFAULT current_setting('application_name'), token text
);
CREATE FUNCTION note_write() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
  INSERT INTO audit (id, what) VALUES (NEW.id, 'write'); RETURN NULL;
END $$;
CREATE FUNCTION note_lease() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
  IF TG_OP = 'DELETE' THEN
    INSERT INTO audit (id, what, token) VALUES (OLD.workflow_id, 'free', OLD.owner_token);
  ELSE
    INSERT INTO audit (id, what, token) VALUES (NEW.workflow_id, 'hold', NEW.owner_token);
  END IF;
  RETURN NULL;
END $$;
CREATE TABLE erased (id text, key text, who text DEFAULT current_setting('application_name'));
CREATE FUNCTION note_erased() RETURNS trigger LANGUAGE plpgsql AS $$
  DECLARE before jsonb; after jsonb;
BEGIN
  IF TG_TABLE_NAME = 'awaitly_snapshots' THEN
    before := OLD.snapshot->'steps';
    after := NEW.snapshot->'steps';
  ELSIF TG_OP = 'UPDATE' THEN
    before := jsonb_build_object(OLD.key, OLD.step);
    after := jsonb_build_object(NEW.key, NEW.step);
  ELSE
    before := jsonb_build_object(OLD.key, OLD.step);
    SELECT snapshot->'steps' INTO after FROM awaitly_snapshots WHERE id = OLD.id;
    IF NOT FOUND THEN RETURN NULL; END IF;  -- the run was deleted, not a step of it
  END IF;
  INSERT INTO erased (id, key) SELECT OLD.id, was.key FROM jsonb_each(before) AS was
    WHERE was.value->'ok' = 'true'
    AND after->was.key->'value' IS DISTINCT FROM was.value->'value';
  RETURN NULL;
END $$;
CREATE TRIGGER note_erased AFTER UPDATE ON awaitly_snapshots
  FOR EACH ROW EXECUTE FUNCTION note_erased();
CREATE TRIGGER note_erased AFTER UPDATE OR DELETE ON awaitly_snapshots_steps
  FOR EACH ROW EXECUTE FUNCTION note_erased();
CREATE TRIGGER note AFTER INSERT OR UPDATE ON awaitly_snapshots
  FOR EACH ROW EXECUTE FUNCTION note_write();
CREATE TRIGGER note AFTER INSERT OR UPDATE ON awaitly_snapshots_steps
  FOR EACH ROW EXECUTE FUNCTION note_write();
CREATE TRIGGER note AFTER INSERT OR UPDATE OR DELETE ON awaitly_workflow_lock
  FOR EACH ROW EXECUTE FUNCTION note_lease();
"""

POISON = "poison-"  # how the ids begin of what never comes to an end
FOREIGN = "foreign-"  # ... and of what cannot even be started
# What a step of a thread may meet whose run has ended, or drifted, or is another worker's now.
REFUSALS = {"WorkflowError", "Interrupted", "LeaseLost"}


@dataclass
class Row:
    """One line of the report. ``paused`` and ``repeated`` may be; all after must be nought."""

    fault: str
    injections: int = 0
    workflows: int = 0
    acknowledged: int = 0
    paused: int = 0  # failed after so many starts that their pause outlasted the test
    repeated: int = 0  # bodies that ran again, their first run not having been recorded
    lost: int = 0  # acknowledged, and not stored or stored otherwise; erased; refused, and stored
    doubled: int = 0  # acknowledged with two results, or an effect that is not there once
    unfinished: int = 0
    overlaps: int = 0  # writes accepted from somebody who did not own the id
    leftovers: int = 0  # lock rows, journal rows, connections, threads
    broke: int = 0  # workers that met what they should not
    seconds: float = 0.0
    remarks: list[str] = field(default_factory=list)
    not_made: str = ""  # why this fault cannot be made here

    @property
    def flaws(self) -> int:
        wrong = self.lost + self.doubled + self.unfinished
        return wrong + self.overlaps + self.leftovers + self.broke

    def remark(self, text: str) -> None:
        if len(self.remarks) < 20:
            self.remarks.append(text[:500])


def prepare(url: str) -> None:
    """Make the tables, and the triggers that note who writes under whose lease, and over what."""
    with postgres(url) as store:
        store.create_tables()
    with psycopg.connect(url, autocommit=True) as conn:
        conn.execute(SCHEMA)


def check(row: Row, url: str, folder: Path) -> None:
    """Fill in what was found."""
    _resume_paused(row, url, folder)
    ran: Counter[tuple[str, str]] = Counter()
    got: dict[tuple[str, str], set[str]] = defaultdict(set)
    refused: dict[tuple[str, str], set[str]] = defaultdict(set)
    struck: Counter[str] = Counter()
    refused_by: Counter[str] = Counter()
    for line in (folder / "log").read_text().splitlines():
        pid, what, *words = line.split(" ")
        if what in ("ran", "got", "refused"):
            id, key, token = words
            if what == "got":
                got[id, key].add(token)
            elif what == "refused":
                refused[id, key].add(token)
            else:
                ran[id, key] += 1
        elif what == "broke":
            row.broke += 1
            row.remark(f"worker {pid} broke: {' '.join(words)}")
        elif what == "forked" and words[1] != "0":
            row.broke += 1
            row.remark(f"worker {pid}: its child ({words[0]}) ended with {words[1]}")
        elif what == "interrupted":
            struck[words[0]] += 1
        elif what == "refused_by":
            refused_by[words[0]] += 1
        elif what == "lease":
            row.leftovers += 1
            row.remark(f"worker {pid} was interrupted and has left the lease of {words[0]}")
        elif what == "thread":
            row.leftovers += 1
            row.remark(f"worker {pid} has left the thread {words[0]}")
    if late := proxy.spoilt(folder, "late"):
        row.remark(f"note: {late} writes came when their runs had gone on without them")
    if struck:
        row.remark(f"note: {struck['commit']} of {struck.total()} interrupts struck in a COMMIT")
    if refused_by:
        row.remark(
            f"note: steps of threads were refused, their runs having ended: {dict(refused_by)}"
        )
    for name in refused_by.keys() - REFUSALS:
        row.broke += 1
        row.remark(f"{refused_by[name]} steps of threads met {name}")
    row.acknowledged = len(got)
    row.repeated = sum(times - 1 for times in ran.values())
    _check_steps(row, url, got, refused)
    with psycopg.connect(url, autocommit=True) as conn:
        _check_poison(row, conn)
        _check_erased(row, conn)
        _check_owners(row, conn)
        _check_leftovers(row, url, conn)


def _resume_paused(row: Row, url: str, folder: Path) -> None:
    """Finish, without waiting, what waits for the next try after a failure."""
    workload.begin(Setup(url, str(folder), seed=0, ttl=30))
    with postgres(url, max_size=2) as store:
        durable = Durable(store)
        durable.workflow(workload.order)
        now = datetime.now(timezone.utc).isoformat()
        for info in list(store.iter(status="failed")):
            if not info.id.startswith(GOOD):
                continue
            if (store.load(info.id).metadata or {})["wakeAt"] > now:
                row.paused += 1
                for _ in range(50):  # it may fail again
                    with suppress(ConnectionResetError):
                        durable.resume(info.id)
                        break


def _check_steps(
    row: Row,
    url: str,
    got: dict[tuple[str, str], set[str]],
    refused: dict[tuple[str, str], set[str]],
) -> None:
    with postgres(url, max_size=1) as store, psycopg.connect(url, autocommit=True) as conn:
        ids = [info.id for info in store.iter() if info.id.startswith(GOOD)]
        stored = {id: store.load(id) for id in ids}
        effects: dict[tuple[str, str], list[str]] = defaultdict(list)
        for id, key, token in conn.execute("SELECT * FROM effects"):
            effects[id, key].append(token)
    row.workflows = len(stored)
    for id, snapshot in stored.items():
        assert snapshot is not None
        if snapshot.execution.status != "completed":
            row.unfinished += 1
            metadata = snapshot.metadata or {}
            told = {name: metadata.get(name) for name in ("attempts", "wakeAt", "lastStepKey")}
            row.remark(f"{id} is {snapshot.execution.status}: {told}")
            continue
        # The output is what the last owner of the run was given, step by step.
        # What was left to threads may or may not have come in time, and is in no output.
        tokens = {key: step.value["token"] for key, step in snapshot.steps.items() if step.ok}
        for key in [key for key in tokens if tokens[key] in refused[id, key]]:
            row.lost += 1
            row.remark(f"{id}/{key} was refused as {tokens[key]} and is recorded")
        tokens = {key: token for key, token in tokens.items() if not key.startswith("late-")}
        output = (snapshot.metadata or {})["output"]
        if tokens != output:
            row.lost += 1
            row.remark(f"{id}: its output is {output} and its steps are {tokens}")
    for (id, key), tokens_got in got.items():
        if key == "gift!":  # a failure: may be tried again as long as nothing came after it
            continue
        if len(tokens_got) > 1:
            row.doubled += 1
            row.remark(f"{id}/{key} was acknowledged as {tokens_got}")
        snapshot = stored.get(id)
        step = snapshot.steps.get(key) if snapshot else None
        token = next(iter(tokens_got))
        size = len((step.value or {}).get("filler", "")) if step else 0
        if step is None or step.value != value_of(token, size):
            row.lost += 1
            row.remark(f"{id}/{key} was acknowledged as {token} and is {step}")
    for (id, key), tokens_made in effects.items():
        snapshot = stored.get(id)
        step = snapshot.steps.get(key) if snapshot else None
        if step is None or tokens_made != [step.value["token"]]:
            row.doubled += 1
            row.remark(f"{id}/{key} has the effects {tokens_made} and is {step}")
    for id, snapshot in stored.items():
        for key in ("pay", "ship"):
            if snapshot and snapshot.execution.status == "completed" and (id, key) not in effects:
                row.doubled += 1
                row.remark(f"{id}/{key} is recorded and has no effect")


def poison_left(conn: psycopg.Connection) -> list[str]:
    """Return what has not been given up yet, or is still held by a process that it has ended."""
    query = (
        "SELECT id FROM awaitly_snapshots WHERE starts_with(id, %s) "
        "AND snapshot->'metadata'->'attempts' IS DISTINCT FROM to_jsonb(%s::int) "
        "UNION SELECT workflow_id FROM awaitly_workflow_lock "
        "WHERE starts_with(workflow_id, %s) AND expires_at > clock_timestamp()"
    )
    return [id for (id,) in conn.execute(query, (POISON, MAX_ATTEMPTS, POISON)).fetchall()]


def _check_poison(row: Row, conn: psycopg.Connection) -> None:
    for id in poison_left(conn):
        row.unfinished += 1
        row.remark(f"{id} has not come to {MAX_ATTEMPTS} starts")
    wrong = (
        "SELECT id FROM awaitly_snapshots WHERE starts_with(id, %s) "
        "AND snapshot->'execution'->>'status' = 'completed' "
        "OR starts_with(id, %s) AND updated_at <> '2000-01-01'"
    )
    for (id,) in conn.execute(wrong, (POISON, FOREIGN)):
        row.lost += 1
        row.remark(f"{id} was written to, or has completed")


def _check_erased(row: Row, conn: psycopg.Connection) -> None:
    """A late write may be healed by the next one; here it shows all the same."""
    for id, key, who in conn.execute("SELECT * FROM erased"):
        row.lost += 1
        row.remark(f"{id}/{key} was recorded and then erased or changed by {who}")


def _check_owners(row: Row, conn: psycopg.Connection) -> None:
    """Follow who held each id, and see that all that was written came from the holder."""
    owner: dict[str, str | None] = {}
    events = conn.execute("SELECT id, tx, what, who, token FROM audit ORDER BY seq").fetchall()
    held_in = {(id, tx): token for id, tx, what, _, token in events if what != "write"}
    for id, tx, what, who, token in events:
        if what == "hold":
            owner[id] = token
        elif what == "free":
            owner[id] = None
        elif who != "faults-main":
            # In the statement that begins or ends a run, the lease comes or goes with the write.
            holder = owner.get(id) or held_in.get((id, tx))
            pid = holder.split(":")[1] if holder else None
            if who != f"faults-{pid}":
                row.overlaps += 1
                row.remark(f"{who} wrote {id} that {holder} held")


def _check_leftovers(row: Row, url: str, conn: psycopg.Connection) -> None:
    def count(what: str) -> int:
        return int(conn.execute(f"SELECT count(*) FROM {what}").fetchone()[0])

    workers = (
        "pg_stat_activity WHERE application_name LIKE 'faults-%' "
        "AND application_name <> 'faults-main'"
    )
    deadline = time.monotonic() + 10  # a backend takes a moment to notice that its client is gone
    while count(workers) and time.monotonic() < deadline:
        time.sleep(0.1)
    left = {
        "connections": count(workers),
        "journal rows": count("awaitly_snapshots_steps"),
        "leases": count("awaitly_workflow_lock WHERE expires_at > clock_timestamp()"),
    }
    # Of a worker killed between taking the lease of a finished run and seeing that it is finished.
    if stale := count("awaitly_workflow_lock WHERE expires_at <= clock_timestamp()"):
        row.remark(f"note: {stale} lock rows had run out; prune() swept them")
    with postgres(url, max_size=1) as store:
        store.prune(timedelta(0))
    left["lock rows after prune()"] = count("awaitly_workflow_lock")
    for what, number in left.items():
        row.leftovers += number
        if number:
            row.remark(f"left over: {number} {what}")
