"""What kernels that work on blocks of 16 rows, their warps splitting K, have in common."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl


@gluon.jit
def next_step(rb, k, steps, ROWS: gl.constexpr):
    """The first row block of a pass and its step of K, one step on: passes follow each other."""
    k += 1
    rb = gl.where(k == steps, rb + ROWS, rb)
    return rb, gl.where(k == steps, 0, k)


@gluon.jit
def stack(tiles, zeros, PLACES: gl.constexpr):
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
    elif PLACES == 16:
        one = one.permute(0, 6, 5, 4, 3, 1, 2)
    return one.reshape(zeros.shape[0], PLACES * 128)


@gluon.jit
def add_warps(stacked, parts, layout: gl.constexpr, ROW_WARPS: gl.constexpr, WARPS: gl.constexpr):
    """Sums ``[ROW_WARPS, S]`` over the warps with the same rows, in order, of stacked ``[WARPS, S]``.

    Warp ``w`` has row ``w % ROW_WARPS``. ``parts [WARPS, S]`` is shared memory.
    """
    parts.store(stacked)
    total = parts.slice(0, ROW_WARPS).load(layout)
    for w in gl.static_range(1, WARPS // ROW_WARPS):
        total += parts.slice(w * ROW_WARPS, ROW_WARPS).load(layout)
    return total
