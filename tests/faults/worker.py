"""A worker: runs and resumes workflows through the public names, and notes all that it does.

The notes go to one file that all workers append to, a line each: the process, what, the id, the
key and the token. ``ran`` is a body that runs, ``got`` a step that was acknowledged to its
workflow. Each execution of a body makes a token of its own, so a step that was recorded twice, or
recorded otherwise than acknowledged, shows.
"""

# ruff: noqa: S311 - chance that can be repeated, not secrets
from __future__ import annotations

import gc
import itertools
import json
import logging
import multiprocessing
import os
import random
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psycopg

from awaitly_postgres import (
    AlreadyRunning,
    Durable,
    Event,
    LeaseLost,
    SnapshotStore,
    Step,
    StoreUnavailable,
    WorkflowDrift,
    WorkflowError,
    postgres,
)
from tests.support import TimeLimit, in_threads

SHARED = 24  # ids that all workers run, and that somebody has submitted
LONG_PAUSE = 20.0  # seconds; a run that has been started often pauses for longer when it fails
POOL = 3  # connections of one worker at most
MAX_ATTEMPTS = 3  # where there is poison
GOOD = ("own-", "shared-")  # how the ids begin of what must come to an end
AMPLE = 8  # enough for nobody to wait for one, in locks that an interrupt may leave locked


@dataclass
class Setup:
    """What a worker is told: where, and how it is to fare."""

    url: str
    folder: str
    seed: int
    ttl: float
    retry_for: float = 30.0
    idle: float = 0.0  # seconds of sleep, at most, between two runs
    slow: float = 0.0  # seconds, at most, that a body takes
    dies: tuple[str, int] | None = None  # "before" or "after" which of its statements
    forks: bool = False
    pool: int = POOL
    limited: bool = False  # a signal handler raises in its runs
    poison: bool = False  # runs that end the process are among the others
    hasty: bool = False  # its workflows do not wait for their threads
    roll_call: bool = False  # at the end, the pool must have all of its connections


class Notes:
    """The file of all side effects. One write per line, so lines of many processes do not mix."""

    def __init__(self, folder: str) -> None:
        self._file = os.open(Path(folder, "log"), os.O_APPEND | os.O_CREAT | os.O_WRONLY, 0o644)

    def add(self, *words: object) -> None:
        os.write(self._file, (" ".join(map(str, (os.getpid(), *words))) + "\n").encode())


notes: Notes
slow = 0.0
limited = False
stumbling = 0.3  # how often a body fails that may
hasty: Hasty | None = None
_counter = itertools.count()


def new_token() -> str:
    return f"{os.getpid()}-{next(_counter)}-{random.getrandbits(32):x}"


