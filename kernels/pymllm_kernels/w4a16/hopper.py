"""The W4A16 kernel for Hopper, written in Gluon.

One warp (the producer) copies weight, activation and scale tiles by TMA into a ring of shared-memory
slots; the other warpgroups (consumers) each own ``ROWS`` output features of the tile, unpack weights
from shared memory to registers and multiply them from there (wgmma with a register operand). The
accumulator is transposed, ``[ROWS, BLOCK_M]``, as in the plain Triton kernel, and both read the same
weight layout. ``common.stream_k`` says which program does what.

What scales multiply (``hopper_block``) is a question of instructions: for 64 tokens and more a second
accumulator, and a multiply-add for each of its elements, cost more than rounding each weight once.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
)
from triton.language.extra.cuda import gdc_wait

from pymllm_kernels.common.gluon_hopper import (
    next_slot,
    slot_after,
    split_columns,
    sync_threads,
    tma_load,
    tma_store,
)
from pymllm_kernels.common.shared_tile import hand_on, leave_part, meet, take_leave, take_on
from pymllm_kernels.common.stream_k import count_segments, segment, sharers
from pymllm_kernels.common.triton_helpers import grouped_tile, grouped_tile_branching
from pymllm_kernels.w4a16.hopper_block import add_block, add_scaled_weights, add_two_blocks
from pymllm_kernels.w4a16.hopper_shared_tile import finish_tile


@gluon.jit
def _load_weights(
    weight_desc, weight_smem, ready, block, place, N, tile_n, there,
    BLOCK_N: gl.constexpr, BOXES: gl.constexpr,
):  # fmt: skip
    """Asks for the weights of a block of K, if it is there."""
    row = block * N + tile_n * BLOCK_N
    for b in gl.static_range(BOXES):
        box = weight_smem.index(place * BOXES + b)
        tma_load(weight_desc, [row + b * (BLOCK_N // BOXES), 0], ready, box, pred=there)


@gluon.jit
def _load_inputs(
    sources, shared, ready, block, place, N, groups, tile_m, tile_n,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, SLICE_K: gl.constexpr,
    GROUP_SIZE: gl.constexpr, RUNS: gl.constexpr,
):  # fmt: skip
    """Asks for the activations and the scales of a block of K."""
    BLOCK_K: gl.constexpr = 4 * SLICE_K
    x_desc, _, scale_desc, zero_desc = sources
    x_smem, _, scale_smem, zero_smem, _, _, _ = shared
    for j in gl.static_range(2):
        # Two slices a box: rows of 64 bytes load up to a third slower than of 128.
        at = [tile_m * BLOCK_M, block * BLOCK_K + j * 2 * SLICE_K]
        tma_load(x_desc, at, ready, x_smem.index(place * 2 + j))
    for r in gl.static_range(RUNS):
        # K may end inside the last block: its groups stop at the last one.
        k = block * BLOCK_K + r * (BLOCK_K // RUNS)
        at_n = gl.minimum(k // GROUP_SIZE, groups - 1) * N + tile_n * BLOCK_N
        tma_load(scale_desc, [at_n], ready, scale_smem.index(place * RUNS + r))
        if zero_desc is not None:
            tma_load(zero_desc, [at_n], ready, zero_smem.index(place * RUNS + r))


@gluon.jit
def _load_early(
    sources, shared, N, tiles_m, tiles_n, whole, steps,
    BLOCK_N: gl.constexpr, SPAN: gl.constexpr, GROUP_M: gl.constexpr, BOXES: gl.constexpr,
    EARLY: gl.constexpr, DEALT: gl.constexpr,
):  # fmt: skip
    """Asks for the weights of the first EARLY steps before the warps part, which takes 0.6 us.

    The producer tells their slots afterwards how many bytes to wait for.
    """
    _, weight_desc, _, _ = sources
    _, weight_smem, _, _, full, _, _ = shared
    own, _segments = count_segments(whole, tiles_m * tiles_n, steps, DEALT)
    tile, first, last = segment(0, own, whole, tiles_m * tiles_n, steps, DEALT)
    _, tile_n = grouped_tile_branching(tile, tiles_m, tiles_n, GROUP_M)
    for i in gl.static_range(EARLY):
        for s in gl.static_range(SPAN):
            _load_weights(
                weight_desc, weight_smem, full.index(i), (first + i) * SPAN + s, i * SPAN + s,
                N, tile_n, first + i < last, BLOCK_N, BOXES,
            )  # fmt: skip


@gluon.jit
def _producer(
    sources, shared, N, groups, tiles_m, tiles_n, whole, steps,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, SLICE_K: gl.constexpr,
    GROUP_SIZE: gl.constexpr, RUNS: gl.constexpr, BYTES: gl.constexpr,
    SLOTS: gl.constexpr, SPAN: gl.constexpr, GROUP_M: gl.constexpr, BOXES: gl.constexpr,
    DEPENDENT: gl.constexpr, EARLY: gl.constexpr, DEALT: gl.constexpr,
):  # fmt: skip
    """Keeps the ring full, in whose first slots the weights of EARLY steps may be; one warp."""
    _, weight_desc, _, _ = sources
    _, weight_smem, _, _, full, empty, _ = shared
    slot = 0
    phase = 1
    own, segments = count_segments(whole, tiles_m * tiles_n, steps, DEALT)
    if EARLY > 0:
        tile, first, last = segment(0, own, whole, tiles_m * tiles_n, steps, DEALT)
        tile_m, tile_n = grouped_tile_branching(tile, tiles_m, tiles_n, GROUP_M)
        for e in gl.static_range(EARLY):
            if first + e < last:
                mbarrier.expect(full.index(e), BYTES)
                for s in gl.static_range(SPAN):
                    _load_inputs(
                        sources, shared, full.index(e), (first + e) * SPAN + s, e * SPAN + s,
                        N, groups, tile_m, tile_n, BLOCK_M, BLOCK_N, SLICE_K, GROUP_SIZE, RUNS,
                    )  # fmt: skip
        loaded = gl.minimum(last - first, EARLY)
        slot, phase = slot_after(loaded, SLOTS)
    for i in range(segments):
        tile, first, last = segment(i, own, whole, tiles_m * tiles_n, steps, DEALT)
        tile_m, tile_n = grouped_tile_branching(tile, tiles_m, tiles_n, GROUP_M)
        if DEPENDENT:
            # Behind the divisions, which need not wait.
            gdc_wait()
        if EARLY > 0:
            # A variable that the loop sets to 0 is not carried by Triton: kernels hang.
            first += gl.where(i == 0, loaded, 0)
        for step in range(first, last):
            mbarrier.wait(empty.index(slot), phase)
            ready = full.index(slot)
            mbarrier.expect(ready, BYTES)
            for s in gl.static_range(SPAN):
                # TMA fills with zeros what a box takes from beyond N, M or K.
                block = step * SPAN + s
                place = slot * SPAN + s
                _load_weights(
                    weight_desc, weight_smem, ready, block, place, N, tile_n, True, BLOCK_N, BOXES
                )
                _load_inputs(
                    sources, shared, ready, block, place, N, groups, tile_m, tile_n,
                    BLOCK_M, BLOCK_N, SLICE_K, GROUP_SIZE, RUNS,
                )  # fmt: skip
            slot, phase = next_slot(slot, phase, SLOTS)


@gluon.jit
def _store_tile(
    acc, out_desc, out_smem, problem, tile_m, tile_n,
    CONSUMER: gl.constexpr, ROWS: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr,
    MMA: gl.constexpr, OUT_PARTS: gl.constexpr, UNIT: gl.constexpr,
):  # fmt: skip
    out_ptr, bias_ptr, stride_om, M, N = problem
    acc *= UNIT
    row0 = tile_n * BLOCK_N + CONSUMER * ROWS
    rows = row0 + gl.arange(0, ROWS, layout=gl.SliceLayout(1, MMA))
    if bias_ptr is not None:
        bias = gl.load(bias_ptr + rows, mask=rows < N, other=0.0)
        acc += gl.expand_dims(bias.to(gl.float32), 1)
    out = acc.to(out_ptr.dtype.element_ty)
    if OUT_PARTS == 0:
        tokens = tile_m * BLOCK_M + gl.arange(0, BLOCK_M, layout=gl.SliceLayout(0, MMA))
        at = gl.expand_dims(rows, 1) + gl.expand_dims(tokens.to(gl.int64) * stride_om, 0)
        mask = gl.expand_dims(rows < N, 1) & gl.expand_dims(tokens < M, 0)
        gl.store(out_ptr + at, out, mask=mask)
    else:
        parts = split_columns(out, OUT_PARTS)
        for i in gl.static_range(OUT_PARTS):
            # Two buffers: the copy out of one runs while the next is written.
            tma.store_wait(1)
            buffer = out_smem.index(CONSUMER * 2 + i % 2)
            sync_threads()
            buffer.store(parts[i].permute((1, 0)))
            fence_async_shared()
            sync_threads()
            at = [tile_m * BLOCK_M + i * (BLOCK_M // OUT_PARTS), row0]
            tma_store(out_desc, at, buffer)


@gluon.jit
def _consumer(
    shared, work,
    CONSUMER: gl.constexpr, CONSUMERS: gl.constexpr, ROWS: gl.constexpr, BLOCK_M: gl.constexpr,
    RUNS: gl.constexpr, SCALE: gl.constexpr, SLOTS: gl.constexpr, SPAN: gl.constexpr,
    GROUP_M: gl.constexpr, OUT_PARTS: gl.constexpr, SHARE: gl.constexpr, HAND_ON: gl.constexpr,
    MEET: gl.constexpr, JOIN: gl.constexpr,
):  # fmt: skip
    _, _, _, _, full, empty, out_smem = shared
    problem, out_desc, part_ptr, count_ptr, tiles_m, tiles_n, whole, steps = work
    MMA: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BLOCK_M, 16]
    )
    DEALT: gl.constexpr = SHARE or HAND_ON
    UNIT: gl.constexpr = 2.0**33 if SCALE == "codes" else 1.0
    tiles = tiles_m * tiles_n
    slot = 0
    phase = 0
    own, segments = count_segments(whole, tiles, steps, DEALT)
    zeros = gl.zeros((ROWS, BLOCK_M), gl.float32, MMA)
    for i in range(segments):
        tile, first, last = segment(i, own, whole, tiles, steps, DEALT)
        tile_m, tile_n = grouped_tile(tile, tiles_m, tiles_n, GROUP_M)
        acc = zeros
        if HAND_ON and first > 0:
            acc = take_on(
                part_ptr, count_ptr, tile - whole, CONSUMER, CONSUMERS, ROWS, BLOCK_M, MMA
            )
        for _step in range(first, last):
            mbarrier.wait(full.index(slot), phase)
            if SCALE != "sums":
                acc = add_scaled_weights(
                    acc, shared, slot, SPAN, CONSUMER, ROWS, RUNS, MMA, SCALE, JOIN
                )
            elif SPAN == 2:
                acc = add_two_blocks(acc, zeros, shared, slot * 2, CONSUMER, ROWS, MMA, JOIN)
            else:
                acc = add_block(acc, zeros, shared, slot, CONSUMER, ROWS, RUNS, MMA, JOIN)
            mbarrier.arrive(empty.index(slot), count=1)
            slot, phase = next_slot(slot, phase, SLOTS)
        if HAND_ON and last < steps:
            hand_on(acc, part_ptr, count_ptr, tile - whole, CONSUMER, CONSUMERS, ROWS, BLOCK_M, MMA)
        elif SHARE and last - first < steps:
            sharer, last_sharer = sharers(tile, whole, tiles, steps)
            is_last = leave_part(
                acc, part_ptr, count_ptr, sharer, last_sharer,
                CONSUMER, CONSUMERS, ROWS, BLOCK_M, MMA, MEET,
            )  # fmt: skip
            if not MEET:  # noqa: SIM102 (MEET is known when compiling)
                if is_last:
                    finish_tile(
                        problem, part_ptr, sharer, last_sharer, 0, 1, tile_m, tile_n,
                        CONSUMER, CONSUMERS, ROWS, BLOCK_M, UNIT,
                    )  # fmt: skip
        else:
            _store_tile(
                acc, out_desc, out_smem, problem, tile_m, tile_n,
                CONSUMER, ROWS, BLOCK_M, CONSUMERS * ROWS, MMA, OUT_PARTS, UNIT,
            )  # fmt: skip
    if SHARE and MEET:
        for i in range(own, segments):
            tile, first, last = segment(i, own, whole, tiles, steps, DEALT)
            if last - first < steps:
                sharer, last_sharer = sharers(tile, whole, tiles, steps)
                tile_m, tile_n = grouped_tile(tile, tiles_m, tiles_n, GROUP_M)
                meet(count_ptr, sharer, last_sharer, CONSUMER, CONSUMERS)
                finish_tile(
                    problem, part_ptr, sharer, last_sharer,
                    gl.program_id(0) - sharer, last_sharer - sharer + 1, tile_m, tile_n,
                    CONSUMER, CONSUMERS, ROWS, BLOCK_M, UNIT,
                )  # fmt: skip
                take_leave(count_ptr, sharer, last_sharer, CONSUMER, CONSUMERS)
    if OUT_PARTS > 0:
        tma.store_wait(0)


# Compiled once for all numbers of tokens and all shapes whose rows are aligned alike.
@gluon.jit(do_not_specialize=["M", "N", "groups", "tiles_m", "tiles_n", "whole", "steps"])
def w4a16_gemm_hopper(
    x_desc,  # [M, K], boxes [BLOCK_M, 2 * SLICE_K]
    weight_desc,  # int16 [blocks * N, WORDS], boxes [BLOCK_N / BOXES, WORDS]
    scale_desc,  # [groups * N], boxes [SCALES_N]
    zero_desc,  # int8 [groups * N] or None
    out_desc,  # [M, N], boxes [BLOCK_M / OUT_PARTS, ROWS], or None
    out_ptr,  # [M, N]
    bias_ptr,  # [N] or None
    part_ptr,  # fp32 [parts * CONSUMERS * ROWS * BLOCK_M], see Plan.part_elements, or None
    count_ptr,  # int32 [programs * CONSUMERS], zero before and after, or None
    M, N, groups, tiles_m, tiles_n, whole, steps, stride_om,
    BITS: gl.constexpr,
    GROUP_SIZE: gl.constexpr,
    SLICE_K: gl.constexpr,
    RUNS: gl.constexpr,  # groups of a block: 1, 2 or 4
    HALF: gl.constexpr,
    SCALE: gl.constexpr,  # what scales multiply: see hopper_block
    BLOCK_M: gl.constexpr, ROWS: gl.constexpr, CONSUMERS: gl.constexpr,
    SLOTS: gl.constexpr,
    SPAN: gl.constexpr,  # blocks of K a slot and step
    GROUP_M: gl.constexpr,
    OUT_PARTS: gl.constexpr,  # pieces a tile is stored in by TMA, 0 for plain stores
    SHARE: gl.constexpr,  # whether tiles may be shared by any number of programs
    HAND_ON: gl.constexpr,  # whether they are handed on from one program to the next
    MEET: gl.constexpr,  # whether sharers wait for each other, which needs a cooperative launch
    JOIN: gl.constexpr,  # slices of weights that are an operand of wgmma: 1, 2 or 4
    REGISTERS: gl.constexpr,  # of a consumer's thread
    DEPENDENT: gl.constexpr,  # whether it is launched while x is still being written
    EARLY: gl.constexpr,  # steps whose weights are asked for before the warps part
):  # fmt: skip
    BLOCK_N: gl.constexpr = CONSUMERS * ROWS
    WORDS: gl.constexpr = SLICE_K * BITS // 4
    DEALT: gl.constexpr = SHARE or HAND_ON
    # Shapes in shared memory are powers of two: three consumers have a box of weights each, and
    # their scales come with those of the next 64 features.
    BOXES: gl.constexpr = 3 if CONSUMERS == 3 else 1
    SCALES_N: gl.constexpr = 4 * ROWS if CONSUMERS == 3 else BLOCK_N
    x_smem = gl.allocate_shared_memory(
        HALF, [SLOTS * SPAN * 2, BLOCK_M, 2 * SLICE_K], x_desc.layout
    )
    weight_smem = gl.allocate_shared_memory(
        weight_desc.dtype, [SLOTS * SPAN * BOXES, BLOCK_N // BOXES, WORDS], weight_desc.layout
    )
    scale_smem = gl.allocate_shared_memory(
        scale_desc.dtype, [SLOTS * SPAN * RUNS, SCALES_N], scale_desc.layout
    )
    if zero_desc is not None:
        zero_smem = gl.allocate_shared_memory(
            gl.int8, [SLOTS * SPAN * RUNS, SCALES_N], zero_desc.layout
        )
    else:
        zero_smem: gl.constexpr = None
    if OUT_PARTS > 0:
        out_smem = gl.allocate_shared_memory(
            HALF, [CONSUMERS * 2, BLOCK_M // OUT_PARTS, ROWS], out_desc.layout
        )
    else:
        out_smem: gl.constexpr = None
    full = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    sources = (x_desc, weight_desc, scale_desc, zero_desc)
    shared = (x_smem, weight_smem, scale_smem, zero_smem, full, empty, out_smem)
    # Each takes a barrier of the warps: first what the first weights need.
    for i in gl.static_range(EARLY):
        mbarrier.init(full.index(i), count=1)
    if EARLY > 0:
        fence_async_shared()
        _load_early(
            sources, shared, N, tiles_m, tiles_n, whole, steps,
            BLOCK_N, SPAN, GROUP_M, BOXES, EARLY, DEALT,
        )  # fmt: skip
    for i in gl.static_range(SLOTS):
        if i >= EARLY:
            mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=CONSUMERS)
    fence_async_shared()
    PARAMETER_BYTES: gl.constexpr = scale_desc.dtype.primitive_bitwidth // 8 + (
        0 if zero_desc is None else 1
    )
    BYTES: gl.constexpr = SPAN * (
        2 * BLOCK_N * WORDS + SCALES_N * RUNS * PARAMETER_BYTES + 8 * BLOCK_M * SLICE_K
    )
    problem = (out_ptr, bias_ptr, stride_om, M, N)
    work = (problem, out_desc, part_ptr, count_ptr, tiles_m, tiles_n, whole, steps)
    if CONSUMERS == 2:
        gl.warp_specialize([
            (_consumer, (shared, work, 0, CONSUMERS, ROWS, BLOCK_M, RUNS, SCALE,
                         SLOTS, SPAN, GROUP_M, OUT_PARTS, SHARE, HAND_ON, MEET, JOIN)),
            (_consumer, (shared, work, 1, CONSUMERS, ROWS, BLOCK_M, RUNS, SCALE,
                         SLOTS, SPAN, GROUP_M, OUT_PARTS, SHARE, HAND_ON, MEET, JOIN)),
            (_producer, (sources, shared, N, groups, tiles_m, tiles_n, whole, steps, BLOCK_M, BLOCK_N,
                         SLICE_K, GROUP_SIZE, RUNS, BYTES, SLOTS, SPAN, GROUP_M, BOXES,
                         DEPENDENT, EARLY, DEALT)),
        ], [4, 1], [REGISTERS, 24])  # fmt: skip
    elif CONSUMERS == 3:
        gl.warp_specialize([
            (_consumer, (shared, work, 0, CONSUMERS, ROWS, BLOCK_M, RUNS, SCALE,
                         SLOTS, SPAN, GROUP_M, OUT_PARTS, SHARE, HAND_ON, MEET, JOIN)),
            (_consumer, (shared, work, 1, CONSUMERS, ROWS, BLOCK_M, RUNS, SCALE,
                         SLOTS, SPAN, GROUP_M, OUT_PARTS, SHARE, HAND_ON, MEET, JOIN)),
            (_consumer, (shared, work, 2, CONSUMERS, ROWS, BLOCK_M, RUNS, SCALE,
                         SLOTS, SPAN, GROUP_M, OUT_PARTS, SHARE, HAND_ON, MEET, JOIN)),
            (_producer, (sources, shared, N, groups, tiles_m, tiles_n, whole, steps, BLOCK_M, BLOCK_N,
                         SLICE_K, GROUP_SIZE, RUNS, BYTES, SLOTS, SPAN, GROUP_M, BOXES,
                         DEPENDENT, EARLY, DEALT)),
        ], [4, 4, 1], [REGISTERS, REGISTERS, 24])  # fmt: skip
    else:
        gl.warp_specialize([
            (_consumer, (shared, work, 0, CONSUMERS, ROWS, BLOCK_M, RUNS, SCALE,
                         SLOTS, SPAN, GROUP_M, OUT_PARTS, SHARE, HAND_ON, MEET, JOIN)),
            (_consumer, (shared, work, 1, CONSUMERS, ROWS, BLOCK_M, RUNS, SCALE,
                         SLOTS, SPAN, GROUP_M, OUT_PARTS, SHARE, HAND_ON, MEET, JOIN)),
            (_consumer, (shared, work, 2, CONSUMERS, ROWS, BLOCK_M, RUNS, SCALE,
                         SLOTS, SPAN, GROUP_M, OUT_PARTS, SHARE, HAND_ON, MEET, JOIN)),
            (_consumer, (shared, work, 3, CONSUMERS, ROWS, BLOCK_M, RUNS, SCALE,
                         SLOTS, SPAN, GROUP_M, OUT_PARTS, SHARE, HAND_ON, MEET, JOIN)),
            (_producer, (sources, shared, N, groups, tiles_m, tiles_n, whole, steps, BLOCK_M, BLOCK_N,
                         SLICE_K, GROUP_SIZE, RUNS, BYTES, SLOTS, SPAN, GROUP_M, BOXES,
                         DEPENDENT, EARLY, DEALT)),
        ], [4, 4, 4, 1], [REGISTERS, REGISTERS, REGISTERS, 24])  # fmt: skip
