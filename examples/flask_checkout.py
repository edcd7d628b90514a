"""A checkout that a web server's crash cannot break, and that a second click cannot repeat.

    export DATABASE_URL=postgresql://localhost/shop
    flask --app flask_checkout init                         # once: creates the tables
    gunicorn --workers 2 --preload flask_checkout:app
    curl -d item=tea -d quantity=2 localhost:8000/checkouts/0b5e5ac0-6c0f-4b0e-9a51-d5bb9a4e3f5d
    # and open that address in a browser to see its progress
    flask --app flask_checkout resume                       # cron: runs that a dead worker left

The client chooses the id, a UUID. A repeated POST returns the same order (200). While a checkout is
in progress, another POST gets 409 with Retry-After; the same id with a different order gets 422.
"""

from __future__ import annotations

import json
import os
from typing import Any
from uuid import UUID

import click
from flask import Flask, jsonify, render_template_string, request
from flask.typing import ResponseReturnValue

from awaitly_postgres import (
    AlreadyRunning,
    Durable,
    Step,
    StoreError,
    StoreUnavailable,
    WorkflowConflict,
    postgres,
)

PRICES = {"tea": 450, "teapot": 3900, "tea cosy": 1850}  # in cents
ORDERS = """
CREATE TABLE IF NOT EXISTS shop_orders (
  number BIGINT GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
  item TEXT NOT NULL,
  quantity INT NOT NULL,
  payment TEXT NOT NULL
)"""

# This opens no connection, so it may run before gunicorn forks its workers (--preload). retry_for
# is short: a request should not wait for an unreachable database as long as a script may.
store = postgres(os.environ.get("DATABASE_URL", "postgresql://localhost/shop"), retry_for=5)
durable = Durable(store)
app = Flask(__name__)


class CardDeclined(Exception):
    """The card was declined; the customer can try again."""


def pause(error: Exception, attempt: int) -> float | None:
    """Give a declined card up; whatever else has failed is tried again, after some seconds."""
    return None if isinstance(error, CardDeclined) else min(10 * attempt, 600)


@durable.workflow(version=1, backoff=pause)
def checkout(step: Step, item: str, quantity: int) -> dict[str, Any]:
    """Charge the card, create the order, send the receipt, pack each item."""
    cents = PRICES[item] * quantity
    payment = step("charge-card", charge_card, cents, step.idempotency_key("charge-card"))
    number = step.transaction("create-order", create_order, item, quantity, payment)
    step("send-receipt", send_receipt, number)
    step.map("pack", lambda nr: pack(number, nr), range(1, quantity + 1))
    return {"number": number, "item": item, "quantity": quantity, "cents": cents}


def charge_card(cents: int, idempotency_key: str) -> str:
    """Stand in for a payment provider, which charges once for each idempotency key."""
    if cents > 100_000:
        raise CardDeclined(f"{cents / 100:,.2f} is more than the card allows")
    return f"payment of {cents / 100:.2f} for {idempotency_key}"


def create_order(conn: Any, item: str, quantity: int, payment: str) -> int:
    """Insert the order, in the transaction that records the step."""
    insert = (
        "INSERT INTO shop_orders (item, quantity, payment) VALUES (%s, %s, %s) RETURNING number"
    )
    return int(conn.execute(insert, (item, quantity, payment)).fetchone()[0])


def send_receipt(number: int) -> None:
    """Stand in for an e-mail."""
    app.logger.info("receipt for order %s", number)


def pack(number: int, nr: int) -> str:
    """Stand in for whoever packs the parcels of an order, several at once."""
    return f"parcel {nr} of order {number}"


@app.post("/checkouts/<uuid:id>")
def place_order(id: UUID) -> ResponseReturnValue:
    """Run the checkout, resume it if it was interrupted, or return the order it created."""
    item, quantity = request.form.get("item", ""), request.form.get("quantity", 0, int)
    if item not in PRICES or not 1 <= quantity <= 1000:
        return jsonify(error=f"item must be one of {', '.join(PRICES)}, quantity 1 to 1000"), 400
    return jsonify(durable.run(f"checkout:{id}", checkout, item, quantity))


@app.errorhandler(AlreadyRunning)
def already_running(error: AlreadyRunning) -> ResponseReturnValue:
    """Tell the second of two simultaneous requests to retry; it then gets the first one's order."""
    return jsonify(error="this checkout is in progress"), 409, {"Retry-After": "1"}


@app.errorhandler(WorkflowConflict)
def conflict(error: WorkflowConflict) -> ResponseReturnValue:
    """Refuse an id that belongs to another order."""
    return jsonify(error="this id belongs to another order"), 422


@app.errorhandler(CardDeclined)
def declined(error: CardDeclined) -> ResponseReturnValue:
    """Say why there is no order; the same POST retries the payment."""
    return jsonify(error=str(error)), 402


@app.errorhandler(StoreUnavailable)
def unavailable(error: StoreUnavailable) -> ResponseReturnValue:
    """Ask for a retry. Nothing is lost: the same POST resumes where this one stopped."""
    return jsonify(error="the database is unavailable"), 503, {"Retry-After": "5"}


