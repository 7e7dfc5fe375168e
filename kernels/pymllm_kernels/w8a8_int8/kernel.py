"""The int8 by int8 Triton GEMM.

``y[m, n] = s_m * (s_n * float(acc[m, n] - zero_m * colsum_n)) + bias_n`` with the exact int32 ``acc``;
all of the epilogue is fp32 (the bias joins by one fma) and rounded once to the output's dtype.
"""

from __future__ import annotations

import triton
import triton.language as tl

from pymllm_kernels.common.triton_helpers import grouped_tile


@triton.jit
def _along(values, SWAP_AXES: tl.constexpr):
    """A vector as a column of the tile, or as a row of it."""
    if SWAP_AXES:
        return values[None, :]
    else:
        return values[:, None]


@triton.jit
def w8a8_int8_gemm_kernel(
    x_ptr,  # int8 [M, K]
    weight_ptr,  # int8 [N, K]
    x_scale_ptr,  # fp32, stride_xs = 0: one scale for all rows
    w_scale_ptr,  # fp32, stride_ws = 0: one scale for all columns
    x_zero_ptr,  # int32 or None, strided as x_scale
    column_sum_ptr,  # int32 [N] or None
    bias_ptr,  # [N] or None
    out_ptr,  # [M, N]
    M, N, K,
    stride_xm, stride_wn, stride_om, stride_xs, stride_ws,
    SWAP: tl.constexpr,
    EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    tile_m, tile_n = grouped_tile(
        tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N), GROUP_M
    )
    rm = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    rn = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    rk = tl.arange(0, BLOCK_K)
    mask_m = rm < M
    mask_n = rn < N
    # 64-bit: M * K, M * N and N * K each pass 2**31 for real layers and prompts.
    rm = rm.to(tl.int64)
    rn = rn.to(tl.int64)
    x_tile = x_ptr + rm[:, None] * stride_xm + rk[None, :]
    w_tile = weight_ptr + rn[:, None] * stride_wn + rk[None, :]
    if SWAP:
        acc = tl.zeros((BLOCK_N, BLOCK_M), tl.int32)
    else:
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.int32)
    for k0 in range(0, K, BLOCK_K):
        x_mask = mask_m[:, None]
        w_mask = mask_n[:, None]
        if not EVEN_K:
            x_mask = x_mask & (k0 + rk < K)[None, :]
            w_mask = w_mask & (k0 + rk < K)[None, :]
        x = tl.load(x_tile, mask=x_mask, other=0)
        w = tl.load(w_tile, mask=w_mask, other=0)
        if SWAP:
            acc = tl.dot(w, x.T, acc, out_dtype=tl.int32)
        else:
            acc = tl.dot(x, w.T, acc, out_dtype=tl.int32)
        x_tile += BLOCK_K
        w_tile += BLOCK_K

    s_m = tl.load(x_scale_ptr + rm * stride_xs, mask=mask_m, other=0.0)
    s_n = tl.load(w_scale_ptr + rn * stride_ws, mask=mask_n, other=0.0)
    if x_zero_ptr is not None:
        zero = tl.load(x_zero_ptr + rm * stride_xs, mask=mask_m, other=0)
        column_sum = tl.load(column_sum_ptr + rn, mask=mask_n, other=0)
        acc -= _along(zero, SWAP) * _along(column_sum, not SWAP)
    scaled = _along(s_n, not SWAP) * acc.to(tl.float32)
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + rn, mask=mask_n, other=0.0).to(tl.float32)
        y = tl.fma(_along(s_m, SWAP) + tl.zeros_like(scaled), scaled,
                   _along(bias, not SWAP) + tl.zeros_like(scaled))  # fmt: skip
    else:
        y = _along(s_m, SWAP) * scaled
    out = out_ptr + _along(rm, SWAP) * stride_om + _along(rn, not SWAP)
    mask = _along(mask_m, SWAP) & _along(mask_n, not SWAP)
    tl.store(out, y.to(out_ptr.dtype.element_ty), mask=mask)
