"""Puts activations in the order of a weight's columns (act-order), for a kernel that starts meanwhile."""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents


@triton.jit(do_not_specialize=["k8", "stride_xm", "stride_xk"])
def gather_inputs_kernel(
    x_ptr,  # [M, K], any strides
    perm_ptr,  # int32 [K]
    out_ptr,  # [M, K], contiguous
    k8,  # K / 8
    stride_xm,
    stride_xk,
    BLOCK: tl.constexpr,  # columns of a program
    ROW: tl.constexpr,  # the power of two that holds a row, 0 for one too long for shared memory
):
    # The next kernel waits for the end of this one before it reads what is written here.
    gdc_launch_dependents()
    K = k8 * 8
    blocks = tl.cdiv(K, BLOCK)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    k = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    inside = k < K
    source = tl.load(perm_ptr + k, mask=inside, other=0)
    if ROW:
        # Through shared memory: a scattered load takes a cycle of the L1 a value, and waits for perm.
        lanes = tl.arange(0, ROW)
        values = tl.load(x_ptr + row * stride_xm + lanes.to(tl.int64) * stride_xk, mask=lanes < K)
        x = tl.gather(values, source, 0)
    else:
        x = tl.load(x_ptr + row * stride_xm + source.to(tl.int64) * stride_xk, mask=inside)
    tl.store(out_ptr + row * K + k, x, mask=inside)
