"""The epilogue of the Hopper int8 GEMM, and how programs finish a tile that they share."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from pymllm_kernels.common.shared_tile import add_parts


@gluon.jit
def _along(values, ROWS: gl.constexpr):
    """A vector as a column of the tile (one value a row), or as a row of it."""
    if ROWS:
        return values[:, None]
    else:
        return values[None, :]


@gluon.jit
def load_feature_factors(features, there, w_scale_ptr, column_sum_ptr, bias_ptr, stride_ws):
    """(scale, column sum, bias) of features; what is absent is 0."""
    column_sum = 0
    bias = 0.0
    s_n = gl.load(w_scale_ptr + features * stride_ws, mask=there, other=0.0)
    if column_sum_ptr is not None:
        column_sum = gl.load(column_sum_ptr + features, mask=there, other=0)
    if bias_ptr is not None:
        bias = gl.load(bias_ptr + features, mask=there, other=0.0)
    return s_n, column_sum, bias


@gluon.jit
def load_factors(
    layout: gl.constexpr, ROWS: gl.constexpr, COLUMNS: gl.constexpr, token0, feature0, M, N,
    x_scale_ptr, w_scale_ptr, x_zero_ptr, column_sum_ptr, bias_ptr, stride_xs, stride_ws,
    SWAP: gl.constexpr,
):  # fmt: skip
    """(s_m, s_n, zero_m, colsum_n, bias_n) of a tile, each along its axis; what is absent is 0."""
    rows = gl.arange(0, ROWS, layout=gl.SliceLayout(1, layout))
    columns = gl.arange(0, COLUMNS, layout=gl.SliceLayout(0, layout))
    if SWAP:
        tokens, features = token0 + columns, feature0 + rows
    else:
        tokens, features = token0 + rows, feature0 + columns
    s_m = gl.load(x_scale_ptr + tokens * stride_xs, mask=tokens < M, other=0.0)
    zero = 0
    if x_zero_ptr is not None:
        zero = gl.load(x_zero_ptr + tokens * stride_xs, mask=tokens < M, other=0)
    s_n, column_sum, bias = load_feature_factors(
        features, features < N, w_scale_ptr, column_sum_ptr, bias_ptr, stride_ws
    )
    return s_m, s_n, zero, column_sum, bias


@gluon.jit
def scale_sum(acc, s_m, s_n, zero, column_sum, bias, ZERO: gl.constexpr, BIAS: gl.constexpr):
    """``s_m * (s_n * float(acc - zero_m * colsum_n)) + bias_n`` in fp32, of operands that broadcast."""
    if ZERO:
        acc -= zero * column_sum
    scaled = s_n * acc.to(gl.float32)
    s_m, scaled = gl.broadcast(s_m, scaled)
    if BIAS:
        bias, scaled = gl.broadcast(bias, scaled)
        return gl.fma(s_m, scaled, bias)
    else:
        return s_m * scaled


@gluon.jit
def epilogue(
    acc, s_m, s_n, zero, column_sum, bias,
    ZERO: gl.constexpr, BIAS: gl.constexpr, SWAP: gl.constexpr, DTYPE: gl.constexpr,
):  # fmt: skip
    """:func:`scale_sum` of a tile and its factors along their axes, rounded once."""
    if ZERO:
        zero = _along(zero, not SWAP)
        column_sum = _along(column_sum, SWAP)
    if BIAS:
        bias = _along(bias.to(gl.float32), SWAP)
    return scale_sum(
        acc, _along(s_m, not SWAP), _along(s_n, SWAP), zero, column_sum, bias, ZERO, BIAS
    ).to(DTYPE)


@gluon.jit
def finish_tile(
    part_ptr, first, last, piece0, pieces, token0, feature0, M, N, out_ptr, stride_om,
    x_scale_ptr, w_scale_ptr, x_zero_ptr, column_sum_ptr, bias_ptr, stride_xs, stride_ws,
    INDEX: gl.constexpr, HALVES: gl.constexpr, TOKENS: gl.constexpr, FEATURES: gl.constexpr,
):  # fmt: skip
    """Adds up, scales and stores pieces ``piece0``, ``piece0 + pieces``, ... of a shared tile."""
    PIECE: gl.constexpr = min(TOKENS, 1024 // FEATURES)
    LANES: gl.constexpr = min(32, FEATURES // 4)
    layout: gl.constexpr = gl.BlockedLayout([1, 4], [32 // LANES, LANES], [4, 1], [1, 0])
    tokens = gl.arange(0, PIECE, layout=gl.SliceLayout(1, layout))
    features = gl.arange(0, FEATURES, layout=gl.SliceLayout(0, layout))
    used = gl.cdiv(gl.minimum(M - token0, TOKENS), PIECE)
    for piece in range(piece0, used, pieces):
        token = token0 + piece * PIECE
        # They arrive beside the parts.
        s_m, s_n, zero, column_sum, bias = load_factors(
            layout, PIECE, FEATURES, token, feature0, M, N, x_scale_ptr, w_scale_ptr, x_zero_ptr,
            column_sum_ptr, bias_ptr, stride_xs, stride_ws, False,
        )  # fmt: skip
        at = (piece * PIECE + tokens)[:, None] * FEATURES + features[None, :]
        total = gl.zeros((PIECE, FEATURES), gl.int32, layout)
        total = add_parts(total, part_ptr, at, first, last, INDEX, HALVES, TOKENS * FEATURES)
        out = epilogue(
            total, s_m, s_n, zero, column_sum, bias, x_zero_ptr is not None, bias_ptr is not None,
            False, out_ptr.dtype.element_ty,
        )  # fmt: skip
        m = token + tokens
        n = feature0 + features
        to = out_ptr + (m.to(gl.int64) * stride_om)[:, None] + n[None, :]
        gl.store(to, out, mask=(m < M)[:, None] & (n < N)[None, :])
