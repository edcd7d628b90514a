"""The admin of the Django app: the list, the page of one run, and what can be done there."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import suppress
from html import unescape
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from awaitly_postgres import Durable, Step
from tests.chromium import chromium
from tests.contrib.project import PAST, SHOP, order
from tests.support import eventually

DECLINED = "purchase_2Fdeclined%20_26%20odd"  # as the admin writes "purchase/declined & odd"


def a_bit_of_everything(shop: SimpleNamespace) -> None:
    """Store a workflow in each state, and rows that others have made or broken."""
    durable = Durable(shop.workflows.durable.store, metadata={"tenant": "acme"})

    def purchase(step: Step, item: str, quantity: int = 1) -> dict[str, Any]:
        step("reserve-stock", gate(0.02), item)
        step("charge-card", gate(0.09), quantity)
        step("send-receipt", gate(0.03), "<script>document.title = 'owned'</script>")
        return {"item": item, "quantity": quantity, "receipt": "sent"}

    def gate(seconds: float) -> Callable[[object], object]:
        def body(value: object) -> object:
            shop.db.execute("SELECT pg_sleep(%s)", (seconds,))
            return value

        return body

    def decline(step: Step) -> None:
        step("reserve-stock", gate(0.05), "teapot")
        try:
            step("check-limit", lambda: {}["limit"])
        except KeyError:
            step("charge-card", charge)

    def charge() -> None:
        try:
            raise ConnectionError("the bank hung up")
        except ConnectionError as error:
            raise ValueError("card declined") from error

    durable.run("purchase-1", purchase, "tea", quantity=2)
    with pytest.raises(ValueError, match="card declined"):
        durable.run("purchase/declined & odd", decline)
    durable.submit("purchase-submitted", durable.workflow(purchase), "cosy")
    with pytest.raises(Exception, match="suspended"):
        durable.run("purchase-suspended", lambda step: step.wait("approval"))
    durable.submit("purchase-cancelled", durable.workflow(purchase), "tea")
    durable.cancel("purchase-cancelled")
    gave_up = {"workflow": "purchase", "gaveUpAt": PAST, "attempts": 8}
    execution = {"status": "failed", "lastUpdated": PAST}
    given_up = {"formatVersion": 1, "steps": {}, "execution": execution, "metadata": gave_up}
    durable.store.save("purchase-given-up", given_up)
    durable.store.try_acquire("purchase-running", ttl=600)
    durable.submit("purchase-running", durable.workflow(purchase), "tea")
    resume_state = '{"kind": "ResumeState", "steps": [["a", {"ok": true, "value": 1}]]}'
    for id, snapshot in (("node", resume_state), ("broken", '{"metadata": [1]}'), ("null", "null")):
        shop.db.execute("INSERT INTO awaitly_snapshots VALUES (%s, %s)", (id, snapshot))


def listed(admin: Any, query: str = "") -> dict[str, list[str]]:
    """Return what the list tells of each workflow: its name, steps, age, state and lease."""
    html = admin.get(f"/admin/awaitly/workflow/?{query}").content.decode()
    rows = re.findall(r"<th class=\"field-id.*?</tr>", html, re.S)
    texts = [re.findall(r">([^<>]+)</(?:a|span|small|td)>", row) for row in rows]
    return {unescape(id): rest for id, *rest in texts}


def test_the_list_tells_where_each_workflow_stands(shop: SimpleNamespace, admin: Any) -> None:
    """State, steps, and what comes next; whatever else is in the table does not break the page."""
    a_bit_of_everything(shop)
    page = listed(admin)
    assert {id: (texts[3], texts[1]) for id, texts in page.items()} == {
        "purchase-1": ("completed", "3"),
        "purchase/declined & odd": ("retrying", "3"),
        "purchase-submitted": ("pending", "0"),
        "purchase-suspended": ("waiting", "0"),
        "purchase-cancelled": ("cancelled", "0"),
        "purchase-given-up": ("failed", "0"),
        "purchase-running": ("running", "0"),
        "node": ("pending", "1"),
        "broken": ("pending", "0"),
        "null": ("pending", "0"),
    }
    assert page["purchase-running"][4] == f"held by {socket.gethostname()}:{os.getpid()}"
    assert page["purchase-submitted"][4] == "due"
    assert page["purchase-suspended"][4] == "waits for approval"
    assert [len(page[id]) for id in ("purchase-1", "purchase-given-up", "node")] == [4, 4, 4]


def test_the_list_is_filtered_and_searched(shop: SimpleNamespace, admin: Any) -> None:
    """By state, and by a part of the id, the workflow or the metadata, or exact metadata."""
    a_bit_of_everything(shop)
    for query, ids in (
        ("state=pending", {"purchase-submitted", "node", "broken", "null"}),
        ("state=running", {"purchase-running"}),
        ("state=waiting", {"purchase-suspended"}),
        ("state=retrying", {"purchase/declined & odd"}),
        ("state=completed", {"purchase-1"}),
        ("state=failed", {"purchase-given-up"}),
        ("state=cancelled", {"purchase-cancelled"}),
        ("q=declined", {"purchase/declined & odd"}),
        ("q=SUB&state=pending", {"purchase-submitted"}),
        ("q=DECLINE", {"purchase/declined & odd"}),
        ("q=lambda", {"purchase-suspended"}),
        ("q=acme+submitted", {"purchase-submitted"}),
        ("q=tenant%3Dacme&state=waiting", {"purchase-suspended"}),
        ("q=tenant%3Dacm", set()),
        ("q=attempts%3D8", {"purchase-given-up"}),
        ("q=%22declined+%26%22", {"purchase/declined & odd"}),
        ("q=%25", set()),
        ("q=tenant%3DNaN", set()),
    ):
        assert set(listed(admin, query)) == ids, query


def test_the_list_leaves_the_snapshots_in_the_database(shop: SimpleNamespace, admin: Any) -> None:
    """A page of workflows of megabytes each is as small as any other."""
    from django.db import connection
    from django.test.utils import CaptureQueriesContext

    a_bit_of_everything(shop)
    with CaptureQueriesContext(connection) as queries:
        admin.get("/admin/awaitly/workflow/?state=pending&q=purchase")
    selected = [q["sql"].partition(' FROM "awaitly_snapshots"')[::2] for q in queries]
    assert [columns for columns, rest in selected if rest]
    assert not [columns for columns, rest in selected if rest and '"snapshot"' in columns]


def test_one_workflow_is_shown_with_all_that_is_stored(shop: SimpleNamespace, admin: Any) -> None:
    """Metadata, input, result, steps, and a failure with its cause and traceback; escaped."""
    a_bit_of_everything(shop)
    bought = admin.get("/admin/awaitly/workflow/purchase-1/change/").content.decode()
    for text in (
        "&quot;tenant&quot;: &quot;acme&quot;",
        "&quot;quantity&quot;: 2",
        "&quot;receipt&quot;: &quot;sent&quot;",
        "charge-card",
    ):
        assert text in bought
    assert "&lt;script&gt;document.title" in bought
    assert "<script>document.title" not in bought
    assert bought.count("<rect ") == 3
    declined = admin.get(f"/admin/awaitly/workflow/{DECLINED}/change/")
    told = declined.content.decode()
    assert "ValueError: card declined" in told
    assert "caused by ConnectionError: the bank hung up" in told
    assert "KeyError: &#x27;limit&#x27;" in told
    assert "raise ConnectionError(&quot;the bank hung up&quot;)" in told
    assert "ValueError: card declined\n</pre>" in told
    broken = admin.get("/admin/awaitly/workflow/broken/change/").content.decode()
    assert "Not a valid snapshot: formatVersion is missing" in broken
    gone = admin.get("/admin/awaitly/workflow/no-such/change/")
    assert gone.status_code == 404


def test_of_a_long_run_the_telling_steps_are_shown(shop: SimpleNamespace, admin: Any) -> None:
    """Of 10,000 steps those at both ends and the failed one, with how many are left out between."""
    steps: dict[str, Any] = {f"step-{i:04}": {"ok": True, "value": i} for i in range(10_000)}
    steps["step-1500"] = {"ok": False, "error": "NOT_FOUND", "cause": None}
    execution = {"status": "running", "lastUpdated": "2026-01-01T00:00:00.000Z"}
    document = {"formatVersion": 1, "steps": steps, "execution": execution}
    shop.workflows.durable.store.save("long", document)
    html = admin.get("/admin/awaitly/workflow/long/change/").content.decode()
    shown = set(re.findall(r'class="key" title="(.*?)"', html))
    assert {"step-0000", "step-1500", "step-9999"} <= shown
    assert len(shown) < 60
    hidden = [int(n) for n in re.findall(r">(\d+) more<", html)]
    assert sum(hidden) + len(shown) == 10_000
    assert "<p>&quot;NOT_FOUND&quot;</p>" in html
    assert len(html) < 50_000


@pytest.mark.parametrize("fails", [False, True])
def test_a_long_map_is_one_entry_and_its_last_failures(
    shop: SimpleNamespace, admin: Any, fails: bool
) -> None:
    """Of 10,000 items, however many of them have failed."""
    durable = Durable(shop.workflows.durable.store)

    def resize(nr: int) -> str:
        if fails and nr % 2:
            raise ValueError(f"number {nr}")
        return "x" * 100

    with suppress(ValueError):
        durable.run("long", lambda step: len(step.map("resize", resize, range(10_000))))
    html = admin.get("/admin/awaitly/workflow/long/change/").content.decode()
    shown = re.findall(r'class="key" title="(.*?)"', html)
    assert ("resize 5000/10000" if fails else "resize 10000/10000") in shown
    assert "resize[9999]" in shown or not fails
    assert len(shown) < (60 if fails else 2)
    assert "<h2>10000 steps</h2>" in html
    assert len(html) < 50_000


def test_a_running_workflow_has_a_current_step(shop: SimpleNamespace, admin: Any) -> None:
    """The one after the last recorded, whose key nobody knows yet."""
    durable = Durable(shop.workflows.durable.store)

    def page() -> str:
        html = admin.get("/admin/awaitly/workflow/here/change/").content.decode()
        (text,) = re.findall(r"<dt>Current step</dt><dd>(.*?)</dd>", html)
        return text

    def work(step: Step) -> list[str]:
        return [step("one", page), step("two", page)]

    assert durable.run("here", work) == ["the first", "the one after one"]


def test_an_id_that_is_none_here_has_a_page_all_the_same(shop: SimpleNamespace, admin: Any) -> None:
    """Others may store ids that are too long for us; a NUL is in none."""
    shop.db.execute("INSERT INTO awaitly_snapshots VALUES (%s, 'null')", ("x" * 1200,))
    page = admin.get(f"/admin/awaitly/workflow/{'x' * 1200}/change/")
    assert page.status_code == 200
    assert "1,000 is the limit" in page.content.decode()
    assert admin.get("/admin/awaitly/workflow/a_00b/change/").status_code == 404


def test_the_admin_changes_nothing_and_shows_nothing_to_strangers(
    shop: SimpleNamespace, admin: Any
) -> None:
    """No adding, changing or deleting, even for a superuser; staff need the view permission."""
    from django.contrib.auth import get_user_model
    from django.contrib.auth.models import Permission
    from django.test import Client

    a_bit_of_everything(shop)
    list_, one = "/admin/awaitly/workflow/", "/admin/awaitly/workflow/purchase-1/change/"
    before = shop.db.execute("SELECT * FROM awaitly_snapshots ORDER BY id").fetchall()
    assert admin.get(f"{list_}add/").status_code == 403
    assert (
        admin.post("/admin/awaitly/workflow/purchase-1/delete/", {"post": "yes"}).status_code == 403
    )
    admin.post(one, {"snapshot": "{}"})
    admin.post(
        list_, {"action": "delete_selected", "_selected_action": "purchase-1", "post": "yes"}
    )
    assert shop.db.execute("SELECT * FROM awaitly_snapshots ORDER BY id").fetchall() == before

    staff = Client()
    assert [staff.get(page).status_code for page in (list_, one)] == [302, 302]
    user = get_user_model().objects.create_user("staff", is_staff=True)
    staff.force_login(user)
    assert [staff.get(page).status_code for page in (list_, one)] == [403, 403]
    user.user_permissions.add(Permission.objects.get(codename="view_workflow"))
    assert [staff.get(page).status_code for page in (list_, one)] == [200, 200]


# -- what can be done ----------------------------------------------------------------------


def runs_to_act_on(shop: SimpleNamespace) -> Durable:
    """Store a run for each thing that can be done."""
    durable = Durable(shop.workflows.durable.store)

    def waiting(step: Step) -> list[object]:
        return [step("one", int), step("two", int), step.wait("approval")]

    def failing(step: Step) -> None:
        step("divide", lambda: 1 / 0)

    for id in ("run-rewind", "run-answer", "run-cancel"):
        with pytest.raises(Exception, match="suspended"):
            durable.run(id, waiting)
    failing_for_good = durable.workflow(max_attempts=1)(failing)
    for id in ("run-retry", "run-retry-2"):
        with pytest.raises(ZeroDivisionError):
            durable.run(id, failing_for_good)
    return durable


ACTS = {
    "retry": ({}, "Made due now."),
    "cancel": ({}, "Cancelled."),
    "rewind": ({"key": "two"}, "Rewound to step 'two'; 1 step forgotten."),
    "answer": ({"key": "approval", "value": '{"by": "<b>me</b>"}'}, "Answered wait 'approval'"),
}


def act(client: Any, name: str, **form: str) -> Any:
    """Press a button on the page of a run."""
    page = f"/admin/awaitly/workflow/run-{name}/change/"
    return client.post(page, {"act": name, **ACTS[name][0], **form}, follow=True)


@pytest.mark.parametrize("name", ACTS)
def test_what_is_done_in_the_admin_is_logged(shop: SimpleNamespace, admin: Any, name: str) -> None:
    """With who did it to which run, as Django logs changes; the page says so as well."""
    from django.contrib.admin.models import LogEntry

    durable = runs_to_act_on(shop)
    page = act(admin, name)
    assert page.redirect_chain == [(f"/admin/awaitly/workflow/run-{name}/change/", 302)]
    (entry,) = LogEntry.objects.all()
    assert (entry.user.username, entry.object_id) == ("admin", f"run-{name}")
    assert entry.get_change_message().startswith(ACTS[name][1])
    assert ACTS[name][1].replace("'", "&#x27;") in page.content.decode()
    history = admin.get(f"/admin/awaitly/workflow/run-{name}/history/").content.decode()
    assert ACTS[name][1].replace("'", "&#x27;") in history
    assert "<b>me</b>" not in history + page.content.decode()
    run = durable.get(f"run-{name}")
    assert (run.state, [step.key for step in run.steps]) == {
        "retry": ("retrying", ["divide"]),
        "cancel": ("cancelled", ["one", "two"]),
        "rewind": ("pending", ["one"]),
        "answer": ("pending", ["one", "two"]),
    }[name]


@pytest.mark.parametrize("name", ACTS)
def test_each_thing_needs_its_own_permission(shop: SimpleNamespace, name: str) -> None:
    """Without it there is no button, and whoever posts all the same is refused."""
    from django.contrib.auth import get_user_model
    from django.contrib.auth.models import Permission
    from django.test import Client

    def allow(*names: str) -> None:
        user.user_permissions.add(*Permission.objects.filter(codename__in=names))

    runs_to_act_on(shop)
    stored = "SELECT * FROM awaitly_snapshots ORDER BY id"
    before = shop.db.execute(stored).fetchall()
    user, staff = get_user_model().objects.create_user("staff", is_staff=True), Client()
    staff.force_login(user)
    assert act(staff, name).status_code == 403
    allow("view_workflow", *(f"{other}_workflow" for other in ACTS if other != name))
    page = f"/admin/awaitly/workflow/run-{name}/change/"
    assert f'value="{name}"' not in staff.get(page).content.decode()
    assert act(staff, name).status_code == 403
    assert shop.db.execute(stored).fetchall() == before
    allow(f"{name}_workflow")
    assert f'value="{name}"' in staff.get(page).content.decode()
    assert act(staff, name).status_code == 200
    assert shop.db.execute(stored).fetchall() != before


def test_nothing_is_done_without_the_token_of_the_page(shop: SimpleNamespace) -> None:
    """A form on somebody else's site cannot act for an administrator, nor can a link."""
    from django.contrib.auth import get_user_model
    from django.test import Client

    runs_to_act_on(shop)
    client = Client(enforce_csrf_checks=True)
    client.force_login(get_user_model().objects.create_superuser("admin"))
    assert act(client, "cancel").status_code == 403
    page = "/admin/awaitly/workflow/run-cancel/change/"
    assert client.get(f"{page}?act=cancel").status_code == 200
    assert Durable(shop.workflows.durable.store).get("run-cancel").state == "waiting"
    (token, *_) = re.findall(
        r'csrfmiddlewaretoken" value="(\w+)"', client.get(page).content.decode()
    )
    assert act(client, "cancel", csrfmiddlewaretoken=token).status_code == 200
    assert Durable(shop.workflows.durable.store).get("run-cancel").state == "cancelled"


