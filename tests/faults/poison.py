"""Poison in the queue: runs that end their process, or never come to an end otherwise."""

from __future__ import annotations

import time
from dataclasses import replace

from psycopg.types.json import Jsonb

from awaitly_postgres import Durable, postgres

from .check import FOREIGN, POISON, poison_left
from .field import PATIENCE, Field
from .workload import deadly, order

AT_ONCE = 40  # so much of it is in the queue at most

# What is written over a run that was submitted: where, and what.
DEADLY = {
    "kill": ("metadata", "attempts", 0),
    "exit": ("metadata", "attempts", 0),
    "nonsense": ("metadata", "attempts", "many"),
    "pause": ("metadata", "wakeAt", -1),
}
HOPELESS = {
    "drift": ("steps", "zeroth", {"ok": True, "value": 1, "meta": {"seq": 1}}),
    "input": ("metadata", "input", {"args": [], "kwargs": {"amount": 1}}),
    "version": ("metadata", "version", 99),
}
# Cannot be started here, so that nothing is written to it, and it counts against no limit.
NOT_OURS = {
    "step": ("steps", "reserve", {"ok": "perhaps"}),
    "input": ("metadata", "input", None),
    "workflow": ("metadata", "workflow", "of another program"),
    "execution": ("execution", "status", ["running"]),
}


def expect_poison(field: Field) -> None:
    field.setup = replace(field.setup, poison=True, idle=0.1, roll_call=True)


def poison(field: Field) -> int:
    """Put two at the head of the queue and a good one at its end, and replace who has died."""
    outlive_poison(field, AT_ONCE)
    nr = field.seen
    field.seen += 1
    durable = Durable(postgres(field.url))  # opens nothing
    for fn in (order, deadly):
        durable.workflow(fn)
    kind, bad = list((DEADLY | HOPELESS).items())[nr % len(DEADLY | HOPELESS)]
    what, foreign = list(NOT_OURS.items())[nr % len(NOT_OURS)]
    with field.admin() as conn, conn.transaction():
        good = f"own-0-{nr:x}"
        durable.submit(good, order, good, nr, conn=conn)
        ids = (f"{POISON}{kind}-{nr}", f"{FOREIGN}{what}-{nr}")
        for id, (place, name, value) in zip(ids, (bad, foreign), strict=True):
            if id == ids[0] and kind in DEADLY:
                durable.submit(id, deadly, kind, conn=conn)
            else:
                durable.submit(id, order, id, nr, conn=conn)
            conn.execute(
                "UPDATE awaitly_snapshots SET updated_at = '2000-01-01', "
                "snapshot = jsonb_set(snapshot, ARRAY[%s, %s], %s) WHERE id = %s",
                (place, name, Jsonb(value), id),
            )
    return 1


def replace_dead(field: Field) -> None:
    for _ in field.reap():
        field.start_worker()


def outlive_poison(field: Field, most: int = 0) -> None:
    """Replace who dies until no more than ``most`` of the poison is started any more."""
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        replace_dead(field)
        with field.admin() as conn:
            if len(poison_left(conn)) <= most:
                return
        time.sleep(0.1)
    if most:
        raise TimeoutError("the poison is started again and again")
