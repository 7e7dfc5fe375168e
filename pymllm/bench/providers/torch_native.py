"""What torch offers by itself: unquantized, dequantize-and-multiply, tinygemm, ``_int_mm``."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F

from pymllm.bench.providers.base import Description, Linear, Provider, clones
from pymllm.bench.roof import W4A16, W8A8
from pymllm.bench.workload import Workload
from pymllm_kernels import per_token_quant_int8
from pymllm_kernels.w4a16 import reference
from pymllm_kernels.w8a8_int8 import reference as int8_reference

# cuBLAS refuses fewer rows.
INT_MM_ROWS = 32
INNER_K_TILES = 8


class _Unquantized(Provider):
    def bytes_a_copy(self, work: Workload) -> int:
        return work.n * work.k * work.dtype.itemsize

    def build(self, work: Workload, copies: int) -> list[Linear]:
        return [partial(_linear, weight=weight) for weight in clones(work.floating(), copies)]


class CublasBf16(_Unquantized):
    """The layer without quantization."""

    name = "cublas_bf16"
    about = "F.linear on the dequantized 16-bit weight: what one has without quantization"


class TorchBf16(_Unquantized):
    """The layer without quantization, on a CPU."""

    name = "torch_bf16"
    about = "F.linear on the dequantized 16-bit weight: what one has without quantization"
    devices = ("cpu",)


def _linear(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return F.linear(x, weight)


class DequantMatmul(Provider):
    """Plain torch: unpack, scale, multiply."""

    name = "dequant_matmul"
    about = "dequantizes the whole weight in plain torch at every call, then F.linear"
    schemes = (W4A16,)
    devices = ("cuda", "cpu")

    def build(self, work: Workload, copies: int) -> list[Linear]:
        pairs = zip(clones(work.words, copies), clones(work.scale, copies), strict=True)
        return [partial(_dequant_matmul, words=words, scale=scale) for words, scale in pairs]


def _dequant_matmul(x: torch.Tensor, words: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return reference.linear(x, words, scale, None, None, None, 4)


class TinyGemm(Provider):
    """``torch._weight_int4pack_mm``."""

    name = "tinygemm"
    about = "torch._weight_int4pack_mm"
    schemes = (W4A16,)

    def why_absent(self) -> str | None:
        if torch.version.hip is not None:
            return "written for NVIDIA GPUs"
        if torch.cuda.get_device_capability() < (8, 0):
            return "needs capability 8.0"
        return None

    def why_not(self, work: Workload) -> str | None:
        if work.dtype != torch.bfloat16:
            return f"takes bf16 activations, found {work.dtype}"
        if work.group not in (32, 64, 128, 256):
            return f"takes groups of 32 to 256, found {work.group}"
        if work.n % 8 or work.k % (16 * INNER_K_TILES):
            return f"takes N a multiple of 8, K of {16 * INNER_K_TILES}"
        return None

    def build(self, work: Workload, copies: int) -> list[Linear]:
        codes = work.codes()
        # Two codes a byte, the first of a pair in the high half.
        octets = (codes[:, ::2] << 4) | codes[:, 1::2]
        packed = torch.ops.aten._convert_weight_to_int4pack(octets.contiguous(), INNER_K_TILES)
        # (code - 8) * scale + zero, and zero is 0 for symmetric weights.
        scale = work.scale.T
        pair = torch.stack((scale, torch.zeros_like(scale)), dim=-1).contiguous()
        both = zip(clones(packed, copies), clones(pair, copies), strict=True)
        return [partial(_tinygemm, weight=w, group=work.group, pair=p) for w, p in both]

    def describe(self, work: Workload, m: int) -> Description:
        return Description(f"inner_k_tiles={INNER_K_TILES}", "library")


def _tinygemm(
    x: torch.Tensor, weight: torch.Tensor, group: int, pair: torch.Tensor
) -> torch.Tensor:
    out: torch.Tensor = torch.ops.aten._weight_int4pack_mm(x, weight, group, pair)
    return out


class IntMm(Provider):
    """Quantization, ``torch._int_mm``, scales."""

    name = "int_mm"
    about = "our per-token quantization, torch._int_mm, then the scales in plain torch"
    schemes = (W8A8,)
    devices = ("cuda", "cpu")

    def why_not(self, work: Workload) -> str | None:
        if work.device.type == "cuda" and (work.n % 8 or work.k % 8):
            return "takes N and K multiples of 8"
        return None

    def build(self, work: Workload, copies: int) -> list[Linear]:
        scale = work.scale.reshape(-1).to(torch.float32)
        pairs = zip(clones(work.words, copies), clones(scale, copies), strict=True)
        return [partial(_int_mm, weight=weight, scale=scale) for weight, scale in pairs]


def _int_mm(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    codes, x_scale = per_token_quant_int8(x)
    m = codes.shape[0]
    if codes.is_cuda and m < INT_MM_ROWS:
        codes = F.pad(codes, (0, 0, 0, INT_MM_ROWS - m))
    acc = torch._int_mm(codes, weight.T)[:m]
    return int8_reference.epilogue(acc, x_scale, scale, None, None, None, x.dtype)
