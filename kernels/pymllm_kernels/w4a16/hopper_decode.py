"""The W4A16 kernel for up to 16 tokens on Hopper, written in Gluon.

Work is cut by rows only, 16 output features at a time: an even share of row blocks for every program,
so that nothing is shared between programs. The warps of a program split its row blocks and K, and add up
over K once a pass, in a fixed order. Weights go from memory to the registers that multiply them, without
shared memory: the sum over K may run in any order, so a thread takes 16 neighbouring bytes of a row of
the layout, and the same inputs of ``x``, for its part of ``mma.sync``. Its two rows are neighbours, so
that one load has both scales. A row block's next words are fetched as soon as it is multiplied.

Instructions a weight decide. A code is not converted but masked: its bits, as a 16-bit float, are the
subnormal number ``code * 2**-133`` (bf16, ``2**-24`` in fp16), exact, and so is 16 times that where
the code lies 4 bits higher. Zero points are subtracted as multiples of the sum of ``x`` over a group,
which tensor cores take too, once for all rows. Scales multiply the fp32 sum of a group.

bf16 activations are multiplied by 2**64 first, as products with 2**-133 would be subnormal in fp32:
magnitudes from 2**-57 to 2**63 are exact.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.language.extra.cuda import gdc_wait

from pymllm_kernels.common.row_blocks import add_warps, next_step, stack
from pymllm_kernels.w4a16.hopper_decode_inputs import (
    kept,
    load_order,
    load_step,
    load_token,
    load_x,
    raised,
)

# Codes of slices 1 and 3 stay 4 bits up, times 16.
_UNPACK_BF16 = gl.constexpr("""{
.reg .b32 t;
and.b32 $0, $4, 0x000F000F;
and.b32 $1, $4, 0x00F000F0;
shr.u32 t, $4, 8;
and.b32 $2, t, 0x000F000F;
and.b32 $3, t, 0x00F000F0;
}""")
# Every code in the lowest bits: x / 16 would not be exact.
_UNPACK_FP16 = gl.constexpr("""{
.reg .b32 t;
and.b32 $0, $4, 0x000F000F;
shr.u32 t, $4, 4;
and.b32 $1, t, 0x000F000F;
shr.u32 t, $4, 8;
and.b32 $2, t, 0x000F000F;
shr.u32 t, $4, 12;
and.b32 $3, t, 0x000F000F;
}""")
# 4 registers of a row block's upper 8 rows, 4 of its lower, 4 of x: two steps of 16 inputs.
_MMA = """{
mma.sync.aligned.m16n8k16.row.col.f32.HALF.HALF.f32
  {$0,$1,$2,$3}, {$4,$8,$5,$9}, {$12,$13}, {$16,$17,$18,$19};
mma.sync.aligned.m16n8k16.row.col.f32.HALF.HALF.f32
  {$0,$1,$2,$3}, {$6,$10,$7,$11}, {$14,$15}, {$0,$1,$2,$3};
}"""
_MMA_BF16 = gl.constexpr(_MMA.replace("HALF", "bf16"))
_MMA_FP16 = gl.constexpr(_MMA.replace("HALF", "f16"))
# A pair of scales to fp32, in weights' units.
_SCALES = """{
.reg .b32 t;
mov.b32 t, BY;
mul.rn.bf16x2 t, $2, t;
shl.b32 $0, t, 16;
and.b32 $1, t, 0xFFFF0000;
}"""
_SCALES_OF_BF16 = gl.constexpr(_SCALES.replace("BY", "0x62006200"))  # 2**69
_SCALES_OF_FP16 = gl.constexpr(_SCALES.replace("BY", "0x4B804B80"))  # 2**24
# fp16 scales times 2**24 are beyond fp16.
_SCALES_FP16 = """{
.reg .f16 a, b;
.reg .f32 t;
mov.b32 {a, b}, $2;
cvt.f32.f16 t, a;
mul.f32 t, t, BY;
mov.b32 $0, t;
cvt.f32.f16 t, b;
mul.f32 t, t, BY;
mov.b32 $1, t;
}"""
_SCALES_FP16_OF_BF16 = gl.constexpr(_SCALES_FP16.replace("BY", "0f62000000"))
_SCALES_FP16_OF_FP16 = gl.constexpr(_SCALES_FP16.replace("BY", "0f4B800000"))


@gluon.jit
def _unpack(words, HALF: gl.constexpr):
    """Pairs of 16-bit words to the 4 slices' pairs of subnormal weights."""
    asm: gl.constexpr = _UNPACK_BF16 if HALF == gl.bfloat16 else _UNPACK_FP16
    return gl.inline_asm_elementwise(
        asm, "=r,=r,=r,=r,r", [words], dtype=(gl.int32, gl.int32, gl.int32, gl.int32),
        is_pure=True, pack=1,
    )  # fmt: skip


