"""The faults: how each is made, and how often."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import psycopg
from psycopg.conninfo import make_conninfo

from . import proxy, worker
from .cluster import Cluster, free_port
from .field import WORKERS, Fault, Field, NotHere
from .poison import expect_poison, outlive_poison, poison

OURS = "application_name LIKE 'faults-%' AND application_name <> 'faults-main'"

# -- processes -----------------------------------------------------------------------------


def kill(field: Field) -> int:
    field.kill(field.any_worker())
    field.start_worker()
    return 1


def start_mortals(field: Field) -> None:
    for _ in range(WORKERS - 1):  # and one that lives, or nothing would get far
        _start_mortal(field)


def _start_mortal(field: Field) -> None:
    # Each statement boundary in turn: before the first, after the first, before the second ...
    number, after = divmod(field.started, 2)
    field.start_worker(dies=("after" if after else "before", number % 120 + 1))


def boundary(field: Field) -> int:
    ended = field.reap()
    for _ in ended:
        _start_mortal(field)
    return len(ended)


def replace_mortals(field: Field) -> None:
    for pid in [pid for pid, setup in field.workers.items() if setup.dies]:
        field.kill(pid)
        field.start_worker()


def slow_down(field: Field) -> None:
    """Have runs last for longer than a lease, so that a zombie wakes while another is at it."""
    field.setup = replace(field.setup, slow=0.3)


def zombie(field: Field) -> int:
    """Stop some past the end of their leases, and let them go on."""
    pids = {field.any_worker() for _ in range(3)}
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    time.sleep(field.fault.ttl * field.chance.uniform(1.5, 3.0))
    for pid in pids:
        os.kill(pid, signal.SIGCONT)
    return len(pids)


def start_forking(field: Field) -> None:
    for _ in range(WORKERS):
        field.start_worker(forks=True)


def noted(what: str) -> Callable[[Field], int]:
    """The workers do it by themselves; count."""

    def inject(field: Field) -> int:
        time.sleep(0.1)
        return field.fresh((field.folder / "log").read_bytes().count(f" {what} ".encode()))

    return inject


def limit_times(field: Field) -> None:
    """Interrupt the workers; a COMMIT takes a while, so that many strike when it is under way."""
    with field.admin() as conn:
        conn.execute(
            "CREATE FUNCTION linger() RETURNS trigger LANGUAGE plpgsql AS "
            "$$BEGIN PERFORM pg_sleep(random() * 0.003); RETURN NULL; END$$"
        )
        conn.execute(
            "CREATE CONSTRAINT TRIGGER linger AFTER INSERT ON effects "
            "DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION linger()"
        )
    field.setup = replace(field.setup, limited=True, pool=worker.AMPLE, roll_call=True)


def leave_threads(field: Field) -> None:
    field.setup = replace(field.setup, hasty=True, roll_call=True)


def start_with_other_clocks(field: Field) -> None:
    for nr in range(WORKERS):
        field.start_worker_at(("+3600", "-3600", "+0")[nr % 3])


def clock(field: Field) -> int:
    """Kill one and start another with another time of day."""
    field.kill(field.any_worker())
    field.start_worker_at(field.chance.choice(("+3600", "-3600", "+0")))
    return 1


# -- the server ----------------------------------------------------------------------------


def terminate(field: Field) -> int:
    with field.admin() as conn:
        backends = conn.execute(f"SELECT pid FROM pg_stat_activity WHERE {OURS}").fetchall()
        for (pid,) in field.chance.sample(backends, min(3, len(backends))):
            conn.execute("SELECT pg_terminate_backend(%s)", (pid,))
        return min(3, len(backends))


def restart(mode: str) -> Callable[[Field], int]:
    def inject(field: Field) -> int:
        field.cluster.restart(mode)
        time.sleep(field.chance.uniform(0.1, 0.8))  # for the workers to come back, or not yet
        return 1

    return inject


def few_connections(field: Field) -> None:
    field.cluster.configure(max_connections="20")
    field.cluster.restart("fast")


def hog_connections(field: Field) -> int:
    """Take all connections there are, throw the workers out, and hold them for a while."""
    hogs = []
    try:
        with field.admin() as conn:
            for _ in range(3):
                conn.execute(f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE {OURS}")
                while True:
                    hogs.append(psycopg.connect(field.url, autocommit=True))
    except psycopg.OperationalError:
        time.sleep(field.chance.uniform(0.2, 1.5))
    finally:
        for hog in hogs:
            hog.close()
    return 1


def move_to_small_disk(field: Field) -> None:
    """Put our tables on a disk of a few megabytes, if disks may be mounted here."""
    field.mount = Path(tempfile.mkdtemp(prefix="awaitly-disk-"))
    size = ["-o", "size=64m,mode=777"]
    done = subprocess.run(["mount", "-t", "tmpfs", *size, "tmpfs", field.mount], check=False)
    if done.returncode:
        raise NotHere("a tmpfs cannot be mounted here (needs root)")
    place = field.mount / "tablespace"
    place.mkdir()
    if field.cluster.user:
        shutil.chown(place, field.cluster.user)
    with field.admin() as conn:
        conn.execute(f"CREATE TABLESPACE small LOCATION '{place}'")
        for table in ("awaitly_snapshots", "awaitly_snapshots_steps", "awaitly_workflow_lock"):
            conn.execute(f"ALTER TABLE {table} SET TABLESPACE small")


def fill_disk(field: Field) -> int:
    with (field.mount / "ballast").open("ab", buffering=0) as ballast:
        try:
            while True:
                ballast.write(bytes(1 << 14))
        except OSError:
            time.sleep(field.chance.uniform(0.5, 1.5))
    (field.mount / "ballast").unlink()
    return 1


def leave_small_disk(field: Field) -> None:
    with field.admin() as conn:
        refused = (field.cluster.folder / "log").read_text().count("No space left on device")
        if not refused:
            raise AssertionError("the disk was never full")
        for table in ("awaitly_snapshots", "awaitly_snapshots_steps", "awaitly_workflow_lock"):
            conn.execute(f"ALTER TABLE {table} SET TABLESPACE pg_default")
        conn.execute("DROP TABLESPACE small")


def short_sessions(field: Field) -> None:
    with field.admin() as conn:
        if conn.info.server_version < 140_000:
            raise NotHere("idle_session_timeout needs PostgreSQL 14")
    field.cluster.configure(idle_session_timeout="40ms")
    field.setup = replace(field.setup, idle=0.15)


def idle(field: Field) -> int:
    time.sleep(0.2)
    # This session may be slow itself.
    with psycopg.connect(field.url, options="-c idle_session_timeout=0") as conn:
        query = "SELECT sessions_fatal FROM pg_stat_database WHERE datname = current_database()"
        return field.fresh(conn.execute(query).fetchone()[0])


def long_sessions(field: Field) -> None:
    field.cluster.configure(idle_session_timeout="0")


# -- the network and the standby -----------------------------------------------------------


def bad_network(*kinds: str) -> Callable[[Field], None]:
    def before(field: Field) -> None:
        with field.admin() as conn:
            target = conn.info.port
        port = free_port()
        between = multiprocessing.get_context("fork").Process(
            target=proxy.run, args=(port, target, kinds, field.seed, str(field.folder))
        )
        between.start()
        field.helpers.append(between)
        field.setup = replace(
            field.setup, url=make_conninfo(field.setup.url, host="127.0.0.1", port=port)
        )

    return before


def spoil(field: Field) -> int:
    """The proxy does it by itself; count."""
    time.sleep(0.05)
    return field.fresh(proxy.spoilt(field.folder))


def add_standby(field: Field) -> None:
    field.standby = Cluster()
    field.standby.bin, field.standby.user = field.cluster.bin, field.cluster.user
    field.cluster.configure(synchronous_standby_names="*")
    field.standby.copy_from(field.cluster)
    field.standby.start()
    ports = f"{field.cluster.port},{field.standby.port}"
    both = {"host": "127.0.0.1,127.0.0.1", "port": ports, "target_session_attrs": "read-write"}
    field.url = make_conninfo(field.url, **both)
    field.setup = replace(field.setup, url=make_conninfo(field.setup.url, **both))


def fail_over(field: Field) -> int:
    """Kill the primary, promote the standby, and make a new standby where the primary was."""
    primary, standby = field.cluster, field.standby
    primary.stop("immediate")
    standby.promote()
    primary.copy_from(standby)
    primary.start()
    field.cluster, field.standby = standby, primary
    time.sleep(field.chance.uniform(0.3, 1.0))
    return 1


def remove_standby(field: Field) -> None:
    field.cluster.configure(synchronous_standby_names="")


def stop_backends(field: Field) -> None:
    bad_network("stop")(field)
    field.setup = replace(field.setup, roll_call=True)


def has_come_late(field: Field) -> None:
    if not proxy.spoilt(field.folder, "late"):
        raise AssertionError("no run has gone on beside its stopped backend")


# -- all together --------------------------------------------------------------------------


def mixed(field: Field) -> int:
    ways = [kill] * 12 + [terminate] * 4 + [zombie] * 2
    if field.cluster is not None:
        ways += [restart("immediate"), restart("fast")]
    return field.chance.choice(ways)(field)


FAULTS = {
    "kill": Fault(kill, 20, 1000),
    "boundary": Fault(boundary, 40, 1000, before=start_mortals, after=replace_mortals, pause=0.02),
    "zombie": Fault(zombie, 8, 120, before=slow_down, ttl=1.0),
    "fork": Fault(noted("forked"), 12, 600, before=start_forking),
    "interrupt": Fault(noted("interrupted"), 40, 1000, before=limit_times),
    "threads": Fault(noted("left"), 60, 1000, before=leave_threads),
    "poison": Fault(poison, 9, 600, before=expect_poison, after=outlive_poison),
    "clock": Fault(clock, 6, 120, before=start_with_other_clocks),
    "terminate": Fault(terminate, 40, 1500),
    "immediate restart": Fault(restart("immediate"), 3, 60, own_server=True),
    "fast restart": Fault(restart("fast"), 3, 60, own_server=True),
    "connections": Fault(hog_connections, 2, 40, True, before=few_connections),
    "full disk": Fault(fill_disk, 2, 40, True, before=move_to_small_disk, after=leave_small_disk),
    "idle session": Fault(idle, 30, 1000, True, before=short_sessions, after=long_sessions),
    **{f"network {kind}": Fault(spoil, 15, 500, before=bad_network(kind)) for kind in proxy.KINDS},
    "slow backend": Fault(spoil, 60, 1000, True, before=stop_backends, after=has_come_late),
    "failover": Fault(fail_over, 1, 20, True, before=add_standby, after=remove_standby),
    "mixed": Fault(mixed, 12, 1000, before=bad_network(*proxy.KINDS)),
}
