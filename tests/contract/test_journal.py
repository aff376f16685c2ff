"""The journal of a home: what it tells of, who finds what was done to it, and who may write."""

from __future__ import annotations

import json
import re
import shutil
import sqlite3
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from contextlib import closing
from itertools import pairwise
from pathlib import Path

import pytest
from alembic import command as alembic
from alembic.config import Config

from fedra_server.chain import BrokenChain, Event, Head, head_of
from fedra_server.config import ServerHome
from fedra_server.errors import ConflictError
from fedra_server.exit_codes import ExitCode
from fedra_server.storage import migrations
from fedra_server.storage.journal import write_entry
from fedra_server.storage.store import Store
from tests.contract.test_audit import ROUNDS, RUN, opened, play_run
from tests.support.builders import make_model_spec
from tests.support.servers import run_server_command

TEXT_COLUMNS = ("event", "subject", "by", "details", "previous_sha256", "sha256")
FORGED_REVISION = (
    "INSERT INTO revisions (run, number, manifest, last_trained, published_at) "
    "SELECT run, 9, manifest, last_trained, 1.0 FROM revisions WHERE number = 1"
)
CHANGE = "UPDATE journal SET {column} = CAST(? AS TEXT) WHERE sequence = 5"
WRITERS, NOTES = 3, 10
WRITE = """
import sys
from pathlib import Path
from fedra_server.chain import Event
from fedra_server.storage.store import Store
store = Store.open(Path(sys.argv[1]))
for number in range(int(sys.argv[3])):
    store.note(Event.REVISION_EXPORTED, sys.argv[2], {"number": number})
store.close()
"""


@pytest.fixture(scope="module")
def played_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return play_run(tmp_path_factory.mktemp("journal")).path


@pytest.fixture
def place(played_home: Path, tmp_path: Path) -> ServerHome:
    """Give a copy of the home that a test may tamper with."""
    return ServerHome(shutil.copytree(played_home, tmp_path / "home"))


@pytest.fixture
def tamper(place: ServerHome) -> Callable[..., None]:
    """Change the database behind its own back, as who holds the disk can."""

    def run(statement: str, *values: object) -> None:
        with closing(sqlite3.connect(place.database_file)) as connection:
            names = connection.execute(
                "SELECT name FROM sqlite_master WHERE type = 'trigger' AND tbl_name = 'journal'"
            ).fetchall()
            for (name,) in names:
                connection.execute(f"DROP TRIGGER {name}")
            assert connection.execute(statement, values).rowcount > 0
            connection.commit()

    return run


def verdict(place: ServerHome, expected: Head | None = None) -> Head | BrokenChain:
    with opened(place) as store:
        return store.verify_journal(expected)


def head(place: ServerHome) -> Head:
    with opened(place) as store:
        return store.journal_head()


def test_a_run_is_told_from_its_creation_to_its_end(place: ServerHome) -> None:
    with opened(place) as store:
        entries = list(store.journal())
        assert store.first_contradiction() is None
        clients = {it.client_id for it in store.clients(include_left=True)}
        revisions = store.revisions(RUN)
    events = Counter(entry.event for entry in entries)
    assert entries[0].event == Event.JOURNAL_BEGUN
    assert not json.loads(entries[0].details)["upgraded"]
    assert events[Event.MODEL_REGISTERED] == events[Event.RUN_CREATED] == 1
    assert events[Event.RUN_STARTED] == events[Event.RUN_FINISHED] == 1
    assert events[Event.CLIENT_JOINED] == events[Event.CLIENT_LEFT] == len(clients) == 2
    assert events[Event.ROUND_PLANNED] == events[Event.REVISION_PUBLISHED] == ROUNDS
    assert events[Event.DELTA_RECEIVED] == events[Event.DELTA_ADMITTED] == 2 * ROUNDS
    assert len(revisions) == ROUNDS + 1
    received = {it.by for it in entries if it.event == Event.DELTA_RECEIVED}
    assert received == {f"client {client_id}" for client_id in clients}
    assert all(later.at >= earlier.at for earlier, later in pairwise(entries))


