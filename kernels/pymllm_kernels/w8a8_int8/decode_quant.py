"""Quantization of one token inside the kernel for few: the arithmetic of ``per_token_quant_int8``.

Symmetric; the formula and its special cases (zeros, NaN, infinity, tiny values) are those of its
``reference``.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from pymllm_kernels.per_token_quant_int8.kernel import inverse_of

# The four values of a 64-bit register as fp32.
_OPEN_BF16 = """{
.reg .b32 lo, hi, a, b, c, d;
mov.b64 {lo, hi}, $1;
shl.b32 a, lo, 16;
and.b32 b, lo, 0xFFFF0000;
shl.b32 c, hi, 16;
and.b32 d, hi, 0xFFFF0000;
"""
_OPEN_FP16 = """{
.reg .b32 a, b, c, d;
.reg .b16 e, f, g, h;
mov.b64 {e, f, g, h}, $1;
cvt.f32.f16 a, e;
cvt.f32.f16 b, f;
cvt.f32.f16 c, g;
cvt.f32.f16 d, h;
"""
# Adding 1.5 * 2**23 rounds to the nearest integer, ties to even; its low byte is the code.
_EACH = """
mul.rn.f32 R, R, $2;
mul.rn.f32 R, R, $3;
add.rn.f32 R, R, 0f4B400000;
"""
# Of a token with NaN or infinity every code is 0: the last operand is 0 there, else all ones.
_CLOSE = """
prmt.b32 a, a, b, 0x0040;
prmt.b32 c, c, d, 0x0040;
prmt.b32 $0, a, c, 0x5410;
and.b32 $0, $0, $4;
}"""
_EVERY = "".join(_EACH.replace("R", name) for name in "abcd")
_CODES_BF16 = gl.constexpr(_OPEN_BF16 + _EVERY + _CLOSE)
_CODES_FP16 = gl.constexpr(_OPEN_FP16 + _EVERY + _CLOSE)
_SIZE = "{ .reg .b32 t; and.b32 t, $2, 0x7FFF7FFF; max.NaN.HALF $0, $1, t; }"
_SIZE_BF16 = gl.constexpr(_SIZE.replace("HALF", "bf16x2"))
_SIZE_FP16 = gl.constexpr(_SIZE.replace("HALF", "f16x2"))
# Sizes of a pair as fp32 bits: in the order of the values, NaN above infinity.
_PAIR_BF16 = gl.constexpr("{ shl.b32 $0, $2, 16; and.b32 $1, $2, 0xFFFF0000; }")
_PAIR_FP16 = gl.constexpr("""{
.reg .b16 lo, hi;
mov.b32 {lo, hi}, $2;
cvt.f32.f16 $0, lo;
cvt.f32.f16 $1, hi;
}""")
_LOADS = gl.constexpr(4)


@gluon.jit
def quantize_four(x, rounding, HALF: gl.constexpr):
    """Four values a 64-bit element to four codes a 32-bit element."""
    asm: gl.constexpr = _CODES_BF16 if HALF == gl.bfloat16 else _CODES_FP16
    factor, inverse, keep = rounding
    return gl.inline_asm_elementwise(
        asm, "=r,l,f,f,r", [x, factor, inverse, keep], dtype=gl.int32, is_pure=True, pack=1
    )


@gluon.jit
def _largest_size(x_ptr, K, HALF: gl.constexpr, WARPS: gl.constexpr):
    """The fp32 bits of the largest size."""
    PAIRS: gl.constexpr = 128 * WARPS
    layout: gl.constexpr = gl.BlockedLayout([4], [32], [WARPS], [0])
    pair = gl.arange(0, PAIRS, layout=layout)
    size: gl.constexpr = _SIZE_BF16 if HALF == gl.bfloat16 else _SIZE_FP16
    sizes = gl.zeros([PAIRS], gl.int32, layout)
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
            sizes = gl.inline_asm_elementwise(
                size, "=r,r,r", [sizes, loaded[i]], dtype=gl.int32, is_pure=True, pack=1
            )
    opened: gl.constexpr = _PAIR_BF16 if HALF == gl.bfloat16 else _PAIR_FP16
    lo, hi = gl.inline_asm_elementwise(
        opened, "=r,=r,r", [sizes], dtype=(gl.int32, gl.int32), is_pure=True, pack=1
    )
    return gl.max(gl.maximum(lo, hi), 0)


@gluon.jit
def quantization(x_ptr, K, like, HALF: gl.constexpr, WARPS: gl.constexpr):
    """What :func:`quantize_four` takes, as large as ``like``, and the scale."""
    layout: gl.constexpr = like.type.layout
    top = _largest_size(x_ptr, K, HALF, WARPS)
    size = top.to(gl.float32, bitcast=True)
    factor, inverse = inverse_of(size, 127.0)
    rounding = (
        gl.full(like.shape, factor, gl.float32, layout),
        gl.full(like.shape, inverse, gl.float32, layout),
        gl.full(like.shape, gl.where(top < 0x7F800000, -1, 0), gl.int32, layout),
    )
    return rounding, gl.div_rn(size, 127.0)
