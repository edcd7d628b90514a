-- Every statement that works on the tables. schema.sql says what the tables are.
--
-- FORMAT, as statements.py reads it
--
--   -- name: append      Starts a statement; Python calls it sql.append. The comment below it says
--                        what it is for and why it is safe.
--   -- fragment: status  Starts a piece of SQL that the blocks below it use as {status}.
--   {snapshots} {journal} {leases}
--                        The tables, under the names that postgres() was given. All names are
--                        checked, and quoted by psycopg.sql. {table} is the table of snapshots
--                        without its schema, as ON CONFLICT wants it.
--   %(id)s               A parameter. psycopg sends it separately from the statement.
--   ... -- if journal    At the end of a line: the line is only there for a store with a journal
--                        ("-- if no journal": without). After a name: the whole block. A store that
--                        shares its tables with Node may have no journal, and then no statement
--                        names its table.
--   ... -- if low        At the end of a line: the line is only there if the parameter low has a
--                        value when the statement is sent. ("low IS NULL OR id >= low" would scan
--                        the whole table once the server uses a generic plan.)
--
-- All other comments have lines of their own. They are not sent, and whitespace is collapsed. Only
-- a single word in braces is a fragment: '{}', '{"steps"}' and '{metadata,signals}' stay.
--
-- RULES
--
-- * One id per write, given as %(id)s for every table that it reads or changes. So the tables can
--   be distributed by id: each write is one query to one shard, without two-phase commit. Only
--   create_many and the housekeeping at the end of this file take several ids.
-- * A statement that needs both rows locks the lease's row first, so there are no deadlocks. The
--   parts of one statement run in no given order: FROM fence, or EXISTS (SELECT FROM fence), makes
--   a part wait for the fence, and do nothing if the fence has found no row.
-- * A statement may be sent again after a lost reply, so repeating it must be harmless. Where that
--   is not obvious, the comment says why it is.
-- * Time is the server's: statement_timestamp(). now() stands still in a caller's transaction.
--   clock_timestamp() is volatile: Citus refuses it in a write, and it cannot use an index. So a
--   statement that had to wait compares with the time at which it arrived. That is safe, because an
--   expired lease can merely be taken over: that replaces the row, under its lock, and then the
--   token no longer matches, whatever the time. It cannot happen while the statement holds the row.
-- * What a write computes from its columns is immutable, as Citus demands: jsonb_set() and ||, not
--   jsonb_build_object(); times as they are, not to_char(). In a CASE or COALESCE of what an UPDATE
--   sets, such a call stands in a SELECT of its own. A subquery that names a column of the query
--   around it has neither LIMIT nor an aggregate without GROUP BY on the id.
-- * Citus computes every branch of a CASE before it sends the statement, also those not taken. So
--   none may fail, whatever the parameters are.
-- * Citus forwards an UPDATE or DELETE to the shard as it is, WITH included, but an INSERT only
--   without WITH, and with the id from a column of the row that it selects.
--   It pulls the rows of these to the coordinator, at several times the cost:
--     save, save_under_lease, create, begin, acquire, take_over
-- * These ask every shard, since they have no single id:
--     list, runs, pending, unfinished, where_state, stats, stored_calls, create_many,
--     prunable, delete_many, delete_many_journals, sweep_journal, sweep_locks
-- * Results are text, integers and booleans only, because a caller's connection may have its own
--   adapters for jsonb and timestamps.


-- Times --------------------------------------------------------------------------------------

-- fragment: iso
-- The form in which times are returned: what datetime.fromisoformat() reads.
'YYYY-MM-DD"T"HH24:MI:SS.US"+00:00"'

-- fragment: stored_iso
-- The form in which times are stored in a document; Node reads it too.
'YYYY-MM-DD"T"HH24:MI:SS.MS"Z"'

-- fragment: stored_now
-- The time as it is stored.
to_char(statement_timestamp() AT TIME ZONE 'UTC', {stored_iso})

-- fragment: pause_end
-- When a run is due again that must not be resumed for %(pause)s seconds. An infinite pause gives
-- NULL, not an error.
to_char(
    (statement_timestamp() + make_interval(secs => NULLIF(%(pause)s::float8, 'infinity')))
        AT TIME ZONE 'UTC',
    {stored_iso}
)

-- fragment: lease_end
-- When a lease expires that is acquired or renewed now.
statement_timestamp() + make_interval(secs => %(ttl)s)

-- name: now
-- The server's time, which step.sleep and step.wait use.
SELECT to_char(statement_timestamp() AT TIME ZONE 'UTC', {iso})


-- Pieces of a document -----------------------------------------------------------------------

-- fragment: metadata
-- The metadata as an object, even if it is missing or JSON null.
COALESCE(NULLIF(snapshot->'metadata', 'null'), '{}')

-- fragment: dated_document
-- The document, plus the time at which the run is due again if there is a pause, by the server's
-- clock. An infinite pause marks the run as given up.
CASE
    WHEN %(pause)s::float8 IS NULL THEN %(snapshot)s::jsonb
    WHEN %(pause)s::float8 = 'infinity'
    THEN jsonb_set(%(snapshot)s::jsonb, '{metadata,gaveUpAt}', to_jsonb({stored_now}))
    ELSE jsonb_set(%(snapshot)s::jsonb, '{metadata,wakeAt}', to_jsonb({pause_end}))
END

-- fragment: journaled_steps -- if journal
-- The steps in the journal of this run, as JSON text; NULL if there are none.
(SELECT json_object_agg(key, step)::text FROM {journal} WHERE id = %(id)s)

-- fragment: journaled_steps -- if no journal
NULL

-- fragment: appended -- if journal
-- The number of steps in the journal of this run.
(SELECT count(*) FROM {journal} WHERE id = %(id)s)

-- fragment: appended -- if no journal
0

-- fragment: clear_journal -- if journal
-- Deletes the journal of one run, as part of the statement that makes it obsolete.
DELETE FROM {journal} WHERE id = %(id)s

-- fragment: folded_snapshot -- if journal
-- The snapshot merged with the steps just removed from the journal: where both have a key, the
-- snapshot's step wins, as in load. Each function copies all steps, so none is called needlessly.
CASE
    WHEN EXISTS (SELECT FROM taken_out) THEN jsonb_set(snapshot, '{"steps"}', COALESCE(
        (SELECT jsonb_object_agg(key, step) FROM taken_out) || (snapshot->'steps'),
        snapshot->'steps',
        'null'
    ))
    ELSE snapshot
