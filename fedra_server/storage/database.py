"""One connection pool, two kinds of transaction, and database errors in our own words."""

from __future__ import annotations

import sqlite3
import threading
import time
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from typing import Any, Final, TypeVar, cast

from sqlalchemy import Connection, Engine, create_engine, event, make_url
from sqlalchemy.exc import ArgumentError, DBAPIError, IntegrityError, SQLAlchemyError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError

from fedra_server.errors import (
    ConfigurationError,
    ConflictError,
    FedraServerError,
    StorageError,
    StorageFullError,
)
from fedra_server.storage.durability import FULL_REMEDY

BUSY_TIMEOUT_S: Final = 10.0
_READS_ONLY: Final = "fedra_reads_only"
_SYNCHRONOUS: Final = "fedra_synchronous"
_POSTGRES_DISK_FULL: Final = "53100"
_IN_MEMORY: Final = (None, "", ":memory:")
_FULL: Final = "FULL"
"""A commit is on the disk before it returns; NORMAL leaves its moment to the system."""
_POOL_CONNECTIONS: Final = 5
_MORE_CONNECTIONS: Final = 40
_CACHE_BYTES: Final = 2**19
"""Pages that an SQLite connection keeps for itself; the system keeps the file in memory anyway."""
_MOST_LASTING: Final = 64

Read = TypeVar("Read")


class Database:
    """A database by URL: SQLite in WAL mode by default, PostgreSQL when asked for."""

    def __init__(self, url: str) -> None:
        self._engine = _create_engine(url)
        options: dict[str, Any] = {_READS_ONLY: True}
        if self._engine.dialect.name == "postgresql":  # there each statement has its own view
            options["isolation_level"] = "REPEATABLE READ"
        self._reader = self._engine.execution_options(**options)
        self._hasty = self._engine.execution_options(**{_SYNCHRONOUS: "NORMAL"})
        self._view = threading.local()
        self._lasting: dict[Hashable, Any] = {}
        self._remembering = threading.Lock()

    @contextmanager
    def reading(self) -> Iterator[Connection]:
        """Give one consistent view of the records for as long as the block runs.

        Whatever the same thread reads inside the block is part of this view and costs little
        more than its query; it does not see what it writes meanwhile.
        """
        outer: Connection | None = getattr(self._view, "connection", None)
        with database_errors():
            if outer is not None:
                yield outer
                return
            with self._reader.begin() as connection:
                self._view.connection = connection
                self._view.seen = {}
                try:
                    yield connection
                finally:
                    self._view.connection = None

    def read_once(self, key: Hashable, read: Callable[[Connection], Read]) -> Read:
        """Read something, or give again what was read under this key in the same view."""
        with self.reading() as connection:
            seen: dict[Hashable, Any] = self._view.seen
            if key not in seen:
                seen[key] = read(connection)
            return cast("Read", seen[key])

    def read_lasting(self, key: Hashable, read: Callable[[Connection], Read]) -> Read:
        """Read something that never changes once it is there, and remember the latest of it."""
        with self._remembering:
            if key in self._lasting:
                return cast("Read", self._lasting[key])
        with self.reading() as connection:
            found = read(connection)
        with self._remembering:
            while len(self._lasting) >= _MOST_LASTING:
                del self._lasting[next(iter(self._lasting))]
            self._lasting[key] = found
        return found

    @contextmanager
    def writing(self, *, is_lasting: bool = True) -> Iterator[Connection]:
        """Run the block as one transaction: all of it is durable at its end, or nothing.

        What need not be lasting by itself survives the end of the process; the disk is not waited
        for, and a power cut may undo it until the next transaction that is lasting.
        """
        engine = self._engine if is_lasting else self._hasty
        with database_errors(), engine.begin() as connection:
            if not is_lasting and engine.dialect.name == "postgresql":
                connection.exec_driver_sql("SET LOCAL synchronous_commit TO OFF")
            yield connection

    def close(self) -> None:
        """Let go of the connections."""
        self._engine.dispose()


@contextmanager
def database_errors() -> Iterator[None]:
    """Turn the database's errors into ours; a message never holds a statement's parameters.

    Raises:
        StorageFullError: No space is left for the database.
        ConflictError: A rule of the schema refused.
        StorageError: The database refused for another reason.
    """
    try:
        yield
    except (SQLAlchemyError, sqlite3.Error) as error:
        raise translate(error) from error


