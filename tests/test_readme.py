"""The documentation is true: its code runs, its SQL works, its commands and links lead somewhere.

Every Markdown file of the project is a page: the README, and the chapters that are kept beside
what they describe.
"""

from __future__ import annotations

import importlib.util
import inspect
import json
import logging
import re
import shlex
import shutil
import sys
from pathlib import Path
from typing import Any

import psycopg
import pytest
from attrs import fields, frozen
from click.testing import CliRunner
from django.core.management import get_commands

import awaitly_postgres
from awaitly_postgres import (
    AwaitlyError,
    Durable,
    SnapshotStore,
    Step,
    postgres,
    validate_snapshot,
)
from awaitly_postgres.cli import cli
from tests.support import ROOT

PAGES = {
    path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
    for folder in ("*", ".github/*", "awaitly_postgres/**/*", "examples/**/*", "tests/**/*")
    for path in sorted(ROOT.glob(f"{folder}.md"))
}
README = PAGES["README.md"]
DJANGO = "awaitly_postgres/contrib/django/README.md"
CLI = "awaitly_postgres/cli/README.md"
FORMAT = "awaitly_postgres/store/README.md"
CHAPTERS = (
    DJANGO,
    CLI,
    FORMAT,
    "examples/README.md",
    "tests/benchmark/README.md",
    ".github/CONTRIBUTING.md",
)
SHOP = ROOT / "examples" / "django_shop"

# What its reader would do with what a section defines: send requests, run pytest.
AFTERWARDS = {
    "Flask": """
client, url = app.test_client(), "/checkouts/00000000-0000-0000-0000-000000000007"
answers = [client.post(url, data={"item": item}) for item in ("tea", "tea", "pot")]
assert [answer.status_code for answer in answers] == [200, 200, 422]
assert answers[1].json == {"item": "tea"}
with store.lock("checkout:00000000-0000-0000-0000-000000000008"):
    assert client.post(url[:-1] + "8", data={"item": "tea"}).status_code == 409
""",
    "Recipes": """
import threading
from concurrent.futures import TimeoutError

from awaitly_postgres import WorkflowSuspended

with pytest.MonkeyPatch.context() as monkeypatch:
    test_declined_card_is_charged_again_later(monkeypatch)

gate = threading.Event()
with pytest.raises(TimeoutError):
    within(0.01, gate.wait)
gate.set()

observe(Event("step_failed", "checkout", None, "charge-card", 0.5, ValueError("no")))


class Span(trace.NonRecordingSpan):
    def __init__(self, name):
        super().__init__(trace.INVALID_SPAN_CONTEXT)
        self.name, self.parent = name, getattr(trace.get_current_span(), "name", None)
        self.errors, self.ended = [], False
        made.append(self)

    def record_exception(self, error, *_, **__):
        self.errors.append(error)

    def end(self, *_):
        self.ended = True


class tracer:
    start_span = Span


def nested(step):
    step("outer", lambda: Workflow(inner, on_event=observe)())
    with pytest.raises(LookupError):
        step("fails", {}.__getitem__, "no")
    step.wait("go")


def inner(step):
    step("inside", lambda: tracer.start_span("request").end())


made = []
with pytest.raises(WorkflowSuspended):
    Workflow(nested, on_event=observe)()
assert [(span.name, span.parent) for span in made] == [
    ("nested", None),
    ("outer", "nested"),
    ("inner", "outer"),
    ("inside", "inner"),
    ("request", "inside"),
    ("fails", "nested"),
    ("go", "nested"),
]
assert all(span.ended for span in made)
assert spans.open == []
assert trace.get_current_span() is trace.INVALID_SPAN

# A deploy changes the size of the batches while the import is going on.
store._db.count(b"DELETE FROM imported WHERE row >= 200", {})
durable.rewind("import-7", "from-200")
BATCH = 20
assert durable.resume("import-7") == 250
assert store._db.rows(b"SELECT count(*)::int FROM imported", {}) == [(250,)]
assert durable.get("import-7").step_count == 5

# Several hosts, one report.
def report_here(_):
    return report_of(date(2026, 11, 23))

mailed = []
durable.on_event = lambda event: mailed.append(event.type)
with ThreadPoolExecutor(4) as hosts:
    found = set(hosts.map(report_here, range(8)))
assert found - {None} == {"report of 2026-11-23: 10 rows"}
assert mailed.count("step_completed") == 2
""",
}


