"""The store's tables, under their default names. Existing tables are left as they are."""

from django.db import migrations, models

from awaitly_postgres import postgres


class RunOnPostgres(migrations.RunSQL):
    """Does nothing on databases other than PostgreSQL, which a project may also have."""

    def database_forwards(self, app_label, schema_editor, from_state, to_state):  # type: ignore[no-untyped-def]
        """Run the SQL, or print it for ``sqlmigrate``."""
        if schema_editor.connection.vendor == "postgresql":
            super().database_forwards(app_label, schema_editor, from_state, to_state)

    def database_backwards(self, app_label, schema_editor, from_state, to_state):  # type: ignore[no-untyped-def]
        """Run the reverse SQL."""
        if schema_editor.connection.vendor == "postgresql":
            super().database_backwards(app_label, schema_editor, from_state, to_state)


class Migration(migrations.Migration):
    """Create the tables, and the model that reads them."""

    initial = True
    operations = [  # noqa: RUF012
        RunOnPostgres(
            postgres("").ddl(),
            "DROP TABLE IF EXISTS awaitly_snapshots, awaitly_snapshots_steps, "
            "awaitly_workflow_lock",
        ),
        migrations.CreateModel(
            name="Workflow",
            fields=[
                ("id", models.TextField(primary_key=True, serialize=False, verbose_name="id")),
                ("snapshot", models.JSONField()),
                ("updated_at", models.DateTimeField(null=True)),
            ],
            options={
                "db_table": "awaitly_snapshots",
                "ordering": ("-updated_at", "-id"),
                "managed": False,
                "default_permissions": ("view",),
            },
        ),
    ]
