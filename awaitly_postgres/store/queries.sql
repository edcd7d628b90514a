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
--   %(id)s               A parameter. psycopg sends it apart from the statement.
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
-- * One id for each write, named as %(id)s for every table that it reads or changes. So the tables
--   can be distributed by id: each write is one query to one shard, without two-phase commit. Only
--   create_many and the housekeeping at the end of this file take several ids.
-- * Whoever needs both rows locks the lease's before the snapshot's, so there are no deadlocks. The
--   parts of one statement run in no given order: FROM fence, or EXISTS (SELECT FROM fence), makes
--   a part wait for the fence, and do nothing if the fence has found no row.
-- * A statement may be sent again after a lost reply, so repeating it must be harmless. Where that
--   is not obvious, the comment says why it is.
-- * Time is the server's: statement_timestamp(). now() stands still in a caller's transaction.
--   clock_timestamp() is volatile: Citus refuses it in a write, and no index is searched for it. A
--   statement that had to wait thus judges by the time at which it came. That is safe, because a
--   lease that has run out is only free to be taken: whoever takes it replaces the row, under its
--   lock, and then the token does not match, whatever the time. Nobody can have done so while the
--   statement holds the row.
-- * What a write computes from its columns is immutable, as Citus demands: jsonb_set() and ||, not
--   jsonb_build_object(); times as they are, not to_char(). In a CASE or COALESCE of what an UPDATE
--   sets, such a call stands in a SELECT of its own. A subquery that names a column of the query
--   around it has neither LIMIT nor an aggregate without GROUP BY on the id.
-- * Citus computes every branch of a CASE before it sends the statement, also those not taken. So
--   none may fail, whatever the parameters are.
-- * Citus hands an UPDATE or DELETE on to the shard as it is, WITH and all, but an INSERT only
--   without WITH, and with the id from a column of the row that it selects.
--   It pulls the rows of these to the coordinator, which costs several times as much:
--     save, save_under_lease, create, begin, acquire, take_over
-- * These ask every shard, since they name no id:
--     list, runs, pending, unfinished, where_state, stats, stored_calls, create_many,
--     prunable, delete_many, delete_many_journals, sweep_journal, sweep_locks
-- * What comes back is text, integers and booleans. Callers may have adapters of their own for
--   jsonb and timestamps, and those must not matter.


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
-- When a run is due again that is not to be taken up for %(pause)s seconds; NULL, not an error, for
-- an infinite pause.
to_char(
    (statement_timestamp() + make_interval(secs => NULLIF(%(pause)s::float8, 'infinity')))
        AT TIME ZONE 'UTC',
    {stored_iso}
)

-- fragment: lease_end
-- When a lease runs out that is taken or renewed now.
statement_timestamp() + make_interval(secs => %(ttl)s)

-- name: now
-- The server's time, by which step.sleep and step.wait count.
SELECT to_char(statement_timestamp() AT TIME ZONE 'UTC', {iso})


-- Pieces of a document -----------------------------------------------------------------------

-- fragment: metadata
-- An object that can be added to: the metadata may be missing, or JSON's null.
COALESCE(NULLIF(snapshot->'metadata', 'null'), '{}')

-- fragment: dated_document
-- The document, with the time from which the run is due if there is a pause, by the server's clock;
-- with an infinite one, that the run was given up.
CASE
    WHEN %(pause)s::float8 IS NULL THEN %(snapshot)s::jsonb
    WHEN %(pause)s::float8 = 'infinity'
    THEN jsonb_set(%(snapshot)s::jsonb, '{metadata,gaveUpAt}', to_jsonb({stored_now}))
    ELSE jsonb_set(%(snapshot)s::jsonb, '{metadata,wakeAt}', to_jsonb({pause_end}))
END

-- fragment: journaled_steps -- if journal
-- What the journal has of this run, as JSON text; NULL if it is empty.
(SELECT json_object_agg(key, step)::text FROM {journal} WHERE id = %(id)s)

-- fragment: journaled_steps -- if no journal
NULL

-- fragment: appended -- if journal
-- How many steps the journal has of this run.
(SELECT count(*) FROM {journal} WHERE id = %(id)s)

-- fragment: appended -- if no journal
0

-- fragment: clear_journal -- if journal
-- Sweeps up the journal of one run, as part of the statement that makes it obsolete.
DELETE FROM {journal} WHERE id = %(id)s

