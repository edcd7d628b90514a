"""The database: snapshots, leases, statements. Knows nothing of workflows."""
