"""One contender, in a process of its own: does runs of steps when told to.

    python contender.py NAME URL

Each line of standard input asks for work, ``{"runs": 20, "steps": 10, "size": 300, "threads": 1}``
or, for as long as that, ``{"seconds": 1.5, ...}``. The answer says how many runs and steps were
done, in how many seconds, how many seconds of processor time that took, and the median of the
seconds from one step to the next.
Peers run this file in an environment that has neither attrs nor awaitly_postgres.
"""

from __future__ import annotations

import itertools
import json
import os
import random
import string
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from statistics import median
from typing import Any

WORKERS = 16  # of a map, unless its name says otherwise

Run = Callable[[str, int, int], None]  # id, steps, bytes of a result

_TEXT = "".join(random.Random(1).choices(string.ascii_letters, k=100_000))  # noqa: S311


class Steps:
    """What a step does: note the time, and return its text."""

    def __init__(self) -> None:
        self.count = 0
        self._counting = threading.Lock()
        # These mean something while there is one run, of steps one after the other.
        self.between: list[float] = []
        self._last: float | None = None

    def start(self) -> None:
        self._last = None

    def __call__(self, nr: int, size: int) -> str:
        now = time.perf_counter()
        if self._last is not None:
            self.between.append(now - self._last)
        self._last = now
        with self._counting:
            self.count += 1
        return text(nr, size)


def text(nr: int, size: int) -> str:
    """Return a step's result, so many bytes of JSON: letters that hardly compress or repeat."""
    offset = nr * size % (len(_TEXT) - size)
    return _TEXT[offset : offset + size - 2]


def step_json(nr: int, value: str) -> dict[str, Any]:
    """Return what awaitly_postgres records of a step."""
    meta = {"startedAt": "2026-01-01T00:00:00.000Z", "durationMs": 0.012, "seq": nr + 1}
    return {"ok": True, "value": value, "meta": meta}


def floor(url: str, body: Steps) -> Run:
    """One prepared INSERT and commit for each step, for the begin and for the end."""
    import psycopg

    local = threading.local()
    insert = "INSERT INTO floor.step VALUES (%s, %s, %s::jsonb)"
    with psycopg.connect(url, autocommit=True) as db:
        db.execute("SELECT pg_advisory_lock(1)")
        db.execute("CREATE SCHEMA IF NOT EXISTS floor")
        db.execute(
            "CREATE TABLE IF NOT EXISTS floor.step (id text, key text, step jsonb, "
            "PRIMARY KEY (id, key))"
        )

    def run(id: str, steps: int, size: int) -> None:
        if not hasattr(local, "cursor"):
            local.cursor = psycopg.connect(url, autocommit=True).cursor()
        local.cursor.execute(insert, (id, "begin", "{}"), prepare=True)
        for nr in range(steps):
            step = json.dumps(step_json(nr, body(nr, size)))
            local.cursor.execute(insert, (id, f"step-{nr}", step), prepare=True)
        local.cursor.execute(insert, (id, "end", "{}"), prepare=True)

    return run


def rewrite(url: str, body: Steps) -> Run:
    """The whole snapshot again after every step, in the origin's table."""
    import psycopg

    db = psycopg.connect(url, autocommit=True)
    db.execute("CREATE SCHEMA IF NOT EXISTS rewrite")
    db.execute(
        "CREATE TABLE IF NOT EXISTS rewrite.snapshots (id text PRIMARY KEY, "
        "snapshot jsonb NOT NULL, updated_at timestamptz DEFAULT now())"
    )
    db.execute("CREATE INDEX IF NOT EXISTS newest ON rewrite.snapshots (updated_at DESC)")
    upsert = (
        "INSERT INTO rewrite.snapshots VALUES (%s, %s::jsonb, now()) ON CONFLICT (id) "
        "DO UPDATE SET snapshot = EXCLUDED.snapshot, updated_at = EXCLUDED.updated_at"
    )

    def run(id: str, steps: int, size: int) -> None:
        recorded: dict[str, Any] = {}
        document = {"formatVersion": 1, "steps": recorded, "execution": {"status": "running"}}
        for nr in _evenly(steps, at_most=25):  # all of a long run would take hours
            for earlier in range(len(recorded), nr + 1):
                recorded[f"step-{earlier}"] = step_json(earlier, text(earlier, size))
            body(nr, size)
            db.execute(upsert, (id, json.dumps(document)), prepare=True)

    return run


