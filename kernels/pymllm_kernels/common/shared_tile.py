"""How programs add up a tile that they share, as Gluon functions.

Every sharer writes its partial sums to the workspace and counts itself. Then either the last to come
adds them up alone, or all wait for each other (``meet``) and add up a piece each: a tile of 64 tokens
and more takes one program longer than the wait. Both add in the order of the programs, so the result
depends neither on who was last nor on which way was taken.

Waiting needs every program of the grid on the GPU at once, which a cooperative launch guarantees.

Of more tiles than programs none is shared by more than two. The one that begins it does so before its
last tiles and hands its sums on; the other one takes them on when it comes to the rest of the tile, last
of all, and adds to them. It waits for a program of a lower number only, which started before it.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from pymllm_kernels.common.gluon_hopper import sync_threads
from pymllm_kernels.common.stream_k import part_of


@gluon.jit
def leave_part(
    acc, part_ptr, count_ptr, first, last,
    CONSUMER: gl.constexpr, CONSUMERS: gl.constexpr, ROWS: gl.constexpr,
    BLOCK_M: gl.constexpr, MMA: gl.constexpr, MEET: gl.constexpr,
):  # fmt: skip
    """Writes this program's partial sums; without MEET, True for the last to do so."""
    program = gl.program_id(0)
    rows = gl.arange(0, ROWS, layout=gl.SliceLayout(1, MMA))
    tokens = gl.arange(0, BLOCK_M, layout=gl.SliceLayout(0, MMA))
    at = gl.expand_dims(rows, 1) + gl.expand_dims(tokens * ROWS, 0)
    part = part_of(program, first, CONSUMER, CONSUMERS) * (ROWS * BLOCK_M)
    gl.store(part_ptr + part + at, acc)
    sync_threads()
    counter = count_ptr + first * CONSUMERS + CONSUMER
    if MEET:
        gl.atomic_add(counter, 1, sem="release")
        is_last = False
    else:
        is_last = gl.atomic_add(counter, 1, sem="acq_rel") == last - first
        if is_last:
            gl.store(counter, 0)
    return is_last


@gluon.jit
def _place_of_part(
    part_ptr, begun, CONSUMER: gl.constexpr, CONSUMERS: gl.constexpr, ROWS: gl.constexpr,
    BLOCK_M: gl.constexpr, MMA: gl.constexpr,
):  # fmt: skip
    """Where the sums of tile ``begun`` of those that are dealt out lie: neighbours are a thread's.

    By tile: places by program would be known before the loop over tiles, and their 64 bits of each
    element held in registers through it.
    """
    rows = gl.arange(0, ROWS, layout=gl.SliceLayout(1, MMA))
    tokens = gl.arange(0, BLOCK_M, layout=gl.SliceLayout(0, MMA))
    at = gl.expand_dims(rows * BLOCK_M, 1) + gl.expand_dims(tokens, 0)
    return part_ptr + (begun * CONSUMERS + CONSUMER) * (ROWS * BLOCK_M) + at


@gluon.jit
def hand_on(
    acc, part_ptr, count_ptr, begun, CONSUMER: gl.constexpr, CONSUMERS: gl.constexpr,
    ROWS: gl.constexpr, BLOCK_M: gl.constexpr, MMA: gl.constexpr,
):  # fmt: skip
    """Leaves the sums of a tile that this program began to the next program."""
    program = gl.program_id(0)
    gl.store(_place_of_part(part_ptr, begun, CONSUMER, CONSUMERS, ROWS, BLOCK_M, MMA), acc)
    sync_threads()
    gl.atomic_add(count_ptr + program * CONSUMERS + CONSUMER, 1, sem="release")


@gluon.jit
def take_on(
    part_ptr, count_ptr, begun, CONSUMER: gl.constexpr, CONSUMERS: gl.constexpr,
    ROWS: gl.constexpr, BLOCK_M: gl.constexpr, MMA: gl.constexpr,
):  # fmt: skip
    """The sums of the tile that the program before this one began, whose counter is left as it was."""
    program = gl.program_id(0) - 1
    counter = count_ptr + program * CONSUMERS + CONSUMER
    there = gl.atomic_add(counter, 0, sem="acquire")
    while there == 0:
        there = gl.atomic_add(counter, 0, sem="acquire")
    gl.store(counter, 0)
    place = _place_of_part(part_ptr, begun, CONSUMER, CONSUMERS, ROWS, BLOCK_M, MMA)
    return gl.load(place, cache_modifier=".cg")


@gluon.jit
def meet(count_ptr, first, last, CONSUMER: gl.constexpr, CONSUMERS: gl.constexpr):
    """Waits until all sharers of a tile have left their parts."""
    counter = count_ptr + first * CONSUMERS + CONSUMER
    arrived = gl.atomic_add(counter, 0, sem="acquire")
    while arrived < last - first + 1:
        arrived = gl.atomic_add(counter, 0, sem="acquire")


@gluon.jit
def take_leave(count_ptr, first, last, CONSUMER: gl.constexpr, CONSUMERS: gl.constexpr):
    """After ``meet``: the last to have read leaves the counter as it was found."""
    counter = count_ptr + first * CONSUMERS + CONSUMER
    if gl.atomic_add(counter, 1, sem="relaxed") == 2 * (last - first) + 1:
        gl.store(counter, 0)


@gluon.jit
def add_parts(
    total, part_ptr, at, first, last,
    CONSUMER: gl.constexpr, CONSUMERS: gl.constexpr, SIZE: gl.constexpr,
):  # fmt: skip
    """``total`` plus elements ``at`` of the sharers' parts, each of SIZE elements."""
    # Four loads at a time: one after the other, each costs the latency of the L2.
    for p in range(first, last + 1, 4):
        for q in gl.static_range(4):
            part = part_of(p + q, first, CONSUMER, CONSUMERS) * SIZE
            there = at < gl.where(p + q <= last, SIZE, 0)
            total += gl.load(part_ptr + part + at, mask=there, other=0, cache_modifier=".cg")
    return total
