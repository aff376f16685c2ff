"""The promise before joining: the server's own plan for this machine, and the bytes it costs."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import typer

from fedra_edge.config import SiteConfig
from fedra_edge.errors import ConfigurationError
from fedra_edge.exports import read_model_description
from fedra_edge.options import run_options
from fedra_edge.promising import DEADLINE_S, make_promise, measure_promise, round_bytes, terms_of
from fedra_edge.protocol.devices import Calibration
from fedra_edge.protocol.fitting import Work, fit_work
from fedra_edge.protocol.models import AdapterSpec, ModelSpec, TokenInput
from fedra_edge.protocol.tensors import serialize_tensors
from fedra_server.runs import RunSpec
from tests.support.builders import (
    make_adapter,
    make_blob,
    make_calibration,
    make_model_spec,
    make_piece,
    make_profile,
)

SPEC = make_model_spec(num_layers=4)
ADAPTER = make_adapter()
TERMS = terms_of(SPEC, {})
PIECE_BYTES = SPEC.stem.weights.size_bytes


def size_of(spec: ModelSpec, adapter: AdapterSpec, trained: int) -> int:
    """Make a delta of the first layers and weigh it."""
    shapes = spec.delta_shapes(adapter, spec.layer_ids[:trained])
    return len(serialize_tensors({name: np.zeros(it, np.float32) for name, it in shapes.items()}))


def adapters_size(layers: int) -> int:
    """Weigh the adapter files of so many layers, and the head's."""
    files = [SPEC.layer_adapter_shapes(ADAPTER, layer) for layer in SPEC.layer_ids[:layers]]
    zeros = [
        {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}
        for shapes in (*files, SPEC.head_shapes())
    ]
    return sum(len(serialize_tensors(tensors)) for tensors in zeros)


def test_full_depth_downloads_the_model_once_and_all_adapters_every_round() -> None:
    travelling = round_bytes(SPEC, ADAPTER, "full", 2, evaluates=False)
    assert travelling.later_down == adapters_size(4)
    assert travelling.first_down == 6 * PIECE_BYTES + adapters_size(4)
    assert travelling.up == size_of(SPEC, ADAPTER, 2)


def test_reduced_depth_downloads_its_layers_only_unless_the_site_evaluates() -> None:
    travelling = round_bytes(SPEC, ADAPTER, "reduced", 2, evaluates=False)
    assert travelling.later_down == adapters_size(2)
    assert travelling.first_down == 4 * PIECE_BYTES + adapters_size(2)
    evaluating = round_bytes(SPEC, ADAPTER, "reduced", 2, evaluates=True)
    assert evaluating == round_bytes(SPEC, ADAPTER, "full", 2, evaluates=True)


def test_the_largest_layers_and_the_tokenizer_are_counted() -> None:
    large = make_piece("large").model_copy(update={"weights": make_blob("large", 9_000)})
    text = TokenInput(vocabulary_size=9, max_tokens=9, tokenizer=make_blob("tokens", 700))
    spec = SPEC.model_copy(update={"layers": (*SPEC.layers[:3], large), "input": text})
    travelling = round_bytes(spec, ADAPTER, "reduced", 1, evaluates=False)
    assert travelling.first_down == 2 * PIECE_BYTES + 9_000 + 700 + adapters_size(1)


def test_what_is_not_said_of_a_run_is_as_the_server_has_it() -> None:
    default = RunSpec(adapter=AdapterSpec(targets=SPEC.default_targets))
    assert default.terms == TERMS
    assert default.deadline_s == DEADLINE_S
    chosen = {
        "rank": 4, "batch_size": 16, "local_epochs": 3, "max_steps": 5, "optimizer": "adamw",
        "depth": "reduced", "deadline": 60.0, "examples": 12,
    }  # fmt: skip
    terms = terms_of(SPEC, chosen)
    assert (terms.adapter.rank, terms.depth, terms.deadline_s) == (4, "reduced", 60.0)
    training = terms.training
    assert (training.batch_size, training.local_epochs, training.max_steps) == (16, 3, 5)
    assert training.optimizer == "adamw"