@app.get("/checkouts/<uuid:id>")
def status(id: UUID) -> ResponseReturnValue:
    """Show the progress of a checkout."""
    run = durable.get(f"checkout:{id}")
    if run is None:
        return render_template_string(PAGE, id=id, state="unknown"), 404
    steps = [step for step in run.steps if not (step.map and step.ok)]  # those are in run.maps
    longest = max((step.seconds for step in steps), default=0) or 1
    context = {"id": id, "state": run.state, "run": run, "steps": steps, "longest": longest}
    return render_template_string(PAGE, **context)


@app.get("/health")
def health() -> ResponseReturnValue:
    """Answer a load balancer: 200 while the database answers."""
    try:
        store.ping()
    except StoreError:
        return jsonify(database="unavailable"), 503
    return jsonify(database="ok")


@app.cli.command()
def init() -> None:
    """Create the tables."""
    import psycopg

    store.create_tables()
    with psycopg.connect(os.environ["DATABASE_URL"]) as conn:
        conn.execute(ORDERS)


@app.cli.command()
@click.pass_context
def resume(context: click.Context) -> None:
    """Resume pending checkouts; exit with status 1 if any failed."""
    failed = [o for o in durable.resume_pending(prefix="checkout:") if o.status == "failed"]
    for outcome in failed:
        click.echo(f"{outcome.id} failed: {outcome.error!r}", err=True)
    context.exit(1 if failed else 0)


@app.template_filter("pretty")
def pretty(value: Any) -> str:
    """Write a stored value as JSON. The template escapes it."""
    return json.dumps(value, ensure_ascii=False)


PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
{% if state in ("pending", "running", "waiting", "retrying") %}
<meta http-equiv="refresh" content="2">
{% endif %}
<title>Checkout {{ id }}: {{ state }}</title>
<style>
  :root { color-scheme: light dark; --line: #8884; --quiet: #888; --bar: #2f855a; }
  body { font: 16px/1.5 system-ui, sans-serif; max-width: 44rem; margin: 3rem auto;
         padding: 0 1rem; }
  h1 { font-size: 1.5rem; margin-bottom: 0; }
  h1 span { margin-left: .5rem; padding: .15rem .6rem; border-radius: 1rem; font-size: .875rem;
            vertical-align: middle; color: #fff; background: #5c6670; }
  h1 + small { color: var(--quiet); }
  h1 .completed { background: #26704a; } h1 .failed { background: #b3261e; }
  h1 .running { background: #205d96; } h1 .retrying { background: #8f4e00; }
  table { width: 100%; border-collapse: collapse; table-layout: fixed; }
  td { padding: .5rem .25rem; border-top: 1px solid var(--line); vertical-align: top;
       overflow-wrap: anywhere; }
  td:first-child { width: 9rem; } td:last-child { width: 6rem; text-align: right; }
  i { display: block; height: .6rem; margin-top: .45rem; border-radius: 2px; min-width: 2px;
      background: var(--bar); }
  .failed i { background: #c53030; }
  progress { width: 100%; accent-color: var(--bar); }
  code { display: block; font-size: .8125rem; color: var(--quiet); }
  .failure { padding: .75rem 1rem; border-left: 4px solid #c53030; background: #c530301a; }
  footer { margin-top: 1.5rem; color: var(--quiet); font-size: .875rem; }
</style>
<h1>Checkout <span class="{{ state }}">{{ state }}</span></h1>
<small>{{ id }}</small>
{% if state == "unknown" %}<p>Nothing was ordered under this id.</p>
{% else %}
{% with order = run.result %}
{% if order %}<p>Order <b>{{ order.number }}</b>: {{ order.quantity }} × {{ order.item }},
  {{ "%.2f"|format(order.cents / 100) }}</p>{% endif %}
{% endwith %}
{% if run.error %}<p class="failure">{{ run.error }}</p>{% endif %}
<table>
{% for step in steps %}
  <tr{% if not step.ok %} class="failed"{% endif %}>
    <td>{{ step.key }}</td>
    <td><i style="width: {{ 100 * step.seconds / longest }}%"></i>
      {% if not step.ok %}<code>{{ step.error }}</code>
      {% elif step.value is not none %}<code>{{ step.value|pretty }}</code>{% endif %}</td>
    <td>{% if step.duration %}{{ "%.2f"|format(1000 * step.duration) }} ms{% endif %}</td>
  </tr>
{% else %}<tr><td>Nothing has run yet.</td></tr>
{% endfor %}
{% for key, (done, of) in run.maps.items() %}
  <tr><td>{{ key }}</td>
    <td><progress value="{{ done }}" max="{{ of }}"></progress></td>
    <td>{{ done }} of {{ of }}</td></tr>
{% endfor %}
</table>
<footer>last written {{ run.updated_at.strftime("%Y-%m-%d %H:%M:%S UTC") }}</footer>
{% endif %}
</html>
"""
