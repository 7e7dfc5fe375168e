"""Triton kernels of the activation quantization: one program a row. Formulas: see ``reference``."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from pymllm_kernels.per_token_quant_int8.reference import TINY, TINY_FACTOR

# Adding and subtracting 1.5 * 2**23 rounds an fp32 value below 2**22 to the nearest integer, ties to
# even; the interpreter has no rint.
_ROUND = tl.constexpr(12582912.0)
_TINY = tl.constexpr(TINY)
_TINY_FACTOR = tl.constexpr(TINY_FACTOR)
# A row of up to this many values is held in registers and read once.
_MAX_BLOCK = 8192


@triton.jit
def _is_nan(v):
    return v != v  # noqa: PLR0124


@triton.jit
def _round_to_int8_range(v):
    """``clamp(rint(v), -256, 255)`` as fp32, NaN to 0: room for a zero point to be added."""
    v = tl.where(_is_nan(v), 0.0, v)
    v = tl.minimum(tl.maximum(v, -256.0), 255.0)
    return (v + _ROUND) - _ROUND


@triton.jit
def _load_row(row_ptr, k, K, stride_xk):
    return tl.load(row_ptr + k.to(tl.int64) * stride_xk, mask=k < K, other=0.0).to(tl.float32)


@triton.jit
def _add_zero(code, zero):
    return tl.minimum(tl.maximum(code + zero, -128.0), 127.0).to(tl.int8)


@triton.jit
def _extremes(v, zero_ptr):
    """Largest and smallest value so far and 0, a lane at a time, and whether a lane saw NaN.

    max and min drop NaN, hence the third.
    """
    nan = _is_nan(v).to(tl.int32)
    if zero_ptr is None:
        return tl.abs(v), tl.zeros_like(v), nan
    else:
        return tl.maximum(v, 0.0), tl.minimum(v, 0.0), nan


@triton.jit
def _per_token_quant_kernel(
    x_ptr,  # [M, K], any strides
    codes_ptr,  # int8 [M, K]
    scale_ptr,  # fp32 [M]
    zero_ptr,  # int32 [M] or None: symmetric
    K, stride_xm, stride_xk, stride_cm,
    BLOCK_K: tl.constexpr,
    ONE_BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    row_ptr = x_ptr + row * stride_xm
    lanes = tl.arange(0, BLOCK_K)
    v = _load_row(row_ptr, lanes, K, stride_xk)
    high, low, nan = _extremes(v, zero_ptr)
    if not ONE_BLOCK:
        for k0 in range(BLOCK_K, K, BLOCK_K):
            v = _load_row(row_ptr, k0 + lanes, K, stride_xk)
            high_k, low_k, nan_k = _extremes(v, zero_ptr)
            high = tl.maximum(high, high_k)
            low = tl.minimum(low, low_k)
            nan |= nan_k
    size = tl.max(high, 0) - tl.min(low, 0)
    size = tl.where(tl.max(nan, 0) > 0, float("nan"), size)
    STEPS: tl.constexpr = 127.0 if zero_ptr is None else 255.0
    factor = tl.where(size < _TINY, _TINY_FACTOR, 1.0)
    inverse = tl.where(
        size == 0.0, 0.0, tl.div_rn(STEPS, tl.where(size == 0.0, 1.0, size * factor))
    )
    tl.store(scale_ptr + row, tl.div_rn(size, STEPS))
    shift = 0.0
    if zero_ptr is not None:
        shift = _round_to_int8_range(-128.0 - (tl.min(low, 0) * factor) * inverse)
        shift = tl.where(size == 0.0, 0.0, tl.minimum(tl.maximum(shift, -128.0), 127.0))
        tl.store(zero_ptr + row, shift.to(tl.int32))
    out_ptr = codes_ptr + row * stride_cm
    if ONE_BLOCK:
        code = _add_zero(_round_to_int8_range((v * factor) * inverse), shift)
        tl.store(out_ptr + lanes, code, mask=lanes < K)
    else:
        for k0 in range(0, K, BLOCK_K):
            k = k0 + lanes
            v = _load_row(row_ptr, k, K, stride_xk)
            code = _add_zero(_round_to_int8_range((v * factor) * inverse), shift)
            tl.store(out_ptr + k, code, mask=k < K)


@triton.jit
def _static_quant_kernel(
    x_ptr,  # [M, K], any strides
    codes_ptr,  # int8 [M, K]
    scale_ptr,  # fp32 [1]
    zero_ptr,  # int32 [1] or None
    K, stride_xm, stride_xk, stride_cm,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    scale = tl.load(scale_ptr)
    shift = 0.0
    if zero_ptr is not None:
        shift = tl.load(zero_ptr).to(tl.float32)
    for k0 in range(0, K, BLOCK_K):
        k = k0 + tl.arange(0, BLOCK_K)
        v = _load_row(x_ptr + row * stride_xm, k, K, stride_xk)
        code = _add_zero(_round_to_int8_range(tl.div_rn(v, scale)), shift)
        tl.store(codes_ptr + row * stride_cm + k, code, mask=k < K)


def launch_dynamic(
    x: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None
) -> None:
    """Fills ``codes [M, K]``, ``scale [M]`` and, if asymmetric, ``zero [M]`` from ``x [M, K]``."""
    m, k = x.shape
    if m == 0:
        return
    block, warps = launch_parameters(k)
    _per_token_quant_kernel[(m,)](
        x, codes, scale, zero, k, x.stride(0), x.stride(1), codes.stride(0),
        BLOCK_K=block, ONE_BLOCK=k <= block, num_warps=warps,
        # A fused multiply-add would skip the rounding of the product before rint.
        enable_fp_fusion=False,
    )  # fmt: skip


def launch_static(
    x: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None
) -> None:
    """Fills ``codes [M, K]`` from ``x [M, K]`` with one scale and zero point for the tensor."""
    m, k = x.shape
    if m == 0:
        return
    block, warps = launch_parameters(k)
    _static_quant_kernel[(m,)](
        x, codes, scale, zero, k, x.stride(0), x.stride(1), codes.stride(0),
        BLOCK_K=block, num_warps=warps, enable_fp_fusion=False,
    )  # fmt: skip


def launch_parameters(k: int) -> tuple[int, int]:
    """(BLOCK_K, num_warps) of a row of ``k`` values: 16 values a thread where the row allows it."""
    block = min(max(triton.next_power_of_2(k), 256), _MAX_BLOCK)
    return block, min(max(block // 512, 1), 16)