-- fragment: folded_snapshot -- if journal
-- The snapshot, with the steps just taken out of the journal laid under its own: where both have a
-- key, the snapshot's step counts, as it does for load. Each function copies all steps, so none is
-- called that need not be.
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
-- Whether nobody has written to the run since it was %(seen)s: text as it was returned, NULL for a
-- row without a proper time.
CASE WHEN isfinite(updated_at) THEN updated_at END IS NOT DISTINCT FROM %(seen)s::timestamptz

-- fragment: keep_signals
-- Replaces the document, but not the signals in it. A signal is sent without the lease, so the
-- document that the lease's holder is writing does not know of it and must not erase it.
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
-- statement changes nothing: the lease has run out or is somebody else's. At READ COMMITTED the
-- condition is checked on the row as it is once the lock is granted, so a write that was slow to
-- arrive, or had to wait, is judged by the state that it meets.

-- fragment: token_is_ours
-- A durable run that has written its snapshot numbers its token: host:pid:random#3.
workflow_id = %(id)s AND split_part(owner_token, '#', 1) = %(token)s

-- fragment: lease_is_ours
{token_is_ours} AND expires_at > statement_timestamp()

-- fragment: last_step_is_there
-- Whether the journal still has the last step that was appended, unless a rewrite of the
-- snapshot has folded it since. A server that has lost it (a failover to a standby that had not
-- heard of it, a restored backup) has lost history that the next write would build on.
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
-- The same for an appended step. It lands only on the last rewrite known to have landed: if it
-- arrives late, after a newer one, it must change nothing. That rewrite does not count on the step,
-- and the end of the run would leave it behind in a journal believed empty.
workflow_id = %(id)s
AND owner_token = %(base)s::text
AND expires_at > statement_timestamp()
AND (
    %(last)s::text IS NULL
    OR EXISTS (SELECT FROM {journal} WHERE id = %(id)s AND key = %(last)s::text)
)

-- fragment: numbered_fence
-- For a write of the snapshot: gives the token its next number, and renews the lease. Repeated
-- after a lost reply, the write takes another number and may follow its own first try, which is in
-- its list.
fence AS (
    UPDATE {leases} SET owner_token = %(next)s::text, expires_at = {lease_end}
    WHERE {write_is_next}
    RETURNING 1
)

-- fragment: releasing_fence
-- For the last write of a run: fence and release in one.
fence AS (DELETE FROM {leases} WHERE {write_is_next} RETURNING 1)


-- Snapshots ----------------------------------------------------------------------------------

-- name: load
-- The document, and the steps of the journal that belong under it.
SELECT snapshot::text, {journaled_steps} FROM {snapshots} WHERE id = %(id)s

-- name: read_for_resume
-- What a resumed run goes on from, and who holds its lease, if anybody does. It writes nothing,
-- so that finding a run taken costs no lease that must be given back.
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
-- The caller's document replaces whatever was stored, a journal included, which belonged to
-- that.
WITH given AS (SELECT %(id)s::text AS id)
, swept AS ({clear_journal})  -- if journal
INSERT INTO {snapshots} (id, snapshot, updated_at)
SELECT id, %(snapshot)s::jsonb, statement_timestamp() FROM given
ON CONFLICT (id) DO UPDATE SET snapshot = EXCLUDED.snapshot, updated_at = EXCLUDED.updated_at

-- name: save_under_lease
-- The same under a lease that the caller holds. No number is checked, since whoever has the
-- lease may write anything. It may run in a transaction of the caller's, at whatever level:
-- above READ COMMITTED expires_at may be that of before a renewal, so there only the lock
-- counts; see append_isolated.
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
-- Stores a document where there is none. Repeated, it does nothing and returns no row. A journal
-- without a snapshot is the remainder of an earlier run that was deleted.
WITH created AS (
    INSERT INTO {snapshots} (id, snapshot, updated_at)
    VALUES (%(id)s, {dated_document}, statement_timestamp())
    ON CONFLICT (id) DO NOTHING
    RETURNING 1
)
, swept AS ({clear_journal} AND EXISTS (SELECT FROM created))  -- if journal
SELECT 1 FROM created