END

-- fragment: folded_snapshot -- if no journal
-- There is nothing to fold.
snapshot

-- fragment: untouched
-- Whether nobody has written to the run since %(seen)s, which is the text of updated_at as it was
-- read; NULL for a row without a finite time.
CASE WHEN isfinite(updated_at) THEN updated_at END IS NOT DISTINCT FROM %(seen)s::timestamptz

-- fragment: keep_signals
-- Replaces the document, but not the signals in it. A signal is sent without the lease, so the
-- document that the lease's holder is writing may lack it, and must not erase it.
ON CONFLICT (id) DO UPDATE SET
    updated_at = EXCLUDED.updated_at,
    snapshot = CASE
        WHEN {table}.snapshot->'metadata' ? 'signals' THEN jsonb_set(
            EXCLUDED.snapshot, '{metadata,signals}', {table}.snapshot->'metadata'->'signals'
        )
        ELSE EXCLUDED.snapshot
    END


-- Fences -------------------------------------------------------------------------------------
--
-- A fence is the part of a write that finds, and locks, the lease's row. If it finds none, the
-- statement changes nothing: the lease has expired or belongs to another process. At READ COMMITTED
-- the condition is rechecked once the lock is granted, so a write that arrived late, or had to
-- wait, is checked against the current state.

-- fragment: token_is_ours
-- A durable run that has written its snapshot numbers its token: host:pid:random#3.
workflow_id = %(id)s AND split_part(owner_token, '#', 1) = %(token)s

-- fragment: lease_is_ours
{token_is_ours} AND expires_at > statement_timestamp()

-- fragment: last_step_is_there
-- Whether the journal still has the last appended step, unless a rewrite of the snapshot has folded
-- it since. A server that has lost it (a failover to a standby that had not received it, a restored
-- backup) has lost history that the next write would build on.
(
    %(last)s::text IS NULL
    OR owner_token <> %(base)s::text
    OR EXISTS (SELECT FROM {journal} WHERE id = %(id)s AND key = %(last)s::text)
)

-- fragment: write_is_next
-- A write of a run lands only on the state that it was made from. Each rewrite of the snapshot
-- gives the token its next number in the same statement, and lists the tokens that it may
-- follow: the last one known to have landed, and those whose reply was lost. A write that
-- arrives late finds a later number than any in its list. Appended steps have no number; the
-- write that follows one names it instead, and matches nothing if it is missing.
workflow_id = %(id)s
AND owner_token = ANY(%(tokens)s::text[])
AND expires_at > statement_timestamp()
AND {last_step_is_there}  -- if journal

-- fragment: append_is_next -- if journal
-- The same for an appended step. It applies only to the last rewrite known to have succeeded: if it
-- arrives late, after a newer one, it must change nothing. The newer rewrite does not expect the
-- step, and the end of the run would leave it behind in a journal that is assumed to be empty.
workflow_id = %(id)s
AND owner_token = %(base)s::text
AND expires_at > statement_timestamp()
AND (
    %(last)s::text IS NULL
    OR EXISTS (SELECT FROM {journal} WHERE id = %(id)s AND key = %(last)s::text)
)

-- fragment: numbered_fence
-- For a write of the snapshot: increments the token's number, and renews the lease. Repeated after
-- a lost reply, the write takes another number and may follow its own first try, whose token is in
-- its list.
fence AS (
    UPDATE {leases} SET owner_token = %(next)s::text, expires_at = {lease_end}
    WHERE {write_is_next}
    RETURNING 1
)

-- fragment: releasing_fence
-- For the last write of a run: fence and release at once.
fence AS (DELETE FROM {leases} WHERE {write_is_next} RETURNING 1)


-- Snapshots ----------------------------------------------------------------------------------

-- name: load
-- The document, and the steps in the journal.
SELECT snapshot::text, {journaled_steps} FROM {snapshots} WHERE id = %(id)s

-- name: read_for_resume
-- The state that a resumed run continues from, and the holder of its lease, if any. It writes
-- nothing, so that no lease needs to be released if the run turns out to be taken.
SELECT
    snapshot::text,
    {journaled_steps},
    to_char(updated_at AT TIME ZONE 'UTC', {iso}),
    {appended},
    split_part(owner_token, '#', 1),
    to_char(expires_at AT TIME ZONE 'UTC', {iso})
FROM {snapshots}
LEFT JOIN {leases} ON workflow_id = id AND expires_at > statement_timestamp()
WHERE id = %(id)s

-- name: exists
-- Whether anything is stored, without reading the document.
SELECT 1 FROM {snapshots} WHERE id = %(id)s

-- name: save
-- The caller's document replaces whatever was stored, including the journal.
WITH given AS (SELECT %(id)s::text AS id)
, swept AS ({clear_journal})  -- if journal
INSERT INTO {snapshots} (id, snapshot, updated_at)
SELECT id, %(snapshot)s::jsonb, statement_timestamp() FROM given
ON CONFLICT (id) DO UPDATE SET snapshot = EXCLUDED.snapshot, updated_at = EXCLUDED.updated_at

-- name: save_under_lease
-- The same under a lease that the caller holds. No number is checked, because the holder may write
-- anything. It may run in the caller's transaction, at any isolation level: above READ COMMITTED,
-- expires_at may be older than the last renewal, so there only the lock counts; see
-- append_isolated.
WITH fence AS (
    SELECT FROM {leases}
    WHERE {token_is_ours}
        AND (
            current_setting('transaction_isolation') NOT IN ('read committed', 'read uncommitted')
            OR expires_at > statement_timestamp()
        )
    FOR KEY SHARE
)
, swept AS ({clear_journal} AND EXISTS (SELECT FROM fence))  -- if journal
INSERT INTO {snapshots} (id, snapshot, updated_at)
SELECT %(id)s, %(snapshot)s::jsonb, statement_timestamp() FROM fence
{keep_signals}

-- name: create
-- Stores a document if there is none. Repeated, it does nothing and returns no row. A journal
-- without a snapshot is left over from a deleted run.
WITH created AS (
    INSERT INTO {snapshots} (id, snapshot, updated_at)
    VALUES (%(id)s, {dated_document}, statement_timestamp())
    ON CONFLICT (id) DO NOTHING
    RETURNING 1
)
, swept AS ({clear_journal} AND EXISTS (SELECT FROM created))  -- if journal
SELECT 1 FROM created

