"""Join tokens: what they admit, how they end, the commands that make them, and where nothing is."""

from __future__ import annotations

import json
import os
import socket
import stat
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fedra_edge.protocol.ids import ClientId
from fedra_edge.protocol.problems import ProblemCode
from fedra_edge.protocol.trust import JoinString
from fedra_server.addressing import (
    Listening,
    check_exposure,
    is_loopback,
    is_secured,
    names_here,
    site_address,
    wanted_names,
)
from fedra_server.authority import certificate_names
from fedra_server.cli import main
from fedra_server.config import ServerConfig, ServerHome
from fedra_server.errors import ConfigurationError, NotFoundError, NotPermittedError, RefusedError
from fedra_server.exit_codes import ExitCode
from fedra_server.settings_file import with_settings
from fedra_server.storage.records import TokenRecord
from fedra_server.storage.store import Store
from fedra_server.storage.tokens import new_join_secret
from tests.support.builders import make_calibration, make_client, make_model_spec
from tests.support.keys import SiteKey

NOW = 1_000.0


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with closing(Store.open(tmp_path / "home")) as opened:
        yield opened


def add_token(store: Store, *, uses: int = 1, client_id: str | None = None) -> str:
    """Make a token that expires in ten seconds; give its join secret."""
    token_id = f"{len(store.tokens()):08x}"
    owner = None if client_id is None else ClientId(client_id)
    record = TokenRecord(token_id, "", owner, NOW, NOW + 10, uses, uses)
    secret = new_join_secret(token_id)
    store.add_token(record, secret)
    return secret


def enrol(store: Store, name: str, secret: str | None, key: str = "", *, limit: int = 99) -> str:
    """Enrol a client at the present moment; give its id."""
    client = replace(make_client(name), enrolled_at=NOW, last_seen_at=NOW)
    return store.enrol(client, key or SiteKey().public, secret, limit).client_id


def uses_left(store: Store) -> list[int]:
    return [token.uses_left for token in store.tokens()]


def test_a_token_admits_as_often_as_it_says(store: Store) -> None:
    secret = add_token(store, uses=2)
    key = SiteKey().public
    assert enrol(store, "one", secret, key) == "one"
    assert enrol(store, "again", secret, key) == "one"  # the answer was lost on the way
    assert uses_left(store) == [1]
    assert enrol(store, "two", secret) == "two"
    with pytest.raises(RefusedError, match="used up") as refusal:
        enrol(store, "three", secret)
    assert refusal.value.code is ProblemCode.JOIN_TOKEN_INVALID
    assert "token create" in refusal.value.remedy
    assert enrol(store, "again", secret, key) == "one"
    assert [it.client_id for it in store.clients()] == ["one", "two"]


def test_a_refused_enrolment_uses_nothing_up(store: Store) -> None:
    secret = add_token(store)
    with pytest.raises(NotPermittedError, match="limit"):
        enrol(store, "one", secret, limit=0)
    assert uses_left(store) == [1]


@pytest.mark.parametrize("spoil", ["expire", "revoke", "alter", "shorten", "other"])
def test_a_token_that_is_no_good_says_why(store: Store, spoil: str) -> None:
    secret = add_token(store, uses=5)
    token_id = secret.partition("-")[0]
    at = NOW
    if spoil == "expire":
        at += 10
    elif spoil == "revoke":
        assert store.revoke_token(token_id, NOW).why_unusable(NOW) == "revoked"
        store.revoke_token(token_id, NOW + 1)  # repeating it is harmless
    else:
        secret = {
            "alter": f"{secret[:-1]}{'0' if secret[-1] == '1' else '1'}",
            "shorten": token_id,
            "other": f"99999999-{secret.partition('-')[2]}",
        }[spoil]
    why = {"expire": "expired", "revoke": "revoked"}.get(spoil, "does not know")
    with pytest.raises(RefusedError, match=why):
        store.check_join_secret(secret, at)
    client = replace(make_client("late"), enrolled_at=at)
    with pytest.raises(RefusedError, match=why):
        store.enrol(client, SiteKey().public, secret, 99)
    assert store.clients() == []


def test_nobody_revokes_what_is_not_there(store: Store) -> None:
    with pytest.raises(NotFoundError):
        store.revoke_token("00000000", NOW)


def test_a_token_for_one_client_gives_it_a_new_key_and_nothing_else(store: Store) -> None:
    old, new = SiteKey().public, SiteKey().public
    enrol(store, "plant", None, old)
    store.set_calibration(ClientId("plant"), make_calibration(make_model_spec()))
    secret = add_token(store, client_id="plant")
    assert enrol(store, "after a disk swap", secret, new) == "plant"
    assert enrol(store, "after a disk swap", secret, new) == "plant"
    [client] = store.clients()
    assert (client.client_id, client.name) == ("plant", make_client("plant").name)
    assert store.client_with_key(old) is None
    assert store.calibrations(make_model_spec().model_id) == {}
    with pytest.raises(RefusedError, match="used up"):
        enrol(store, "thief", secret)


