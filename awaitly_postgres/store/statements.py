"""Every statement and all DDL, composed once per store from checked names.

Three rules hold throughout. A write names exactly one id, so that the tables can be distributed by
it; only the two housekeeping deletes, ``delete_many`` and ``sweep_*``, take several. Time is the
server's: ``clock_timestamp()``, because ``now()`` stands still inside a caller's transaction; an
index can be searched for ``statement_timestamp()`` only, which does as well where it is not stored.
What comes back is text, integers and booleans, which no caller's adapters change.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from attrs import frozen
from psycopg import sql

from .._checks import MAX_ID

_ISO = """'YYYY-MM-DD"T"HH24:MI:SS.US"+00:00"'"""  # what datetime.fromisoformat reads
_FORMAT_ISO = """'YYYY-MM-DD"T"HH24:MI:SS.MS"Z"'"""  # what the snapshot format stores
_STATUS = "(snapshot->'execution'->>'status')"
# Says IS DISTINCT FROM 'completed'; but of that the planner, which has no statistics here, expects
# 99.5 % of the rows, and scans the table, and of any IS NULL 0.5 %.
_UNFINISHED = f"NULLIF({_STATUS} = 'completed', false) IS NULL"
_FILTERS = {
    "above": b'id COLLATE "C" > %(above)s::text',  # the bare prefix of a store is no id in it
    "low": b'id COLLATE "C" >= %(low)s::text',
    "high": b'id COLLATE "C" < %(high)s::text',
    "status": b"COALESCE(" + _STATUS.encode() + b", 'running') = %(status)s::text",
    "after_time": b'(updated_at, id COLLATE "C") '
    b"< (%(after_time)s::timestamptz, %(after_id)s::text)",
    "behind_time": b'(updated_at, id COLLATE "C") '
    b"> (%(behind_time)s::timestamptz, %(behind_id)s::text)",
    "max_attempts": b"(COALESCE(snapshot->'metadata'->'attempts', '0') "
    b"< to_jsonb(%(max_attempts)s::bigint) OR %(max_attempts)s::bigint > 1 AND /*progress*/)",
    "workflows": b"COALESCE(snapshot->'metadata'->>'workflow' = ANY(%(workflows)s::text[]), false)",
}
# A run that writes its snapshot numbers its token, ``host:pid:random#3``: see ``next_write``.
_OWNER_IS_US = "workflow_id = %(id)s AND split_part(owner_token, '#', 1) = %(token)s"
_LEASE_IS_OURS = f"{_OWNER_IS_US} AND expires_at > clock_timestamp()"
_LEASE_END = "clock_timestamp() + make_interval(secs => %(ttl)s)"


def prefix_bounds(prefix: str) -> tuple[str, str | None]:
    """Return the half-open range of strings that start with ``prefix``, in code point order.

    LIKE would want escapes and loses its index under a generic plan; a range does neither.
    """
    stem = prefix.rstrip("\U0010ffff")
    if not stem:
        return prefix, None
    last = ord(stem[-1]) + 1
    return prefix, stem[:-1] + chr(0xE000 if last == 0xD800 else last)


def filtered(statement: bytes, params: Mapping[str, Any]) -> bytes:
    """Add a condition for each filter that has a value.

    Not ``%(low)s IS NULL OR ...``: under a generic plan that scans the table.
    """
    chosen = [text for name, text in _FILTERS.items() if params.get(name) is not None]
    found = re.search(rb"/\*progress=(.*?)\*/", statement)
    filters = b"".join(b" AND " + text for text in chosen)
    filters = filters.replace(b"/*progress*/", found[1] if found else b"false")
    return re.sub(rb"/\*progress=.*?\*/", b"", statement).replace(b"/*filters*/", filters)


@frozen(eq=False, repr=False)
class Statements:
    """The statements of one store, ready to send."""

    journal: bool
    load: bytes
    look: bytes
    save: bytes
    save_under_lease: bytes
    create: bytes
    delete: bytes
    exists: bytes
    begin: bytes
    take_up: bytes
    write: bytes
    fold: bytes
    append: bytes
    append_in_transaction: bytes
    append_isolated: bytes
    write_isolated: bytes
    check_history: bytes
    wait_for_commit: bytes
    finish: bytes
    finish_and_fold: bytes
    discard: bytes
    lock_lease_row: bytes
    cancel: bytes
    signal: bytes
    signal_for: bytes
    acquire: bytes
    take_over: bytes
    holder: bytes
    renew: bytes
    release: bytes
    held: bytes
    now: bytes
    list: bytes
    details: bytes
    pending: bytes
    stats: bytes
    prunable: bytes
    delete_many: tuple[bytes, ...]
    sweep_journal: bytes
    sweep_locks: bytes
    tables_exist: bytes
    schema_exists: bytes
    serialize_ddl: bytes
    ddl: dict[str, str]
    regclasses: dict[str, str]


def compose(table: str, lock_table: str, schema: str | None, *, journal: bool) -> Statements:
    """Write out every statement for these names; without ``journal`` none names its table."""

    def qualified(name: str) -> sql.Identifier:
        return sql.Identifier(schema, name) if schema else sql.Identifier(name)

    steps = f"{table}_steps"
    names: dict[str, Any] = {
        "snapshots": qualified(table),
        "steps": qualified(steps),
        "lock": qualified(lock_table),
        "schema_name": sql.Literal(schema),
        "updated_at_idx": sql.Identifier(f"{table}_updated_at_idx"),
        "pending_idx": sql.Identifier(f"{table}_pending_idx"),
        "status": sql.SQL(_STATUS),
        "unfinished": sql.SQL(_UNFINISHED),
        "cancellable": sql.SQL(
            f"{_STATUS} IS DISTINCT FROM 'completed' "
            "AND snapshot->'metadata'->'cancelledAt' IS NULL"
        ),
        "owner_is_us": sql.SQL(_OWNER_IS_US),
        "lease_is_ours": sql.SQL(_LEASE_IS_OURS),
        "lease_end": sql.SQL(_LEASE_END),
        "iso": sql.SQL(_ISO),
        "max_id": sql.SQL(str(MAX_ID)),
        "format_iso": sql.SQL(_FORMAT_ISO),
    }

    def text(template: str) -> str:
        return sql.SQL(template).format(**names).as_string(None)

    def compile(template: str) -> bytes:
        return text(template).encode()

    def with_journal(template: str) -> sql.SQL | sql.Composed:
        return sql.SQL(template).format(**names) if journal else sql.SQL("")

    names["journal"] = sql.SQL("NULL")
    if journal:
        names["journal"] = with_journal(
            "(SELECT json_object_agg(key, step)::text FROM {steps} WHERE id = %(id)s)"
        )
    # A document of the newest Node releases has its steps as an array of pairs.
    names["step_keys"] = sql.SQL(
        "SELECT jsonb_object_keys(CASE WHEN jsonb_typeof(snapshot->'steps') = 'object' "
        "THEN snapshot->'steps' ELSE '{{}}' END) UNION SELECT pair->>0 FROM "
        "jsonb_array_elements(CASE WHEN jsonb_typeof(snapshot->'steps') = 'array' "
        "THEN snapshot->'steps' ELSE '[]' END) AS pair{journal_keys}"
    ).format(journal_keys=with_journal(" UNION SELECT key FROM {steps} j WHERE j.id = s.id"))
    for name, source in (("untouched", "numbered"), ("found", "found")):
        names["source"] = sql.SQL(source)
        names[f"taken_out_if_{name}"] = with_journal(
            ", taken_out AS (DELETE FROM {steps} WHERE id = %(id)s "
            "AND EXISTS (SELECT FROM {source}) RETURNING key, step)"
        )
    names["with_taken_out"] = with_journal(
        "'steps', COALESCE((SELECT jsonb_object_agg(key, step) FROM taken_out) "
        "|| (snapshot->'steps'), snapshot->'steps'), "
    )
    names["swept"] = with_journal(", swept AS (DELETE FROM {steps} WHERE id = %(id)s)")
    for source in ("fence", "created"):
        names["source"] = sql.SQL(source)
        names[f"swept_if_{source}"] = with_journal(
            ", swept AS (DELETE FROM {steps} WHERE id = %(id)s AND EXISTS (SELECT FROM {source}))"
        )
    # A transaction above READ COMMITTED sees the lease's row as it was at its beginning, and could
    # not write it if it has been renewed since. So it only locks it, FOR KEY SHARE: until the
    # commit others cannot take the lease over, and we can renew it. If it was taken over since the
    # beginning, the row is gone, and locking it fails: taking over deletes it.
    names["isolated"] = sql.SQL(
        "current_setting('transaction_isolation') NOT IN ('read committed', 'read uncommitted')"
    )
    # A save under a lease of the user's own, in whatever transaction: whoever has it may write.
    names["fence"] = sql.SQL(
        "fence AS (SELECT FROM {lock} WHERE {owner_is_us} "
        "AND ({isolated} OR expires_at > clock_timestamp()) FOR KEY SHARE)"
    ).format(**names)
    # A write of a run lands only on the state that it was made from. Each write of the snapshot
    # gives the token its next number in the same statement, and names those that it may follow:
    # the last one known to have landed, and those of which the reply was lost. What arrives late
    # finds a later number. Steps in the journal bear no number; who follows one names it, and if
    # the server has lost it (a failover to a standby that had not heard of it), nothing matches.
    # All of it is checked on the locked row, as it is when the lock is had.
    names["last_is_there"] = with_journal(
        " AND (%(last)s::text IS NULL OR owner_token <> %(base)s::text "
        "OR EXISTS (SELECT FROM {steps} WHERE id = %(id)s AND key = %(last)s::text))"
    )
    names["next_write"] = sql.SQL(
        "workflow_id = %(id)s AND owner_token = ANY(%(tokens)s::text[]) "
        "AND expires_at > clock_timestamp(){last_is_there}"
    ).format(**names)
    # What an isolated transaction follows was checked at its beginning, by ``check_history``.
    names["isolated_fence"] = sql.SQL(
        "fence AS (SELECT FROM {lock} WHERE {owner_is_us} FOR KEY SHARE)"
    ).format(**names)
    names["numbered_fence"] = sql.SQL(
        "fence AS (UPDATE {lock} SET owner_token = %(next)s::text, expires_at = {lease_end} "
        "WHERE {next_write} RETURNING 1)"
    ).format(**names)
    names["fence_and_release"] = sql.SQL(
        "fence AS (DELETE FROM {lock} WHERE {next_write} RETURNING 1)"
    ).format(**names)
    names["upsert"] = sql.SQL(
        "ON CONFLICT (id) DO UPDATE SET "
        "snapshot = EXCLUDED.snapshot, updated_at = EXCLUDED.updated_at"
    )
    # A signal is sent without the lease, so its owner's next checkpoint must not undo it.
    names["upsert_but_signals"] = sql.SQL(
        "ON CONFLICT (id) DO UPDATE SET updated_at = EXCLUDED.updated_at, snapshot = CASE "
        "WHEN {table}.snapshot->'metadata' ? 'signals' THEN jsonb_set(EXCLUDED.snapshot, "
        "'{{metadata,signals}}', {table}.snapshot->'metadata'->'signals') "
        "ELSE EXCLUDED.snapshot END"
    ).format(table=sql.Identifier(table))

    ddl = {
        table: text(
            "CREATE TABLE IF NOT EXISTS {snapshots} (\n"
            '  id TEXT COLLATE "C" PRIMARY KEY,\n'
            "  snapshot JSONB NOT NULL,\n"
            "  updated_at TIMESTAMPTZ DEFAULT NOW()\n);\n"
            "CREATE INDEX IF NOT EXISTS {updated_at_idx} ON {snapshots} (updated_at DESC);\n"
            "CREATE INDEX IF NOT EXISTS {pending_idx} "
            'ON {snapshots} (updated_at, id COLLATE "C")\n'
            "  WHERE {unfinished};\n"
        ),
        steps: text(
            "CREATE TABLE IF NOT EXISTS {steps} (\n"
            '  id TEXT COLLATE "C" NOT NULL,\n'
            '  key TEXT COLLATE "C" NOT NULL,\n'
            "  step JSONB NOT NULL,\n"
            "  PRIMARY KEY (id, key)\n);\n"
        ),
        lock_table: text(
            "CREATE TABLE IF NOT EXISTS {lock} (\n"
            '  workflow_id TEXT COLLATE "C" PRIMARY KEY,\n'
            "  owner_token TEXT NOT NULL,\n"
            "  expires_at TIMESTAMPTZ NOT NULL\n);\n"
        ),
    }
    if not journal:
        del ddl[steps]
    if schema:
        names["schema"] = sql.Identifier(schema)
        ddl = {"": text("CREATE SCHEMA IF NOT EXISTS {schema};\n"), **ddl}

    names["pause_end"] = sql.SQL(
        "to_char((clock_timestamp() + make_interval(secs => %(pause)s::float8)) "
        "AT TIME ZONE 'UTC', {format_iso})"
    ).format(**names)
    names["with_pause"] = sql.SQL(
        "CASE WHEN %(pause)s::float8 IS NULL THEN %(snapshot)s::jsonb "
        "ELSE jsonb_set(%(snapshot)s::jsonb, '{{metadata,wakeAt}}', to_jsonb({pause_end})) END"
    ).format(**names)
    # The journal is empty when a start begins. So a step in it that succeeded means that the run
    # has got further: neither its pause nor the number of its starts holds any longer.
    names["progress"] = sql.SQL("false")
    if journal:
        names["progress"] = with_journal(
            # With a limit, so that it is looked up for one run, and never hashed for all.
            "COALESCE((SELECT true FROM {steps} j WHERE j.id = s.id AND j.step->'ok' = 'true' "
            "LIMIT 1), false)"
        )
    # Sweeping an empty journal costs a fifth of the statement, hence each with and without.
    write = (
        "WITH {numbered_fence}{swept_if_fence} "
        "INSERT INTO {snapshots} (id, snapshot, updated_at) "
        "SELECT %(id)s, {with_pause}, clock_timestamp() FROM fence {upsert_but_signals}"
    )
    finish = write.replace("{numbered_fence}", "{fence_and_release}")
    names["append"] = sql.SQL(
        "INSERT INTO {steps} (id, key, step) "
        "SELECT %(id)s, %(key)s, %(step)s::jsonb FROM fence "
        "ON CONFLICT (id, key) DO UPDATE SET step = EXCLUDED.step"
    ).format(**names)

    return Statements(
        journal=journal,
        load=compile("SELECT snapshot::text, {journal} FROM {snapshots} WHERE id = %(id)s"),
        look=compile(
            "SELECT snapshot::text, {journal}, to_char(updated_at AT TIME ZONE 'UTC', {iso}), "
            "split_part(owner_token, '#', 1), "
            "to_char(expires_at AT TIME ZONE 'UTC', {iso}) FROM {snapshots} "
            "LEFT JOIN {lock} ON workflow_id = id AND expires_at > clock_timestamp() "
            "WHERE id = %(id)s"
        ),
        save=compile(
            "WITH given AS (SELECT %(id)s::text AS id){swept} "
            "INSERT INTO {snapshots} (id, snapshot, updated_at) "
            "SELECT id, %(snapshot)s::jsonb, clock_timestamp() FROM given {upsert}"
        ),
        save_under_lease=compile(
            "WITH {fence}{swept_if_fence} INSERT INTO {snapshots} (id, snapshot, updated_at) "
            "SELECT %(id)s, %(snapshot)s::jsonb, clock_timestamp() FROM fence {upsert_but_signals}"
        ),
        create=compile(
            "WITH created AS (INSERT INTO {snapshots} (id, snapshot, updated_at) "
            "VALUES (%(id)s, %(snapshot)s::jsonb, clock_timestamp()) "
            "ON CONFLICT (id) DO NOTHING RETURNING 1){swept_if_created} SELECT 1 FROM created"
        ),
        delete=compile(
            "WITH gone AS (DELETE FROM {snapshots} WHERE id = %(id)s RETURNING 1){swept} "
            "SELECT (SELECT count(*) FROM gone)::int"
        ),
        exists=compile("SELECT 1 FROM {snapshots} WHERE id = %(id)s"),
        # A lock row that is there is not even asked for: that could mean to wait for its end.
        begin=compile(
            "WITH existing AS (SELECT snapshot::text AS snapshot, {journal} AS journal, "
            "to_char(updated_at AT TIME ZONE 'UTC', {iso}) AS touched "
            "FROM {snapshots} WHERE id = %(id)s), "
            # Of which only the reply was lost: nobody else has this token.
            "first_try AS (SELECT expires_at FROM {lock} "
            "WHERE workflow_id = %(id)s AND owner_token = %(token)s), "
            "lease AS (INSERT INTO {lock} (workflow_id, owner_token, expires_at) "
            "SELECT %(id)s, %(token)s, {lease_end} WHERE NOT EXISTS (SELECT FROM existing) "
            "AND NOT EXISTS (SELECT FROM {lock} WHERE workflow_id = %(id)s) "
            "ON CONFLICT (workflow_id) DO NOTHING RETURNING expires_at), "
            "created AS (INSERT INTO {snapshots} (id, snapshot, updated_at) "
            "SELECT %(id)s, %(snapshot)s::jsonb, clock_timestamp() FROM lease "
            "ON CONFLICT (id) DO NOTHING RETURNING 1){swept_if_created} "
            "SELECT (SELECT snapshot FROM existing), (SELECT journal FROM existing), "
            "(SELECT touched FROM existing), "
            "to_char(COALESCE((SELECT expires_at FROM lease), (SELECT expires_at FROM first_try)) "
            "AT TIME ZONE 'UTC', {iso}), "
            "EXISTS (SELECT FROM created) OR EXISTS (SELECT FROM first_try)"
        ),
        # Counts a start before any of the user's code runs, folds the journal, and reads, all if
        # nobody has touched the run since it was looked at. The lock row first, as everywhere.
        take_up=compile(
            "WITH fence AS (SELECT owner_token FROM {lock} WHERE {next_write} FOR UPDATE), "
            "untouched AS (SELECT id FROM {snapshots} WHERE id = %(id)s "
            "AND (to_char(updated_at AT TIME ZONE 'UTC', {iso}) IS NOT DISTINCT FROM "
            "%(seen)s::text OR EXISTS (SELECT FROM fence WHERE owner_token = %(next)s::text)) "
            "AND EXISTS (SELECT FROM fence) FOR UPDATE), "
            "numbered AS (UPDATE {lock} SET owner_token = %(next)s::text, "
            "expires_at = {lease_end} WHERE workflow_id = %(id)s "
            "AND EXISTS (SELECT FROM untouched) RETURNING 1)"
            "{taken_out_if_untouched} "
            "UPDATE {snapshots} SET updated_at = clock_timestamp(), snapshot = snapshot || "
            "jsonb_build_object({with_taken_out}'metadata', "
            "(COALESCE(NULLIF(snapshot->'metadata', 'null'), '{{}}') - 'waits') "
            "|| %(metadata)s::jsonb || jsonb_build_object('wakeAt', {pause_end})) "
            "WHERE id = %(id)s AND EXISTS (SELECT FROM numbered) RETURNING snapshot::text"
        ),
        write=compile(write.replace("{swept_if_fence}", "")),
        fold=compile(write),
        append=compile("WITH fence AS (SELECT FROM {lock} WHERE {next_write} FOR UPDATE) {append}"),
        # Within a transaction it renews the lease as well, for nobody can until the commit.
        append_in_transaction=compile(
            "WITH fence AS (UPDATE {lock} SET expires_at = {lease_end} WHERE {next_write} "
            "RETURNING 1) {append}"
        ),
        append_isolated=compile("WITH {isolated_fence} {append}"),
        write_isolated=compile(
            "WITH {isolated_fence} INSERT INTO {snapshots} (id, snapshot, updated_at) "
            "SELECT %(id)s, {with_pause}, clock_timestamp() FROM fence {upsert_but_signals}"
        ),
        # The first statement of an isolated transaction: is all there that has been recorded? Other
        # threads may have recorded more since, and folded the journal.
        check_history=compile(
            "SELECT 1 FROM {lock} WHERE {lease_is_ours} "
            "AND COALESCE(NULLIF(split_part(owner_token, '#', 2), ''), '0')::bigint "
            ">= %(number)s::bigint{last_is_there}"
        ),
        # Returns when no transaction that has written under this lease is under way any more.
        wait_for_commit=compile("SELECT 1 FROM {lock} WHERE {owner_is_us} FOR UPDATE"),
        finish=compile(finish.replace("{swept_if_fence}", "")),
        finish_and_fold=compile(finish),
        discard=compile(
            "WITH {fence_and_release}{swept_if_fence}, "
            "gone AS (DELETE FROM {snapshots} WHERE id = %(id)s AND EXISTS (SELECT FROM fence)) "
            "SELECT 1 FROM fence"
        ),
        # Sent before cancel, in one transaction: waits for a write that is under way.
        lock_lease_row=compile("SELECT 1 FROM {lock} WHERE workflow_id = %(id)s FOR UPDATE"),
        # Takes the lease away too, so that whoever has it writes nothing more.
        cancel=compile(
            "WITH found AS (SELECT 1 FROM {snapshots} WHERE id = %(id)s AND {cancellable})"
            "{taken_out_if_found}, cancelled AS ("
            "UPDATE {snapshots} SET updated_at = clock_timestamp(), snapshot = snapshot || "
            "jsonb_build_object({with_taken_out}"
            "'execution', snapshot->'execution' || %(execution)s::jsonb, "
            "'metadata', COALESCE(NULLIF(snapshot->'metadata', 'null'), '{{}}') "
            "|| %(metadata)s::jsonb) WHERE id = %(id)s AND {cancellable} RETURNING 1), "
            "released AS (DELETE FROM {lock} WHERE workflow_id = %(id)s "
            "AND EXISTS (SELECT FROM cancelled)) SELECT 1 FROM cancelled"
        ),
        signal=compile(
            "UPDATE {snapshots} SET updated_at = clock_timestamp(), snapshot = jsonb_set(snapshot, "
            "'{{metadata,signals}}', COALESCE(snapshot->'metadata'->'signals', '{{}}') "
            "|| jsonb_build_object(%(key)s::text, %(value)s::jsonb)) "
            "WHERE id = %(id)s AND {status} IS DISTINCT FROM 'completed' "
            "AND jsonb_typeof(snapshot->'metadata') = 'object' "
            "AND snapshot->'metadata'->'cancelledAt' IS NULL "
            "AND snapshot->'metadata'->'signals'->%(key)s::text IS NULL"
        ),
        signal_for=compile(
            "SELECT (snapshot->'metadata'->'signals'->%(key)s::text)::text FROM {snapshots} "
            "WHERE id = %(id)s AND snapshot->'metadata'->'signals' ? %(key)s::text"
        ),
        # Not even tried where there is a row: that could mean to wait for its end.
        acquire=compile(
            "INSERT INTO {lock} (workflow_id, owner_token, expires_at) "
            "SELECT %(id)s, %(token)s, {lease_end} "
            "WHERE NOT EXISTS (SELECT FROM {lock} WHERE workflow_id = %(id)s) "
            "ON CONFLICT (workflow_id) DO NOTHING "
            "RETURNING to_char(expires_at AT TIME ZONE 'UTC', {iso})"
        ),
        # Free: expired, or ours since a first try of which the reply was lost. A row that somebody
        # has locked is not free: its holder is writing.
        take_over=compile(
            "WITH free AS (SELECT workflow_id FROM {lock} WHERE workflow_id = %(id)s "
            "AND (expires_at <= clock_timestamp() OR owner_token = %(token)s) "
            "FOR UPDATE SKIP LOCKED), "
            # Not updated: see the fence in a transaction.
            "gone AS (DELETE FROM {lock} WHERE workflow_id = %(id)s "
            "AND EXISTS (SELECT FROM free) RETURNING 1) "
            "INSERT INTO {lock} (workflow_id, owner_token, expires_at) "
            "SELECT %(id)s, %(token)s, {lease_end} FROM gone "
            "RETURNING to_char(expires_at AT TIME ZONE 'UTC', {iso})"
        ),
        holder=compile(
            "SELECT split_part(owner_token, '#', 1), "
            "to_char(expires_at AT TIME ZONE 'UTC', {iso}) FROM {lock} WHERE workflow_id = %(id)s"
        ),
        # A row that a write has locked is not waited for: while it is, nobody takes the lease over.
        # Says then, with nothing in the second column, that the lease stands.
        renew=compile(
            "WITH unlocked AS (SELECT workflow_id FROM {lock} WHERE {owner_is_us} "
            "FOR NO KEY UPDATE SKIP LOCKED), "
            "renewed AS (UPDATE {lock} SET expires_at = {lease_end} WHERE {lease_is_ours} "
            "AND EXISTS (SELECT FROM unlocked) RETURNING expires_at) "
            "SELECT 1, (SELECT to_char(expires_at AT TIME ZONE 'UTC', {iso}) FROM renewed) "
            "FROM {lock} WHERE {owner_is_us} "
            "AND (EXISTS (SELECT FROM renewed) OR NOT EXISTS (SELECT FROM unlocked))"
        ),
        release=compile("DELETE FROM {lock} WHERE {owner_is_us}"),
        held=compile("SELECT 1 FROM {lock} WHERE {lease_is_ours}"),
        now=compile("SELECT to_char(clock_timestamp() AT TIME ZONE 'UTC', {iso})"),
        list=compile(
            "SELECT id, COALESCE({status}, 'running'), "
            "to_char(updated_at AT TIME ZONE 'UTC', {iso}) FROM {snapshots} "
            'WHERE TRUE/*filters*/ ORDER BY updated_at DESC, id COLLATE "C" DESC '
            "LIMIT %(limit)s::bigint"
        ),
        details=compile(
            "SELECT s.id, COALESCE({status}, 'running'), "
            "to_char(updated_at AT TIME ZONE 'UTC', {iso}), "
            "(SELECT count(*) FROM ({step_keys}) AS recorded), "
            "CASE WHEN jsonb_typeof(snapshot->'metadata') = 'object' THEN "
            "((snapshot->'metadata') - 'input' - 'output' - 'failure')::text END, "
            "split_part(l.owner_token, '#', 1), to_char(l.expires_at AT TIME ZONE 'UTC', {iso}), "
            "to_char(clock_timestamp() AT TIME ZONE 'UTC', {iso}) "
            "FROM {snapshots} s LEFT JOIN {lock} l "
            "ON l.workflow_id = s.id AND l.expires_at > clock_timestamp() "
            "WHERE s.id = ANY(%(ids)s::text[])"
        ),
        # What could be started here: it has an input that a run of ours recorded, and its time has
        # come. Comparing wakeAt as text and attempts as JSONB never fails, whatever a row holds.
        # Within COALESCE, because of a bare condition the planner expects one row in 200, and
        # sorts all.
        pending=compile(
            "SELECT id, COALESCE({status}, 'running'), "
            "to_char(updated_at AT TIME ZONE 'UTC', {iso}) FROM {snapshots} s "
            "WHERE {unfinished} "
            "AND (COALESCE(snapshot->'metadata'->>'wakeAt', '') COLLATE \"C\" "
            "<= to_char(clock_timestamp() AT TIME ZONE 'UTC', {format_iso}) "
            "OR COALESCE({status}, 'running') = 'running' AND EXISTS (SELECT FROM jsonb_each(CASE "
            "WHEN jsonb_typeof(snapshot->'metadata'->'waits') = 'object' "
            "THEN snapshot->'metadata'->'waits' ELSE '{{}}' END) AS waited "
            "WHERE snapshot->'metadata'->'signals' ? waited.key) OR {progress}) "
            "AND COALESCE(snapshot->'metadata'->'cancelledAt' IS NULL, true) "
            "AND COALESCE(jsonb_typeof(snapshot->'metadata'->'input'->'args') = 'array' "
            "AND jsonb_typeof(snapshot->'metadata'->'input'->'kwargs') = 'object', false) "
            "AND COALESCE(octet_length(id) <= {max_id}, false) "
            "AND NOT EXISTS (SELECT FROM {lock} l WHERE l.workflow_id = s.id "
            "AND l.expires_at > clock_timestamp())/*filters*/ "
            'ORDER BY updated_at, id COLLATE "C" LIMIT %(limit)s::bigint'
            "/*progress={progress}*/"
        ),
        stats=compile(
            "SELECT 'total', NULL, count(*) FROM {snapshots} WHERE TRUE/*filters*/ "
            "UNION ALL SELECT 'status', COALESCE({status}, 'running'), count(*) FROM {snapshots} "
            "WHERE {unfinished}/*filters*/ GROUP BY 2 "
            "UNION ALL SELECT 'bytes', NULL, sum(pg_total_relation_size(name::regclass))::bigint "
            "FROM unnest(%(tables)s::text[]) AS name"
        ),
        prunable=compile(
            "SELECT id FROM {snapshots} s "
            "WHERE updated_at < statement_timestamp() - make_interval(secs => %(age)s) "
            "AND NOT EXISTS (SELECT FROM {lock} l WHERE l.workflow_id = s.id "
            "AND l.expires_at > clock_timestamp())/*filters*/ "
            "ORDER BY updated_at LIMIT %(limit)s::bigint"
        ),
        delete_many=tuple(
            compile(statement)
            for statement in (
                "DELETE FROM {snapshots} WHERE id = ANY(%(ids)s::text[]) "
                "AND (%(age)s::float8 IS NULL OR updated_at < clock_timestamp() "
                "- make_interval(secs => %(age)s::float8)) RETURNING id",
                "DELETE FROM {steps} WHERE id = ANY(%(ids)s::text[])",
            )[: 1 + journal]
        ),
        sweep_journal=compile(
            "DELETE FROM {steps} j WHERE NOT EXISTS (SELECT FROM {snapshots} s WHERE s.id = j.id)"
        ),
        sweep_locks=compile(
            "DELETE FROM {lock} "
            "WHERE expires_at < clock_timestamp() - make_interval(secs => %(age)s)"
        ),
        tables_exist=compile(
            "SELECT name, to_regclass(name) IS NOT NULL, txid_current_if_assigned() IS NULL "
            "FROM unnest(%(tables)s::text[]) WITH ORDINALITY AS t (name, nr) ORDER BY nr"
        ),
        schema_exists=compile("SELECT 1 FROM pg_namespace WHERE nspname = {schema_name}"),
        serialize_ddl=compile("SELECT pg_advisory_xact_lock(hashtext(%(name)s::text))"),
        ddl=ddl,
        regclasses={name: qualified(name).as_string(None) for name in ddl if name},
    )
