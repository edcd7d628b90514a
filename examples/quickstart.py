"""A checkout that is killed halfway through, and is resumed without repeating a recorded step.

    python examples/quickstart.py

Uses the server that $DATABASE_URL names, or else a private one (the [embedded] extra).
"""

import argparse
import os
import subprocess
import sys
import time

from awaitly_postgres import AlreadyRunning, Durable, Event, Step, embedded, postgres

ID = "checkout-123"


# -- what you would write ------------------------------------------------------------------


def reserve_stock(item: str) -> dict:
    return {"item": item, "price": 40}


def charge_card(user: str, amount: int) -> str:
    return f"paid-{user}-{amount}"


def create_order(stock: dict, payment: str) -> dict:
    return {"order": "A-1001", "item": stock["item"], "payment": payment}


def send_receipt(user: str, order: dict) -> None:
    """Would send an e-mail."""


def checkout(step: Step, user: str) -> dict:
    stock = step("reserve-stock", reserve_stock, "lamp")
    payment = step("charge-card", charge_card, user, stock["price"])
    order = step("create-order", create_order, stock, payment)
    step("send-receipt", send_receipt, user, order)
    return order


# -- the demonstration ---------------------------------------------------------------------


def show(event: Event) -> None:
    """Print which steps ran and which were replayed. A step counts as run once it is recorded."""
    if event.type == "step_completed":
        print(f"   ran       {event.key}", flush=True)
    elif event.type == "step_replayed":
        print(f"   replayed  {event.key}", flush=True)


def show_and_die(event: Event) -> None:
    """Kill this process right after the second step, as a power cut would."""
    show(event)
    if event.type == "step_completed" and event.key == "charge-card":
        print("   killed    no except, no finally, no goodbye", flush=True)
        os._exit(9)


def run_when_free(durable: Durable) -> dict:
    """Wait for the lease of the dead process, which could not release it, to expire; then run."""
    while True:
        try:
            return durable.run(ID, checkout, "ada")
        except AlreadyRunning:
            time.sleep(0.1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--fresh", action="store_true", help="delete the stored run and start over")
    parser.add_argument("--die", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()

    url = os.environ.get("DATABASE_URL") or embedded.start()
    store = postgres(url, prefix="quickstart:")
    if options.die:
        Durable(store, lock_ttl=3, on_event=show_and_die).run(ID, checkout, "ada")

    durable = Durable(store, lock_ttl=3, on_event=show)
    if options.fresh:
        durable.delete_state(ID)
    stored = store.load(ID)
    if stored is None:
        print(f"1. A process runs {ID} and dies after the second step.")
        this_script = [sys.executable, __file__, "--die"]
        subprocess.run(this_script, env={**os.environ, "DATABASE_URL": url})  # noqa: S603

    if stored is None or stored.execution.status != "completed":
        print("\n2. This process runs the same id as soon as the lease of the dead one expires.")
        run_when_free(durable)
        print("\n3. It runs the same id once more, and gets the recorded output.")
    else:
        print(f"{ID} was completed by an earlier start. Run it again, and nothing happens twice:")
    print(f"   returned  {durable.run(ID, checkout, 'ada')}")

    print("\nThe database holds:")
    steps = store.load(ID).steps
    for key in sorted(steps, key=lambda key: steps[key].meta["seq"]):
        print(f"   {key:13}  ran at {steps[key].meta['startedAt']}")
    print("\nRun this script again and nothing runs twice. With --fresh it starts over.")


if __name__ == "__main__":
    main()
