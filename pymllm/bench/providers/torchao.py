"""torchao's int4 weight-only and int8 dynamic layers."""

from __future__ import annotations

import copy
import importlib
from typing import Any

import torch

from pymllm.bench.providers.base import Linear, Provider, missing
from pymllm.bench.roof import W4A16
from pymllm.bench.workload import Workload


class TorchAo(Provider):
    """It quantizes by itself: given our dequantized weight, it finds (nearly) the same codes."""

    name = "torchao"
    about = "torchao quantize_ of the dequantized weight (its own codes), eager"

    def why_absent(self) -> str | None:
        if reason := missing("torchao", "torchao"):
            return reason
        try:
            importlib.import_module("torchao.quantization")
        except Exception as error:  # noqa: BLE001  whatever stops its import is the reason
            return f"import fails: {type(error).__name__}: {error}"
        return None

    def build(self, work: Workload, copies: int) -> list[Linear]:
        ao: Any = importlib.import_module("torchao.quantization")
        layer = torch.nn.Linear(work.k, work.n, False, device="meta", dtype=work.dtype)
        layer.weight = torch.nn.Parameter(work.floating(), requires_grad=False)
        if work.scheme == W4A16:
            config = ao.Int4WeightOnlyConfig(group_size=work.group)
        else:
            config = ao.Int8DynamicActivationInt8WeightConfig()
        # It replaces the weights of the layers inside what it is given.
        model = torch.nn.Sequential(layer)
        ao.quantize_(model, config)
        quantized: Any = model[0]
        return [quantized, *(copy.deepcopy(quantized) for _ in range(copies - 1))]
