"""A random layer for any problem, made where it runs, with what its outputs should be."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from pymllm_kernels import LinearKernel, LinearProblem
from pymllm_kernels.per_token_quant_int8 import reference as quant_reference
from pymllm_kernels.w4a16 import reference as w4a16_reference

# Rounding of weights and outputs alone makes 0.002.
MOST_ERROR = 0.01
SAMPLED = 256

Exact = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""Rows of x ``[R, K]`` and output features ``[C]`` to fp64 ``[R, C]``."""


def random_layer(
    kernel: LinearKernel, problem: LinearProblem, device: torch.device, generator: torch.Generator
) -> tuple[Any, Exact]:
    """What the kernel's ``apply`` takes as weight, and its exact outputs.

    Args:
        kernel: one that can run the problem.
        problem: the layer.
        device: where it lies.
        generator: of that device.
    """
    make = _w4a16_layer if problem.scheme == "w4a16" else _w8a8_layer
    return make(kernel, problem, device, generator)


def copies_of(weight: Any, count: int) -> list[Any]:
    """A prepared weight and ``count - 1`` copies of it, each in memory of its own."""
    copies = [weight]
    for _ in range(count - 1):
        copies.append(type(weight)(*(None if t is None else t.clone() for t in weight)))
    return copies


def bytes_of(weight: Any) -> int:
    """Bytes of a prepared weight with everything that belongs to it."""
    return sum(t.numel() * t.element_size() for t in weight if t is not None)


def sampled_error(out: torch.Tensor, x: torch.Tensor, exact: Exact) -> float:
    """Relative Frobenius error of ``out [M, N]`` in some rows and columns; NaN where one is not finite."""
    rows, columns = _spread(out.shape[0], out.device), _spread(out.shape[1], out.device)
    right = exact(x[rows], columns)
    return float((out[rows][:, columns].to(torch.float64) - right).norm() / right.norm())


@contextmanager
def fresh_memory_is_nan() -> Iterator[None]:
    """Fills what is allocated and not written, so that a tile left out shows."""
    before = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warn_only)


def _spread(count: int, device: torch.device) -> torch.Tensor:
    """Some indices up to ``count``, over all of it, the last among them."""
    return torch.linspace(0, count - 1, min(count, SAMPLED), device=device).round().long()


def _w4a16_layer(
    kernel: Any, problem: LinearProblem, device: torch.device, generator: torch.Generator
) -> tuple[Any, Exact]:
    n, k, bits = problem.n, problem.k, problem.weight_bits
    shape = (n, -(-k * bits // 32))
    words = torch.randint(
        -(2**31), 2**31, shape, dtype=torch.int32, device=device, generator=generator
    )
    spread = torch.rand(n, problem.groups, device=device, generator=generator) + 0.5
    # Outputs near 1 whatever the size.
    scale = (spread / (k**0.5 * 2 ** (bits - 2))).to(problem.scale_dtype)
    zero = None
    if not problem.symmetric:
        zero = torch.randint(
            0, 2**bits, scale.shape, dtype=torch.uint8, device=device, generator=generator
        )

    g_idx = None
    if problem.act_order:
        order = torch.randperm(k, device=device, generator=generator)
        g_idx = w4a16_reference.group_of_input(k, problem.groups, device)[order].to(torch.int32)

    def exact(x: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
        return w4a16_reference.linear(
            x.double(), words[columns], scale[columns].double(),
            None if zero is None else zero[columns], g_idx, None, bits,
        )  # fmt: skip

    return kernel.prepare(problem, words, scale, zero, g_idx), exact


def _w8a8_layer(
    kernel: Any, problem: LinearProblem, device: torch.device, generator: torch.Generator
) -> tuple[Any, Exact]:
    n, k = problem.n, problem.k
    codes = torch.randint(-127, 128, (n, k), dtype=torch.int8, device=device, generator=generator)
    scale = (torch.rand(n, device=device, generator=generator) + 0.5) / (k**0.5 * 64)
    input_scale = input_zero = None
    if problem.input_strategy == "tensor":
        input_scale = torch.full((1,), 4 / 127, device=device)
        if not problem.input_symmetric:
            input_zero = torch.full((1,), 3, dtype=torch.int32, device=device)

    def exact(x: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
        weight = codes[columns].double() * scale[columns].double()[:, None]
        out: torch.Tensor = _rounded(problem, x, input_scale, input_zero) @ weight.T
        return out

    return kernel.prepare(problem, codes, scale, input_scale, input_zero), exact


def _rounded(
    problem: LinearProblem, x: torch.Tensor, scale: torch.Tensor | None, zero: torch.Tensor | None
) -> torch.Tensor:
    """fp64 of what the codes of x stand for."""
    if scale is not None:
        codes = quant_reference.static_quant_int8(x, scale, zero)
    elif problem.input_symmetric:
        codes, scale = quant_reference.per_token_quant_int8(x)
    else:
        codes, scale, zero = quant_reference.per_token_quant_int8_asym(x)
    values = codes.double()
    if zero is not None:
        values = values - zero.double()[:, None]
    return values * scale.double()[:, None]
