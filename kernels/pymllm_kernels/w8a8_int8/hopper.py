"""The int8 by int8 GEMM for Hopper: warp-specialized, persistent, written in Gluon.

The same arithmetic as ``kernel``: exact int32 sums, the fp32 epilogue rounded once. One warp copies
tiles of the codes and one warp tiles of the weight into a ring of shared-memory slots; one or two
warpgroups multiply them. ``a`` is the operand whose rows are the 64-row side of wgmma and ``b`` its
narrow side: codes and weight for many tokens, weight and codes (``SWAP``) for few.

``common.stream_k`` says which program does what, ``common.shared_tile`` how programs that share a tile
add up their parts; integer sums do not depend on the order.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.language.extra.cuda import gdc_wait

from pymllm_kernels.common.gluon_hopper import (
    load_early,
    next_slot,
    slot_after,
    split_columns,
    tma_load,
    tma_store,
)
from pymllm_kernels.common.shared_tile import leave_part, meet, take_leave
from pymllm_kernels.common.stream_k import count_segments, segment, sharers
from pymllm_kernels.common.triton_helpers import grouped_tile, grouped_tile_branching
from pymllm_kernels.w8a8_int8.hopper_epilogue import epilogue, finish_tile, load_factors


@gluon.jit
def _tiles(x_desc, weight_desc):
    """(tiles of M, tiles of N, K steps) of the problem."""
    BLOCK_M: gl.constexpr = x_desc.block_shape[0]
    BLOCK_N: gl.constexpr = weight_desc.block_shape[0]
    BLOCK_K: gl.constexpr = x_desc.block_shape[1]
    tiles_m = (x_desc.shape[0] + BLOCK_M - 1) // BLOCK_M
    tiles_n = (weight_desc.shape[0] + BLOCK_N - 1) // BLOCK_N
    k_steps = (x_desc.shape[1] + BLOCK_K - 1) // BLOCK_K
    return tiles_m, tiles_n, k_steps


@gluon.jit
def _load(
    x_desc, weight_desc, slots, full, empty, whole,
    CODES: gl.constexpr, SHARE: gl.constexpr, SLOTS: gl.constexpr, GROUP_M: gl.constexpr,
    PDL: gl.constexpr, EARLY: gl.constexpr,
):  # fmt: skip
    """Copies one operand's tiles into the ring, EARLY steps of which are there; one warp."""
    if CODES:
        desc = x_desc
    else:
        desc = weight_desc
    ROWS: gl.constexpr = desc.block_shape[0]
    BLOCK_K: gl.constexpr = desc.block_shape[1]
    tiles_m, tiles_n, k_steps = _tiles(x_desc, weight_desc)
    tiles = tiles_m * tiles_n
    slot = 0
    # The ring starts empty: a wait for the phase before the first passes.
    phase = 1
    own, segments = count_segments(whole, tiles, k_steps, SHARE)
    if EARLY > 0:
        loaded = gl.minimum(k_steps, EARLY)
        slot, phase = slot_after(loaded, SLOTS)
    for index in range(segments):
        tile, begin, end = segment(index, own, whole, tiles, k_steps, SHARE)
        if EARLY > 0:
            # A variable that the loop sets to 0 is not carried by Triton: kernels hang.
            begin += gl.where(index == 0, loaded, 0)
        tile_m, tile_n = grouped_tile_branching(tile, tiles_m, tiles_n, GROUP_M)
        row = (tile_m if CODES else tile_n) * ROWS
        # The weight does not depend on the kernel before this one, its copies start at once. Behind the
        # divisions: 4 to 9 % less in small layers than with the wait at the top.
        if CODES and PDL:
            gdc_wait()
        for step in range(begin, end):
            mbarrier.wait(empty.index(slot), phase)
            mbarrier.expect(full.index(slot), ROWS * BLOCK_K)
            # A box of few codes fills the first rows of its slot.
            place = slots.index(slot).slice(0, ROWS)
            tma_load(desc, [row, step * BLOCK_K], full.index(slot), place)
            slot, phase = next_slot(slot, phase, SLOTS)