def test_a_promise_is_the_servers_plan_for_the_same_machine() -> None:
    profile, calibration = make_profile(max_layers=3), make_calibration(SPEC)
    promise = make_promise(profile, calibration, SPEC, TERMS)
    work = fit_work(profile, calibration, SPEC, TERMS)
    assert isinstance(work, Work)
    assert (promise.depth, promise.trained_layers, promise.model_layers) == ("full", 3, 4)
    assert promise.predicted_peak_bytes == work.predicted_peak_bytes
    assert (promise.residency, promise.micro_batch) == (work.plan.residency, work.plan.micro_batch)
    assert (promise.steps, promise.step_s) == (work.steps, work.step_s)
    assert promise.why_not_more == work.why_not_more
    assert promise.needs_at_least_bytes < promise.predicted_peak_bytes < promise.memory_bytes


def refusal(memory_bytes: int, calibration: Calibration, **chosen: object) -> ConfigurationError:
    profile = make_profile(memory_bytes=memory_bytes, baseline_bytes=0)
    with pytest.raises(ConfigurationError) as caught:
        make_promise(profile, calibration, SPEC, terms_of(SPEC, chosen))
    return caught.value


def test_the_memory_said_to_be_needed_is_enough_and_a_byte_less_is_not() -> None:
    calibration = make_calibration(SPEC)
    ample = make_profile(memory_bytes=2**40, baseline_bytes=0)
    need_bytes = make_promise(ample, calibration, SPEC, TERMS).needs_at_least_bytes
    enough = ample.model_copy(update={"memory_bytes": need_bytes})
    assert make_promise(enough, calibration, SPEC, TERMS).trained_layers == 1
    assert "needs" in str(refusal(need_bytes - 1, calibration))


def test_a_machine_that_does_not_fit_is_told_what_is_missing() -> None:
    error = refusal(10**6, make_calibration(SPEC))
    assert "cannot train tiny: training a single layer needs 1" in str(error)
    assert "this process may use 1 MB" in str(error)
    assert "MB more" in error.remedy
    slow = refusal(2**40, make_calibration(SPEC, forward_s=9.0), deadline=1.0)
    assert "does not fit the deadline of 1.0 s" in str(slow)
    assert slow.remedy == "Ask for a longer deadline."


def test_a_machine_with_too_small_a_disk_is_not_told_to_wait_longer() -> None:
    profile = make_profile(memory_bytes=2**40, disk_free_bytes=1)
    with pytest.raises(ConfigurationError, match="of disk") as caught:
        make_promise(profile, make_calibration(SPEC), SPEC, terms_of(SPEC, {}))
    assert "disk" in caught.value.remedy


def test_a_description_is_read_from_a_file_or_an_export(tmp_path: Path) -> None:
    file = tmp_path / "model.json"
    file.write_text(SPEC.model_dump_json(indent=2), encoding="utf-8")
    assert read_model_description(file) == read_model_description(tmp_path) == SPEC
    file.write_text(json.dumps({"name": "tiny"}), encoding="utf-8")
    with pytest.raises(ConfigurationError, match="describes no model") as caught:
        read_model_description(file)
    assert "--spec" in caught.value.remedy
    with pytest.raises(ConfigurationError, match="describes no model"):
        read_model_description(tmp_path / "absent.json")


def test_texts_need_the_tokenizer_to_be_counted(tmp_path: Path) -> None:
    text = TokenInput(vocabulary_size=9, max_tokens=9, tokenizer=make_blob("tokens"))
    file = tmp_path / "model.json"
    spec = make_model_spec(input=text)
    file.write_text(spec.model_dump_json(), encoding="utf-8")
    data = tmp_path / "data" / "zero"
    data.mkdir(parents=True)
    (data / "1.txt").write_text("a text", encoding="utf-8")
    with pytest.raises(ConfigurationError, match="tokenizer") as caught:
        measure_promise(file, {"data": data.parent}, SiteConfig(home=tmp_path))
    assert "--examples" in caught.value.remedy


def test_what_describes_a_run_is_of_use_only_with_a_model() -> None:
    nothing: dict[str, object] = dict.fromkeys(
        ("model", "data", "examples", "rank", "batch_size", "local_epochs", "max_steps",
         "optimizer", "depth", "deadline")
    )  # fmt: skip
    assert run_options(nothing) == {}
    assert run_options({**nothing, "model": "m", "rank": 4}) == {"rank": 4}
    with pytest.raises(typer.BadParameter, match="--batch-size: of use only with --model"):
        run_options({**nothing, "batch_size": 4})
    with pytest.raises(typer.BadParameter, match="not both"):
        run_options({**nothing, "model": "m", "data": "d", "examples": 4})
