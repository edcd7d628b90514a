"""Settings of the shop. The database is $DATABASE_URL, a URL or a libpq conninfo."""

import os
from pathlib import Path

from psycopg.conninfo import conninfo_to_dict

BASE_DIR = Path(__file__).parents[1]
SECRET_KEY = os.environ.get("SECRET_KEY", "only-for-trying-out-the-example")
DEBUG = "SECRET_KEY" not in os.environ
ALLOWED_HOSTS = ["localhost", "127.0.0.1", "testserver"]

INSTALLED_APPS = [
    "django.contrib.admin",
    "django.contrib.auth",
    "django.contrib.contenttypes",
    "django.contrib.messages",
    "django.contrib.sessions",
    "django.contrib.staticfiles",
    "awaitly_postgres.contrib.django",  # its tables, its command and its admin pages
    "shop",
]
AWAITLY_DURABLE = "shop.workflows.durable"  # the Durable of resume_workflows

_options = conninfo_to_dict(os.environ.get("DATABASE_URL", "postgresql://localhost/shop"))
_settings = {"NAME": "dbname", "USER": "user", "PASSWORD": "password", "HOST": "host"}
DATABASES = {
    "default": {
        "ENGINE": "django.db.backends.postgresql",
        **{name: _options.pop(key, "") for name, key in _settings.items()},
        "PORT": str(_options.pop("port", "")),
        "OPTIONS": _options,
    }
}

MIDDLEWARE = [
    "django.middleware.security.SecurityMiddleware",
    "django.contrib.sessions.middleware.SessionMiddleware",
    "django.middleware.common.CommonMiddleware",
    "django.middleware.csrf.CsrfViewMiddleware",
    "django.contrib.auth.middleware.AuthenticationMiddleware",
    "django.contrib.messages.middleware.MessageMiddleware",
]
ROOT_URLCONF = "shop.urls"
TEMPLATES = [
    {
        "BACKEND": "django.template.backends.django.DjangoTemplates",
        "APP_DIRS": True,
        "OPTIONS": {
            "context_processors": [
                "django.template.context_processors.request",
                "django.contrib.auth.context_processors.auth",
                "django.contrib.messages.context_processors.messages",
            ]
        },
    }
]
STATIC_URL = "static/"
USE_TZ = True
DEFAULT_AUTO_FIELD = "django.db.models.BigAutoField"
