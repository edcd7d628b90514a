"""What the benchmark has written."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from . import summary

HERE = Path(__file__).parent


@pytest.mark.parametrize(
    ("page", "summarize"),
    [
        (HERE / "README.md", summary.markdown),
        (HERE.parents[1] / "README.md", summary.headline),
    ],
)
def test_the_pages_have_the_figures_of_the_last_run_and_no_others(
    page: Path, summarize: Callable[[dict[str, Any]], str]
) -> None:
    """The tables here and the summary in the README are what `summary` makes of results.json."""
    results = json.loads((HERE / "results.json").read_text())
    text = page.read_text()
    assert summary.into(text, summarize(results)) == text
    assert "results.svg" in text