@frozen
class Block:
    """A fenced block: its language and text, and the page, section and line where it begins."""

    language: str
    text: str
    page: str
    section: str
    line: int


def fenced_blocks(page: str) -> list[Block]:
    """Return every fenced block of a page in order."""
    blocks = []
    for match in re.finditer(r"^```(\w*)\n(.*?)^```$", PAGES[page], re.M | re.S):
        headings = re.findall(r"^## (.+)$", PAGES[page][: match.start()], re.M)
        line = PAGES[page].count("\n", 0, match.start(2)) + 1
        blocks.append(Block(match[1], match[2], page, headings[-1] if headings else "top", line))
    return blocks


BLOCKS = [block for page in PAGES for block in fenced_blocks(page)]


def blocks_in(language: str) -> list[Block]:
    """Return the blocks of one language."""
    return [block for block in BLOCKS if block.language == language]


def commands() -> list[list[str]]:
    """Return the words of every command that a page tells its reader to type."""
    text = "".join(block.text for block in blocks_in("console"))
    lines = re.findall(r"^\$ (.+)$", text, re.M)
    assert len(lines) == len(text.splitlines()), "a console block has more than commands in it"
    for block in blocks_in("crontab"):
        lines += re.findall(r"^(?:\S+ +){5}(.+)$", block.text, re.M)
    split = [shlex.split(command) for line in lines for command in line.split(" && ")]
    return [words[words[0].startswith("DATABASE_URL=") :] for words in split]


def test_every_block_is_of_a_kind_that_is_tested() -> None:
    """No block escapes the tests below by its language."""
    assert "".join(PAGES.values()).count("```") == 2 * len(BLOCKS)
    assert {b.language for b in BLOCKS} == {"python", "sql", "json", "console", "crontab", "text"}


# The Django page's Python is run by tests/contrib/test_fresh_project.py.
SECTIONS = dict.fromkeys((b.page, b.section) for b in blocks_in("python") if b.page != DJANGO)


@pytest.mark.parametrize(("page", "section"), SECTIONS)
def test_python_runs(page: str, section: str, url: str, caplog: pytest.LogCaptureFixture) -> None:
    """The blocks of a section run in order, and each ``expression  # -> value`` is so."""
    blocks = [b for b in blocks_in("python") if (b.page, b.section) == (page, section)]
    code = source(blocks, url) + AFTERWARDS.get(section, "")
    namespace: dict[str, Any] = {"__name__": "readme", "is_": is_}
    try:
        exec(compile(code, page, "exec", dont_inherit=True), namespace)  # noqa: S102
    finally:
        for value in namespace.values():
            if isinstance(value, SnapshotStore):
                value.close()
    # Errors in on_event are logged, not raised.
    assert [record for record in caplog.records if record.levelno >= logging.ERROR] == []


def source(blocks: list[Block], url: str) -> str:
    """Return the Python of blocks of one page, each line where it is on the page."""
    code = ""
    for block in blocks:
        code += "\n" * (block.line - 1 - code.count("\n")) + block.text
    code = re.sub(r'"(postgresql://[^"]*|embedded)"', lambda _: repr(url), code)
    return re.sub(r"^( *)(\S.*?)  # -> (.+)$", r"\1is_(\2, \3)", code, flags=re.M)


def is_(actual: object, expected: object) -> None:
    """Stand for ``actual  # -> expected`` in a block."""
    assert actual == expected


def test_schema_is_the_one_that_is_made(store: SnapshotStore) -> None:
    """The DDL on the page is the DDL that the store would run."""
    assert store.ddl() in [block.text for block in blocks_in("sql")]