-- name: stored_calls
-- What the runs with these ids were accepted with, for submit_many to compare. Whoever is not there
-- is new.
SELECT id, (snapshot->'metadata'->'workflow')::text, (snapshot->'metadata'->'input')::text
FROM {snapshots}
WHERE id = ANY(%(ids)s::text[])

-- name: create_many
-- Stores a run for each id that is not there yet: the same document with the input of each. The ids
-- come sorted, so that two of these wait for each other's rows in the same order and cannot
-- deadlock. Sent in a transaction whose outcome is looked up after a lost reply, because a second
-- try would find its own rows and call them old; see Database.run_once. Not a CTE with what sweeps
-- the journals (delete_many_journals, sent after it): Citus refuses that for several shards.
INSERT INTO {snapshots} (id, snapshot, updated_at)
SELECT id, jsonb_set({dated_document}, '{metadata,input}', input::jsonb), clock_timestamp()
FROM unnest(%(ids)s::text[], %(inputs)s::text[]) AS given (id, input)
ON CONFLICT (id) DO NOTHING
RETURNING id

-- name: delete
-- The count is the answer to the caller. It survives a lost reply because the transaction's
-- outcome is looked up then, instead of deleting again; see Database.run_once.
WITH gone AS (DELETE FROM {snapshots} WHERE id = %(id)s RETURNING 1)
, swept AS ({clear_journal})  -- if journal
SELECT (SELECT count(*) FROM gone)::int


-- Leases -------------------------------------------------------------------------------------

-- name: acquire
-- Takes a lease that nobody has. If there is a row, the insert is not even tried: should its
-- holder be about to delete it, ON CONFLICT would wait for that transaction to end.
WITH lease AS (
    INSERT INTO {leases} (workflow_id, owner_token, expires_at)
    SELECT %(id)s, %(token)s, {lease_end}
    WHERE NOT EXISTS (SELECT FROM {leases} WHERE workflow_id = %(id)s)
    ON CONFLICT (workflow_id) DO NOTHING
    RETURNING expires_at
)
SELECT to_char(expires_at AT TIME ZONE 'UTC', {iso}) FROM lease

-- name: take_over
-- Sent if acquire found a row. The lease is free if it has run out, or if the token is ours:
-- then an earlier try got it, and only the reply was lost. A locked row is not free, for its
-- holder is writing; SKIP LOCKED says so at once instead of waiting. The row is deleted and
-- inserted, not updated, so that a transaction above READ COMMITTED of the previous holder fails
-- at its fence: it could still lock an updated row; see append_isolated.
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
-- Who has the lease that neither of the two above could take, for AlreadyRunning to say.
SELECT split_part(owner_token, '#', 1), to_char(expires_at AT TIME ZONE 'UTC', {iso})
FROM {leases}
WHERE workflow_id = %(id)s

-- name: renew
-- Moves the end of a lease that still stands; one that has run out is not revived. SKIP LOCKED,
-- because the renewing thread must not wait for a write that has locked the row: while that
-- lasts, nobody can take the lease over. Then the row comes back with no new end: it stands as
-- it was. The lock is NO KEY UPDATE, which the FOR KEY SHARE of an isolated transaction does not
-- keep out.
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
-- Whatever the number of the token, and even if the lease has run out, unless somebody took it
-- over.
DELETE FROM {leases} WHERE {token_is_ours}

-- name: held
-- Whether the lease still stands. The answer may be out of date when it arrives, so no write relies
-- on it: writes have a fence.
SELECT 1 FROM {leases} WHERE {lease_is_ours}


-- A run begins -------------------------------------------------------------------------------

-- name: begin
-- A new run in one round trip: takes the lease and stores the input, if nothing is stored under
-- this id. Otherwise changes nothing and returns what is stored. For a lease row that is there
-- the insert is not tried, as in acquire. first_try is the lease of this same statement if it
-- was sent before and only its reply was lost: nobody else has this token.
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
-- A stored run is started again: before any of the user's code runs, this counts the start, sets
-- the time before which it is not due again, and folds the journal into the snapshot. So a run
-- that kills its process backs off like one that fails. All of it happens only if nobody has
-- touched the run since it was %(seen)s, and nobody has appended a step, so that there are still
-- %(appended)s; or if the token has the next number already: then the first try landed
-- and its reply was lost, and writing the same again does no harm. So the caller, who has read the
-- run, knows what is stored then. FOR UPDATE twice, the lease's row first: what is compared stays
-- so until it is written.
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
-- Instead of take_up, for a run that was started as often as it may be and died each time before
-- it could say why: it has failed for good, and the lease is given back. Nothing changes if
-- somebody has touched the run since it was %(seen)s. The journal stays, for whoever revives it.
-- The answer survives a lost reply as that of delete does.
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
-- After take_up, if the code cannot go on with what is recorded: says why, for people to see, and
-- gives the lease back. Repeated after a lost reply it finds no lease and changes nothing.
WITH {releasing_fence}
UPDATE {snapshots} SET
    updated_at = statement_timestamp(),
    snapshot = jsonb_set(snapshot, '{metadata,refusal}', %(refusal)s::jsonb)