def translate(error: SQLAlchemyError | sqlite3.Error) -> FedraServerError:
    """Find our error for one of the database's."""
    reason = error.orig if isinstance(error, DBAPIError) else error
    if isinstance(error, IntegrityError):
        return ConflictError(f"the records do not allow this: {reason}")
    if _is_full(reason):
        return StorageFullError("no space is left for the database", remedy=FULL_REMEDY)
    if isinstance(error, PoolTimeoutError):
        return StorageError("the database is busy", remedy="Try again.")
    return StorageError(f"the database refused: {reason}")


def _is_full(reason: BaseException | None) -> bool:
    if isinstance(reason, sqlite3.Error):
        return getattr(reason, "sqlite_errorcode", None) == sqlite3.SQLITE_FULL
    return getattr(reason, "sqlstate", None) == _POSTGRES_DISK_FULL


def _create_engine(url: str) -> Engine:
    remedy = "Give a SQLAlchemy URL of SQLite or PostgreSQL, for example postgresql+psycopg://..."
    try:
        dialect = make_url(url).get_backend_name()
        if dialect == "sqlite" and make_url(url).database in _IN_MEMORY:
            raise ConfigurationError("the database must be a file", remedy=remedy)
        engine = create_engine(
            url,
            hide_parameters=True,
            pool_size=_POOL_CONNECTIONS,
            max_overflow=_MORE_CONNECTIONS,
            pool_use_lifo=True,  # the connection used last has its pages at hand
            pool_pre_ping=dialect != "sqlite",
        )
    except ArgumentError as error:
        raise ConfigurationError("the database URL cannot be read", remedy=remedy) from error
    except ImportError as error:
        message = f"the database driver is not installed: {error.name}"
        raise ConfigurationError(message, remedy="Install the driver with pip.") from error
    if dialect == "sqlite":
        _prepare_sqlite(engine)
    elif dialect != "postgresql":
        raise ConfigurationError(f"{dialect} is not supported", remedy=remedy)
    return engine


def _prepare_sqlite(engine: Engine) -> None:
    event.listen(engine, "connect", _configure_sqlite)
    event.listen(engine, "begin", _begin_sqlite)
    try:
        with database_errors():
            _use_write_ahead_log(engine)
    except FedraServerError:
        engine.dispose()
        raise


def _configure_sqlite(connection: sqlite3.Connection, _record: object) -> None:
    """Set what holds per connection, and let us begin transactions ourselves."""
    connection.isolation_level = None
    try:
        connection.execute(f"PRAGMA busy_timeout={int(BUSY_TIMEOUT_S * 1000)}")
        connection.execute(f"PRAGMA synchronous={_FULL}")
        connection.execute("PRAGMA foreign_keys=ON")
        connection.execute(f"PRAGMA cache_size=-{_CACHE_BYTES // 1024}")
    except sqlite3.Error:
        connection.close()
        raise


def _begin_sqlite(connection: Connection) -> None:
    """Begin; a writer takes the lock at once, so that it waits now and never fails midway."""
    options = connection.get_execution_options()
    pooled = connection.connection
    cursor = pooled.cursor()
    if options.get(_READS_ONLY, False):
        cursor.execute("BEGIN")
        return
    wanted = options.get(_SYNCHRONOUS, _FULL)
    if pooled.info.get(_SYNCHRONOUS, _FULL) != wanted:
        cursor.execute(f"PRAGMA synchronous={wanted}")
        pooled.info[_SYNCHRONOUS] = wanted
    cursor.execute("BEGIN IMMEDIATE")


def _use_write_ahead_log(engine: Engine) -> None:
    """Switch the file to WAL once; SQLite does not wait by itself when another does the same."""
    deadline = time.monotonic() + BUSY_TIMEOUT_S
    pause = threading.Event()
    raw: Any = engine.raw_connection()
    try:
        while True:
            try:
                raw.execute("PRAGMA journal_mode=WAL")
            except sqlite3.OperationalError as error:
                if time.monotonic() > deadline or error.sqlite_errorcode != sqlite3.SQLITE_BUSY:
                    raise
                pause.wait(0.02)
            else:
                return
    finally:
        raw.close()
