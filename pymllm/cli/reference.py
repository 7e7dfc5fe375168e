"""The exact output of a layer, in fp64, from the tensors of its checkpoint."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from pymllm.quantization.format import LayerScheme

# Rows of a weight that are in fp64 at the same time: 128 MiB at K = 16384.
_ROWS = 1024


def exact_output(
    x: torch.Tensor, tensors: Mapping[str, torch.Tensor], scheme: LayerScheme | None
) -> torch.Tensor:
    """``x @ W.T + bias`` in fp64 on the device of ``x``, activations not quantized.

    Args:
        x: floating ``[M, K]``.
        tensors: the layer's checkpoint tensors by suffix, e.g. ``weight_packed``.
        scheme: how they are stored; ``None`` for a floating ``weight``.
    """
    here = {suffix: tensor.to(x.device) for suffix, tensor in tensors.items()}
    zero = _zero_points(here, scheme)
    inputs = x.to(torch.float64)
    stored = here["weight_packed" if "weight_packed" in here else "weight"]
    parts = []
    for start in range(0, stored.shape[0], _ROWS):
        rows = slice(start, start + _ROWS)
        block = dequantized_rows(here, scheme, x.shape[1], zero, rows)
        parts.append(inputs @ block.T)
    output = torch.cat(parts, dim=1)
    bias = here.get("bias")
    return output if bias is None else output + bias.to(torch.float64)


def dequantized_rows(
    tensors: Mapping[str, torch.Tensor],
    scheme: LayerScheme | None,
    k: int,
    zero: torch.Tensor | None,
    rows: slice,
) -> torch.Tensor:
    """Rows of the weight in fp64: ``(code - zero) * scale`` (compressed-tensors format).

    Args:
        tensors: the layer's checkpoint tensors by suffix.
        scheme: how they are stored; ``None`` for a floating ``weight``.
        k: inputs of the layer.
        zero: signed zero points ``[N, G]``, or ``None`` for zero.
        rows: which rows.
    """
    if scheme is None:
        return tensors["weight"][rows].to(torch.float64)
    scale = tensors["weight_scale"].to(torch.float64)
    if scheme.kind == "w8a8_int8":
        # One scale a row, [N, 1] or [N], or one for all, [1] or [].
        by_row = scale.reshape(-1, 1)
        by_row = by_row[rows] if by_row.shape[0] > 1 else by_row
        return tensors["weight"][rows].to(torch.float64) * by_row
    codes = unpack(tensors["weight_packed"][rows], scheme.weights.num_bits, k)
    groups = group_of_input(tensors, scheme, k, codes.device)
    values = codes.to(torch.float64)
    if zero is not None:
        values -= zero[rows].to(torch.float64)[:, groups]
    return values * scale[rows][:, groups]


def unpack(words: torch.Tensor, bits: int, count: int) -> torch.Tensor:
    """Signed codes ``[..., count]`` of int32 ``words``, the first in the lowest bits."""
    shifts = torch.arange(0, 32, bits, device=words.device)
    # `>>` keeps the sign of a word; the mask cuts off what it brings in.
    raw = (words.unsqueeze(-1).to(torch.int64) >> shifts) & ((1 << bits) - 1)
    return raw.flatten(-2)[..., :count] - (1 << (bits - 1))


def group_of_input(
    tensors: Mapping[str, torch.Tensor], scheme: LayerScheme, k: int, device: torch.device
) -> torch.Tensor:
    """int64 ``[K]``: the scale column of each input."""
    g_idx = tensors.get("weight_g_idx")
    # A -1 anywhere marks an order that was never set.
    if g_idx is not None and scheme.weights.actorder == "group" and not bool((g_idx < 0).any()):
        return g_idx.to(device, torch.int64)
    size = scheme.weights.columns_per_scale
    inputs = torch.arange(k, device=device)
    return torch.zeros_like(inputs) if size == -1 else inputs // size


def _zero_points(
    tensors: Mapping[str, torch.Tensor], scheme: LayerScheme | None
) -> torch.Tensor | None:
    zero = tensors.get("weight_zero_point")
    if zero is None or scheme is None or scheme.kind != "wna16" or scheme.weights.symmetric:
        return None
    if zero.dtype == torch.int8:  # unpacked, up to release 0.9.3
        return zero
    return unpack(zero.T.contiguous(), scheme.weights.num_bits, tensors["weight_scale"].shape[0]).T
