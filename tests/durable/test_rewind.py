"""Going back: what a rewind forgets and keeps, in whatever state a run is, and what a fork has."""

from __future__ import annotations

import json
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psycopg
import pytest

from awaitly_postgres import (
    AlreadyRunning,
    Durable,
    LeaseLost,
    SnapshotStore,
    Step,
    StepFailed,
    WorkflowConflict,
    WorkflowNotFound,
    WorkflowSuspended,
)
from tests.support import DATA, Loss, Proxy, photograph
from tests.workers import rewinder

DB = psycopg.Connection
NODE_ROWS = json.loads((Path(DATA) / "node-snapshots.json").read_text())
FAN_OUT = ["item[0]", "item[1]", "item[2]"]
OF_THE_END = {"output", "failure", "cancelledAt", "waits", "sleeps", "wakeAt"}


class Orders:
    """A workflow of every kind of step, whose bodies are counted."""

    def __init__(self, db: DB, size: int = 0) -> None:
        self.ran: Counter[str] = Counter()
        self.size = size
        self.end = "completed"
        self.keys: list[str] = []
        db.execute("CREATE TABLE IF NOT EXISTS paid (id text)")

    def act(self, key: str) -> str:
        self.ran[key] += 1
        return key.ljust(self.size, ".")

    def order(self, step: Step) -> str:
        step("reserve", self.act, "reserve")
        step.transaction("pay", self.pay, step.workflow_id)
        try:
            step("gift", self.refuse, "gift")
        except LookupError:
            step("no gift", self.act, "no gift")
        with ThreadPoolExecutor(1) as pool:
            list(pool.map(lambda key: step(key, self.act, key), FAN_OUT))
        self.keys.append(step.idempotency_key("ship"))
        step("ship", self.act, "ship")
        if self.end == "waiting":
            return str(step.wait("decision"))
        if self.end == "failed":
            raise ValueError(self.end)
        return "done"

    def pay(self, conn: DB, id: str) -> str:
        conn.execute("INSERT INTO paid VALUES (%s)", (id,))
        return self.act("pay")

    def refuse(self, key: str) -> None:
        self.act(key)
        raise LookupError(key)

    def bring_to(self, durable: Durable, end: str, id: str = "a") -> None:
        """Run it until it stands there."""
        self.end = "waiting" if end == "cancelled" else end
        durable.workflow(self.order)
        durable.submit(id, self.order)
        (outcome,) = durable.resume_pending()
        assert outcome.status == {"waiting": "suspended"}.get(self.end, self.end)
        if end == "cancelled":
            assert durable.cancel(id)
        self.end = "completed"
        self.ran.clear()


ALL = ["reserve", "pay", "gift", "no gift", *FAN_OUT, "ship"]


def metadata(durable: Durable, id: str = "a") -> dict[str, Any]:
    return dict(durable.store.load(id).metadata)


def recorded(durable: Durable, id: str = "a") -> list[str]:
    """The keys in the order in which they were recorded."""
    steps = durable.store.load(id).steps
    return sorted(steps, key=lambda key: steps[key].meta["seq"])


# -- what is forgotten, and what is not ----------------------------------------------------


@pytest.mark.parametrize("size", [0, 3_000], ids=["in the snapshot", "in the journal"])
@pytest.mark.parametrize("key", ["reserve", "pay", "no gift", "item[1]", "ship"])
@pytest.mark.parametrize("end", ["completed", "failed", "waiting", "cancelled"])
def test_a_run_that_is_rewound_is_pending_and_repeats_only_what_was_forgotten(
    durable: Durable, db: DB, end: str, key: str, size: int
) -> None:
    """Whatever it was: nothing that tells of its end is left, and nobody has its lease."""
    orders = Orders(db, size)
    orders.bring_to(durable, end)
    assert recorded(durable) == ALL
    at = ALL.index(key)

    assert durable.rewind("a", key) == ALL[at:]

    snapshot = durable.store.load("a")
    assert recorded(durable) == ALL[:at]
    assert snapshot.execution.status == "running"
    assert not OF_THE_END & snapshot.metadata.keys()
    assert snapshot.metadata["attempts"] == 0
    assert photograph(db)["awaitly_workflow_lock"] == []
    assert photograph(db)["awaitly_snapshots_steps"] == []
    (row,) = durable.store.details(["a"])
    assert row.state == "pending"

    (outcome,) = durable.resume_pending()
    assert (outcome.status, outcome.result, outcome.attempts) == ("completed", "done", 1)
    assert orders.ran == Counter(ALL[at:])
    assert recorded(durable) == ALL
    assert db.execute("SELECT count(*) FROM paid").fetchone() == (1 + (at < 2),)


