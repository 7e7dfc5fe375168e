"""Unpacking int4 weights, four to a 16-bit word: see ``SlicedInt4`` in ``layout``.

A code in the mantissa of a 16-bit float adds its own value: one bit operation a pair of weights, where an
integer conversion costs several a weight. In the lowest 7 bits of 128 (bf16) or 10 of 1024 (fp16) each of four
codes but the first takes a shift. In the lowest 8 bits of the smallest bf16, code * 2**-133, and in the 10 of
1024, two of four need none, and one multiply-add takes them to their size. All are exact, and where bf16 weights
are symmetric that multiply-add scales them as well, rounding once.
"""

from __future__ import annotations

import re

import triton
import triton.language as tl

# All take one 32-bit register of two words and give one of two 16-bit floats for each of 4 codes.
_OR_MAGIC = """{
.reg .b32 t;
lop3.b32 $0, $4, 0x000F000F, MAGIC, 0xEA;
shr.u32 t, $4, 4;
lop3.b32 $1, t, 0x000F000F, MAGIC, 0xEA;
shr.u32 t, $4, 8;
lop3.b32 $2, t, 0x000F000F, MAGIC, 0xEA;
shr.u32 t, $4, 12;
lop3.b32 $3, t, 0x000F000F, MAGIC, 0xEA;
}"""
_OR_MAGIC_BF16 = tl.constexpr(_OR_MAGIC.replace("MAGIC", "0x43004300"))
_OR_MAGIC_FP16 = tl.constexpr(_OR_MAGIC.replace("MAGIC", "0x64006400"))
# A0 to A3 stand for what is added to each code.
_FROM_BF16 = """{
.reg .b32 t, u, high, low;
mov.b32 low, 0x7F007F00;
mov.b32 high, 0x7D007D00;
and.b32 t, $4, 0x000F000F;
fma.rn.bf16x2 $0, t, low, A0;
and.b32 t, $4, 0x00F000F0;
fma.rn.bf16x2 $1, t, high, A1;
shr.u32 u, $4, 8;
and.b32 t, u, 0x000F000F;
fma.rn.bf16x2 $2, t, low, A2;
and.b32 t, u, 0x00F000F0;
fma.rn.bf16x2 $3, t, high, A3;
}"""
_FROM_FP16 = """{
.reg .b32 t, u, high;
mov.b32 high, 0x2C002C00;
lop3.b32 t, $4, 0x000F000F, 0x64006400, 0xEA;
add.rn.f16x2 $0, t, A0;
lop3.b32 t, $4, 0x00F000F0, 0x64006400, 0xEA;
fma.rn.f16x2 $1, t, high, A1;
shr.u32 u, $4, 8;
lop3.b32 t, u, 0x000F000F, 0x64006400, 0xEA;
add.rn.f16x2 $2, t, A2;
lop3.b32 t, u, 0x00F000F0, 0x64006400, 0xEA;
fma.rn.f16x2 $3, t, high, A3;
}"""


def _given(assembly: str) -> tl.constexpr:
    """With addends in registers."""
    for i in range(4):
        assembly = assembly.replace(f"A{i}", f"${5 + i}")
    return tl.constexpr(assembly)


def _scaled(assembly: str) -> tl.constexpr:
    """With factors in registers, of codes 0 and 2 and of codes 1 and 3, and addends."""
    assembly = re.sub(r"\nmov\.b32 (low|high), \w+;", "", assembly).replace("u, high, low", "u")
    for i in range(4):
        assembly = re.sub(rf"(low|high), A{i}", f"${5 + i}, ${9 + i}", assembly)
    return tl.constexpr(assembly)


def _of_eight(assembly: str, low: str, high: str) -> tl.constexpr:
    """With those of a zero point of 8, of codes 0 and 2 and of codes 1 and 3."""
    for i in range(4):
        assembly = assembly.replace(f"A{i}", "more_high" if i % 2 else "more_low")
    numbers = (
        f".reg .b32 more_low, more_high;\nmov.b32 more_low, {low};\nmov.b32 more_high, {high};\n"
    )
    return tl.constexpr(assembly.replace("{\n", "{\n" + numbers, 1))


