"""The int8 layer for up to 8 tokens on Hopper in one launch: every program quantizes all tokens itself.

A kernel for the quantization costs a launch, 0.8 us of calls of 7 to 30, and as much again until
weights are asked for. Here a program asks for the tokens, then for the first steps of its weights, and
quantizes while they are on their way. Codes of all of K stay in shared memory, as the operand of wgmma
that has 8 rows; weights are the other one and come through a ring, filled by one warp.

Tokens are read by every program: more of them take longer than a launch.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from pymllm_kernels.common.gluon_hopper import (
    load_early,
    next_slot,
    reinterpreted,
    slot_after,
    tma_load,
)
from pymllm_kernels.per_token_quant_int8.kernel import (
    asymmetric_codes,
    inverse_of,
    range_of,
    rounded_codes,
    size_bits,
    static_codes,
    zero_point_of,
)
from pymllm_kernels.w8a8_int8.hopper_epilogue import epilogue, load_feature_factors
from pymllm_kernels.w8a8_int8.hopper_fused_tuning import CHUNK, CODE_ROWS

_CHUNK_OF_TOKEN = gl.constexpr(CHUNK)
# Tokens are the columns of wgmma; bytes that a row of a swizzled tile has.
_CODE_ROWS = gl.constexpr(CODE_ROWS)
_ROW_BYTES = gl.constexpr(128)
_INFINITE = gl.constexpr(0x7F800000)
# Of two values each, NaN if one is. Sizes come with any sign.
_LARGER_SIZE_BF16 = gl.constexpr("max.NaN.xorsign.abs.bf16x2 $0, $1, $2;")
_LARGER_SIZE_FP16 = gl.constexpr("max.NaN.xorsign.abs.f16x2 $0, $1, $2;")
_LARGER_BF16 = gl.constexpr("max.NaN.bf16x2 $0, $1, $2;")
_SMALLER_BF16 = gl.constexpr("min.NaN.bf16x2 $0, $1, $2;")
_LARGER_FP16 = gl.constexpr("max.NaN.f16x2 $0, $1, $2;")
_SMALLER_FP16 = gl.constexpr("min.NaN.f16x2 $0, $1, $2;")


@gluon.jit
def _load_token(
    x_ptr, token: gl.constexpr, M, K, stride_xm, stride_xk,
    CHUNKS: gl.constexpr, EVEN: gl.constexpr,
):  # fmt: skip
    """A token in chunks ``[_CHUNK_OF_TOKEN / 128, 128]``, zeros beyond K and M.

    In the order of shared memory: in row ``r`` of a swizzled tile piece ``i`` of 16 codes lies in
    place ``i ^ r``.
    """
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [4, 1], [1, 0])
    row = gl.arange(0, _CHUNK_OF_TOKEN // _ROW_BYTES, layout=gl.SliceLayout(1, layout))
    place = gl.arange(0, _ROW_BYTES, layout=gl.SliceLayout(0, layout)) ^ (16 * token)
    chunks = ()
    for i in gl.static_range(CHUNKS):
        k = (row * _ROW_BYTES + i * _CHUNK_OF_TOKEN)[:, None] + place[None, :]
        inside = (k < K) & (token < M)
        at = token * stride_xm + k * stride_xk
        if EVEN:
            # Loads of 16 bytes: Triton does not see through the exclusive or.
            at = gl.max_contiguous(gl.multiple_of(at, [1, 8]), [1, 8])
            inside = gl.max_constancy(inside, [1, 8])
        chunks += (gl.load(x_ptr + at, mask=inside, other=0.0),)
    return chunks


@gluon.jit
def _side_by_side(values):
    """``[256]`` of each token as ``[256, tokens]``; moves nothing."""
    level = values
    for _ in gl.static_range(len(values).bit_length() - 1):
        pairs = ()
        for i in gl.static_range(len(level) // 2):
            pairs += (gl.join(level[i], level[i + len(level) // 2]),)
        level = pairs
    return gl.reshape(level[0], [_CHUNK_OF_TOKEN // 8, len(values)])


@gluon.jit
def _pairwise(assembly: gl.constexpr, a, b):
    """An instruction on two 16-bit values at a time, so that fp32 ones need not be kept."""
    return gl.inline_asm_elementwise(
        assembly, "=r,r,r", [a, b], dtype=a.dtype, is_pure=True, pack=2
    )


@gluon.jit
def _by_eight(values):
    """``[256, 8]`` of a token's ``[16, 128]``: neighbours are a thread's."""
    return gl.reshape(values, [_CHUNK_OF_TOKEN // 8, 8])


@gluon.jit
def _largest_sizes(tokens):
    """The fp32 bits of the largest size of each token, in every thread."""
    HALF: gl.constexpr = tokens[0][0].dtype
    LARGER: gl.constexpr = _LARGER_SIZE_BF16 if HALF == gl.bfloat16 else _LARGER_SIZE_FP16
    found = ()
    for r in gl.static_range(len(tokens)):
        size = tokens[r][0]
        for i in gl.static_range(1, len(tokens[r])):
            size = _pairwise(LARGER, size, tokens[r][i])
        # Of a thread's own values first: those of all tokens would not fit the registers.
        found += (gl.max(_by_eight(size_bits(size.to(gl.float32))), 1),)
    # Of all tokens at once: one after the other, the exchange between warps takes 0.24 us a token.
    return gl.max(_side_by_side(found), 0)


@gluon.jit
def _extremes(tokens):
    """The largest and the smallest value of each token and 0, NaN if there is one, in every thread."""
    HALF: gl.constexpr = tokens[0][0].dtype
    MORE: gl.constexpr = _LARGER_BF16 if HALF == gl.bfloat16 else _LARGER_FP16
    LESS: gl.constexpr = _SMALLER_BF16 if HALF == gl.bfloat16 else _SMALLER_FP16
    highs = ()
    lows = ()
    for r in gl.static_range(len(tokens)):
        high = tokens[r][0]
        low = high
        for i in gl.static_range(1, len(tokens[r])):
            high = _pairwise(MORE, high, tokens[r][i])
            low = _pairwise(LESS, low, tokens[r][i])
        high = _by_eight(high.to(gl.float32))
        low = _by_eight(low.to(gl.float32))
        high, low = gl.reduce((high, low), 1, range_of)
        highs += (high,)
        lows += (low,)
    high, low = gl.reduce((_side_by_side(highs), _side_by_side(lows)), 0, range_of)
    return range_of(high, low, 0.0, 0.0)


@gluon.jit
def _one_of(values, token: gl.constexpr):
    """The value of a token, of those that every thread has."""
    index = gl.arange(0, values.shape[0], layout=values.type.layout)
    return gl.sum(gl.where(index == token, values, gl.zeros_like(values)), 0)


@gluon.jit
def _quantize_all(tokens, given, rows_of_codes, scales, zeros, ZERO: gl.constexpr):
    """Writes codes, scales and zero points of all tokens to shared memory; one warpgroup.

    ``given``: the scale and the zero point of all of them, or None: found here.
    """
    TOKENS: gl.constexpr = len(tokens)
    if given is not None:
        scale, shift = given
        _write_given(tokens, rows_of_codes, scale, shift)
        layout: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
        scales.store(gl.zeros([_CODE_ROWS], gl.float32, layout) + scale)
        if ZERO:
            zeros.store(gl.zeros([_CODE_ROWS], gl.int32, layout) + shift)
    elif ZERO:
        high, low = _extremes(tokens)
        factor, inverse, scale, zero = zero_point_of(high, low)
        shift = zero.to(gl.int32)
        finite = (high - low < float("inf")).to(gl.int32)
        _write_asymmetric(tokens, rows_of_codes, factor, inverse, shift, finite)
        scales.slice(0, TOKENS).store(scale)
        zeros.slice(0, TOKENS).store(shift)
    else:
        top = _largest_sizes(tokens)
        size = top.to(gl.float32, bitcast=True)
        factor, inverse = inverse_of(size, 127.0)
        _write_symmetric(tokens, rows_of_codes, top, factor, inverse)
        scales.slice(0, TOKENS).store(gl.div_rn(size, 127.0))
    # The matrix instructions read codes through another way than stores take.
    fence_async_shared()


@gluon.jit
def _write_given(tokens, rows_of_codes, scale, shift):
    for r in gl.static_range(len(tokens)):
        for i in gl.static_range(len(tokens[r])):
            codes = static_codes(tokens[r][i].to(gl.float32), scale, shift, True)
            _write(rows_of_codes, r, i, codes)


@gluon.jit
def _write_asymmetric(tokens, rows_of_codes, factor, inverse, shift, finite):
    for r in gl.static_range(len(tokens)):
        f = _one_of(factor, r)
        v = _one_of(inverse, r)
        s = _one_of(shift, r)
        usual = _one_of(finite, r) != 0
        for i in gl.static_range(len(tokens[r])):
            codes = asymmetric_codes(tokens[r][i].to(gl.float32), f, v, s)
            _write(rows_of_codes, r, i, gl.where(usual, codes, s.to(gl.int8)))


@gluon.jit
def _write_symmetric(tokens, rows_of_codes, top, factor, inverse):
    # Zeros, as tokens beyond M are, are codes of 0 either way.
    usual = ((factor == 1.0) | (top == 0)) & (top < _INFINITE)
    if gl.min(usual.to(gl.int32), 0) != 0:
        # Nearly always: a product and a selection a value less.
        for r in gl.static_range(len(tokens)):
            v = _one_of(inverse, r)
            for i in gl.static_range(len(tokens[r])):
                codes = rounded_codes(tokens[r][i].to(gl.float32) * v)
                _write(rows_of_codes, r, i, codes)
    else:
        for r in gl.static_range(len(tokens)):
            f = _one_of(factor, r)
            v = _one_of(inverse, r)
            finite = _one_of(top, r) < _INFINITE
            for i in gl.static_range(len(tokens[r])):
                codes = rounded_codes((tokens[r][i].to(gl.float32) * f) * v)
                _write(rows_of_codes, r, i, gl.where(finite, codes, 0))


@gluon.jit
def _write(rows_of_codes, token: gl.constexpr, chunk: gl.constexpr, codes):
    rows_of_codes.index(chunk).slice(_ROW_BYTES * token, _ROW_BYTES, 1).store(codes)


@gluon.jit
def _load_weights(
    weight_desc, slots, full, empty, tiles, steps, SLOTS: gl.constexpr, EARLY: gl.constexpr
):
    """Keeps the ring full; one warp."""
    BLOCK_N: gl.constexpr = weight_desc.block_shape[0]
    BLOCK_K: gl.constexpr = weight_desc.block_shape[1]
    loaded = gl.minimum(steps, EARLY)
    slot, phase = slot_after(loaded, SLOTS)
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        first = gl.where(tile == gl.program_id(0), loaded, 0)
        for step in range(first, steps):
            mbarrier.wait(empty.index(slot), phase)
            mbarrier.expect(full.index(slot), BLOCK_N * BLOCK_K)
            # Fewer features than a matrix instruction has rows fill the first of its slot.
            place = slots.index(slot).slice(0, BLOCK_N)
            tma_load(weight_desc, [tile * BLOCK_N, step * BLOCK_K], full.index(slot), place)
            slot, phase = next_slot(slot, phase, SLOTS)


@gluon.jit
def _multiply(
    tokens, given, rows_of_codes, codes, slots, scales, zeros, full, empty, ready, pointers,
    M, N, tiles, steps, stride_ws,
    INDEX: gl.constexpr, CONSUMERS: gl.constexpr, BLOCK_N: gl.constexpr, SLOTS: gl.constexpr,
):  # fmt: skip
    """Multiplies the ring's weights by the codes and writes the outputs; one warpgroup.

    The first one quantizes the tokens before. Two share each tile by features.
    """
    w_scale_ptr, column_sum_ptr, bias_ptr, out_ptr = pointers
    ZERO: gl.constexpr = column_sum_ptr is not None
    ROWS: gl.constexpr = slots.shape[1] // CONSUMERS
    FEATURES: gl.constexpr = BLOCK_N // CONSUMERS
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, _CODE_ROWS, 32])
    OF_TOKENS: gl.constexpr = gl.SliceLayout(0, layout)
    if INDEX == 0:
        _quantize_all(tokens, given, rows_of_codes, scales, zeros, ZERO)
        if CONSUMERS > 1:
            mbarrier.arrive(ready, count=1)
    else:
        mbarrier.wait(ready, 0)
    s_m = scales.load(OF_TOKENS)
    zero = 0
    if ZERO:
        zero = zeros.load(OF_TOKENS)
    row = gl.arange(0, ROWS, layout=gl.SliceLayout(1, layout))
    token = gl.arange(0, _CODE_ROWS, layout=OF_TOKENS)
    nothing = gl.zeros((ROWS, _CODE_ROWS), gl.int32, layout)
    slot = 0
    phase = 0
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        # Not ``slot``: a variable that enters the loop as the value its body assigns is not carried.
        previous = 0
        feature = tile * BLOCK_N + INDEX * FEATURES + row
        there = (row < FEATURES) & (feature < N)
        # They arrive beside the multiplications.
        s_n, column_sum, bias = load_feature_factors(
            feature, there, w_scale_ptr, column_sum_ptr, bias_ptr, stride_ws
        )
        acc = nothing
        for step in range(steps):
            mbarrier.wait(full.index(slot), phase)
            a = slots.index(slot).slice(INDEX * ROWS, ROWS)
            acc = warpgroup_mma(a, codes.index(step).permute((1, 0)), acc, is_async=True)
            # The step before this one is done: its slot may be filled again.
            acc = warpgroup_mma_wait(1, deps=[acc])
            mbarrier.arrive(empty.index(previous), count=1, pred=step > 0)
            previous = slot
            slot, phase = next_slot(slot, phase, SLOTS)
        acc = warpgroup_mma_wait(0, deps=[acc])
        mbarrier.arrive(empty.index(previous), count=1)
        out = epilogue(
            acc, s_m, s_n, zero, column_sum, bias, ZERO, bias_ptr is not None, True,
            out_ptr.dtype.element_ty,
        )  # fmt: skip
        at = (token * N)[None, :] + feature[:, None]
        gl.store(out_ptr + at, out, mask=(token < M)[None, :] & there[:, None])


# Compiled once for all N, and for all K of as many chunks.
@gluon.jit(do_not_specialize=["M"])
def w8a8_int8_fused_hopper(
    x_ptr,  # [M, K], any strides
    weight_desc,  # int8 [N, K], boxes [features of a tile, K of a step]
    x_scale_ptr,  # fp32 [1], or None: found here
    x_zero_ptr,  # int32 [1] of a given scale, or None
    w_scale_ptr,  # fp32 [N] or [1] (stride_ws = 0)
    column_sum_ptr,  # int32 [N] of activations with a zero point, or None
    bias_ptr,  # [N] or None
    out_ptr,  # [M, N], contiguous
    M, stride_xm, stride_xk,
    stride_ws: gl.constexpr,
    TOKENS: gl.constexpr,  # most tokens: 1, 2, 4 or 8
    CHUNKS: gl.constexpr,  # of K
    EVEN: gl.constexpr,  # whether values of a token are neighbours, on 16 bytes
    CONSUMERS: gl.constexpr,  # 1 or 2
    SLOTS: gl.constexpr,  # steps that the ring holds
    EARLY: gl.constexpr,  # of these, those that are asked for before the warps part
    REGISTERS: gl.constexpr,  # of a thread of the second consumer
):  # fmt: skip
    BLOCK_N: gl.constexpr = weight_desc.block_shape[0]
    BLOCK_K: gl.constexpr = weight_desc.block_shape[1]
    N = weight_desc.shape[0]
    K = weight_desc.shape[1]
    tiles = gl.cdiv(N, BLOCK_N)
    steps = gl.cdiv(K, BLOCK_K)
    # Before weights: behind them they would wait for the memory.
    tokens = ()
    for r in gl.static_range(TOKENS):
        tokens += (_load_token(x_ptr, r, M, K, stride_xm, stride_xk, CHUNKS, EVEN),)
    if x_scale_ptr is None:
        given: gl.constexpr = None
    elif x_zero_ptr is None:
        given = (gl.load(x_scale_ptr), 0)
    else:
        given = (gl.load(x_scale_ptr), gl.load(x_zero_ptr))
    codes_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for(
        [_CODE_ROWS, BLOCK_K], gl.int8
    )
    codes = gl.allocate_shared_memory(
        gl.int8, [CHUNKS * _CHUNK_OF_TOKEN // BLOCK_K, _CODE_ROWS, BLOCK_K], codes_layout
    )
    # As the tokens are written: 8 swizzled rows of 128 bytes each.
    plain: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    rows_of_codes = reinterpreted(
        codes, gl.int8, [CHUNKS, _CHUNK_OF_TOKEN // _ROW_BYTES, _CODE_ROWS * _ROW_BYTES], plain
    )
    slots = gl.allocate_shared_memory(
        gl.int8, [SLOTS, max(BLOCK_N, 64), BLOCK_K], weight_desc.layout
    )
    flat: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    scales = gl.allocate_shared_memory(gl.float32, [_CODE_ROWS], flat)
    zeros = gl.allocate_shared_memory(gl.int32, [_CODE_ROWS], flat)
    full = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    # Only where it is used: see ``testing.aot.idle_barriers``. 24 steps of 64 features got wrong scales.
    if CONSUMERS > 1:
        ready = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    else:
        ready: gl.constexpr = None
    # Each takes a barrier of the warps: first what the first weights need.
    for i in gl.static_range(EARLY):
        mbarrier.init(full.index(i), count=1)
    fence_async_shared()
    load_early(weight_desc, gl.program_id(0) * BLOCK_N, slots, full, steps, EARLY)
    for i in gl.static_range(SLOTS):
        mbarrier.init(empty.index(i), count=CONSUMERS)
        if i >= EARLY:
            mbarrier.init(full.index(i), count=1)
    if CONSUMERS > 1:
        mbarrier.init(ready, count=1)
    fence_async_shared()
    pointers = (w_scale_ptr, column_sum_ptr, bias_ptr, out_ptr)
    if CONSUMERS == 1:
        gl.warp_specialize([
            (_multiply, (
            tokens, given, rows_of_codes, codes, slots, scales, zeros, full, empty, ready, pointers,
            M, N, tiles, steps, stride_ws, 0, CONSUMERS, BLOCK_N, SLOTS)),
            (_load_weights, (weight_desc, slots, full, empty, tiles, steps, SLOTS, EARLY)),
        ], [1], [24])  # fmt: skip
    else:
        gl.warp_specialize([
            (_multiply, (
            tokens, given, rows_of_codes, codes, slots, scales, zeros, full, empty, ready, pointers,
            M, N, tiles, steps, stride_ws, 0, CONSUMERS, BLOCK_N, SLOTS)),
            (_multiply, (
            None, None, rows_of_codes, codes, slots, scales, zeros, full, empty, ready, pointers,
            M, N, tiles, steps, stride_ws, 1, CONSUMERS, BLOCK_N, SLOTS)),
            (_load_weights, (weight_desc, slots, full, empty, tiles, steps, SLOTS, EARLY)),
        ], [4, 1], [REGISTERS, 24])  # fmt: skip
