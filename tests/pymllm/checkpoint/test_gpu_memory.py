"""Peak device memory of a load."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from pymllm import load_linears, save_linears

pytestmark = pytest.mark.gpu


def _layer_bytes(directory: Path) -> dict[str, int]:
    """Bytes of each layer's tensors in the checkpoint."""
    sizes: dict[str, int] = {}
    with safe_open(directory / "model.safetensors", "pt") as file:
        for name in file.keys():  # noqa: SIM118  not iterable in every release
            tensor = file.get_tensor(name)
            layer = name.rpartition(".")[0]
            sizes[layer] = sizes.get(layer, 0) + tensor.numel() * tensor.element_size()
    return sizes


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("scheme", ["W4A16", "W8A16", "W8A8"])
def test_final_size_plus_one_layer(tmp_path: Path, scheme: str, symmetric: bool) -> None:
    if scheme == "W8A8" and not symmetric:
        pytest.skip("int8 weights with int8 activations are symmetric")
    shapes = {"a": (4096, 4096), "b": (1024, 4096), "c": (14336, 4096), "d": (4096, 4096)}
    layers = {name: torch.randn(shape, dtype=torch.bfloat16) for name, shape in shapes.items()}
    save_linears(layers, tmp_path / "checkpoint", scheme=scheme, symmetric=symmetric)
    sizes = _layer_bytes(tmp_path / "checkpoint")
    load_linears(tmp_path / "checkpoint", device="cuda")  # a first use allocates what stays
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    loaded = load_linears(tmp_path / "checkpoint", device="cuda")
    torch.cuda.synchronize()
    final = torch.cuda.memory_allocated() - before
    peak = torch.cuda.max_memory_allocated() - before
    assert len(loaded) == len(shapes)
    # The kernels' layouts hold what the checkpoint holds, and nothing more.
    assert final <= 1.01 * sum(sizes.values())
    assert peak <= final + max(sizes.values())