-- name: stored_calls
-- The workflow and input of the runs with these ids, for submit_many to compare. An id without a
-- row is new.
SELECT id, (snapshot->'metadata'->'workflow')::text, (snapshot->'metadata'->'input')::text
FROM {snapshots}
WHERE id = ANY(%(ids)s::text[])

-- name: create_many
-- Stores a run for each id that is not stored yet: the same document with its own input. The ids
-- are sorted, so that two of these lock rows in the same order and cannot deadlock. Sent in a
-- transaction whose outcome is looked up after a lost reply, because a second try would find its
-- own rows and report them as existing; see Database.run_once. The journals are deleted by a
-- separate statement (delete_many_journals): Citus refuses such a CTE for several shards.
INSERT INTO {snapshots} (id, snapshot, updated_at)
SELECT id, jsonb_set({dated_document}, '{metadata,input}', input::jsonb), clock_timestamp()
FROM unnest(%(ids)s::text[], %(inputs)s::text[]) AS given (id, input)
ON CONFLICT (id) DO NOTHING
RETURNING id

-- name: delete
-- The count is what the caller gets. It survives a lost reply, because the transaction's outcome is
-- then looked up instead of deleting again; see Database.run_once.
WITH gone AS (DELETE FROM {snapshots} WHERE id = %(id)s RETURNING 1)
, swept AS ({clear_journal})  -- if journal
SELECT (SELECT count(*) FROM gone)::int


-- Leases -------------------------------------------------------------------------------------

-- name: acquire
-- Acquires a lease that nobody has. If there is a row, the insert is not even attempted: if its
-- holder is just deleting it, ON CONFLICT would wait for that transaction to end.
WITH lease AS (
    INSERT INTO {leases} (workflow_id, owner_token, expires_at)
    SELECT %(id)s, %(token)s, {lease_end}
    WHERE NOT EXISTS (SELECT FROM {leases} WHERE workflow_id = %(id)s)
    ON CONFLICT (workflow_id) DO NOTHING
    RETURNING expires_at
)
SELECT to_char(expires_at AT TIME ZONE 'UTC', {iso}) FROM lease

-- name: take_over
-- Sent if acquire found a row. The lease is free if it has expired, or if the token is ours: then
-- an earlier try got it, and only the reply was lost. A locked row is not free, because its holder
-- is writing; SKIP LOCKED finds that out without waiting. The row is deleted and inserted, not
-- updated, so that the previous holder's transaction above READ COMMITTED fails at its fence: it
-- could still lock an updated row; see append_isolated.
WITH free AS (
    SELECT workflow_id FROM {leases}
    WHERE workflow_id = %(id)s AND (expires_at <= statement_timestamp() OR owner_token = %(token)s)
    FOR UPDATE SKIP LOCKED
),
gone AS (
    DELETE FROM {leases} WHERE workflow_id = %(id)s AND EXISTS (SELECT FROM free) RETURNING 1
),
lease AS (
    INSERT INTO {leases} (workflow_id, owner_token, expires_at)
    SELECT %(id)s, %(token)s, {lease_end} FROM gone
    RETURNING expires_at
)
SELECT to_char(expires_at AT TIME ZONE 'UTC', {iso}) FROM lease

-- name: holder
-- Who holds the lease that neither of the two above could acquire, for AlreadyRunning.
SELECT split_part(owner_token, '#', 1), to_char(expires_at AT TIME ZONE 'UTC', {iso})
FROM {leases}
WHERE workflow_id = %(id)s

-- name: renew
-- Extends a lease that has not expired; an expired one is not revived. SKIP LOCKED, because the
-- renewing thread must not wait for a write that has locked the row: during that write nobody can
-- take the lease over anyway. In that case the row is returned without a new expiry: it is
-- unchanged. The lock is NO KEY UPDATE, which does not conflict with the FOR KEY SHARE of an
-- isolated transaction.
WITH unlocked AS (
    SELECT workflow_id FROM {leases} WHERE {token_is_ours} FOR NO KEY UPDATE SKIP LOCKED
),
renewed AS (
    UPDATE {leases} SET expires_at = {lease_end}
    WHERE {lease_is_ours} AND EXISTS (SELECT FROM unlocked)
    RETURNING expires_at
)
SELECT 1, (SELECT to_char(expires_at AT TIME ZONE 'UTC', {iso}) FROM renewed)
FROM {leases}
WHERE {token_is_ours} AND (EXISTS (SELECT FROM renewed) OR NOT EXISTS (SELECT FROM unlocked))

-- name: release
-- Whatever the token's number, and even if the lease has expired, unless it was taken over.
DELETE FROM {leases} WHERE {token_is_ours}

-- name: held
-- Whether the lease is still held. The answer may be outdated when it arrives, so no write relies
-- on it: writes have a fence.
SELECT 1 FROM {leases} WHERE {lease_is_ours}


-- A run begins -------------------------------------------------------------------------------

-- name: begin
-- A new run in one round trip: acquires the lease and stores the input, if nothing is stored under
-- this id. Otherwise changes nothing and returns what is stored. If there is a lease row, the
-- insert is not attempted, as in acquire. first_try is the lease of this same statement if it was
-- sent before and only its reply was lost: nobody else has this token.
WITH existing AS (
    SELECT
        snapshot::text AS snapshot,
        {journaled_steps} AS journal,
        to_char(updated_at AT TIME ZONE 'UTC', {iso}) AS touched,
        {appended} AS appended
    FROM {snapshots}
    WHERE id = %(id)s
),
first_try AS (
    SELECT expires_at FROM {leases} WHERE workflow_id = %(id)s AND owner_token = %(token)s
),
lease AS (
    INSERT INTO {leases} (workflow_id, owner_token, expires_at)
    SELECT %(id)s, %(token)s, {lease_end}
    WHERE NOT EXISTS (SELECT FROM existing)
        AND NOT EXISTS (SELECT FROM {leases} WHERE workflow_id = %(id)s)
    ON CONFLICT (workflow_id) DO NOTHING
    RETURNING expires_at
),
created AS (
    INSERT INTO {snapshots} (id, snapshot, updated_at)
    SELECT %(id)s, %(snapshot)s::jsonb, statement_timestamp() FROM lease
    ON CONFLICT (id) DO NOTHING
    RETURNING 1
)
, swept AS ({clear_journal} AND EXISTS (SELECT FROM created))  -- if journal
SELECT
    (SELECT snapshot FROM existing),
    (SELECT journal FROM existing),
    (SELECT touched FROM existing),
    (SELECT appended FROM existing),
    to_char(
        COALESCE((SELECT expires_at FROM lease), (SELECT expires_at FROM first_try))
            AT TIME ZONE 'UTC',
        {iso}
    ),
    EXISTS (SELECT FROM created) OR EXISTS (SELECT FROM first_try)

