"""The W4A16 Triton kernel and its launcher.

``y[M, N] = x[M, K] @ W[N, K].T + bias``. The weight tile is the first operand of the dot product and
the accumulator is transposed, ``[BLOCK_N, BLOCK_M]``: on Hopper the unpacked weights then feed wgmma
from registers, and a small M fills the narrow side of the instruction.

Weights enter the product as exact integers ``code - zero`` and the scale multiplies the fp32 partial
sum of its group. That is more accurate than rounding each scaled weight to 16 bits, and since every
step adds a finished partial sum to the accumulator, no wgmma is still reading weight registers when
the next step overwrites them (Triton up to 3.8 does not wait there by itself; triton#9433).
Groups that a slice of the layout does not fit into take the scale on the weight instead.
"""

from __future__ import annotations

import triton
import triton.language as tl

from pymllm_kernels.common.triton_helpers import grouped_tile
from pymllm_kernels.w4a16.unpack_int4 import or_magic_int4
from pymllm_kernels.w4a16.unpack_int8 import magic_int8


@triton.jit
def _load_codes(
    tile_ptr, mask, SLICE_K: tl.constexpr, BITS: tl.constexpr, COMPUTE: tl.constexpr,
    MAGIC: tl.constexpr,
):  # fmt: skip
    """The 4 slices of a weight tile as numbers, each too large by the kernel's OFFSET."""
    words = tl.load(tile_ptr, mask=mask, other=0)
    if BITS == 4:
        if MAGIC:
            return or_magic_int4(words, COMPUTE)
        else:
            return (
                (words & 15).to(COMPUTE),
                ((words >> 4) & 15).to(COMPUTE),
                ((words >> 8) & 15).to(COMPUTE),
                ((words >> 12) & 15).to(COMPUTE),
            )
    else:
        more = tl.load(tile_ptr + SLICE_K, mask=mask, other=0)
        if MAGIC:
            a, b = magic_int8(words, COMPUTE)
            c, d = magic_int8(more, COMPUTE)
            return a, b, c, d
        else:
            return (
                (words & 255).to(COMPUTE),
                ((words >> 8) & 255).to(COMPUTE),
                (more & 255).to(COMPUTE),
                ((more >> 8) & 255).to(COMPUTE),
            )


