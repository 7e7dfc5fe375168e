"""Random quantized layers, and the assertion that a result is as accurate as plain torch."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from pymllm_kernels.common.packing import pack_words
from pymllm_kernels.device import device_facts
from pymllm_kernels.problem import LinearProblem
from pymllm_kernels.w4a16 import reference


@dataclass(frozen=True)
class W4A16Layer:
    """A weight-only layer in checkpoint form with the exact weight it means.

    Attributes:
        problem: the layer's description.
        words: int32 ``[N, W]``.
        scale: ``[N, G]``.
        zero: uint8 ``[N, G]`` raw, or ``None``.
        g_idx: int32 ``[K]``, or ``None``.
        exact: fp64 ``[N, K]``, ``(code - zero) * scale`` without rounding.
        rounded: ``[N, K]`` in the scale's dtype, the library's decompressed weight.
    """

    problem: LinearProblem
    words: torch.Tensor
    scale: torch.Tensor
    zero: torch.Tensor | None
    g_idx: torch.Tensor | None
    exact: torch.Tensor
    rounded: torch.Tensor


def make_w4a16(
    n: int,
    k: int,
    group_size: int,
    *,
    bits: int = 4,
    symmetric: bool = True,
    act_order: bool = False,
    dtype: torch.dtype = torch.bfloat16,
    scale_dtype: torch.dtype | None = None,
    device: str = "cpu",
    seed: int = 0,
) -> W4A16Layer:
    """A layer with random codes over the full range, scales and zero points."""
    generator = torch.Generator().manual_seed(seed)
    groups = 1 if group_size == -1 else k // group_size
    codes = torch.randint(0, 1 << bits, (n, k), dtype=torch.uint8, generator=generator)
    scale = (torch.rand(n, groups, generator=generator) + 0.1) / (1 << bits)
    scale = scale.to(scale_dtype or dtype)
    zero = None
    if not symmetric:
        zero = torch.randint(0, 1 << bits, (n, groups), dtype=torch.uint8, generator=generator)
    g_idx = None
    if act_order:
        order = torch.randperm(k, generator=generator)
        g_idx = reference.group_of_input(k, groups, codes.device)[order].to(torch.int32)
    problem = LinearProblem(
        "w4a16", n, k, bits, -1 if groups == 1 else group_size, symmetric, act_order, dtype,
        scale.dtype, device_facts(device),
    )  # fmt: skip
    to = torch.device(device)
    codes, scale = codes.to(to), scale.to(to)
    zero = None if zero is None else zero.to(to)
    g_idx = None if g_idx is None else g_idx.to(to)
    return W4A16Layer(
        problem,
        pack_words(codes, bits),
        scale,
        zero,
        g_idx,
        reference.dequantize(codes, scale.to(torch.float64), zero, g_idx, bits),
        reference.dequantize(codes, scale, zero, g_idx, bits),
    )


def assert_as_accurate_as_torch(
    actual: torch.Tensor,
    exact: torch.Tensor,
    same_precision: torch.Tensor,
    factor: float = 2.0,
) -> None:
    """Asserts ``|actual - exact| <= factor * |same_precision - exact|`` in RMS and in maximum.

    Args:
        actual: what is tested.
        exact: fp64 reference.
        same_precision: the same computation in plain torch at ``actual``'s precision.
        factor: how much larger the error may be. The rounding of the result to its own dtype (half
            a unit in the last place of the largest value) counts as error of plain torch, which a
            lucky small case may not show.

    Raises:
        AssertionError: with RMS and maximum errors and the worst coordinates.
    """
    assert actual.shape == exact.shape, (actual.shape, exact.shape)
    if exact.numel() == 0:
        return
    error = (actual.to(torch.float64) - exact).abs()
    budget = (same_precision.to(torch.float64) - exact).abs()
    assert not error.isnan().any(), f"NaN at {_first(error.isnan())}"
    rounding = torch.finfo(actual.dtype).eps / 2 * exact.abs()
    rms = error.square().mean().sqrt()
    rms_budget = torch.maximum(budget.square().mean().sqrt(), rounding.square().mean().sqrt())
    worst, worst_budget = error.max(), torch.maximum(budget.max(), rounding.max())
    assert rms <= factor * rms_budget and worst <= factor * worst_budget, (
        f"RMS error {rms:.3e} (plain torch {rms_budget:.3e}), largest {worst:.3e} "
        f"(plain torch {worst_budget:.3e}) at {_first(error == worst)}"
    )


def _first(mask: torch.Tensor) -> tuple[int, ...]:
    return tuple(int(i) for i in mask.nonzero()[0])
