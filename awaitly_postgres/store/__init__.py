"""The database: snapshots, leases and statements. Knows nothing of workflows.

In reading order: store.py (the public `SnapshotStore`), rows.py (rows as values) and text.py (rows
as text for people), database.py (run, retry, translate) and driver_errors.py, pool.py and loan.py
(where connections come from), connection.py (one session), transaction.py (of a step), lease.py and
renewal.py, statements.py (loads schema.sql and queries.sql), postgres.py (creates a store).
"""
