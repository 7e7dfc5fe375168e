"""What a consumer of the Hopper kernel does with a block of K: unpack weights, multiply, scale."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    warpgroup_mma,
    warpgroup_mma_wait,
)

from pymllm_kernels.common.gluon_hopper import reinterpreted
from pymllm_kernels.w4a16.unpack_int4 import addends, less_8, less_zero, or_magic_int4
from pymllm_kernels.w4a16.unpack_int8 import less_128_over_128, less_zero_over_128, magic_int8


@gluon.jit
def _in_units(scale, shared, WHOLE: gl.constexpr):
    """Scales of the weights as they are unpacked: bf16 is in 64ths unless WHOLE, of 8 bits in 128ths."""
    x_smem, weight_smem, _, _, _, _, _ = shared
    if x_smem.dtype == gl.bfloat16:
        if weight_smem.shape[2] == x_smem.shape[2]:
            scale *= 128.0
        elif not WHOLE:
            scale *= 64.0
    return scale


@gluon.jit
def _zero(shared, run, CONSUMER: gl.constexpr, ROWS: gl.constexpr, A: gl.constexpr):
    """Zero points of this consumer's rows as they are stored, int8 ``[ROWS, 1]``."""
    _, _, _, zero_smem, _, _, _ = shared
    zero = zero_smem.index(run).slice(CONSUMER * ROWS, ROWS).load(gl.SliceLayout(1, A))
    return gl.expand_dims(zero, 1)


@gluon.jit
def _scaled(
    weight, shared, place, J: gl.constexpr, CONSUMER: gl.constexpr, ROWS: gl.constexpr,
    RUNS: gl.constexpr, A: gl.constexpr, WHOLE: gl.constexpr,
):  # fmt: skip
    """Slice J of weights times its scale, rounded to 16 bits."""
    x_smem, _, scale_smem, _, _, _, _ = shared
    run = place * RUNS + J * RUNS // 4
    scale = scale_smem.index(run).slice(CONSUMER * ROWS, ROWS).load(gl.SliceLayout(1, A))
    scale = _in_units(scale.to(x_smem.dtype), shared, WHOLE)
    return weight * gl.expand_dims(scale, 1)


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
def _whole_int4(
    words, shared, place, CONSUMER: gl.constexpr, ROWS: gl.constexpr, RUNS: gl.constexpr,
    A: gl.constexpr,
):  # fmt: skip
    """``code - zero`` of 4 slices, each shifted to the end of its word and subtracted from."""
    x_smem, _, _, zero_smem, _, _, _ = shared
    HALF: gl.constexpr = x_smem.dtype
    OFFSET: gl.constexpr = 128.0 if HALF == gl.bfloat16 else 1024.0
    OFFSET_BITS: gl.constexpr = 0x4300 if HALF == gl.bfloat16 else 0x6400
    codes = or_magic_int4(words, HALF)
    if zero_smem is not None:
        zeros = _zeros(shared, place, CONSUMER, ROWS, RUNS, A)
    weights = ()
    for j in gl.static_range(4):
        if zero_smem is None:
            weights += (codes[j] - (OFFSET + 8.0),)
        else:
            # Put into the mantissa of OFFSET as codes are: a conversion would delay every block of K.
            offset = (zeros[j].to(gl.int16) | OFFSET_BITS).to(HALF, bitcast=True)
            weights += (codes[j] - offset,)
    return weights


@gluon.jit
def _weights_int4(
    shared, place, CONSUMER: gl.constexpr, ROWS: gl.constexpr, RUNS: gl.constexpr,
    A: gl.constexpr, SCALE_WEIGHTS: gl.constexpr, WHOLE: gl.constexpr,
):  # fmt: skip
    """The 4 slices of this consumer's rows in registers: ``code - zero``, exact, or scaled."""
    x_smem, _, _, zero_smem, _, _, _ = shared
    HALF: gl.constexpr = x_smem.dtype
    words = _rows(shared, place, CONSUMER, ROWS).load(A)
    if WHOLE:
        weights = _whole_int4(words, shared, place, CONSUMER, ROWS, RUNS, A)
    elif zero_smem is None:
        weights = less_8(words, HALF)
    else:
        z = _zeros(shared, place, CONSUMER, ROWS, RUNS, A)
        a0, _ = addends(z[0], HALF)
        _, a1 = addends(z[1], HALF)
        a2, _ = addends(z[2], HALF)
        _, a3 = addends(z[3], HALF)
        weights = less_zero(words, a0, a1, a2, a3, HALF)
    if SCALE_WEIGHTS:
        scaled = ()
        for j in gl.static_range(4):
            scaled += (_scaled(weights[j], shared, place, j, CONSUMER, ROWS, RUNS, A, WHOLE),)
        weights = scaled
    return weights


