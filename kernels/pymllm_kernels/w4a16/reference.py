"""Plain torch of the weight-only linear: the meaning of the checkpoint, on any device."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from pymllm_kernels.common.packing import unpack_words


def group_of_input(k: int, groups: int, device: torch.device) -> torch.Tensor:
    """int64 ``[K]``: the scale column of each input when groups are neighbouring inputs."""
    return torch.arange(k, device=device) // (k // groups)


def dequantize(
    codes: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor | None,
    group_index: torch.Tensor | None,
    bits: int,
) -> torch.Tensor:
    """``W[n, k] = (codes[n, k] - zero[n, c(k)]) * scale[n, c(k)]``, rounded once to the scale's dtype.

    Args:
        codes: uint8 ``[N, K]``, raw codes.
        scale: floating ``[N, G]``.
        zero: uint8 ``[N, G]``, raw zero points, or ``None`` for the symmetric ``2**(bits - 1)``.
        group_index: integer ``[K]``, ``c(k)``, or ``None`` for ``k // (K / G)``.
        bits: 4 or 8.

    Source: compressed-tensors, dequantization of ``pack-quantized`` weights. The difference is exact
    in every floating dtype of 8 significant bits or more.
    """
    if group_index is None:
        group_index = group_of_input(codes.shape[1], scale.shape[1], codes.device)
    offset = 1 << (bits - 1)
    if zero is None:
        difference = codes.to(torch.int16) - offset
    else:
        difference = codes.to(torch.int16) - zero.to(torch.int16)[:, group_index]
    return difference.to(scale.dtype) * scale[:, group_index]


def linear(
    x: torch.Tensor,
    words: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor | None,
    group_index: torch.Tensor | None,
    bias: torch.Tensor | None,
    bits: int,
) -> torch.Tensor:
    """``x @ W.T + bias`` in ``x``'s dtype, from the checkpoint's words ``[N, W]``."""
    codes = unpack_words(words, bits, x.shape[-1])
    weight = dequantize(codes, scale, zero, group_index, bits).to(x.dtype)
    return F.linear(x, weight, None if bias is None else bias.to(x.dtype))