WHERE id = %(id)s AND EXISTS (SELECT FROM fence)


-- A step is recorded -------------------------------------------------------------------------

-- name: append -- if journal
-- One step or several, of threads that wait for their commit together: all or none, so the write
-- that follows need name only the last. Repeated, it writes the same. It is also the last statement
-- of step.transaction. The lease's row is locked, not updated: renewing it is the background
-- thread's work, and until a transaction ends nobody can take the lease, even if it runs out. Here
-- the fence is the query itself, which Citus hands on to the shard as it is; from a WITH it would
-- fetch the row first.
INSERT INTO {journal} (id, key, step)
SELECT workflow_id, new.key, new.value
FROM {leases} AS lease, jsonb_each(%(steps)s::jsonb) AS new
WHERE {append_is_next}
FOR UPDATE OF lease
ON CONFLICT (id, key) DO UPDATE SET step = EXCLUDED.step

-- name: append_isolated -- if journal
-- The same in a transaction above READ COMMITTED. That sees the lease's row as it was when the
-- transaction began, and could not write it if it was renewed since. So it only locks the row,
-- weakly: FOR KEY SHARE lets us renew the lease, and lets nobody take it over until the commit. If
-- it was taken over already, locking fails, because taking over deletes the row. Whether the
-- history is all there was checked when the transaction began, by check_history.
INSERT INTO {journal} (id, key, step)
SELECT workflow_id, new.key, new.value
FROM {leases} AS lease, jsonb_each(%(steps)s::jsonb) AS new
WHERE {token_is_ours}
FOR KEY SHARE OF lease
ON CONFLICT (id, key) DO UPDATE SET step = EXCLUDED.step

-- fragment: rewrite_snapshot
-- The whole document as it stands, for a row that is there: as an UPDATE it is one query to one
-- shard on Citus. Signals are kept as in keep_signals.
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
-- Rewrites the snapshot of a run whose journal is empty. Sweeping the empty journal as well
-- would cost a fifth of the statement, hence this and fold.
WITH {numbered_fence}
{rewrite_snapshot}

-- name: fold
-- Rewrites the snapshot with the steps of the journal in it, and empties the journal.
WITH {numbered_fence}
, swept AS ({clear_journal} AND EXISTS (SELECT FROM fence))  -- if journal
{rewrite_snapshot}

-- name: write_anew
-- Sent if write, fold, expire or finish have changed no row: if that is because somebody has
-- deleted it, it is stored again. Otherwise the fence, which is the query itself as in append,
-- refuses this as well. All but finish have given the token its next number by then, so here
-- %(tokens)s is that one alone: with those before, a signal that came before expire would be
-- overwritten.
INSERT INTO {snapshots} (id, snapshot, updated_at)
SELECT workflow_id, {dated_document}, statement_timestamp()
FROM {leases}
WHERE {write_is_next}
FOR UPDATE
{keep_signals}

-- name: expire
-- Rewrites the snapshot, empty journal or not, where it says that step.wait(%(key)s) has timed out:
-- nothing happens if a signal for it is there. The snapshot's row is locked before it is looked at,
-- so a signal that is being sent is waited for; and one that waits for this statement finds what it
-- has written, and is refused. Repeated after a lost reply, it writes the same: no signal was taken
-- since.
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
-- The first statement of a transaction above READ COMMITTED, whose fence at the end cannot check
-- it: is all there that has been recorded? Other threads of the run may have recorded more since
-- the number was read, and folded the journal, so a later number does as well.
SELECT 1 FROM {leases}
WHERE {lease_is_ours}
    AND COALESCE(NULLIF(split_part(owner_token, '#', 2), ''), '0')::bigint >= %(number)s::bigint
    AND {last_step_is_there}  -- if journal