def test_who_left_never_comes_back_with_its_key_or_a_token_of_its_own(store: Store) -> None:
    key = SiteKey().public
    enrol(store, "plant", None, key)
    secret = add_token(store, client_id="plant")
    store.leave(ClientId("plant"), NOW)
    for attempt in (key, SiteKey().public):
        with pytest.raises(RefusedError) as refusal:
            enrol(store, "plant", secret, attempt)
        assert refusal.value.code is ProblemCode.CLIENT_REVOKED
    assert uses_left(store) == [1]
    assert enrol(store, "anew", add_token(store)) == "anew"


def test_no_secret_is_stored(store: Store, tmp_path: Path) -> None:
    secret = add_token(store)
    enrol(store, "plant", secret)
    for path in (tmp_path / "home").iterdir():
        assert secret.partition("-")[2].encode() not in path.read_bytes()


Command = Callable[..., Any]


@pytest.fixture
def command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Command:
    """Run a command that must end with a code on a home of its own; give what it printed."""
    monkeypatch.setenv("FEDRA_SERVER_HOME", str(tmp_path / "home"))

    def run(*arguments: str, code: int = 0) -> Any:  # noqa: ANN401 (JSON or text)
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main(arguments)
        printed = capsys.readouterr()
        assert ended.value.code == code, printed.out + printed.err
        if "--json" in arguments:
            return json.loads(printed.out)
        return printed.out if code == 0 else printed.err

    run("init", "--host-name", "hq.example")
    return run


def test_the_commands_make_list_and_revoke(command: Command, tmp_path: Path) -> None:
    told = command("token", "create", "--uses=3", "--ttl=7d", "--label=plant 7", "--json")
    read = JoinString.parse(told["join_string"])
    assert read.secret.partition("-")[0] == told["token_id"]
    assert told["expires_at"] - told["created_at"] == pytest.approx(7 * 86_400)
    assert read.ca_sha256 == command("init", "--json")["ca_sha256"]
    alone = command("token", "create", "--address", "https://hq.example:9/fedra/")
    assert JoinString.parse(alone).address == "https://hq.example:9/fedra"
    listed = command("token", "list", "--json")["tokens"]
    assert [(it["label"], it["uses_left"], it["state"]) for it in listed] == [
        ("plant 7", 3, "usable"),
        ("", 1, "usable"),
    ]
    command("token", "revoke", told["token_id"])
    shown = command("token", "list")
    assert "revoked" in shown
    assert read.secret.partition("-")[2] not in shown
    with closing(Store.open(tmp_path / "home")) as store, pytest.raises(RefusedError):
        store.check_join_secret(read.secret, told["created_at"])


