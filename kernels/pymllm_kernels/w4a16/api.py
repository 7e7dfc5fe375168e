"""The public function of the weight-only GEMM, and the conversion of a checkpoint's tensors."""

from __future__ import annotations

from typing import NamedTuple

import torch

from pymllm_kernels.w4a16.layout import choose_layout

ACT_DTYPES = (torch.bfloat16, torch.float16)


class W4A16Weight(NamedTuple):
    """A weight as the kernel reads it; ``prepare`` makes it.

    Attributes:
        weight: packed codes, see ``layout``.
        scale: ``[G, N]``, floating, the dtype of the checkpoint.
        zero: int8 ``[G, N]`` or ``None``: zero points, raw for 4 bits, less 128 for 8.
        group_index: int32 ``[blocks * block_k]`` or ``None``: scale row of every weight column,
            where a slice of the layout spans groups.
        input_perm: int32 ``[K]`` or ``None``: the input at each weight column (act-order).
    """

    weight: torch.Tensor
    scale: torch.Tensor
    zero: torch.Tensor | None = None
    group_index: torch.Tensor | None = None
    input_perm: torch.Tensor | None = None


def prepare(
    words: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor | None,
    g_idx: torch.Tensor | None,
    *,
    bits: int,
    k: int,
) -> W4A16Weight:
    """Converts a layer's checkpoint tensors to what :func:`w4a16_gemm` reads.

    Args:
        words: int32 ``[N, ceil(k * bits / 32)]``, packed along K.
        scale: floating ``[N, G]``.
        zero: uint8 ``[N, G]`` raw zero points, or ``None`` if symmetric.
        g_idx: integer ``[K]``, the group of each input, or ``None`` for neighbouring inputs.
        bits: 4 or 8.
        k: number of inputs.
    """
    groups = scale.shape[1]
    group_size = -1 if groups == 1 else k // groups
    layout = choose_layout(bits, k, group_size)
    perm = None
    sorted_groups = None
    if g_idx is not None:
        # Sorting the columns by group makes groups neighbours again; stable keeps it reproducible.
        perm = torch.argsort(g_idx.to(torch.int64), stable=True)
        sorted_groups = g_idx[perm].to(torch.int32)
    weight = layout.pack_words(words, k, perm)
    if zero is not None:
        zero = zero.T.contiguous()
        zero = (zero ^ 128 if bits == 8 else zero).view(torch.int8)
    group_index = _group_index(k, groups, layout.block_k, layout.slice_k, sorted_groups, scale)
    return W4A16Weight(
        weight,
        scale.T.contiguous(),
        zero,
        group_index,
        None if perm is None else perm.to(torch.int32),
    )


def _group_index(
    k: int,
    groups: int,
    block_k: int,
    slice_k: int,
    sorted_groups: torch.Tensor | None,
    like: torch.Tensor,
) -> torch.Tensor | None:
    """int32 scale row of every column, or ``None`` where each slice lies in one group of k // groups."""
    group_size = k // groups
    regular = torch.arange(k, device=like.device, dtype=torch.int32) // group_size
    if sorted_groups is None:
        sorted_groups = regular
    fits = groups == 1 or group_size % slice_k == 0
    if fits and torch.equal(sorted_groups, regular):
        return None
    padded = torch.zeros(-(-k // block_k) * block_k, dtype=torch.int32, device=like.device)
    padded[:k] = sorted_groups
    return padded


def w4a16_gemm(
    x: torch.Tensor,
    weight: W4A16Weight,
    bias: torch.Tensor | None = None,
    *,
    bits: int = 4,
    group_size: int,
) -> torch.Tensor:
    """``x @ W.T + bias`` with an int4 or int8 weight, accumulated in fp32, rounded once.

    Args:
        x: ``[..., K]``, bf16 or fp16, any strides.
        weight: from :func:`prepare`.
        bias: ``[N]``, floating, or ``None``.
        bits: 4 or 8.
        group_size: inputs a scale, ``-1`` for one scale a row.

    Returns:
        ``[..., N]`` in ``x``'s dtype.

    Raises:
        ValueError: a shape, dtype or device does not fit; the message names the argument.
    """
    check_arguments(x, weight, bias, bits, group_size)
    out: torch.Tensor = torch.ops.pymllm_kernels.w4a16_gemm(
        x, *weight, bias=bias, bits=bits, group_size=group_size
    )
    return out


def check_arguments(
    x: torch.Tensor,
    weight: W4A16Weight,
    bias: torch.Tensor | None,
    bits: int,
    group_size: int,
) -> None:
    """Raises the ``ValueError`` of :func:`w4a16_gemm`; no check depends on the number of rows."""
    groups, n = weight.scale.shape
    if x.dtype not in ACT_DTYPES:
        raise ValueError(f"x: found dtype {x.dtype}, accepted {ACT_DTYPES}")
    if bits not in (4, 8):
        raise ValueError(f"bits: found {bits}, accepted 4 or 8")
    if x.dim() == 0:
        raise ValueError("x: found a scalar, accepted [..., K]")
    k = x.shape[-1]
    block_k = weight.weight.shape[2] * 16 // bits
    if weight.weight.shape[0] != -(-k // block_k):
        raise ValueError(
            f"x: found {k} inputs, the weight holds {weight.weight.shape[0]} blocks of {block_k}"
        )
    if weight.weight.shape[1] != n:
        raise ValueError(f"weight: found {weight.weight.shape[1]} rows, its scale has {n}")
    if groups * (k if group_size == -1 else group_size) != k:
        raise ValueError(f"group_size: found {group_size}, but {groups} scale rows over {k} inputs")
    if bias is not None and bias.shape != (n,):
        raise ValueError(f"bias: found shape {tuple(bias.shape)}, expected ({n},)")
    for name, tensor in (("weight", weight.weight), ("bias", bias)):
        if tensor is not None and tensor.device != x.device:
            raise ValueError(f"{name}: found on {tensor.device}, but x is on {x.device}")
