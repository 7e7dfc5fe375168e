"""Our layers through their public path, from tensors in checkpoint form."""

from __future__ import annotations

import copy
from typing import Any

import torch

from pymllm.bench.providers.base import Description, Linear, Provider
from pymllm.bench.roof import W4A16
from pymllm.bench.workload import CHANNEL, Workload
from pymllm_kernels.common.launch import in_short


class Ours(Provider):
    """``pymllm.layers.Linear`` as a checkpoint load leaves it."""

    name = "ours"
    about = "pymllm: Linear layer, kernel and configuration as selected by default"
    devices = ("cuda", "cpu")

    def __init__(self) -> None:
        self._layer: Any = None

    def build(self, work: Workload, copies: int) -> list[Linear]:
        layer = self._layer = make_layer(work)
        return [layer, *(copy.deepcopy(layer) for _ in range(copies - 1))]

    def describe(self, work: Workload, m: int) -> Description:
        kernel = self._layer.kernel_choice.kernel
        found = kernel.resolved(self._layer.problem, m)
        if found is None:
            return Description(kernel.name, "rule")
        return Description(f"{kernel.name} {in_short(found.config)}", found.origin)


def make_layer(work: Workload) -> Any:
    """A processed :class:`pymllm.layers.Linear` that holds the workload's weight."""
    from pymllm.layers import Linear as LinearLayer
    from pymllm.quantization.methods import CompressedTensorsConfig

    int4 = work.scheme == W4A16
    group = None if work.group == CHANNEL else work.group
    config = CompressedTensorsConfig(
        quant_format="pack-quantized" if int4 else "int-quantized",
        ignore=[],
        weight_bits=4 if int4 else 8,
        group_size=group,
        weight_strategy="channel" if group is None else "group",
        weight_type="int",
        weight_dynamic=False,
        symmetric=True,
        actorder=None,
        input_bits=None if int4 else 8,
        input_strategy=None if int4 else "token",
        input_type=None if int4 else "int",
        input_dynamic=not int4,
        input_symmetric=True,
    )
    layer = LinearLayer(
        work.k, work.n, bias=False, params_dtype=work.dtype, device=work.device,
        quant_config=config, prefix="bench.linear",
    )  # fmt: skip
    layer.load_tensor("weight_packed" if int4 else "weight", work.words)
    layer.load_tensor("weight_scale", work.scale)
    if int4:
        layer.load_tensor("weight_shape", torch.tensor([work.n, work.k]))
    layer.quant_method.process_weights_after_loading(layer)
    return layer