def test_the_address_of_a_join_string_is_what_sites_reach(
    command: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def address() -> str:
        return JoinString.parse(command("token", "create")).address

    assert address() == "http://127.0.0.1:8470"
    settings = tmp_path / "home" / "server.toml"
    written = settings.read_text(encoding="utf-8")
    settings.write_text(f'host = "0.0.0.0"\n{written}', encoding="utf-8")
    assert address() == "https://hq.example:8470"
    place = tmp_path / "home" / "server.json"
    told = {"url": "https://0.0.0.0:1234", "address": "https://hq.example:1234"}
    place.write_text(json.dumps(told), encoding="utf-8")
    assert address() == "https://hq.example:1234"
    place.unlink()
    settings.write_text(f'address = "https://front.example"\n{written}', encoding="utf-8")
    assert address() == "https://front.example"
    with pytest.raises(SystemExit):
        main(["token", "create", "--address", "https://other.example"])
    assert "a proxy must answer at other.example" in capsys.readouterr().err


@pytest.fixture
def warned(
    command: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> Callable[..., str]:
    """Make a join string with these settings; give what is said beside it."""
    command("token", "list")  # the home is there

    def create(settings: str, *arguments: str, listening: Listening | None = None) -> str:
        home = ServerHome(tmp_path / "home")
        home.config_file.write_text(settings, encoding="utf-8")
        home.server_file.unlink(missing_ok=True)
        if listening is not None:
            home.server_file.write_text(json.dumps(listening._asdict()), encoding="utf-8")
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main(["token", "create", *arguments])
        assert ended.value.code == ExitCode.OK
        printed = capsys.readouterr()
        JoinString.parse(printed.out.strip())
        return printed.err

    return create


def test_before_the_first_start_the_certificate_to_come_counts(
    warned: Callable[..., str], tmp_path: Path
) -> None:
    name = socket.gethostname().lower()
    assert name not in certificate_names(ServerHome(tmp_path / "home"))
    everywhere = 'host = "0.0.0.0"\naddress = "https://{}:8470"\n'
    assert warned(everywhere.format(name)) == ""
    assert warned('host = "0.0.0.0"\nhost_names = ["hq.example"]\n') == ""
    assert warned(everywhere.format("front.example")) == ""
    told = warned('host = "0.0.0.0"\n', "--address", "https://front.example")
    assert "does not name front.example" in told
    assert "init --host-name front.example" in told
    running = Listening("https://0.0.0.0:8470", f"https://{name}:8470")
    assert "once the server is started again" in warned(everywhere.format(name), listening=running)


def test_a_name_that_nobody_chose_is_told_with_the_others(warned: Callable[..., str]) -> None:
    config = ServerConfig(host="0.0.0.0")  # noqa: S104 (nothing listens)
    others = {it for it in names_here(config) if not is_loopback(it)} - {socket.gethostname()}
    told = warned('host = "0.0.0.0"\n')
    assert all(it in told for it in others)
    assert ("--address" in told) == bool(others)


def test_plain_http_is_warned_of_by_what_the_server_speaks(warned: Callable[..., str]) -> None:
    chosen = ("--address", "http://192.0.2.2:8470")
    assert "speaks https only" in warned('host = "0.0.0.0"\n', *chosen)
    assert "--insecure-http" in warned('host = "0.0.0.0"\ntls = "off"\n')
    assert "--insecure-http" in warned('host = "0.0.0.0"\ntls = "off"\n', *chosen)
    running = Listening("https://0.0.0.0:8470", "https://hq:8470")
    assert "speaks https only" in warned("", *chosen, listening=running)


def test_a_wrong_address_is_told_with_a_right_one(command: Command) -> None:
    told = command("token", "create", "--address", "foo", code=ExitCode.USAGE)
    assert "https://hq.example:8470" in told
    assert "pattern" not in told


@pytest.mark.skipif(os.name != "posix", reason="modes are of POSIX systems")
def test_a_new_home_is_its_owners_only(command: Command, tmp_path: Path) -> None:
    command("token", "create")
    home = ServerHome(tmp_path / "home")
    for path, mode in (
        (home.path, 0o700), (home.deltas, 0o700), (home.uploads, 0o700),
        (home.config_file, 0o600), (home.database_file, 0o600),
    ):  # fmt: skip
        assert stat.S_IMODE(path.stat().st_mode) == mode, path
    home.path.chmod(0o750)
    command("init", "--host-name", "new.example")
    assert stat.S_IMODE(home.config_file.stat().st_mode) == 0o600
    home.config_file.chmod(0o644)
    command("init", "--host-name", "newer.example")
    assert stat.S_IMODE(home.config_file.stat().st_mode) == 0o644
    assert stat.S_IMODE(home.path.stat().st_mode) == 0o750  # an operator's choice stays


def test_a_client_is_named_by_name_or_id(command: Command, tmp_path: Path) -> None:
    with closing(Store.open(tmp_path / "home")) as store:
        for client_id, name in (("a", "plant"), ("b", "twin"), ("c", "twin")):
            store.add_client(replace(make_client(client_id), name=name), client_id * 43)
    told = command("token", "create", "--client", "plant", "--json")
    assert told["client_id"] == "a"
    command("token", "create", "--client", "plant", "--uses", "2", code=ExitCode.USAGE)
    assert "b, c" in command("client", "remove", "twin", code=ExitCode.CONFLICT)
    assert command("client", "remove", "b", "--json")["removed"]
    command("token", "create", "--client", "twin")  # one is left
    command("client", "remove", "b", code=ExitCode.NOT_FOUND)
    states = {
        it["client_id"]: it["state"]
        for it in command("client", "list", "--all", "--json")["clients"]
    }
    assert states == {"a": "offline", "b": "left", "c": "offline"}


@pytest.mark.parametrize(
    "arguments",
    [
        ["--uses=0"], ["--ttl=soon"], ["--ttl=0h"], ["--label=a\tb"], ["--address=hq.example"],
        ["--address=https://hq.example#x"],
    ],
    ids=" ".join,
)  # fmt: skip
def test_a_wish_that_cannot_be_is_wrong_usage(command: Command, arguments: list[str]) -> None:
    assert "Error" in command("token", "create", *arguments, code=ExitCode.USAGE)


def test_init_puts_settings_in_their_place_once(command: Command, tmp_path: Path) -> None:
    settings = tmp_path / "home" / "server.toml"
    assert 'host_names = ["hq.example"]' in settings.read_text(encoding="utf-8").splitlines()
    command("init", "--host-name", "hq.example")
    assert with_settings("port = 1\n", {"address": "x"}) == 'address = "x"\nport = 1\n'
    with pytest.raises(ConfigurationError, match="another address"):
        with_settings('address = "y"\n', {"address": "x"})


def test_repeating_init_adds_a_name_and_takes_none_away(command: Command, tmp_path: Path) -> None:
    home = ServerHome(tmp_path / "home")
    settings = home.config_file
    written = settings.read_text(encoding="utf-8")
    settings.write_text(f'host = "0.0.0.0"\n{written}', encoding="utf-8")
    command("init")
    before = certificate_names(home)
    assert {"hq.example", "localhost", socket.gethostname().lower()} <= before
    command("init", "--host-name", "new.example", "--host-name", "hq.example")
    assert certificate_names(home) == before | {"new.example"}
    assert ServerConfig.load(home).host_names == ("hq.example", "new.example")
    command("init", "--host-name", "hq.example")
    assert ServerConfig.load(home).host_names == ("hq.example", "new.example")


def test_init_leaves_the_certificate_of_a_server_that_runs_alone(
    command: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    home = ServerHome(tmp_path / "home")
    running = Listening("https://0.0.0.0:8470", "https://hq.example:8470")
    home.server_file.write_text(json.dumps(running._asdict()), encoding="utf-8")
    before = (home.path / "authority" / "server.pem").read_bytes()
    command("token", "list")
    with pytest.raises(SystemExit):
        main(["init", "--host-name", "new.example"])
    assert "started again" in capsys.readouterr().err
    assert (home.path / "authority" / "server.pem").read_bytes() == before


@pytest.mark.parametrize(
    ("written", "rest"),
    [
        ('host_names = ["a"]  # ours\nport = 1\n', "  # ours\nport = 1\n"),
        ('host_names = [\n  "a",  # ours\n]\nport = 1\n', "\nport = 1\n"),
    ],
)
def test_a_list_is_added_to_however_it_is_written(written: str, rest: str) -> None:
    assert with_settings(written, {"host_names": ["b", "a"]}) == f'host_names = ["a", "b"]{rest}'


def test_a_list_that_cannot_be_found_again_is_left_to_the_operator() -> None:
    for written in ('host_names = ["a]"]\n', '"host_names" = ["a"]\n'):
        with pytest.raises(ConfigurationError, match="another host_names"):
            with_settings(written, {"host_names": ["b"]})


def test_your_own_certificate_is_tried_at_init(command: Command, tmp_path: Path) -> None:
    authority = tmp_path / "home" / "authority"
    chain, key = tmp_path / "chain.pem", tmp_path / "key.pem"
    chain.write_bytes((authority / "server.pem").read_bytes())
    own = ["--certificate-file", str(chain), "--key-file", str(key)]
    missing = command("init", *own, code=ExitCode.CONFIGURATION)
    assert "No such file" in missing
    key.write_bytes((authority / "ca.key").read_bytes())
    assert "key values mismatch" in command("init", *own, code=ExitCode.CONFIGURATION)
    key.write_bytes(b"no key")
    assert "cannot be used" in command("init", *own, code=ExitCode.CONFIGURATION)
    key.write_bytes((authority / "server.pem").read_bytes())
    command("init", *own)


def test_what_is_open_and_what_is_secured_follows_from_who_reaches_it() -> None:
    def config(**settings: object) -> ServerConfig:
        return ServerConfig.model_validate(settings)

    assert [is_loopback(it) for it in ("localhost", "127.8.0.1", "::1", "0.0.0.0", "hq")] == [  # noqa: S104
        True, True, True, False, False,
    ]  # fmt: skip
    everywhere = "0.0.0.0"  # noqa: S104 (nothing listens)
    assert not is_secured(config())
    assert is_secured(config(host=everywhere))
    assert is_secured(config(tls="on"))
    assert not is_secured(config(host=everywhere, tls="off"))
    check_exposure(config(enrolment="open"))
    with pytest.raises(ConfigurationError, match="open to everyone"):
        check_exposure(config(enrolment="open", host=everywhere))
    with pytest.raises(ConfigurationError, match="both files"):
        check_exposure(config(certificate_file="chain.pem"))
    assert site_address(config(host="::1", tls="on"), 1, "hq") == "https://[::1]:1"
    assert site_address(config(host=everywhere), 1, "hq") == "https://hq:1"
    assert site_address(config(host="10.0.0.5"), 1, "hq") == "https://10.0.0.5:1"
    assert "hq" in wanted_names(config(host="::", host_names=("hq.example",)), "hq", ())
    names = wanted_names(config(host="::", address="https://[fe::1]:3"), "hq", ("10.0.0.5",))
    assert names == {"localhost", "127.0.0.1", "::1", "hq", "10.0.0.5", "fe::1"}