@gluon.jit
def _half_int8(
    shared, place, H: gl.constexpr, CONSUMER: gl.constexpr, ROWS: gl.constexpr,
    RUNS: gl.constexpr, A: gl.constexpr, SCALE_WEIGHTS: gl.constexpr,
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
    if SCALE_WEIGHTS:
        low = _scaled(low, shared, place, 2 * H, CONSUMER, ROWS, RUNS, A, True)
        high = _scaled(high, shared, place, 2 * H + 1, CONSUMER, ROWS, RUNS, A, True)
    return low, high


@gluon.jit
def _joined(a, b, A: gl.constexpr):
    """Two operands as one, its columns those of the first, then of the second; moves nothing."""
    both = gl.join(a, b).permute((0, 2, 1)).reshape((a.shape[0], 2 * a.shape[1]))
    return gl.convert_layout(both, A, assert_trivial=True)


@gluon.jit
def _weights(
    shared, place, CONSUMER: gl.constexpr, ROWS: gl.constexpr, RUNS: gl.constexpr,
    MMA: gl.constexpr, SCALE_WEIGHTS: gl.constexpr, JOIN: gl.constexpr,
):  # fmt: skip
    """The slices of this consumer's rows, JOIN of them (1, 2 or 4) an operand."""
    x_smem, weight_smem, _, _, _, _, _ = shared
    A: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=MMA, k_width=2)
    if weight_smem.shape[2] == x_smem.shape[2]:
        a, b = _half_int8(shared, place, 0, CONSUMER, ROWS, RUNS, A, SCALE_WEIGHTS)
        c, d = _half_int8(shared, place, 1, CONSUMER, ROWS, RUNS, A, SCALE_WEIGHTS)
    else:
        # Slice by slice, two consumers of 128 tokens, fewer instructions are 1 to 5 % slower.
        WHOLE: gl.constexpr = SCALE_WEIGHTS and JOIN == 1
        a, b, c, d = _weights_int4(shared, place, CONSUMER, ROWS, RUNS, A, SCALE_WEIGHTS, WHOLE)
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
def _scale(shared, run, CONSUMER: gl.constexpr, ROWS: gl.constexpr, MMA: gl.constexpr):
    """fp32 ``[ROWS, 1]``, of weights as they come."""
    _, _, scale_smem, _, _, _, _ = shared
    scale = scale_smem.index(run).slice(CONSUMER * ROWS, ROWS).load(gl.SliceLayout(1, MMA))
    return gl.expand_dims(_in_units(scale.to(gl.float32), shared, False), 1)


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
    acc, shared, place, CONSUMER: gl.constexpr, ROWS: gl.constexpr, RUNS: gl.constexpr,
    MMA: gl.constexpr, JOIN: gl.constexpr,
):  # fmt: skip
    """``acc`` plus one block of K, with weights scaled and rounded to 16 bits."""
    weights = _weights(shared, place, CONSUMER, ROWS, RUNS, MMA, True, JOIN)
    acc = _add(acc, weights, shared, place, 0, 4 // JOIN, False, JOIN)
    # The wait names the weights: their registers must stay as they are while wgmma reads them.
    return warpgroup_mma_wait(0, deps=(acc,) + weights)[0]  # noqa: RUF005  no stars in Triton


@gluon.jit
def add_block(
    acc, zeros, shared, place, CONSUMER: gl.constexpr, ROWS: gl.constexpr, RUNS: gl.constexpr,
    MMA: gl.constexpr, JOIN: gl.constexpr,
):  # fmt: skip
    """``acc`` plus one block of K, each group's partial sum times its scale."""
    weights = _weights(shared, place, CONSUMER, ROWS, RUNS, MMA, False, JOIN)
    COUNT: gl.constexpr = 4 // JOIN // RUNS
    scales = ()
    sums = ()
    for i in gl.static_range(RUNS):
        scales += (_scale(shared, place * RUNS + i, CONSUMER, ROWS, MMA),)
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
    s0 = _scale(shared, place, CONSUMER, ROWS, MMA)
    s1 = _scale(shared, place + 1, CONSUMER, ROWS, MMA)
    a = _weights(shared, place, CONSUMER, ROWS, 1, MMA, False, JOIN)
    p = _add(zeros, a, shared, place, 0, 4 // JOIN, True, JOIN)
    b = _weights(shared, place + 1, CONSUMER, ROWS, 1, MMA, False, JOIN)
    q = _add(zeros, b, shared, place + 1, 0, 4 // JOIN, True, JOIN)
    sums = warpgroup_mma_wait(0, deps=(p, q) + a + b)  # noqa: RUF005
    acc += sums[0] * s0
    acc += sums[1] * s1
    return acc
