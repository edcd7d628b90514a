"""Steps and replay: needs no database and never loads psycopg."""
