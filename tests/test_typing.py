"""What a user's type checker makes of the library: run over the samples in ``typing/``."""

from __future__ import annotations

import re
from pathlib import Path

import mypy.api
import pytest

SAMPLES = Path(__file__).parent / "typing"


@pytest.fixture(scope="module")
def verdict(tmp_path_factory: pytest.TempPathFactory) -> dict[str, set[tuple[int, str]]]:
    """The errors of ``mypy --strict`` by file, as (line, code). One run: it takes seconds."""
    cache = tmp_path_factory.mktemp("mypy")
    arguments = ["--strict", "--config-file=", f"--cache-dir={cache}", "--hide-error-context"]
    with pytest.MonkeyPatch.context() as elsewhere:
        elsewhere.chdir(cache)  # so that the package is found as installed, by its py.typed
        output, trouble, _ = mypy.api.run([*arguments, *map(str, SAMPLES.glob("*.py"))])
    assert not trouble
    verdict: dict[str, set[tuple[int, str]]] = {path.name: set() for path in SAMPLES.glob("*.py")}
    for line in output.splitlines():
        if found := re.fullmatch(r"(.+?):(\d+): error: .*\[([\w-]+)\]", line):
            verdict[Path(found[1]).name].add((int(found[2]), found[3]))
    return verdict


def test_results_are_inferred(verdict: dict[str, set[tuple[int, str]]]) -> None:
    """Of steps, transactions, runs in memory and durable ones, and decorated functions."""
    assert verdict["inferred.py"] == set()


def test_wrong_arguments_are_refused(verdict: dict[str, set[tuple[int, str]]]) -> None:
    """Exactly the lines that say so, each for the reason it gives."""
    lines = (SAMPLES / "refused.py").read_text("utf-8").splitlines()
    expected = {
        (number, code)
        for number, line in enumerate(lines, 1)
        if (found := re.search(r"# expect: (.+)", line))
        for code in found[1].split(", ")
    }
    assert len(expected) > 20
    assert verdict["refused.py"] == expected