@gluon.jit
def _store_tile(
    acc, factors, token0, feature0, M, N, out_desc, out_slots,
    x_scale_ptr, w_scale_ptr, x_zero_ptr, column_sum_ptr, bias_ptr, stride_xs, stride_ws,
    SWAP: gl.constexpr, STORE_PARTS: gl.constexpr,
):  # fmt: skip
    """Scales and writes an accumulator in pieces, each through a small buffer.

    The copy engine leaves out what lies outside of the output. The factors of a piece are loaded while
    the piece before it is written: those of all of them would not fit the registers.
    """
    STORE_SLOTS: gl.constexpr = out_slots.shape[0]
    ROWS: gl.constexpr = acc.shape[0]
    WIDTH: gl.constexpr = acc.shape[1] // STORE_PARTS
    parts = split_columns(acc, STORE_PARTS)
    layout: gl.constexpr = parts[0].type.layout
    for i in gl.static_range(STORE_PARTS):
        s_m, s_n, zero, column_sum, bias = factors
        out = epilogue(
            parts[i], s_m, s_n, zero, column_sum, bias, x_zero_ptr is not None,
            bias_ptr is not None, SWAP, out_desc.dtype,
        )  # fmt: skip
        token = token0
        feature = feature0
        if SWAP:
            token0 += WIDTH
        else:
            feature0 += WIDTH
        if i + 1 < STORE_PARTS:
            factors = load_factors(
                layout, ROWS, WIDTH, token0, feature0, M, N, x_scale_ptr, w_scale_ptr, x_zero_ptr,
                column_sum_ptr, bias_ptr, stride_xs, stride_ws, SWAP,
            )  # fmt: skip
        buffer = out_slots.index(i % STORE_SLOTS)
        tma.store_wait(STORE_SLOTS - 1)
        if SWAP:
            buffer.permute((1, 0)).store(out)
        else:
            buffer.store(out)
        fence_async_shared()
        tma_store(out_desc, [token, feature], buffer)