def test_a_crashed_run_is_rewound_when_its_lease_has_ended(durable: Durable, db: DB) -> None:
    """What it had only appended so far is in the journal."""
    orders = Orders(db, 3_000)

    def die(step: Step) -> None:
        step("a", orders.act, "a")
        step("b", orders.act, "b")
        db.execute("UPDATE awaitly_workflow_lock SET owner_token = 'a:dead:one'")
        raise LookupError

    durable.workflow(die)
    with pytest.raises(LeaseLost):
        durable.run("a", die)
    before = photograph(db)
    assert before["awaitly_snapshots_steps"]
    with pytest.raises(AlreadyRunning):
        durable.rewind("a", "b")
    assert photograph(db) == before
    db.execute("UPDATE awaitly_workflow_lock SET expires_at = clock_timestamp()")
    assert durable.rewind("a", "b") == ["b"]
    assert recorded(durable) == ["a"]
    assert photograph(db)["awaitly_snapshots_steps"] == []


def test_a_run_that_somebody_runs_is_not_rewound(durable: Durable, db: DB) -> None:
    """Not even from inside one of its own steps; nothing is changed."""
    refusals = []

    def work(step: Step) -> str:
        step("a", str)

        def try_it() -> None:
            before = photograph(db)
            with pytest.raises(AlreadyRunning) as refusal:
                durable.rewind("a", "a")
            assert photograph(db) == before
            refusals.append(refusal.value.id)

        step("b", try_it)
        return "done"

    assert durable.run("a", work) == "done"
    assert refusals == ["a"]


def test_what_is_not_there_is_told_and_nothing_changes(durable: Durable, db: DB) -> None:
    """An unknown id, and an unknown step with the last ones that there are."""
    durable.run("a", lambda step: [step(f"step-{nr}", str) for nr in range(9)])
    before = photograph(db)
    for back in (durable.rewind, lambda id, key: durable.fork(id, "copy", key)):
        with pytest.raises(WorkflowNotFound, match="'b'"):
            back("b", "step-1")
        with pytest.raises(ValueError, match=r"'a' has no recorded step 'x'.*'step-8'"):
            back("a", "x")
        with pytest.raises(ValueError, match="empty"):
            back("a", "")
    assert photograph(db) == before


def test_a_handled_failure_before_the_step_stays_handled(durable: Durable, db: DB) -> None:
    """What settled it is forgotten, so the run says that it is; a gap in the numbers is no harm."""
    orders = Orders(db)
    broken = ["gift", "thanks"]

    def may_fail(key: str) -> str:
        if key in broken:
            orders.refuse(key)
        return orders.act(key)

    @durable.workflow
    def work(step: Step) -> str:
        try:
            step("gift", may_fail, "gift")
        except LookupError:
            step("thanks", may_fail, "thanks")
        return step("ship", may_fail, "ship")

    durable.submit("a", work)
    with pytest.raises(LookupError):
        durable.resume("a")
    broken.remove("thanks")
    durable.resume("a")
    seqs = {key: step.meta["seq"] for key, step in durable.store.load("a").steps.items()}
    assert seqs == {"gift": 1, "thanks": 3, "ship": 4}
    orders.ran.clear()

    broken[:] = ["thanks"]
    durable.rewind("a", "thanks")
    for _ in range(2):
        with pytest.raises(LookupError):
            durable.resume("a")
    broken.clear()
    durable.resume("a")
    assert orders.ran == Counter({"thanks": 3, "ship": 1})  # its own failure stays open


def test_an_open_failure_before_the_step_stays_open(durable: Durable, db: DB) -> None:
    """A fan-out of which one part has failed: that one is tried again, whatever was rewound."""
    orders = Orders(db)
    broken = ["item[1]"]

    def may_fail(key: str) -> str:
        return orders.refuse(key) if key in broken else orders.act(key)

    @durable.workflow
    def work(step: Step) -> list[str]:
        with ThreadPoolExecutor(1) as pool:
            parts = [pool.submit(step, key, may_fail, key) for key in FAN_OUT]
        return [part.result() for part in parts]

    durable.submit("a", work)
    with pytest.raises(LookupError):
        durable.resume("a")
    broken.clear()
    assert durable.rewind("a", "item[2]") == ["item[2]"]
    assert durable.resume("a") == FAN_OUT
    assert orders.ran == Counter([*FAN_OUT, "item[1]", "item[2]"])