def test_what_cannot_be_done_is_said_and_not_logged(shop: SimpleNamespace, admin: Any) -> None:
    """A run that has ended or is held, a step that is not there, a value that is not JSON."""
    from django.contrib.admin.models import LogEntry

    durable = runs_to_act_on(shop)
    durable.cancel("run-cancel")
    with durable.store.lock("run-retry"):
        for name, form, message in (
            ("cancel", {}, "nothing was done"),
            ("retry", {}, "is running elsewhere"),
            ("rewind", {"key": "<i>three</i>"}, "no recorded step"),
            ("rewind", {"key": ""}, "step key"),
            ("answer", {"value": "yes"}, "not JSON"),
            ("answer", {"value": "NaN"}, "JSON"),
        ):
            told = act(admin, name, **form).content.decode()
            assert message in told, (name, form)
            assert "<i>three" not in told
    bad = admin.post("/admin/awaitly/workflow/run-retry/change/", {"act": "drop"})
    assert bad.status_code == 400
    assert not LogEntry.objects.exists()


def test_selected_runs_are_retried_from_the_list(shop: SimpleNamespace, admin: Any) -> None:
    """By those who may; others do not see the action."""
    from django.contrib.admin.models import LogEntry
    from django.contrib.auth import get_user_model
    from django.contrib.auth.models import Permission
    from django.test import Client

    durable = runs_to_act_on(shop)
    form = {"action": "retry_now", "_selected_action": ["run-retry", "run-retry-2"]}
    user, staff = get_user_model().objects.create_user("staff", is_staff=True), Client()
    user.user_permissions.add(Permission.objects.get(codename="view_workflow"))
    staff.force_login(user)
    staff.post("/admin/awaitly/workflow/", form)
    assert len(durable.list(state="failed")) == 2
    admin.post("/admin/awaitly/workflow/", form)
    assert durable.list(state="failed") == []
    assert LogEntry.objects.count() == 2


