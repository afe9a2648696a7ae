"""The database behind `storage.py`: opened, made durable, and brought up to date, forward only."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from foedus_protocols.errors import StateError
from sqlalchemy import Connection, Engine, create_engine, event, inspect, text
from sqlalchemy.engine import make_url

SCHEMA_VERSION = "0002"
_MIGRATIONS = Path(__file__).parent / "migrations"
_BUSY_SECONDS = 30


def open_engine(url: str) -> Engine:
    """Open the database, building or upgrading its tables where they are behind.

    Raises:
        StateError: It was written by a newer version of this program.
    """
    # Without parameters: an error's text goes to the log, and parameters hold what organisations said.
    engine = create_engine(url, hide_parameters=True, **_sqlite_arguments(url))
    if engine.dialect.name == "sqlite":
        event.listen(engine, "connect", _on_sqlite_connect)
        event.listen(engine, "begin", _on_sqlite_begin)
    found = _schema_version(engine)
    if found is None or found < SCHEMA_VERSION:
        migrate(engine)
    elif found > SCHEMA_VERSION:
        raise StateError(f"expected a database of version {SCHEMA_VERSION}, found {found}; use a newer foedus")
    return engine


def migrate(engine: Engine) -> None:
    """Bring the tables to `SCHEMA_VERSION`."""
    # Alembic takes a quarter of a second to import, and a database that is up to date needs none of it.
    from alembic import command
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", str(_MIGRATIONS).replace("%", "%%"))
    with engine.begin() as connection:
        config.attributes["connection"] = connection
        command.upgrade(config, "head")


def _sqlite_arguments(url: str) -> dict[str, Any]:
    if make_url(url).get_backend_name() != "sqlite":
        return {}
    return {"connect_args": {"timeout": _BUSY_SECONDS, "check_same_thread": False}, "pool_size": 16}


def _schema_version(engine: Engine) -> str | None:
    if not inspect(engine).has_table("alembic_version"):
        return None
    with engine.connect() as connection:
        return connection.execute(text("SELECT version_num FROM alembic_version")).scalar()


def _on_sqlite_connect(connection: Any, _record: Any) -> None:
    # The driver must not open transactions by itself: `_on_sqlite_begin` does.
    connection.isolation_level = None
    for pragma in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON"):
        connection.execute(f"PRAGMA {pragma}")


def _on_sqlite_begin(connection: Connection) -> None:
    reading = connection.get_execution_options().get("foedus_read", False)
    connection.exec_driver_sql("BEGIN" if reading else "BEGIN IMMEDIATE")
