"""Unpacking 8-bit weights, two to a 16-bit word: see ``SlicedInt8`` in ``layout``.

Each function takes a tile of words and gives the tiles of their low and of their high bytes, exact.
"""

from __future__ import annotations

import triton
import triton.language as tl

# All take one 32-bit register of two words, and give one of two 16-bit floats for each byte.
# 7 bits in the mantissa of 128.0; the eighth turns the 256.0 that is subtracted into 128.0.
_SIGNED_BF16 = tl.constexpr("""{
.reg .b32 t, u, minus;
mov.b32 minus, 0xBF80BF80;
lop3.b32 t, $2, 0x007F007F, 0x43004300, 0xEA;
lop3.b32 u, $2, 0x00800080, 0x43804380, 0x6A;
fma.rn.bf16x2 $0, u, minus, t;
shr.u32 u, $2, 8;
lop3.b32 t, u, 0x007F007F, 0x43004300, 0xEA;
lop3.b32 u, u, 0x00800080, 0x43804380, 0x6A;
fma.rn.bf16x2 $1, u, minus, t;
}""")
_OR_MAGIC_BYTES_FP16 = tl.constexpr("""{
prmt.b32 $0, $2, 0x64646464, 0x4240;
prmt.b32 $1, $2, 0x64646464, 0x4341;
}""")
_BYTES_BF16 = """{
.reg .b32 t, most;
mov.b32 most, 0x7E807E80;
and.b32 t, $2, 0x00FF00FF;
fma.rn.bf16x2 $0, t, most, $3;
prmt.b32 t, $2, 0, 0x4341;
fma.rn.bf16x2 $1, t, most, $4;
}"""
_LESS_ZERO_BF16 = tl.constexpr(_BYTES_BF16)
_LESS_128_BF16 = tl.constexpr(
    _BYTES_BF16.replace("most;\nmov", "most, minus;\nmov.b32 minus, 0xBF80BF80;\nmov")
    .replace("$3", "minus")
    .replace("$4", "minus")
)


@triton.jit
def magic_int8(words, HALF: tl.constexpr):
    """``code - 128`` (bf16) or ``1024 + code`` (fp16)."""
    if HALF == tl.bfloat16:
        return tl.inline_asm_elementwise(
            _SIGNED_BF16, "=r,=r,r", [words],
            dtype=(tl.bfloat16, tl.bfloat16), is_pure=True, pack=2,
        )  # fmt: skip
    else:
        return tl.inline_asm_elementwise(
            _OR_MAGIC_BYTES_FP16, "=r,=r,r", [words],
            dtype=(tl.float16, tl.float16), is_pure=True, pack=2,
        )  # fmt: skip


@triton.jit
def less_zero_over_128(words, low_zero, high_zero):
    """``(code - zero) / 128`` in bf16, from ``-zero / 128`` of the low and of the high bytes.

    A code alone in a bf16 is code * 2**-133, subnormal numbers being exact: one bit operation and one
    multiply-add a pair of weights.
    """
    return tl.inline_asm_elementwise(
        _LESS_ZERO_BF16, "=r,=r,r,r,r", [words, low_zero, high_zero],
        dtype=(tl.bfloat16, tl.bfloat16), is_pure=True, pack=2,
    )  # fmt: skip


@triton.jit
def less_128_over_128(words):
    """``(code - 128) / 128`` in bf16, as :func:`less_zero_over_128`."""
    return tl.inline_asm_elementwise(
        _LESS_128_BF16, "=r,=r,r", [words],
        dtype=(tl.bfloat16, tl.bfloat16), is_pure=True, pack=2,
    )  # fmt: skip
