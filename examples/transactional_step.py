"""Moves money exactly once, although the step after it fails.

    python examples/transactional_step.py [transfer id]

Uses the server that $DATABASE_URL names, or else a private one (the [embedded] extra).
"""

import os
import sys

import psycopg

from awaitly_postgres import Durable, Step, embedded, postgres

ACCOUNTS = """
CREATE TABLE IF NOT EXISTS example_accounts (
    name text PRIMARY KEY,
    balance integer NOT NULL CHECK (balance >= 0)
);
INSERT INTO example_accounts VALUES ('ada', 100), ('bob', 0) ON CONFLICT DO NOTHING;
"""

mail_server = {"up": False}


def move(conn: psycopg.Connection, source: str, target: str, amount: int) -> int:
    """Make two updates. They commit together with the record of this step, or not at all."""
    change = "UPDATE example_accounts SET balance = balance + %s WHERE name = %s"
    conn.execute(change, (amount, target))
    conn.execute(change, (-amount, source))
    return amount


def notify(target: str, amount: int) -> None:
    if not mail_server["up"]:
        raise ConnectionError("the mail server is down")


def transfer(step: Step, source: str, target: str, amount: int) -> int:
    moved = step.transaction("move", move, source, target, amount)
    step("notify", notify, target, moved)
    return moved


def main() -> int:
    id = sys.argv[1] if len(sys.argv) > 1 else "transfer-1"
    url = os.environ.get("DATABASE_URL") or embedded.start()
    with psycopg.connect(url, autocommit=True) as conn, postgres(url) as store:
        conn.execute(ACCOUNTS)
        durable = Durable(store)

        def show(moment: str) -> None:
            rows = conn.execute("SELECT name, balance FROM example_accounts ORDER BY name")
            print(f"{moment:31}", *(f"{name}: {balance:4}" for name, balance in rows), sep="  ")

        show(f"before {id}")
        try:
            durable.run(id, transfer, "ada", "bob", 30)
        except ConnectionError as error:
            show(f"failed: {error}")
            mail_server["up"] = True
            durable.run(id, transfer, "ada", "bob", 30)  # the money is not moved again
        except psycopg.errors.CheckViolation:
            show("refused, nothing was moved")
            return 1
        show("completed")
    print("Run this script again and nothing moves. With another id, another 30 are moved.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
