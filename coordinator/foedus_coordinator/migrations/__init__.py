"""Alembic migrations of the coordinator's database, run by `storage.migrate`."""
