"""Does what an assignment asks for: calibrate, evaluate, train; its result is in the outbox."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Final

from fedra_edge.api import ServerApi
from fedra_edge.config import EdgeConfig
from fedra_edge.control import Control
from fedra_edge.data.dataset import LocalDataset
from fedra_edge.data.matching import MatchedDataset, match_labels
from fedra_edge.data.preparing import WrongKindError
from fedra_edge.deltas import compute_delta, pack_delta
from fedra_edge.errors import (
    BackendUnavailableError,
    ClientRevokedError,
    DataError,
    FedraEdgeError,
    NotAuthenticatedError,
    ProtocolMismatchError,
    ServerRefusedError,
    ServerUnreachableError,
    SignatureRefusedError,
    SliceError,
    StorageFullError,
    WorkInterrupted,
)
from fedra_edge.guard import PromiseGuard
from fedra_edge.heartbeats import Heartbeats
from fedra_edge.layer_cache import LayerCache
from fedra_edge.memory_meter import PeakMeter, measured_peak
from fedra_edge.outbox import Outbox
from fedra_edge.profiling import measure_usable_memory, unbacked_bytes, usable_disk
from fedra_edge.progress import Phase, ProgressBoard
from fedra_edge.protocol.deltas import TrainingReport
from fedra_edge.protocol.footprint import Footprint, SliceShape
from fedra_edge.protocol.ids import ModelId
from fedra_edge.protocol.models import ModelSpec
from fedra_edge.protocol.rounds import Evaluation, EvaluationTask, Train, Wait
from fedra_edge.protocol.slices import SliceManifest
from fedra_edge.retrying import RetryPolicy
from fedra_edge.slicing import (
    fetch_tokenizer,
    find_graphs,
    materialize,
    model_blobs,
    slice_blobs,
    whole_model,
)
from fedra_edge.training.checkpoints import drop_checkpoints
from fedra_edge.training.trainer import BlockCost, Surroundings, TrainedSlice, Trainer
from fedra_edge.transport import Traffic, Transport

LOGGER: Final = logging.getLogger(__name__)
FATAL: Final = (
    NotAuthenticatedError,
    ClientRevokedError,
    SignatureRefusedError,
    ProtocolMismatchError,
    BackendUnavailableError,
)
"""Errors after which nothing this client could be asked to do would work."""
_FOR_SPACE: Final = RetryPolicy(first_wait_s=0.5, max_wait_s=10.0)
_NOT_WANTED: Final = (
    "the server no longer waits for this slice: "
    "the round went on without it, or it became too stale"
)
_MANIFEST_BYTES: Final = 64 * 2**10
_MOST_TOLD: Final = 100
"""What a training report can hold of step-downs."""


@dataclass(frozen=True)
class Equipment:
    """Everything that work needs; built once per client."""

    config: EdgeConfig
    control: Control
    board: ProgressBoard
    transport: Transport
    api: ServerApi
    outbox: Outbox
    layer_cache: LayerCache
    dataset: LocalDataset
    trainer: Trainer


class Participation:
    """The work of one client.

    ``prepare`` and ``train`` return whether the work was done. What fails is logged, an
    assignment that fails is reported to the server; only ``FATAL`` errors are raised, and
    ``DataError`` when no example is left to train on.
    """

    def __init__(self, equipment: Equipment) -> None:
        self._equipment = equipment
        self._api = equipment.api
        self._board = equipment.board
        self._specs: dict[ModelId, ModelSpec] = {}
        self._matched: dict[ModelId, MatchedDataset] = {}
        self._costs: dict[ModelId, BlockCost] = {}
        self._reported = Traffic(0, 0)

    def prepare(self, wait: Wait) -> bool:
        """Do what helps while there is nothing to train."""
        task = wait.evaluate
        model_id = wait.calibrate or (task.model_id if task is not None else "")
        try:
            if wait.calibrate is not None:
                self._calibrate(ModelId(wait.calibrate))
            if task is not None:
                self._evaluate(task)
        except WorkInterrupted:
            return True
        except Exception as error:  # noqa: BLE001 (whatever a trainer or a dataset may raise)
            self._tell("the work could not be done; trying again later", error)
            self._raise_if_fatal(model_id, error)
            return False
        return True

    def train(self, train: Train) -> bool:
        """Train a slice and put its delta into the outbox."""
        manifest = train.manifest
        interval_s = self._equipment.config.heartbeat_s
        beats = Heartbeats(
            self._api, manifest.id, steps_total=manifest.steps, interval_s=interval_s
        )
        try:
            with beats:
                if train.evaluate is not None:
                    self._cost(ModelId(manifest.model_id))  # the server takes no counts without
                    self._evaluate(train.evaluate, beats)
                self._train_slice(manifest, beats)
        except WorkInterrupted as error:
            LOGGER.info("round %d: %s", manifest.round_number, error)
            if not beats.is_wanted:
                LOGGER.warning("round %d: %s", manifest.round_number, _NOT_WANTED)
                self._board.update(phase=Phase.WAITING, detail=_NOT_WANTED)
                drop_checkpoints(self._equipment.config.checkpoints)
            return True
        except Exception as error:  # noqa: BLE001 (whatever a trainer or a dataset may raise)
            self._tell(f"round {manifest.round_number}: training failed", error)
            self._report(manifest, error)
            self._raise_if_fatal(manifest.model_id, error)
            return False
        return True

    def _cost(self, model_id: ModelId) -> BlockCost:
        """Give what a block costs here, as this process has measured and told it."""
        return self._costs.get(model_id) or self._calibrate(model_id)

    def _calibrate(self, model_id: ModelId) -> BlockCost:
        spec = self._spec(model_id)
        data = self._data(model_id)
        self._board.update(phase=Phase.CALIBRATING, detail=f"measuring a block of {spec.name}")
        graphs = find_graphs(spec.graphs, self._equipment.layer_cache)
        cost = self._equipment.trainer.calibrate(spec, self._usable_memory, graphs)
        self._costs[model_id] = cost
        train, held_out = len(data.train_indices), len(data.held_out_indices)
        self._api.calibrate(cost.calibration(model_id, train, held_out))
        return cost

    def _evaluate(self, task: EvaluationTask, beats: Heartbeats | None = None) -> None:
        model_id = ModelId(task.model_id)
        data = self._data(model_id)
        if not data.held_out_indices:
            LOGGER.info("no held-out examples here; nothing to evaluate")
            return
        number = task.revision.number
        self._board.update(
            phase=Phase.EVALUATING, run=task.run, detail=f"evaluating revision {number}"
        )
        spec, layer_cache = self._spec(model_id), self._equipment.layer_cache
        if layer_cache.fits(blobs := model_blobs(task, spec)):
            layer_cache.fetch_all(blobs)
        model = whole_model(task, spec, layer_cache)
        counts = self._equipment.trainer.evaluate(
            model, data, lambda: self._should_stop(beats), self._usable_memory
        )
        evaluation = Evaluation(
            run=task.run,
            revision=number,
            num_examples=counts.num_examples,
            num_correct=counts.num_correct,
            loss_sum=counts.loss_sum,
        )
        self._board.update(
            accuracy=counts.num_correct / counts.num_examples,
            evaluated_revision=number,
            detail=f"revision {number}: {counts.num_correct} of {counts.num_examples} correct",
        )
        try:
            self._api.send_evaluation(evaluation)
        except FATAL:
            raise
        except ServerRefusedError as error:
            LOGGER.warning("the server does not want this evaluation: %s", error)

    def _train_slice(self, manifest: SliceManifest, beats: Heartbeats) -> None:
        self._board.update(
            phase=Phase.DOWNLOADING,
            run=manifest.run,
            round_number=manifest.round_number,
            steps_done=0,
            steps_total=manifest.steps,
            loss=None,
            detail=f"fetching layers {_listed(manifest.layer_ids)}",
        )
        data = self._data(ModelId(manifest.model_id))
        guard = self._guard(manifest)
        with self._equipment.layer_cache.holding(), measured_peak() as meter:
            spec = self._spec(ModelId(manifest.model_id))
            self._equipment.layer_cache.fetch_all(slice_blobs(manifest, spec))
            work = materialize(manifest, spec, self._equipment.layer_cache)
            layers = _listed(manifest.trained_layer_ids)
            self._board.update(phase=Phase.TRAINING, detail=f"training layers {layers}")
            surroundings = self._surroundings(manifest, guard, beats)
            trained = self._equipment.trainer.train(work, data, surroundings)
            delta = pack_delta(compute_delta(work.adapters, trained.adapters))
        report = self._training_report(trained, meter, guard)
        put = partial(self._equipment.outbox.put, num_examples=trained.num_examples, report=report)
        self._keep(lambda: put(manifest.id, delta), sum(map(len, delta)), beats)
        drop_checkpoints(self._equipment.config.checkpoints)

    def _keep(self, put: Callable[[], object], size_bytes: int, beats: Heartbeats) -> None:
        """Put a delta into the outbox; on a full disk the cache gives way, or space is waited for.

        Raises:
            WorkInterrupted: A stop was asked for, or nobody waits for the delta any more.
        """
        failures = 0
        while True:
            try:
                put()
            except StorageFullError as error:
                if self._should_stop(beats):
                    raise WorkInterrupted("no space came for the delta") from error
                if self._equipment.layer_cache.give_way(size_bytes + _MANIFEST_BYTES):
                    continue
                failures += 1
                if failures == 1:
                    LOGGER.warning("the finished delta waits for disk space: %s", error)
                    self._board.update(detail="the finished delta waits for disk space")
            else:
                return
            self._equipment.control.stopping.wait(_FOR_SPACE.wait_s(failures, 1.0))

    def _guard(self, manifest: SliceManifest) -> PromiseGuard:
        """Hold this slice to the memory of this machine, as this process has measured it."""
        model_id = ModelId(manifest.model_id)
        cost = self._cost(model_id)
        shape = SliceShape.of(manifest.layers)
        footprint = Footprint(
            self._spec(model_id),
            manifest.adapter,
            manifest.training,
            cost.memory,
            shape,
            self._equipment.trainer.backend,
        )
        caps = self._equipment.config.caps
        return PromiseGuard(footprint, partial(measure_usable_memory, caps, unbacked_bytes()))

    def _usable_memory(self) -> int:
        return measure_usable_memory(self._equipment.config.caps)

    def _surroundings(
        self, manifest: SliceManifest, guard: PromiseGuard, beats: Heartbeats
    ) -> Surroundings:
        config, control = self._equipment.config, self._equipment.control
        free_bytes = usable_disk(config.home, config.caps)
        checkpoint = config.checkpoints / f"{manifest.id}.safetensors"
        drop_checkpoints(config.checkpoints, but=checkpoint)
        return Surroundings(
            on_step=lambda done, total, loss: self._on_step(beats, done, total, loss),
            should_stop=lambda: self._should_stop(beats),
            guard=guard,
            scratch=config.home,
            scratch_bytes=max(0, free_bytes - self._equipment.layer_cache.used_bytes) // 2,
            checkpoint=checkpoint,
            is_to_rest=lambda: control.is_paused or control.is_stopping,
            on_resume=self._on_resume,
        )

    def _on_resume(self, done: int, total: int) -> None:
        self._board.update(detail=f"going on after step {done} of {total}")

    def _on_step(self, beats: Heartbeats, done: int, total: int, loss: float) -> None:
        beats.note(done)
        traffic = self._equipment.transport.traffic
        self._board.update(
            phase=Phase.TRAINING,
            steps_done=done,
            steps_total=total,
            loss=loss,
            bytes_received=traffic.bytes_received,
            bytes_sent=traffic.bytes_sent,
        )

    def _should_stop(self, beats: Heartbeats | None) -> bool:
        control = self._equipment.control
        if control.is_paused:
            phase = self._board.current.phase
            self._board.update(phase=Phase.PAUSED)
            control.wait_while_paused()
            self._board.update(phase=phase)
        return control.is_stopping or (beats is not None and not beats.is_wanted)

    def _training_report(
        self, trained: TrainedSlice, meter: PeakMeter, guard: PromiseGuard
    ) -> TrainingReport:
        traffic = self._equipment.transport.traffic
        before, self._reported = self._reported, traffic
        return TrainingReport(
            steps=trained.steps,
            first_loss=trained.first_loss,
            last_loss=trained.last_loss,
            train_s=trained.train_s,
            peak_memory_bytes=meter.peak_bytes,
            predicted_peak_bytes=guard.promised_bytes,
            residency=trained.plan.residency,
            micro_batch=trained.plan.micro_batch,
            step_downs=tuple(guard.step_downs[:_MOST_TOLD]),
            bytes_received=traffic.bytes_received - before.bytes_received,
            bytes_sent=traffic.bytes_sent - before.bytes_sent,
        )

    def _spec(self, model_id: ModelId) -> ModelSpec:
        if model_id not in self._specs:
            self._specs[model_id] = self._api.model(model_id)
        return self._specs[model_id]

    def _data(self, model_id: ModelId) -> MatchedDataset:
        if model_id not in self._matched:
            spec = self._spec(model_id)
            tokenizer = fetch_tokenizer(spec, self._equipment.layer_cache)
            matched = match_labels(self._equipment.dataset, spec.labels, tokenizer)
            for line in matched.report:
                LOGGER.warning("local data: %s", line)
            self._matched[model_id] = matched
        return self._matched[model_id]

    def _tell(self, what: str, error: Exception) -> None:
        """Log and show a failure; a trace is logged only of what nobody foresaw."""
        is_foreseen = isinstance(error, FedraEdgeError)
        remedy = f" ({error.remedy})" if isinstance(error, FedraEdgeError) and error.remedy else ""
        told = f"{what}: {str(error) or type(error).__name__}{remedy}"
        LOGGER.error("%s", told, exc_info=None if is_foreseen else error)
        self._board.update(phase=Phase.WAITING, detail=told)

    def _report(self, manifest: SliceManifest, error: Exception) -> None:
        try:
            self._api.report_failure(manifest.id, _told_to_server(error))
            drop_checkpoints(self._equipment.config.checkpoints)
        except (ServerRefusedError, ServerUnreachableError, WorkInterrupted) as refusal:
            LOGGER.warning("the failure could not be reported: %s", refusal)

    def _raise_if_fatal(self, model_id: str, error: Exception) -> None:
        """Raise what no later attempt can mend; data that failed is looked at anew first.

        A client that serves any run is not ended by one that its data are not for.
        """
        if isinstance(error, FATAL):
            raise error
        serves_others = self._equipment.config.run is None and (
            isinstance(error, WrongKindError) or bool(self._matched.keys() - {model_id})
        )
        if isinstance(error, DataError):
            was_matched = self._matched.pop(ModelId(model_id), None) is not None
            if serves_others:
                return
            if not was_matched:
                raise error
            self._data(ModelId(model_id))


def _told_to_server(error: Exception) -> str:
    """Say what happened without names of local files or values of local data."""
    if isinstance(error, StorageFullError):
        return "the client's disk or cache quota is full"
    if isinstance(error, SliceError | WorkInterrupted | ServerRefusedError):
        return str(error)
    return f"{type(error).__name__}; the client's own log has the details"


def _listed(layer_ids: Sequence[int]) -> str:
    return ", ".join(str(layer_id) for layer_id in layer_ids)
