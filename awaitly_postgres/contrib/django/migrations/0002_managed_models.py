"""The models become managed, so that tests empty the tables. No table is changed."""

from django.db import migrations, models


class Migration(migrations.Migration):
    """Tell Django about the tables that the first migration has made."""

    dependencies = [("awaitly", "0001_initial")]  # noqa: RUF012
    operations = [  # noqa: RUF012
        migrations.AlterModelOptions(
            name="workflow",
            options={
                "ordering": ("-updated_at", "-id"),
                "required_db_vendor": "postgresql",
                "default_permissions": ("view",),
                "permissions": (
                    ("retry_workflow", "Can retry workflow now"),
                    ("cancel_workflow", "Can cancel workflow"),
                    ("rewind_workflow", "Can rewind workflow"),
                    ("answer_workflow", "Can answer wait of workflow"),
                ),
            },
        ),
        migrations.SeparateDatabaseAndState(
            state_operations=[
                migrations.CreateModel(
                    name="Lease",
                    fields=[
                        ("workflow_id", models.TextField(primary_key=True, serialize=False)),
                        ("owner_token", models.TextField()),
                        ("expires_at", models.DateTimeField()),
                    ],
                    options={
                        "db_table": "awaitly_workflow_lock",
                        "required_db_vendor": "postgresql",
                        "default_permissions": (),
                    },
                ),
            ],
        ),
    ]