def test_hostile_text_is_shown_and_not_obeyed(shop: SimpleNamespace, admin: Any) -> None:
    """In ids, names, metadata, keys, waits, values, errors and tracebacks."""
    bad = "<script>document.title = 'owned'</script>\"'><img src=x onerror=alert(1)>"
    durable = Durable(shop.workflows.durable.store, metadata={bad: bad})

    def work(step: Step, text: str) -> None:
        step(f"{bad} value", str, text)
        try:
            step(f"{bad} error", hurt)
        except ValueError:
            step.wait(f"{bad} wait")

    def hurt() -> None:
        raise ValueError(bad)

    with pytest.raises(Exception, match="suspended"):
        durable.run(bad, durable.workflow(name=bad)(work), bad)
    with pytest.raises(ValueError, match="owned"):
        durable.run(f"{bad} failed", durable.workflow(name=f"{bad}!")(lambda step: hurt()))
    durable.store.try_acquire(f"{bad} failed")
    from django.contrib.admin.utils import quote

    pages = ["", *(f"{quote(id)}/change/" for id in (bad, f"{bad} failed"))]
    for page in pages:
        html = admin.get(f"/admin/awaitly/workflow/{page}").content.decode()
        assert "owned" in html
        assert "<script>document" not in html
        assert "<img src=x" not in html
        assert "\"'>" not in html.replace("&quot;", "")
    told = admin.post(
        f"/admin/awaitly/workflow/{quote(bad)}/change/",
        {"act": "answer", "key": f"{bad} wait", "value": '"<script>document"'},
        follow=True,
    ).content.decode()
    assert "Answered wait" in told
    assert "<script>document" not in told