_INT4_LESS_ZERO_BF16, _INT4_LESS_ZERO_FP16 = _given(_FROM_BF16), _given(_FROM_FP16)
_INT4_SCALED_LESS_8_BF16 = _scaled(_FROM_BF16)
# -8 / 64; -(1024 + 8) and -(1024 / 16 + 8).
_INT4_LESS_8_BF16 = _of_eight(_FROM_BF16, "0xBE00BE00", "0xBE00BE00")
_INT4_LESS_8_FP16 = _of_eight(_FROM_FP16, "0xE408E408", "0xD480D480")


@triton.jit
def _four(ASSEMBLY: tl.constexpr, CONSTRAINTS: tl.constexpr, operands, HALF: tl.constexpr):
    """Triton takes the types of what comes out as names only."""
    if HALF == tl.bfloat16:
        return tl.inline_asm_elementwise(
            ASSEMBLY, CONSTRAINTS, operands,
            dtype=(tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16), is_pure=True, pack=2,
        )  # fmt: skip
    else:
        return tl.inline_asm_elementwise(
            ASSEMBLY, CONSTRAINTS, operands,
            dtype=(tl.float16, tl.float16, tl.float16, tl.float16), is_pure=True, pack=2,
        )  # fmt: skip


@triton.jit
def or_magic_int4(words, HALF: tl.constexpr):
    """4 tiles of ``128 + code`` (bf16) or ``1024 + code`` (fp16)."""
    ASSEMBLY: tl.constexpr = _OR_MAGIC_BF16 if HALF == tl.bfloat16 else _OR_MAGIC_FP16
    return _four(ASSEMBLY, "=r,=r,=r,=r,r", (words,), HALF)


@triton.jit
def less_8(words, HALF: tl.constexpr):
    """4 tiles of ``(code - 8) / 64`` (bf16) or ``code - 8`` (fp16)."""
    ASSEMBLY: tl.constexpr = _INT4_LESS_8_BF16 if HALF == tl.bfloat16 else _INT4_LESS_8_FP16
    return _four(ASSEMBLY, "=r,=r,=r,=r,r", (words,), HALF)


@triton.jit
def addends(zero, HALF: tl.constexpr):
    """What :func:`less_zero` adds for zero points, int8 from 0 to 15: to codes 0 and 2, to 1 and 3."""
    bits = zero.to(tl.int16)
    if HALF == tl.bfloat16:
        # A zero point of 15 is as far as codes are, 2**-133 each.
        low = bits.to(HALF, bitcast=True) * -(2.0**127)
        high = low
    else:
        low = -((bits | 0x6400).to(HALF, bitcast=True))
        high = low + 960.0
    return low, high


@triton.jit
def less_zero(words, a0, a1, a2, a3, HALF: tl.constexpr):
    """4 tiles of ``(code - zero) / 64`` (bf16) or ``code - zero`` (fp16), from their :func:`addends`."""
    ASSEMBLY: tl.constexpr = _INT4_LESS_ZERO_BF16 if HALF == tl.bfloat16 else _INT4_LESS_ZERO_FP16
    return _four(ASSEMBLY, "=r,=r,=r,=r,r,r,r,r,r", (words, a0, a1, a2, a3), HALF)


@triton.jit
def scaled_less_8(words, f0, f1, f2, f3):
    """4 tiles of bf16 ``(code - 8) * scale``, from what each code is multiplied with, and what is added."""
    m0, a0 = f0
    m1, a1 = f1
    m2, a2 = f2
    m3, a3 = f3
    return _four(
        _INT4_SCALED_LESS_8_BF16, "=r,=r,=r,=r,r,r,r,r,r,r,r,r,r",
        (words, m0, m1, m2, m3, a0, a1, a2, a3), tl.bfloat16,
    )  # fmt: skip
