"""Weight layout of the int8 GEMM: the checkpoint's own, int8 ``[N, K]`` row-major.

Both operands of an 8-bit wgmma must be contiguous along K, which is how ``int-quantized`` weights are
stored: nothing is converted at load.
"""

from __future__ import annotations

import torch


def column_sum(weight: torch.Tensor) -> torch.Tensor:
    """int32 ``[N]``: ``sum_k weight[n, k]``, what a zero point of the activation multiplies."""
    return weight.sum(dim=1, dtype=torch.int32)