def test_a_forgotten_wait_can_be_answered_again(durable: Durable) -> None:
    """Its signal is forgotten with it. One that no step has taken yet stays."""

    @durable.workflow
    def work(step: Step) -> list[str]:
        first = step.wait("first")
        step("between", str)
        return [first, step.wait("second"), step.wait("third")]

    durable.submit("a", work)
    for key in ("first", "second", "third"):
        assert durable.signal("a", key, f"{key}, once")
    assert durable.resume("a") == ["first, once", "second, once", "third, once"]
    durable.rewind("a", "third")
    assert not durable.signal("a", "second", "again")
    with pytest.raises(WorkflowSuspended):
        durable.resume("a")
    assert durable.signal("a", "third", "third, again")
    durable.rewind("a", "second")  # the third's new answer has not been taken
    assert metadata(durable)["signals"].keys() == {"first", "third"}
    assert durable.signal("a", "second", "second, again")
    assert durable.resume("a") == ["first, once", "second, again", "third, again"]


def test_a_forgotten_sleep_begins_anew(durable: Durable, db: DB) -> None:
    """Nothing is left of when it was to end."""

    @durable.workflow
    def work(step: Step) -> str:
        step("a", str)
        step.sleep("nap", 3600)
        return "done"

    durable.submit("a", work)
    (outcome,) = durable.resume_pending()
    assert outcome.status == "suspended"
    first = metadata(durable)["wakeAt"]
    durable.rewind("a", "a")
    (outcome,) = durable.resume_pending()
    assert outcome.status == "suspended"
    assert metadata(durable)["wakeAt"] > first


def test_what_is_not_ours_survives(durable: Durable, store: SnapshotStore) -> None:
    """The user's metadata, warnings, and fields that nobody here knows."""
    theirs = Durable(store, metadata={"tenant": 7})

    @theirs.workflow
    def work(step: Step, what: str) -> str:
        return step("a", str, what) + step("b", str, what)

    theirs.run("a", work, "x")
    document = store.load("a").to_json()
    store.save("a", {**document, "warnings": [{"path": "value"}], "unknown": {"field": 1}})
    theirs.fork("a", "copy", "b")
    theirs.rewind("a", "b")
    for id in ("a", "copy"):
        stored = store.load(id).to_json()
        assert theirs.get(id).metadata == {"tenant": 7}
        assert stored["metadata"]["input"] == {"args": ["x"], "kwargs": {}}
        assert (stored["warnings"], stored["unknown"]) == ([{"path": "value"}], {"field": 1})
        assert list(stored["steps"]) == ["a"]


def test_of_the_steps_of_node_only_the_last_is_forgotten(durable: Durable, db: DB) -> None:
    """It numbers none. They count as recorded before all of ours."""
    for id, row in NODE_ROWS.items():
        durable.store.save(id, row)
    assert durable.rewind("node-durable-failed", "fetch-missing") == ["fetch-missing"]
    assert durable.rewind("node-durable-failed", "fetch-user") == ["fetch-user"]
    assert durable.rewind("node-durable-crashed", "fetch-user") == ["fetch-user"]
    before = photograph(db)
    with pytest.raises(ValueError, match="Node package, which keeps no order"):
        durable.rewind("node-completed", "create-order")
    assert photograph(db) == before

    def work(step: Step) -> list[Any]:
        return [step(key, str) for key in ("create-order", "fetch-user", "ours", "ours too")]

    node = NODE_ROWS["node-completed"]
    running = {**node["execution"], "status": "running"}
    durable.store.save("node", {**node, "execution": running, "metadata": {}})
    durable.run("node", work)
    assert durable.fork("node", "copy", "ours too") == ["create-order", "fetch-user", "ours"]
    assert durable.rewind("node", "ours") == ["ours", "ours too"]
    with pytest.raises(ValueError, match="not known which steps came after"):
        durable.rewind("node", "fetch-user")
    durable.run("node", work)


def test_a_failure_that_node_has_handled_stays_handled(durable: Durable, db: DB) -> None:
    """Node goes on after it, then Python; what Python did is forgotten."""
    orders = Orders(db)
    node = NODE_ROWS["node-durable-failed"]
    metadata = {**node["metadata"], "lastStepKey": "fetch-user"}
    durable.store.save("a", {**node, "metadata": metadata})

    @durable.workflow
    def work(step: Step) -> str:
        step("fetch-user", orders.act, "fetch-user")
        try:
            step("fetch-missing", orders.act, "fetch-missing")
        except StepFailed:
            return step("ours", orders.act, "ours")

    assert durable.run("a", work) == "ours"
    assert durable.rewind("a", "ours") == ["ours"]
    assert durable.run("a", work) == "ours"
    assert orders.ran == Counter({"ours": 2})