-- name: take_up
-- Resumes a stored run: before any of the user's code runs, this counts the start, sets the time
-- before which the run is not due again, and folds the journal into the snapshot. So a run that
-- kills its process backs off like one that fails. All of this happens only if nobody has written
-- to the run since %(seen)s and the journal still has %(appended)s steps, so that the caller, who
-- has read the run, knows what is stored. Or if the token already has the next number: then the
-- first try succeeded and its reply was lost, and writing the same again does no harm. FOR UPDATE
-- twice, the lease's row first, so that the compared rows cannot change before they are written.
WITH fence AS (SELECT owner_token FROM {leases} WHERE {write_is_next} FOR UPDATE),
untouched AS (
    SELECT id FROM {snapshots}
    WHERE id = %(id)s
        AND (
            {untouched}
            AND {appended} = %(appended)s::bigint
            OR EXISTS (SELECT FROM fence WHERE owner_token = %(next)s::text)
        )
        AND EXISTS (SELECT FROM fence)
    FOR UPDATE
),
numbered AS (
    UPDATE {leases} SET owner_token = %(next)s::text, expires_at = {lease_end}
    WHERE workflow_id = %(id)s AND EXISTS (SELECT FROM untouched)
    RETURNING 1
)
, taken_out AS (                                                           -- if journal
    {clear_journal} AND EXISTS (SELECT FROM numbered) RETURNING key, step  -- if journal
)                                                                          -- if journal
UPDATE {snapshots} SET
    updated_at = statement_timestamp(),
    snapshot = {folded_snapshot} || jsonb_set(
        '{}',
        '{"metadata"}',
        ({metadata} - '{waits,gaveUpAt,refusal}'::text[])
            || %(metadata)s::jsonb
            || jsonb_build_object('wakeAt', {pause_end})
    )
WHERE id = %(id)s AND EXISTS (SELECT FROM numbered)

-- name: give_up
-- Instead of take_up, for a run that has reached its max_attempts and died each time before it
-- could record why: it has failed for good, and the lease is released. Nothing changes if somebody
-- has written to the run since %(seen)s. The journal is kept in case the run is started again. The
-- result survives a lost reply as that of delete does.
WITH {releasing_fence}
UPDATE {snapshots} SET
    updated_at = statement_timestamp(),
    snapshot = snapshot || jsonb_set(
        jsonb_set('{}', '{"execution"}', COALESCE(
            (snapshot->'execution') || (SELECT jsonb_build_object(
                'status', 'failed', 'lastUpdated', {stored_now}, 'completedAt', {stored_now}
            )),
            'null'
        )),
        '{"metadata"}',
        ({metadata} - '{wakeAt,waits,refusal}'::text[])
            || jsonb_build_object('gaveUpAt', {stored_now}, 'failure', %(failure)s::jsonb)
    )
WHERE id = %(id)s
    AND {untouched}
    AND EXISTS (SELECT FROM fence)
RETURNING 1

-- name: refuse
-- After take_up, if the code cannot continue from what is recorded: stores why, for people to see,
-- and releases the lease. Repeated after a lost reply, it finds no lease and changes nothing.
WITH {releasing_fence}
UPDATE {snapshots} SET
    updated_at = statement_timestamp(),
    snapshot = jsonb_set(snapshot, '{metadata,refusal}', %(refusal)s::jsonb)
WHERE id = %(id)s AND EXISTS (SELECT FROM fence)


-- A step is recorded -------------------------------------------------------------------------

-- name: append -- if journal
-- One step, or those of several threads that are committed together: all or none, so the next write
-- needs to check only the last. Repeated, it writes the same. It is also the last statement of
-- step.transaction. The lease's row is locked, not updated: renewing is the background thread's
-- job, and until the transaction ends nobody can take the lease over, even if it expires. Here the
-- query itself is the fence: Citus forwards it to the shard as it is, whereas for a WITH it would
-- fetch the row first.
INSERT INTO {journal} (id, key, step)
SELECT workflow_id, new.key, new.value
FROM {leases} AS lease, jsonb_each(%(steps)s::jsonb) AS new
WHERE {append_is_next}
FOR UPDATE OF lease
ON CONFLICT (id, key) DO UPDATE SET step = EXCLUDED.step

-- name: append_isolated -- if journal
-- The same in a transaction above READ COMMITTED. Such a transaction sees the lease's row as of its
-- begin, and could not update it if it was renewed since. So it only locks the row, weakly: FOR KEY
-- SHARE allows renewals, but no takeover before the commit. If the lease has already been taken
-- over, locking fails, because a takeover deletes the row. That no history was lost has been
-- checked by check_history before the transaction began.
INSERT INTO {journal} (id, key, step)
SELECT workflow_id, new.key, new.value
FROM {leases} AS lease, jsonb_each(%(steps)s::jsonb) AS new
WHERE {token_is_ours}
FOR KEY SHARE OF lease
ON CONFLICT (id, key) DO UPDATE SET step = EXCLUDED.step

-- fragment: rewrite_snapshot
-- Stores the whole document where a row exists: as an UPDATE it is one query to one shard on
-- Citus. Signals are kept as in keep_signals.
UPDATE {snapshots} SET
    updated_at = statement_timestamp(),
    snapshot = CASE
        WHEN snapshot->'metadata' ? 'signals' THEN jsonb_set(
            (SELECT {dated_document}), '{metadata,signals}', snapshot->'metadata'->'signals'
        )
        ELSE (SELECT {dated_document})
    END
WHERE id = %(id)s AND EXISTS (SELECT FROM fence)

-- name: write
-- Rewrites the snapshot of a run whose journal is empty. Deleting from the empty journal as well
-- would take a fifth of the statement's time, so there are two: this and fold.
WITH {numbered_fence}
{rewrite_snapshot}

