"""What the benchmark has written."""

from __future__ import annotations

import json
from pathlib import Path

from . import summary

HERE = Path(__file__).parent


def test_the_page_has_the_figures_of_the_last_run_and_no_others() -> None:
    """The tables are what `summary` makes of results.json."""
    results = json.loads((HERE / "results.json").read_text())
    page = (HERE / "README.md").read_text()
    assert summary.into(page, results) == page
    assert "results.svg" in page