-- name: wait_for_commit
-- Returns once no transaction that has written under this lease is under way any more: it has
-- the lease's row locked until it ends. What load finds afterwards is how it ended.
SELECT 1 FROM {leases} WHERE {token_is_ours} FOR UPDATE


-- A run ends ---------------------------------------------------------------------------------

-- fragment: end_is_stored
-- Whether the last document of a run was stored; the lease's row is locked before.
fence AS (SELECT FROM {leases} WHERE {write_is_next} FOR UPDATE),
stored AS ({rewrite_snapshot} RETURNING 1)

-- fragment: release_if_stored
-- If somebody has deleted the snapshot, there was none to rewrite, and the lease is still needed.
DELETE FROM {leases} WHERE workflow_id = %(id)s AND EXISTS (SELECT FROM stored)

-- name: finish
-- How the run ended, and the lease is given back: both or neither, in one round trip. Repeated
-- after a lost reply it finds no lease and changes nothing; the caller then loads the snapshot
-- to see whether this end is the one that is stored. If it has changed nothing, write_anew and this
-- are sent.
WITH {end_is_stored}
{release_if_stored}

-- name: finish_and_fold
-- The same for a run whose journal is not empty.
WITH {end_is_stored}
, swept AS ({clear_journal} AND EXISTS (SELECT FROM fence))  -- if journal
{release_if_stored}

-- name: discard
-- The end of a completed run of which nothing is to be kept (on_complete="delete").
WITH {releasing_fence}
, swept AS ({clear_journal} AND EXISTS (SELECT FROM fence))  -- if journal
, gone AS (DELETE FROM {snapshots} WHERE id = %(id)s AND EXISTS (SELECT FROM fence))
SELECT 1 FROM fence


-- From outside -------------------------------------------------------------------------------

-- name: lock_lease_row
-- Sent before cancel, in the same transaction. Waits for a write that is under way, so that
-- cancel, which looks at the rows when it starts, sees what that has written.
SELECT 1 FROM {leases} WHERE workflow_id = %(id)s FOR UPDATE

-- fragment: cancellable
-- Not completed, and not cancelled already.
{status} IS DISTINCT FROM 'completed' AND snapshot->'metadata'->'cancelledAt' IS NULL

-- name: cancel
-- Marks the run as cancelled and takes its lease away, so that whoever has it writes nothing
-- more. If there is nothing to cancel, nothing changes: found keeps the journal, cancelled the
-- lease.
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
-- Takes a run back to an earlier step: replaces the document, empties the journal and releases the
-- lease that was taken to read the run, all or nothing. Signals are kept as in keep_signals, except
-- those of the forgotten steps, whose waits can be answered again. A second try would find no
-- lease, so it is sent in a transaction whose outcome is looked up after a lost reply; see
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
-- Lets a run be started again now, whatever pause it has and however often it has failed; it keeps
-- what it waits for. Nothing changes if it has ended, or was not stored by a Durable. It releases
-- the lease that was taken for it, and is sent as rewind is.
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
-- For testing.pass_time: changes the times that a run waits for, and nothing else, so that the
-- journal stays. It needs no lease: nothing changes if somebody has written to the run since it was
-- %(seen)s or holds it, and whoever takes it up meanwhile finds it touched and reads it again.
UPDATE {snapshots} SET
    updated_at = statement_timestamp(),
    snapshot = jsonb_set(snapshot, '{"metadata"}', {metadata} || %(times)s::jsonb)
WHERE id = %(id)s
    AND {untouched}
    AND NOT EXISTS (
        SELECT FROM {leases} WHERE workflow_id = %(id)s AND expires_at > statement_timestamp()
    )

-- name: signal
-- Puts a value where step.wait(key) looks for it, without the lease; keep_signals keeps it
-- there. The first signal for a key stays. A run that is completed or cancelled takes none, nor
-- does a wait whose deadline is over: which came first is decided here and in expire, by the same
-- row and the same clock. A recorded timeout counts even on a server whose clock is behind.
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
-- What was sent for the key: JSON text, 'null' included; no row if nothing was.
SELECT (snapshot->'metadata'->'signals'->%(key)s::text)::text
FROM {snapshots}
WHERE id = %(id)s AND snapshot->'metadata'->'signals' ? %(key)s::text


