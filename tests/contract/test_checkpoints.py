"""A training in parts gives the bits of one in one piece, and no file can lead it astray."""

from __future__ import annotations

import json
import logging
import tracemalloc
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from typing_extensions import override

from fedra_edge.data.matching import MatchedDataset, match_labels
from fedra_edge.errors import TrainingInterrupted
from fedra_edge.protocol.slices import TrainingSpec
from fedra_edge.training import SliceWork, TrainedSlice, Trainer
from fedra_edge.training.checkpoints import Checkpoint, Progress
from fedra_edge.training.onnx_trainer import OnnxTrainer
from fedra_edge.training.torch_trainer import TorchTrainer
from tests.support.surroundings import room_for
from tests.support.tiny_vit import LABELS, NoiseImages, TinyVit, noise_data

CPU = torch.device("cpu")
STEPS = 7
OPTIMIZERS = [
    TrainingSpec(batch_size=5, learning_rate=0.05),
    TrainingSpec(batch_size=5, learning_rate=0.05, momentum=0.0),
    TrainingSpec(batch_size=5, learning_rate=0.01, optimizer="adamw"),
]


class PowerCut(Exception):  # noqa: N818 (an event, not a mistake)
    """The machine is gone."""


@dataclass(frozen=True)
class Workshop:
    """A model to train slices of, and what to train with."""

    tiny: TinyVit
    trainers: Mapping[str, Trainer]

    def work(self, training: TrainingSpec = OPTIMIZERS[0], **values: object) -> SliceWork:
        settled = {"steps": STEPS, "micro_batch": 3, "graphs": self.tiny.spec.graphs, **values}
        return self.tiny.work([0, 2], training=training, **settled)

    def machine(self, place: Path, work: SliceWork, backend: str = "torch") -> Machine:
        return Machine(self.trainers[backend], work, place / "a1.safetensors")

    def trained_at_once(self, work: SliceWork, backend: str = "torch") -> TrainedSlice:
        return self.trainers[backend].train(work, noise_data(), room_for(work))


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    tiny = TinyVit.register(tmp_path_factory.mktemp("tiny"))
    return Workshop(tiny, {"torch": TorchTrainer(CPU), "onnx": OnnxTrainer(threads=1)})


class Machine:
    """Trains a slice with a checkpoint; asked to stop, or losing power, after so many steps."""

    def __init__(self, trainer: Trainer, work: SliceWork, file: Path) -> None:
        self.trainer = trainer
        self.work = work
        self.file = file
        self.data = noise_data()
        self.steps_taken: list[int] = []
        self.resumed: list[tuple[int, int]] = []

    def train(self, *, stop_after: int = STEPS, dead_after: int = STEPS) -> TrainedSlice:
        def on_step(done: int, *_: object) -> None:
            self.steps_taken.append(done)
            if done == dead_after < STEPS:
                raise PowerCut

        def is_asked() -> bool:
            return bool(self.steps_taken) and self.steps_taken[-1] == stop_after < STEPS

        room = room_for(self.work, on_step=on_step, should_stop=lambda: is_asked() and not paused)
        paused = dead_after < STEPS  # rests there, which leaves a checkpoint, and loses power later
        surroundings = replace(
            room,
            checkpoint=self.file,
            is_to_rest=is_asked,
            on_resume=lambda done, total: self.resumed.append((done, total)),
        )
        return self.trainer.train(self.work, self.data, surroundings)

    def stop(self, after: int) -> None:
        with pytest.raises(TrainingInterrupted, match=f"stopped after {after} of {STEPS}"):
            self.train(stop_after=after)

    def lose_power(self, after: int, *, saved: int) -> None:
        with pytest.raises(PowerCut):
            self.train(stop_after=saved, dead_after=after)


def assert_same(found: TrainedSlice, expected: TrainedSlice) -> None:
    assert replace(found, adapters={}, train_s=0) == replace(expected, adapters={}, train_s=0)
    assert found.adapters.keys() == expected.adapters.keys()
    for name, value in expected.adapters.items():
        np.testing.assert_array_equal(found.adapters[name], value, err_msg=name, strict=True)


