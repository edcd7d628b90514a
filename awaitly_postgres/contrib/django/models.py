"""Models of the store's tables, for the admin and for ``flush``.

They are managed, so that a `TransactionTestCase` empties the tables, but the migrations create the
tables with the store's own SQL. Only the store writes to them. The journal has no model, which
would need a primary key of two columns: without their snapshot its rows are never read, and the
next run with the same id deletes them.
"""

from __future__ import annotations

from django.db import models


class Workflow(models.Model):
    """One stored run: a row of the snapshot table."""

    id = models.TextField("id", primary_key=True)
    snapshot = models.JSONField()
    updated_at = models.DateTimeField(null=True)

    class Meta:
        """The permissions are those of the admin."""

        db_table = "awaitly_snapshots"
        ordering = ("-updated_at", "-id")
        required_db_vendor = "postgresql"
        default_permissions = ("view",)
        permissions = (
            ("retry_workflow", "Can retry workflow now"),
            ("cancel_workflow", "Can cancel workflow"),
            ("rewind_workflow", "Can rewind workflow"),
            ("answer_workflow", "Can answer wait of workflow"),
        )

    def __str__(self) -> str:
        return str(self.id)


class Lease(models.Model):
    """The lease on a run that a process is working on."""

    workflow_id = models.TextField(primary_key=True)
    owner_token = models.TextField()
    expires_at = models.DateTimeField()

    class Meta:
        """Nobody needs permissions for it."""

        db_table = "awaitly_workflow_lock"
        required_db_vendor = "postgresql"
        default_permissions = ()

    def __str__(self) -> str:
        return str(self.workflow_id)