-- name: fold
-- Rewrites the snapshot with the steps of the journal in it, and empties the journal.
WITH {numbered_fence}
, swept AS ({clear_journal} AND EXISTS (SELECT FROM fence))  -- if journal
{rewrite_snapshot}

-- name: write_anew
-- Sent if write, fold, expire or finish changed no row: if the snapshot was deleted, it is stored
-- again; otherwise the fence, which is the query itself as in append, refuses this one, too. All
-- but finish have given the token its next number by then, so %(tokens)s has only that one: with
-- the earlier ones, this would overwrite a signal that arrived before expire.
INSERT INTO {snapshots} (id, snapshot, updated_at)
SELECT workflow_id, {dated_document}, statement_timestamp()
FROM {leases}
WHERE {write_is_next}
FOR UPDATE
{keep_signals}

-- name: expire
-- Rewrites the snapshot with the timeout of step.wait(%(key)s), and empties the journal, unless a
-- signal for it has arrived. The snapshot's row is locked before it is read, so this waits for a
-- signal that is being stored; and a signal that waits for this statement sees the timeout, and is
-- refused. Repeated after a lost reply, it writes the same: no signal has been accepted since.
WITH ours AS (SELECT FROM {leases} WHERE {write_is_next} FOR UPDATE),
stored AS (
    SELECT COALESCE(snapshot->'metadata'->'signals' ? %(key)s::text, false) AS answered
    FROM {snapshots}
    WHERE id = %(id)s AND EXISTS (SELECT FROM ours)
    FOR UPDATE
),
fence AS (
    UPDATE {leases} SET owner_token = %(next)s::text, expires_at = {lease_end}
    WHERE workflow_id = %(id)s
        AND EXISTS (SELECT FROM ours)
        AND NOT EXISTS (SELECT FROM stored WHERE answered)
    RETURNING 1
)
, swept AS ({clear_journal} AND EXISTS (SELECT FROM fence))  -- if journal
{rewrite_snapshot}

-- name: write_isolated
-- Rewrites the snapshot at the end of a step.transaction above READ COMMITTED, for stores
-- without a journal; the others append. The lock is that of append_isolated.
INSERT INTO {snapshots} (id, snapshot, updated_at)
SELECT workflow_id, {dated_document}, statement_timestamp()
FROM {leases}
WHERE {token_is_ours}
FOR KEY SHARE
{keep_signals}

-- name: check_history
-- Sent before a transaction above READ COMMITTED begins, whose fence at the end cannot check this:
-- is everything still stored that has been recorded? Other threads of the run may have
-- recorded more since the number was read, and folded the journal, so a later number is fine, too.
SELECT 1 FROM {leases}
WHERE {lease_is_ours}
    AND COALESCE(NULLIF(split_part(owner_token, '#', 2), ''), '0')::bigint >= %(number)s::bigint
    AND {last_step_is_there}  -- if journal

-- name: wait_for_commit
-- Returns once no transaction that has written under this lease is in progress: it keeps the
-- lease's row locked until it ends. A load afterwards shows how it ended.
SELECT 1 FROM {leases} WHERE {token_is_ours} FOR UPDATE


-- A run ends ---------------------------------------------------------------------------------

-- fragment: end_is_stored
-- Whether the last document of a run was stored; the lease's row is locked first.
fence AS (SELECT FROM {leases} WHERE {write_is_next} FOR UPDATE),
stored AS ({rewrite_snapshot} RETURNING 1)

-- fragment: release_if_stored
-- If somebody has deleted the snapshot, nothing was stored, and the lease is still needed.
DELETE FROM {leases} WHERE workflow_id = %(id)s AND EXISTS (SELECT FROM stored)

-- name: finish
-- Stores how the run ended and releases the lease: both or neither, in one round trip. Repeated
-- after a lost reply, it finds no lease and changes nothing; the caller then loads the snapshot to
-- see whether this end is stored. If it changed nothing, write_anew is sent, and then this again.
WITH {end_is_stored}
{release_if_stored}

-- name: finish_and_fold
-- The same for a run whose journal is not empty.
WITH {end_is_stored}
, swept AS ({clear_journal} AND EXISTS (SELECT FROM fence))  -- if journal
{release_if_stored}

-- name: discard
-- The end of a completed run that is not kept (on_complete="delete").
WITH {releasing_fence}
, swept AS ({clear_journal} AND EXISTS (SELECT FROM fence))  -- if journal
, gone AS (DELETE FROM {snapshots} WHERE id = %(id)s AND EXISTS (SELECT FROM fence))
SELECT 1 FROM fence


-- From outside -------------------------------------------------------------------------------

-- name: lock_lease_row
-- Sent before cancel, in the same transaction. Waits for a write that is in progress, so that
-- cancel, which sees the rows as of its start, sees that write.
SELECT 1 FROM {leases} WHERE workflow_id = %(id)s FOR UPDATE

-- fragment: cancellable
-- Not completed, and not cancelled already.
{status} IS DISTINCT FROM 'completed' AND snapshot->'metadata'->'cancelledAt' IS NULL

-- name: cancel
-- Marks the run as cancelled and revokes its lease, so that the holder writes nothing more. If
-- there is nothing to cancel, nothing changes: the journal is deleted only if "found" has a row,
-- the lease only if "cancelled" has one. A lease that was acquired while this waited for the row is
-- not seen; the caller looks for one afterwards.
WITH found AS (SELECT 1 FROM {snapshots} WHERE id = %(id)s AND {cancellable})
, taken_out AS (                                                        -- if journal
    {clear_journal} AND EXISTS (SELECT FROM found) RETURNING key, step  -- if journal
)                                                                       -- if journal
, cancelled AS (
    UPDATE {snapshots} SET
        updated_at = statement_timestamp(),
        snapshot = {folded_snapshot} || jsonb_set(
            jsonb_set(
                '{}',
                '{"execution"}',
                COALESCE(snapshot->'execution' || %(execution)s::jsonb, 'null')
            ),
            '{"metadata"}',
            {metadata} || %(metadata)s::jsonb
        )
    WHERE id = %(id)s AND {cancellable}
    RETURNING 1
),
released AS (
    DELETE FROM {leases} WHERE workflow_id = %(id)s AND EXISTS (SELECT FROM cancelled)
)
SELECT 1 FROM cancelled