@gluon.jit
def _mma(upper, lower, x, acc, HALF: gl.constexpr):
    """``acc`` plus one slice: ``[16 rows, 32 inputs] @ [32 inputs, 8 tokens]`` a warp."""
    asm: gl.constexpr = _MMA_BF16 if HALF == gl.bfloat16 else _MMA_FP16
    return gl.inline_asm_elementwise(
        asm, "=&f,=&f,=&f,=&f,r,r,r,r,r,r,r,r,r,r,r,r,f,f,f,f", [upper, lower, x, acc],
        dtype=gl.float32, is_pure=True, pack=4,
    )  # fmt: skip


@gluon.jit
def _part(values, FIRST: gl.constexpr, COUNT: gl.constexpr):
    """``COUNT`` values, fewer where they end."""
    some = ()
    for i in gl.static_range(FIRST, FIRST + COUNT):
        if i < len(values):
            some += (values[i],)
    return some


@gluon.jit
def _both(upper, lower, L3: gl.constexpr):
    """Values of a thread's two rows ``[WARPS, 8]`` as the accumulator has them."""
    c = gl.arange(0, 16, layout=gl.SliceLayout(0, gl.SliceLayout(0, L3)))
    is_upper = gl.expand_dims(gl.expand_dims(c % 4 < 2, 0), 0)
    return gl.where(is_upper, gl.expand_dims(upper, 2), gl.expand_dims(lower, 2))


