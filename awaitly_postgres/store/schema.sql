-- The tables, and the statements that create them safely.
--
-- queries.sql explains the format of both files. Only here: a block "-- ddl: x" keeps its lines,
-- since ddl() shows them to users for a migration of their own, and each statement in it ends with
-- a semicolon at the end of a line. This file is read first, so queries.sql can use its fragments.

-- fragment: status
-- The stored status: 'running', 'completed' or 'failed'; NULL in a row that was edited by hand.
(snapshot->'execution'->>'status')

-- fragment: unfinished
-- Means: status IS DISTINCT FROM 'completed'. But the planner has no statistics about a path inside
-- a document. It guesses that IS DISTINCT FROM is true for 99.5 % of the rows, and scans the table;
-- for IS NULL it guesses 0.5 %, and takes the index. A query uses the partial index below only if
-- it repeats the condition literally, so both use this fragment.
NULLIF({status} = 'completed', false) IS NULL

-- ddl: schema -- if schema
-- Only if postgres() was given one; otherwise the search path says where the tables are.
CREATE SCHEMA IF NOT EXISTS {schema};

-- ddl: snapshots
-- One document per id: a saved workflow, or a durable run with its input and outcome. Shared with
-- the Node package, which makes the same table and the first index. The second index is how pending
-- runs are found, oldest first, whatever the number of completed ones.
CREATE TABLE IF NOT EXISTS {snapshots} (
  id TEXT COLLATE "C" PRIMARY KEY,
  snapshot JSONB NOT NULL,
  updated_at TIMESTAMPTZ DEFAULT NOW()
);
CREATE INDEX IF NOT EXISTS {updated_at_idx} ON {snapshots} (updated_at DESC);
CREATE INDEX IF NOT EXISTS {pending_idx} ON {snapshots} (updated_at, id COLLATE "C")
  WHERE {unfinished};

-- ddl: journal -- if journal
-- Steps of a run that are not in its snapshot yet. Once a snapshot is large, rewriting it at every
-- step would be quadratic, so steps are appended here and folded into it now and then.
CREATE TABLE IF NOT EXISTS {journal} (
  id TEXT COLLATE "C" NOT NULL,
  key TEXT COLLATE "C" NOT NULL,
  step JSONB NOT NULL,
  PRIMARY KEY (id, key)
);

-- ddl: leases
-- One row for each id that a process is working on. It is deleted when the lease is released, so
-- the table stays small. Shared with Node.
CREATE TABLE IF NOT EXISTS {leases} (
  workflow_id TEXT COLLATE "C" PRIMARY KEY,
  owner_token TEXT NOT NULL,
  expires_at TIMESTAMPTZ NOT NULL
);

-- name: tables_exist
-- Which of the tables exist, in the given order. The last column is true if this transaction has
-- changed nothing so far: otherwise it may itself have created them, and may yet be rolled back.
SELECT
    name,
    to_regclass(name) IS NOT NULL,
    txid_current_if_assigned() IS NULL
FROM unnest(%(tables)s::text[]) WITH ORDINALITY AS t (name, nr)
ORDER BY nr

-- name: citus
-- A row if this database has the extension.
SELECT 1 FROM pg_extension WHERE extname = 'citus'

-- name: citus_worker
-- Sent if it has. A row on every node except the coordinator, whose group is 0.
SELECT 1 FROM pg_dist_local_group WHERE groupid <> 0

-- name: schema_exists
-- Checked before CREATE SCHEMA IF NOT EXISTS, which needs a privilege even if the schema exists.
SELECT 1 FROM pg_namespace WHERE nspname = {schema_name}

-- name: serialize_ddl
-- Two sessions that run CREATE ... IF NOT EXISTS at once can both find nothing, and one then fails
-- with a unique violation in the system catalogs. So they take turns, until they commit.
SELECT pg_advisory_xact_lock(hashtext(%(name)s::text))
