"""Many processes want one expired lease, round after round; prints who got it each time.

Nobody waits for the row: who finds it locked by another takes it for taken.

Arguments: URL, number of processes, number of rounds.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
from typing import Any

import psycopg

from awaitly_postgres import postgres

NAME = f"racers-{os.getpid()}"
PATIENCE = 60.0  # seconds


def race(url: str, rounds: int, gate: Any, results: Any) -> None:
    with postgres(url, max_size=1, kwargs={"application_name": NAME}) as store:
        for _ in range(rounds):
            gate.wait(PATIENCE)
            lease = store.try_acquire("prize")
            results.put(lease and lease.token)


def let_in(db: psycopg.Connection, gate: Any) -> None:
    db.execute(
        "INSERT INTO awaitly_workflow_lock VALUES ('prize', 'the:dead:one', '2000-01-01') "
        "ON CONFLICT (workflow_id) DO UPDATE SET owner_token = EXCLUDED.owner_token, "
        "expires_at = EXCLUDED.expires_at"
    )
    gate.wait(PATIENCE)


def main(url: str, size: int, rounds: int) -> None:
    fork = multiprocessing.get_context("fork")
    gate, results = fork.Barrier(size + 1), fork.SimpleQueue()
    racers = [fork.Process(target=race, args=(url, rounds, gate, results)) for _ in range(size)]
    for racer in racers:
        racer.start()
    with psycopg.connect(url, autocommit=True) as db:
        for _ in range(rounds):
            let_in(db, gate)
            winners = [token for _ in range(size) if (token := results.get())]
            (stored,) = db.execute("SELECT owner_token FROM awaitly_workflow_lock").fetchone()
            print(json.dumps({"winners": winners, "stored": stored}), flush=True)
    for racer in racers:
        racer.join(PATIENCE)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