# What Citus asks of these calls: the column is in the primary key, and tables that lie together
# have the same type and collation there.
CITUS = """
CREATE FUNCTION create_distributed_table(
    regclass, text, colocate_with text DEFAULT NULL, shard_count int DEFAULT NULL)
RETURNS boolean LANGUAGE sql AS $$
  SELECT attnum = ANY (SELECT unnest(conkey) FROM pg_constraint
                       WHERE conrelid = $1 AND contype = 'p')
     AND ($3 IS NULL OR $3 = 'none' AND $4 <> 32 OR (atttypid, attcollation) = (
         SELECT atttypid, attcollation FROM pg_attribute
         WHERE attrelid = $3::regclass AND attname = 'id'))
  FROM pg_attribute WHERE attrelid = $1 AND attname = $2
$$"""


def test_sql_finds_something(
    durable: Durable, store: SnapshotStore, db: psycopg.Connection
) -> None:
    """Each query on the page has an answer where runs are completed, failed and under way."""

    def checkout(step: Step, divisor: int) -> float:
        return step("divide", lambda: 1 / divisor)

    durable.run("checkout-123", checkout, 2)
    with pytest.raises(ZeroDivisionError):
        durable.run("checkout-124", checkout, 0)
    db.execute(CITUS)
    statements = [s for block in blocks_in("sql") for s in block.text.split(";\n") if s.strip()]
    with store.lock("checkout-125"):
        answers = [db.execute(statement) for statement in statements]
    found = [cursor.fetchall() for cursor in answers if cursor.description]
    assert len(found) == 8
    assert all(found)
    assert [(False,)] not in found, "Citus would refuse this"


def test_snapshot_on_the_page_is_valid() -> None:
    """The JSON example is a snapshot, and its metadata and meta are those the tables explain."""
    (block,) = blocks_in("json")
    document = json.loads(block.text)
    assert validate_snapshot(document) == []
    for name in document["metadata"]:
        assert f"`{name}`" in PAGES[FORMAT]


@pytest.mark.parametrize("command", commands(), ids=shlex.join)
def test_command_exists(command: list[str]) -> None:
    """The program is there or comes with an extra; what is handed to it exists."""
    program, *words = command
    name = Path(program).name
    if name in ("cd", "export"):
        return  # of the shell
    if name == "pre-commit":
        return  # installed by the same line
    assert (
        Path(sys.executable).with_name(name).exists()
        or shutil.which(name)
        or importlib.util.find_spec(name)
        or (ROOT / program).exists()
    )
    if name == "awaitly-postgres":
        given = cli.commands[words[0]].params + cli.params
        options = {option for parameter in given for option in parameter.opts}
        assert {word for word in words if word.startswith("--")} <= options
    elif name == "gunicorn":
        module, _, attribute = words[-1].partition(":")
        assert hasattr(example(module), attribute)
    elif name == "flask":
        assert words[-1] in example(words[words.index("--app") + 1]).app.cli.commands
    elif words[:1] == ["manage.py"]:
        ours = ROOT / "awaitly_postgres/contrib/django/management/commands" / f"{words[1]}.py"
        assert (SHOP / "manage.py").exists()
        # Uncached: other tests of this process may set Django up with more commands.
        assert ours.exists() or words[1] in get_commands.__wrapped__()
    elif words[:1] == ["-m"] and words[1].startswith("tests."):
        module = ROOT.joinpath(*words[1].split("."), "__main__.py").read_text(encoding="utf-8")
        assert all(f'"{word}"' in module for word in words if word.startswith("--"))
    elif words and words[0].endswith(".py"):
        assert (ROOT / words[0]).exists() or (ROOT / "examples" / words[0]).exists()


