"""vLLM's kernels through its operators: Marlin, Machete, CUTLASS int8, Triton int8.

The operators are called as vLLM 0.26's layers call them, straight from its library: importing
``vllm`` itself would need all that serving needs.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from pymllm.bench.providers.base import Description, Linear, Provider, clones, missing
from pymllm.bench.roof import W4A16, W8A8
from pymllm.bench.workload import Workload

PACKAGE = "vllm"
WRITTEN_FOR = "0.26"
_LIBRARIES = "_C*.so"
_TRITON = "vllm.model_executor.layers.quantization.compressed_tensors.triton_scaled_mm"
_QUANTIZE = "dynamic_scaled_int8_quant"
# How its operators name a type: bits of the mantissa from bit 8, the bias from bit 17, IEEE from bit 50 on.
UINT4B8 = 4 << 8 | 8 << 17 | 1 << 50
MARLIN_GROUPS = (32, 64, 128)


class _Vllm(Provider):
    capability = (7, 5)
    operators: tuple[str, ...] = ()

    def why_absent(self) -> str | None:
        if reason := missing("vllm", PACKAGE):
            return reason
        if torch.cuda.get_device_capability() < self.capability:
            return "needs capability {}.{}".format(*self.capability)
        try:
            ops = _ops()
        except Exception as error:  # noqa: BLE001  whatever stops its loading is the reason
            return f"its library does not load: {type(error).__name__}: {error}"
        return absent_operator(ops, self.operators)


@functools.cache
def _ops() -> Any:
    """The operators of the installed vLLM.

    Raises:
        OSError: its library is not there, or not for this torch.
    """
    spec = importlib.util.find_spec("vllm")
    places = list(spec.submodule_search_locations or ()) if spec else []
    found = [path for place in places for path in sorted(Path(place).glob(_LIBRARIES))]
    if not found:
        raise OSError(f"no {_LIBRARIES} in {places}")
    operators: Any = torch.ops
    for path in found:
        operators.load_library(path)
    return operators._C


def absent_operator(ops: Any, names: Sequence[str]) -> str | None:
    """``None`` if all these operators are there, else which is not."""
    for name in names:
        if not hasattr(ops, name):
            return f"this vLLM has no operator {name}; written for {WRITTEN_FOR}"
    return None


class Marlin(_Vllm):
    """Marlin."""

    name = "marlin"
    about = "vLLM's Marlin, parts summed in fp32 as its layers do"
    schemes = (W4A16,)
    capability = (8, 0)
    operators = ("gptq_marlin_repack", "marlin_gemm")

    def why_not(self, work: Workload) -> str | None:
        if work.group not in MARLIN_GROUPS or work.group >= work.k:
            return f"takes groups of {MARLIN_GROUPS} under K, found {work.group}"
        if work.n % 64 or work.k % 128:
            return "takes N a multiple of 64, K of 128"
        return None

    def build(self, work: Workload, copies: int) -> list[Linear]:
        empty = torch.empty(0, dtype=torch.int32, device=work.device)
        packed = work.words.T.contiguous()
        weight = _ops().gptq_marlin_repack(packed, empty, work.k, work.n, 4, False)
        properties: Any = torch.cuda.get_device_properties(work.device)
        count = properties.multi_processor_count
        workspace = torch.zeros(count, dtype=torch.int32, device=work.device)
        pairs = zip(clones(weight, copies), clones(marlin_scale(work.scale), copies), strict=True)
        return [partial(_marlin, pair=p, empty=empty, workspace=workspace) for p in pairs]

    def describe(self, work: Workload, m: int) -> Description:
        return Description(None, "heuristic")


def marlin_scale(scale: torch.Tensor) -> torch.Tensor:
    """Scales ``[N, G]`` as Marlin reads them, ``[G, N]``: of 64 outputs every eighth together."""
    n, groups = scale.shape
    return scale.T.reshape(groups, n // 64, 8, 8).transpose(2, 3).reshape(groups, n).contiguous()


def _marlin(
    x: torch.Tensor,
    pair: tuple[torch.Tensor, torch.Tensor],
    empty: torch.Tensor,
    workspace: torch.Tensor,
) -> Any:
    weight, scale = pair
    (m, k), n = x.shape, scale.shape[1]
    # Neither zero points nor act-order; all of K; no atomics, sums in fp32; integer zero points.
    return _ops().marlin_gemm(
        x, None, weight, None, scale, None, None, empty, empty, empty, workspace,
        UINT4B8, m, n, k, True, False, True, False,
    )  # fmt: skip


class Machete(_Vllm):
    """Machete."""

    name = "machete"
    about = "vLLM's Machete, schedule by its heuristic"
    schemes = (W4A16,)
    operators = ("machete_prepack_B", "machete_mm")

    def why_absent(self) -> str | None:
        if reason := super().why_absent():
            return reason
        found = torch.cuda.get_device_capability()
        return None if found == (9, 0) else "needs capability 9.0, found {}.{}".format(*found)

    def why_not(self, work: Workload) -> str | None:
        if work.n % 128 or work.k % 64:
            return "takes N a multiple of 128, K of 64"
        return None

    def build(self, work: Workload, copies: int) -> list[Linear]:
        # Packed along K and column-major [K / 8, N]: the transposed view of our words.
        weight = _ops().machete_prepack_B(work.words.T, work.dtype, UINT4B8, work.dtype)
        scale = work.scale.T.contiguous()
        return [
            partial(_machete, weight=w, scale=s, group=work.group)
            for w, s in zip(clones(weight, copies), clones(scale, copies), strict=True)
        ]

    def describe(self, work: Workload, m: int) -> Description:
        return Description(None, "heuristic")


def _machete(x: torch.Tensor, weight: Any, scale: torch.Tensor, group: int) -> Any:
    return _ops().machete_mm(x, weight, UINT4B8, None, scale, None, group, None, None, None)


class _ScaledMm(_Vllm):
    schemes = (W8A8,)

    def build(self, work: Workload, copies: int) -> list[Linear]:
        scale = work.scale.to(torch.float32)
        return [
            partial(_scaled_mm, weight=w, scale=scale, function=self.function())
            for w in clones(work.words, copies)
        ]

    def function(self) -> Any:
        """``(codes, weight [K, N], x scale, w scale, dtype)`` to the result."""
        raise NotImplementedError


class Cutlass(_ScaledMm):
    """CUTLASS int8."""

    name = "cutlass"
    about = "vLLM's CUTLASS int8 GEMM after its quantization kernel"
    operators = (_QUANTIZE, "cutlass_scaled_mm")

    def why_not(self, work: Workload) -> str | None:
        return "takes N and K multiples of 16" if work.n % 16 or work.k % 16 else None

    def function(self) -> Any:
        return _cutlass

    def describe(self, work: Workload, m: int) -> Description:
        return Description(None, "heuristic")


def _cutlass(
    codes: torch.Tensor,
    weight: torch.Tensor,
    x_scale: torch.Tensor,
    scale: torch.Tensor,
    dtype: torch.dtype,
) -> torch.Tensor:
    out = codes.new_empty(codes.shape[0], weight.shape[1], dtype=dtype)
    _ops().cutlass_scaled_mm(out, codes, weight, x_scale, scale, None)
    return out


class VllmTriton(_ScaledMm):
    """Triton int8."""

    name = "vllm_triton"
    about = "vLLM's Triton int8 GEMM after its quantization kernel"
    capability = (8, 0)
    operators = (_QUANTIZE,)

    def why_absent(self) -> str | None:
        if reason := super().why_absent():
            return reason
        try:
            self.function()
        except Exception as error:  # noqa: BLE001  whatever stops its import is the reason
            return f"import fails: {type(error).__name__}: {error}"
        return None

    def function(self) -> Any:
        return importlib.import_module(_TRITON).triton_scaled_mm

    def describe(self, work: Workload, m: int) -> Description:
        return Description(None, "heuristic")


def _scaled_mm(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, function: Any) -> Any:
    codes = torch.empty_like(x, dtype=torch.int8)
    x_scale = x.new_empty(x.shape[0], 1, dtype=torch.float32)
    _ops().dynamic_scaled_int8_quant(codes, x, x_scale, None)
    return function(codes, weight.T, x_scale, scale, x.dtype)