def tell_and_fail(store: Store) -> None:
    with store.writing() as connection:
        write_entry(connection, Event.MODEL_REGISTERED, "never", "command")
        connection.exec_driver_sql("DELETE FROM journal")


def test_what_fails_is_not_told(place: ServerHome) -> None:
    with opened(place) as store:
        before = store.journal_head()
        other = make_model_spec(num_layers=7, name=store.models()[0].spec.name)
        with pytest.raises(ConflictError):
            store.add_model(other, 1.0)
        with pytest.raises(ConflictError):
            tell_and_fail(store)
        assert store.journal_head() == before


@pytest.mark.parametrize(
    "statement",
    ["UPDATE journal SET subject = 'other' WHERE sequence = 2", "DELETE FROM journal",
     "INSERT OR REPLACE INTO journal SELECT * FROM journal WHERE sequence = 2",
     "INSERT INTO journal SELECT 0, at, event, subject, by, details, sha256, sha256 FROM journal"],
)  # fmt: skip
def test_the_database_itself_refuses_to_change_the_journal(
    place: ServerHome, statement: str
) -> None:
    with opened(place) as store:
        before = list(store.journal())
        with pytest.raises(ConflictError, match="append-only"), store.writing() as it:
            it.exec_driver_sql(statement)
        assert list(store.journal()) == before


@pytest.mark.parametrize("column", TEXT_COLUMNS)
@pytest.mark.parametrize("value", ["other", b"\xff\xfe", "", 7], ids=repr)
def test_a_changed_column_is_found(
    place: ServerHome, tamper: Callable[..., None], column: str, value: object
) -> None:
    tamper(CHANGE.format(column=column), value)
    found = verdict(place)
    assert isinstance(found, BrokenChain)
    assert found.sequence == 5


def test_a_changed_number_or_moment_is_found(
    place: ServerHome, tamper: Callable[..., None]
) -> None:
    tamper("UPDATE journal SET at = at + 0.001 WHERE sequence = 4")
    assert isinstance(verdict(place), BrokenChain)
    tamper("UPDATE journal SET sequence = 1000 WHERE sequence = 3")
    found = verdict(place)
    assert isinstance(found, BrokenChain)
    assert found.sequence == 3


def test_an_anchor_finds_what_was_cut_off(place: ServerHome, tamper: Callable[..., None]) -> None:
    anchor = head(place)
    tamper("DELETE FROM journal WHERE sequence > ?", anchor.sequence - 3)
    assert isinstance(verdict(place), Head)
    found = verdict(place, anchor)
    assert isinstance(found, BrokenChain)
    assert found.sequence == anchor.sequence - 2


@pytest.mark.parametrize(
    ("statement", "event"),
    [
        ("UPDATE revisions SET manifest = replace(manifest, '0', '1') WHERE number = 2",
         Event.REVISION_PUBLISHED),
        ("UPDATE merges SET weight = weight * 2 WHERE revision = 1", Event.REVISION_PUBLISHED),
        ("UPDATE merges SET scale = scale / 2 WHERE revision = 1", Event.REVISION_PUBLISHED),
        ("UPDATE assignments SET chance = chance / 2 WHERE round_number = 3", Event.ROUND_PLANNED),
        ("UPDATE assignments SET delta = replace(delta, 'a', 'b')", Event.DELTA_ADMITTED),
        ("UPDATE assignments SET delta = NULL WHERE round_number = 1", Event.DELTA_ADMITTED),
        ("DELETE FROM revisions WHERE number = 3", Event.REVISION_PUBLISHED),
        (FORGED_REVISION, Event.RUN_CREATED),
    ],
)  # fmt: skip
def test_records_that_were_rewritten_contradict_the_journal(
    place: ServerHome, tamper: Callable[..., None], statement: str, event: Event
) -> None:
    tamper(statement)
    assert isinstance(verdict(place), Head)
    with opened(place) as store:
        found = store.first_contradiction()
        assert found is not None
        [entry] = store.journal(found.sequence, 1)
    assert entry.event == event


