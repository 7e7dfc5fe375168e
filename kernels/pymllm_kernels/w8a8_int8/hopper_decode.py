"""The int8 layer for up to 16 tokens on Hopper, written in Gluon.

Work is cut by rows of the weight only, 16 output features at a time: an even share of row blocks for
every program, so that nothing is shared between programs. The warps of a program split K and add up
once a pass: integers, exact in any order. Weights go from memory to the registers that multiply them,
without shared memory: the sum over K may run in any order, so a thread takes 16 neighbouring bytes of
a row, and the same inputs of ``x``, for its part of ``mma.sync``. The next step's weights and inputs
are fetched while this one's are multiplied.

Activations are codes of a kernel before this one, whose start the first weights do not wait for.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.language.extra.cuda import gdc_wait

from pymllm_kernels.common.row_blocks import add_warps, next_step, stack
from pymllm_kernels.common.stream_k import share_of
from pymllm_kernels.w8a8_int8.hopper_epilogue import scale_sum

# 4 registers of a row block's upper 8 rows, 4 of its lower, 4 of x: two steps of 32 inputs.
_MMA = gl.constexpr("""{
mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32
  {$0,$1,$2,$3}, {$4,$8,$5,$9}, {$12,$13}, {$16,$17,$18,$19};
mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32
  {$0,$1,$2,$3}, {$6,$10,$7,$11}, {$14,$15}, {$0,$1,$2,$3};
}""")


@gluon.jit
def _mma(upper, lower, x, acc):
    """``acc`` plus ``[16 rows, 64 inputs] @ [64 inputs, 8 tokens]`` a warp."""
    return gl.inline_asm_elementwise(
        _MMA, "=&r,=&r,=&r,=&r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r", [upper, lower, x, acc],
        dtype=gl.int32, is_pure=True, pack=4,
    )  # fmt: skip


@gluon.jit
def _multiply(sums, unit, codes):
    """The sums of a row block, one a tile of tokens, plus 128 inputs."""
    added = ()
    for n in gl.static_range(len(sums)):
        total = _mma(unit[0], unit[2], codes[n * 2], sums[n])
        added += (_mma(unit[1], unit[3], codes[n * 2 + 1], total),)
    return added


@gluon.jit
def _load_unit(weight_ptr, block, row_block, g, c, N, K, last):
    """One row block of 128 inputs a warp: two halves of its upper rows, two of its lower."""
    unit = ()
    for i in gl.static_range(2):
        row = row_block * 16 + g + i * 8
        there = gl.expand_dims((row < N) & (row_block < last), 2)
        # 64 bits: a layer may have 2**31 weights.
        at = gl.expand_dims(row.to(gl.int64) * (K // 4), 2) + (gl.expand_dims(block * 32, 2) + c)
        for h in gl.static_range(2):
            # Within K by pieces of 16 inputs, so that one load takes a piece.
            inside = there & (gl.expand_dims(block * 8, 2) + (c // 4 + h * 4) < K // 16)
            # Not kept in the L1, which x is read from.
            unit += (
                gl.load(
                    weight_ptr.to(gl.pointer_type(gl.int32)) + (at + h * 16),
                    mask=inside, other=0, cache_modifier=".cg",
                ),
            )  # fmt: skip
    return unit


@gluon.jit
def _load_x(x_ptr, block, g, c, M, K, TILES: gl.constexpr):
    """Two halves of 128 codes a warp for every tile of 8 tokens, by four."""
    xs = ()
    for n in gl.static_range(TILES):
        token = gl.expand_dims(g + n * 8, 2)
        at = token * (K // 4) + (gl.expand_dims(block * 32, 2) + c)
        row = x_ptr.to(gl.pointer_type(gl.int32)) + at
        for h in gl.static_range(2):
            inside = (token < M) & (gl.expand_dims(block * 8, 2) + (c // 4 + h * 4) < K // 16)
            xs += (gl.load(row + h * 16, mask=inside, other=0),)
    return xs


@gluon.jit
def _finish(
    acc, zeros, parts, of_rows, of_tokens, out_ptr, first, last, M, N,
    stride_xs: gl.constexpr, stride_ws: gl.constexpr, PLACES: gl.constexpr, TILES: gl.constexpr,
    WARPS: gl.constexpr,
):  # fmt: skip
    """Adds up the warps' sums of the row blocks from ``first`` on, scales and stores them."""
    w_scale_ptr, column_sum_ptr, bias_ptr = of_rows
    ZERO: gl.constexpr = column_sum_ptr is not None
    FLAT: gl.constexpr = gl.BlockedLayout([1, 1], [1, 32], [1, WARPS], [1, 0])
    i = gl.expand_dims(gl.arange(0, PLACES * 128, layout=gl.SliceLayout(0, FLAT)), 0)
    place = i // (128 * TILES)
    block = first + place
    row = block * 16 + i % 128 // 16 + i % 4 // 2 * 8
    token = i // 128 % TILES * 8 + i % 16 // 4 * 2 + i % 2
    mask = (place < len(acc) // TILES) & (block < last) & (row < N) & (token < M)
    # They arrive beside the sums.
    s_n = gl.load(w_scale_ptr + row * stride_ws, mask=mask, other=0.0)
    x_scale_ptr, x_zero_ptr = of_tokens
    s_m = gl.load(x_scale_ptr + token * stride_xs, mask=token < M, other=0.0)
    zero = 0
    if ZERO:
        zero = gl.load(x_zero_ptr + token * stride_xs, mask=token < M, other=0)
    bias = 0.0
    if bias_ptr is not None:
        bias = gl.load(bias_ptr + row, mask=mask, other=0.0).to(gl.float32)
    column_sum = 0
    if ZERO:
        column_sum = gl.load(column_sum_ptr + row, mask=mask, other=0)
    total = add_warps(stack(acc, zeros, PLACES), parts, FLAT, 1, WARPS)
    out = scale_sum(total, s_m, s_n, zero, column_sum, bias, ZERO, bias_ptr is not None)
    gl.store(out_ptr + (token * N + row), out.to(out_ptr.dtype.element_ty), mask=mask)


# Compiled once for all shapes and numbers of tokens.
@gluon.jit(do_not_specialize=["M", "N", "K"])
def w8a8_int8_decode_hopper(
    x_ptr,  # int8 codes [M, K], contiguous
    weight_ptr,  # int8 [N, K]
    x_scale_ptr,  # fp32 [M] or [1] (stride_xs = 0)
    w_scale_ptr,  # fp32 [N] or [1] (stride_ws = 0)
    x_zero_ptr,  # int32, as x_scale, or None
    column_sum_ptr,  # int32 [N] of activations with a zero point, or None
    bias_ptr,  # [N] or None
    out_ptr,  # [M, N], contiguous
    M, N, K,
    stride_xs: gl.constexpr, stride_ws: gl.constexpr,
    ROWS: gl.constexpr,  # row blocks of 16 features at once
    TILES: gl.constexpr,  # tiles of 8 tokens, 1 or 2
    PLACES: gl.constexpr,  # the power of two that holds ROWS * TILES
    WARPS: gl.constexpr,
):  # fmt: skip
    # Thread (g, t) of a warp: 4 registers of row g, or of token g; of outputs of rows g and g + 8.
    L3: gl.constexpr = gl.BlockedLayout([1, 1, 4], [1, 8, 4], [WARPS, 1, 1], [2, 1, 0])
    OF_ROWS: gl.constexpr = gl.SliceLayout(2, L3)
    warp = gl.expand_dims(gl.arange(0, WARPS, layout=gl.SliceLayout(1, OF_ROWS)), 1)
    g = gl.expand_dims(gl.arange(0, 8, layout=gl.SliceLayout(0, OF_ROWS)), 0)
    c = gl.arange(0, 16, layout=gl.SliceLayout(0, gl.SliceLayout(0, L3)))
    c = gl.expand_dims(gl.expand_dims(c, 0), 0)
    first, last = share_of(gl.program_id(0), gl.cdiv(N, 16), gl.num_programs(0))
    steps = gl.cdiv(gl.cdiv(K, 128), WARPS)
    parts = gl.allocate_shared_memory(
        gl.int32, [WARPS, PLACES * 128], gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    )
    zeros = gl.zeros([WARPS, 8, 16], gl.int32, L3)
    units = ()
    for r in gl.static_range(ROWS):
        units += _load_unit(weight_ptr, warp, first + r, g, c, N, K, last)
    gdc_wait()
    codes = _load_x(x_ptr, warp, g, c, M, K, TILES)
    # Row block and step that are multiplied, and those that are fetched meanwhile.
    rb = first
    k = 0
    next_rb, next_k = next_step(first, 0, steps, ROWS)
    acc = (zeros,) * (ROWS * TILES)
    for _ in range(gl.cdiv(last - first, ROWS) * steps):
        block = next_k * WARPS + warp
        xs = _load_x(x_ptr, block, g, c, M, K, TILES)
        added = ()
        fetched = ()
        for r in gl.static_range(ROWS):
            sums = ()
            unit = ()
            for n in gl.static_range(TILES):
                sums += (acc[r * TILES + n],)
            for i in gl.static_range(4):
                unit += (units[r * 4 + i],)
            # A branch, so that row blocks are multiplied one after the other and each one's next words
            # are on their way meanwhile. The compiler would mix all of them, and wait for all.
            if rb + r < last:
                sums = _multiply(sums, unit, codes)
                unit = _load_unit(weight_ptr, block, next_rb + r, g, c, N, K, last)
            added += sums
            fetched += unit
        acc = added
        units = fetched
        codes = xs
        if k == steps - 1:
            _finish(
                acc, zeros, parts, (w_scale_ptr, column_sum_ptr, bias_ptr),
                (x_scale_ptr, x_zero_ptr), out_ptr, rb, last, M, N, stride_xs, stride_ws, PLACES,
                TILES, WARPS,
            )  # fmt: skip
            acc = (zeros,) * (ROWS * TILES)
        rb = next_rb
        k = next_k
        next_rb, next_k = next_step(next_rb, next_k, steps, ROWS)