@pytest.mark.parametrize("cuts", [(1,), (3,), (6,), (2, 3, 5)], ids=str)
@pytest.mark.parametrize("training", OPTIMIZERS, ids=lambda it: f"{it.optimizer}-{it.momentum}")
@pytest.mark.parametrize("backend", ["torch", "onnx"])
def test_a_training_in_parts_gives_the_same_bits(
    workshop: Workshop,
    tmp_path: Path,
    backend: str,
    training: TrainingSpec,
    cuts: Sequence[int],
) -> None:
    work = workshop.work(training)
    expected = workshop.trained_at_once(work, backend)
    machine = workshop.machine(tmp_path, work, backend)
    for cut in cuts:
        machine.stop(cut)
    found = machine.train()
    assert machine.steps_taken == list(range(1, STEPS + 1))
    assert_same(found, expected)
    assert found.train_s > 0


@pytest.mark.parametrize("residency", ["resident", "streamed"])
def test_a_power_cut_costs_what_came_after_the_checkpoint(
    workshop: Workshop, tmp_path: Path, residency: str
) -> None:
    work = workshop.work(residency=residency)
    expected = workshop.trained_at_once(work)
    machine = workshop.machine(tmp_path, work)
    machine.lose_power(4, saved=2)
    assert_same(machine.train(), expected)
    assert machine.steps_taken == [1, 2, 3, 4, 3, 4, 5, 6, 7]


def test_what_frozen_layers_gave_is_computed_again_after_a_cut(
    workshop: Workshop, tmp_path: Path
) -> None:
    frozen_below = {"steps": STEPS, "micro_batch": 3, "graphs": workshop.tiny.spec.graphs}
    work = workshop.tiny.work([2, 3], training=OPTIMIZERS[0], **frozen_below)
    expected = workshop.trained_at_once(work)
    machine = workshop.machine(tmp_path, work)
    machine.stop(4)  # in the second epoch, which reads what the first one kept
    found = machine.train()
    for name, value in expected.adapters.items():
        np.testing.assert_allclose(found.adapters[name], value, rtol=1e-4, atol=1e-6)


