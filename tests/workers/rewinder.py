"""Completed runs of which each is rewound by a process that is killed at another statement."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any


def letters(step: Any) -> str:
    for key in "abcd":
        step(key, str.ljust, key, 3_000)
    return "done"


def crash_everywhere(url: str) -> list[str]:
    """Run this as a script of its own, which forks; return the ids of the runs."""
    done = subprocess.run(
        [sys.executable, Path(__file__), url], capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def crash(url: str) -> None:
    from orders import Mortal, connect, in_child  # beside this script

    for moment in ("before", "after"):
        nr, died = 0, True
        while died:
            nr += 1

            def live(id: str = f"{moment}-{nr}", moment: str = moment, nr: int = nr) -> None:
                durable, pool = connect(url)
                durable.workflow(letters)
                durable.run(id, letters)
                Mortal.last = moment, nr
                durable.rewind(id, "b")
                Mortal.last = None
                pool.close()

            died = in_child(live) != 0
            print(f"{moment}-{nr}")


if __name__ == "__main__":
    crash(sys.argv[1])
