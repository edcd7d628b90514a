"""Steps and replay. Needs no database and never loads psycopg."""
