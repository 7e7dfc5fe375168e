"""GemLite through its public functions, autotuned."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from pymllm.bench.providers.base import Description, Linear, Provider, clones, missing
from pymllm.bench.roof import W4A16
from pymllm.bench.workload import Workload

PACKAGE = "gemlite"


class GemLite(Provider):
    """Pure Triton, tuned for every class of M on first use: minutes a shape."""

    name = "gemlite"
    about = "GemLite (Triton), autotuned"
    only_tuned_shapes = True
    limit_s = 150.0

    def why_absent(self) -> str | None:
        return missing("gemlite", PACKAGE)

    def why_not(self, work: Workload) -> str | None:
        return None if work.k % 32 == 0 else f"takes K a multiple of 32, found {work.k}"

    def build(self, work: Workload, copies: int) -> list[Linear]:
        gemlite: Any = __import__("gemlite")
        layer = _int4(gemlite, work) if work.scheme == W4A16 else _int8(gemlite, work)
        meta = layer.get_meta_args()
        weight, scale, *rest = [tensor.detach() for tensor in layer.get_tensor_args()]
        pairs = zip(clones(weight, copies), clones(scale, copies), strict=True)
        return [
            partial(
                _forward, function=gemlite.forward_functional, tensors=[*pair, *rest], meta=meta
            )
            for pair in pairs
        ]

    def describe(self, work: Workload, m: int) -> Description:
        return Description(None, "tuned")


def _forward(x: torch.Tensor, function: Any, tensors: list[torch.Tensor], meta: Any) -> Any:
    return function(x, None, tensors, meta)


def _int4(gemlite: Any, work: Workload) -> Any:
    kind = _dtype(gemlite, work)
    layer = gemlite.GemLiteLinear(
        4, group_size=work.group, in_features=work.k, out_features=work.n,
        input_dtype=kind, output_dtype=kind,
    )  # fmt: skip
    # An integer zero point: (code - 8) * scale without a tensor of zero points to read.
    layer.pack(work.codes().contiguous(), work.scale, 8, None)
    return layer


def _int8(gemlite: Any, work: Workload) -> Any:
    maker = gemlite.helper.A8W8_int8_dynamic(device=str(work.device), dtype=work.dtype)
    return maker.from_weights(work.words, scales=work.scale)


def _dtype(gemlite: Any, work: Workload) -> Any:
    return gemlite.DType.BF16 if work.dtype == torch.bfloat16 else gemlite.DType.FP16