def _evenly(count: int, at_most: int) -> list[int]:
    """Return so many of the numbers below ``count``, evenly spread."""
    taken = min(count, at_most)
    return [(2 * nr + 1) * count // (2 * taken) for nr in range(taken)]


def awaitly(url: str, body: Steps, schema: str = "awaitly") -> Run:
    """This library, on a pool of its own."""
    from awaitly_postgres import Durable, Step, postgres

    durable = Durable(postgres(url, schema=schema, max_size=16))

    def work(step: Step, steps: int, size: int) -> None:
        for nr in range(steps):
            step(f"step-{nr}", body, nr, size)

    return lambda id, steps, size: durable.run(id, work, steps, size)


def awaitly_map(url: str, body: Steps, workers: int) -> Run:
    """The steps of a run as the items of one `step.map`."""
    from awaitly_postgres import Durable, Step, postgres

    durable = Durable(postgres(url, schema="awaitly", max_size=16))

    def work(step: Step, steps: int, size: int) -> None:
        step.map("map", lambda nr: body(nr, size), range(steps), workers=workers)

    return lambda id, steps, size: durable.run(id, work, steps, size)


def awaitly_threads(url: str, body: Steps, workers: int) -> Run:
    """The steps of a run in a thread pool of the workflow's own."""
    from awaitly_postgres import Durable, Step, postgres

    durable = Durable(postgres(url, schema="awaitly", max_size=16))

    def work(step: Step, steps: int, size: int) -> None:
        with ThreadPoolExecutor(workers) as threads:
            for _ in threads.map(lambda nr: step(f"step-{nr}", body, nr, size), range(steps)):
                pass

    return lambda id, steps, size: durable.run(id, work, steps, size)


def awaitly_submit(url: str, body: Steps) -> Run:
    """Each step is a run that is only accepted, by a call of its own."""
    durable, nothing = _accepting(url)

    def run(id: str, steps: int, size: int) -> None:
        for nr in range(steps):
            durable.submit(f"{id}-{nr}", nothing, body(nr, size))

    return run


def awaitly_submit_many(url: str, body: Steps) -> Run:
    """Each step is a run that is only accepted, all by one call."""
    durable, nothing = _accepting(url)

    def run(id: str, steps: int, size: int) -> None:
        durable.submit_many(nothing, {f"{id}-{nr}": (body(nr, size),) for nr in range(steps)})

    return run


def _accepting(url: str) -> Any:
    from awaitly_postgres import Durable, Step, postgres

    durable = Durable(postgres(url, schema="accepted", max_size=1))

    @durable.workflow
    def nothing(step: Step, text: str) -> None:
        raise AssertionError("is only accepted")

    return durable, nothing


def _configure_dbos(url: str) -> None:
    os.environ["DBOS__VMID"] = f"benchmark-{os.getpid()}"  # recovers its own runs only
    from dbos import DBOS

    DBOS(
        config={
            "name": "benchmark",
            "system_database_url": url,
            "run_admin_server": False,
            "log_level": "WARNING",
        }
    )


def dbos(url: str, body: Steps) -> Run:
    """DBOS Transact, a workflow of steps."""
    from dbos import DBOS, SetWorkflowID

    _configure_dbos(url)

    @DBOS.step()
    def step(nr: int, size: int) -> str:
        return body(nr, size)

    @DBOS.workflow()
    def work(steps: int, size: int) -> None:
        for nr in range(steps):
            step(nr, size)

    DBOS.launch()

    def run(id: str, steps: int, size: int) -> None:
        with SetWorkflowID(id):
            work(steps, size)

    return run


def dbos_queue(url: str, body: Steps) -> Run:
    """DBOS Transact, a workflow that puts its steps on a queue as workflows and awaits them."""
    from dbos import DBOS, SetWorkflowID

    _configure_dbos(url)

    name = f"benchmark-{os.getpid()}"

    @DBOS.workflow()
    def item(nr: int, size: int) -> str:
        return body(nr, size)

    @DBOS.workflow()
    def work(steps: int, size: int) -> None:
        for handle in [DBOS.enqueue_workflow(name, item, nr, size) for nr in range(steps)]:
            handle.get_result()

    DBOS.launch()
    DBOS.register_queue(name, worker_concurrency=WORKERS, polling_interval_sec=0.02)

    def run(id: str, steps: int, size: int) -> None:
        with SetWorkflowID(id):
            work(steps, size)

    return run


def dbos_enqueue(url: str, body: Steps) -> Run:
    """Each step is a workflow that is only put on a queue."""
    from dbos import DBOSClient

    client = DBOSClient(system_database_url=url)
    options: Any = {"workflow_name": "nothing", "queue_name": "accepted"}

    def run(id: str, steps: int, size: int) -> None:
        for nr in range(steps):
            client.enqueue({**options, "workflow_id": f"{id}-{nr}"}, body(nr, size))

    return run


def _saver(url: str) -> Any:
    import psycopg
    from langgraph.checkpoint.postgres import PostgresSaver
    from psycopg.rows import dict_row
    from psycopg_pool import ConnectionPool

    kwargs = {"autocommit": True, "row_factory": dict_row, "prepare_threshold": 0}
    saver = PostgresSaver(ConnectionPool(url, max_size=16, kwargs=kwargs, open=True))
    with psycopg.connect(url, autocommit=True) as db:
        db.execute("SELECT pg_advisory_lock(2)")
        saver.setup()
    return saver


def langgraph(url: str, body: Steps) -> Run:
    """LangGraph with PostgresSaver: a node for each step, durable before the next one."""
    from typing import TypedDict

    from langgraph.graph import END, START, StateGraph

    State = TypedDict("State", {"nr": int, "steps": int, "size": int, "value": str})  # noqa: UP013

    def node(state: State) -> dict[str, Any]:
        return {"nr": state["nr"] + 1, "value": body(state["nr"], state["size"])}

    graph = StateGraph(State)
    graph.add_node("step", node)
    graph.add_edge(START, "step")
    graph.add_conditional_edges(
        "step", lambda state: "step" if state["nr"] < state["steps"] else END
    )
    compiled = graph.compile(checkpointer=_saver(url))

    def run(id: str, steps: int, size: int) -> None:
        config = {"configurable": {"thread_id": id}, "recursion_limit": steps + 5}
        given = {"nr": 0, "steps": steps, "size": size, "value": ""}
        compiled.invoke(given, config, durability="sync")

    return run


def langgraph_tasks(url: str, body: Steps) -> Run:
    """LangGraph with PostgresSaver: a task for each step, which it writes in the background."""
    from langgraph.func import entrypoint, task

    step = task(name="step")(lambda nr, size: body(nr, size))

    @entrypoint(checkpointer=_saver(url))
    def work(given: dict[str, int]) -> None:
        for nr in range(given["steps"]):
            step(nr, given["size"]).result()

    def run(id: str, steps: int, size: int) -> None:
        config = {"configurable": {"thread_id": id}, "recursion_limit": steps + 5}
        work.invoke({"steps": steps, "size": size}, config, durability="sync")

    return run


def langgraph_map(url: str, body: Steps) -> Run:
    """LangGraph with PostgresSaver: a task for each item, in threads, written in the background."""
    from langgraph.func import entrypoint, task

    step = task(name="step")(lambda nr, size: body(nr, size))

    @entrypoint(checkpointer=_saver(url))
    def work(given: dict[str, int]) -> None:
        for future in [step(nr, given["size"]) for nr in range(given["steps"])]:
            future.result()

    def run(id: str, steps: int, size: int) -> None:
        config: Any = {"configurable": {"thread_id": id}, "max_concurrency": WORKERS}
        work.invoke({"steps": steps, "size": size}, config, durability="sync")

    return run


CONTENDERS: dict[str, Callable[[str, Steps], Run]] = {
    contender.__name__: contender
    for contender in (
        *(floor, rewrite, awaitly, awaitly_submit, awaitly_submit_many),
        *(dbos, dbos_queue, dbos_enqueue, langgraph, langgraph_tasks, langgraph_map),
    )
}
CONTENDERS["before"] = partial(awaitly, schema="before")  # an earlier version is on its path
for _workers in (8, WORKERS, 32):
    CONTENDERS[f"map_{_workers}"] = partial(awaitly_map, workers=_workers)
    CONTENDERS[f"threads_{_workers}"] = partial(awaitly_threads, workers=_workers)


def serve(name: str, url: str) -> None:
    body = Steps()
    run = CONTENDERS[name](url, body)
    numbers = itertools.count()
    for line in sys.stdin:
        asked = json.loads(line)
        body.count = 0
        body.between.clear()
        left = iter(range(asked.get("runs", sys.maxsize)))
        began, cpu = time.perf_counter(), time.process_time()
        until = began + asked.get("seconds", 1e9)
        done: list[int] = []

        def work(asked: dict[str, Any] = asked, left=left, until=until, done=done) -> None:
            while time.perf_counter() < until and next(left, None) is not None:
                body.start()
                run(f"{name}-{os.getpid()}-{next(numbers)}", asked["steps"], asked["size"])
                done.append(1)

        if asked["threads"] == 1:
            work()
        else:
            with ThreadPoolExecutor(asked["threads"]) as threads:
                for done_by_thread in [threads.submit(work) for _ in range(asked["threads"])]:
                    done_by_thread.result()  # raises what it has raised
        seconds = time.perf_counter() - began
        between = median(body.between) if body.between else 0.0
        answer = {
            "runs": len(done),
            "steps": body.count,
            "seconds": seconds,
            "cpu": time.process_time() - cpu,
            "between": between,
        }
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    serve(*sys.argv[1:])
