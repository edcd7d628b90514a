"""The app ``awaitly``."""

from django.apps import AppConfig


class AwaitlyConfig(AppConfig):
    """Provides the migration, the management command and the admin pages."""

    name = "awaitly_postgres.contrib.django"
    label = "awaitly"
    verbose_name = "Durable workflows"
