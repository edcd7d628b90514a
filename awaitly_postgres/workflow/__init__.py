"""Steps and replay. Needs no database and never loads psycopg.

In reading order: step.py (what a workflow calls), run.py over asking.py (one start: replay or
execute), history.py (what is recorded, and its order), map.py (`Step.map`), recorder.py (what a
run needs from a store). failure.py and codec.py turn exceptions and values into JSON and back.
"""
