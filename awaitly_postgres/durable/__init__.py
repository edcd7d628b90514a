"""Durable runs: joins workflows and the store, which records their steps.

What users call is `Durable`: durable.py runs and registers, submitting.py and resuming.py start
what is stored, looking.py, steering.py, rewinding.py and checking.py work on stored runs.

One start of a run, in reading order: session.py (admitted, executed, ended), admission.py (lease,
identity, counting the start), checkpoints.py (each write and its fence), written.py (append or
rewrite), group.py (one commit for several threads), step_transaction.py (exactly-once steps).

Many runs: pending.py (pauses, and the queue), workers.py (threads).
"""
