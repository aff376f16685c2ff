"""The database under the records: schema steps, many processes at once, crashes, full disks."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import inspect, make_url, text
from sqlalchemy.schema import CreateTable

from fedra_edge.protocol.ids import ClientId
from fedra_server.errors import ConfigurationError, StorageError, StorageFullError
from fedra_server.storage import migrating
from fedra_server.storage.database import Database
from fedra_server.storage.migrating import CURRENT_SCHEMA
from fedra_server.storage.store import Store
from fedra_server.storage.tables import METADATA
from tests.support.builders import make_client, make_digest
from tests.support.disks import fill, small_disk

ROOT = Path(__file__).parents[3]
WRITER = """
import sys
from pathlib import Path
from fedra_server.storage.store import Store
from tests.support.builders import make_client, make_digest
store = Store.open(Path(sys.argv[1]))
for number in range(int(sys.argv[3])):
    name = f"{sys.argv[2]}-{number}"
    store.add_client(make_client(name), make_digest(name))
    print(name, flush=True)
store.close()
"""


@contextmanager
def opened(home: Path) -> Iterator[Store]:
    with closing(Store.open(home)) as store:
        yield store


def add_client(store: Store, name: str) -> None:
    store.add_client(make_client(name), make_digest(name))


def add_clients(store: Store, count: int) -> None:
    for number in range(count):
        add_client(store, f"more-{number}")


def delete_all_and_fail(store: Store) -> None:
    with store.writing() as connection:
        connection.execute(text("DELETE FROM alembic_version"))
        connection.execute(text("SELECT no_such_column FROM runs"))


def start_writer(home: Path, name: str, count: int) -> subprocess.Popen[str]:
    command_line = [sys.executable, "-c", WRITER, str(home), name, str(count)]
    return subprocess.Popen(command_line, cwd=ROOT, stdout=subprocess.PIPE, text=True)


def migrations() -> Config:
    config = Config()
    config.set_main_option("script_location", str(Path(migrating.__file__).parent / "migrations"))
    return config


def test_the_steps_lead_to_exactly_the_tables(tmp_path: Path) -> None:
    with opened(tmp_path) as store, store.reading() as connection:
        assert compare_metadata(MigrationContext.configure(connection), METADATA) == []
    assert ScriptDirectory.from_config(migrations()).get_heads() == [CURRENT_SCHEMA]


def test_the_steps_can_be_taken_back(tmp_path: Path) -> None:
    config = migrations()
    with opened(tmp_path) as store, store.writing() as connection:
        config.attributes["connection"] = connection
        command.downgrade(config, "base")
        assert inspect(connection).get_table_names() == ["alembic_version"]
    with opened(tmp_path) as store:
        assert store.clients() == []


def test_every_table_can_be_made_in_postgresql() -> None:
    dialect = make_url("postgresql+psycopg://").get_dialect()()
    for table in METADATA.sorted_tables:
        statement = str(CreateTable(table).compile(dialect=dialect))
        assert f"CREATE TABLE {table.name}" in statement


def test_records_are_there_after_reopening(tmp_path: Path) -> None:
    with opened(tmp_path / "new" / "home") as store:
        add_client(store, "one")
    with opened(tmp_path / "new" / "home") as store:
        assert store.client(ClientId("one")) == make_client("one")


def test_sqlite_is_set_up_to_survive_a_power_cut(tmp_path: Path) -> None:
    with opened(tmp_path) as store, store.reading() as connection:
        settings = {
            name: connection.exec_driver_sql(f"PRAGMA {name}").scalar()
            for name in ("journal_mode", "synchronous", "foreign_keys", "busy_timeout")
        }
    assert settings == {
        "journal_mode": "wal",
        "synchronous": 2,
        "foreign_keys": 1,
        "busy_timeout": 10_000,
    }


def test_a_database_of_a_newer_version_is_left_alone(tmp_path: Path) -> None:
    with opened(tmp_path) as store, store.writing() as connection:
        connection.execute(text("UPDATE alembic_version SET version_num = '9999'"))
    with pytest.raises(ConfigurationError, match="9999") as caught:
        Store.open(tmp_path)
    assert "Upgrade" in caught.value.remedy


def test_processes_may_create_and_use_one_database_at_once(tmp_path: Path) -> None:
    writers = [start_writer(tmp_path / "home", f"writer{index}", 20) for index in range(3)]
    outputs = [writer.communicate(timeout=60)[0] for writer in writers]
    assert [writer.returncode for writer in writers] == [0, 0, 0]
    assert [len(output.splitlines()) for output in outputs] == [20, 20, 20]
    with opened(tmp_path / "home") as store:
        assert len(store.clients()) == 60


@pytest.mark.skipif(sys.platform == "win32", reason="there is no SIGKILL")
def test_what_was_acknowledged_survives_a_kill(tmp_path: Path) -> None:
    writer = start_writer(tmp_path, "writer", 100_000)
    assert writer.stdout is not None
    with writer.stdout:
        acknowledged = [writer.stdout.readline().strip() for _ in range(30)]
        writer.send_signal(signal.SIGKILL)
        acknowledged += [line.strip() for line in writer.stdout if line.endswith("\n")]
    writer.wait(timeout=60)
    with opened(tmp_path) as store:
        assert {*acknowledged} <= {it.client_id for it in store.clients()}


def test_threads_may_write_at_once(tmp_path: Path) -> None:
    with opened(tmp_path) as store:

        def write(name: str) -> None:
            for number in range(10):
                add_client(store, f"{name}-{number}")

        threads = [threading.Thread(target=write, args=(f"thread{it}",)) for it in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(store.clients()) == 80


def test_a_failed_block_leaves_nothing_behind(tmp_path: Path) -> None:
    with opened(tmp_path) as store:
        with pytest.raises(StorageError, match="no_such_column"):
            delete_all_and_fail(store)
        with store.reading() as connection:
            assert connection.scalar(text("SELECT count(*) FROM alembic_version")) == 1


def test_a_full_database_is_told_and_loses_nothing(tmp_path: Path) -> None:
    with opened(tmp_path) as store:
        add_client(store, "one")
        with store.writing() as connection:
            pages = connection.exec_driver_sql("PRAGMA page_count").scalar_one()
            connection.exec_driver_sql(f"PRAGMA max_page_count={pages}")
        with pytest.raises(StorageFullError) as caught:
            add_clients(store, 1_000)
        assert caught.value.remedy
        assert store.client(ClientId("one")) == make_client("one")


def test_a_full_disk_is_told_and_loses_nothing(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", size_bytes=2**21) as disk, opened(disk / "home") as store:
        add_client(store, "one")
        filler = fill(disk)
        with pytest.raises(StorageFullError):
            add_clients(store, 1_000)
        assert store.client(ClientId("one")) == make_client("one")
        filler.unlink()
        add_client(store, "two")
        assert store.client(ClientId("two")) == make_client("two")


def test_a_home_is_not_made_on_a_full_disk(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", size_bytes=2**16) as disk:
        fill(disk)
        with pytest.raises(StorageError):
            Store.open(disk / "home")


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("nonsense", "cannot be read"),
        ("sqlite://", "must be a file"),
        ("sqlite:///:memory:", "must be a file"),
        ("mysql://user:hunter2@db/fedra", "mysql|driver"),
        ("nosuchdb://user:hunter2@db/fedra", "nosuchdb|cannot be read"),
    ],
)
def test_a_url_that_cannot_work_is_told_without_its_password(url: str, reason: str) -> None:
    with pytest.raises(ConfigurationError, match=reason) as caught:
        Database(url)
    assert "hunter2" not in f"{caught.value}{caught.value.remedy}"


def test_a_file_that_is_no_database_is_a_storage_error(tmp_path: Path) -> None:
    (tmp_path / "fedra.sqlite3").write_bytes(b"no database " * 1_000)
    with pytest.raises(StorageError, match="not a database"):
        Store.open(tmp_path)


def test_a_view_stays_as_it_was_while_others_write(tmp_path: Path) -> None:
    with opened(tmp_path / "home") as store:
        add_client(store, "early")
        with store.reading():
            assert len(store.clients()) == 1
            writer = threading.Thread(target=add_client, args=(store, "late"))
            writer.start()
            writer.join()
            assert len(store.clients()) == 1
        assert len(store.clients()) == 2


def test_what_was_read_once_is_not_read_again_in_the_same_view(tmp_path: Path) -> None:
    reads: list[int] = []

    def read(_connection: object) -> int:
        reads.append(len(reads))
        return reads[-1]

    with opened(tmp_path / "home") as store:
        with store.reading():
            assert [store.read_once("key", read), store.read_once("key", read)] == [0, 0]
            assert store.read_once("other", read) == 1
        assert [store.read_once("key", read), store.read_once("key", read)] == [2, 3]
        assert [store.read_lasting("key", read), store.read_lasting("key", read)] == [4, 4]
        for number in range(1000):
            store.read_lasting(number, read)
        assert store.read_lasting("key", read) == 1005  # only the latest are remembered


def test_an_error_inside_a_view_is_ours_and_ends_only_the_view(tmp_path: Path) -> None:
    with opened(tmp_path / "home") as store:
        with store.reading(), pytest.raises(StorageError), store.reading() as connection:
            connection.execute(text("SELECT nonsense"))
        assert store.clients() == []
