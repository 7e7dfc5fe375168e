"""What a consumer of the Hopper kernel does with a block of K: unpack weights, multiply, scale.

SCALE says what scales multiply: the "sums" of groups, the unpacked "weights", or the "codes", in the
multiply-add that unpacks them. That is for symmetric bf16 weights of 4 bits: ``(code - 8) * scale`` is
rounded once there, since 8 times a scale is exact. It comes in units of 2**-33, so that what codes are
multiplied with is a bf16 number for scales from 2**-93 up to 2**28.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    warpgroup_mma,
    warpgroup_mma_wait,
)

from pymllm_kernels.common.gluon_hopper import reinterpreted
from pymllm_kernels.w4a16.unpack_int4 import addends, less_8, less_zero, scaled_less_8
from pymllm_kernels.w4a16.unpack_int8 import less_128_over_128, less_zero_over_128, magic_int8


@gluon.jit
def _in_units(scale, shared):
    """Scales of the weights as they are unpacked: bf16 is in 64ths, of 8 bits in 128ths."""
    x_smem, weight_smem, _, _, _, _, _ = shared
    if x_smem.dtype == gl.bfloat16:
        scale *= 128.0 if weight_smem.shape[2] == x_smem.shape[2] else 64.0
    return scale


@gluon.jit
def _zero(shared, run, CONSUMER: gl.constexpr, ROWS: gl.constexpr, A: gl.constexpr):
    """Zero points of this consumer's rows as they are stored, int8 ``[ROWS, 1]``."""
    _, _, _, zero_smem, _, _, _ = shared
    zero = zero_smem.index(run).slice(CONSUMER * ROWS, ROWS).load(gl.SliceLayout(1, A))
    return gl.expand_dims(zero, 1)


@gluon.jit
def _scale_of(shared, run, CONSUMER: gl.constexpr, ROWS: gl.constexpr, LAYOUT: gl.constexpr):
    """Scales of this consumer's rows as they are stored, ``[ROWS, 1]``."""
    _, _, scale_smem, _, _, _, _ = shared
    scale = scale_smem.index(run).slice(CONSUMER * ROWS, ROWS).load(gl.SliceLayout(1, LAYOUT))
    return gl.expand_dims(scale, 1)