@gluon.jit
def _places(sources, sizes, block, rb, g, c, RUNS: gl.constexpr, GROUP_SIZE: gl.constexpr):
    """Where a warp's block of K has the words of row block ``rb``, and its groups their scales."""
    weight_ptr, scale_ptr, zero_ptr = sources
    N, groups = sizes
    # 64 bits: a layer may have 2**31 words.
    at = (block.to(gl.int64) * N + (rb * 16 + 2 * g)) * 16
    places = (weight_ptr.to(gl.pointer_type(gl.int32)) + (gl.expand_dims(at, 2) + c),)
    for run in gl.static_range(RUNS):
        # K may end inside the block.
        group = gl.minimum((block * 128 + run * (128 // RUNS)) // GROUP_SIZE, groups - 1)
        pair = group * (N // 2) + (rb * 8 + g)
        places += (scale_ptr.to(gl.pointer_type(gl.int32)) + pair,)
        if zero_ptr is not None:
            places += (zero_ptr.to(gl.pointer_type(gl.int16)) + pair,)
    return places


@gluon.jit
def _load_units(
    places, own, last, FIRST: gl.constexpr, COUNT: gl.constexpr, ROWS: gl.constexpr,
    ROW_WARPS: gl.constexpr,
):  # fmt: skip
    """One block of K a warp of its row blocks from FIRST on: their words, scales and zero points.

    ``own`` is a warp's first row block; those from ``last`` on are zeros.
    """
    units = ()
    for R in gl.static_range(FIRST, FIRST + COUNT):
        if R < ROWS:
            there = own < last - R * ROW_WARPS
            mask = gl.expand_dims(there, 2)
            # Not kept in the L1, which x is read from.
            upper = places[0] + R * ROW_WARPS * 256
            units += (gl.load(upper, mask=mask, other=0, cache_modifier=".cg"),)
            units += (gl.load(upper + 16, mask=mask, other=0, cache_modifier=".cg"),)
            for i in gl.static_range(1, len(places)):
                units += (gl.load(places[i] + R * ROW_WARPS * 8, mask=there, other=0),)
    return units


@gluon.jit
def _sums(
    xs, zeros, ZERO: gl.constexpr, HALF: gl.constexpr, RUNS: gl.constexpr, TILES: gl.constexpr
):
    """-8 times the sum of x over a group (-1 if layers have ZERO points), in weights' units."""
    ONE: gl.constexpr = (0x80018001 if ZERO else 0x80088008) - (1 << 32)
    SIXTEEN: gl.constexpr = (0x80108010 if ZERO else 0x80808080) - (1 << 32)
    even = gl.full(zeros.shape, ONE, gl.int32, zeros.type.layout)
    odd = even
    if HALF == gl.bfloat16:
        odd = gl.full(zeros.shape, SIXTEEN, gl.int32, zeros.type.layout)
    ones = ((even, odd, even, odd), (even, odd, even, odd))
    sums = ()
    for run in gl.static_range(RUNS):
        for n in gl.static_range(TILES):
            sums += (_products(ones, xs, zeros, zeros, n, run, HALF, RUNS, TILES),)
    return sums


@gluon.jit
def _products(
    weights, xs, start, zeros, n: gl.constexpr, run: gl.constexpr, HALF: gl.constexpr,
    RUNS: gl.constexpr, TILES: gl.constexpr,
):  # fmt: skip
    """``start`` plus the products of a group's slices with tile ``n`` of x."""
    upper, lower = weights
    FIRST: gl.constexpr = run * 4 // RUNS
    if RUNS * TILES == 1:
        # Each product waits 33 cycles for the sum before it: two sums, half of that.
        other = zeros
        for j in gl.static_range(2):
            start = _mma(upper[2 * j], lower[2 * j], xs[2 * j], start, HALF)
            other = _mma(upper[2 * j + 1], lower[2 * j + 1], xs[2 * j + 1], other, HALF)
        return start + other
    for j in gl.static_range(4 // RUNS):
        start = _mma(upper[FIRST + j], lower[FIRST + j], xs[n * 4 + FIRST + j], start, HALF)
    return start


@gluon.jit
def _scales(pairs, HALF: gl.constexpr, SCALE: gl.constexpr):
    """The scales of two rows, in weights' units."""
    if SCALE == gl.bfloat16:
        asm: gl.constexpr = _SCALES_OF_BF16 if HALF == gl.bfloat16 else _SCALES_OF_FP16
    else:
        asm: gl.constexpr = _SCALES_FP16_OF_BF16 if HALF == gl.bfloat16 else _SCALES_FP16_OF_FP16
    upper, lower = gl.inline_asm_elementwise(
        asm, "=r,=r,r", [pairs], dtype=(gl.int32, gl.int32), is_pure=True, pack=1
    )
    return upper.to(gl.float32, bitcast=True), lower.to(gl.float32, bitcast=True)


@gluon.jit
def _add_units(
    acc, units, sums, xs, zeros, ZERO: gl.constexpr, HALF: gl.constexpr, SCALE: gl.constexpr,
    RUNS: gl.constexpr, TILES: gl.constexpr, L3: gl.constexpr,
):  # fmt: skip
    """The accumulators of some row blocks plus one block of K."""
    EACH: gl.constexpr = 2 if ZERO else 1
    added = ()
    for i in gl.static_range(len(acc) // TILES):
        unit = _part(units, i * (2 + RUNS * EACH), 2 + RUNS * EACH)
        weights = (_unpack(unit[0], HALF), _unpack(unit[1], HALF))
        for n in gl.static_range(TILES):
            total = acc[i * TILES + n]
            for run in gl.static_range(RUNS):
                part = sums[run * TILES + n]
                if ZERO:
                    # After the products, which need not wait for it then.
                    points = unit[3 + run * EACH].to(gl.int32)
                    points = _both((points & 15).to(gl.float32), (points >> 8).to(gl.float32), L3)
                    raw = _products(weights, xs, zeros, zeros, n, run, HALF, RUNS, TILES)
                    part = gl.fma(part, points, raw)
                else:
                    part = _products(weights, xs, part, zeros, n, run, HALF, RUNS, TILES)
                upper, lower = _scales(unit[2 + run * EACH], HALF, SCALE)
                total = gl.fma(part, _both(upper, lower, L3), total)
            added += (total,)
    return added


@gluon.jit
def _finish(
    acc, zeros, parts, out_ptr, bias_ptr, first, last, M, N, ROWS: gl.constexpr,
    PLACES: gl.constexpr, TILES: gl.constexpr, WARPS: gl.constexpr, ROW_WARPS: gl.constexpr,
):  # fmt: skip
    """Adds up the warps' sums of the row blocks from ``first`` on, and stores them."""
    FLAT: gl.constexpr = gl.BlockedLayout([1, 1], [1, 32], [ROW_WARPS, WARPS // ROW_WARPS], [1, 0])
    total = add_warps(stack(acc, zeros, PLACES), parts, FLAT, ROW_WARPS, WARPS)
    r = gl.expand_dims(gl.arange(0, ROW_WARPS, layout=gl.SliceLayout(1, FLAT)), 1)
    i = gl.expand_dims(gl.arange(0, PLACES * 128, layout=gl.SliceLayout(0, FLAT)), 0)
    block = first + i // (128 * TILES) * ROW_WARPS + r
    row = block * 16 + i % 128 // 16 * 2 + i % 4 // 2
    token = i // 128 % TILES * 8 + i % 16 // 4 * 2 + i % 2
    mask = (block < last) & (i < ROWS * TILES * 128) & (token < M)
    if bias_ptr is not None:
        total += gl.load(bias_ptr + row, mask=mask, other=0.0).to(gl.float32)
    out = out_ptr + token.to(gl.int64) * N + row
    gl.store(out, total.to(out_ptr.dtype.element_ty), mask=mask)


# Compiled once for all shapes and numbers of tokens.
@gluon.jit(do_not_specialize=["M", "N", "K", "groups", "stride_x8", "share", "more"])
def w4a16_decode_hopper(
    x_ptr,  # [M, K], rows of neighbours on 16 bytes
    perm_ptr,  # int32 [K], the input at each column of the weight for M = 1, or None
    weight_ptr,  # int16 [blocks, N, 32]
    scale_ptr,  # [groups, N]
    zero_ptr,  # int8 [groups, N] or None
    bias_ptr,  # [N] or None
    out_ptr,  # [M, N], contiguous
    M, N, K, groups,
    stride_x8,  # of a row of x, in pieces of 8 elements
    share, more,  # row blocks of a program, and how many programs have one more
    HALF: gl.constexpr,  # dtype of x
    GROUP_SIZE: gl.constexpr,
    RUNS: gl.constexpr,  # groups a block of K: 1, 2 or 4
    ROWS: gl.constexpr,  # row blocks of 16 features that a warp has at once
    MIX: gl.constexpr,  # row blocks whose instructions are mixed
    PLACES: gl.constexpr,  # the power of two that holds ROWS * TILES
    TILES: gl.constexpr,  # tiles of 8 tokens, 1 or 2
    DEPENDENT: gl.constexpr,  # whether it is launched while x is still being written
    ROW: gl.constexpr,  # the power of two that holds K of a token kept in shared memory, or 0
    WARPS: gl.constexpr,
    ROW_WARPS: gl.constexpr,  # warps with other row blocks of the same blocks of K
):  # fmt: skip
    # Thread (g, t) of a warp: 4 registers of rows 2 g and 2 g + 1, or of token g.
    L3: gl.constexpr = gl.BlockedLayout([1, 1, 4], [1, 8, 4], [WARPS, 1, 1], [2, 1, 0])
    OF_ROWS: gl.constexpr = gl.SliceLayout(2, L3)
    K_WARPS: gl.constexpr = WARPS // ROW_WARPS
    warp = gl.expand_dims(gl.arange(0, WARPS, layout=gl.SliceLayout(1, OF_ROWS)), 1)
    r = warp % ROW_WARPS
    w = warp // ROW_WARPS
    g = gl.expand_dims(gl.arange(0, 8, layout=gl.SliceLayout(0, OF_ROWS)), 0)
    c = gl.arange(0, 16, layout=gl.SliceLayout(0, gl.SliceLayout(0, L3)))
    c = gl.expand_dims(gl.expand_dims(c, 0), 0)
    program = gl.program_id(0)
    first = program * share + gl.minimum(program, more)
    last = first + share + gl.where(program < more, 1, 0)
    blocks = gl.cdiv(K, 128)
    steps = gl.cdiv(blocks, K_WARPS)
    sources = (weight_ptr, scale_ptr, zero_ptr)
    sizes = (N, groups)
    zeros = gl.zeros([WARPS, 8, 16], gl.float32, L3)
    ZERO: gl.constexpr = zero_ptr is not None
    SCALE: gl.constexpr = scale_ptr.dtype.element_ty
    EACH: gl.constexpr = 2 + RUNS * (2 if ZERO else 1)
    TOGETHER: gl.constexpr = ROWS * ROW_WARPS
    if ROW > 0:
        # Before the weights: it would come behind all that are asked for at once.
        token = load_token(x_ptr, K, ROW, WARPS)
    if perm_ptr is not None:
        source = load_order(perm_ptr, K, ROW, WARPS)
    places = _places(sources, sizes, w, first + r, g, c, RUNS, GROUP_SIZE)
    own = gl.where(w < blocks, first + r, last)
    units = _load_units(places, own, last, 0, ROWS, ROWS, ROW_WARPS)
    if DEPENDENT:
        gdc_wait()
    if perm_ptr is not None:
        token = gl.gather(token, source, 0)
    if ROW > 0:
        row = kept(token, HALF, WARPS, ROW_WARPS)
    else:
        loaded = load_x(x_ptr, w, g, c, M, K // 8, stride_x8, TILES)
    # Where the token was before it was put in order.
    parts = gl.allocate_shared_memory(
        gl.float32, [WARPS, PLACES * 128], gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    )
    acc = (zeros,) * (ROWS * TILES)
    rb = first
    k = 0
    for _ in range(gl.cdiv(last - first, TOGETHER) * steps):
        # Row block and step of what is fetched meanwhile.
        next_rb, next_k = next_step(rb, k, steps, TOGETHER)
        block = next_k * K_WARPS + w
        places = _places(sources, sizes, block, next_rb + r, g, c, RUNS, GROUP_SIZE)
        # Past the last for what is beyond K.
        own = gl.where(block < blocks, next_rb + r, last)
        if ROW > 0:
            # From shared memory not a step ahead: its registers and moves cost more than the wait.
            xs = load_step(row, k, L3, WARPS, ROW_WARPS)
        else:
            xs = raised(loaded, HALF)
            pieces = gl.where(next_rb < last, K // 8, 0)
            loaded = load_x(x_ptr, block, g, c, M, pieces, stride_x8, TILES)
        sums = _sums(xs, zeros, ZERO, HALF, RUNS, TILES)
        added = ()
        fetched = ()
        for R in gl.static_range(0, ROWS, MIX):
            mixed = _part(acc, R * TILES, MIX * TILES)
            unit = _part(units, R * EACH, MIX * EACH)
            # A branch, so that row blocks are multiplied one after the other and each one's next words
            # are on their way meanwhile. The compiler mixed all of them, and waited for all.
            if rb + R * ROW_WARPS < last:
                mixed = _add_units(mixed, unit, sums, xs, zeros, ZERO, HALF, SCALE, RUNS, TILES, L3)
                unit = _load_units(places, own, last, R, MIX, ROWS, ROW_WARPS)
            added += mixed
            fetched += unit
        acc = added
        units = fetched
        if k == steps - 1:
            _finish(
                acc, zeros, parts, out_ptr, bias_ptr, rb, last, M, N,
                ROWS, PLACES, TILES, WARPS, ROW_WARPS,
            )  # fmt: skip
            acc = (zeros,) * (ROWS * TILES)
        rb, k = next_rb, next_k
