"""Merging deltas against numpy reading and adding the same bytes, and its peak memory.

Deltas are those of ViT-B/16 with adapters of rank 8 on two modules a block and a head of a
thousand labels, 4.3 MB with all layers. Merges and their counterparts are interleaved, and ratios
are medians over rounds, because machines drift. ``python -m tests.bench.merge [--json]``
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from fedra_edge.memory_meter import measured_peak
from fedra_edge.protocol.files import sha256_of_file
from fedra_edge.protocol.ids import AssignmentId, LayerId, RunId
from fedra_edge.protocol.models import ModelSpec
from fedra_edge.protocol.tensors import serialize_tensors, tensor_file_bytes
from fedra_server.merging import Contributor
from fedra_server.piecewise import merged_pieces
from fedra_server.publishing import (
    Arrival,
    initial_revision,
    merged_revision,
    trained_pieces,
    weigh,
)
from fedra_server.runs import RunSpec
from fedra_server.storage.blobs import BlobStore
from tests.bench.rows import Row, print_rows
from tests.support.builders import make_model_spec, make_run_spec

_LAYERS, _WIDTH, _LABELS = 12, 768, 1000
_TARGETS = ("attention.q_proj", "attention.v_proj")
_DELTAS, _FILES, _HELD, _ROUNDS = 128, 64, 6, 11
_FEW, _MANY = 10, 1000
_TIME_GOAL, _MEMORY_GOAL = 1.25, 1.2
_MEGABYTE = 10**6
_CHILD, _LIST = "--merge-here", "arrivals.json"


class Merging:
    """A first revision and deltas of it on the disk, each file made once and linked for more."""

    def __init__(self, directory: Path, layers: int, weighting: str) -> None:
        self.directory = directory
        self.spec = _model()
        targets = {"rank": 8, "alpha": 16.0, "targets": _TARGETS}
        self.run_spec: RunSpec = make_run_spec(adapter=targets, merge_weighting=weighting)
        self.blobs = BlobStore(directory / "blobs")
        head = {
            name: np.zeros(shape, np.float32) for name, shape in self.spec.head_parameters.items()
        }
        weights = self.blobs.put_bytes(serialize_tensors(head))
        piece = self.spec.head.model_copy(update={"weights": weights})
        self.spec = self.spec.model_copy(update={"head": piece})
        self.base = initial_revision(self.spec, RunId("run"), self.run_spec, self.blobs, now=0.0)
        self.layers = layers
        self.generator = np.random.default_rng(0)

    def arrivals(self, count: int, distinct: int) -> list[Arrival]:
        """Make so many deltas, of which so many have files with values of their own."""
        arrivals: list[Arrival] = []
        for index in range(count):
            path = self.directory / f"delta-{index}.safetensors"
            if index < distinct:
                chosen = self.generator.choice(_LAYERS, self.layers, replace=False)
                layer_ids = tuple(LayerId(int(layer_id)) for layer_id in sorted(chosen))
                self._write(path, layer_ids)
                pieces = trained_pieces(layer_ids)
            else:
                path.hardlink_to(arrivals[index % distinct].path)
                pieces = arrivals[index % distinct].pieces
            contributor = Contributor(AssignmentId(f"{index:06}"), 100 + index, 1 / 3)
            arrivals.append(Arrival(contributor, pieces, self.base.versions, path))
        return arrivals

    def compute(self, arrivals: list[Arrival]) -> None:
        """Read and merge all pieces, and leave them in memory one by one."""
        paths = {arrival.contributor.assignment_id: arrival.path for arrival in arrivals}
        merges = weigh(self.base, arrivals, self.run_spec)
        optimizer = self.run_spec.server_optimizer
        for _ in merged_pieces(self.base, merges, paths.__getitem__, optimizer, self.blobs):
            pass

    def merge(self, arrivals: list[Arrival]) -> None:
        """Merge, and store what comes out."""
        merged_revision(self.base, arrivals, self.run_spec, self.blobs, now=1.0)

    def _write(self, path: Path, layer_ids: tuple[LayerId, ...]) -> None:
        shapes = self.spec.delta_shapes(self.run_spec.adapter, layer_ids)
        path.write_bytes(
            serialize_tensors(
                {
                    name: self.generator.normal(size=shape).astype(np.float32)
                    for name, shape in shapes.items()
                }
            )
        )
        assert path.stat().st_size == tensor_file_bytes(shapes)


def _model() -> ModelSpec:
    linears = dict.fromkeys(_TARGETS, (_WIDTH, _WIDTH))
    head = {"classifier.weight": (_LABELS, _WIDTH), "classifier.bias": (_LABELS,)}
    return make_model_spec(
        _LAYERS, block_linears=linears, default_targets=_TARGETS, head_parameters=head
    )


def add_with_numpy(arrivals: list[Arrival], precision: type[np.floating] = np.float64) -> None:
    """Read the values of every file at once and add them, by default as precisely as a merge."""
    total = np.zeros(max(arrival.path.stat().st_size for arrival in arrivals) // 4, precision)
    for arrival in arrivals:
        with arrival.path.open("rb") as file:
            file.seek(int.from_bytes(file.read(8), "little"), 1)
            values = np.fromfile(file, dtype="<f4")
        total[: values.size] += values


def _seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def time_rows(what: str, directory: Path, layers: int, weighting: str) -> list[Row]:
    """Compare merging with adding; the digests checked before and the blobs stored after apart."""
    merging = Merging(directory, layers, weighting)
    arrivals = merging.arrivals(_DELTAS, _FILES)
    seconds = [
        (
            _seconds(lambda: merging.compute(arrivals)),
            _seconds(lambda: add_with_numpy(arrivals)),
            _seconds(lambda: [sha256_of_file(arrival.path) for arrival in arrivals]),
            _seconds(lambda: merging.merge(arrivals)),
            _seconds(lambda: add_with_numpy(arrivals, np.float32)),
        )
        for _ in range(_ROUNDS + 1)
    ][1:]
    ours, adding, verifying, _, coarse = map(statistics.median, zip(*seconds, strict=True))
    ratio = statistics.median(mine / plain for mine, plain, *_ in seconds)
    storing = statistics.median(stored - mine for mine, _, _, stored, _ in seconds)
    told, goal = f"merging {_DELTAS} deltas, {what}", f"<= {_TIME_GOAL} x"
    return [
        Row(told, ours, "s", "numpy", ratio, goal, ratio <= _TIME_GOAL),
        Row("  numpy reading and adding the same bytes", adding, "s"),
        Row("  numpy doing so in float32", coarse, "s"),
        Row("  checking the digests before", verifying, "s"),
        Row("  storing the revision after, synced", storing, "s"),
    ]


def peak_row() -> list[Row]:
    """Compare the peaks of fresh processes that merge many and few deltas."""
    peaks = {count: _peak_bytes(count) for count in (_FEW, _MANY)}
    ratio = peaks[_MANY] / peaks[_FEW]
    return [
        Row(f"peak memory, {_FEW} deltas", peaks[_FEW] / _MEGABYTE, "MB"),
        Row(
            f"peak memory, {_MANY} deltas",
            peaks[_MANY] / _MEGABYTE,
            "MB",
            f"{_FEW} deltas",
            ratio,
            f"<= {_MEMORY_GOAL} x",
            ratio <= _MEMORY_GOAL,
        ),
    ]


def _peak_bytes(count: int) -> int:
    with tempfile.TemporaryDirectory() as directory:
        arrivals = Merging(Path(directory), _HELD, "inverse_chance").arrivals(count, _FEW)
        listed = [(it.contributor.assignment_id, it.pieces, str(it.path)) for it in arrivals]
        Path(directory, _LIST).write_text(json.dumps(listed))
        command = [sys.executable, "-m", "tests.bench.merge", _CHILD, directory]
        return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def _merge_in_this_process(directory: Path) -> None:
    """Merge the deltas that another process prepared, and print this one's peak in bytes."""
    merging = Merging(directory, _HELD, "inverse_chance")
    arrivals = [
        Arrival(
            Contributor(AssignmentId(name), 100, 1 / 3),
            tuple(pieces),
            merging.base.versions,
            Path(path),
        )
        for name, pieces, path in json.loads((directory / _LIST).read_text())
    ]
    with measured_peak() as meter:
        merging.merge(arrivals)
    print(meter.peak_bytes)  # noqa: T201 - a program's output


def main() -> None:
    """Measure times, then memory."""
    rows: list[Row] = []
    for what, layers, weighting in (
        ("all layers, equal weights", _LAYERS, "uniform"),
        ("all layers, weights by examples", _LAYERS, "num_examples"),
        (f"{_HELD} random layers, inverse chance", _HELD, "inverse_chance"),
    ):
        with tempfile.TemporaryDirectory() as directory:
            rows += time_rows(what, Path(directory), layers, weighting)
    print_rows("merge", [*rows, *peak_row()], ["numpy", "safetensors"])


if __name__ == "__main__":
    if sys.argv[1:2] == [_CHILD]:
        _merge_in_this_process(Path(sys.argv[2]))
    else:
        main()