def test_pre_commit_runs_the_linters_of_ci() -> None:
    """What passes the hooks passes `.ci/run`, as far as linters go."""
    hooks = (ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8")
    linters = re.findall(r"^\.venv/bin/(.+)$", (ROOT / ".ci/run").read_text("utf-8"), re.M)
    assert re.findall(r"entry: \.venv/bin/(.+)$", hooks, re.M) == [
        linter.removesuffix(" --check") for linter in linters
    ]


def test_the_map_of_the_package_leads_somewhere() -> None:
    """Each name in "Where to change what" is found where the table says."""
    page = PAGES[".github/CONTRIBUTING.md"]
    section = page.partition("\n## Where to change what\n")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| .+? \| (`.+`) \| `(.+)` \|$", section, re.M)
    assert len(rows) == 13
    for names, where in rows:
        place = ROOT / "awaitly_postgres" / where
        files = [place] if place.is_file() else [*place.rglob("*.py"), *place.rglob("*.sql")]
        code = "".join(file.read_text(encoding="utf-8") for file in files)
        assert [name for name in re.findall(r"`(.+?)`", names) if name not in code] == []


def example(name: str) -> Any:
    """Import a file of the examples; none of them connects by that."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "examples" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_command_line_is_explained() -> None:
    """Each command has its place in the table."""
    table = " ".join(re.findall(r"^\| (`.+?) \|", PAGES[CLI], re.M))
    assert set(re.findall(r"`([a-z]+)", table)) == set(cli.commands)


def test_output_on_the_page_is_what_is_printed(durable: Durable, url: str) -> None:
    """The columns of `list`, and the lines above the timeline of `show`."""

    def checkout(step: Step, order: str) -> None:
        step("fetch-user", str.upper, order)
        step("charge-card", int, order)

    with pytest.raises(ValueError, match="invalid literal"):
        durable.run("checkout-125", checkout, "125x")
    listing, timeline = (block.text for block in blocks_in("text"))

    def printed(*arguments: str) -> str:
        run = CliRunner().invoke(cli, ["--url", url, *arguments], catch_exceptions=False)
        assert run.exit_code == 0
        return run.stdout

    assert printed("list").split("\n")[0].split() == listing.split("\n")[0].split()

    labels = re.compile(r"^(\w+) {2}|^([✓✗] charge-card) {2}", re.M)
    assert labels.findall(printed("show", "checkout-125")) == labels.findall(timeline) != []


def test_links_lead_somewhere() -> None:
    """Links are to files of this project, to headings in them, or to the web."""
    for page, text in PAGES.items():
        for target in re.findall(r"\]\(([^)]+)\)", text):
            if target.startswith("https://"):
                continue
            file, _, anchor = target.partition("#")
            found = (ROOT / page).parent.joinpath(file).resolve() if file else ROOT / page
            assert found.exists(), f"{page}: {target}"
            if anchor:
                assert anchor in anchors(PAGES[found.relative_to(ROOT).as_posix()]), target


def anchors(text: str) -> set[str]:
    """Return what the headings of a page are linked by."""
    headings = re.findall(r"^#+ (.+)$", text, re.M)
    return {re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("chapter", CHAPTERS)
def test_readme_leads_to_the_chapters(chapter: str) -> None:
    """Whoever reads the README alone finds every chapter that is kept elsewhere."""
    assert f"]({chapter}" in README


def test_errors_table_is_the_tree() -> None:
    """Each error has its line, under the one that it is a kind of."""
    listed = re.findall(r"^\| (· )?`(\w+)` \|", README.partition("\n## Errors\n")[2], re.M)
    public = [getattr(awaitly_postgres, name) for name in awaitly_postgres.__all__]
    errors = {kind for kind in public if isinstance(kind, type) and issubclass(kind, AwaitlyError)}
    assert {name for _, name in listed} == {kind.__name__ for kind in errors - {AwaitlyError}}
    parent = AwaitlyError
    for dot, name in listed:
        kind = getattr(awaitly_postgres, name)
        parent = parent if dot else AwaitlyError
        assert kind.__base__ is parent
        parent = parent if dot else kind


def test_every_public_name_is_explained() -> None:
    """What can be imported, called or set is in the README, or on the store's page."""
    text = README + PAGES[FORMAT]
    missing = [name for name in awaitly_postgres.__all__ if not re.search(rf"\b{name}\b", text)]
    for kind in (SnapshotStore, Durable):
        methods = {name for name, _ in inspect.getmembers(kind, inspect.isfunction)}
        public = {name for name in methods if not name.startswith("_")} - {"key"}
        missing += [f"{kind.__name__}.{name}" for name in public if f"`{name}(" not in text]
    options = set(inspect.signature(postgres).parameters)
    options |= {field.name for field in fields(Durable) if field.init and field.kw_only}
    missing += [name for name in options if f"`{name}`" not in README]
    assert missing == []