@gluon.jit
def _scaled(
    weight, shared, place, J: gl.constexpr, CONSUMER: gl.constexpr, ROWS: gl.constexpr,
    RUNS: gl.constexpr, A: gl.constexpr,
):  # fmt: skip
    """Slice J of weights times its scale, rounded to 16 bits."""
    x_smem, _, _, _, _, _, _ = shared
    scale = _scale_of(shared, place * RUNS + J * RUNS // 4, CONSUMER, ROWS, A)
    return weight * _in_units(scale.to(x_smem.dtype), shared)


@gluon.jit
def _rows(shared, place, CONSUMER: gl.constexpr, ROWS: gl.constexpr):
    """This consumer's rows of a block of packed weights."""
    x_smem, weight_smem, _, _, _, _, _ = shared
    # One box a place, or one a consumer.
    BOXES: gl.constexpr = 2 * weight_smem.shape[0] // x_smem.shape[0]
    BOX_ROWS: gl.constexpr = weight_smem.shape[1]
    box = weight_smem.index(place * BOXES + CONSUMER * ROWS // BOX_ROWS)
    return box.slice(CONSUMER * ROWS % BOX_ROWS, ROWS)


@gluon.jit
def _zeros(
    shared, place, CONSUMER: gl.constexpr, ROWS: gl.constexpr, RUNS: gl.constexpr, A: gl.constexpr
):
    """Zero points of the 4 slices of a block."""
    zeros = ()
    for j in gl.static_range(4):
        zeros += (_zero(shared, place * RUNS + j * RUNS // 4, CONSUMER, ROWS, A),)
    return zeros


@gluon.jit
def _factors(scale, J: gl.constexpr):
    """What code J is multiplied with, and what is added, for ``(code - 8) * scale`` in units of 2**-33."""
    # Triton writes numbers with six decimals: -2**-30 would be 0.
    bits = gl.full(scale.shape, 0xB080 - 0x10000, gl.int16, scale.type.layout)
    return scale * (2.0**96 if J % 2 else 2.0**100), scale * bits.to(gl.bfloat16, bitcast=True)


@gluon.jit
def _scaled_int4(
    words, shared, place, CONSUMER: gl.constexpr, ROWS: gl.constexpr, RUNS: gl.constexpr,
    A: gl.constexpr,
):  # fmt: skip
    """The 4 slices of ``words``, scaled by what unpacks them."""
    factors = ()
    for j in gl.static_range(4):
        scale = _scale_of(shared, place * RUNS + j * RUNS // 4, CONSUMER, ROWS, A)
        factors += (_factors(scale, j),)
    return scaled_less_8(words, factors[0], factors[1], factors[2], factors[3])  # type: ignore[misc]


@gluon.jit
def _weights_int4(
    shared, place, CONSUMER: gl.constexpr, ROWS: gl.constexpr, RUNS: gl.constexpr,
    A: gl.constexpr, SCALE: gl.constexpr,
):  # fmt: skip
    """The 4 slices of this consumer's rows in registers: ``code - zero``, exact, or scaled."""
    x_smem, _, _, zero_smem, _, _, _ = shared
    HALF: gl.constexpr = x_smem.dtype
    words = _rows(shared, place, CONSUMER, ROWS).load(A)
    if SCALE == "codes":
        weights = _scaled_int4(words, shared, place, CONSUMER, ROWS, RUNS, A)
    elif zero_smem is None:
        weights = less_8(words, HALF)
    else:
        z = _zeros(shared, place, CONSUMER, ROWS, RUNS, A)
        a0, _ = addends(z[0], HALF)
        _, a1 = addends(z[1], HALF)
        a2, _ = addends(z[2], HALF)
        _, a3 = addends(z[3], HALF)
        weights = less_zero(words, a0, a1, a2, a3, HALF)
    if SCALE == "weights":
        scaled = ()
        for j in gl.static_range(4):
            scaled += (_scaled(weights[j], shared, place, j, CONSUMER, ROWS, RUNS, A),)
        weights = scaled
    return weights


@gluon.jit
def _half_int8(
    shared, place, H: gl.constexpr, CONSUMER: gl.constexpr, ROWS: gl.constexpr,
    RUNS: gl.constexpr, A: gl.constexpr, SCALE: gl.constexpr,
):  # fmt: skip
    """Slices 2 H and 2 H + 1, as ``_weights_int4``; exact bf16 is in 128ths."""
    x_smem, _, _, zero_smem, _, _, _ = shared
    HALF: gl.constexpr = x_smem.dtype
    SLICE_K: gl.constexpr = x_smem.shape[2] // 2
    words = _rows(shared, place, CONSUMER, ROWS).slice(H * SLICE_K, SLICE_K, 1).load(A)
    if zero_smem is not None:
        # Zero points are stored less 128.
        run = place * RUNS + H * RUNS // 2
        low_zero = _zero(shared, run, CONSUMER, ROWS, A).to(gl.float32) + 128.0
        high_zero = low_zero
        if RUNS == 4:
            high_zero = _zero(shared, run + 1, CONSUMER, ROWS, A).to(gl.float32) + 128.0
    if HALF == gl.bfloat16:
        if zero_smem is None:
            low, high = less_128_over_128(words)
        else:
            low_addend = (low_zero * (-1.0 / 128.0)).to(HALF)
            high_addend = (high_zero * (-1.0 / 128.0)).to(HALF)
            low, high = less_zero_over_128(words, low_addend, high_addend)
    else:
        low, high = magic_int8(words, HALF)
        if zero_smem is None:
            low -= 1152.0
            high -= 1152.0
        else:
            low -= (low_zero + 1024.0).to(HALF)
            high -= (high_zero + 1024.0).to(HALF)
    if SCALE == "weights":
        low = _scaled(low, shared, place, 2 * H, CONSUMER, ROWS, RUNS, A)
        high = _scaled(high, shared, place, 2 * H + 1, CONSUMER, ROWS, RUNS, A)
    return low, high


@gluon.jit
def _joined(a, b, A: gl.constexpr):
    """Two operands as one, its columns those of the first, then of the second; moves nothing."""
    both = gl.join(a, b).permute((0, 2, 1)).reshape((a.shape[0], 2 * a.shape[1]))
    return gl.convert_layout(both, A, assert_trivial=True)


@gluon.jit
def _weights(
    shared, place, CONSUMER: gl.constexpr, ROWS: gl.constexpr, RUNS: gl.constexpr,
    MMA: gl.constexpr, SCALE: gl.constexpr, JOIN: gl.constexpr,
):  # fmt: skip
    """The slices of this consumer's rows, JOIN of them (1, 2 or 4) an operand."""
    x_smem, weight_smem, _, _, _, _, _ = shared
    A: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=MMA, k_width=2)
    if weight_smem.shape[2] == x_smem.shape[2]:
        a, b = _half_int8(shared, place, 0, CONSUMER, ROWS, RUNS, A, SCALE)
        c, d = _half_int8(shared, place, 1, CONSUMER, ROWS, RUNS, A, SCALE)
    else:
        a, b, c, d = _weights_int4(shared, place, CONSUMER, ROWS, RUNS, A, SCALE)
    if JOIN == 1:
        weights = (a, b, c, d)
    else:
        a = _joined(a, b, A)
        c = _joined(c, d, A)
        weights = (a, c)
        if JOIN == 4:
            weights = (_joined(a, c, A),)
    return weights


@gluon.jit
def _scale_of_sums(shared, run, CONSUMER: gl.constexpr, ROWS: gl.constexpr, MMA: gl.constexpr):
    """fp32 ``[ROWS, 1]``, of weights as they come."""
    return _in_units(_scale_of(shared, run, CONSUMER, ROWS, MMA).to(gl.float32), shared)


@gluon.jit
def _x(shared, place, J: gl.constexpr, JOIN: gl.constexpr):
    """Activations of operand J of a block's weights, ``[JOIN * SLICE_K, BLOCK_M]``."""
    x_smem, _, _, _, _, _, _ = shared
    if JOIN == 4:
        # The two boxes of a block lie as one of twice the columns would.
        SHAPE: gl.constexpr = [x_smem.shape[0] // 2, x_smem.shape[1], 2 * x_smem.shape[2]]
        LAYOUT: gl.constexpr = x_smem.layout
        x = reinterpreted(x_smem, x_smem.dtype, SHAPE, LAYOUT).index(place)
    elif JOIN == 2:
        x = x_smem.index(place * 2 + J)
    else:
        SLICE_K: gl.constexpr = x_smem.shape[2] // 2
        x = x_smem.index(place * 2 + J // 2).slice(J % 2 * SLICE_K, SLICE_K, 1)
    return x.permute((1, 0))


@gluon.jit
def _add(
    sums, weights, shared, place, FIRST: gl.constexpr, COUNT: gl.constexpr, NEW: gl.constexpr,
    JOIN: gl.constexpr,
):  # fmt: skip
    """``sums``, or zero if NEW, plus the products of COUNT operands from FIRST on, in flight."""
    for i in gl.static_range(FIRST, FIRST + COUNT):
        sums = warpgroup_mma(
            weights[i],
            _x(shared, place, i, JOIN),
            sums,
            use_acc=not NEW or i > FIRST,
            is_async=True,
        )
    return sums


@gluon.jit
def add_scaled_weights(
    acc, shared, slot, SPAN: gl.constexpr, CONSUMER: gl.constexpr, ROWS: gl.constexpr,
    RUNS: gl.constexpr, MMA: gl.constexpr, SCALE: gl.constexpr, JOIN: gl.constexpr,
):  # fmt: skip
    """``acc`` plus the blocks of a slot, weights scaled; the second is unpacked while the first runs."""
    read = ()
    for i in gl.static_range(SPAN):
        place = slot * SPAN + i
        weights = _weights(shared, place, CONSUMER, ROWS, RUNS, MMA, SCALE, JOIN)
        acc = _add(acc, weights, shared, place, 0, 4 // JOIN, False, JOIN)
        read += weights
    # The wait names the weights: their registers must stay as they are while wgmma reads them.
    return warpgroup_mma_wait(0, deps=(acc,) + read)[0]  # noqa: RUF005  no stars in Triton


@gluon.jit
def add_block(
    acc, zeros, shared, place, CONSUMER: gl.constexpr, ROWS: gl.constexpr, RUNS: gl.constexpr,
    MMA: gl.constexpr, JOIN: gl.constexpr,
):  # fmt: skip
    """``acc`` plus one block of K, each group's partial sum times its scale."""
    weights = _weights(shared, place, CONSUMER, ROWS, RUNS, MMA, "sums", JOIN)
    COUNT: gl.constexpr = 4 // JOIN // RUNS
    scales = ()
    sums = ()
    for i in gl.static_range(RUNS):
        scales += (_scale_of_sums(shared, place * RUNS + i, CONSUMER, ROWS, MMA),)
    for i in gl.static_range(RUNS):
        sums += (_add(zeros, weights, shared, place, i * COUNT, COUNT, True, JOIN),)
    sums = warpgroup_mma_wait(0, deps=sums + weights)
    for i in gl.static_range(RUNS):
        acc += sums[i] * scales[i]
    return acc


@gluon.jit
def add_two_blocks(
    acc, zeros, shared, place, CONSUMER: gl.constexpr, ROWS: gl.constexpr, MMA: gl.constexpr,
    JOIN: gl.constexpr,
):  # fmt: skip
    """``acc`` plus two blocks of K, one group each: the second is unpacked while the first runs."""
    s0 = _scale_of_sums(shared, place, CONSUMER, ROWS, MMA)
    s1 = _scale_of_sums(shared, place + 1, CONSUMER, ROWS, MMA)
    a = _weights(shared, place, CONSUMER, ROWS, 1, MMA, "sums", JOIN)
    p = _add(zeros, a, shared, place, 0, 4 // JOIN, True, JOIN)
    b = _weights(shared, place + 1, CONSUMER, ROWS, 1, MMA, "sums", JOIN)
    q = _add(zeros, b, shared, place + 1, 0, 4 // JOIN, True, JOIN)
    sums = warpgroup_mma_wait(0, deps=(p, q) + a + b)  # noqa: RUF005
    acc += sums[0] * s0
    acc += sums[1] * s1
    return acc