# -- idempotency keys ----------------------------------------------------------------------


def test_idempotency_keys_stay_the_same_unless_new_ones_are_asked_for(
    durable: Durable, db: DB
) -> None:
    """New ones stay new, for every start from then on."""
    orders = Orders(db)
    orders.bring_to(durable, "completed")
    for new_keys in (False, True, False, True):
        durable.rewind("a", "ship", new_keys=new_keys)
        durable.resume("a")
    assert orders.keys == ["a/ship", "a/ship", "a/ship#1", "a/ship#1", "a/ship#2"]
    assert metadata(durable)["keyGeneration"] == 2
    durable.fork("a", "b", "ship")
    durable.resume("b")
    assert orders.keys[-1] == "b/ship"


# -- crashes and lost connections ----------------------------------------------------------


@pytest.mark.parametrize("size", [0, 3_000], ids=["in the snapshot", "in the journal"])
@pytest.mark.parametrize("what", ["request", "reply"])
def test_a_rewind_survives_the_loss_of_any_request_or_reply(
    connect: Callable[..., SnapshotStore], proxy: Proxy, db: DB, what: Loss, size: int
) -> None:
    """Lease, read, and the transaction that writes: it tells what has happened."""
    durable = Durable(connect())
    orders = Orders(db, size)
    nr, lost = 0, True
    while lost:
        id = f"order-{nr}"
        orders.bring_to(durable, "completed", id)
        proxy.lose(what, nr)
        assert durable.rewind(id, "no gift") == ALL[3:]
        lost = proxy.has_lost
        assert photograph(db)["awaitly_workflow_lock"] == []
        assert durable.resume(id) == "done"
        assert orders.ran == Counter(ALL[3:])
        nr += 1
    assert nr > 5


@pytest.mark.parametrize("what", ["request", "reply"])
def test_a_fork_survives_the_loss_of_any_request_or_reply(
    connect: Callable[..., SnapshotStore], proxy: Proxy, db: DB, what: Loss
) -> None:
    """A copy that was made is no rival of itself."""
    durable = Durable(connect())
    Orders(db).bring_to(durable, "completed")
    nr, lost = 0, True
    while lost:
        proxy.lose(what, nr)
        assert durable.fork("a", f"copy-{nr}", "no gift") == ALL[:3]
        lost = proxy.has_lost
        nr += 1
    assert nr > 4


@pytest.mark.read_committed
def test_a_process_killed_in_the_middle_of_a_rewind_loses_nothing(
    durable: Durable, db: DB, url: str
) -> None:
    """At whatever statement: the run is as it was, or rewound, and can be rewound again."""
    durable.workflow(rewinder.letters)
    ids = rewinder.crash_everywhere(url)
    assert len(ids) > 10
    outcomes = Counter()
    for id in ids:
        steps = recorded(durable, id)
        outcomes[len(steps)] += 1
        assert steps in (list("abcd"), ["a"])
        assert (durable.store.load(id).execution.status == "completed") is (len(steps) == 4)
        db.execute("UPDATE awaitly_workflow_lock SET expires_at = clock_timestamp()")
        if len(steps) == 4:
            assert durable.rewind(id, "b") == ["b", "c", "d"]
        assert recorded(durable, id) == ["a"]
        assert durable.resume(id) == "done"
    assert outcomes.keys() == {1, 4}


@contextmanager
def once_loaded(monkeypatch: pytest.MonkeyPatch, act: Callable[[str], bool]) -> Iterator[None]:
    """Do this with the id of each run that has just been loaded."""
    load = SnapshotStore.load

    def load_and_act(store: SnapshotStore, id: str) -> Any:
        found = load(store, id)
        assert act(id)
        return found

    with monkeypatch.context() as patch:
        patch.setattr(SnapshotStore, "load", load_and_act)
        yield


@pytest.mark.parametrize("meanwhile", ["cancelled", "deleted"])
def test_a_run_that_is_ended_while_it_is_rewound_is_not_revived(
    durable: Durable, db: DB, monkeypatch: pytest.MonkeyPatch, meanwhile: str
) -> None:
    """Between what was read and what is written: that changes nothing then."""
    orders = Orders(db)
    orders.bring_to(durable, "waiting")
    end = durable.cancel if meanwhile == "cancelled" else durable.delete_state
    with once_loaded(monkeypatch, end), pytest.raises(LeaseLost):
        durable.rewind("a", "ship")
    assert photograph(db)["awaitly_workflow_lock"] == []
    if meanwhile == "cancelled":
        assert recorded(durable) == ALL
        assert "cancelledAt" in metadata(durable)
    else:
        assert not durable.has_state("a")


