"""Triton kernels of the activation quantization: one program a row, or a part of it where the scale is given.

Formulas: see ``reference``.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents

from pymllm_kernels.per_token_quant_int8.reference import TINY, TINY_FACTOR

# Adding and subtracting 1.5 * 2**23 rounds an fp32 value below 2**22 to the nearest integer, ties to
# even; the interpreter has no rint.
_ROUND = tl.constexpr(12582912.0)
_ROUND_BITS = tl.constexpr(0x4B400000)
_TINY = tl.constexpr(TINY)
_TINY_FACTOR = tl.constexpr(TINY_FACTOR)
_INFINITY_BITS = tl.constexpr(0x7F800000)


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
def _size_bits(v):
    """The bits of ``abs(v)``, in the order of the values, with NaN above infinity."""
    return v.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def _further(high, low, v):
    """Largest and smallest value so far, NaN once there was one: an instruction a value each."""
    high = tl.maximum(high, v, propagate_nan=tl.PropagateNan.ALL)
    return high, tl.minimum(low, v, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def inverse_of(size, STEPS: tl.constexpr):
    """(factor, STEPS / (size * factor)): a power of two keeps the quotient of tiny sizes finite."""
    factor = tl.where(size < _TINY, _TINY_FACTOR, 1.0)
    divisor = tl.where(size == 0.0, 1.0, size * factor)
    return factor, tl.where(size == 0.0, 0.0, tl.div_rn(STEPS, divisor))


@triton.jit
def zero_point_of(high, low):
    """(factor, 255 / (size * factor), scale, zero point as fp32) of rows from ``low`` to ``high``."""
    size = high - low
    factor, inverse = inverse_of(size, 255.0)
    shift = _round_to_int8_range(-128.0 - (low * factor) * inverse)
    shift = tl.where(size == 0.0, 0.0, tl.minimum(tl.maximum(shift, -128.0), 127.0))
    return factor, inverse, tl.div_rn(size, 255.0), shift


@triton.jit
def _store_symmetric(out_ptr, v, k, K, factor, inverse, finite):
    """``rint(v * factor * inverse)``, or 0 in a row with NaN or infinity.

    The low byte of the sum that rounds is the code: a third of the instructions of clamping and
    converting, which would take longer than the memory.
    """
    if finite:
        code = ((v * factor) * inverse + _ROUND).to(tl.int32, bitcast=True).to(tl.int8)
        tl.store(out_ptr + k, code, mask=k < K)
    else:
        tl.store(out_ptr + k, tl.zeros_like(k).to(tl.int8), mask=k < K)


@triton.jit
def _prepare_next_kernel(counters_ptr, counters, PDL: tl.constexpr):
    """Lets a kernel that was launched to overlap with this one start, and clears its counters."""
    if PDL:
        gdc_launch_dependents()
    if counters_ptr is not None:  # noqa: SIM102  one is known at compile time, the other not
        if tl.program_id(0) == 0:
            for start in range(0, counters, 256):
                index = start + tl.arange(0, 256)
                tl.store(counters_ptr + index, tl.zeros_like(index), mask=index < counters)


@triton.jit
def _quantize_symmetric(
    row_ptr, out_ptr, scale_ptr, K, stride_xk, BLOCK_K: tl.constexpr, ONE_BLOCK: tl.constexpr
):
    lanes = tl.arange(0, BLOCK_K)
    v = _load_row(row_ptr, lanes, K, stride_xk)
    bits = _size_bits(v)
    if not ONE_BLOCK:
        for k0 in range(BLOCK_K, K, BLOCK_K):
            bits = tl.maximum(bits, _size_bits(_load_row(row_ptr, k0 + lanes, K, stride_xk)))
    top = tl.max(bits, 0)
    size = top.to(tl.float32, bitcast=True)
    finite = top < _INFINITY_BITS
    factor, inverse = inverse_of(size, 127.0)
    tl.store(scale_ptr, tl.div_rn(size, 127.0))
    if ONE_BLOCK:
        _store_symmetric(out_ptr, v, lanes, K, factor, inverse, finite)
    else:
        for k0 in range(0, K, BLOCK_K):
            k = k0 + lanes
            v = _load_row(row_ptr, k, K, stride_xk)
            _store_symmetric(out_ptr, v, k, K, factor, inverse, finite)


@triton.jit
def _shifted(v, shift):
    """``clamp(rint(v) + shift, -128, 127)`` for ``v`` below 2**22: integers from the rounding on."""
    code = (v + _ROUND).to(tl.int32, bitcast=True) + (shift - _ROUND_BITS)
    return tl.minimum(tl.maximum(code, -128), 127).to(tl.int8)


@triton.jit
def _store_asymmetric(out_ptr, v, k, K, factor, inverse, shift, finite):
    """``rint(v * factor * inverse) + shift``, or ``shift`` in a row with NaN or infinity."""
    if finite:
        tl.store(out_ptr + k, _shifted((v * factor) * inverse, shift), mask=k < K)
    else:
        tl.store(out_ptr + k, (tl.zeros_like(k) + shift).to(tl.int8), mask=k < K)


@triton.jit
def _quantize_asymmetric(
    row_ptr, out_ptr, scale_ptr, zero_ptr, K, stride_xk,
    BLOCK_K: tl.constexpr, ONE_BLOCK: tl.constexpr,
):  # fmt: skip
    lanes = tl.arange(0, BLOCK_K)
    v = _load_row(row_ptr, lanes, K, stride_xk)
    high, low = _further(tl.zeros_like(v), tl.zeros_like(v), v)
    if not ONE_BLOCK:
        for k0 in range(BLOCK_K, K, BLOCK_K):
            high, low = _further(high, low, _load_row(row_ptr, k0 + lanes, K, stride_xk))
    # max and min drop NaN, those of the bits of a size do not.
    top = tl.max(_size_bits(high), 0).to(tl.float32, bitcast=True)
    bottom = -tl.max(_size_bits(low), 0).to(tl.float32, bitcast=True)
    factor, inverse, scale, zero = zero_point_of(top, bottom)
    tl.store(scale_ptr, scale)
    shift = zero.to(tl.int32)
    tl.store(zero_ptr, shift)
    finite = top - bottom < float("inf")
    if ONE_BLOCK:
        _store_asymmetric(out_ptr, v, lanes, K, factor, inverse, shift, finite)
    else:
        for k0 in range(0, K, BLOCK_K):
            k = k0 + lanes
            v = _load_row(row_ptr, k, K, stride_xk)
            _store_asymmetric(out_ptr, v, k, K, factor, inverse, shift, finite)


@triton.jit
def per_token_quant_kernel(
    x_ptr,  # [M, K], any strides
    codes_ptr,  # int8 [M, K]
    scale_ptr,  # fp32 [M]
    zero_ptr,  # int32 [M] or None: symmetric
    counters_ptr,  # int32 [counters] to be cleared for the next kernel, or None
    K, stride_xm, stride_xk, stride_cm, counters,
    BLOCK_K: tl.constexpr,
    ONE_BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    _prepare_next_kernel(counters_ptr, counters, PDL)
    row = tl.program_id(0).to(tl.int64)
    row_ptr = x_ptr + row * stride_xm
    out_ptr = codes_ptr + row * stride_cm
    if zero_ptr is None:
        _quantize_symmetric(
            row_ptr, out_ptr, scale_ptr + row, K, stride_xk, BLOCK_K, ONE_BLOCK
        )  # fmt: skip
    else:
        _quantize_asymmetric(
            row_ptr, out_ptr, scale_ptr + row, zero_ptr + row, K, stride_xk, BLOCK_K, ONE_BLOCK
        )  # fmt: skip


@triton.jit
def static_quant_kernel(
    x_ptr,  # [M, K], any strides
    codes_ptr,  # int8 [M, K]
    scale_ptr,  # fp32 [1]
    zero_ptr,  # int32 [1] or None
    counters_ptr,  # int32 [counters] to be cleared for the next kernel, or None
    K, stride_xm, stride_xk, stride_cm, counters,
    BLOCK_K: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    _prepare_next_kernel(counters_ptr, counters, PDL)
    blocks = tl.cdiv(K, BLOCK_K)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    k = tl.program_id(0) % blocks * BLOCK_K + tl.arange(0, BLOCK_K)
    scale = tl.load(scale_ptr)
    shift = 0
    if zero_ptr is not None:
        shift = tl.load(zero_ptr)
    v = tl.div_rn(_load_row(x_ptr + row * stride_xm, k, K, stride_xk), scale)
    # Beyond what any zero point brings back into the range.
    v = tl.minimum(tl.maximum(tl.where(_is_nan(v), 0.0, v), -256.0), 256.0)
    tl.store(codes_ptr + row * stride_cm + k, _shifted(v, shift), mask=k < K)
