"""Quantization of the activations inside the kernel for one token: the arithmetic of ``per_token_quant_int8``.

Formulas and special cases (rows of zeros, NaN, infinity, tiny values) are those of its ``reference``.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from pymllm_kernels.per_token_quant_int8.kernel import inverse_of, zero_point_of

# The four values of a 64-bit register as fp32.
_OPEN_BF16 = """{
.reg .b32 lo, hi, a, b, c, d;
.reg .f32 v;
.reg .pred p;
mov.b64 {lo, hi}, $1;
shl.b32 a, lo, 16;
and.b32 b, lo, 0xFFFF0000;
shl.b32 c, hi, 16;
and.b32 d, hi, 0xFFFF0000;
"""
_OPEN_FP16 = """{
.reg .b32 a, b, c, d;
.reg .b16 e, f, g, h;
.reg .f32 v;
.reg .pred p;
mov.b64 {e, f, g, h}, $1;
cvt.f32.f16 a, e;
cvt.f32.f16 b, f;
cvt.f32.f16 c, g;
cvt.f32.f16 d, h;
"""
# Adding 1.5 * 2**23 rounds to the nearest integer, ties to even; its low byte is the code.
_SYMMETRIC = """
mul.rn.f32 R, R, $2;
mul.rn.f32 R, R, $3;
add.rn.f32 R, R, 0f4B400000;
"""
# NaN to 0, room for a zero point, rounded, shifted, clamped.
_SHIFTED = """
setp.nan.f32 p, R, R;
selp.f32 v, 0f00000000, R, p;
max.f32 v, v, 0fC3800000;
min.f32 v, v, 0f437F0000;
add.rn.f32 v, v, 0f4B400000;
sub.rn.f32 v, v, 0f4B400000;
add.rn.f32 v, v, $4;
max.f32 v, v, 0fC3000000;
min.f32 v, v, 0f42FE0000;
add.rn.f32 R, v, 0f4B400000;
"""
_DYNAMIC = "mul.rn.f32 R, R, $2;\nmul.rn.f32 R, R, $3;\n" + _SHIFTED
_STATIC = "div.rn.f32 R, R, $3;\n" + _SHIFTED
_CLOSE = """
prmt.b32 a, a, b, 0x0040;
prmt.b32 c, c, d, 0x0040;
prmt.b32 $0, a, c, 0x5410;
}"""


def _of_four(opened: str, each: str, closed: str = _CLOSE) -> gl.constexpr:
    return gl.constexpr(opened + "".join(each.replace("R", name) for name in "abcd") + closed)


# Of a row with NaN or infinity every code is 0: the last operand is 0 there, else all ones.
_KEEP = _CLOSE.replace("}", "and.b32 $0, $0, $4;\n}")
_SYMMETRIC_BF16 = _of_four(_OPEN_BF16, _SYMMETRIC, _KEEP)
_SYMMETRIC_FP16 = _of_four(_OPEN_FP16, _SYMMETRIC, _KEEP)
_DYNAMIC_BF16 = _of_four(_OPEN_BF16, _DYNAMIC)
_DYNAMIC_FP16 = _of_four(_OPEN_FP16, _DYNAMIC)
_STATIC_BF16 = _of_four(_OPEN_BF16, _STATIC)
_STATIC_FP16 = _of_four(_OPEN_FP16, _STATIC)

_SIZE = "{ .reg .b32 t; and.b32 t, $2, 0x7FFF7FFF; max.NaN.HALF $0, $1, t; }"
_SIZE_BF16 = gl.constexpr(_SIZE.replace("HALF", "bf16x2"))
_SIZE_FP16 = gl.constexpr(_SIZE.replace("HALF", "f16x2"))
_HIGH_BF16 = gl.constexpr("max.NaN.bf16x2 $0, $1, $2;")
_HIGH_FP16 = gl.constexpr("max.NaN.f16x2 $0, $1, $2;")
_LOW_BF16 = gl.constexpr("min.NaN.bf16x2 $0, $1, $2;")
_LOW_FP16 = gl.constexpr("min.NaN.f16x2 $0, $1, $2;")
# Sizes of a pair as fp32 bits: in the order of the values, NaN above infinity.
_PAIR_BF16 = gl.constexpr(
    "{ shl.b32 $0, $2, 16; and.b32 $1, $2, 0x7FFF0000; and.b32 $0, $0, 0x7FFFFFFF; }"
)
_PAIR_FP16 = gl.constexpr("""{
.reg .b16 lo, hi;
mov.b32 {lo, hi}, $2;
cvt.f32.f16 $0, lo;
cvt.f32.f16 $1, hi;
and.b32 $0, $0, 0x7FFFFFFF;
and.b32 $1, $1, 0x7FFFFFFF;
}""")
_LOADS = gl.constexpr(4)


@gluon.jit
def quantize_four(
    x, rounding, HALF: gl.constexpr, STATIC: gl.constexpr, ZERO: gl.constexpr
):  # fmt: skip
    """Four values a 64-bit element to four codes a 32-bit element."""
    BF16: gl.constexpr = HALF == gl.bfloat16
    factor, inverse, last = rounding
    if STATIC:
        asm: gl.constexpr = _STATIC_BF16 if BF16 else _STATIC_FP16
    elif ZERO:
        asm: gl.constexpr = _DYNAMIC_BF16 if BF16 else _DYNAMIC_FP16
    else:
        asm: gl.constexpr = _SYMMETRIC_BF16 if BF16 else _SYMMETRIC_FP16
    LAST: gl.constexpr = "f" if STATIC or ZERO else "r"
    return gl.inline_asm_elementwise(
        asm, "=r,l,f,f," + LAST, [x, factor, inverse, last], dtype=gl.int32, is_pure=True, pack=1
    )


@gluon.jit
def _further(asm: gl.constexpr, so_far, x):
    return gl.inline_asm_elementwise(
        asm, "=r,r,r", [so_far, x], dtype=gl.int32, is_pure=True, pack=1
    )


@gluon.jit
def _largest(pairs, HALF: gl.constexpr):
    """The bits of the largest size in pairs ``[P]``."""
    asm: gl.constexpr = _PAIR_BF16 if HALF == gl.bfloat16 else _PAIR_FP16
    lo, hi = gl.inline_asm_elementwise(
        asm, "=r,=r,r", [pairs], dtype=(gl.int32, gl.int32), is_pure=True, pack=1
    )
    return gl.max(gl.maximum(lo, hi), 0)


@gluon.jit
def _extremes(x_ptr, K, ZERO: gl.constexpr, HALF: gl.constexpr, WARPS: gl.constexpr):
    """Bits of the largest value or 0 (of the largest size without ZERO), and of the smallest."""
    PAIRS: gl.constexpr = 128 * WARPS
    layout: gl.constexpr = gl.BlockedLayout([4], [32], [WARPS], [0])
    pair = gl.arange(0, PAIRS, layout=layout)
    BF16: gl.constexpr = HALF == gl.bfloat16
    high = gl.zeros([PAIRS], gl.int32, layout)
    low = high
    for start in range(0, K // 2, _LOADS * PAIRS):
        # All in flight at once.
        loaded = ()
        for i in gl.static_range(_LOADS):
            at = start + i * PAIRS
            # By pieces of 8 values, so that one load takes a piece.
            inside = at // 4 + pair // 4 < K // 8
            loaded += (
                gl.load(x_ptr.to(gl.pointer_type(gl.int32)) + (at + pair), mask=inside, other=0),
            )
        for i in gl.static_range(_LOADS):
            if ZERO:
                high = _further(_HIGH_BF16 if BF16 else _HIGH_FP16, high, loaded[i])
                low = _further(_LOW_BF16 if BF16 else _LOW_FP16, low, loaded[i])
            else:
                high = _further(_SIZE_BF16 if BF16 else _SIZE_FP16, high, loaded[i])
    top = _largest(high, HALF)
    if ZERO:
        return top, _largest(low, HALF)
    else:
        return top, top


@gluon.jit
def quantization(
    x_ptr, x_scale_ptr, x_zero_ptr, K, like, STATIC: gl.constexpr, ZERO: gl.constexpr,
    HALF: gl.constexpr, WARPS: gl.constexpr,
):  # fmt: skip
    """What :func:`quantize_four` takes, as large as ``like``, and the scale and the zero point."""
    layout: gl.constexpr = like.type.layout
    factor = 1.0
    shift = 0.0
    if STATIC:
        scale = gl.load(x_scale_ptr)
        inverse = scale
        if x_zero_ptr is not None:
            shift = gl.load(x_zero_ptr).to(gl.float32)
    else:
        top, bottom = _extremes(x_ptr, K, ZERO, HALF, WARPS)
        high = top.to(gl.float32, bitcast=True)
        if ZERO:
            low = -bottom.to(gl.float32, bitcast=True)
            factor, inverse, scale, shift = zero_point_of(high, low)
        else:
            factor, inverse = inverse_of(high, 127.0)
            scale = gl.div_rn(high, 127.0)
    if STATIC or ZERO:
        last = gl.full(like.shape, shift, gl.float32, layout)
        zero = gl.to_tensor(shift).to(gl.int32)
    else:
        last = gl.full(like.shape, gl.where(top < 0x7F800000, -1, 0), gl.int32, layout)
        zero = 0
    rounding = (
        gl.full(like.shape, factor, gl.float32, layout),
        gl.full(like.shape, inverse, gl.float32, layout),
        last,
    )
    return rounding, scale, zero
