"""Our optimizers take the steps of torch.optim, parameter for parameter."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fedra_edge.protocol.slices import TrainingSpec
from fedra_edge.training.torch_optimizers import build_optimizer

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
def test_twenty_steps_end_where_torch_optim_ends(training: TrainingSpec) -> None:
    generator = torch.Generator().manual_seed(0)
    start = [torch.randn(3, 4, generator=generator), torch.randn(5, generator=generator)]
    ours = [nn.Parameter(value.clone()) for value in start]
    theirs = [nn.Parameter(value.clone()) for value in start]
    optimizer, expected = build_optimizer(training, ours), reference(training, theirs)
    for _ in range(20):
        for mine, other in zip(ours, theirs, strict=True):
            gradient = torch.randn(mine.shape, generator=generator)
            mine.grad, other.grad = gradient.clone(), gradient.clone()
        optimizer.step()
        expected.step()
        assert all(parameter.grad is None for parameter in ours)
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("training", SPECS[1:], ids=["sgd", "adamw"])
def test_a_parameter_without_a_gradient_stays_where_it_is(training: TrainingSpec) -> None:
    moved, still = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    moved.grad = torch.ones(2)
    build_optimizer(training, [moved, still]).step()
    assert torch.equal(still, torch.ones(2))
    assert not torch.equal(moved, torch.ones(2))
