"""Settings come from arguments and the environment, and say what is wrong with them."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedra_edge.config import default_name, load_config, load_site_config, parse_size
from fedra_edge.errors import ConfigurationError
from fedra_edge.link import Link


@pytest.mark.parametrize(
    ("text", "size_bytes"),
    [
        ("512MB", 512_000_000),
        ("1.5 GiB", 1_610_612_736),
        ("2g", 2_000_000_000),
        ("64 KiB", 65_536),
        ("1000", 1000),
        (7, 7),
    ],
)
def test_sizes_are_read_with_their_unit(text: object, size_bytes: int) -> None:
    assert parse_size(text) == size_bytes


@pytest.mark.parametrize("text", ["much", "12 parsecs", "-1MB", ""])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is no size"):
        parse_size(text)


def test_an_argument_wins_over_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDRA_EDGE_SERVER", "http://from-environment:1")
    monkeypatch.setenv("FEDRA_EDGE_MEMORY_BYTES", "1GB")
    monkeypatch.setenv("FEDRA_EDGE_MAX_LAYERS", "3")
    config = load_config({"server": "https://given:2/", "max_layers": None})
    assert (config.server, config.memory_bytes, config.max_layers) == ("https://given:2", 10**9, 3)


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({}, "--server is not given"),
        ({"server": "ftp://plant"}, "no server address"),
        ({"server": "127.0.0.1:8470"}, "mean http://127.0.0.1:8470 "),
        ({"server": "plant"}, "mean http://plant "),
        ({"server": "http://user:secret@plant"}, "no user name"),
        ({"server": "https://plant", "name": "/etc/passwd"}, "--name should be at most 64"),
        ({"server": "https://plant", "memory_bytes": "lots"}, "--memory: 'lots' is no size"),
        ({"server": "https://plant", "serverr": "x"}, "serverr"),
        ({"server": "https://plant", "max_layers": 0}, "--max-layers should be greater"),
        ({"server": "https://plant", "poll_s": -1}, "FEDRA_EDGE_POLL_S should be"),
        ({"server": "https://plant", "mirrors": ["ftp://nas"]}, "--mirror: 'ftp://nas' is no"),
        (
            {"server": "https://plant", "max_bandwidth": "fast"},
            "--max-bandwidth: 'fast' is no size",
        ),
        ({"server": "https://plant", "max_bandwidth": "1"}, "--max-bandwidth should be greater"),
        ({"server": "https://plant", "proxy": "proxy:3128"}, "--proxy: this is no proxy address"),
    ],
)
def test_a_setting_that_cannot_work_is_named(options: dict[str, object], complaint: str) -> None:
    with pytest.raises(ConfigurationError, match=complaint) as refusal:
        load_config(options)
    assert refusal.value.remedy
    assert "Value error" not in str(refusal.value)
    assert "Input" not in str(refusal.value)


@pytest.mark.parametrize("server", ["http://user:secret@plant", "user:secret@plant"])
def test_the_error_never_repeats_a_password(server: str) -> None:
    with pytest.raises(ConfigurationError) as refusal:
        load_config({"server": server})
    assert "secret" not in str(refusal.value)


ADMITTING = "t1-nobodyguessesthis"
JOIN_STRING = f"https://hq.example:8470/fed/#{ADMITTING}.{'ab' * 32}"


@pytest.mark.parametrize("source", ["argument", "variable"])
def test_a_join_string_is_three_settings_in_one(
    source: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("FEDRA_EDGE_SERVER", JOIN_STRING if source == "variable" else "x")
    given = {} if source == "variable" else {"server": f" {JOIN_STRING}\n"}
    config = load_config({**given, "home": tmp_path})
    assert config.server == "https://hq.example:8470/fed"
    assert config.ca_sha256 == "ab" * 32
    assert config.join_secret is not None
    assert config.join_secret.get_secret_value() == ADMITTING
    assert ADMITTING not in f"{config!r}{config}{config.membership}{config.model_dump_json()}"
    address = load_config({"server": config.server, "home": tmp_path})
    assert address.membership == config.membership


def test_what_belongs_to_another_join_string_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDRA_EDGE_SERVER", JOIN_STRING)
    config = load_config({"server": "https://elsewhere.example"})
    assert (config.server, config.join_secret, config.ca_sha256) == (
        "https://elsewhere.example", None, None,
    )  # fmt: skip


@pytest.mark.parametrize(
    "damaged",
    [
        JOIN_STRING[:-1], f"{JOIN_STRING}0", JOIN_STRING.replace("https", "ftp"),
        JOIN_STRING.replace("https://", ""), f"{JOIN_STRING}#", JOIN_STRING.replace(".ab", "ab"),
        JOIN_STRING.replace("hq", "user@hq"), JOIN_STRING.upper(),
    ],
)  # fmt: skip
def test_a_damaged_join_string_is_refused_without_repeating_it(damaged: str) -> None:
    with pytest.raises(ConfigurationError, match="--server") as refusal:
        load_config({"server": damaged})
    assert ADMITTING.lower() not in f"{refusal.value}{refusal.value.remedy}".lower()
    assert refusal.value.__cause__ is None
    assert refusal.value.__suppress_context__


@pytest.mark.parametrize(
    ("server", "is_taken"),
    [
        ("http://127.0.0.1:8470", True), ("http://127.9.9.9", True), ("http://[::1]:1/fed", True),
        ("http://localhost", True), ("http://hq.localhost:1", True), ("https://plant", True),
        ("http://plant", False), ("http://10.0.0.5:8470", False), ("http://0.0.0.0", False),
        ("http://localhost.example", False), ("http://127.0.0.1.example", False),
        (f"http://hq.example#{ADMITTING}.{'ab' * 32}", False),
    ],
)  # fmt: skip
def test_plain_http_is_for_this_machine_unless_accepted(server: str, is_taken: bool) -> None:
    if is_taken:
        assert not load_config({"server": server}).is_insecure
        return
    with pytest.raises(ConfigurationError, match="--insecure-http"):
        load_config({"server": server})
    assert load_config({"server": server, "insecure_http": True}).is_insecure


def test_plain_http_can_be_accepted_by_a_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDRA_EDGE_INSECURE_HTTP", "1")
    assert load_config({"server": "http://plant"}).is_insecure


def test_each_server_has_its_own_identity_and_outbox(tmp_path: Path) -> None:
    one = load_config({"server": "https://plant.example:8470", "home": tmp_path})
    other = load_config({"server": "https://plant.example:8471", "home": tmp_path})
    assert one.membership != other.membership
    assert one.blobs == other.blobs
    assert one.outbox.is_relative_to(tmp_path)


def test_mirrors_come_from_options_or_with_commas_between_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("FEDRA_EDGE_MIRRORS", "/media/my stick, http://nas:8080/weights/")
    assert load_site_config({}).mirrors == ("/media/my stick", "http://nas:8080/weights")
    assert load_site_config({"mirrors": ["/a", "/b"]}).mirrors == ("/a", "/b")


def test_the_link_is_described_in_one_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDRA_EDGE_PROXY", "http://plant:secret@proxy:3128")
    config = load_site_config({"max_bandwidth": "2MB", "ca_file": "plant.pem"})
    proxy = "http://plant:secret@proxy:3128"
    assert config.link == Link(proxy=proxy, ca_file="plant.pem", max_bytes_per_s=2_000_000)
    assert "secret" not in repr(config)
    assert "secret" not in repr(config.link)


def test_a_machine_needs_no_server_to_be_described(tmp_path: Path) -> None:
    assert load_site_config({"home": tmp_path}).home == tmp_path


def test_the_host_name_gives_a_name_that_the_server_accepts() -> None:
    assert load_config({"server": "https://plant"}).name == default_name()
