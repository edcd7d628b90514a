"""What the workers run, and the notes that it takes of all that it does.

The notes go to one file that all workers append to, a line each: the process, what, the id, the
key and the token. ``ran`` is a body that runs, ``got`` a step that was acknowledged to its
workflow. Each execution of a body makes a token of its own, so a step that was recorded twice, or
recorded otherwise than acknowledged, shows.
"""

# ruff: noqa: S311 - chance that can be repeated, not secrets
from __future__ import annotations

import itertools
import os
import random
import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psycopg

from awaitly_postgres import Event, Step
from tests.support import in_threads

POOL = 3  # connections of one worker at most
STUMBLING = 0.3  # how often a body fails that may


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
setup: Setup
hasty: Hasty | None
_counter = itertools.count()


def begin(given: Setup) -> None:
    """Have what runs in this process from now on fare as ``given``."""
    global notes, setup, hasty
    notes, setup = Notes(given.folder), given
    hasty = Hasty() if given.hasty else None


def is_calm() -> bool:
    return Path(setup.folder, "calm").exists()


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
        time.sleep(random.random() * setup.slow)
        return value_of(token, size)

    def effect(conn: psycopg.Connection, key: str, size: int = 0) -> dict[str, str]:
        value = act(key, size)
        conn.execute("INSERT INTO effects VALUES (%s, %s, %s)", (id, key, value["token"]))
        return value

    def refuse(key: str) -> None:
        raise Refused(act(key)["token"])

    def stumble(key: str) -> dict[str, str]:
        if random.random() < STUMBLING and not setup.poison:  # or it could be given up like poison
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
    if shape.random() < 0.3:
        kinds = {"left": plain, "middle": exactly_once, "right": plain}
        fan_out(lambda key: kinds[key](key, 500), list(kinds))
    if shape.random() < 0.5:
        count, size = shape.choice([4, 24]), shape.choice([10, 500, 3000])
        keys = [f"map[{nr}]" for nr in range(count)]
        for key, value in zip(keys, map_over(step, act, keys, size), strict=True):
            got(key, value)
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

    def __init__(self) -> None:
        self.threads = ThreadPoolExecutor(8)
        self._over: dict[str, threading.Event] = {}  # by run: set when it has ended

    def observe(self, event: Event) -> None:
        if event.type.startswith("run_") and event.type != "run_started":
            self._over.pop(str(event.workflow_id), threading.Event()).set()

    def start_threads(self, step: Step, id: str, act: Callable[..., Any]) -> Callable[[], None]:
        """Start them; the result is how the workflow leaves, which it calls last.

        One is inside a step until the run has ended, so what it records is refused for certain.
        """
        how = "wait" if is_calm() else random.choice(["raise", "return", "wait"])
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
            except BaseException as error:
                notes.add("refused", id, key, made[0]["token"] if made else "nothing")
                notes.add("refused_by", type(error).__name__)
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


def map_over(step: Step, act: Callable[..., Any], keys: list[str], size: int) -> list[Any]:
    """Have all of them done by a map, of which some fail at first."""

    def one(key: str) -> Any:
        if random.random() < STUMBLING / 10 and not setup.poison:
            raise ConnectionResetError("the other side")
        return act(key, size)

    return step.map("map", one, keys, workers=6)


def fan_out(work: Callable[[str], None], keys: list[str]) -> None:
    if setup.limited:  # an interrupt may leave an executor's locks locked
        in_threads(lambda nr: work(keys[nr]), len(keys))
    else:
        with ThreadPoolExecutor(len(keys)) as pool:
            list(pool.map(work, keys))
