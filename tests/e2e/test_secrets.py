"""Planted secrets are nowhere but where they belong, whatever goes well and whatever fails."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import pytest

from fedra_edge.keys import FILE_NAME
from fedra_edge.protocol import routes
from fedra_edge.protocol.routes import Route
from fedra_edge.protocol.trust import JoinString
from tests.support.edges import EdgeProcess, run_edge_command
from tests.support.headquarters import PROTOCOL
from tests.support.keys import SiteKey, ask, authority_of, draw_challenge, enrol_key, open_session
from tests.support.servers import ServerProcess, run_server_command, running_server
from tests.support.sites import write_folder

pytestmark = pytest.mark.e2e

PLANTED = "planted-where-nobody-looks-7f3a"
OPERATOR_ROUTES = [
    value for value in vars(routes).values()
    if isinstance(value, Route) and "operator" in value.path
]  # fmt: skip
KEY_FILES = {FILE_NAME, "ca.key", "server.pem"}


@dataclass
class Witness:
    """Everything that was said, and the secrets that should not have been."""

    server: ServerProcess
    http: httpx.Client
    secrets: dict[str, str] = field(default_factory=dict)
    said: list[str] = field(default_factory=list)

    def command(self, *arguments: str, **variables: str) -> str:
        """Run a command of the server; what it says on standard error counts."""
        done = run_server_command(
            *arguments, "--home", str(self.server.home), check=False, variables=variables
        )  # fmt: skip
        self.said.append(done.stderr)
        return done.stdout

    def request(
        self,
        method: str,
        path: str,
        secret: str,
        *,
        json_body: object = None,
        content: bytes | None = None,
    ) -> None:
        """Make a call that must fail, or tells nothing secret."""
        headers = {"Authorization": f"Bearer {secret}", "Content-Type": "application/json"}
        if json_body is not None:
            content = json.dumps(json_body).encode()
        answer = self.http.request(method, path, headers=headers, content=content)
        self.said += [answer.text, str(answer.headers)]


@pytest.fixture
def witness(tmp_path: Path) -> Iterator[Witness]:
    """Serve a home that logs all it can."""
    settings = {
        "log_level": "debug", "enrolment": "token", "max_strange_requests_per_s": "10000",
    }  # fmt: skip
    with (
        running_server(tmp_path / "hq", settings=settings) as server,
        httpx.Client(base_url=server.url, headers=PROTOCOL, timeout=30) as http,
    ):
        yield Witness(server, http)


def plant(witness: Witness) -> None:
    """Make one secret of each kind, by the ways on which they come to be."""
    secrets = witness.secrets
    secrets["operator"] = witness.command("operator", "add", "gate", "--role", "administer").strip()
    told = witness.command("token", "create", "--uses", "2", "--json")
    joining = JoinString.parse(json.loads(told)["join_string"])
    secrets["join secret"] = joining.secret
    http = witness.http
    key = SiteKey()
    client_id = enrol_key(http, key, join_secret=joining.secret)
    secrets["session"] = open_session(http, key, client_id)
    calls = {"Authorization": f"Bearer {secrets['session']}"}
    assert http.get(routes.CLIENT_STATUS.path, headers=calls).status_code == 200
    wish = {"uses": 1, "label": "over-http"}
    made = http.post(
        routes.OPERATOR_CREATE_TOKEN.path,
        json=wish,
        headers={"Authorization": f"Bearer {secrets['operator']}"},
    ).json()
    secrets["second join secret"] = JoinString.parse(made["join_string"]).secret
    misused = SiteKey().enrolment(authority_of(http).ca_sha256, join_secret=joining.secret[:-1])
    witness.said.append(ask(http, routes.ENROL, misused).text)
    forged = SiteKey().session_request("0" * 64, client_id, draw_challenge(http))
    witness.said.append(ask(http, routes.SESSION, forged).text)


def misuse(witness: Witness, secret: str) -> None:
    """Put a secret wherever a caller could put one by mistake, and fail in every other way."""
    for route in OPERATOR_ROUTES:
        names = dict.fromkeys(("run", "step", "client_id", "token_id"), secret)
        witness.request(route.method, route.path.format(**names), secret)
    for place in ("/v1/blobs/", "/v1/models/", "/", "/v1/uploads/"):
        for method in ("GET", "PUT", "PATCH"):
            witness.request(method, place + secret, secret)
    witness.request("GET", f"{routes.OPERATOR_JOURNAL.path}?since={secret}", secret)
    witness.request("GET", f"{routes.ASSIGNMENT.path}?wait_s={secret}&{secret}={secret}", secret)
    for body in (
        {"join_secret": secret, "name": secret}, {secret: secret}, [secret], secret,
        {"join_secret": {"is": secret}}, {"label": secret, secret: 1, "uses": 0},
    ):  # fmt: skip
        for path in (routes.ENROL.path, routes.SESSION.path, routes.OPERATOR_CREATE_TOKEN.path):
            witness.request("POST", path, secret, json_body=body)
    raw = secret.encode()
    for content in (raw, b'{"join_secret": "' + raw, b"\xff" + raw):
        witness.request("POST", routes.ENROL.path, secret, content=content)
    witness.request("POST", routes.ENROL.path, secret, content=secret.encode() * 40_000)


def fail_commands(witness: Witness) -> None:
    """Let commands fail that were given a secret or a password."""
    groups = ("token revoke", "operator remove", "client remove")
    for command, secret in zip(groups, witness.secrets.values(), strict=False):
        witness.said.append(witness.command(*command.split(), secret))
    for url in (
        f"postgresql+psycopg://fedra:{PLANTED}@127.0.0.1:1/fedra", f"mysql://a:{PLANTED}@host/b",
        f"://{PLANTED}", f"sqlite:////proc/{PLANTED}/x", f"postgresql+nothing://a:{PLANTED}@host/b",
    ):  # fmt: skip
        witness.said.append(witness.command("run", "list", FEDRA_SERVER_DATABASE_URL=url))
    for name in ("PORT", "TLS", "ADDRESS", "LOG_LEVEL", "MAX_CLIENTS"):
        witness.said.append(witness.command("run", "list", **{f"FEDRA_SERVER_{name}": PLANTED}))


def join_in_vain(witness: Witness, place: Path) -> None:
    """Let a real client fail with a wrong secret, a used-up one, and behind a dead proxy."""
    joining = witness.command("token", "create").strip()
    witness.secrets["third join secret"] = JoinString.parse(joining).secret
    data = write_folder(place / "data", seed=4)
    common = ("join", "--data", str(data.path), "--json", "--backend", "onnx")
    for home, told in {"wrong": joining[:-5] + "00000", "no-string": f"{joining}.x"}.items():
        done = run_edge_command(*common, "--server", told, "--home", str(place / home))
        assert done.returncode != 0
        witness.said += [done.stdout, done.stderr]
    dead = ("--proxy", f"http://plant:{PLANTED}@127.0.0.1:9")
    for home, options in {"behind-a-dead-proxy": dead, "site": ()}.items():
        log = place / f"{home}.log"
        command = [*common, "--server", joining, "--home", str(place / home), *options]
        client = EdgeProcess([sys.executable, "-m", "fedra_edge", *command], log, {})
        try:
            if options:
                client.wait_for("an attempt", lambda event: "again" in str(event["detail"]))
            else:
                client.wait_for_phase("waiting")
        finally:
            client.kill()
        witness.said += [log.read_text(encoding="utf-8"), json.dumps(client.events)]


def private_keys(place: Path) -> dict[str, str]:
    """Give a line of each private key that is kept."""
    found = {}
    for path in place.rglob("*"):
        if path.name in KEY_FILES:
            blocks = path.read_text(encoding="ascii").split("-----BEGIN ")
            [private] = [block for block in blocks if "PRIVATE KEY-----" in block]
            found[str(path)] = private.splitlines()[2]
    return found


def test_no_secret_is_told_where_it_does_not_belong(witness: Witness, tmp_path: Path) -> None:
    plant(witness)
    for secret in list(witness.secrets.values()):
        misuse(witness, secret)
    fail_commands(witness)
    join_in_vain(witness, tmp_path)
    witness.said.append(witness.command("audit", "log"))
    witness.said.append(witness.command("audit", "log", "--json"))
    assert witness.server.stop() == 0
    keys = private_keys(tmp_path)
    assert {Path(path).name for path in keys} >= {FILE_NAME, "ca.key"}
    secrets = {**witness.secrets, **keys, "password": PLANTED}
    told = [it for it in witness.said if any(secret in it for secret in secrets.values())]
    assert told == []
    for path in (it for it in tmp_path.rglob("*") if it.is_file() and it.name not in KEY_FILES):
        content = path.read_bytes()
        kept = {name for name, secret in secrets.items() if secret.encode() in content}
        assert kept == set(), path
    assert "refused" in witness.server.log.read_text(encoding="utf-8")
