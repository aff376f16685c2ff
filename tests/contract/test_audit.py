"""The audit: clean after a real run, and every kind of damage found and named."""

from __future__ import annotations

import json
import shutil
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from itertools import cycle
from pathlib import Path

import numpy as np
import pytest
from alembic import command
from alembic.config import Config
from sqlalchemy import text

from fedra_edge.protocol.ids import AssignmentId
from fedra_edge.protocol.models import ModelSpec
from fedra_edge.protocol.slices import SliceManifest
from fedra_edge.protocol.tensors import read_header, read_tensor, serialize_tensors
from fedra_server.auditing import AuditReport, audit
from fedra_server.config import ServerConfig, ServerHome
from fedra_server.errors import NotFoundError
from fedra_server.exit_codes import ExitCode
from fedra_server.runs import AssignmentState, RunState, ScreeningSpec
from fedra_server.storage import migrations
from fedra_server.storage.blobs import BlobStore
from fedra_server.storage.store import Store
from tests.support.edges import wait_until
from tests.support.headquarters import Delta, delta_tensors, headquarters
from tests.support.servers import run_server_command

RUN = "audited"
ROUNDS = 3


def play_run(directory: Path, **options: object) -> ServerHome:
    """Let two sites take part in a whole run on a real server."""
    home = ServerHome(directory / "home")
    with headquarters(home, ServerConfig()) as office, ExitStack() as stack:
        sites = [stack.enter_context(office.site(name)) for name in ("north", "south")]
        with office.run(RUN, rounds=ROUNDS, max_layers=2, **options):
            for _ in range(ROUNDS):
                for factor, site in enumerate(sites, start=1):
                    answer = site.send(delta_of(office.spec, site.work(), factor))
                    assert answer.status_code == 200, answer.text
            store = office.services.store
            wait_until("the end of the run", lambda: store.run(RUN).state is RunState.FINISHED)
    home.config_file.write_text("")
    return home