-- name: rewind
-- Returns a run to an earlier step: replaces the document, empties the journal and releases the
-- lease that was acquired to read the run, all or nothing. Signals are kept as in keep_signals,
-- except those of the forgotten steps, whose waits can be answered again. A second try would find
-- no lease, so it is sent in a transaction whose outcome is looked up after a lost reply; see
-- Database.run_once.
WITH fence AS (DELETE FROM {leases} WHERE {lease_is_ours} RETURNING 1)
, swept AS ({clear_journal} AND EXISTS (SELECT FROM fence))  -- if journal
UPDATE {snapshots} SET
    updated_at = statement_timestamp(),
    snapshot = CASE
        WHEN jsonb_typeof(snapshot->'metadata'->'signals') = 'object' THEN jsonb_set(
            %(snapshot)s::jsonb,
            '{metadata,signals}',
            (snapshot->'metadata'->'signals') - %(forgotten)s::text[]
        )
        ELSE %(snapshot)s::jsonb
    END
WHERE id = %(id)s AND EXISTS (SELECT FROM fence)
RETURNING 1

-- name: make_due
-- Makes a run due now, whatever its pause and number of failures; its waits are kept. Nothing
-- changes if it has ended, or was not stored by a Durable. It releases the lease that was acquired
-- for it, and is sent as rewind is.
WITH fence AS (DELETE FROM {leases} WHERE {lease_is_ours} RETURNING 1)
UPDATE {snapshots} SET
    updated_at = statement_timestamp(),
    snapshot = snapshot || jsonb_set(
        '{}',
        '{"metadata"}',
        ((snapshot->'metadata') - '{wakeAt,gaveUpAt}'::text[]) || '{"attempts": 0}'
    )
WHERE id = %(id)s
    AND EXISTS (SELECT FROM fence)
    AND {cancellable}
    AND jsonb_typeof(snapshot->'metadata'->'workflow') = 'string'
RETURNING 1

-- name: move_times
-- For testing.pass_time: changes the times that a run waits for, and nothing else, so the journal
-- stays. It needs no lease: nothing changes if somebody has written to the run since %(seen)s or
-- holds it, and a process that resumes it meanwhile finds it changed and reads it again.
UPDATE {snapshots} SET
    updated_at = statement_timestamp(),
    snapshot = jsonb_set(snapshot, '{"metadata"}', {metadata} || %(times)s::jsonb)
WHERE id = %(id)s
    AND {untouched}
    AND NOT EXISTS (
        SELECT FROM {leases} WHERE workflow_id = %(id)s AND expires_at > statement_timestamp()
    )

-- name: signal
-- Stores a value for step.wait(key), without the lease; keep_signals keeps later writes from
-- erasing it. The first signal for a key stays. A run that is completed or cancelled accepts none,
-- nor does a wait whose deadline has passed: which came first is decided here and in expire, by the
-- same row and the same clock. A recorded timeout counts even on a server whose clock is behind.
UPDATE {snapshots} SET
    updated_at = statement_timestamp(),
    snapshot = jsonb_set(
        snapshot,
        '{metadata,signals}',
        COALESCE(snapshot->'metadata'->'signals', '{}')
            || jsonb_build_object(%(key)s::text, %(value)s::jsonb)
    )
WHERE id = %(id)s
    AND {status} IS DISTINCT FROM 'completed'
    AND jsonb_typeof(snapshot->'metadata') = 'object'
    AND snapshot->'metadata'->'cancelledAt' IS NULL
    AND snapshot->'metadata'->'signals'->%(key)s::text IS NULL
    AND NOT COALESCE(snapshot->'steps'->%(key)s::text->'meta' ? 'timedOut', false)
    AND COALESCE(snapshot->'metadata'->'deadlines'->>%(key)s::text, '9999') COLLATE "C"
        > {stored_now}

-- name: signal_for
-- The value that was sent for the key, as JSON text ('null' included); no row if there is none.
SELECT (snapshot->'metadata'->'signals'->%(key)s::text)::text
FROM {snapshots}
WHERE id = %(id)s AND snapshot->'metadata'->'signals' ? %(key)s::text


-- Listings -----------------------------------------------------------------------------------
--
-- Documents stay on the server; only the listed columns are returned.

-- fragment: and_in_range
-- The ids with a prefix, as a half-open range. COLLATE "C" is the order of the index. LIKE would
-- need escapes, and a generic plan would not use the index for it. The bare prefix of a store is
-- not an id in it, hence "above".
AND id COLLATE "C" > %(above)s::text  -- if above
AND id COLLATE "C" >= %(low)s::text  -- if low
AND id COLLATE "C" < %(high)s::text  -- if high

-- fragment: not_leased
-- Nobody is working on it.
NOT EXISTS (
    SELECT FROM {leases} l WHERE l.workflow_id = s.id AND l.expires_at > statement_timestamp()
)

-- name: list
-- One page, newest first. A page continues after the time and the id of the last row of the
-- previous one: rows that are added or deleted meanwhile do not shift it, and the index finds the
-- place at once.
SELECT id, COALESCE({status}, 'running'), to_char(updated_at AT TIME ZONE 'UTC', {iso})
FROM {snapshots}
WHERE TRUE
    {and_in_range}
    AND COALESCE({status}, 'running') = %(status)s::text  -- if status
    AND (updated_at, id COLLATE "C")                         -- if after_time
        < (%(after_time)s::timestamptz, %(after_id)s::text)  -- if after_time
ORDER BY updated_at DESC, id COLLATE "C" DESC
LIMIT %(limit)s::bigint

-- fragment: has_progressed -- if journal
-- The journal is empty when a start begins (take_up folds it). So a step in it that succeeded means
-- that the run has made progress since: neither its pause nor its count of starts applies any
-- more. The aggregate makes the planner look up one run; EXISTS would hash the whole journal.
COALESCE(
    (SELECT bool_or(j.step->'ok' = 'true') FROM {journal} j WHERE j.id = s.id GROUP BY j.id), false
)

-- fragment: has_progressed -- if no journal
false

