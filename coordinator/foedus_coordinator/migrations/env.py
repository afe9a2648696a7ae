"""Alembic's entry point: runs the migrations on the connection that `storage.migrate` hands over."""

from __future__ import annotations

from alembic import context

from foedus_coordinator.tables import metadata

connection = context.config.attributes["connection"]
context.configure(connection=connection, target_metadata=metadata, transactional_ddl=False)
context.run_migrations()
