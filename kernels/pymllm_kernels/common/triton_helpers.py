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