-- Listings -----------------------------------------------------------------------------------
--
-- Documents stay on the server; of each row only what is listed comes back.

-- fragment: and_in_range
-- The ids with a prefix, as a half-open range. COLLATE "C" is the order of the index. LIKE would
-- need escapes, and loses its index once the plan is a generic one. The bare prefix of a store
-- is no id in it, hence "above".
AND id COLLATE "C" > %(above)s::text  -- if above
AND id COLLATE "C" >= %(low)s::text  -- if low
AND id COLLATE "C" < %(high)s::text  -- if high

-- fragment: not_leased
-- Nobody is working on it.
NOT EXISTS (
    SELECT FROM {leases} l WHERE l.workflow_id = s.id AND l.expires_at > statement_timestamp()
)

-- name: list
-- One page, newest first. A page goes on after the time and the id of the last row of the one
-- before: rows that come or go meanwhile shift nothing, and the index leads straight there.
SELECT id, COALESCE({status}, 'running'), to_char(updated_at AT TIME ZONE 'UTC', {iso})
FROM {snapshots}
WHERE TRUE
    {and_in_range}
    AND COALESCE({status}, 'running') = %(status)s::text  -- if status
    AND (updated_at, id COLLATE "C")                         -- if after_time
        < (%(after_time)s::timestamptz, %(after_id)s::text)  -- if after_time
ORDER BY updated_at DESC, id COLLATE "C" DESC
LIMIT %(limit)s::bigint

-- fragment: has_got_further -- if journal
-- The journal is empty when a start begins (take_up folds it). So a step in it that succeeded
-- means that the run has got further since: neither its pause nor the number of its starts holds
-- any longer. An aggregate makes the planner look it up for the one run; for EXISTS it would hash
-- the journal of all.
COALESCE(
    (SELECT bool_or(j.step->'ok' = 'true') FROM {journal} j WHERE j.id = s.id GROUP BY j.id), false
)

-- fragment: has_got_further -- if no journal
false

-- fragment: is_due
-- The time stored in wakeAt has come, or a signal for which the run waits is there, or it has
-- got further since its pause was set. Comparing wakeAt as text never fails, whatever a row
-- holds.
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
    )
    OR {has_got_further}
)