def test_an_interrupt_gives_the_lease_back(
    durable: Durable, db: DB, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C after the lease was taken: nothing has changed, and the run can be rewound."""
    orders = Orders(db)
    orders.bring_to(durable, "completed")

    def interrupt(id: str) -> bool:
        raise KeyboardInterrupt

    with once_loaded(monkeypatch, interrupt), pytest.raises(KeyboardInterrupt):
        durable.rewind("a", "ship")
    assert photograph(db)["awaitly_workflow_lock"] == []
    assert durable.rewind("a", "ship") == ["ship"]


def test_a_signal_sent_during_a_rewind_is_kept(
    durable: Durable, db: DB, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It comes after the run was read, and belongs to a wait that is yet to come."""
    orders = Orders(db)
    orders.bring_to(durable, "waiting")
    with once_loaded(monkeypatch, lambda id: durable.signal(id, "decision", "yes")):
        durable.rewind("a", "ship")
    orders.end = "waiting"
    assert durable.resume("a") == "yes"


# -- a fork --------------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["reserve", "no gift", "item[1]", "ship"])
@pytest.mark.parametrize("end", ["completed", "failed", "waiting", "cancelled"])
def test_a_fork_goes_on_from_the_step_and_leaves_the_source_alone(
    durable: Durable, db: DB, end: str, key: str
) -> None:
    """The copy is pending, has the source's input, and replays what it has copied."""
    orders = Orders(db)
    orders.bring_to(durable, end)
    (before,) = photograph(db)["awaitly_snapshots"]
    at = ALL.index(key)

    assert durable.fork("a", "copy", key) == ALL[:at]

    assert photograph(db)["awaitly_workflow_lock"] == []
    assert recorded(durable, "copy") == ALL[:at]
    (row,) = durable.store.details(["copy"])
    assert row.state == "pending"
    assert not OF_THE_END & metadata(durable, "copy").keys()
    assert durable.resume("copy") == "done"
    assert orders.ran == Counter(ALL[at:])
    assert before in photograph(db)["awaitly_snapshots"]


def test_a_run_can_be_forked_while_it_runs(durable: Durable, db: DB) -> None:
    """What it has only appended so far is copied too; its lease is not asked for."""
    inside, gate = threading.Event(), threading.Event()

    def pass_gate() -> None:
        inside.set()
        assert gate.wait(60)

    @durable.workflow
    def work(step: Step) -> str:
        for key in "abc":
            step(key, str.ljust, key, 3_000)
        step("gate", pass_gate)
        return "done"

    durable.submit("a", work)
    with ThreadPoolExecutor(1) as pool:
        source = pool.submit(durable.resume, "a")
        assert inside.wait(60)
        assert durable.fork("a", "copy", "c") == ["a", "b"]
        gate.set()
        assert source.result(60) == "done"
    assert durable.resume("copy") == "done"


def test_an_id_that_is_taken_is_no_place_for_a_fork(durable: Durable, db: DB) -> None:
    """Whatever is stored there, the source itself included, and it stays as it was."""
    orders = Orders(db)
    orders.bring_to(durable, "completed")
    durable.store.save("by hand", NODE_ROWS["node-completed"])
    before = photograph(db)
    for id in ("a", "by hand"):
        with pytest.raises(WorkflowConflict, match=f"'{id}' is taken.*a fork of 'a'"):
            durable.fork("a", id, "ship")
    assert photograph(db) == before


def test_a_fork_has_the_answers_that_its_steps_have_taken(durable: Durable) -> None:
    """The others were sent to the source, and its waits can be answered for themselves."""

    @durable.workflow
    def work(step: Step) -> list[str]:
        return [step.wait("first"), step.wait("second")]

    durable.submit("a", work)
    for key in ("first", "second"):
        durable.signal("a", key, "for a")
    assert durable.resume("a") == ["for a", "for a"]
    assert durable.fork("a", "b", "second") == ["first"]
    assert not durable.signal("b", "first", "for b")
    assert durable.signal("b", "second", "for b")
    assert durable.resume("b") == ["for a", "for b"]
    assert metadata(durable)["signals"] == {"first": "for a", "second": "for a"}
