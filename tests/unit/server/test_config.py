"""Settings come from arguments, environment, file and defaults, in this order."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedra_edge.protocol.ids import AssignmentId, UploadId
from fedra_server.config import CONFIG_TEMPLATE, ServerConfig, ServerHome
from fedra_server.errors import ConfigurationError


def home_with(directory: Path, settings: str) -> ServerHome:
    home = ServerHome(directory)
    home.create()
    home.config_file.write_text(settings, encoding="utf-8")
    return home


def test_a_home_without_a_file_has_the_defaults(tmp_path: Path) -> None:
    config = ServerConfig.load(ServerHome(tmp_path / "home"))
    assert (config.host, config.port, config.heartbeat_timeout_s) == ("127.0.0.1", 8470, 60.0)
    assert config.database_url is None
    assert config.max_delta_bytes is None


def test_the_template_is_the_defaults(tmp_path: Path) -> None:
    assert ServerConfig.load(home_with(tmp_path, CONFIG_TEMPLATE)) == ServerConfig()


def test_every_setting_is_in_the_template_and_works_when_uncommented(tmp_path: Path) -> None:
    uncommented = "\n".join(
        line.removeprefix("# ") if " = " in line else line for line in CONFIG_TEMPLATE.splitlines()
    )
    config = ServerConfig.load(home_with(tmp_path, uncommented))
    assert config.model_fields_set == set(ServerConfig.model_fields)
    without_default = {
        "address", "certificate_file", "database_url", "host_names", "key_file",
        "max_delta_bytes", "max_disk_bytes",
    }  # fmt: skip
    chosen = ServerConfig().model_dump(exclude=without_default)
    assert config.model_dump(exclude=without_default) == chosen


def test_the_environment_wins_over_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = home_with(tmp_path, 'host = "0.0.0.0"\nport = 1\n')
    monkeypatch.setenv("FEDRA_SERVER_PORT", "2")
    monkeypatch.setenv("FEDRA_SERVER_HOME", str(tmp_path))
    config = ServerConfig.load(home)
    assert (config.host, config.port) == ("0.0.0.0", 2)  # noqa: S104 (nothing listens)
    assert ServerConfig(port=3).port == 3


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ("port = 70000", "port"),
        ("prot = 1", "prot: unknown setting"),
        ('max_disk_bytes = "some"', "max_disk_bytes"),
        ("heartbeat_timeout_s = nan", "heartbeat_timeout_s"),
        ("heartbeat_timeout_s = 0.5", "heartbeat_timeout_s"),
        ("port = ", "server.toml"),
        ('log_level = "loud"', "log_level"),
    ],
)
def test_a_setting_that_cannot_work_is_named(tmp_path: Path, settings: str, named: str) -> None:
    with pytest.raises(ConfigurationError, match=named) as caught:
        ServerConfig.load(home_with(tmp_path, settings))
    assert caught.value.remedy


@pytest.mark.parametrize(
    ("written", "size_bytes"), [("8000", 8000), ('"8GB"', 8 * 10**9), ('"1.5 GiB"', 3 * 2**29)]
)
def test_the_disk_limit_may_have_a_unit(tmp_path: Path, written: str, size_bytes: int) -> None:
    config = ServerConfig.load(home_with(tmp_path, f"max_disk_bytes = {written}"))
    assert config.max_disk_bytes == size_bytes


def test_a_password_is_in_no_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDRA_SERVER_DATABASE_URL", "postgresql://user:hunter2@db/fedra")
    assert "hunter2" not in repr(ServerConfig.load(ServerHome(tmp_path)))
    with pytest.raises(ConfigurationError) as caught:
        ServerConfig.load(home_with(tmp_path, "port = -1"))
    assert "hunter2" not in str(caught.value)


def test_the_places_of_a_home_are_inside_it(tmp_path: Path) -> None:
    home = ServerHome(tmp_path / "home")
    home.create()
    home.create()
    assert {it.name for it in home.path.iterdir()} == {"blobs", "uploads", "deltas"}
    assert home.upload_part(UploadId("u")) == home.uploads / "u.part"
    assert home.delta_file(AssignmentId("a")) == home.deltas / "a.safetensors"
