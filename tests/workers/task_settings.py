"""The shop's settings, with tasks kept as durable runs."""

from shop.settings import *  # noqa: F403

TASKS = {
    "default": {
        "BACKEND": "awaitly_postgres.contrib.django.tasks.Backend",
        "QUEUES": ["default", "mail"],
    }
}
