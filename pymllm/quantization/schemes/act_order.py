"""``weight_g_idx``, the group of each input (compressed-tensors, activation ordering)."""

from __future__ import annotations

import torch


def is_set(g_idx: torch.Tensor) -> bool:
    """Whether group numbers were ever assigned: one that holds -1 anywhere was not."""
    return not bool((g_idx == -1).any())


def is_neighbours(g_idx: torch.Tensor, group_size: int) -> bool:
    """Whether the groups are those of neighbouring inputs, ``k // group_size``."""
    regular = torch.arange(len(g_idx), device=g_idx.device) // group_size
    return torch.equal(g_idx.to(torch.int64), regular)


def check_groups(g_idx: torch.Tensor, group_size: int) -> None:
    """Check that every group number occurs exactly ``group_size`` times.

    Args:
        g_idx: integer ``[K]``.
        group_size: a divisor of K.

    Raises:
        ValueError: a number is out of range or occurs another number of times.
    """
    groups = len(g_idx) // group_size
    low, high = int(g_idx.min()), int(g_idx.max())
    if low < 0 or high >= groups:
        raise ValueError(f"found groups {low} .. {high}, expected 0 .. {groups - 1}")
    counts = torch.bincount(g_idx.to(torch.int64), minlength=groups)
    wrong = (counts != group_size).nonzero().flatten().tolist()
    if wrong:
        raise ValueError(
            f"found group {wrong[0]} for {int(counts[wrong[0]])} inputs, expected {group_size}"
        )
