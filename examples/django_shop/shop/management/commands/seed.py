"""``manage.py seed``: data to try the shop with."""

from typing import Any

from django.contrib.auth import get_user_model
from django.core.management.base import BaseCommand

from shop.models import Product


class Command(BaseCommand):
    """Creates three products and an admin user, unless they exist."""

    help = "Create three products, and an admin user called admin with the password admin."

    def handle(self, *args: Any, **options: Any) -> None:
        """Create what is missing."""
        for name, cents in (("Tea", 450), ("Teapot", 3900), ("Tea cosy", 1850)):
            Product.objects.get_or_create(name=name, defaults={"cents": cents, "stock": 10})
        users = get_user_model().objects
        if not users.filter(username="admin").exists():
            users.create_superuser("admin", password="admin")  # noqa: S106 - to try it out
