"""A Store in PostgreSQL, which several nodes share (module store). Needs psycopg, which only who uses it installs."""