@gluon.jit
def _multiply(
    x_desc, weight_desc, out_desc, a_slots, b_slots, out_slots, full, empty, turn,
    out_ptr, x_scale_ptr, w_scale_ptr, x_zero_ptr, column_sum_ptr, bias_ptr, part_ptr, count_ptr,
    stride_om, stride_xs, stride_ws, whole,
    INDEX: gl.constexpr, CONSUMERS: gl.constexpr, PING_PONG: gl.constexpr, SWAP: gl.constexpr,
    SHARE: gl.constexpr, MEET: gl.constexpr, SLOTS: gl.constexpr, GROUP_M: gl.constexpr,
    STORE_PARTS: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    """Multiplies the ring's tiles and writes the outputs; one warpgroup.

    Two of them either share a tile, each with half of its ``a`` rows, or (``PING_PONG``) take turns at
    whole tiles, so that the epilogue of one hides behind the multiplications of the other.
    """
    HALVES: gl.constexpr = 1 if PING_PONG else CONSUMERS
    HALF: gl.constexpr = 0 if PING_PONG else INDEX
    ROWS: gl.constexpr = a_slots.shape[1] // HALVES
    COLUMNS: gl.constexpr = b_slots.shape[1]
    INSTRUCTION: gl.constexpr = [16, min(COLUMNS, 128), 32]
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], INSTRUCTION)
    M = x_desc.shape[0]
    N = weight_desc.shape[0]
    tiles_m, tiles_n, k_steps = _tiles(x_desc, weight_desc)
    tiles = tiles_m * tiles_n
    row0: gl.constexpr = ROWS * HALF
    slot = 0
    phase = 0
    turn_phase = 0
    zeros = gl.zeros((ROWS, COLUMNS), gl.int32, layout)
    piece = split_columns(zeros, STORE_PARTS)[0]
    PIECE: gl.constexpr = piece.type.layout
    own, segments = count_segments(whole, tiles, k_steps, SHARE)
    first_segment: gl.constexpr = INDEX if PING_PONG else 0
    for index in range(first_segment, segments, CONSUMERS if PING_PONG else 1):
        tile, begin, end = segment(index, own, whole, tiles, k_steps, SHARE)
        tile_m, tile_n = grouped_tile_branching(tile, tiles_m, tiles_n, GROUP_M)
        if PING_PONG:
            slot = index * k_steps % SLOTS
            phase = index * k_steps // SLOTS & 1
        # Not ``slot``: a variable that enters the loop as the value its body assigns is not carried.
        previous = 0
        token0 = tile_m * x_desc.block_shape[0]
        feature0 = tile_n * weight_desc.block_shape[0]
        if SWAP:
            feature0 += row0
        else:
            token0 += row0
        if PDL:
            gdc_wait()
        # Those of the first piece arrive beside the multiplications, not after them.
        factors = load_factors(
            PIECE, ROWS, COLUMNS // STORE_PARTS, token0, feature0, M, N,
            x_scale_ptr, w_scale_ptr, x_zero_ptr, column_sum_ptr, bias_ptr, stride_xs, stride_ws, SWAP,
        )  # fmt: skip
        acc = zeros
        if PING_PONG:
            mbarrier.wait(turn.index(INDEX), turn_phase)
        for step in range(begin, end):
            mbarrier.wait(full.index(slot), phase)
            a = a_slots.index(slot).slice(row0, ROWS)
            b = b_slots.index(slot).permute((1, 0))
            acc = warpgroup_mma(a, b, acc, is_async=True)
            # The step before this one is done: its slot may be filled again.
            acc = warpgroup_mma_wait(1, deps=[acc])
            mbarrier.arrive(empty.index(previous), count=1, pred=step > begin)
            previous = slot
            slot, phase = next_slot(slot, phase, SLOTS)
        if PING_PONG:
            mbarrier.arrive(turn.index(1 - INDEX), count=1)
            turn_phase ^= 1
        acc = warpgroup_mma_wait(0, deps=[acc])
        mbarrier.arrive(empty.index(previous), count=1)
        if SHARE and end - begin < k_steps:
            sharer, last_sharer = sharers(tile, whole, tiles, k_steps)
            is_last = leave_part(
                acc, part_ptr, count_ptr, sharer, last_sharer,
                HALF, HALVES, ROWS, COLUMNS, layout, MEET,
            )  # fmt: skip
            if not MEET:  # noqa: SIM102  one is known at compile time, the other not
                if is_last:
                    finish_tile(
                        part_ptr, sharer, last_sharer, 0, 1, token0, feature0, M, N, out_ptr,
                        stride_om, x_scale_ptr, w_scale_ptr, x_zero_ptr, column_sum_ptr, bias_ptr,
                        stride_xs, stride_ws, HALF, HALVES, COLUMNS, ROWS,
                    )  # fmt: skip
        else:
            _store_tile(
                acc, factors, token0, feature0, M, N, out_desc, out_slots, x_scale_ptr, w_scale_ptr,
                x_zero_ptr, column_sum_ptr, bias_ptr, stride_xs, stride_ws, SWAP, STORE_PARTS,
            )  # fmt: skip
    if SHARE and MEET:
        for index in range(own, segments):
            tile, begin, end = segment(index, own, whole, tiles, k_steps, SHARE)
            if end - begin < k_steps:
                sharer, last_sharer = sharers(tile, whole, tiles, k_steps)
                tile_m, tile_n = grouped_tile(tile, tiles_m, tiles_n, GROUP_M)
                meet(count_ptr, sharer, last_sharer, HALF, HALVES)
                finish_tile(
                    part_ptr, sharer, last_sharer,
                    gl.program_id(0) - sharer, last_sharer - sharer + 1,
                    tile_m * x_desc.block_shape[0], tile_n * weight_desc.block_shape[0] + row0,
                    M, N, out_ptr, stride_om, x_scale_ptr, w_scale_ptr, x_zero_ptr, column_sum_ptr, bias_ptr,
                    stride_xs, stride_ws, HALF, HALVES, COLUMNS, ROWS,
                )  # fmt: skip
                take_leave(count_ptr, sharer, last_sharer, HALF, HALVES)
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["whole"])
def w8a8_int8_hopper_kernel(
    x_desc,  # int8 [M, K], boxes [at most BLOCK_M, BLOCK_K]
    weight_desc,  # int8 [N, K], boxes [BLOCK_N, BLOCK_K]
    out_desc,  # [M, N], boxes of one store
    out_ptr,  # [M, N]
    x_scale_ptr,  # fp32, stride_xs = 0: one scale for all rows
    w_scale_ptr,  # fp32, stride_ws = 0: one scale for all columns
    x_zero_ptr,  # int32 or None, strided as x_scale
    column_sum_ptr,  # int32 [N] or None
    bias_ptr,  # [N] or None
    part_ptr,  # int32 [programs * 2 * tile], or None without SHARE
    count_ptr,  # int32 [programs * halves], zero before and after, or None without SHARE
    stride_om, stride_xs, stride_ws,
    whole,
    BLOCK_M: gl.constexpr,  # tokens of a slot and of the matrix instructions
    SWAP: gl.constexpr,
    CONSUMERS: gl.constexpr, PING_PONG: gl.constexpr,
    SHARE: gl.constexpr,  # whether tiles may be shared, with SWAP only
    MEET: gl.constexpr,  # whether sharers wait for each other, which needs a cooperative launch
    SLOTS: gl.constexpr, GROUP_M: gl.constexpr, STORE_PARTS: gl.constexpr,
    STORE_SLOTS: gl.constexpr, REGISTERS: gl.constexpr, PDL: gl.constexpr,
    EARLY: gl.constexpr,  # steps whose weights are asked for before the warps part; whole tiles only
):  # fmt: skip
    BLOCK_N: gl.constexpr = weight_desc.block_shape[0]
    BLOCK_K: gl.constexpr = x_desc.block_shape[1]
    x_slots = gl.allocate_shared_memory(gl.int8, [SLOTS, BLOCK_M, BLOCK_K], x_desc.layout)
    weight_slots = gl.allocate_shared_memory(gl.int8, [SLOTS, BLOCK_N, BLOCK_K], weight_desc.layout)
    out_shape: gl.constexpr = [STORE_SLOTS, out_desc.block_shape[0], out_desc.block_shape[1]]
    out_slots = gl.allocate_shared_memory(out_desc.dtype, out_shape, out_desc.layout)
    full = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    # Only where it is used: see ``testing.aot.idle_barriers``.
    if PING_PONG:
        turn = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    else:
        turn: gl.constexpr = None
    # Each takes a barrier of the warps: first what the first weights need.
    for i in gl.static_range(EARLY):
        mbarrier.init(full.index(i), count=2)
    if EARLY > 0:
        fence_async_shared()
        # Tiles are whole: the first is that of the program's number.
        tiles_m, tiles_n, k_steps = _tiles(x_desc, weight_desc)
        _, tile_n = grouped_tile_branching(gl.program_id(0), tiles_m, tiles_n, GROUP_M)
        load_early(weight_desc, tile_n * BLOCK_N, weight_slots, full, k_steps, EARLY)
    for i in gl.static_range(SLOTS):
        if i >= EARLY:
            mbarrier.init(full.index(i), count=2)
        mbarrier.init(empty.index(i), count=1 if PING_PONG else CONSUMERS)
    if PING_PONG:
        mbarrier.init(turn.index(0), count=1)
        mbarrier.init(turn.index(1), count=1)
    fence_async_shared()
    if PING_PONG:
        mbarrier.arrive(turn.index(0), count=1)
    if SWAP:
        a_slots = weight_slots
        b_slots = x_slots
    else:
        a_slots = x_slots
        b_slots = weight_slots
    # Written out: a tuple in a variable would turn its compile-time values into run-time ones.
    if CONSUMERS == 1:
        gl.warp_specialize([
            (_multiply, (
            x_desc, weight_desc, out_desc, a_slots, b_slots, out_slots, full, empty, turn,
            out_ptr, x_scale_ptr, w_scale_ptr, x_zero_ptr, column_sum_ptr, bias_ptr, part_ptr,
            count_ptr, stride_om, stride_xs, stride_ws, whole, 0, CONSUMERS, PING_PONG, SWAP, SHARE,
            MEET, SLOTS, GROUP_M, STORE_PARTS, PDL)),
            (_load, (
            x_desc, weight_desc, weight_slots, full, empty, whole, False, SHARE, SLOTS, GROUP_M, PDL,
            EARLY)),
            (_load, (
            x_desc, weight_desc, x_slots, full, empty, whole, True, SHARE, SLOTS, GROUP_M, PDL, 0)),
        ], [1, 1], [24, 24])  # fmt: skip
    else:
        out_slots_1 = gl.allocate_shared_memory(out_desc.dtype, out_shape, out_desc.layout)
        gl.warp_specialize([
            (_multiply, (
            x_desc, weight_desc, out_desc, a_slots, b_slots, out_slots, full, empty, turn,
            out_ptr, x_scale_ptr, w_scale_ptr, x_zero_ptr, column_sum_ptr, bias_ptr, part_ptr,
            count_ptr, stride_om, stride_xs, stride_ws, whole, 0, CONSUMERS, PING_PONG, SWAP, SHARE,
            MEET, SLOTS, GROUP_M, STORE_PARTS, PDL)),
            (_multiply, (
            x_desc, weight_desc, out_desc, a_slots, b_slots, out_slots_1, full, empty, turn,
            out_ptr, x_scale_ptr, w_scale_ptr, x_zero_ptr, column_sum_ptr, bias_ptr, part_ptr,
            count_ptr, stride_om, stride_xs, stride_ws, whole, 1, CONSUMERS, PING_PONG, SWAP, SHARE,
            MEET, SLOTS, GROUP_M, STORE_PARTS, PDL)),
            (_load, (
            x_desc, weight_desc, weight_slots, full, empty, whole, False, SHARE, SLOTS, GROUP_M, PDL,
            EARLY)),
            (_load, (
            x_desc, weight_desc, x_slots, full, empty, whole, True, SHARE, SLOTS, GROUP_M, PDL, 0)),
        ], [4, 1, 1], [REGISTERS, 24, 24])  # fmt: skip
