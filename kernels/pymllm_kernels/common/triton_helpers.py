"""Triton helpers that several kernels share."""

import triton
import triton.language as tl


@triton.jit
def grouped_tile(pid, tiles_m, tiles_n, GROUP_M: tl.constexpr):
    """(tile_m, tile_n) of a program: GROUP_M tiles of M share a column of N tiles, for L2 reuse."""
    per_group = GROUP_M * tiles_n
    group = pid // per_group
    first_m = group * GROUP_M
    rows = min(tiles_m - first_m, GROUP_M)
    within = pid % per_group
    return first_m + within % rows, within // rows


@triton.jit
def grouped_tile_branching(pid, tiles_m, tiles_n, GROUP_M: tl.constexpr):
    """:func:`grouped_tile` with a way past its divisions where there is one tile of M.

    For what stands before the first copies of few tokens: 0.1 us of them there.
    """
    tile_m = 0 * pid
    tile_n = pid
    if tiles_m > 1:
        tile_m, tile_n = grouped_tile(pid, tiles_m, tiles_n, GROUP_M)
    return tile_m, tile_n
