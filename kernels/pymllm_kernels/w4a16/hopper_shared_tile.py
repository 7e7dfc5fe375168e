"""How the consumers of the Hopper kernel add up and store a tile that several programs share."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from pymllm_kernels.common.shared_tile import add_parts


@gluon.jit
def finish_tile(
    problem, part_ptr, first, last, piece0, pieces, tile_m, tile_n,
    CONSUMER: gl.constexpr, CONSUMERS: gl.constexpr, ROWS: gl.constexpr, BLOCK_M: gl.constexpr,
    UNIT: gl.constexpr,
):  # fmt: skip
    """Adds up and stores pieces ``piece0``, ``piece0 + pieces``, ... of a shared tile."""
    out_ptr, bias_ptr, stride_om, M, N = problem
    TOKENS: gl.constexpr = min(BLOCK_M, 16)
    PIECE: gl.constexpr = gl.BlockedLayout([1, 4], [128 // ROWS, ROWS // 4], [4, 1], [1, 0])
    rows = gl.arange(0, ROWS, layout=gl.SliceLayout(0, PIECE))
    tokens = gl.arange(0, TOKENS, layout=gl.SliceLayout(1, PIECE))
    n = tile_n * (CONSUMERS * ROWS) + CONSUMER * ROWS + rows
    used = gl.cdiv(gl.minimum(M - tile_m * BLOCK_M, BLOCK_M), TOKENS)
    for piece in range(piece0, used, pieces):
        at = gl.expand_dims((piece * TOKENS + tokens) * ROWS, 1) + gl.expand_dims(rows, 0)
        total = gl.zeros((TOKENS, ROWS), gl.float32, PIECE)
        total = add_parts(total, part_ptr, at, first, last, CONSUMER, CONSUMERS, ROWS * BLOCK_M)
        total *= UNIT
        if bias_ptr is not None:
            bias = gl.load(bias_ptr + n, mask=n < N, other=0.0)
            total += gl.expand_dims(bias.to(gl.float32), 0)
        m = tile_m * BLOCK_M + piece * TOKENS + tokens
        out = out_ptr + gl.expand_dims(m.to(gl.int64) * stride_om, 1) + gl.expand_dims(n, 0)
        mask = gl.expand_dims(m < M, 1) & gl.expand_dims(n < N, 0)
        gl.store(out, total.to(out_ptr.dtype.element_ty), mask=mask)
