"""Weight layout of the int8 GEMM: the checkpoint's own, int8 ``[N, K]`` row-major.

Both operands of an 8-bit wgmma must be contiguous along K, which is how ``int-quantized`` weights are
stored: nothing is converted at load.
"""

from __future__ import annotations

from typing import NamedTuple

import torch


class W8A8Weight(NamedTuple):
    """A weight and, for static activations, their quantization; ``prepare`` makes it.

    Attributes:
        weight: int8 ``[N, K]``.
        scale: fp32 ``[N]`` or ``[1]``.
        column_sum: int32 ``[N]``, or ``None`` if activations have no zero point.
        input_scale: fp32 ``[1]``, or ``None`` for dynamic activations.
        input_zero: int32 ``[1]``, or ``None``.
    """

    weight: torch.Tensor
    scale: torch.Tensor
    column_sum: torch.Tensor | None = None
    input_scale: torch.Tensor | None = None
    input_zero: torch.Tensor | None = None


def column_sum(weight: torch.Tensor) -> torch.Tensor:
    """int32 ``[N]``: ``sum_k weight[n, k]``, what a zero point of the activation multiplies."""
    return weight.sum(dim=1, dtype=torch.int32)
