"""Optimizers, clipping and losses in numpy are those of PyTorch."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fedra_edge.protocol.slices import TrainingSpec
from fedra_edge.training.cross_entropy import (
    cross_entropy_pull,
    cross_entropy_sum,
    log_softmax,
)
from fedra_edge.training.numpy_optimizers import build_optimizer, clip_gradients

SPECS = [
    TrainingSpec(),
    TrainingSpec(momentum=0.0, weight_decay=0.0),
    TrainingSpec(optimizer="adamw", learning_rate=1e-3, weight_decay=0.01),
]


def reference(training: TrainingSpec, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    if training.optimizer == "adamw":
        return torch.optim.AdamW(
            parameters, lr=training.learning_rate, weight_decay=training.weight_decay
        )
    return torch.optim.SGD(
        parameters,
        lr=training.learning_rate,
        momentum=training.momentum,
        weight_decay=training.weight_decay,
    )


@pytest.mark.parametrize("training", SPECS, ids=lambda spec: f"{spec.optimizer}-{spec.momentum}")
def test_twenty_clipped_steps_end_where_torch_ends(training: TrainingSpec) -> None:
    generator = np.random.default_rng(0)
    start = {"a": (3, 4), "b": (5,)}
    values = {name: generator.standard_normal(of, dtype=np.float32) for name, of in start.items()}
    theirs = {name: nn.Parameter(torch.tensor(value)) for name, value in values.items()}
    optimizer, expected = build_optimizer(training), reference(training, list(theirs.values()))
    for step in range(20):
        size = np.float32(10.0 if step % 2 else 0.1)
        gradients = {
            name: size * generator.standard_normal(value.shape, dtype=np.float32)
            for name, value in values.items()
        }
        for name, parameter in theirs.items():
            parameter.grad = torch.tensor(gradients[name])
        clip_gradients(gradients, 1.5)
        nn.utils.clip_grad_norm_(theirs.values(), 1.5)
        optimizer.step(values, gradients)
        expected.step()
    for name, parameter in theirs.items():
        np.testing.assert_allclose(values[name], parameter.detach(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("training", SPECS[1:], ids=["sgd", "adamw"])
def test_a_value_without_a_gradient_stays_where_it_is(training: TrainingSpec) -> None:
    values = {name: np.ones(2, dtype=np.float32) for name in ("moved", "still")}
    build_optimizer(training).step(values, {"moved": np.ones(2, dtype=np.float32)})
    assert (values["still"] == 1).all()
    assert (values["moved"] != 1).all()


@pytest.mark.parametrize("size", [1.0, 1e4])
def test_cross_entropy_and_its_gradient_are_those_of_torch(size: float) -> None:
    generator = np.random.default_rng(1)
    logits = (size * generator.standard_normal((6, 5))).astype(np.float32)
    label_ids = generator.integers(0, 5, 6)
    theirs = torch.tensor(logits, requires_grad=True)
    expected = F.cross_entropy(theirs, torch.tensor(label_ids), reduction="sum") / 9
    expected.backward()  # type: ignore[no-untyped-call]  # torch leaves it unannotated
    loss, gradient = cross_entropy_pull(logits, label_ids, 9)
    assert loss == pytest.approx(expected.item(), rel=1e-6)
    assert theirs.grad is not None
    np.testing.assert_allclose(gradient, theirs.grad, atol=1e-7)
    assert gradient.dtype == np.float32
    assert cross_entropy_sum(logits, label_ids) == pytest.approx(9 * loss)
    np.testing.assert_allclose(np.exp(log_softmax(logits)).sum(axis=1), 1, rtol=1e-5)