def test_neither_saving_nor_loading_copies_the_state(workshop: Workshop, tmp_path: Path) -> None:
    num_bytes = 64 * 2**20
    state = {"value/a": np.ones(num_bytes // 4, dtype=np.float32), "steps/a": np.ones(1, "<i8")}
    machine = workshop.machine(tmp_path, workshop.work())
    kept = Checkpoint(machine.file, machine.work.manifest, machine.data, "torch")
    tracemalloc.start()
    try:
        kept.save(Progress().after(1.0, 5, 0.1), state.items)
        stored = kept.load()
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert stored is not None
    assert machine.file.stat().st_size > num_bytes
    assert peak_bytes < num_bytes / 16
    assert {name: array.tobytes() for name, array in stored.items()} == {
        name: array.tobytes() for name, array in state.items()
    }


def test_going_on_is_told(
    workshop: Workshop,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    machine = workshop.machine(tmp_path, workshop.work())
    machine.stop(2)
    with caplog.at_level(logging.INFO):
        machine.train()
    assert f"going on from a checkpoint, after step 2 of {STEPS}" in caplog.text
    assert machine.resumed == [(2, STEPS)]


def test_a_quick_training_writes_nothing(workshop: Workshop, tmp_path: Path) -> None:
    workshop.machine(tmp_path / "place", workshop.work()).train()
    assert list(tmp_path.iterdir()) == []


def test_a_longer_remaining_time_is_no_other_training(workshop: Workshop, tmp_path: Path) -> None:
    machine = workshop.machine(tmp_path, workshop.work())
    machine.stop(3)
    machine.work = workshop.work(remaining_s=5.0)
    machine.train()
    assert machine.steps_taken == list(range(1, STEPS + 1))


class OtherImages(NoiseImages):
    """As many images with the same labels, under other names."""

    @override
    def key_of(self, index: int) -> str:
        return f"other-{index}"


def make_strange(machine: Machine, what: str, workshop: Workshop) -> None:
    """Let the machine have other work, data or software than its checkpoint is of."""
    match what:
        case "manifest":
            machine.work = workshop.work(seed=8)
        case "assignment":
            machine.work = workshop.work(assignment_id="a2")
        case "backend":
            machine.trainer = workshop.trainers["onnx"]
        case "names":
            machine.data = match_labels(OtherImages(), LABELS)
        case "labels":
            labels = {**machine.data.label_ids, machine.data.train_indices[0]: 2}
            machine.data = replace(machine.data, label_ids=labels)
        case _:
            machine.data = MatchedDataset(
                machine.data.dataset, machine.data.train_indices[1:], (), machine.data.label_ids
            )


@pytest.mark.parametrize("what", ["manifest", "assignment", "backend", "names", "labels", "fewer"])
def test_another_training_starts_anew(
    workshop: Workshop,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    what: str,
) -> None:
    machine = workshop.machine(tmp_path, workshop.work())
    machine.stop(3)
    make_strange(machine, what, workshop)
    machine.steps_taken.clear()
    machine.train()
    assert machine.steps_taken[0] == 1
    assert "is of another training" in caplog.text
    assert (tmp_path / "damaged" / "a1.safetensors").is_file()


@pytest.fixture(scope="module")
def cut_off(
    workshop: Workshop, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Machine, bytes, TrainedSlice]:
    """A training that was stopped, its checkpoint, and what it should come to."""
    place = tmp_path_factory.mktemp("cut-off")
    machine = workshop.machine(place, workshop.work(), "onnx")
    expected = workshop.trained_at_once(machine.work, "onnx")
    machine.stop(3)
    return machine, machine.file.read_bytes(), expected


def assert_starts_anew(cut_off: tuple[Machine, bytes, TrainedSlice]) -> None:
    machine, _, expected = cut_off
    machine.steps_taken.clear()
    assert_same(machine.train(), expected)
    assert machine.steps_taken[0] == 1
    assert not machine.file.exists()


@given(place=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_a_flipped_bit_is_never_trained_with(
    cut_off: tuple[Machine, bytes, TrainedSlice], place: float, bit: int
) -> None:
    machine, content, _ = cut_off
    damaged = bytearray(content)
    damaged[int(place * len(damaged))] ^= 1 << bit
    machine.file.write_bytes(damaged)
    assert_starts_anew(cut_off)


def edited(content: bytes, **changes: object) -> bytes:
    """Change what a checkpoint says of itself, leaving its digest as it is."""
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    described = json.loads(header["__metadata__"]["checkpoint"]) | changes
    header["__metadata__"]["checkpoint"] = json.dumps(described)
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + content[8 + length :]


@pytest.mark.parametrize(
    "damage",
    [
        lambda _: b"",
        lambda _: b"\xff" * 100,
        lambda _: b"{}",
        lambda content: content[: len(content) // 2],
        lambda content: content[:-1],
        lambda content: content + b"\0",
        lambda content: edited(content, version=2),
        lambda content: edited(content, progress={"steps": "many"}),
        lambda content: edited(content, progress=None),
    ],
    ids=["empty", "noise", "short", "half", "cut", "longer", "newer", "wrong-type", "none"],
)
def test_a_file_that_is_no_checkpoint_is_kept_aside_and_told(
    cut_off: tuple[Machine, bytes, TrainedSlice],
    caplog: pytest.LogCaptureFixture,
    damage: object,
) -> None:
    machine, content, _ = cut_off
    assert callable(damage)
    spoilt = damage(content)
    machine.file.write_bytes(spoilt)
    assert_starts_anew(cut_off)
    [message] = [it.getMessage() for it in caplog.records if "checkpoint" in it.getMessage()]
    kept_at = Path(message.partition("kept as ")[2].partition(",")[0])
    assert kept_at.read_bytes() == spoilt


def test_a_directory_in_its_place_is_moved_away(
    cut_off: tuple[Machine, bytes, TrainedSlice],
) -> None:
    cut_off[0].file.mkdir()
    assert_starts_anew(cut_off)


def test_a_disk_that_takes_nothing_does_not_keep_training_from_its_end(
    workshop: Workshop,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    (tmp_path / "file").write_bytes(b"")
    machine = workshop.machine(tmp_path / "file", workshop.work())
    room = room_for(machine.work)
    surroundings = replace(room, checkpoint=machine.file, is_to_rest=lambda: True)
    result = machine.trainer.train(machine.work, machine.data, surroundings)
    assert result.steps == STEPS
    told = [it for it in caplog.records if "training goes on, but" in it.getMessage()]
    assert [it.levelno for it in told if it.levelno >= logging.WARNING] == [logging.WARNING]