@pytest.fixture
def address(shop: SimpleNamespace) -> Iterator[str]:
    """Where ``manage.py runserver`` answers."""
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        host = f"127.0.0.1:{unused.getsockname()[1]}"
    server = subprocess.Popen(
        [sys.executable, str(SHOP / "manage.py"), "runserver", "--noreload", host],
        env={**os.environ, "DATABASE_URL": shop.url},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )

    def answers() -> bool:
        try:
            with urllib.request.urlopen(f"http://{host}/", timeout=5) as answer:
                return answer.status == 200
        except OSError:
            return False

    try:
        eventually(answers, "the shop's home page")
        yield f"http://{host}"
    finally:
        server.terminate()
        server.wait(timeout=60)


def test_the_pages_in_a_browser(
    shop: SimpleNamespace, admin: Any, address: str, tmp_path: Path
) -> None:
    """The list and the timeline fit the window, with their styles, and obey nothing stored."""
    a_bit_of_everything(shop)
    session = {"sessionid": admin.cookies["sessionid"].value}
    fits = "document.documentElement.scrollWidth <= innerWidth"
    with chromium() as page:
        page.open(f"{address}/admin/awaitly/workflow/", **session)
        page.screenshot(tmp_path / "list.png")
        assert page.evaluate("document.querySelectorAll('#result_list tbody tr').length") == 10
        assert page.evaluate(fits)
        table = "document.querySelector('.results')"
        assert page.evaluate(f"{table}.scrollWidth <= {table}.clientWidth")
        colour = "getComputedStyle(document.querySelector('.awaitly-state.{}')).backgroundColor"
        assert page.evaluate(colour.format("completed")) == "rgb(38, 112, 74)"

        page.open(f"{address}/admin/awaitly/workflow/purchase-1/change/")
        page.screenshot(tmp_path / "timeline.png")
        assert "owned" not in page.evaluate("document.title")
        boxes = "[...document.querySelectorAll('rect')].map(r => r.getBoundingClientRect())"
        lefts = page.evaluate(f"{boxes}.map(box => box.left)")
        widths = page.evaluate(f"{boxes}.map(box => box.width)")
        assert lefts == sorted(lefts)
        steps = shop.workflows.durable.get("purchase-1").steps
        seconds = [step.seconds for step in steps]
        assert widths.index(max(widths)) == seconds.index(max(seconds))
        assert min(widths) > 2
        assert page.evaluate(fits)

        page.open(f"{address}/admin/awaitly/workflow/{DECLINED}/change/")
        page.screenshot(tmp_path / "failed.png")
        page.evaluate(
            "document.querySelectorAll('.awaitly-acts details').forEach(d => d.open = true)"
        )
        page.screenshot(tmp_path / "acts.png")
        page.resize(390)
        for name, path in (("list", ""), ("failed", f"{DECLINED}/change/")):
            page.open(f"{address}/admin/awaitly/workflow/{path}")
            page.screenshot(tmp_path / f"{name}-narrow.png")
            assert page.evaluate(fits), name
        page.resize(1200)
        page.open(f"{address}/admin/awaitly/workflow/purchase-suspended/change/")
        page.evaluate(
            "document.querySelectorAll('.awaitly-acts details').forEach(d => d.open = true)"
        )
        page.screenshot(tmp_path / "waiting.png")
        page.open(f"{address}/admin/awaitly/workflow/{DECLINED}/change/")
        assert page.evaluate("document.querySelectorAll('details.failed[open]').length") == 2
        page.resize(1200)
        page.open(address)
        page.screenshot(tmp_path / "shop.png")
        assert "10 left" in page.evaluate("document.body.innerText")


