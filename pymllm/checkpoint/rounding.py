"""Rounding a weight to integer codes, as the compressed-tensors library does."""

from __future__ import annotations

import torch


def quantize_weight(
    weight: torch.Tensor, bits: int, group_size: int, *, symmetric: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Round to nearest with a scale per group or row; every step in the weight's own dtype.

    Symmetric: ``s = absmax / ((2**b - 1) / 2)``, ``code = rint(clamp(w / s))``. Asymmetric, the
    range extended to 0: ``s = (max - min) / (2**b - 1)``, ``zero = rint(clamp(-2**(b-1) - min / s))``,
    ``code = rint(clamp(w / s + zero))``. A scale of 0 becomes the dtype's epsilon. Source:
    compressed-tensors, ``calculate_qparams`` and ``quantize``.

    Args:
        weight: floating ``[N, K]``.
        bits: 4 or 8.
        group_size: inputs that share a scale, a divisor of K, or -1 for the whole row.
        symmetric: whether to go without zero points.

    Returns:
        Codes int8 ``[N, K]``, scales ``[N, G]`` in the weight's dtype, zero points int8
        ``[N, G]`` or None.
    """
    half = 1 << (bits - 1)
    n, k = weight.shape
    size = k if group_size < 0 else group_size
    grouped = weight.reshape(n, k // size, size)
    low = grouped.amin(dim=-1, keepdim=True).clamp(max=0)
    high = grouped.amax(dim=-1, keepdim=True).clamp(min=0)
    zero = None
    if symmetric:
        scale = torch.maximum(-low, high) / ((2 * half - 1) / 2)
    else:
        scale = (high - low) / (2 * half - 1)
        # Where the scale is 0 the row is, too, and so may be its zero point.
        zero = torch.nan_to_num(-half - low / scale).clamp(-half, half - 1).round()
    scale = torch.where(scale == 0, torch.finfo(weight.dtype).eps, scale)
    scaled = grouped / scale
    if zero is not None:
        scaled += zero
    codes = scaled.clamp(-half, half - 1).round().to(torch.int8).flatten(1)
    return codes, scale.squeeze(-1), None if zero is None else zero.squeeze(-1).to(torch.int8)
