"""What the benchmark has written, and that it still runs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from . import summary

HERE = Path(__file__).parent
ROOT = HERE.parents[1]


def test_readme_has_the_figures_of_the_last_run_and_no_others() -> None:
    """The section on cost is what `summary` makes of results.json."""
    results = json.loads((HERE / "results.json").read_text())
    readme = (ROOT / "README.md").read_text()
    assert summary.into(readme, results) == readme
    assert "results.svg" in readme


def test_benchmark_runs() -> None:
    """A quick run on a server of its own comes to its end, with its tables."""
    command = "-m tests.benchmark --quick --rounds 1 --without-peers --only steps contention"
    done = subprocess.run(
        [sys.executable, *command.split()], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "A step with a result of 300 bytes" in done.stdout
    assert "acquisitions wasted" in done.stdout
