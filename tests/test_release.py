"""What is uploaded works as it is: the wheel, installed alone into an environment of its own."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.support import ROOT


def pip(*arguments: object) -> None:
    """Run this interpreter's pip; skip the test where it gets no packages."""
    command = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", *arguments]
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"pip cannot build or install here: {done.stderr}")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of this source."""
    folder = tmp_path_factory.mktemp("wheel")
    pip("wheel", "--no-deps", "--wheel-dir", folder, ROOT)
    (built,) = folder.iterdir()
    return built


def test_the_wheel_has_every_file_of_the_package(wheel: Path) -> None:
    """The SQL, the templates, the migrations and the type marker too; and nothing else."""
    package = ROOT / "awaitly_postgres"
    files = {
        file.relative_to(ROOT).as_posix()
        for file in package.rglob("*")
        if file.is_file() and "__pycache__" not in file.parts
    }
    packed = [name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name]
    assert sorted(packed) == sorted(files)


def test_the_wheel_without_extras_runs_the_first_example(
    wheel: Path, url: str, tmp_path: Path
) -> None:
    """With the dependencies that it declares and no others, on a server of the user's."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv"], check=True)
    (python,) = [*tmp_path.glob("venv/bin/python"), *tmp_path.glob("venv/Scripts/python.exe")]
    pip("--python", python, "install", wheel)
    program = tmp_path / "first.py"
    example = (ROOT / "README.md").read_text("utf-8").split("```python\n")[1].split("```")[0]
    assert '"embedded"' in example
    program.write_text(example.replace('"embedded"', repr(url)), encoding="utf-8")
    done = subprocess.run(
        [python, "-I", program], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert (done.stdout, done.stderr) == ("{'for': 'Ada', 'order': 1}\n", "")