-- name: retry_at
-- When a run that has failed is tried again, by itself: now, if its time has come. No row if never.
SELECT GREATEST(
    CASE WHEN NOT {has_got_further} THEN snapshot->'metadata'->>'wakeAt' END COLLATE "C",
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
-- What could be started here and now, the longest untouched first: unfinished, due, neither
-- cancelled nor given up, with an input that a run of ours recorded (Node's users record theirs in
-- any shape) and an id that is not too long for one, and nobody holds its lease. The conditions on
-- the document stand inside COALESCE, because the planner expects a bare one to leave one row in
-- 200, and would then collect and sort all instead of walking along the index until it has enough.
SELECT id, COALESCE({status}, 'running'), to_char(updated_at AT TIME ZONE 'UTC', {iso})
FROM {snapshots} s
WHERE {unfinished}
    AND {is_due}
    AND COALESCE(snapshot->'metadata'->'cancelledAt' IS NULL, true)
    AND COALESCE(snapshot->'metadata'->'gaveUpAt' IS NULL, true)
    AND COALESCE(
        jsonb_typeof(snapshot->'metadata'->'input'->'args') = 'array'
        AND jsonb_typeof(snapshot->'metadata'->'input'->'kwargs') = 'object',
        false
    )
    AND COALESCE(octet_length(id) <= {max_id}, false)
    AND {not_leased}
    {and_in_range}
    AND (updated_at, id COLLATE "C")                           -- if behind_time
        > (%(behind_time)s::timestamptz, %(behind_id)s::text)  -- if behind_time
    AND {is_of_workflows}                                      -- if workflows
ORDER BY updated_at, id COLLATE "C"
LIMIT %(limit)s::bigint

-- fragment: snapshots_and_leases
-- Each snapshot, with the lease that a process holds on it, if any.
{snapshots} s LEFT JOIN {leases} l ON l.workflow_id = s.id AND l.expires_at > statement_timestamp()

-- fragment: state
-- Where a run of snapshots_and_leases stands, in one word; RunInfo says what each means. What no
-- Durable has stored has no workflow, and is not tried again by itself. A start counts, and sets a
-- pause, before it runs: whatever is not due, and waits for nothing, has been started and has died,
-- unless it was accepted for a later time and not started yet.
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
-- How far each step.map of a run has got, in the order in which they began: its key, the items that
-- have completed, and how many there are. A step that stands in both places counts once.
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
                FROM {journal} j WHERE j.id = s.id GROUP BY j.id           -- if journal
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
-- A page of runs for people to look at, newest first, or the runs with these ids. A state of
-- unfinished runs is looked for along their partial index, which is small; the planner sees that
-- only because the condition of that index stands beside.
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
-- One run with its document and its journal, as they are at one moment.
SELECT {run_columns}, snapshot::text, {journaled_steps}
FROM {snapshots_and_leases}
WHERE s.id = %(id)s

-- name: unfinished
-- What check replays: the runs that a workflow will go on with, due or not and whoever holds
-- them, the longest untouched first, page by page as in pending. A run that is written meanwhile
-- moves to the end, and is listed again.
SELECT id, COALESCE({status}, 'running'), to_char(updated_at AT TIME ZONE 'UTC', {iso})
FROM {snapshots} s
WHERE {unfinished}
    AND COALESCE(jsonb_typeof(snapshot->'metadata'->'workflow') = 'string', false)
    AND COALESCE(snapshot->'metadata'->'cancelledAt' IS NULL, true)
    AND COALESCE(snapshot->'metadata'->'gaveUpAt' IS NULL, true)
    AND COALESCE(octet_length(id) <= {max_id}, false)
    {and_in_range}
    AND (updated_at, id COLLATE "C")                           -- if behind_time
        > (%(behind_time)s::timestamptz, %(behind_id)s::text)  -- if behind_time
ORDER BY updated_at, id COLLATE "C"
LIMIT %(limit)s::bigint

-- name: where_state
-- A condition for queries of others on the table of snapshots. No parameter is sent with it: the
-- caller puts one of the seven states, which are checked, into its text. Nearly all runs are
-- completed, so those are not joined with themselves.
{status} = %(completed)s                             -- if completed
id IN (                                              -- if unfinished
    SELECT s.id FROM {snapshots_and_leases}          -- if unfinished
    WHERE {unfinished} AND {state} = %(unfinished)s  -- if unfinished
)                                                    -- if unfinished

-- name: stats
-- Rows in all, rows of each status and state, and bytes. Only the unfinished ones are grouped, by
-- the partial index; the caller gets the number of completed ones by subtraction. The last row says
-- whether the extension citus is there.
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
-- Sent after stats where that has found the extension citus. The bytes above are those of the empty
-- shell of a distributed table. These are of all shards, and of what is not distributed.
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
-- What prune() deletes next: old, and not being worked on.
SELECT id FROM {snapshots} s
WHERE updated_at < statement_timestamp() - make_interval(secs => %(age)s)
    AND {not_leased}
    {and_in_range}
    AND COALESCE({status}, 'running') = %(status)s::text  -- if status
ORDER BY updated_at
LIMIT %(limit)s::bigint

-- name: delete_many
-- With an age it deletes only what is still as old: a run may have been resumed since prunable
-- saw it.
DELETE FROM {snapshots}
WHERE id = ANY(%(ids)s::text[])
    AND (
        %(age)s::float8 IS NULL
        OR updated_at < statement_timestamp() - make_interval(secs => %(age)s::float8)
    )
RETURNING id

-- name: delete_many_journals -- if journal
-- Sent after delete_many, in the same transaction, with the ids that it has deleted; and after
-- create_many with those that it has created, whose journals are remainders of earlier runs.
DELETE FROM {journal} WHERE id = ANY(%(ids)s::text[])

-- name: sweep_journal -- if journal
-- Journals whose snapshot is gone: deleted while the run went on, or by somebody's own SQL.
DELETE FROM {journal} j WHERE NOT EXISTS (SELECT FROM {snapshots} s WHERE s.id = j.id)

-- name: sweep_locks
-- Leases that ran out that long ago, of processes that died.
DELETE FROM {leases} WHERE expires_at < statement_timestamp() - make_interval(secs => %(age)s)
