"""How a persistent grid shares the tiles of a GEMM, as Gluon functions.

Work is cut into (tile, step of K) units. The first ``whole`` tiles go to programs whole, one after
the other. The units of the rest are dealt out evenly and contiguously (stream-K, arXiv 2301.03598),
so that a layer of few tiles fills the GPU too, and one of several rounds of tiles to their end; a tile
whose units fall to several programs is *shared* and they add up their parts.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl


@gluon.jit
def share_of(program, units, programs):
    """First and last + 1 unit of a program: shares differ by at most one unit."""
    base = units // programs
    more = units % programs
    start = program * base + gl.minimum(program, more)
    return start, start + base + gl.where(program < more, 1, 0)


@gluon.jit
def _program_of(unit, units, programs):
    """The program whose share holds ``unit``; the inverse of ``share_of``."""
    base = units // programs
    more = units % programs
    long = more * (base + 1)
    return gl.where(unit < long, unit // (base + 1), more + (unit - long) // gl.maximum(base, 1))


@gluon.jit
def count_segments(whole, tiles, steps, DEALT: gl.constexpr):
    """This program's whole tiles, and all its segments (whole tiles, then parts of tiles).

    DEALT: whether units are dealt out; if not, ``whole`` is all tiles and nothing is divided.
    """
    program = gl.program_id(0)
    programs = gl.num_programs(0)
    own = gl.maximum(gl.cdiv(whole - program, programs), 0)
    segments = own
    if DEALT:
        start, end = share_of(program, (tiles - whole) * steps, programs)
        segments += gl.where(end > start, (end - 1) // steps - start // steps + 1, 0)
    return own, segments


@gluon.jit
def segment(i, own, whole, tiles, steps, DEALT: gl.constexpr):
    """Tile and first and last + 1 step of this program's segment ``i``."""
    program = gl.program_id(0)
    programs = gl.num_programs(0)
    tile = program + i * programs
    first = 0 * steps
    last = steps
    if DEALT:
        start, end = share_of(program, (tiles - whole) * steps, programs)
        # Backwards: a part that a later program's last one is added to comes first.
        part = (end - 1) // steps - (i - own)
        is_part = i >= own
        tile = gl.where(is_part, whole + part, tile)
        first = gl.where(is_part, gl.maximum(start - part * steps, 0), 0)
        last = gl.where(is_part, gl.minimum(end - part * steps, steps), steps)
    return tile, first, last


@gluon.jit
def sharers(tile, whole, tiles, steps):
    """First and last of the programs that share a tile."""
    programs = gl.num_programs(0)
    units = (tiles - whole) * steps
    first = _program_of((tile - whole) * steps, units, programs)
    last = _program_of((tile - whole + 1) * steps - 1, units, programs)
    return first, last


@gluon.jit
def part_of(program, first, CONSUMER: gl.constexpr, CONSUMERS: gl.constexpr):
    """Place of a program's part of a shared tile in the workspace.

    A program is the first sharer of at most one tile and a later one of at most one: two places a
    program and consumer.
    """
    return (program * 2 + gl.where(program == first, 1, 0)) * CONSUMERS + CONSUMER