-- fragment: is_due
-- The time stored in wakeAt has come, or a signal that the run waits for has arrived (a sleep has a
-- time and no deadline, and takes none), or it has made progress since its pause was set. Comparing
-- wakeAt as text never fails, whatever it holds.
(
    COALESCE(snapshot->'metadata'->>'wakeAt', '') COLLATE "C"
        <= {stored_now}
    OR COALESCE({status}, 'running') = 'running' AND EXISTS (
        SELECT FROM jsonb_each(
            CASE
                WHEN jsonb_typeof(snapshot->'metadata'->'waits') = 'object'
                THEN snapshot->'metadata'->'waits'
                ELSE '{}'
            END
        ) AS waited
        WHERE snapshot->'metadata'->'signals' ? waited.key
            AND (waited.value = 'null' OR snapshot->'metadata'->'deadlines' ? waited.key)
    )
    OR {has_progressed}
)

-- name: retry_at
-- When a failed run is retried automatically: now, if its time has come. No row if never.
SELECT GREATEST(
    CASE WHEN NOT {has_progressed} THEN snapshot->'metadata'->>'wakeAt' END COLLATE "C",
    {stored_now}
)
FROM {snapshots} s
WHERE id = %(id)s
    AND {unfinished}
    AND snapshot->'metadata'->'cancelledAt' IS NULL
    AND snapshot->'metadata'->'gaveUpAt' IS NULL

-- fragment: is_of_workflows
-- It is a run of a workflow that is registered here.
COALESCE(snapshot->'metadata'->>'workflow' = ANY(%(workflows)s::text[]), false)

-- name: pending
-- The runs that can be started here and now, least recently updated first: unfinished, due, neither
-- cancelled nor given up, not held, with an input that we recorded (Node users store any shape) and
-- an id of valid length. The conditions on the document are inside COALESCE, because the planner
-- expects a bare one to match one row in 200, and would then collect and sort all matches instead
-- of scanning the index until it has enough.
SELECT id, COALESCE({status}, 'running'), to_char(updated_at AT TIME ZONE 'UTC', {iso})
FROM {snapshots} s
WHERE {unfinished}
    AND {is_due}
    AND COALESCE(snapshot->'metadata'->'cancelledAt' IS NULL, true)
    AND COALESCE(snapshot->'metadata'->'gaveUpAt' IS NULL, true)
    AND COALESCE(
        jsonb_typeof(snapshot->'metadata'->'input'->'args') = 'array'
        AND jsonb_typeof(snapshot->'metadata'->'input'->'kwargs') = 'object'
        AND snapshot->'metadata'->'input' = jsonb_build_object(
            'args', snapshot->'metadata'->'input'->'args',
            'kwargs', snapshot->'metadata'->'input'->'kwargs'
        ),
        false
    )
    AND COALESCE(octet_length(id) <= {max_id}, false)
    AND {not_leased}
    {and_in_range}
    AND (updated_at, id COLLATE "C")                           -- if after_time
        > (%(after_time)s::timestamptz, %(after_id)s::text)  -- if after_time
    AND {is_of_workflows}                                      -- if workflows
ORDER BY updated_at, id COLLATE "C"
LIMIT %(limit)s::bigint

-- fragment: snapshots_and_leases
-- Each snapshot, with the lease that a process holds on it, if any.
{snapshots} s LEFT JOIN {leases} l ON l.workflow_id = s.id AND l.expires_at > statement_timestamp()

-- fragment: state
-- The state of a run of snapshots_and_leases; RunInfo says what each means. A snapshot that no
-- Durable stored has no workflow, and is never retried automatically. A start is counted, and sets
-- a pause, before it runs: so a run that is not due and waits for nothing was started and died,
-- unless it was submitted for a later time and has not been started yet.
CASE
    WHEN {status} = 'completed' THEN 'completed'
    WHEN snapshot->'metadata'->'cancelledAt' IS NOT NULL THEN 'cancelled'
    WHEN l.workflow_id IS NOT NULL THEN 'running'
    WHEN {status} = 'failed' THEN
        CASE
            WHEN snapshot->'metadata'->'gaveUpAt' IS NULL
                AND jsonb_typeof(snapshot->'metadata'->'workflow') = 'string'
            THEN 'retrying'
            ELSE 'failed'
        END
    WHEN {is_due} THEN 'pending'
    WHEN COALESCE(NULLIF(snapshot->'metadata'->'waits', '{}'), 'null') <> 'null' THEN 'waiting'
    WHEN COALESCE(snapshot->'metadata'->'attempts', '0') = '0' THEN 'waiting'
    ELSE 'retrying'
END

-- fragment: map_progress
-- The progress of each step.map of a run, in the order in which they began: its key, the number of
-- completed items, and of all items. A step that is in snapshot and journal counts once.
(
    SELECT json_agg(json_build_array(map, done, count) ORDER BY first)::text
    FROM (
        SELECT
            value->'meta'->>'map' AS map,
            count(*) FILTER (WHERE value->'ok' = 'true') AS done,
            (array_agg(value->'meta'->'of'))[1] AS count,
            min(lpad(value->'meta'->>'seq', 20, '0')) AS first
        FROM jsonb_each(
            COALESCE((                                                     -- if journal
                SELECT jsonb_object_agg(j.key, j.step - 'value')           -- if journal
                FROM {journal} j                                           -- if journal
                WHERE j.id = s.id AND jsonb_typeof(j.step) = 'object'      -- if journal
                GROUP BY j.id                                              -- if journal
            ), '{}') ||                                                    -- if journal
            CASE
                WHEN jsonb_typeof(snapshot->'steps') = 'object' THEN snapshot->'steps'
                ELSE '{}'
            END
        )
        WHERE value->'meta' ? 'map'
        GROUP BY 1
    ) AS maps
)

-- fragment: run_columns
-- One run as RunInfo reads it: without payloads, which may be large. The newest Node releases
-- store the steps as an array of pairs.
    s.id,
    COALESCE({status}, 'running'),
    {state},
    to_char(updated_at AT TIME ZONE 'UTC', {iso}),
    CASE jsonb_typeof(snapshot->'steps')
        WHEN 'object' THEN (SELECT count(*) FROM jsonb_object_keys(snapshot->'steps'))
        WHEN 'array' THEN jsonb_array_length(snapshot->'steps')
        ELSE 0
    END
    + COALESCE((                                                                -- if journal
        SELECT count(*) FROM {journal} j                                        -- if journal
        WHERE j.id = s.id AND NOT COALESCE(snapshot->'steps' ? j.key, false)    -- if journal
        GROUP BY j.id                                                           -- if journal
    ), 0)                                                                       -- if journal
    ,
    CASE WHEN {unfinished} THEN {map_progress} END,
    CASE
        WHEN jsonb_typeof(snapshot->'metadata') = 'object'
        THEN ((snapshot->'metadata') - '{input,output,failure,signals}'::text[])::text
    END,
    split_part(l.owner_token, '#', 1),
    to_char(l.expires_at AT TIME ZONE 'UTC', {iso}),
    to_char(statement_timestamp() AT TIME ZONE 'UTC', {iso})

