"""The model of a stored run, for the admin."""

from __future__ import annotations

from django.db import models


class Workflow(models.Model):
    """One row of the snapshot table. Written by the store, never by Django."""

    id = models.TextField("id", primary_key=True)
    snapshot = models.JSONField()
    updated_at = models.DateTimeField(null=True)

    class Meta:
        """Not managed: the table belongs to the store."""

        managed = False
        db_table = "awaitly_snapshots"
        ordering = ("-updated_at", "-id")
        default_permissions = ("view",)

    def __str__(self) -> str:
        return str(self.id)
