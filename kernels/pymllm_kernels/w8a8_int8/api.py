"""The public function of the int8 GEMM."""

from __future__ import annotations

import torch

OUT_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# |code * weight| <= 2**14 and |code - zero| <= 255: the corrected sum stays in int32 up to here.
MAX_K = 65536


def w8a8_int8_gemm(
    codes: torch.Tensor,
    weight: torch.Tensor,
    x_scale: torch.Tensor,
    w_scale: torch.Tensor,
    *,
    out_dtype: torch.dtype,
    x_zero: torch.Tensor | None = None,
    w_column_sum: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """``s_m * (s_n * float(acc - zero_m * colsum_n)) + bias`` with exact int32 ``acc = codes @ W.T``.

    Args:
        codes: int8 ``[..., K]``, K at most 65536.
        weight: int8 ``[N, K]``.
        x_scale: fp32 ``[..., 1]`` (a scale a row) or ``[1]``.
        w_scale: fp32 ``[N]`` or ``[1]``.
        out_dtype: bf16, fp16 or fp32; the fp32 epilogue is rounded to it once.
        x_zero: int32, shaped as ``x_scale``, or ``None``; needs ``w_column_sum``.
        w_column_sum: int32 ``[N]``, ``sum_k W[n, k]``.
        bias: floating ``[N]`` or ``None``.

    Returns:
        ``[..., N]`` in ``out_dtype``.

    Raises:
        ValueError: a shape, dtype or device does not fit; the message names the argument.
    """
    _check(codes, weight, x_scale, w_scale, x_zero, w_column_sum, bias, out_dtype)
    out: torch.Tensor = torch.ops.pymllm_kernels.w8a8_int8_gemm(
        codes, weight, x_scale, w_scale, x_zero, w_column_sum, bias, out_dtype
    )
    return out


def _check(
    codes: torch.Tensor,
    weight: torch.Tensor,
    x_scale: torch.Tensor,
    w_scale: torch.Tensor,
    x_zero: torch.Tensor | None,
    w_column_sum: torch.Tensor | None,
    bias: torch.Tensor | None,
    out_dtype: torch.dtype,
) -> None:
    n, k = weight.shape
    if out_dtype not in OUT_DTYPES:
        raise ValueError(f"out_dtype: found {out_dtype}, accepted {OUT_DTYPES}")
    for name, tensor in (("codes", codes), ("weight", weight)):
        if tensor.dtype != torch.int8:
            raise ValueError(f"{name}: found dtype {tensor.dtype}, accepted torch.int8")
    if codes.shape[-1] != k:
        raise ValueError(f"codes: found {codes.shape[-1]} inputs, the weight has {k}")
    if k > MAX_K:
        raise ValueError(f"weight: found {k} inputs, accepted up to {MAX_K} (int32 sums)")
    for name, tensor in (("x_scale", x_scale), ("w_scale", w_scale)):
        if tensor.dtype != torch.float32:
            raise ValueError(f"{name}: found dtype {tensor.dtype}, accepted torch.float32")
    if w_scale.shape not in ((n,), (1,)):
        raise ValueError(f"w_scale: found shape {tuple(w_scale.shape)}, expected ({n},) or (1,)")
    per_row = (*codes.shape[:-1], 1)
    if x_scale.dim() != 1 and x_scale.shape != per_row:
        raise ValueError(f"x_scale: found shape {tuple(x_scale.shape)}, expected {per_row} or (1,)")
    if (x_zero is None) != (w_column_sum is None):
        raise ValueError("x_zero and w_column_sum: found one of them, accepted both or neither")
    if x_zero is not None and (x_zero.dtype != torch.int32 or x_zero.dim() != x_scale.dim()):
        raise ValueError(f"x_zero: found {x_zero.dtype}, accepted torch.int32 shaped as x_scale")
    if bias is not None and bias.shape != (n,):
        raise ValueError(f"bias: found shape {tuple(bias.shape)}, expected ({n},)")
