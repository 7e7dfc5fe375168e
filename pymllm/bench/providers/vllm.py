"""vLLM's kernels through its operators: Marlin, Machete, CUTLASS int8, Triton int8."""

from __future__ import annotations

import importlib
from functools import partial
from typing import Any

import torch

from pymllm.bench.providers.base import Description, Linear, Provider, clones, missing
from pymllm.bench.roof import W4A16, W8A8
from pymllm.bench.workload import Workload

PACKAGE = "vllm"
_TRITON = "vllm.model_executor.layers.quantization.compressed_tensors.triton_scaled_mm"
_MARLIN = "vllm.model_executor.layers.quantization.utils.marlin_utils"


class _Vllm(Provider):
    capability = (7, 5)

    def why_absent(self) -> str | None:
        if reason := missing("vllm", PACKAGE):
            return reason
        if torch.cuda.get_device_capability() < self.capability:
            return "needs capability {}.{}".format(*self.capability)
        try:
            importlib.import_module("vllm._custom_ops")
        except Exception as error:  # noqa: BLE001  whatever stops its import is the reason
            return f"import fails: {type(error).__name__}: {error}"
        return None


def _ops() -> Any:
    return importlib.import_module("vllm._custom_ops")


def _uint4b8() -> Any:
    return importlib.import_module("vllm.scalar_type").scalar_types.uint4b8


class Marlin(_Vllm):
    """Marlin."""

    name = "marlin"
    about = "vLLM's Marlin"
    schemes = (W4A16,)
    capability = (8, 0)

    def build(self, work: Workload, copies: int) -> list[Linear]:
        utils: Any = importlib.import_module(_MARLIN)
        empty = torch.empty(0, dtype=torch.int32, device=work.device)
        weight = _ops().gptq_marlin_repack(work.words.T.contiguous(), empty, work.k, work.n, 4)
        scale = utils.marlin_permute_scales(work.scale.T.contiguous(), work.k, work.n, work.group)
        fixed = {
            "weight_zp": empty,
            "g_idx": empty,
            "g_idx_sort_indices": empty,
            "workspace": utils.marlin_make_workspace_new(work.device),
            "wtype": _uint4b8(),
            "output_size_per_partition": work.n,
            "input_size_per_partition": work.k,
            "is_k_full": True,
        }
        return [
            partial(utils.apply_gptq_marlin_linear, weight=w, weight_scale=s, **fixed)
            for w, s in zip(clones(weight, copies), clones(scale, copies), strict=True)
        ]


class Machete(_Vllm):
    """Machete."""

    name = "machete"
    about = "vLLM's Machete"
    schemes = (W4A16,)

    def why_absent(self) -> str | None:
        if reason := super().why_absent():
            return reason
        found = torch.cuda.get_device_capability()
        return None if found == (9, 0) else "needs capability 9.0, found {}.{}".format(*found)

    def build(self, work: Workload, copies: int) -> list[Linear]:
        # Packed along K and column-major [K / 8, N]: the transposed view of our words.
        weight = _ops().machete_prepack_B(
            work.words.T, a_type=work.dtype, b_type=_uint4b8(), group_scales_type=work.dtype
        )
        scale = work.scale.T.contiguous()
        return [
            partial(_machete, weight=w, scale=s, group=work.group)
            for w, s in zip(clones(weight, copies), clones(scale, copies), strict=True)
        ]


def _machete(x: torch.Tensor, weight: Any, scale: torch.Tensor, group: int) -> Any:
    return _ops().machete_mm(
        a=x, b_q=weight, b_type=_uint4b8(), b_group_zeros=None, b_group_scales=scale,
        b_group_size=group,
    )  # fmt: skip


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

    def function(self) -> Any:
        return _ops().cutlass_scaled_mm

    def describe(self, work: Workload, m: int) -> Description:
        return Description(None, "heuristic")


class VllmTriton(_ScaledMm):
    """Triton int8."""

    name = "vllm_triton"
    about = "vLLM's Triton int8 GEMM after its quantization kernel"
    capability = (8, 0)

    def function(self) -> Any:
        return importlib.import_module(_TRITON).triton_scaled_mm


def _scaled_mm(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, function: Any) -> Any:
    codes, x_scale, _ = _ops().scaled_int8_quant(x, scale=None, azp=None, symmetric=True)
    return function(codes, weight.T, x_scale, scale, x.dtype)