def value_of(token: str, size: int) -> dict[str, str]:
    """Make what a step returns: all of it follows from the token, so all of it can be checked."""
    return {"token": token, "filler": (token * (size // len(token) + 1))[:size]}


class Refused(Exception):
    """What a step raises and its workflow handles."""


def order(step: Step, id: str, seed: int) -> dict[str, str]:
    """A workflow of every kind of step; how many, and how large, follows from the seed."""
    shape = random.Random(seed)
    tokens: dict[str, str] = {}

    def act(key: str, size: int = 0) -> dict[str, str]:
        token = new_token()
        notes.add("ran", id, key, token)
        time.sleep(random.random() * slow)
        return value_of(token, size)

    def effect(conn: psycopg.Connection, key: str, size: int = 0) -> dict[str, str]:
        value = act(key, size)
        conn.execute("INSERT INTO effects VALUES (%s, %s, %s)", (id, key, value["token"]))
        return value

    def refuse(key: str) -> None:
        raise Refused(act(key)["token"])

    def stumble(key: str) -> dict[str, str]:
        if random.random() < stumbling:
            raise ConnectionResetError("the other side")
        return act(key)

    def got(key: str, value: dict[str, str]) -> None:
        notes.add("got", id, key, value["token"])
        tokens[key] = value["token"]

    def plain(key: str, size: int = 0) -> None:
        got(key, step(key, act, key, size))

    def exactly_once(key: str, size: int = 0) -> None:
        got(key, step.transaction(key, effect, key, size))

    plain("reserve")
    exactly_once("pay")
    for nr in range(shape.choice([0, 1, 3, 12])):
        run = exactly_once if nr % 4 == 3 else plain
        run(f"item-{nr}", shape.choice([10, 500, 3000]))
    if shape.random() < 0.3:
        try:
            step("gift", refuse, "gift")
        except Refused as error:
            notes.add("got", id, "gift!", error)
    if shape.random() < 0.2:
        fan_out(plain, ["left", "middle", "right"])
    if shape.random() < 0.1:
        got("stumble", step("stumble", stumble, "stumble"))
    leave = None if hasty is None else hasty.start_threads(step, id, act)
    exactly_once("ship", 300)
    if leave is not None:
        leave()
    return tokens


def deadly(step: Step, how: str) -> None:
    """A workflow that takes its process along before its first step."""
    if how == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    os._exit(3)


class Left(Exception):
    """Raised by a workflow that leaves its threads at work."""


class Hasty:
    """Workflows give steps to a pool of threads that is the process's, and may end before them."""

    def __init__(self, setup: Setup) -> None:
        self.setup = setup
        self.threads = ThreadPoolExecutor(8)
        self._over: dict[str, threading.Event] = {}  # by run: set when it has ended

    def observe(self, event: Event) -> None:
        if event.type.startswith("run_") and event.type != "run_started":
            self._over.pop(str(event.workflow_id), threading.Event()).set()

    def start_threads(self, step: Step, id: str, act: Callable[..., Any]) -> Callable[[], None]:
        """Start them; the result is how the workflow leaves, which it calls last.

        One is inside a step until the run has ended, so what it records is refused for certain.
        """
        how = "wait" if is_calm(self.setup) else random.choice(["raise", "return", "wait"])
        over = self._over[id] = threading.Event()
        inside = threading.Event()

        def late(key: str, *, held: bool = False) -> None:
            made: list[dict[str, str]] = []

            def body() -> dict[str, str]:
                inside.set()
                made.append(act(key, random.choice([0, 500, 3000])))
                if held and not over.wait(60):
                    raise TimeoutError(f"the run of {id} has not ended")
                return made[0]

            try:
                token = step(key, body)["token"]
            except WorkflowError as error:
                if type(error) is not WorkflowError:
                    raise
                notes.add("refused", id, key, made[0]["token"] if made else "nothing")
            else:
                notes.add("got", id, key, token)
                if held and made:
                    notes.add("broke", f"{id}/{key} was acknowledged when its run had ended")
            finally:
                inside.set()

        def several(thread: int) -> None:
            for part in "abc":
                late(f"late-{thread}{part}")

        def leave() -> None:
            if how == "wait":
                for future in futures:
                    future.result()
                return
            inside.wait(60)
            notes.add("left", id, how)
            if how == "raise":
                raise Left

        futures = [self.threads.submit(late, "late-held", held=how != "wait")]
        futures += [self.threads.submit(several, thread) for thread in range(3)]
        return leave


def fan_out(work: Callable[[str], None], keys: list[str]) -> None:
    if limited:  # an interrupt may leave an executor's locks locked
        in_threads(lambda nr: work(keys[nr]), len(keys))
    else:
        with ThreadPoolExecutor(len(keys)) as pool:
            list(pool.map(work, keys))


def shared_id(nr: int) -> str:
    return f"shared-{nr}"


def connect(setup: Setup) -> SnapshotStore:
    # Names the process in what the server notes; a child that inherits the store has its own.
    os.environ["PGAPPNAME"] = f"faults-{os.getpid()}"
    least = setup.pool if setup.limited else 0  # while it grows, one waits
    return postgres(setup.url, min_size=least, max_size=setup.pool, retry_for=setup.retry_for)


def durable_on(store: SnapshotStore, setup: Setup) -> Durable:
    observe = None if hasty is None else hasty.observe
    most = MAX_ATTEMPTS if setup.poison else None
    durable = Durable(store, lock_ttl=setup.ttl, max_attempts=most, on_event=observe)
    durable.workflow(order)
    durable.workflow(deadly)
    return durable


def one_turn(durable: Durable, chance: random.Random) -> None:
    """Do one thing that a view or a cron job does. Only what an outage explains may be raised."""
    try:
        dice = chance.random()
        resumes = 0.7 if slow else 0.2  # a slow run leaves little time to look for others
        if dice < resumes:
            durable.resume_pending(limit=5)
        elif dice < resumes + 0.15:
            nr = chance.randrange(SHARED)
            durable.run(shared_id(nr), order, shared_id(nr), nr)
        else:
            seed = chance.getrandbits(32)
            id = f"own-{os.getpid()}-{seed:x}"
            durable.run(id, order, id, seed)
    except AlreadyRunning as error:
        if error.id.startswith(f"own-{os.getpid()}-"):
            raise  # a new id of our own: whoever has it is we ourselves
    except (LeaseLost, StoreUnavailable) as error:
        notes.add("met", type(error).__name__)
    except (
        Left,
        WorkflowDrift,
    ) as error:  # drift: it ended before it came to what threads had done
        if hasty is None:
            raise
        notes.add("met", type(error).__name__)
    except (ConnectionResetError, psycopg.OperationalError) as error:
        notes.add("met", type(error).__name__)  # raised by a body, recorded, and tried again


def is_calm(setup: Setup) -> bool:
    return Path(setup.folder, "calm").exists()


def work(setup: Setup) -> None:
    """Run and resume until it is calm; then only resume, until nothing is left to do."""
    chance = random.Random(setup.seed)
    with connect(setup) as store:
        durable = durable_on(store, setup)
        if setup.limited:
            limited_turns(durable, setup, chance)
        while not is_calm(setup):
            one_turn(durable, chance)
            time.sleep(chance.random() * setup.idle)
        finish(durable)
        if hasty is not None:
            hasty.threads.shutdown()
        if setup.roll_call:
            roll_call(store, setup.pool)
    left_over()


def roll_call(store: SnapshotStore, size: int) -> None:
    """Have as many transactions meet as there are connections; a lost one leaves them waiting."""
    gc.collect()  # a traceback may keep a connection
    durable = Durable(store, on_complete="delete")
    all_here = threading.Barrier(size)

    def meet(step: Step) -> None:
        step.transaction("meet", lambda conn: all_here.wait(30))

    with ThreadPoolExecutor(size) as pool:
        list(pool.map(lambda nr: durable.run(f"meet-{os.getpid()}-{nr}", meet), range(size)))


def finish(durable: Durable) -> None:
    """Resume until nothing is unfinished, or all that is pauses for long after a failure."""
    enough = time.monotonic() + LONG_PAUSE
    while True:
        try:
            durable.resume_pending(limit=5)
            running, failed = (
                [info for good in GOOD for info in durable.store.list(good, status=status, limit=1)]
                for status in ("running", "failed")
            )
            if not running and not (failed and time.monotonic() < enough):
                return
        except StoreUnavailable:
            notes.add("met", "StoreUnavailable")
        time.sleep(0.05)


def left_over() -> None:
    """Note the threads that are still there a while after the store was closed."""
    deadline = time.monotonic() + 10
    while threading.active_count() > 1 and time.monotonic() < deadline:
        time.sleep(0.05)
    for thread in threading.enumerate():
        if thread is not threading.main_thread():
            notes.add("thread", thread.name.replace(" ", "_"))


# -- ways to fare --------------------------------------------------------------------------


def die_at(moment: str, number: int) -> None:
    """Kill this process before or after the n-th statement that it sends, whichever thread does."""
    sent = itertools.count(1)
    wait = psycopg.Connection.wait

    def counted(self: Any, *args: Any, **kwargs: Any) -> Any:
        here = next(sent) == number
        if here and moment == "before":
            os.kill(os.getpid(), signal.SIGKILL)
        result = wait(self, *args, **kwargs)
        if here and moment == "after":
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    psycopg.Connection.wait = counted


def limited_turns(durable: Durable, setup: Setup, chance: random.Random) -> None:
    """Take turns that a signal handler may end at any moment; no lease may be left by one."""
    # What is raised inside a finalizer, Python swallows, and says so.
    sys.unraisablehook = lambda unraisable: None
    roll_call(durable.store, setup.pool)  # has all connections opened
    ours = "SELECT workflow_id FROM awaitly_workflow_lock WHERE owner_token LIKE %s"
    with psycopg.connect(setup.url, autocommit=True) as db, soft_limits(chance):
        while not is_calm(setup):
            try:
                if chance.random() < 0.2:
                    signal.setitimer(signal.ITIMER_REAL, chance.uniform(0.0002, 0.05))
                one_turn(durable, chance)
                signal.setitimer(signal.ITIMER_REAL, 0)
            except (TimeLimit, KeyboardInterrupt):
                pass
            for (id,) in db.execute(ours, (f"%:{os.getpid()}:%",)).fetchall():
                notes.add("lease", id)


@contextmanager
def soft_limits(chance: random.Random) -> Iterator[None]:
    """Have SIGALRM raise in the main thread, and have it come when a COMMIT is about to be sent."""
    leave = psycopg.Transaction.__exit__
    committing = False

    def leave_interrupted(self: Any, *error: Any) -> Any:
        nonlocal committing
        committing = error[0] is None
        try:
            if committing and chance.random() < 0.15:
                signal.setitimer(signal.ITIMER_REAL, chance.uniform(0.00001, 0.004))
            return leave(self, *error)
        finally:
            committing = False

    def interrupt(number: int, frame: object) -> None:
        notes.add("interrupted", "commit" if committing else "elsewhere")
        raise chance.choice((TimeLimit, KeyboardInterrupt))

    before = signal.signal(signal.SIGALRM, interrupt)
    psycopg.Transaction.__exit__ = leave_interrupted
    try:
        yield
    finally:
        psycopg.Transaction.__exit__ = leave
        signal.signal(signal.SIGALRM, before)


def fork_under_load(setup: Setup) -> None:
    """Keep a thread inside the store, and fork beside it: what a prefork server never should do."""
    chance = random.Random(setup.seed)
    inside = threading.Event()

    def load(durable: Durable) -> None:
        mine = random.Random(setup.seed + 1)
        while not is_calm(setup):
            one_turn(durable, mine)
            inside.set()

    with connect(setup) as store:
        durable = durable_on(store, setup)
        thread = threading.Thread(target=load, args=(durable,))
        thread.start()
        inside.wait(60)
        for nr in itertools.count():
            if is_calm(setup):
                break
            seed = chance.getrandbits(32)
            _fork(("fork", "multiprocessing", "fork", "spawn")[nr % 4], durable, setup, seed)
        thread.join()
        finish(durable)
    left_over()


def _fork(kind: str, durable: Durable, setup: Setup, seed: int) -> None:
    if kind == "fork":
        child = _Forked(lambda: in_child(durable, seed))
    else:
        context = multiprocessing.get_context("spawn" if kind == "spawn" else "fork")
        target, args = (spawned, (setup, seed)) if kind == "spawn" else (in_child, (durable, seed))
        child = context.Process(target=target, args=args)
        child.start()
    child.join(60)
    notes.add("forked", kind, child.exitcode)
    if child.exitcode is None:
        child.kill()
        child.join()


class _Forked:
    """A bare ``os.fork`` with the face of a ``multiprocessing.Process``."""

    exitcode: int | None = None

    def __init__(self, target: Callable[[], None]) -> None:
        self._pid = os.fork()
        if self._pid == 0:
            code = 1
            try:
                target()
                code = 0
            except BaseException:
                traceback.print_exc()
            os._exit(code)

    def join(self, timeout: float | None = None) -> None:
        deadline = time.monotonic() + (timeout or 60)
        while self.exitcode is None and time.monotonic() < deadline:
            pid, status = os.waitpid(self._pid, os.WNOHANG)
            if pid:
                self.exitcode = os.waitstatus_to_exitcode(status)
            else:
                time.sleep(0.005)

    def kill(self) -> None:
        os.kill(self._pid, signal.SIGKILL)


def in_child(durable: Durable, seed: int) -> None:
    """Use the store that was open at the fork. Its pool is not ours; we get one."""
    os.environ["PGAPPNAME"] = f"faults-{os.getpid()}"
    chance = random.Random(seed)
    for _ in range(3):
        one_turn(durable, chance)
    durable.store.close()


def spawned(setup: Setup, seed: int) -> None:
    global notes
    notes = Notes(setup.folder)
    store = connect(setup)
    in_child(durable_on(store, setup), seed)


def main(setup: Setup) -> None:
    """Be a worker; what it must not meet is noted as ``broke``."""
    global notes, slow, limited, stumbling, hasty
    notes, slow, limited = Notes(setup.folder), setup.slow, setup.limited
    stumbling = 0 if setup.poison else stumbling  # it could be given up like poison
    hasty = Hasty(setup) if setup.hasty else None
    logging.getLogger("psycopg").setLevel(logging.CRITICAL)  # it tells of each fault
    random.seed(f"{setup.seed}-{os.getpid()}")
    try:
        if setup.dies:
            die_at(*setup.dies)
        (fork_under_load if setup.forks else work)(setup)
    except BaseException as error:
        notes.add("broke", repr(error).replace("\n", " "))
        traceback.print_exc()


def encode(setup: Setup) -> str:
    return json.dumps(asdict(setup))


if __name__ == "__main__":  # with libfaketime, which spoils time.sleep: it is of another clock
    time.sleep = lambda seconds: threading.Event().wait(seconds)  # type: ignore[assignment]
    main(Setup(**json.loads(sys.argv[1])))
