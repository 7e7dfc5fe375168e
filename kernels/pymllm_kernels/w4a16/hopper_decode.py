"""The W4A16 kernel for up to 16 tokens on Hopper, written in Gluon.

Work is cut by rows only, 16 output features at a time: an even share of row blocks for every program,
so that nothing is shared between programs. The warps of a program split K and add up once a pass, in
a fixed order. Weights go from memory to the registers that multiply them, without shared memory: the
sum over K may run in any order, so a thread takes 16 neighbouring bytes of a row of the layout, and
the same inputs of ``x``, for its part of ``mma.sync``. The next step's weights are fetched while this
one's are multiplied.

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

from pymllm_kernels.common.stream_k import share_of

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
_RAISE = "{ .reg .b32 c; mov.b32 c, BY; mul.rn.bf16x2 $0, $1, c; }"
_RAISE_EVEN = gl.constexpr(_RAISE.replace("BY", "0x5F805F80"))  # 2**64
_RAISE_ODD = gl.constexpr(_RAISE.replace("BY", "0x5D805D80"))  # 2**60


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
def _both(upper, lower, L3: gl.constexpr):
    """Values of the upper and lower 8 rows ``[WARPS, 8]`` as the accumulator has its rows."""
    c = gl.arange(0, 16, layout=gl.SliceLayout(0, gl.SliceLayout(0, L3)))
    is_upper = gl.expand_dims(gl.expand_dims(c % 4 < 2, 0), 0)
    return gl.where(is_upper, gl.expand_dims(upper, 2), gl.expand_dims(lower, 2))


@gluon.jit
def _places(sources, sizes, block, rb, g, c, RUNS: gl.constexpr, GROUP_SIZE: gl.constexpr):
    """Where a warp's block of K has the words of row block ``rb``, and its groups their scales."""
    weight_ptr, _, _ = sources
    N, blocks, groups = sizes
    row = rb * 16 + g
    # 64 bits: a layer may have 2**31 words.
    at = (block.to(gl.int64) * N + row) * 16
    words = weight_ptr.to(gl.pointer_type(gl.int32)) + (gl.expand_dims(at, 2) + c)
    # Beyond K the sums are zero, but 0 * scale has to be.
    k = gl.minimum(block, blocks - 1) * 128
    rows = ()
    for run in gl.static_range(RUNS):
        group = gl.minimum((k + run * (128 // RUNS)) // GROUP_SIZE, groups - 1)
        rows += (group * N + row,)
    return words, rows


@gluon.jit
def _load_unit(sources, places, block, blocks, R: gl.constexpr, there, RUNS: gl.constexpr):
    """Row block R of one block of K a warp: words of both row halves, scales and zero points."""
    _, scale_ptr, zero_ptr = sources
    words, rows = places
    mask = gl.expand_dims(block < gl.where(there, blocks, 0), 2)
    # Not kept in the L1, which x is read from.
    unit = (
        gl.load(words + R * 256, mask=mask, cache_modifier=".cg"),
        gl.load(words + (R * 256 + 128), mask=mask, cache_modifier=".cg"),
    )
    for run in gl.static_range(RUNS):
        unit += (
            gl.load(scale_ptr + rows[run] + R * 16, mask=there),
            gl.load(scale_ptr + rows[run] + (R * 16 + 8), mask=there),
        )
        if zero_ptr is not None:
            unit += (
                gl.load(zero_ptr + rows[run] + R * 16, mask=there),
                gl.load(zero_ptr + rows[run] + (R * 16 + 8), mask=there),
            )
    return unit


@gluon.jit
def _raise(x, ODD: gl.constexpr):
    asm: gl.constexpr = _RAISE_ODD if ODD else _RAISE_EVEN
    return gl.inline_asm_elementwise(asm, "=r,r", [x], dtype=gl.int32, is_pure=True, pack=1)


@gluon.jit
def _load_x(x_ptr, block, g, c, M, K, stride_x8, HALF: gl.constexpr, TILES: gl.constexpr):
    """Pairs of one block of K a warp: 4 slices for every tile of 8 tokens."""
    pair = gl.expand_dims(block * 64, 2) + c
    eight = gl.expand_dims(block * 16, 2) + c // 4
    xs = ()
    for n in gl.static_range(TILES):
        token = gl.expand_dims(g + n * 8, 2)
        row = x_ptr.to(gl.pointer_type(gl.int32)) + (token * (stride_x8 * 4) + pair)
        for j in gl.static_range(4):
            # Within K by pieces of 8 inputs, so that one load takes a piece.
            inside = (token < M) & (eight + j * 4 < K // 8)
            x = gl.load(row + j * 16, mask=inside, other=0)
            if HALF == gl.bfloat16:
                x = _raise(x, j % 2 == 1)
            xs += (x,)
    return xs


@gluon.jit
def _sums(
    xs, zeros, ZERO: gl.constexpr, HALF: gl.constexpr, RUNS: gl.constexpr, TILES: gl.constexpr
):
    """-8 times the sum of x over a group (the sum if layers have ZERO points), in weights' units."""
    ONE: gl.constexpr = 0x00010001 if ZERO else 0x80088008 - (1 << 32)
    SIXTEEN: gl.constexpr = 0x00100010 if ZERO else 0x80808080 - (1 << 32)
    even = gl.full(zeros.shape, ONE, gl.int32, zeros.type.layout)
    odd = even
    if HALF == gl.bfloat16:
        odd = gl.full(zeros.shape, SIXTEEN, gl.int32, zeros.type.layout)
    sums = ()
    for run in gl.static_range(RUNS):
        for n in gl.static_range(TILES):
            total = zeros
            for j in gl.static_range(run * 4 // RUNS, (run + 1) * 4 // RUNS):
                ones = odd if j % 2 == 1 else even
                total = _mma(ones, ones, xs[n * 4 + j], total, HALF)
            sums += (total,)
    return sums


@gluon.jit
def _add_unit(
    acc, units, sums, xs, R: gl.constexpr, AT: gl.constexpr, ZERO: gl.constexpr, HALF: gl.constexpr,
    RUNS: gl.constexpr, TILES: gl.constexpr, L3: gl.constexpr,
):  # fmt: skip
    """The accumulators of row block R plus one block of K, from units[AT] on."""
    EACH: gl.constexpr = 4 if ZERO else 2
    UNIT: gl.constexpr = 2.0**69 if HALF == gl.bfloat16 else 2.0**24
    upper = _unpack(units[AT], HALF)
    lower = _unpack(units[AT + 1], HALF)
    added = ()
    for n in gl.static_range(TILES):
        total = acc[R * TILES + n]
        for run in gl.static_range(RUNS):
            part = sums[run * TILES + n]
            if ZERO:
                zero_up = units[AT + 4 + run * EACH].to(gl.float32)
                zero_low = units[AT + 5 + run * EACH].to(gl.float32)
                part = part * _both(-zero_up, -zero_low, L3)
            for j in gl.static_range(run * 4 // RUNS, (run + 1) * 4 // RUNS):
                part = _mma(upper[j], lower[j], xs[n * 4 + j], part, HALF)
            scale_up = units[AT + 2 + run * EACH].to(gl.float32) * UNIT
            scale_low = units[AT + 3 + run * EACH].to(gl.float32) * UNIT
            total = gl.fma(part, _both(scale_up, scale_low, L3), total)
        added += (total,)
    return added


@gluon.jit
def _stack(tiles, zeros, PLACES: gl.constexpr):
    """Accumulators ``[WARPS, 8, 16]`` side by side, ``[WARPS, PLACES * 128]``: moves no data."""
    level = tiles
    for _ in gl.static_range(PLACES - len(tiles)):
        level += (zeros,)
    for _ in gl.static_range(PLACES.bit_length() - 1):
        pairs = ()
        for i in gl.static_range(len(level) // 2):
            pairs += (gl.join(level[2 * i], level[2 * i + 1]),)
        level = pairs
    one = level[0]
    if PLACES == 2:
        one = one.permute(0, 3, 1, 2)
    elif PLACES == 4:
        one = one.permute(0, 4, 3, 1, 2)
    elif PLACES == 8:
        one = one.permute(0, 5, 4, 3, 1, 2)
    return one.reshape(zeros.shape[0], PLACES * 128)


@gluon.jit
def _finish(
    acc, zeros, parts, out_ptr, bias_ptr, first, last, M, N,
    PLACES: gl.constexpr, TILES: gl.constexpr, WARPS: gl.constexpr,
):  # fmt: skip
    """Adds up the warps' sums of the row blocks from ``first`` on, and stores them."""
    FLAT: gl.constexpr = gl.BlockedLayout([1, 1], [1, 32], [1, WARPS], [1, 0])
    parts.store(_stack(acc, zeros, PLACES))
    total = parts.slice(0, 1).load(FLAT)
    for w in gl.static_range(1, WARPS):
        total += parts.slice(w, 1).load(FLAT)
    i = gl.expand_dims(gl.arange(0, PLACES * 128, layout=gl.SliceLayout(0, FLAT)), 0)
    block = i // (128 * TILES)
    row = (first + block) * 16 + i % 128 // 16 + i % 4 // 2 * 8
    token = i // 128 % TILES * 8 + i % 16 // 4 * 2 + i % 2
    mask = (first + block < last) & (block < len(acc) // TILES) & (token < M)
    if bias_ptr is not None:
        total += gl.load(bias_ptr + row, mask=mask, other=0.0).to(gl.float32)
    out = out_ptr + token.to(gl.int64) * N + row
    gl.store(out, total.to(out_ptr.dtype.element_ty), mask=mask)


@gluon.jit
def _next_step(rb, k, steps, ROWS: gl.constexpr):
    k += 1
    rb = gl.where(k == steps, rb + ROWS, rb)
    return rb, gl.where(k == steps, 0, k)


# Compiled once for all shapes and numbers of tokens.
@gluon.jit(do_not_specialize=["M", "N", "K", "groups", "stride_x8"])
def w4a16_decode_hopper(
    x_ptr,  # [M, K], rows of neighbours on 16 bytes
    weight_ptr,  # int16 [blocks, N, 32]
    scale_ptr,  # [groups, N]
    zero_ptr,  # int8 [groups, N] or None
    bias_ptr,  # [N] or None
    out_ptr,  # [M, N], contiguous
    M, N, K, groups,
    stride_x8,  # of a row of x, in pieces of 8 elements
    HALF: gl.constexpr,  # dtype of x
    GROUP_SIZE: gl.constexpr,
    RUNS: gl.constexpr,  # groups a block of K: 1, 2 or 4
    ROWS: gl.constexpr,  # row blocks of 16 features at once
    PLACES: gl.constexpr,  # the power of two that holds ROWS * TILES
    TILES: gl.constexpr,  # tiles of 8 tokens, 1 or 2
    AHEAD: gl.constexpr,  # steps of K fetched ahead
    WARPS: gl.constexpr,
):  # fmt: skip
    # Thread (g, t) of a warp: 4 registers of row g, or of token g; of outputs of rows g and g + 8.
    L3: gl.constexpr = gl.BlockedLayout([1, 1, 4], [1, 8, 4], [WARPS, 1, 1], [2, 1, 0])
    OF_ROWS: gl.constexpr = gl.SliceLayout(2, L3)
    warp = gl.expand_dims(gl.arange(0, WARPS, layout=gl.SliceLayout(1, OF_ROWS)), 1)
    g = gl.expand_dims(gl.arange(0, 8, layout=gl.SliceLayout(0, OF_ROWS)), 0)
    c = gl.arange(0, 16, layout=gl.SliceLayout(0, gl.SliceLayout(0, L3)))
    c = gl.expand_dims(gl.expand_dims(c, 0), 0)
    first, last = share_of(gl.program_id(0), N // 16, gl.num_programs(0))
    blocks = gl.cdiv(K, 128)
    steps = gl.cdiv(blocks, WARPS)
    parts = gl.allocate_shared_memory(
        gl.float32, [WARPS, PLACES * 128], gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    )
    sources = (weight_ptr, scale_ptr, zero_ptr)
    sizes = (N, blocks, groups)
    zeros = gl.zeros([WARPS, 8, 16], gl.float32, L3)
    ZERO: gl.constexpr = zero_ptr is not None
    EACH: gl.constexpr = 2 + RUNS * (4 if ZERO else 2)
    # Row block and step of the weights that are fetched next; rb and k are those multiplied.
    next_rb = first
    next_k = 0
    units = ()
    for _ in gl.static_range(AHEAD):
        block = next_k * WARPS + warp
        places = _places(sources, sizes, block, next_rb, g, c, RUNS, GROUP_SIZE)
        for r in gl.static_range(ROWS):
            units += _load_unit(sources, places, block, blocks, r, next_rb + r < last, RUNS)
        next_rb, next_k = _next_step(next_rb, next_k, steps, ROWS)
    acc = (zeros,) * (ROWS * TILES)
    rb = first
    k = 0
    for _ in range(0, gl.cdiv(last - first, ROWS) * steps, AHEAD):
        fetched = ()
        for a in gl.static_range(AHEAD):
            xs = _load_x(x_ptr, k * WARPS + warp, g, c, M, K, stride_x8, HALF, TILES)
            sums = _sums(xs, zeros, ZERO, HALF, RUNS, TILES)
            block = next_k * WARPS + warp
            places = _places(sources, sizes, block, next_rb, g, c, RUNS, GROUP_SIZE)
            added = ()
            for r in gl.static_range(ROWS):
                added += _add_unit(
                    acc, units, sums, xs, r, (a * ROWS + r) * EACH, ZERO, HALF, RUNS, TILES, L3,
                )  # fmt: skip
                fetched += _load_unit(sources, places, block, blocks, r, next_rb + r < last, RUNS)
            acc = added
            next_rb, next_k = _next_step(next_rb, next_k, steps, ROWS)
            if k == steps - 1:
                _finish(acc, zeros, parts, out_ptr, bias_ptr, rb, last, M, N, PLACES, TILES, WARPS)
                acc = (zeros,) * (ROWS * TILES)
            rb, k = _next_step(rb, k, steps, ROWS)
        units = fetched