-- name: runs
-- A page of runs, newest first, or the runs with these ids. For a state of unfinished runs the
-- small partial index is used; the planner can do that only because its condition is repeated here.
SELECT {run_columns}
FROM {snapshots_and_leases}
WHERE TRUE
    AND s.id = ANY(%(ids)s::text[])                                 -- if ids
    {and_in_range}
    AND snapshot->'metadata'->>'workflow' = %(workflow)s::text      -- if workflow
    AND snapshot->'metadata'->'custom' @> %(metadata)s::jsonb       -- if metadata
    AND {unfinished} AND %(unfinished)s::bool                       -- if unfinished
    AND {state} = %(state)s::text                                   -- if state
    AND (updated_at, id COLLATE "C")                                -- if after_time
        < (%(after_time)s::timestamptz, %(after_id)s::text)         -- if after_time
ORDER BY updated_at DESC, id COLLATE "C" DESC
LIMIT %(limit)s::bigint

-- name: get
-- One run with its document and its journal, from a single database snapshot.
SELECT {run_columns}, snapshot::text, {journaled_steps}
FROM {snapshots_and_leases}
WHERE s.id = %(id)s

-- name: unfinished
-- The runs that check replays: all that will be resumed, due or not, held or not, least recently
-- updated first, page by page as in pending. A run that is written meanwhile moves to the end, and
-- is listed again.
SELECT id, COALESCE({status}, 'running'), to_char(updated_at AT TIME ZONE 'UTC', {iso})
FROM {snapshots} s
WHERE {unfinished}
    AND COALESCE(jsonb_typeof(snapshot->'metadata'->'workflow') = 'string', false)
    AND COALESCE(snapshot->'metadata'->'cancelledAt' IS NULL, true)
    AND COALESCE(snapshot->'metadata'->'gaveUpAt' IS NULL, true)
    AND COALESCE(octet_length(id) <= {max_id}, false)
    {and_in_range}
    AND (updated_at, id COLLATE "C")                           -- if after_time
        > (%(after_time)s::timestamptz, %(after_id)s::text)  -- if after_time
ORDER BY updated_at, id COLLATE "C"
LIMIT %(limit)s::bigint

-- name: where_state
-- A condition for the users' own queries on the snapshots table. It has no parameters: the caller
-- inserts one of the seven states, which are checked. Nearly all runs are completed, so for those
-- there is no self-join.
{status} = %(completed)s                             -- if completed
id IN (                                              -- if unfinished
    SELECT s.id FROM {snapshots_and_leases}          -- if unfinished
    WHERE {unfinished} AND {state} = %(unfinished)s  -- if unfinished
)                                                    -- if unfinished

-- name: stats
-- The number of rows in total and by status and state, and bytes. Only unfinished rows are grouped,
-- using the partial index; the caller gets the number of completed ones by subtraction. The last
-- row says whether the extension citus is installed.
SELECT 'total', NULL, NULL, count(*) FROM {snapshots}
WHERE TRUE
    {and_in_range}
UNION ALL
SELECT 'unfinished', COALESCE({status}, 'running'), {state}, count(*)
FROM {snapshots_and_leases}
WHERE {unfinished}
    {and_in_range}
GROUP BY 2, 3
UNION ALL
SELECT
    'bytes',
    (SELECT extname::text FROM pg_extension WHERE extname = 'citus'),
    NULL,
    sum(pg_total_relation_size(name::regclass))::bigint
FROM unnest(%(tables)s::text[]) AS name

-- name: distributed_bytes
-- Sent after stats if that found the extension citus. The bytes above are those of the empty local
-- part of a distributed table. These include all shards, and tables that are not distributed.
SELECT sum(
    CASE
        WHEN EXISTS (SELECT FROM pg_dist_partition WHERE logicalrelid = name::regclass)
        THEN citus_total_relation_size(name::regclass)
        ELSE pg_total_relation_size(name::regclass)
    END
)::bigint
FROM unnest(%(tables)s::text[]) AS name


-- Housekeeping -------------------------------------------------------------------------------

-- name: prunable
-- The snapshots that prune() deletes next: old, and not leased. For states of unfinished runs the
-- partial index is used, as in runs.
SELECT s.id FROM {snapshots_and_leases}
WHERE updated_at < statement_timestamp() - make_interval(secs => %(age)s)
    AND l.workflow_id IS NULL
    {and_in_range}
    AND COALESCE({status}, 'running') = %(status)s::text  -- if status
    AND {unfinished} AND %(unfinished)s::bool             -- if unfinished
    AND {state} = %(state)s::text                         -- if state
ORDER BY updated_at
LIMIT %(limit)s::bigint

-- name: delete_many
-- With an age, it deletes only rows that are still that old and not leased: a run may have been
-- resumed since prunable listed it. Each condition has a line of its own, without OR, so that Citus
-- sees that the tables are joined by id.
DELETE FROM {snapshots} s
WHERE id = ANY(%(ids)s::text[])
    AND updated_at < statement_timestamp() - make_interval(secs => %(age)s)  -- if age
    AND {not_leased}                                                         -- if age
RETURNING id

-- name: delete_many_journals -- if journal
-- Sent after delete_many, in the same transaction, with the ids that it deleted; and after
-- create_many with those that it created, whose journals are left over from deleted runs.
DELETE FROM {journal} WHERE id = ANY(%(ids)s::text[])

-- name: sweep_journal -- if journal
-- Journal rows whose snapshot is gone: deleted while the run was in progress, or by other SQL.
DELETE FROM {journal} j WHERE NOT EXISTS (SELECT FROM {snapshots} s WHERE s.id = j.id)

-- name: sweep_locks
-- Leases of dead processes that expired that long ago.
DELETE FROM {leases} WHERE expires_at < statement_timestamp() - make_interval(secs => %(age)s)
