"""Plain torch of the int8 GEMM with its epilogue, exact in the integers on any device."""

from __future__ import annotations

import torch


def epilogue(
    acc: torch.Tensor,
    x_scale: torch.Tensor,
    w_scale: torch.Tensor,
    x_zero: torch.Tensor | None,
    w_column_sum: torch.Tensor | None,
    bias: torch.Tensor | None,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    """``(s_m * (s_n * float(acc - zero_m * colsum_n))) + bias`` in fp32, rounded once at the end.

    Args:
        acc: int32 ``[M, N]``.
        x_scale: fp32 ``[M, 1]`` or ``[1]``.
        w_scale: fp32 ``[N]`` or ``[1]``.
        x_zero: int32 ``[M, 1]`` or ``[1]``, or ``None``.
        w_column_sum: int32 ``[N]``, with ``x_zero``.
        bias: ``[N]`` or ``None``.
        out_dtype: dtype of the result.
    """
    if x_zero is not None and w_column_sum is not None:
        acc = acc - x_zero * w_column_sum
    out = x_scale * (w_scale * acc.to(torch.float32))
    if bias is not None:
        out = out + bias.to(torch.float32)
    return out.to(out_dtype)


def int_matmul(codes: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """int32 ``[M, N]`` = ``codes [M, K] @ weight [N, K].T``, exact.

    fp64 holds every partial sum exactly (``|sum| <= 2**14 K``), and unlike integer matmul it is
    fast on every device.
    """
    return (codes.to(torch.float64) @ weight.to(torch.float64).T).to(torch.int32)
