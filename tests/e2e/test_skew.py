"""Processes of other protocol versions: a minor step apart works, a major one says what to do."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from fedra_edge.exit_codes import ExitCode
from fedra_edge.protocol.version import PROTOCOL_VERSION
from fedra_server import __version__
from tests.support.edges import EdgeSite
from tests.support.federation import Federation, running_federation
from tests.support.other_versions import speaking
from tests.support.sites import write_folder

pytestmark = pytest.mark.e2e

OURS = int(PROTOCOL_VERSION.partition(".")[0])
NEWER = f"{OURS}.{int(PROTOCOL_VERSION.partition('.')[2]) + 1}"
RELEASE = f"the server runs fedra {__version__}"

Speaking = Callable[[str], Mapping[str, str]]


@pytest.fixture(scope="module")
def speaking_version(tmp_path_factory: pytest.TempPathFactory) -> Speaking:
    """Gives the environment of a copy that speaks a version, made when it is first needed."""
    made: dict[str, Mapping[str, str]] = {}

    def give(version: str) -> Mapping[str, str]:
        if version not in made:
            made[version] = speaking(version, tmp_path_factory.mktemp("version"))
        return made[version]

    return give


def add_site(
    federation: Federation, name: str, place: Path, variables: Mapping[str, str] | None = None
) -> EdgeSite:
    data = write_folder(place / "data" / name, seed=len(federation.sites)).path
    site = federation.add_site(name, data, place, "--verbose", backend="torch")
    site.variables = variables or {}
    return site


def take_part(federation: Federation, sites: list[EdgeSite]) -> None:
    """Let all sites be in both rounds of a run, evaluations included."""
    federation.have_running(sites)
    count = len(sites)
    federation.start_run("run", rounds=2, min_participants=count, max_steps=2, batch_size=6,
                         merge_weighting="uniform")  # fmt: skip
    report = federation.wait_for_rounds("run", 2)
    assert [it.merged for it in report.rounds] == [count, count]
    federation.check_merge("run", 1)
    federation.check_merge("run", 2)
    assert federation.store.evaluations("run")


def test_clients_a_minor_step_ahead_work_with_the_present_server(
    prepared_home: Path, tmp_path: Path, speaking_version: Speaking
) -> None:
    with running_federation(tmp_path / "home", prepared_home) as federation:
        variables = (speaking_version(NEWER), None)
        sites = [
            add_site(federation, name, tmp_path, of_site)
            for name, of_site in zip(("newer", "present"), variables, strict=True)
        ]
        take_part(federation, sites)
        told = federation.server.log.read_text(encoding="utf-8")
    assert told.count(f"a client speaks protocol {NEWER}, newer") == 1


def test_a_server_a_minor_step_ahead_works_with_the_present_client(
    prepared_home: Path, tmp_path: Path, speaking_version: Speaking
) -> None:
    variables = speaking_version(NEWER)
    with running_federation(tmp_path / "home", prepared_home, variables) as federation:
        site = add_site(federation, "present", tmp_path)
        take_part(federation, [site])
        told = site.complaints()
    assert told.count(f"the server speaks protocol {NEWER}, newer") == 1
    assert "Traceback" not in told


@pytest.mark.parametrize("is_client_ahead", [True, False], ids=["client", "server"])
def test_a_major_step_says_which_side_to_upgrade_and_to_what(
    prepared_home: Path, tmp_path: Path, speaking_version: Speaking, is_client_ahead: bool
) -> None:
    ahead = speaking_version(f"{OURS + 1}.0")
    of_server = None if is_client_ahead else ahead
    with running_federation(tmp_path / "home", prepared_home, of_server) as federation:
        site = add_site(federation, "apart", tmp_path, ahead if is_client_ahead else None)
        client = site.join()
        assert client.wait_for_end() == ExitCode.REFUSED
        error = client.wait_for("the reason", lambda event: event["event"] == "error")
        assert federation.store.clients() == []
    if is_client_ahead:
        assert "Upgrade the server" in error["remedy"]
    else:
        assert "Upgrade the client on this machine" in error["remedy"]
    assert f"protocol {OURS + 1}.x" in error["remedy"]
    assert RELEASE in error["remedy"]
    assert f"{OURS + 1}.0" in error["message"]
    assert PROTOCOL_VERSION in error["message"]
