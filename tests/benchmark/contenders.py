"""Starts the contenders, each in a process and an environment that it can work in."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from attrs import define, field, frozen

HERE = Path(__file__).parent
TITLES = {
    "floor": "bare INSERT",
    "awaitly": "awaitly-postgres",
    "before": "an earlier version",
    "rewrite": "rewrite all",
    "dbos": "DBOS",
    "langgraph": "LangGraph",
    "langgraph_tasks": "LangGraph tasks",
}
_OURS = (
    *("floor", "awaitly", "rewrite", "awaitly_submit", "awaitly_submit_many"),
    *(f"{way}_{workers}" for way in ("map", "threads") for workers in (8, 16, 32)),
)
_PEERS = {
    ("dbos", "dbos_queue", "dbos_enqueue"): ("dbos",),
    ("langgraph", "langgraph_tasks", "langgraph_map"): (
        "langgraph",
        "langgraph-checkpoint-postgres",
        "psycopg-binary",
        "psycopg-pool",
    ),
}


@frozen
class Work:
    """What a contender is asked for."""

    steps: int
    size: int = 300  # bytes of a step's result
    runs: int | None = None
    seconds: float | None = None  # go on for so long, instead of a number of runs
    threads: int = 1

    def to_json(self) -> dict[str, Any]:
        asked = {"steps": self.steps, "size": self.size, "threads": self.threads}
        return asked | ({"runs": self.runs} if self.runs else {"seconds": self.seconds})


@define
class Contender:
    """A running process of `contender.py`."""

    name: str
    url: str
    python: Path
    root: Path = HERE.parents[1]  # where awaitly_postgres is
    _process: subprocess.Popen[str] = field(init=False)

    def __attrs_post_init__(self) -> None:
        self._process = subprocess.Popen(
            [self.python, HERE / "contender.py", self.name, self.url],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": str(self.root)},
            text=True,
        )

    def do(self, work: Work) -> dict[str, float]:
        self.start(work)
        return self.answer()

    def start(self, work: Work) -> None:
        assert self._process.stdin
        self._process.send_signal(signal.SIGCONT)
        print(json.dumps(work.to_json()), file=self._process.stdin, flush=True)

    def answer(self) -> dict[str, float]:
        assert self._process.stdout
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self.name} has died, see above")
        # The background threads of one must not disturb the next.
        self._process.send_signal(signal.SIGSTOP)
        return dict(json.loads(line))

    def stop(self) -> None:
        self._process.kill()
        self._process.communicate()


@define
class Contenders:
    """Which contenders there are here, and why the others are not."""

    url: str
    pythons: dict[str, Path]
    notes: list[str]
    before: Path | None = None  # a checkout of an earlier version

    def names(self, *names: str) -> list[str]:
        return [name for name in names if name in self.pythons]

    def are_ours(self, name: str) -> bool:
        return name in _OURS

    @contextmanager
    def running(self, names: Sequence[str], url: str | None = None) -> Iterator[list[Contender]]:
        """Start these, and warm them up."""
        with ExitStack() as stack:
            team = []
            for name in names:
                root = {"root": self.before} if name == "before" and self.before else {}
                team.append(Contender(name, url or self.url, self.pythons[name], **root))
                stack.callback(team[-1].stop)
            for contender in team:
                contender.do(Work(steps=12, runs=3))
            yield team


def prepare(url: str, folder: Path, without_peers: bool, before: str | None) -> Contenders:
    """Install the peers in an environment of their own, as far as that can be done."""
    pythons = dict.fromkeys(_OURS, Path(sys.executable))
    notes = []
    earlier = None
    if before:
        earlier, pythons["before"] = folder / "before", Path(sys.executable)
        _check_out(before, earlier)
        notes.append(f"Earlier version: commit {before}.")
    if without_peers:
        return Contenders(url, pythons, [*notes, "Peers left out, as asked for."], earlier)
    python = folder / "bin" / "python"
    for names, packages in _PEERS.items():
        try:
            if not python.exists():
                _output(sys.executable, "-m", "venv", str(folder))
            _output(str(python), "-m", "pip", "install", "-q", *packages)
            listed = json.loads(_output(str(python), "-m", "pip", "list", "--format=json"))
            versions = {package["name"]: package["version"] for package in listed}
            for name in names:
                with Contenders(url, {name: python}, []).running([name]):
                    pythons[name] = python
            found = [f"{package} {versions[package]}" for package in packages]
            notes.append(f"{TITLES[names[0]]}: {', '.join(found)}.")
        except (OSError, subprocess.CalledProcessError, RuntimeError) as error:
            reason = (getattr(error, "stderr", "") or str(error)).strip().splitlines()[-1]
            notes.append(f"{TITLES[names[0]]} is left out: {reason}")
    return Contenders(url, pythons, notes, earlier)


def _check_out(revision: str, folder: Path) -> None:
    archive = folder.with_suffix(".tar")
    given = (f"--output={archive}", revision, "awaitly_postgres")
    _output("git", "-C", str(HERE.parents[1]), "archive", *given)
    shutil.unpack_archive(archive, folder)


def _output(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout
