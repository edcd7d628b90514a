"""The command line, as its users start it: the installed executable, in pipes and on terminals."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import secrets
import select
import signal
import struct
import subprocess
import sys
import sysconfig
import termios
import time
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import psycopg
import pytest
from click.testing import CliRunner
from psycopg.conninfo import make_conninfo

from awaitly_postgres import Durable, Event, LeaseLost, SnapshotStore, Step, WorkflowSuspended
from awaitly_postgres.cli import cli
from awaitly_postgres.store.rows import STATES
from tests.support import DATA

PROGRAM = "awaitly-postgres"
EXECUTABLE = str(Path(sysconfig.get_path("scripts"), PROGRAM))
NODE_ROWS = json.loads((DATA / "node-snapshots.json").read_text())
PATIENCE = 60.0  # seconds until a test gives up on a process

FLOWS = """
import os
from awaitly_postgres import Durable, postgres

retry_for = float(os.environ.get("RETRY_FOR", "30"))
durable = Durable(postgres(os.environ["DATABASE_URL"], retry_for=retry_for))
not_a_durable = "text"

class CardDeclined(Exception):
    pass

def decline():
    raise CardDeclined("no funds") from KeyError("card")

def gate(name):
    os.write(1, b"at the gate\\n")  # in one piece, whichever thread it is
    return open(name).read()

@durable.workflow
def checkout(step, user):
    if user == "bad":
        step("charge", decline)
    return step("charge", str.upper, user)

@durable.workflow(max_attempts=2)
def hopeless(step):
    step("charge", decline)

@durable.workflow
def gated(step, name):
    return step("gate", gate, name)

@durable.workflow
def busy(step, other):
    with durable.store.lock(other):
        return step("work", str)
"""


def checkout(step: Step, user: str) -> str:
    """Stands for the workflow of the same name in FLOWS."""
    return step("charge", str.upper, user)


def hopeless(step: Step) -> None:
    """Stands for the workflow of the same name in FLOWS."""


def gated(step: Step, name: str) -> str:
    """Stands for the workflow of the same name in FLOWS."""
    return step("gate", str, name)


def busy(step: Step, other: str) -> str:
    """Stands for the workflow of the same name in FLOWS."""
    return step("work", str)


Run = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def environment(url: str, tmp_path: Path) -> dict[str, str]:
    """The environment of a user whose database is this test's and who has FLOWS at hand."""
    (tmp_path / "flows.py").write_text(FLOWS)
    unwanted = {"NO_COLOR", "FORCE_COLOR", "COLUMNS", "LINES", "PYTHONPATH"}
    environment = {name: value for name, value in os.environ.items() if name not in unwanted}
    return environment | {"DATABASE_URL": url, "TERM": "xterm-256color", "PYTHONUTF8": "1"}


@pytest.fixture
def run(environment: dict[str, str], tmp_path: Path) -> Run:
    """Run the command in a pipe, in a folder with FLOWS.

    What loads FLOWS, prints help or is to meet another environment is run by the executable; the
    rest by the code that it calls, in this process, which spares half a second.
    """

    def run(*arguments: str, **changes: str | None) -> subprocess.CompletedProcess[str]:
        if not changes and not {"resume", "--help"} & {*arguments}:
            done = CliRunner().invoke(
                cli, arguments, env=environment, prog_name=PROGRAM, catch_exceptions=False
            )
            return subprocess.CompletedProcess(arguments, done.exit_code, done.stdout, done.stderr)
        changed = {**environment, **changes}
        return subprocess.run(
            [EXECUTABLE, *arguments],
            env={name: value for name, value in changed.items() if value is not None},
            cwd=tmp_path,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            encoding="utf-8",
            timeout=PATIENCE,
            check=False,
        )

    return run


class Terminal:
    """The executable on a terminal of its own; ``text`` is all that it has printed."""

    def __init__(
        self, arguments: tuple[str, ...], environment: dict[str, str], folder: Path, columns: int
    ) -> None:
        self.master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
        self.process = subprocess.Popen(
            [EXECUTABLE, *arguments],
            env=environment,
            cwd=folder,
            stdin=slave,
            stdout=slave,
            stderr=slave,
            start_new_session=True,
        )
        os.close(slave)
        self.text = ""

    def read_until(self, wanted: str) -> None:
        """Read on until ``wanted`` has been printed."""
        deadline = time.monotonic() + PATIENCE
        while wanted not in self.text:
            assert self._read(deadline), f"no {wanted!r} in {self.text!r}"

    def type(self, text: str) -> None:
        """Press these keys."""
        os.write(self.master, text.encode())

    def end(self) -> int:
        """Read to the end and return the exit status."""
        deadline = time.monotonic() + PATIENCE
        while self._read(deadline):
            pass
        return self.process.wait(PATIENCE)

    def lines(self) -> list[str]:
        """Return what has been printed, without colours."""
        return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", self.text).splitlines()

    def close(self) -> None:
        """Leave nothing behind."""
        self.process.kill()
        self.process.wait()
        os.close(self.master)

    def _read(self, deadline: float) -> bool:
        ready, _, _ = select.select([self.master], [], [], max(deadline - time.monotonic(), 0))
        assert ready, f"it hangs after {self.text!r}"
        try:
            chunk = os.read(self.master, 65536)
        except OSError:  # how Linux tells that the other side is closed
            return False
        self.text += chunk.decode("utf-8", "replace")
        return bool(chunk)


@pytest.fixture
def terminal(environment: dict[str, str], tmp_path: Path) -> Iterator[Callable[..., Terminal]]:
    """Start the executable on a terminal, in a folder with FLOWS."""
    terminals = []

    def start(*arguments: str, columns: int = 80, **changes: str) -> Terminal:
        terminals.append(Terminal(arguments, {**environment, **changes}, tmp_path, columns))
        return terminals[-1]

    yield start
    for terminal in terminals:
        terminal.close()


@pytest.fixture
def worker(environment: dict[str, str], tmp_path: Path) -> Iterator[Callable[..., Any]]:
    """Start ``resume flows:durable`` in the background, its output in pipes."""
    processes = []

    def start(*arguments: str, **changes: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [EXECUTABLE, "resume", "flows:durable", *arguments],
            env={**environment, **changes},
            cwd=tmp_path,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            encoding="utf-8",
        )
        processes.append(process)
        return process

    yield start
    for process in processes:
        process.kill()
        process.communicate()


def snapshot(steps: int = 1, status: str = "completed", **metadata: Any) -> dict[str, Any]:
    """A snapshot of so many steps (60,000 at most) of 1 ms each, one after another."""
    return {
        "formatVersion": 1,
        "steps": {
            f"step-{i:05}": {
                "ok": True,
                "value": i,
                "meta": {
                    "startedAt": f"2026-01-01T00:00:{i // 1000:02}.{i % 1000:03}Z",
                    "durationMs": 1.0,
                    "seq": i + 1,
                },
            }
            for i in range(steps)
        },
        "execution": {"status": status, "lastUpdated": "2026-01-01T00:00:00.000Z"},
        "metadata": metadata,
    }


def statuses(db: psycopg.Connection) -> dict[str, str]:
    """Return the stored statuses by id."""
    found = db.execute("SELECT id, snapshot->'execution'->>'status' FROM awaitly_snapshots")
    return dict(found.fetchall())


def refused(done: subprocess.CompletedProcess[str], *words: str) -> bool:
    """Tell whether it says these words on stderr, and nothing else anywhere, and exits with 2."""
    assert done.returncode == 2, done
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    assert [word for word in words if word not in done.stderr] == []
    return True


# -- tables --------------------------------------------------------------------------------


def test_init_makes_the_tables_and_may_be_repeated(run: Run, db: psycopg.Connection) -> None:
    """After init, run twice, the three tables are there."""
    assert [run("init").returncode, run("init").returncode] == [0, 0]
    tables = ["awaitly_snapshots", "awaitly_snapshots_steps", "awaitly_workflow_lock"]
    found = db.execute("SELECT tablename FROM pg_tables WHERE schemaname = current_schema()")
    assert sorted(found.fetchall()) == [(table,) for table in tables]


def test_init_sql_makes_tables_that_serve_without_a_database_to_print_it(
    run: Run, db: psycopg.Connection
) -> None:
    """What ``init --sql`` prints is a migration after which everything works."""
    printed = run("init", "--sql", "--table", "runs", "--lock-table", "locks", DATABASE_URL=None)
    assert printed.returncode == 0
    db.execute(printed.stdout)
    done = run("list", "--table", "runs", "--lock-table", "locks", "--json")
    assert (done.returncode, done.stdout) == (0, "[]\n")


def test_looking_makes_no_tables(run: Run, db: psycopg.Connection) -> None:
    """A listing without tables says how to make them, and makes none."""
    assert refused(run("list"), "init", "--table")
    assert db.execute("SELECT to_regclass('awaitly_snapshots')").fetchone() == (None,)


def test_options_find_tables_of_other_names(run: Run, make_store: Any, db: Any) -> None:
    """--schema, --table, --lock-table and --no-journal reach a store made with the same."""
    schema = db.execute("SELECT current_schema()").fetchone()[0]
    other = make_store(schema=schema, table="runs", lock_table="locks", journal=False)
    other.save("a", snapshot())
    place = ["--schema", schema, "--table", "runs", "--lock-table", "locks", "--no-journal"]
    assert json.loads(run("list", "--json", *place).stdout)[0]["id"] == "a"
    assert json.loads(run(*place, "list", "--json").stdout)[0]["id"] == "a"


def test_an_option_wins_over_the_environment(run: Run, store: Any, url: str) -> None:
    """--url counts, before the command or after it, whatever $DATABASE_URL says."""
    store.save("a", snapshot())
    nowhere = "postgresql://127.0.0.1:1/nowhere"
    for arguments in (["--url", url, "list"], ["list", "--url", url]):
        done = run(*arguments, DATABASE_URL=nowhere)
        assert done.stdout.splitlines()[1].startswith("a ")


# -- list ----------------------------------------------------------------------------------


def test_list_in_a_pipe_has_stable_columns(run: Run, store: SnapshotStore) -> None:
    """In a pipe there is one line for each, whole, with the same columns and no escapes."""
    name = "order-" + "x" * 200
    store.save(name, snapshot(3, workflow="shop"))
    store.save("b", snapshot(2, "running", workflow="shop"))
    held = store.try_acquire("b", ttl=600)
    done = run("list", COLUMNS="40")
    head, *lines = done.stdout.splitlines()
    assert head.split() == ["ID", "STATE", "AGE", "STEPS", "LEASE", "NEXT", "WORKFLOW"]
    holder = held.token.rpartition(":")[0]
    cells = [re.split(r" {2,}", line) for line in lines]
    assert [[c[0], c[1], *c[3:]] for c in cells] == [
        ["b", "running", "2", holder, "-", "shop"],
        [name, "completed", "3", "-", "-", "shop"],
    ]
    assert "\x1b" not in done.stdout


def test_list_json_has_the_fields_of_run_info(run: Run, store: SnapshotStore) -> None:
    """Under their own names, with times in ISO 8601."""
    metadata = {"custom": {"tenant": "acme"}, "wakeAt": "2999-01-01T00:00:00.000Z"}
    waits = {"approval": None}
    given = {"workflow": "shop", "version": 2, "attempts": 3, "waits": waits, **metadata}
    store.save("b", snapshot(2, "running", **given))
    held = store.try_acquire("b", ttl=600)
    (row,) = json.loads(run("list", "--json").stdout)
    assert row.pop("updated_at") == store.list()[0].updated_at.isoformat()
    assert row == {
        "id": "b",
        "workflow": "shop",
        "version": 2,
        "state": "running",
        "attempts": 3,
        "next_at": "2999-01-01T00:00:00+00:00",
        "waits_for": ["approval"],
        "holder": held.token,
        "held_until": held.expires_at.isoformat(),
        "metadata": {"tenant": "acme"},
        "step_count": 2,
        "maps": {},
    }


def test_steps_are_counted_in_the_snapshot_and_the_journal(
    run: Run, store: SnapshotStore, db: psycopg.Connection
) -> None:
    """A step that is only appended so far counts, one that is in both counts once."""
    store.save("a", snapshot(2, "running"))
    db.execute(
        "INSERT INTO awaitly_snapshots_steps VALUES "
        """('a', 'step-00001', '{"ok": true}'), ('a', 'new', '{"ok": true}')"""
    )
    assert json.loads(run("list", "--json").stdout)[0]["step_count"] == 3


def test_rows_of_node_are_listed_and_shown(
    run: Run, store: SnapshotStore, db: psycopg.Connection
) -> None:
    """Rows that Node wrote, those of its newest format too, have their steps counted and shown."""
    for id, row in NODE_ROWS.items():
        store.save(id, row)
    resumable = {"kind": "ResumeState", "steps": [["one", {"ok": True, "value": 1}]]}
    db.execute("INSERT INTO awaitly_snapshots VALUES ('new', %s, now())", [json.dumps(resumable)])
    steps = {id: len(row["steps"]) for id, row in NODE_ROWS.items()} | {"new": 1}
    listed = json.loads(run("list", "--json").stdout)
    assert {row["id"]: row["step_count"] for row in listed} == steps
    shown = {id: run("show", id).stdout for id in ("node-failed-result", "new")}
    assert "✗ fetch-missing\n    string: NOT_FOUND\n" in shown["node-failed-result"]
    assert "✓ one\n" in shown["new"]


def test_list_filters(run: Run, store: SnapshotStore) -> None:
    """--prefix is exact, --state and --limit leave out the rest."""
    for id, status in (
        ("a_1", "failed"),
        ("a_2", "failed"),
        ("a_3", "completed"),
        ("ab", "failed"),
    ):
        store.save(id, snapshot(1, status))
    done = run("list", "--json", "--prefix", "a_", "--state", "failed", "--limit", "1")
    assert [row["id"] for row in json.loads(done.stdout)] == ["a_2"]


def test_list_goes_on_past_a_page(run: Run, store: SnapshotStore, db: psycopg.Connection) -> None:
    """More rows than the store reads at once are all listed, once."""
    store.save("a", snapshot())
    db.execute(
        "INSERT INTO awaitly_snapshots SELECT 'b' || n, snapshot, now() "
        "FROM awaitly_snapshots, generate_series(1, 1100) AS n"
    )
    done = run("list", "--limit", "1050")
    assert len({line.split()[0] for line in done.stdout.splitlines()[1:]}) == 1050


def test_list_fits_the_terminal_and_cuts_no_id(
    terminal: Callable[..., Terminal], store: SnapshotStore
) -> None:
    """In 80 columns no line is longer, save an id that is: it stands alone, whole."""
    name = "order-" + "x" * 100
    for id in (name, "short", "注文-" * 5):
        store.save(id, snapshot(1, "running", workflow="a-workflow-of-a-very-long-name"))
    store.try_acquire("short")
    screen = terminal("list")
    assert screen.end() == 0
    lines = screen.lines()
    assert name in lines
    assert all(len(line) <= 80 for line in lines if line != name)
    assert "\x1b[36mrunning" in screen.text


@pytest.mark.parametrize("nonsense", ["7", "true", '"text"', "[1]", "null"])
@pytest.mark.parametrize("name", ["waits", "signals"])
def test_nonsense_in_one_row_ends_no_listing(
    run: Run, store: SnapshotStore, name: str, nonsense: str
) -> None:
    """Metadata are anybody's to edit; the others are listed all the same."""
    metadata = {"waits": {"go": None}, "signals": {"go": 1}, name: json.loads(nonsense)}
    store.save("odd", snapshot(1, "running", workflow="w", **metadata))
    store.save("sound", snapshot(1))
    done = run("list")
    assert (done.returncode, done.stderr) == (0, "")
    assert {line.split()[0] for line in done.stdout.splitlines()[1:]} == {"odd", "sound"}


def test_each_state_is_listed_with_what_comes_next(
    run: Run, store: SnapshotStore, durable: Durable
) -> None:
    """STATE is one of the seven words; NEXT is when the run goes on, if it does by itself."""

    @durable.workflow
    def waiting(step: Step) -> None:
        step.wait("approval")

    def failing(step: Step) -> None:
        raise RuntimeError

    for id in ("waits", "woken"):
        with pytest.raises(WorkflowSuspended):
            durable.run(id, waiting)
    durable.signal("woken", "approval", 1)
    with pytest.raises(RuntimeError):
        durable.run("failed", failing)
    far_off = "2999-01-01T00:00:00.000Z"
    store.save("paused", snapshot(0, "failed", workflow="w", wakeAt=far_off))
    store.save("given-up", snapshot(0, "failed", workflow="w", gaveUpAt=far_off))
    store.save(
        "asleep", snapshot(0, "running", workflow="w", wakeAt=far_off, waits={"nap": far_off})
    )
    store.save("by-hand", snapshot(1, "running"))
    durable.submit("new", durable.workflow(checkout), "u")
    durable.run("done", checkout, "u")
    for id in ("cancelled", "held"):
        durable.submit(id, durable.workflow(checkout), "u")
    durable.cancel("cancelled")
    store.try_acquire("held", ttl=600)
    lines = [re.split(r" {2,}", line) for line in run("list").stdout.splitlines()[1:]]
    told = {cells[0]: (cells[1], re.sub(r"\d+d", "ages", cells[5])) for cells in lines}
    assert told.pop("failed")[0] == "retrying"  # for a second, then it is due
    assert told == {
        "waits": ("waiting", "waits for approval"),
        "asleep": ("waiting", "waits for nap, ages left"),
        "woken": ("pending", "due"),
        "paused": ("retrying", "in ages"),
        "given-up": ("failed", "-"),
        "by-hand": ("pending", "-"),
        "new": ("pending", "due"),
        "done": ("completed", "-"),
        "cancelled": ("cancelled", "-"),
        "held": ("running", "-"),
    }
    for option in ("--state", "--status"):
        for state in STATES:
            listed = json.loads(run("list", "--json", option, state).stdout)
            assert {row["state"] for row in listed} == {state}


@pytest.mark.parametrize("arguments", [["list"], ["show", "evil\x1b[31m\nred"]])
def test_what_is_stored_cannot_steer_the_terminal(
    run: Run, store: SnapshotStore, arguments: list[str]
) -> None:
    """Control characters in ids, keys and values are shown, not obeyed."""
    stored = snapshot(0, workflow="w\x1b]0;title\x07", output="\x1b[2J\x9b2J")
    stored["steps"]["key\x1b[1m"] = {"ok": False, "error": "", "cause": {"message": "\x1b[2Jm"}}
    store.save("evil\x1b[31m\nred", stored)
    done = run(*arguments)
    assert done.returncode == 0
    assert "evil\\x1b[31m\\nred" in done.stdout
    assert re.findall(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]", done.stdout) == []


def test_no_color_means_no_color(terminal: Callable[..., Terminal], store: SnapshotStore) -> None:
    """With NO_COLOR a terminal gets no colours either."""
    store.save("a", snapshot())
    screen = terminal("list", NO_COLOR="1")
    assert screen.end() == 0
    assert "completed" in screen.text
    assert re.findall(r"\x1b\[[0-9;]*3[0-7]m", screen.text) == []


def test_output_has_what_its_encoding_has(run: Run, store: SnapshotStore) -> None:
    """Where only ASCII can be printed, bars are ASCII and other text is escaped."""
    store.save("naïve", snapshot(2))
    done = run("show", "naïve", PYTHONIOENCODING="ascii", PYTHONUTF8="0")
    assert done.returncode == 0
    assert done.stdout.isascii()
    assert "na\\xefve" in done.stdout
    assert "+ step-00001" in done.stdout


# -- show ----------------------------------------------------------------------------------


def test_show_tells_input_lease_and_why_steps_failed(
    run: Run, store: SnapshotStore, durable: Durable
) -> None:
    """A failed workflow shows its arguments, its holder, and the failure with its cause."""
    durable.submit("a", durable.workflow(checkout), "bad")
    run("resume", "flows:durable")
    held = store.try_acquire("a")
    shown = run("show", "a").stdout
    assert "state      running, " in shown
    assert f"held by {held.token.rpartition(':')[0]}" in shown
    assert "current    the step after charge\n" in shown
    assert '("bad")' in shown
    assert "error      CardDeclined: no funds\n           caused by KeyError: 'card'\n" in shown
    assert "✗ charge" in shown
    assert "    CardDeclined: no funds\n    caused by KeyError: 'card'\n" in shown


def test_show_tells_a_failure_outside_of_steps(run: Run, durable: Durable) -> None:
    """What the workflow itself raised, after its steps, is shown, and the output is not."""

    def breaks(step: Step) -> None:
        step("one", int)
        raise LookupError("between steps")

    with pytest.raises(LookupError):
        durable.run("a", breaks)
    shown = run("show", "a").stdout
    assert "error      LookupError: between steps\n" in shown
    assert "✓ one" in shown
    assert 'raise LookupError("between steps")\n    LookupError: between steps\n' in shown


def test_show_elides_a_long_traceback(run: Run, durable: Durable) -> None:
    """Its end is shown, with the cause above the failure; --all shows it in full."""

    def deep(level: int) -> None:
        if level:
            return deep(level - 1)
        try:
            raise KeyError("the cause")
        except KeyError as error:
            raise LookupError("the failure") from error

    def work(step: Step) -> None:
        step("deep", deep, 9)

    with pytest.raises(LookupError):
        durable.run("a", work)
    brief, whole = run("show", "a").stdout, run("show", "a", "--all").stdout
    assert brief.splitlines()[-1] == whole.splitlines()[-1] == "    LookupError: the failure"
    hidden = re.search(r"\n⋮ (\d+) more lines; --all shows them\n", brief)
    assert hidden is not None
    assert len(whole.splitlines()) == len(brief.splitlines()) + int(hidden[1]) - 1
    assert "KeyError: 'the cause'\n" in whole
    assert "direct cause of the following exception" in whole
    told = json.loads(run("show", "a", "--json").stdout)
    assert told["error"] == "LookupError: the failure\ncaused by KeyError: 'the cause'"
    assert told["traceback"] == "\n".join(line[4:] for line in traceback_in(whole)) + "\n"


def traceback_in(shown: str) -> list[str]:
    """The lines of the traceback at the end of what ``show`` prints."""
    lines = shown.splitlines()
    return lines[lines.index("traceback") + 1 :]


def test_errors_of_several_lines_are_readable(run: Run, durable: Durable) -> None:
    """Each line is indented, and none can steer the terminal."""

    def refuse() -> None:
        raise ValueError("first line\n\tsecond \x1b[2J line")

    with pytest.raises(ValueError, match="second"):
        durable.run("a", lambda step: step("refuse", refuse))
    shown = run("show", "a").stdout
    lines = "ValueError: first line", "        second \\x1b[2J line"
    assert f"error      {lines[0]}\n           {lines[1]}\n" in shown
    assert f"    {lines[0]}\n    {lines[1]}\n" in shown


def test_show_tells_what_was_returned_and_given(run: Run, store: SnapshotStore) -> None:
    """The result of a completed run, and the user's own metadata."""
    durable = Durable(store, metadata={"tenant": "acme"})
    durable.run("a", checkout, "ada")
    shown = run("show", "a").stdout
    assert 'metadata   {"tenant": "acme"}\n' in shown
    assert 'input      ("ada")\nresult     "ADA"\n' in shown


@pytest.mark.parametrize(
    ("milliseconds", "text"),
    [(0.045, "45 µs"), (0.3, "0.3 ms"), (41, "41 ms"), (1200, "1.2 s"), (192_000, "3m12s")],
)
def test_a_step_of_any_length_is_readable(
    run: Run, store: SnapshotStore, milliseconds: float, text: str
) -> None:
    """In the unit that leaves few digits."""
    stored = snapshot(1)
    stored["steps"]["step-00000"]["meta"]["durationMs"] = milliseconds
    store.save("a", stored)
    assert f"✓ step-00000  {text:>7}  " in run("show", "a").stdout


def test_bars_stand_where_and_as_long_as_steps_ran(run: Run, store: SnapshotStore) -> None:
    """A step that took half of the time has half of the room, in its half; a night is cut out."""
    stored = snapshot(3, output={"order": 1})
    times = [("00:00:00", 2000), ("00:00:02", 1000), ("08:00:03", 1000)]
    for step, (start, took) in zip(stored["steps"].values(), times, strict=True):
        step["meta"] |= {"startedAt": f"2026-01-01T{start}.000Z", "durationMs": took}
    store.save("a", stored)
    shown = run("show", "a").stdout.splitlines()
    bars = [line.split(" s  ", 1)[1] for line in shown if line.startswith("✓")]
    room = max(map(len, bars))
    found = [(bar.index("━") / room, bar.count("━") / room) for bar in bars]
    for given, wanted in zip(found, [(0, 0.5), (0.5, 0.25), (0.75, 0.25)], strict=True):
        assert given == pytest.approx(wanted, abs=0.02)
    assert "⋮ 8h00m later" in shown
    assert 'result     {"order": 1}' in shown


def test_show_of_many_steps_shows_those_that_matter(
    terminal: Callable[..., Terminal], run: Run, store: SnapshotStore
) -> None:
    """Of 5,000 steps a terminal gets a page: first, last, longest, failed; --all gives all."""
    stored = snapshot(5000)
    steps = stored["steps"]
    steps["step-02000"]["meta"]["durationMs"] = 9000.0
    steps["step-03000"] = {
        **steps["step-03000"],
        "ok": False,
        "error": "",
        "cause": {"name": "Ouch"},
    }
    store.save("a", stored)
    screen = terminal("show", "a")
    assert screen.end() == 0
    lines = screen.lines()
    assert len(lines) < 60
    assert all(len(line) <= 80 for line in lines)
    told = ("✓ step-00000", "✓ step-02000", "✗ step-03000", "    Ouch", "✓ step-04999")
    assert [start for start in told if not any(line.startswith(start) for line in lines)] == []
    hidden = [int(n.replace(",", "")) for n in re.findall(r"⋮ ([\d,]+) more", "\n".join(lines))]
    assert sum(hidden) + sum("step-" in line for line in lines) == 5000
    assert run("show", "a", "--all").stdout.count("step-") == 5000


def test_show_cuts_long_values_unless_asked_for_all(run: Run, store: SnapshotStore) -> None:
    """A long output is cut on the page, and whole with --all."""
    store.save("a", snapshot(1, output="x" * 5000))
    assert 100 < run("show", "a").stdout.count("x") < 1000
    assert run("show", "a", "--all").stdout.count("x") == 5000


def test_show_json_has_the_fields_of_run_info_and_step_info(
    run: Run, durable: Durable, db: psycopg.Connection
) -> None:
    """What the listing has, and what was given, returned and done, with durations in seconds."""
    durable.run("a", checkout, "ada")
    (listed,) = json.loads(run("list", "--json").stdout)
    shown = json.loads(run("show", "a", "--json").stdout)
    (step,) = shown.pop("steps")
    assert shown == {
        **listed,
        "input": {"args": ["ada"], "kwargs": {}},
        "result": "ADA",
        "error": None,
        "traceback": None,
    }
    started_at, duration = step.pop("started_at"), step.pop("duration")
    assert datetime.fromisoformat(started_at).tzinfo is not None
    assert 0 <= duration < 60
    done = {"key": "charge", "state": "completed", "value": "ADA"}
    assert step == {**done, "error": None, "traceback": None}


# -- stats and watch -----------------------------------------------------------------------


def test_stats_counts_by_state_under_a_prefix(
    run: Run, store: SnapshotStore, durable: Durable
) -> None:
    """Counts are by state; the oldest pending one is named by its whole id."""
    store.save("a:1", snapshot())
    store.save("a:2", snapshot(1, "failed"))
    durable.submit("a:3", durable.workflow(checkout), "u")
    durable.submit("b:0", durable.workflow(checkout), "u")
    told = json.loads(run("stats", "--json", "--prefix", "a:").stdout)
    assert told["by_state"] == {"completed": 1, "failed": 1, "pending": 1}
    assert (told["total"], told["bytes"] > 0) == (3, True)
    assert told["oldest_pending"]["id"] == "a:3"  # a:1 and a:2 were saved by hand
    lines = run("stats").stdout.splitlines()
    counts = [["total", "4"], ["pending", "2"], ["completed", "1"], ["failed", "1"]]
    assert [line.split() for line in lines[:4]] == counts


def test_watch_shows_changes_until_it_is_interrupted(
    terminal: Callable[..., Terminal], store: SnapshotStore
) -> None:
    """A workflow that is stored meanwhile appears; Ctrl-C ends it without a word, with 0."""
    store.save("first-one", snapshot())
    store.save("no-match", snapshot(1, "failed"))
    screen = terminal("watch", "--interval", "0.1", "--state", "completed")
    screen.read_until("first-one")
    store.save("second-one", snapshot())
    screen.read_until("second-one")
    assert "no-match" not in screen.text
    screen.process.send_signal(signal.SIGINT)
    assert screen.end() == 0
    assert "Traceback" not in screen.text
    assert "Abort" not in screen.text


# -- delete and prune ----------------------------------------------------------------------


def test_delete_deletes_these_and_nothing_if_one_is_unknown(
    run: Run, store: SnapshotStore, db: psycopg.Connection
) -> None:
    """An unknown id is refused before anything is deleted."""
    for id in "abc":
        store.save(id, snapshot())
    assert refused(run("delete", "a", "nope"), "'nope'")
    assert set(statuses(db)) == {"a", "b", "c"}
    assert run("delete", "a", "b").returncode == 0
    assert set(statuses(db)) == {"c"}


def test_delete_refuses_a_run_that_a_process_holds(
    run: Run, store: SnapshotStore, db: psycopg.Connection
) -> None:
    """Its next step would store it again; the message names the holder and what to do instead."""
    for id in ("free", "it's held"):
        store.save(id, snapshot(1, "running", workflow="w"))
    held = store.try_acquire("it's held", ttl=600)
    done = run("delete", "free", "it's held")
    assert (done.returncode, done.stdout) == (1, "")
    assert held.token.rpartition(":")[0] in done.stderr
    for command in ("cancel", "unlock"):
        assert f"""'awaitly-postgres {command} 'it'"'"'s held''""" in done.stderr
    assert set(statuses(db)) == {"free", "it's held"}
    assert run("unlock", "it's held", "--yes").returncode == 0
    assert run("delete", "it's held").stdout == "1 deleted\n"


@pytest.fixture
def aged(store: SnapshotStore, db: psycopg.Connection) -> None:
    """Two old completed rows, an old failed and a new completed one."""
    for id, status in (("a:1", "completed"), ("b:1", "completed"), ("a:2", "failed")):
        store.save(id, snapshot(1, status))
    db.execute("UPDATE awaitly_snapshots SET updated_at = now() - interval '36 hours'")
    store.save("a:3", snapshot())


@pytest.mark.usefixtures("aged")
@pytest.mark.parametrize(
    ("arguments", "gone"),
    [
        (["--older-than", "1d"], "a:1 b:1"),
        (["--older-than", "1d11h", "--prefix", "a:"], "a:1"),
        (["--older-than", "1d", "--status", "failed"], "a:2"),
        (["--older-than", "1d", "--state", "failed"], "a:2"),
        (["--older-than", "90m", "--status", "any", "--batch-size", "1"], "a:1 a:2 b:1"),
        (["--older-than", "2d"], ""),
        (["--older-than", "1d", "--dry-run"], ""),
    ],
    ids=str,
)
def test_prune_deletes_what_is_old(
    run: Run, db: psycopg.Connection, arguments: list[str], gone: str
) -> None:
    """Age, status and prefix choose; --dry-run deletes nothing."""
    done = run("prune", *arguments)
    assert {"a:1", "b:1", "a:2", "a:3"} - set(statuses(db)) == set(gone.split())
    counted = 2 if "--dry-run" in arguments else len(gone.split())
    assert (done.returncode, done.stdout.split()[0], done.stderr) == (0, str(counted), "")


def test_prune_of_failed_runs_keeps_those_that_are_not_failed_for_good(
    run: Run, store: SnapshotStore, db: psycopg.Connection
) -> None:
    """A run that waits for its next attempt is stored as failed, and so is a cancelled one."""
    past, future = "2026-01-01T00:00:00.000Z", "2999-01-01T00:00:00.000Z"
    for id, status, metadata in (
        ("retrying", "failed", {"wakeAt": future}),
        ("due", "failed", {"wakeAt": past}),
        ("given-up", "failed", {"gaveUpAt": past}),
        ("cancelled", "failed", {"cancelledAt": past}),
        ("pending", "running", {}),
        ("waiting", "running", {"waits": {"go": None}, "wakeAt": future}),
        ("completed", "completed", {}),
    ):
        store.save(id, snapshot(1, status, workflow="w", **metadata))
    store.save("held", snapshot(1, "failed", workflow="w", gaveUpAt=past))
    store.try_acquire("held", ttl=600)
    db.execute("UPDATE awaitly_snapshots SET updated_at = now() - interval '2 days'")
    before = set(statuses(db))
    dry = run("prune", "--older-than", "1d", "--status", "failed", "--dry-run")
    assert dry.stdout == "1 would be deleted\n"
    assert run("prune", "--older-than", "1d", "--status", "failed").stdout == "1 deleted\n"
    assert before - set(statuses(db)) == {"given-up"}
    for state, gone in (("retrying", {"due", "retrying"}), ("waiting", {"waiting"})):
        before = set(statuses(db))
        assert run("prune", "--older-than", "1d", "--state", state).returncode == 0
        assert before - set(statuses(db)) == gone
    assert run("prune", "--older-than", "1d", "--state", "any").stdout == "3 deleted\n"
    assert set(statuses(db)) == {"held"}


@pytest.mark.usefixtures("aged")
def test_prune_shows_a_bar_on_a_terminal(
    terminal: Callable[..., Terminal], db: psycopg.Connection
) -> None:
    """On a terminal its progress is shown as so many of so many."""
    screen = terminal("prune", "--older-than", "1d")
    assert screen.end() == 0
    assert any("2/2" in line for line in screen.lines())
    assert set(statuses(db)) == {"a:2", "a:3"}


# -- resume --------------------------------------------------------------------------------


@pytest.mark.parametrize("verbose", [False, True])
def test_resume_in_cron_prints_failures_to_stderr_and_fails_if_one_failed(
    run: Run, durable: Durable, db: psycopg.Connection, verbose: bool
) -> None:
    """All that is pending is finished; --verbose has a line for each and the traceback."""
    for id, user in (("a", "ada"), ("b", "bad"), ("c", "eve")):
        durable.submit(id, durable.workflow(checkout), user)
    done = run("resume", "flows:durable", *(["--verbose"] if verbose else []))
    assert done.returncode == 1
    told = [line.split()[:2] for line in done.stdout.splitlines()]
    assert told == ([["completed", "a"], ["completed", "c"]] if verbose else [])
    failed, *others = done.stderr.splitlines()
    assert re.fullmatch(
        r"failed     b  \S+ [mµ]?s  CardDeclined: no funds \(attempt 1, .*\)", failed
    )
    assert ("    Traceback (most recent call last):" in others) is verbose
    assert bool(others) is verbose
    assert statuses(db) == {"a": "completed", "b": "failed", "c": "completed"}


def test_a_failure_says_whether_it_is_final(run: Run, durable: Durable) -> None:
    """It has the number of the attempt and when the next one is due, or that there is none."""
    durable.submit("a", durable.workflow(hopeless))
    input = {"args": [], "kwargs": {}}
    durable.store.save("none", snapshot(0, "running", workflow="unknown", input=input))
    told = [run("resume", "flows:durable", "a").stderr for _ in range(2)]
    assert "CardDeclined: no funds (attempt 1, again in 1.0 s)\n" in told[0]
    assert "CardDeclined: no funds (given up after 2 attempts)\n" in told[1]
    assert "attempt" not in run("resume", "flows:durable", "none").stderr


def test_resume_is_silent_unless_something_failed(run: Run, durable: Durable) -> None:
    """Cron sends no mail when nothing is pending, nor when all went well."""
    durable.submit("a", durable.workflow(checkout), "ada")
    for _ in range(2):
        done = run("resume", "flows:durable")
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert durable.store.list()[0].status == "completed"


@pytest.mark.parametrize(
    ("old", "new", "error"),
    [
        ('step("charge", str', 'step("pay", str', "WorkflowDrift"),
        ("workflow\ndef checkout", "workflow(version=2)\ndef checkout", "VersionMismatch"),
    ],
    ids=["drift", "version"],
)
def test_a_change_of_code_is_told_once_a_pause_and_shown(
    run: Run, store: SnapshotStore, tmp_path: Path, old: str, new: str, error: str
) -> None:
    """Cron's mail has it when the run was tried, not every minute; `show` has it all the time."""

    def crash(event: Event) -> None:
        if event.type == "step_completed":
            raise KeyboardInterrupt

    durable = Durable(store, on_event=crash)
    with pytest.raises(KeyboardInterrupt):
        durable.run("a", durable.workflow(checkout), "ada")
    assert old in FLOWS
    (tmp_path / "flows.py").write_text(FLOWS.replace(old, new))

    # The pause doubles with each try; the sixth is of 32 s, which no two commands take.
    told = []
    for _ in range(6):
        store.save("a", without_its_pause(store, "a"))
        told.append(run("resume", "flows:durable"))
    assert {(done.returncode, error in done.stderr, done.stdout) for done in told} == {
        (1, True, "")
    }
    silent = run("resume", "flows:durable")
    assert (silent.returncode, silent.stdout, silent.stderr) == (0, "", "")
    shown = run("show", "a").stdout
    assert re.search(r"^state +retrying", shown, re.M)
    assert re.search(rf"^error +{error}: ", shown, re.M)


def without_its_pause(store: SnapshotStore, id: str) -> dict[str, Any]:
    """What is stored of a run, without the time before which it is not due."""
    document: dict[str, Any] = store.load(id).to_json()
    document["metadata"].pop("wakeAt", None)
    return document


def test_resume_takes_ids_a_prefix_or_a_limit(
    run: Run, durable: Durable, db: psycopg.Connection
) -> None:
    """Only what was chosen is run."""
    for id in ("a1", "a2", "b1", "c1"):
        durable.submit(id, durable.workflow(checkout), "ada")
    assert run("resume", "flows:durable", "b1").returncode == 0
    assert run("resume", "flows:durable", "--prefix", "a", "--limit", "1").returncode == 0
    done = {id for id, status in statuses(db).items() if status == "completed"}
    assert done == {"a1", "b1"}


def test_resume_of_an_id_that_is_not_resumed_says_so(run: Run, durable: Durable) -> None:
    """Exit status 0, since nothing has failed; but silence would look like a start."""
    for id in ("done", "over", "held"):
        durable.submit(id, durable.workflow(checkout), "ada")
    durable.resume("done")
    durable.cancel("over")
    held = durable.store.try_acquire("held", ttl=600)
    ended = run("resume", "flows:durable", "done", "over", "held")
    assert (ended.returncode, ended.stdout) == (0, "")
    assert ended.stderr.splitlines() == [
        "'done' is already completed",
        "'over' is already cancelled",
        f"'held' is already running on {held.token.rpartition(':')[0]}; "
        "if that process is dead, 'awaitly-postgres unlock held' frees it",
    ]


def test_resume_of_an_unknown_id_runs_nothing(
    run: Run, durable: Durable, db: psycopg.Connection
) -> None:
    """Ids are checked before the first of them runs."""
    durable.submit("a", durable.workflow(checkout), "ada")
    assert refused(run("resume", "flows:durable", "a", "nope"), "'nope'")
    assert statuses(db) == {"a": "running"}


def test_resume_leaves_what_another_holds(
    run: Run, store: SnapshotStore, durable: Durable, db: psycopg.Connection
) -> None:
    """A given id that somebody works on is skipped, with the holder's name."""
    durable.submit("a", durable.workflow(checkout), "ada")
    held = store.try_acquire("a", ttl=600)
    done = run("resume", "flows:durable", "a", "--verbose")
    assert (done.returncode, done.stdout.split()[:2]) == (0, ["skipped", "a"])
    assert held.token in done.stdout
    assert statuses(db) == {"a": "running"}


@pytest.mark.parametrize("chosen", [["a"], []], ids=["by its id", "as pending"])
def test_a_run_that_fails_because_something_else_is_taken_has_failed(
    run: Run, store: SnapshotStore, durable: Durable, db: psycopg.Connection, chosen: list[str]
) -> None:
    """The AlreadyRunning that a workflow raises is its own failure, not a reason to skip it."""
    durable.submit("a", durable.workflow(busy), "another-id")
    held = store.try_acquire("another-id", ttl=600)
    done = run("resume", "flows:durable", *chosen)
    assert (done.returncode, done.stderr.split()[:2]) == (1, ["failed", "a"])
    assert "'another-id' is running elsewhere" in done.stderr
    assert statuses(db) == {"a": "failed"}
    assert held.held()


def test_resume_shows_a_bar_and_a_sum_on_a_terminal(
    terminal: Callable[..., Terminal], durable: Durable, db: psycopg.Connection
) -> None:
    """On a terminal there are progress, the failures, and how many came out how."""
    for id, user in (("a", "ada"), ("b", "bad"), ("c", "eve")):
        durable.submit(id, durable.workflow(checkout), user)
    screen = terminal("resume", "flows:durable")
    assert screen.end() == 1
    assert any("3/3" in line for line in screen.lines())
    assert "CardDeclined" in screen.text
    assert "2 completed, 1 failed" in screen.text
    assert statuses(db) == {"a": "completed", "b": "failed", "c": "completed"}


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_worker_stops_after_the_current_workflow(
    worker: Callable[..., Any],
    durable: Durable,
    db: psycopg.Connection,
    tmp_path: Path,
    signum: int,
) -> None:
    """On a signal the workflow at work is finished, the next is not begun, the status is 0."""
    os.mkfifo(tmp_path / "gate")
    durable.submit("a", durable.workflow(gated), "gate")
    durable.submit("b", durable.workflow(checkout), "ada")
    process = worker("--loop", "1")
    assert process.stdout.readline() == "at the gate\n"
    process.send_signal(signum)
    assert "stopping after the current workflow" in process.stderr.readline()
    (tmp_path / "gate").write_text("open")
    assert process.wait(PATIENCE) == 0
    assert statuses(db) == {"a": "completed", "b": "running"}
    assert db.execute("SELECT * FROM awaitly_workflow_lock").fetchall() == []


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("arguments", [[], ["--loop", "1"]], ids=str)
def test_a_second_signal_stops_at_once_and_frees_the_workflow(
    worker: Callable[..., Any],
    durable: Durable,
    db: psycopg.Connection,
    tmp_path: Path,
    arguments: list[str],
    signum: int,
) -> None:
    """Told twice, a worker abandons what it does; its lease is given back, no traceback shown."""
    os.mkfifo(tmp_path / "gate")
    durable.submit("a", durable.workflow(gated), "gate")
    process = worker(*arguments)
    process.stdout.readline()
    process.send_signal(signum)
    process.stderr.readline()
    process.send_signal(signum)
    out, err = process.communicate(timeout=PATIENCE)
    assert (process.returncode, out, err) == (128 + signum, "", "")
    assert statuses(db) == {"a": "running"}
    assert db.execute("SELECT * FROM awaitly_workflow_lock").fetchall() == []


def at_two_gates(
    worker: Callable[..., Any], durable: Durable, tmp_path: Path, *arguments: str
) -> subprocess.Popen[str]:
    """Start two workers, each of which is in a workflow that waits; a third run is pending."""
    for id in ("a", "b"):
        os.mkfifo(tmp_path / id)
        durable.submit(id, durable.workflow(gated), id)
    durable.submit("c", durable.workflow(checkout), "ada")
    process = worker("--workers", "2", *arguments)
    for _ in range(2):
        assert process.stdout.readline() == "at the gate\n"
    return process


def test_workers_stop_after_the_current_workflows(
    worker: Callable[..., Any], durable: Durable, db: psycopg.Connection, tmp_path: Path
) -> None:
    """On a signal all that are in progress are finished, and no other is begun."""
    process = at_two_gates(worker, durable, tmp_path, "--loop", "1", "--verbose")
    process.send_signal(signal.SIGTERM)
    assert "stopping after the current workflow" in process.stderr.readline()
    for id in ("a", "b"):
        (tmp_path / id).write_text("open")
        assert process.stdout.readline() == f"completed  {id}\n"
    assert process.wait(PATIENCE) == 0
    assert statuses(db) == {"a": "completed", "b": "completed", "c": "running"}
    assert db.execute("SELECT * FROM awaitly_workflow_lock").fetchall() == []


def test_a_second_signal_stops_workers_at_once_and_frees_their_workflows(
    worker: Callable[..., Any], durable: Durable, db: psycopg.Connection, tmp_path: Path
) -> None:
    """Although Python cannot stop their threads, another process can go on with their runs."""
    process = at_two_gates(worker, durable, tmp_path)
    process.send_signal(signal.SIGINT)
    process.stderr.readline()
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=PATIENCE)
    assert (process.returncode, out, err) == (130, "", "")
    assert statuses(db) == dict.fromkeys("abc", "running")
    assert db.execute("SELECT * FROM awaitly_workflow_lock").fetchall() == []


def test_workers_take_no_ids(run: Run, durable: Durable) -> None:
    """Those that are given are resumed in their order."""
    durable.submit("a", durable.workflow(checkout), "ada")
    assert refused(run("resume", "flows:durable", "a", "--workers", "2"), "--workers")


def test_a_worker_takes_up_what_comes_later(
    worker: Callable[..., Any], durable: Durable, store: SnapshotStore
) -> None:
    """What is submitted while it runs is finished, too."""
    store.create_tables()
    process = worker("--loop", "0.1", "--verbose")
    for id in ("first", "second"):
        durable.submit(id, durable.workflow(checkout), "ada")
        assert process.stdout.readline().split()[:2] == ["completed", id]


def test_a_worker_stops_while_it_pauses(
    worker: Callable[..., Any], durable: Durable, db: psycopg.Connection, url: str
) -> None:
    """In a pause of an hour one signal is enough; the status is 0."""
    name = f"worker_{secrets.token_hex(6)}"
    durable.submit("first", durable.workflow(checkout), "ada")
    process = worker(
        "--loop", "3600", "--verbose", DATABASE_URL=make_conninfo(url, application_name=name)
    )
    assert process.stdout.readline().split()[:2] == ["completed", "first"]
    deadline = time.monotonic() + PATIENCE
    busy = (
        "SELECT 1 FROM pg_stat_activity WHERE application_name = %s "
        "AND (state <> 'idle' OR clock_timestamp() - state_change < interval '0.3 s')"
    )
    while db.execute(busy, [name]).fetchone():
        assert time.monotonic() < deadline
    process.send_signal(signal.SIGTERM)
    assert process.wait(PATIENCE) == 0


@pytest.fixture
def role(server: str) -> Iterator[str]:
    """A role of this test's own, that may log in with the password "pw"."""
    name = f"worker_{secrets.token_hex(6)}"
    with psycopg.connect(server, autocommit=True) as admin:
        admin.execute(f"CREATE ROLE {name} LOGIN SUPERUSER PASSWORD 'pw'")
        yield name
        admin.execute(f"DROP ROLE {name}")


def test_a_worker_outlives_an_outage(
    worker: Callable[..., Any], durable: Durable, db: psycopg.Connection, url: str, role: str
) -> None:
    """While it cannot connect a worker says so, and afterwards it goes on."""
    durable.submit("first", durable.workflow(checkout), "ada")
    address = make_conninfo(url, user=role, password="pw")  # noqa: S106
    process = worker("--loop", "0.1", "--verbose", DATABASE_URL=address, RETRY_FOR="3")
    assert process.stdout.readline().split()[:2] == ["completed", "first"]
    db.execute(f"ALTER ROLE {role} NOLOGIN")
    db.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = %s", [role])
    assert "trying again" in process.stderr.readline()
    durable.submit("second", durable.workflow(checkout), "ada")
    db.execute(f"ALTER ROLE {role} LOGIN")
    assert process.stdout.readline().split()[:2] == ["completed", "second"]
    process.send_signal(signal.SIGTERM)
    assert process.wait(PATIENCE) == 0


def test_a_worker_that_starts_during_an_outage_waits_for_its_end(
    worker: Callable[..., Any], durable: Durable, db: psycopg.Connection, url: str, role: str
) -> None:
    """As after a restart of the machine, where the database may come up later."""
    durable.submit("first", durable.workflow(checkout), "ada")
    db.execute(f"ALTER ROLE {role} NOLOGIN")
    address = make_conninfo(url, user=role, password="pw")  # noqa: S106
    process = worker("--loop", "0.1", "--verbose", DATABASE_URL=address, RETRY_FOR="0.1")
    assert "trying again in 0.1 s" in process.stderr.readline()
    db.execute(f"ALTER ROLE {role} LOGIN")
    assert process.stdout.readline().split()[:2] == ["completed", "first"]
    process.send_signal(signal.SIGTERM)
    assert process.wait(PATIENCE) == 0


@pytest.mark.parametrize("loop", [[], ["--loop", "1"]], ids=str)
def test_a_malformed_address_is_wrong_input_for_a_worker(run: Run, loop: list[str]) -> None:
    """No outage ends that, so a loop does not wait for it either."""
    done = run("resume", "flows:durable", *loop, DATABASE_URL="postgresql://a@b:port/db")
    assert refused(done, "malformed")


# -- signal, cancel, unlock ----------------------------------------------------------------


@pytest.mark.parametrize("value", ['{"by": ["é", 1.5]}', "null"])
def test_signal_answers_a_wait(run: Run, durable: Durable, value: str) -> None:
    """The value arrives in the workflow as the JSON that was typed; a second one is refused."""

    @durable.workflow
    def waiting(step: Step) -> Any:
        return step.wait("approval")

    with pytest.raises(WorkflowSuspended):
        durable.run("a", waiting)
    answered = run("signal", "a", "approval", value)
    assert (answered.returncode, answered.stdout, answered.stderr) == (0, "accepted\n", "")
    second = run("signal", "a", "approval", "2")
    assert (second.returncode, "already" in second.stderr) == (1, True)
    assert durable.resume("a") == json.loads(value)
    ended = run("signal", "a", "approval", "3")
    assert (ended.returncode, "is completed" in ended.stderr) == (1, True)


def test_a_signal_that_nobody_waits_for_says_so(run: Run, durable: Durable) -> None:
    """It is accepted all the same, since the run may come to that wait; a misspelt key shows."""

    @durable.workflow
    def waiting(step: Step) -> Any:
        return step.wait("approval")

    with pytest.raises(WorkflowSuspended):
        durable.run("a", waiting)
    durable.submit("b", waiting)
    for id, why in (("a", "waiting for approval"), ("b", "pending")):
        done = run("signal", id, "aproval", "1")
        assert (done.returncode, done.stdout) == (0, "")
        assert done.stderr == f"accepted, but {id!r} is not waiting for 'aproval': it is {why}\n"


def test_cancel_ends_a_workflow_for_good(
    run: Run, durable: Durable, db: psycopg.Connection
) -> None:
    """A cancelled workflow is not resumed; a completed one cannot be cancelled."""
    durable.submit("a", durable.workflow(checkout), "ada")
    durable.run("b", checkout, "ada")
    assert run("cancel", "a").returncode == 0
    assert run("resume", "flows:durable").stdout == ""
    assert statuses(db)["a"] == "failed"
    assert run("cancel", "b").returncode == 1
    assert statuses(db)["b"] == "completed"


@pytest.mark.parametrize(("answer", "status"), [("n", 1), ("y", 0)])
def test_unlock_asks_first(
    terminal: Callable[..., Terminal], store: SnapshotStore, answer: str, status: int
) -> None:
    """It names the holder; only after a yes has it lost the lease."""
    store.save("a", snapshot(1, "running"))
    held = store.try_acquire("a", ttl=600)
    screen = terminal("unlock", "a", columns=200)
    screen.read_until("[y/N]")
    assert held.token.rpartition(":")[0] in screen.text
    assert held.held()
    screen.type(answer + "\n")
    assert screen.end() == status
    assert held.held() is (answer == "n")


def test_unlock_needs_a_yes_where_nobody_can_be_asked(run: Run, store: SnapshotStore) -> None:
    """In a pipe nothing happens without --yes; with it, the old holder writes no more."""
    store.save("a", snapshot(1, "running"))
    held = store.try_acquire("a", ttl=600)
    assert run("unlock", "a").returncode == 1
    assert held.held()
    assert run("unlock", "a", "--yes").returncode == 0
    with pytest.raises(LeaseLost):
        store.save("a", snapshot(), lease=held)


# -- what goes wrong -----------------------------------------------------------------------


@pytest.mark.parametrize("command", ["resume", "check"])
@pytest.mark.parametrize(
    "place",
    [
        ["--url", "postgresql://127.0.0.1:1/x"],
        ["--schema", "s"],
        ["--table", "t"],
        ["--lock-table", "t"],
        ["--no-journal"],
    ],
    ids=str,
)
def test_a_place_is_refused_by_commands_that_use_the_store_of_the_durable(
    run: Run, durable: Durable, place: list[str], command: str
) -> None:
    """Ignored, it would let them work on another database than the one that was named."""
    durable.submit("a", durable.workflow(checkout), "ada")
    assert refused(run(*place, command, "flows:durable"), place[0], "the store of MODULE:DURABLE")
    assert durable.get("a").state == "pending"


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["prune", "--older-than", "3x"], "duration"),
        (["prune", "--older-than", "1d2"], "duration"),
        (["prune", "--older-than", "9" * 30 + "d"], "too long"),
        (["prune"], "--older-than"),
        (["list", "--limit", "0"], "--limit"),
        (["list", "--state", "done"], "--state"),
        (["list", "--status", "done"], "--status"),
        (["prune", "--older-than", "1d", "--status", "done"], "--status"),
        (["list", "--table", "a-b"], "a-b"),
        (["list", "--schema", "no_such_schema"], "init"),
        (["show", "nope"], "nope"),
        (["show", ""], "empty"),
        (["show", "x" * 2000], "bytes"),
        (["cancel", "nope"], "nope"),
        (["unlock", "nope", "--yes"], "nope"),
        (["signal", "nope", "key", "1"], "nope"),
        (["signal", "a", "key", "yes"], "quotes"),
        (["signal", "a", "key", "NaN"], "JSON"),
        (["resume", "flows"], "package.module:durable"),
        (["resume", "no_such_module:durable"], "no_such_module"),
        (["resume", "flows:nope"], "nope"),
        (["resume", "flows:not_a_durable"], "'flows:not_a_durable' is str, not a Durable"),
        (["resume", "broken:durable"], "broken.py:2"),
        (["resume", "flows:durable", "a", "--loop", "1"], "--loop"),
        (["watch"], "terminal"),
        (["frobnicate"], "frobnicate"),
    ],
    ids=lambda value: " ".join(value)[:40] if isinstance(value, list) else "",
)
def test_wrong_input_is_a_message_and_2(
    run: Run, store: SnapshotStore, tmp_path: Path, arguments: list[str], word: str
) -> None:
    """It says on stderr what is wrong, and changes nothing."""
    store.save("a", snapshot(1, "running", workflow="w"))
    (tmp_path / "broken.py").write_text("# broken\nraise RuntimeError('no settings')\n")
    before = store.load("a")
    assert refused(run(*arguments), word)
    assert store.load("a") == before


def test_a_missing_address_is_told(run: Run) -> None:
    """Without --url and $DATABASE_URL it names both."""
    assert refused(run("list", DATABASE_URL=None), "--url", "$DATABASE_URL")


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize(
    "address",
    [
        "postgresql+psycopg://ada:sekret@127.0.0.1/db",
        "postgresql://ada:sekret@127.0.0.1:port/db",
        "host=127.0.0.1 password=sekret user='ada",
        "postgresql://ada:sekret@127.0.0.1:1/db",
    ],
)
def test_an_address_that_does_not_connect_is_refused_without_the_password(
    run: Run, address: str
) -> None:
    """Malformed or unreachable, the address is wrong input, and its password stays secret."""
    done = run("list", "--url", address)
    assert refused(done)
    assert "sekret" not in done.stderr


@pytest.mark.usefixtures("impatient")
def test_a_role_that_may_not_enter_is_refused_without_the_password(run: Run, url: str) -> None:
    """Credentials that the server does not take are wrong input, and stay secret."""
    address = make_conninfo(url, user="nobody_of_that_name", password="sekret")  # noqa: S106
    done = run("list", "--url", address)
    assert refused(done, "nobody_of_that_name")
    assert "sekret" not in done.stderr


def test_a_row_that_is_no_snapshot_is_a_message_and_1(
    run: Run, store: SnapshotStore, db: psycopg.Connection
) -> None:
    """It is listed all the same; showing it names the fault."""
    store.create_tables()
    db.execute("""INSERT INTO awaitly_snapshots VALUES ('odd', '{"steps": 7}', now())""")
    db.execute("""INSERT INTO awaitly_snapshots VALUES ('odder', '"text"', NULL)""")
    listed = json.loads(run("list", "--json").stdout)
    assert {(row["id"], row["step_count"]) for row in listed} == {("odd", 0), ("odder", 0)}
    done = run("show", "odd")
    assert done.returncode == 1
    assert "steps must be an object" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("missing", ["click", "rich"])
@pytest.mark.parametrize("command", [[EXECUTABLE], [sys.executable, "-m", "awaitly_postgres"]])
def test_without_the_extra_one_line_says_what_to_install(
    tmp_path: Path, command: list[str], missing: str
) -> None:
    """Where click or rich is not installed, it prints that line and exits with 1."""
    (tmp_path / f"{missing}.py").write_text(
        f"raise ModuleNotFoundError('No module named {missing}', name={missing!r})"
    )
    done = subprocess.run(
        [*command, "list"],
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        encoding="utf-8",
        timeout=PATIENCE,
        check=False,
    )
    assert (done.returncode, done.stdout) == (1, "")
    (line,) = done.stderr.splitlines()
    assert "pip install 'awaitly-postgres[cli]'" in line


def test_the_module_is_the_command(run: Run, environment: dict[str, str]) -> None:
    """``python -m awaitly_postgres`` prints the same help under the same name."""
    command = [sys.executable, "-m", "awaitly_postgres", "--help"]
    done = subprocess.run(
        command,
        env=environment,
        capture_output=True,
        encoding="utf-8",
        timeout=PATIENCE,
        check=True,
    )
    assert done.stdout == run("--help").stdout
    assert done.stdout.startswith("Usage: awaitly-postgres ")


def test_the_help_cuts_no_description_of_a_command(run: Run) -> None:
    """Each fits into its line."""
    listed = run("--help").stdout.partition("Commands:\n")[2].splitlines()
    assert len(listed) == 15
    assert [line for line in listed if not line.endswith(".") or line.endswith("...")] == []


def test_a_reader_that_goes_away_is_no_trouble(
    environment: dict[str, str], store: SnapshotStore, db: psycopg.Connection
) -> None:
    """``awaitly-postgres list | head -1`` ends quietly."""
    store.save("a", snapshot())
    db.execute(
        "INSERT INTO awaitly_snapshots SELECT repeat('b', 200) || n, snapshot, now() "
        "FROM awaitly_snapshots, generate_series(1, 2000) AS n"
    )
    listing = subprocess.Popen(
        [EXECUTABLE, "list", "--limit", "2000"],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    with listing:
        assert listing.stdout.readline().startswith(b"ID")
        listing.stdout.close()
        assert listing.stderr.read() == b""
