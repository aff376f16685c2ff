"""Refusals of the operator's command: quick, in JSON when asked for, plain about a closed home."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from fedra_edge.protocol.models import ModelSpec, Piece
from fedra_edge.protocol.tensors import serialize_tensors
from fedra_server.cli import main
from fedra_server.cli.workplace import check_access
from fedra_server.config import ServerHome
from fedra_server.errors import StorageError
from fedra_server.exit_codes import ExitCode
from fedra_server.modelbook.comparing import surely_differs
from fedra_server.storage.blobs import BlobStore
from fedra_server.storage.store import Store
from tests.support.builders import make_model_spec

NOBODY = 65_534
Arrays = dict[str, NDArray[Any]]


def failing(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, Any, str]:
    """Run a command with --json; give its code, its error and what else it printed."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        main([*arguments, "--json"])
    printed = capsys.readouterr()
    return int(ended.value.code or 0), json.loads(printed.err), printed.out


def test_errors_are_json_when_json_was_asked_for(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    home = str(tmp_path / "home")
    code, error, out = failing(capsys, "run", "list", "--home", home)
    assert (code, out) == (ExitCode.CONFIGURATION, "")
    assert error == {
        "error": f"there is no server home at {home}",
        "remedy": f"fedra-server init --home {home}",
        "exit_code": 3,
    }
    for wrong in (["run", "fly"], ["run", "status"], ["run", "create", "a b", "--model", "m"]):
        code, error, out = failing(capsys, *wrong)
        assert (code, error["exit_code"], out) == (ExitCode.USAGE, 2, "")
        assert error["error"]
        assert "--help" in error["remedy"]


@pytest.mark.parametrize(("found", "told"), [(False, "no directory"), (True, "no config.json")])
def test_a_missing_model_is_refused_before_torch_is_imported(
    tmp_path: Path, found: bool, told: str
) -> None:
    Store.open(tmp_path / "home").close()
    (tmp_path / "home" / "server.toml").touch()
    if found:
        (tmp_path / "model").mkdir()
    program = (
        "import sys; from fedra_server.cli import main\n"
        "try: main(sys.argv[1:])\n"
        "finally: print('torch' in sys.modules)"
    )
    arguments = ["model", "add", "vit", str(tmp_path / "model"), "--home", str(tmp_path / "home")]
    command = [sys.executable, "-c", program, *arguments]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (ExitCode.CONFIGURATION, "False\n")
    assert told in done.stderr


def make_head(value: float) -> Arrays:
    return {"weight": np.full((3, 2), value, np.float32), "bias": np.zeros(3, np.float32)}


def save(path: Path, tensors: Arrays) -> None:
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text("{}", encoding="utf-8")
    (path / "model.safetensors").write_bytes(serialize_tensors(tensors))


def registered(blobs: BlobStore, head: Arrays) -> ModelSpec:
    spec = make_model_spec()
    piece = Piece(weights=blobs.put_bytes(serialize_tensors(head)), cost=spec.head.cost)
    return spec.model_copy(update={"head": piece})


def test_another_head_is_told_apart_without_loading_the_model(tmp_path: Path) -> None:
    blobs = BlobStore(tmp_path / "blobs")
    known = registered(blobs, make_head(1.0))
    named = {f"classifier.{name}": array for name, array in make_head(1.0).items()}
    save(tmp_path / "same", named | {"stem": np.ones(5, np.float32)})
    save(tmp_path / "other", make_head(2.0))
    save(tmp_path / "half", {name: it.astype(np.float16) for name, it in make_head(2.0).items()})
    (tmp_path / "none").mkdir()
    told = {
        name: surely_differs(tmp_path / name, "float32", known, blobs)
        for name in ("same", "other", "half", "none")
    }
    assert told == {"same": False, "other": True, "half": False, "none": False}


def test_a_taken_name_is_refused_with_the_reason(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    home = ServerHome(tmp_path / "home")
    home.create()
    home.config_file.touch()
    spec = registered(BlobStore(home.blobs), make_head(1.0))
    store = Store.open(home.path)
    store.add_model(spec, 1.0)
    store.close()
    save(tmp_path / "model", make_head(2.0))
    arguments = [spec.name, str(tmp_path / "model"), "--home", str(home.path)]
    code, error, _ = failing(capsys, "model", "add", *arguments)
    assert code == ExitCode.CONFLICT
    assert "differs" in error["error"]


@contextmanager
def as_another_user() -> Iterator[None]:
    """Be a user without rights for a moment; who is no administrator is one already."""
    if os.getuid() != 0:
        yield
        return
    os.setresuid(NOBODY, NOBODY, 0)
    try:
        yield
    finally:
        os.setresuid(0, 0, 0)


@pytest.mark.skipif(not hasattr(os, "setresuid"), reason="rights are tried by changing the user")
@pytest.mark.parametrize(("mode", "told"), [(0o555, "written"), (0o000, "read")])
def test_a_home_closed_to_this_user_is_a_storage_error_with_a_remedy(mode: int, told: str) -> None:
    with TemporaryDirectory() as parent:
        Path(parent).chmod(0o755)
        home = ServerHome(Path(parent) / "home")
        Store.open(home.path).close()
        home.config_file.touch()
        home.path.chmod(mode)
        try:
            with as_another_user(), pytest.raises(StorageError) as caught:
                check_access(home)
        finally:
            home.path.chmod(0o755)
    assert str(caught.value) == f"{home.path} cannot be {told} by this user"
    assert "--home" in caught.value.remedy
