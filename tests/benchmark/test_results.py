"""What the benchmark has written."""

from __future__ import annotations

import json
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
