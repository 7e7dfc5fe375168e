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
# Between these scales no product of a division overflows, and no remainder that matters is subnormal.
_LEAST_FUSED = tl.constexpr(2.0**-90)
_MOST_FUSED = tl.constexpr(2.0**100)


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
def size_bits(v):
    """The bits of ``abs(v)``, in the order of the values, with NaN above infinity."""
    return v.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def range_of(high, low, other_high, other_low):
    """Largest and smallest value of two ranges, NaN once there was one: an instruction a value each."""
    high = tl.maximum(high, other_high, propagate_nan=tl.PropagateNan.ALL)
    return high, tl.minimum(low, other_low, propagate_nan=tl.PropagateNan.ALL)


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
def _times(v, factor, inverse):
    """``(v * factor) * inverse``: nearly every row has a factor of 1, and skips that product."""
    if factor != 1.0:
        v = v * factor
    return v * inverse


@triton.jit
def rounded_codes(v):
    """``rint(v)`` of values that fit.

    The low byte of the sum that rounds is the code: a third of the instructions of clamping and
    converting, which would take longer than the memory.
    """
    return (v + _ROUND).to(tl.int32, bitcast=True).to(tl.int8)


@triton.jit
def _store_symmetric(out_ptr, v, k, K, factor, inverse, finite):
    """``rint(v * factor * inverse)``, or 0 in a row with NaN or infinity."""
    if finite:
        tl.store(out_ptr + k, rounded_codes((v * factor) * inverse), mask=k < K)
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
    bits = size_bits(v)
    if not ONE_BLOCK:
        for k0 in range(BLOCK_K, K, BLOCK_K):
            bits = tl.maximum(bits, size_bits(_load_row(row_ptr, k0 + lanes, K, stride_xk)))
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
    # From 0 to 255 until they are packed: signed values would be masked one by one before.
    code = (v + _ROUND).to(tl.int32, bitcast=True) + (shift + 128 - _ROUND_BITS)
    return (tl.minimum(tl.maximum(code, 0), 255) ^ 128).to(tl.int8)


@triton.jit
def asymmetric_codes(v, factor, inverse, shift):
    """``rint(v * factor * inverse) + shift`` of a finite row."""
    return _shifted(_times(v, factor, inverse), shift)


@triton.jit
def _store_asymmetric(out_ptr, v, k, K, factor, inverse, shift, finite):
    """:func:`asymmetric_codes`, or ``shift`` in a row with NaN or infinity."""
    if finite:
        tl.store(out_ptr + k, asymmetric_codes(v, factor, inverse, shift), mask=k < K)
    else:
        tl.store(out_ptr + k, (tl.zeros_like(k) + shift).to(tl.int8), mask=k < K)


@triton.jit
def _quantize_asymmetric(
    row_ptr, out_ptr, scale_ptr, zero_ptr, K, stride_xk,
    BLOCK_K: tl.constexpr, ONE_BLOCK: tl.constexpr,
):  # fmt: skip
    lanes = tl.arange(0, BLOCK_K)
    v = _load_row(row_ptr, lanes, K, stride_xk)
    high, low = v, v
    if not ONE_BLOCK:
        for k0 in range(BLOCK_K, K, BLOCK_K):
            more = _load_row(row_ptr, k0 + lanes, K, stride_xk)
            high, low = range_of(high, low, more, more)
    top, bottom = tl.reduce((high, low), 0, range_of)
    top, bottom = range_of(top, bottom, 0.0, 0.0)
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
def _quotient(v, scale):
    """``v / scale`` rounded to nearest: two corrections of the product with the reciprocal.

    The first leaves an error below one unit in the last place, the second the nearest value (Markstein,
    IBM J. Res. Dev. 34, 1990: from a quotient that close, its exact remainder and the nearest
    reciprocal). Where the remainder is subnormal, the quotient is below 2**-12 and its code 0 anyhow.
    5 instructions a value instead of 10 and two of the slow unit.
    """
    inverse = tl.div_rn(1.0, scale)
    quotient = v * inverse
    # Triton negates a value by subtracting it: the scale is one.
    less = -scale
    quotient = tl.fma(tl.fma(quotient, less, v), inverse, quotient)
    return tl.fma(tl.fma(quotient, less, v), inverse, quotient)


@triton.jit
def static_codes(v, scale, shift, FUSED: tl.constexpr):
    """``clamp(rint(v / scale) + shift, -128, 127)``, NaN as 0.

    FUSED: whether fused multiply-adds are: not in the interpreter.
    """
    v = tl.where(_is_nan(v), 0.0, v)
    if FUSED and (scale > _LEAST_FUSED) & (scale < _MOST_FUSED):
        # Up to where a quarter more than the last code begins: both ends round into the range.
        v = tl.minimum(tl.maximum(v, (-128.25 - shift) * scale), (127.25 - shift) * scale)
        code = (_quotient(v, scale) + _ROUND).to(tl.int32, bitcast=True) + (shift - _ROUND_BITS)
        code = code.to(tl.int8)
    else:
        # A scale of 0 divides 0 as NaN.
        v = tl.div_rn(v, scale)
        v = tl.where(_is_nan(v), 0.0, v)
        # Beyond what any zero point brings back into the range.
        v = tl.minimum(tl.maximum(v, -256.0), 256.0)
        code = _shifted(v, shift)
    return code


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
    FUSED: tl.constexpr,  # see static_codes
):  # fmt: skip
    _prepare_next_kernel(counters_ptr, counters, PDL)
    blocks = tl.cdiv(K, BLOCK_K)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    k = tl.program_id(0) % blocks * BLOCK_K + tl.arange(0, BLOCK_K)
    scale = tl.load(scale_ptr)
    shift = 0
    if zero_ptr is not None:
        shift = tl.load(zero_ptr)
    v = _load_row(x_ptr + row * stride_xm, k, K, stride_xk)
    code = static_codes(v, scale, shift, FUSED)
    tl.store(codes_ptr + row * stride_cm + k, code, mask=k < K)