def test_several_processes_write_one_chain(place: ServerHome) -> None:
    before = head(place).sequence
    script = [sys.executable, "-c", WRITE, str(place.path)]
    writers = [subprocess.Popen([*script, f"writer-{i}", str(NOTES)]) for i in range(WRITERS)]
    assert [it.wait(60) for it in writers] == [0] * WRITERS
    found = verdict(place)
    assert isinstance(found, Head)
    assert found.sequence == before + WRITERS * NOTES
    with opened(place) as store:
        subjects = [entry.subject for entry in store.journal(before + 1)]
    assert Counter(subjects) == {f"writer-{i}": NOTES for i in range(WRITERS)}


def test_a_home_from_before_begins_a_chain_that_says_so(place: ServerHome) -> None:
    config = Config()
    config.set_main_option("script_location", str(Path(migrations.__file__).parent))
    with opened(place) as store, store.writing() as connection:
        config.attributes["connection"] = connection
        alembic.downgrade(config, "0004")
    with opened(place) as store:
        [first] = store.journal()
        assert store.verify_journal() == head_of(first)
        assert store.first_contradiction() is None
    told = json.loads(first.details)
    assert (first.event, told["upgraded"]) == (Event.JOURNAL_BEGUN, True)
    assert told["before"] == {"clients": 2, "models": 1, "runs": 1, "revisions": ROUNDS + 1}


def test_the_command_tells_verifies_and_anchors(place: ServerHome) -> None:
    home = ("--home", str(place.path))
    shown = run_server_command("audit", "log", *home).stdout
    assert "delta-admitted" in shown
    assert "before.clients=0" in shown.splitlines()[0]
    assert not re.search(r"=(True|False|None|\{)", shown)
    anchor = run_server_command("audit", "log", "--head", *home).stdout.strip()
    assert shown.splitlines()[-1] == f"Verified: the newest entry is {anchor}"
    assert anchor == str(head(place))
    told = json.loads(run_server_command("audit", "log", "--json", "--since", "3", *home).stdout)
    assert [told["entries"][0]["sequence"], told["head"], told["broken"]] == [3, anchor, None]
    run_server_command("prune", RUN, "--keep-revisions", "1", *home)
    run_server_command("export", "--run", RUN, "--out", str(place.path / "out"), *home, check=False)
    assert "run-pruned" in run_server_command("audit", "log", *home).stdout
    verdict = run_server_command("audit", "log", "--expect", anchor, *home).stdout
    assert verdict == f"Verified: the newest entry is {head(place)}\n"


def test_the_command_names_the_first_broken_entry(
    place: ServerHome, tamper: Callable[..., None]
) -> None:
    home = ("--home", str(place.path))
    anchor = run_server_command("audit", "log", "--head", *home).stdout.strip()
    tamper("UPDATE journal SET subject = 'somebody' WHERE sequence = 6")
    broken = run_server_command("audit", "log", *home, check=False)
    assert broken.returncode == ExitCode.AUDIT
    assert broken.stdout.splitlines()[-1] == "Broken: entry 6: it is not what was written"
    assert len(broken.stdout.splitlines()) == 6
    document = run_server_command(
        "audit", "log", "--json", "--expect", anchor, *home, check=False
    )  # fmt: skip
    assert document.returncode == ExitCode.AUDIT
    told = json.loads(document.stdout)
    assert (told["broken"]["sequence"], told["head"], len(told["entries"])) == (6, None, 5)
    wrong = run_server_command("audit", "log", "--expect", "6", *home, check=False)
    assert wrong.returncode == ExitCode.USAGE


def test_the_store_opens_a_journal_for_a_new_home(tmp_path: Path) -> None:
    with closing(Store.open(tmp_path / "new")) as store:
        [first] = store.journal()
    assert json.loads(first.details)["upgraded"] is False