@pytest.fixture(scope="module")
def audited_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Give the home of a run with moments."""
    home = play_run(tmp_path_factory.mktemp("audit"), server_optimizer={"kind": "fedadam"})
    with opened(home) as store:
        assert store.revision(RUN).moments[-1] is not None
    return home.path


def delta_of(spec: ModelSpec, manifest: SliceManifest, factor: int) -> Delta:
    """Make deltas that differ, so that weights matter."""
    tensors = {name: factor * value for name, value in delta_tensors(spec, manifest).items()}
    return Delta.of(serialize_tensors(tensors), manifest.assignment_id)


@pytest.fixture
def place(audited_home: Path, tmp_path: Path) -> ServerHome:
    """Give a copy of the home that a test may damage."""
    return ServerHome(shutil.copytree(audited_home, tmp_path / "home"))


@contextmanager
def opened(home: ServerHome) -> Iterator[Store]:
    store = Store.open(home.path)
    try:
        yield store
    finally:
        store.close()


def audited(home: ServerHome, revision: int | None = None) -> AuditReport:
    with opened(home) as store:
        return audit(store, BlobStore(home.blobs), home, revision=revision)


def execute(home: ServerHome, statement: str, *values: object) -> None:
    """Write to the database past the software."""
    connection = sqlite3.connect(home.database_file)
    with connection:
        assert connection.execute(statement, values).rowcount > 0
    connection.close()


def flip_bit(path: Path, offset: int) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.write_bytes(data)


def head_was_merged(store: Store, times: int) -> Callable[[], bool]:
    return lambda: store.revision(RUN).versions[-1] >= times


def merged_delta(home: ServerHome, number: int) -> AssignmentId:
    with opened(home) as store:
        return min(it.assignment_id for it in store.assignments(RUN, number))


def test_a_real_run_is_clean(place: ServerHome) -> None:
    report = audited(place)
    assert report.is_clean, report
    (run,) = report.runs
    assert (run.revisions, run.recomputed, run.pruned) == (ROUNDS + 1, ROUNDS + 1, 0)
    assert run.deltas == 2 * ROUNDS
    with opened(place) as store:
        assert {it.state for it in store.assignments(RUN)} == {AssignmentState.MERGED}


def test_one_revision_can_be_audited_alone(place: ServerHome) -> None:
    report = audited(place, revision=2)
    assert report.is_clean
    assert report.runs[0].recomputed == 1


def test_what_does_not_exist_cannot_be_audited(place: ServerHome) -> None:
    with opened(place) as store:
        for wanted in ({"run": "nobody"}, {"revision": 99}):
            with pytest.raises(NotFoundError, match="there is no"):
                audit(store, BlobStore(place.blobs), place, **wanted)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def lengthen(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b" ")


def empty(path: Path) -> None:
    path.write_bytes(bytes(path.stat().st_size))


def test_no_damage_to_any_file_goes_unnoticed(place: ServerHome) -> None:
    files = [*place.blobs.glob("??/*"), *place.deltas.iterdir()]
    damages: list[Callable[[Path], None]] = [cut, lengthen, empty, Path.unlink]
    with opened(place) as store:
        blobs = BlobStore(place.blobs)
        for path, damage in zip(files, cycle(damages), strict=False):
            whole = path.read_bytes()
            damage(path)
            report = audit(store, blobs, place)
            told = "\n".join(f"{it.what} {it.detail}" for it in report.broken)
            assert path.name in told or f"delta {path.stem}" in told
            assert [run.run for run in report.runs] == [RUN]
            path.write_bytes(whole)
        assert audit(store, blobs, place).is_clean


def test_a_flipped_bit_in_a_delta_is_found(place: ServerHome) -> None:
    delta = merged_delta(place, 2)
    path = place.delta_file(delta)
    name, info = min(read_header(path).items())
    flip_bit(path, info.start + 3)  # sign and exponent of its first value
    report = audited(place)
    assert [(it.run, it.what) for it in report.broken] == [(RUN, f"delta {delta}")]
    assert "altered" in report.broken[0].detail
    assert report.difference is not None
    assert (report.difference.revision, report.difference.tensor) == (2, name)
    assert set(report.difference.index or ()) == {0}
    assert report.difference.recorded != report.difference.recomputed


def test_a_flipped_bit_in_an_adapter_blob_is_found(place: ServerHome) -> None:
    with opened(place) as store:
        blob = store.revision(RUN).manifest.head
    path = BlobStore(place.blobs).path(blob.sha256)
    name, info = max(read_header(path).items())
    before = read_tensor(path, info)
    flip_bit(path, info.start + info.size_bytes - 4)  # lowest bit of its last value
    report = audited(place)
    assert [it.what for it in report.broken] == [f"revision {ROUNDS}"]
    found = report.difference
    assert found is not None
    assert (found.revision, found.piece, found.tensor) == (ROUNDS, "head", name)
    assert found.index == tuple(axis - 1 for axis in before.shape)
    assert np.float32(found.recomputed) == before.flat[-1]
    assert np.float32(found.recorded) == read_tensor(path, info).flat[-1]


def test_a_flipped_bit_in_moments_is_found(place: ServerHome) -> None:
    with opened(place) as store:
        blob = store.revision(RUN, 1).moments[-1]
    assert blob is not None
    path = BlobStore(place.blobs).path(blob.sha256)
    name, info = max(read_header(path).items())
    flip_bit(path, info.start + 3)
    report = audited(place)
    assert [it.what for it in report.broken] == ["revision 1"]
    assert report.difference is not None
    assert (report.difference.revision, report.difference.tensor) == (1, name)
    assert name.endswith(".variance")


def test_an_altered_weight_is_found(place: ServerHome) -> None:
    delta = merged_delta(place, 3)
    change = "UPDATE merges SET weight = weight * 2 WHERE assignment_id = ? AND piece = 'head'"
    execute(place, change, delta)
    report = audited(place)
    assert [it.what for it in report.broken] == [f"delta {delta}"]
    assert "weight 2.0" in report.broken[0].detail
    assert report.difference is not None
    assert (report.difference.revision, report.difference.piece) == (3, "head")


def test_a_deleted_delta_is_found(place: ServerHome) -> None:
    delta = merged_delta(place, 1)
    place.delta_file(delta).unlink()
    report = audited(place)
    assert [it.what for it in report.broken] == [f"delta {delta}", "revision 1"]
    assert report.runs[0].recomputed == ROUNDS
    assert report.difference is None


def test_what_is_missing_is_told_in_plain_words(place: ServerHome) -> None:
    gone = place.delta_file(merged_delta(place, 2))
    gone.unlink()
    [told] = [it.detail for it in audited(place).broken if it.what == "revision 2"]
    assert told == f"it cannot be computed again: {gone.name}: no such file or directory"


def test_what_was_pruned_is_said_and_is_no_damage(place: ServerHome) -> None:
    for number in (1, 2):
        place.delta_file(merged_delta(place, number)).unlink()
    execute(place, "UPDATE runs SET pruned_through = 2")
    report = audited(place)
    assert report.is_clean, report.broken
    assert (report.runs[0].recomputed, report.runs[0].pruned) == (1, 3)
    told = run_server_command("audit", "--revision", "2", "--home", str(place.path)).stdout
    assert "Nothing was computed: what revision 2 was made of was pruned" in told


@pytest.mark.parametrize(
    ("statement", "named", "detail"),
    [
        ("DELETE FROM merges WHERE piece = 'head' AND revision = 2", "delta ", "merged are"),
        ("DELETE FROM revisions WHERE number = 1", "revisions", "gaps"),
        ("UPDATE assignments SET state = 'admitted' WHERE round_number = 2", "delta ", "waits"),
        ("UPDATE assignments SET state = 'expired' WHERE round_number = 2", "delta ", "expired"),
        ("UPDATE assignments SET state = 'refused' WHERE round_number = 2", "delta ", "refused"),
        ("UPDATE rounds SET published_at = NULL WHERE number = 3", "round 3", "open"),
        ("UPDATE revisions SET versions = '[9,9,9,9,9]' WHERE number = 2", "revision 2", "version"),
        ("UPDATE merges SET staleness = 1 WHERE revision = 2", "delta ", "staleness 1"),
        ("UPDATE revisions SET versions = '[1]' WHERE number = 2", "revision 2", "one version"),
        ("UPDATE revisions SET manifest = '{' WHERE number = 2", "records", "understood"),
        ("UPDATE runs SET spec = '{}'", "records", "understood"),
        ("UPDATE rounds SET base_revision = 0 WHERE number = 3", "delta ", "unlike its round"),
        ("UPDATE models SET model_id = 'other'", "model tiny", "its id"),
        ("DELETE FROM clients", "table assignments", "clients"),
    ],
)
def test_a_record_that_denies_the_others_is_found(
    place: ServerHome, statement: str, named: str, detail: str
) -> None:
    execute(place, statement)
    report = audited(place)
    told = [it for it in report.broken if it.what.startswith(named) and detail in it.detail]
    assert told, report.broken


def test_the_database_refuses_a_second_merge_of_a_piece(place: ServerHome) -> None:
    again = (
        "INSERT INTO merges SELECT assignment_id, piece, run, 3, weight, staleness, scale"
        " FROM merges WHERE revision = 2 AND piece = 'head'"
    )
    with pytest.raises(sqlite3.IntegrityError, match="UNIQUE"):
        execute(place, again)


def test_the_command_tells_it_and_ends_with_its_code(place: ServerHome) -> None:
    home = ("--home", str(place.path))
    clean = run_server_command("audit", RUN, *home, check=False)
    assert clean.returncode == ExitCode.OK, clean.stderr
    assert "Clean" in clean.stdout
    flip_bit(place.delta_file(merged_delta(place, 2)), -2)
    told = run_server_command("audit", "--json", *home, check=False)
    assert told.returncode == ExitCode.AUDIT, told.stderr
    assert json.loads(told.stdout)["difference"]["revision"] == 2
    shown = run_server_command("audit", *home, check=False)
    assert "First difference: run audited, revision 2" in shown.stdout


def test_what_an_older_version_published_is_recorded_and_clean(tmp_path: Path) -> None:
    """A home is taken back to the schema of then, and opened again."""
    home = play_run(tmp_path, merge_weighting="inverse_chance")
    with opened(home) as store:
        before = store.trail(RUN)
        config = Config()
        config.set_main_option("script_location", str(Path(migrations.__file__).parent))
        with store.writing() as connection:
            config.attributes["connection"] = connection
            command.downgrade(config, "0001")
            for statement in (
                "UPDATE revisions SET manifest = json_remove(manifest, '$.versions')",
                "UPDATE runs SET spec = json_remove(spec, '$.mode', '$.server_optimizer')",
            ):
                connection.execute(text(statement))
    assert audited(home).is_clean
    with opened(home) as store:
        after = store.trail(RUN)
    assert after.merges == before.merges
    assert [it.versions for it in after.revisions] == [it.versions for it in before.revisions]
    unscreened = before.run.spec.model_copy(update={"screening": ScreeningSpec(enabled=False)})
    assert after.run == replace(before.run, spec=unscreened)


def test_a_buffered_run_is_clean_at_every_moment(tmp_path: Path) -> None:
    """Audits go beside a server that hands out work, takes deltas in and publishes."""
    home = ServerHome(tmp_path / "home")
    options = {"mode": "buffered", "buffer_size": 2, "server_optimizer": {"kind": "fedavgm"}}
    with headquarters(home, ServerConfig()) as office, ExitStack() as stack:
        names = ("slow", "south", "west")
        slow, *quick = [stack.enter_context(office.site(name)) for name in names]
        store, blobs = office.services.store, BlobStore(home.blobs)
        with office.run(RUN, rounds=1000, max_layers=2, **options):
            late = slow.work()
            for turn in range(4):
                for factor, site in enumerate(quick, start=1):
                    site.send(delta_of(office.spec, site.work(), factor))
                    assert audit(store, blobs, home).is_clean
                wait_until("a merge", head_was_merged(store, turn + 1))
            assert slow.send(delta_of(office.spec, late, 3)).status_code == 200
            quick[0].send(delta_of(office.spec, quick[0].work(), 1))
            wait_until("the late delta's merge", head_was_merged(store, 5))
        report = audit(store, blobs, home)
        assert report.is_clean, report
        merges = [merge for rows in store.trail(RUN).merges.values() for merge in rows]
        head_of_late = [it for it in merges if (it.assignment_id, it.piece) == (late.id, "head")]
        assert [(it.staleness, it.weight) for it in head_of_late] == [(4, 5**-0.5)]