def test_a_map_has_a_progress_bar(
    shop: SimpleNamespace, admin: Any, address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the status page of the shop and in the admin, while the worker is at it."""
    from django.db import connections

    gate = threading.Event()

    def pack(order_id: str, number: int) -> str:
        assert number <= 3 or gate.wait(60)
        return str(number)

    def work() -> None:
        shop.workflows.durable.resume_pending()
        connections.close_all()  # those of this thread

    monkeypatch.setattr(shop.workflows, "pack", pack)
    id = order(shop, 5)
    worker = threading.Thread(target=work)
    worker.start()
    try:
        durable = shop.workflows.durable
        eventually(lambda: durable.get(f"checkout-{id}").maps == {"pack": (3, 5)}, "three of five")
        session = {"sessionid": admin.cookies["sessionid"].value}
        with chromium() as page:
            for name, path in (
                ("status", f"/orders/{id}"),
                ("map", f"/admin/awaitly/workflow/checkout-{id}/change/"),
            ):
                page.open(address + path, **session)
                page.screenshot(tmp_path / f"{name}.png")
                assert page.evaluate("document.querySelector('progress').position") == 0.6
            text = page.evaluate("document.body.innerText")
            assert "Current step\npack 3/5" in text
            assert text.count("pack 3/5") == 2  # and in the timeline
    finally:
        gate.set()
        worker.join()
    assert shop.workflows.durable.get(f"checkout-{id}").state == "completed"
