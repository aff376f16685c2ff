"""Training on a GPU gives what training on the CPU gives; needs a GPU."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from fedra_edge.training.torch_trainer import TorchTrainer
from fedra_server.modelbook.stored_dtypes import WeightsDtype
from tests.support.surroundings import room_for
from tests.support.tiny_vit import TinyVit, noise_data

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has no CUDA GPU"),
]


@pytest.mark.parametrize("residency", ["resident", "streamed"])
@pytest.mark.parametrize("depth", ["full", "reduced"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_gpu_trains_to_the_same_adapters(
    tmp_path: Path, residency: str, depth: str, dtype: WeightsDtype
) -> None:
    tiny = TinyVit.register(tmp_path, weights_dtype=dtype)
    work = tiny.work([1, 3], residency=residency, depth=depth, micro_batch=2, steps=3)
    on_gpu, on_cpu = (
        TorchTrainer(torch.device(name)).train(work, noise_data(), room_for(work))
        for name in ("cuda", "cpu")
    )
    for name, value in on_cpu.adapters.items():
        np.testing.assert_allclose(on_gpu.adapters[name], value, rtol=1e-2, atol=1e-3)