@triton.jit
def _load_activations(
    x_ptr, perm_ptr, rows, row_mask, k_start, K, stride_xm, stride_xk,
    SLICE_K: tl.constexpr, EVEN_K: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """``x[rows, k_start : k_start + SLICE_K]`` as ``[SLICE_K, BLOCK_M]``, zero outside of x."""
    k = k_start + tl.arange(0, SLICE_K)
    mask = row_mask[None, :]
    if not EVEN_K:
        mask = mask & (k < K)[:, None]
    if perm_ptr is not None:
        k = tl.load(perm_ptr + k, mask=k < K, other=0)
    # 64-bit: k * stride passes 2**31 for a large transposed x.
    pointers = x_ptr + rows[None, :] * stride_xm + (k.to(tl.int64) * stride_xk)[:, None]
    return tl.load(pointers, mask=mask, other=0.0).to(COMPUTE)


@triton.jit
def w4a16_gemm_kernel(
    x_ptr,  # [M, K], any strides
    perm_ptr,  # int32 [K] or None: input of the layer at position k of the weight
    weight_ptr,  # see layout.py, [blocks, N, words]
    scale_ptr,  # [G, N], floating
    zero_ptr,  # int8 [G, N] or None; less 128 where BITS is 8
    group_ptr,  # int32 [blocks * BLOCK_K] or None: scale row of every weight column
    bias_ptr,  # [N] or None
    out_ptr,  # [M, N]
    M, N, K, groups,
    stride_xm, stride_xk, stride_wb, stride_om,
    BITS: tl.constexpr,
    GROUP_SIZE: tl.constexpr,  # -1: one group; unused with group_ptr
    SLICE_K: tl.constexpr,
    COMPUTE: tl.constexpr,
    MAGIC: tl.constexpr,
    OFFSET: tl.constexpr,  # what a loaded code is too large by; see launch.py
    EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    BLOCK_K: tl.constexpr = 4 * SLICE_K
    WORDS: tl.constexpr = SLICE_K * BITS // 4
    # Consecutive slices that share a scale: all 4, 2 or 1.
    CHANNEL: tl.constexpr = GROUP_SIZE == -1
    if CHANNEL or GROUP_SIZE % BLOCK_K == 0:
        RUN: tl.constexpr = 4
    elif GROUP_SIZE % (2 * SLICE_K) == 0:
        RUN: tl.constexpr = 2
    else:
        RUN: tl.constexpr = 1
    ZERO: tl.constexpr = OFFSET + (8.0 if BITS == 4 else 128.0)
    # Of a zero point as it is stored.
    ZERO_OFFSET: tl.constexpr = OFFSET + (0.0 if BITS == 4 else 128.0)

    tile_m, tile_n = grouped_tile(
        tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N), GROUP_M
    )
    rm = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    rn = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_m = rm < M
    mask_n = rn < N
    # 64-bit: M * K, M * N and N * K each pass 2**31 for real layers and prompts.
    rm = rm.to(tl.int64)
    tile_ptr = weight_ptr + rn.to(tl.int64)[:, None] * WORDS + tl.arange(0, SLICE_K)[None, :]

    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for k0 in range(0, K, BLOCK_K):
        codes = _load_codes(tile_ptr, mask_n[:, None], SLICE_K, BITS, COMPUTE, MAGIC)
        partial = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
        for j in tl.static_range(4):
            k_start = k0 + j * SLICE_K
            x = _load_activations(
                x_ptr, perm_ptr, rm, mask_m, k_start, K, stride_xm, stride_xk,
                SLICE_K, EVEN_K, COMPUTE,
            )  # fmt: skip
            if group_ptr is not None:
                # A slice may span groups: every weight takes its own scale and is rounded once.
                g = tl.load(group_ptr + k_start + tl.arange(0, SLICE_K)).to(tl.int64)
                at = g[None, :] * N + rn[:, None]
                zero = ZERO
                if zero_ptr is not None:
                    zero = tl.load(zero_ptr + at, mask=mask_n[:, None], other=0).to(tl.float32)
                    zero += ZERO_OFFSET
                scale = tl.load(scale_ptr + at, mask=mask_n[:, None], other=0.0).to(tl.float32)
                w = ((codes[j].to(tl.float32) - zero) * scale).to(COMPUTE)
                partial = tl.dot(w, x, partial, input_precision="ieee")
                if j == 3:
                    acc += partial
            else:
                if j % RUN == 0:
                    # K may end inside the last block: its groups stop at the last one.
                    g = 0 if CHANNEL else tl.minimum(k_start // GROUP_SIZE, groups - 1)
                    at = tl.cast(g, tl.int64) * N + rn
                    if zero_ptr is not None:
                        zero = tl.load(zero_ptr + at, mask=mask_n, other=0).to(tl.float32)
                        zero = (zero + ZERO_OFFSET).to(COMPUTE)[:, None]
                    else:
                        zero = tl.full((1, 1), ZERO, COMPUTE)
                w = codes[j] - zero
                partial = tl.dot(w, x, partial, input_precision="ieee")
                if (j + 1) % RUN == 0:
                    if CHANNEL:
                        acc += partial
                    else:
                        scale = tl.load(scale_ptr + at, mask=mask_n, other=0.0)
                        acc += partial * scale.to(tl.float32)[:, None]
                    partial = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
        tile_ptr += stride_wb

    if CHANNEL and group_ptr is None:
        acc *= tl.load(scale_ptr + rn, mask=mask_n, other=0.0).to(tl.float32)[:, None]
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + rn, mask=mask_n, other=0.0).to(tl.float32)[:, None]
    out = out_ptr + rm[None, :] * stride_om + rn[:, None]
    tl.store(out, acc.to(out_ptr.dtype.element_ty), mask=mask_n[:, None] & mask_m[None, :])
