"""Layers that differ from the usual one in one respect, timed beside it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from pymllm.bench.measure import failure
from pymllm.bench.random_layer import (
    MOST_ERROR,
    Exact,
    bytes_of,
    copies_of,
    fresh_memory_is_nan,
    random_layer,
    sampled_error,
)
from pymllm.bench.roof import ACT_BYTES, W4A16, W8A8
from pymllm.bench.shapes import Shape
from pymllm.bench.timing import Call, copies_for
from pymllm.bench.variants.setting import Setting
from pymllm.bench.variants.values import SHARE, Cell, Goal, accept, blank, compare
from pymllm.tuning.layers import shape_problems
from pymllm_kernels import CHANNEL, DeviceFacts, LinearKernel, LinearProblem, select_kernel
from pymllm_kernels.common.forms import Form
from pymllm_kernels.common.launch import in_short

# Rows of a strided x are part of longer ones: so many more elements on each side.
_BESIDE = 64
_FEW = 32
BESIDE_BASE = Goal()


@dataclass(frozen=True)
class Variant:
    """One way to differ from the usual layer.

    Attributes:
        name: in tables.
        changes: fields of the problem that differ.
        goal: what is measured, and what is wanted.
        wanted_to: the most tokens for which it is wanted, ``None`` for all.
        timed_to: the most tokens that are timed, ``None`` for all.
        bias: whether there is a bias.
        strided: whether rows of x are parts of longer rows.
    """

    name: str
    changes: Mapping[str, Any] = field(default_factory=dict)
    goal: Goal = BESIDE_BASE
    wanted_to: int | None = None
    timed_to: int | None = None
    bias: bool = False
    strided: bool = False

    def problem(self, usual: LinearProblem) -> LinearProblem:
        """The layer."""
        return dataclasses.replace(usual, **self.changes)

    def goal_at(self, m: int) -> Goal:
        """What is measured and wanted of ``m`` tokens."""
        wanted = self.wanted_to is None or m <= self.wanted_to
        return self.goal if wanted else self.goal._replace(wanted=None)

    def times(self, m: int) -> bool:
        """Whether ``m`` tokens are timed."""
        return self.timed_to is None or m <= self.timed_to


_HALF = torch.float16
# A ratio within 3 % is noise: so much more counts as equally fast.
_NO_SLOWER = Goal(wanted=1.03)
VARIANTS: Mapping[str, tuple[Variant, ...]] = {
    W4A16: (
        Variant("bf16, groups of 128"),
        Variant("fp16", {"act_dtype": _HALF, "scale_dtype": _HALF}, Goal(wanted=1.05)),
        Variant("groups of 64", {"group_size": 64}, Goal(wanted=1.15)),
        Variant("groups of 32", {"group_size": 32}, Goal(wanted=1.15)),
        Variant("per channel", {"group_size": CHANNEL}, _NO_SLOWER),
        Variant("zero points", {"symmetric": False}, Goal(wanted=1.05)),
        Variant("act-order", {"act_order": True}, Goal(wanted=1.10), timed_to=_FEW),
        Variant("8 bits", {"weight_bits": 8}, Goal(SHARE, 0.85), wanted_to=_FEW, timed_to=1024),
    ),
    W8A8: (
        Variant("bf16, per token"),
        Variant("zero points per token", {"input_symmetric": False}, Goal(wanted=1.05)),
        Variant("static", {"input_strategy": "tensor"}, Goal(wanted=1.05)),
        Variant(
            "static, zero point",
            {"input_strategy": "tensor", "input_symmetric": False},
            Goal(wanted=1.05),
        ),
        Variant("fp16", {"act_dtype": _HALF}),
        Variant("strided rows of x", strided=True),
        Variant("bias", bias=True),
    ),
}
"""By scheme; the first is the base of the others."""


@dataclass
class _Made:
    """A variant's layer, in copies, with its input."""

    variant: Variant
    problem: LinearProblem
    kernel: Any
    weights: Sequence[Any]
    x: torch.Tensor
    bias: torch.Tensor | None
    exact: Exact

    def call(self, m: int, copy: int = 0) -> torch.Tensor:
        out: torch.Tensor = self.kernel.apply(
            self.problem, self.x[:m], self.weights[copy], self.bias
        )
        return out

    def calls(self, m: int) -> list[Call]:
        """One of each copy."""
        return [partial(self.call, m, copy) for copy in range(len(self.weights))]

    def moved(self, m: int) -> int:
        """Bytes of a call: everything of the weight, x and y."""
        return bytes_of(self.weights[0]) + ACT_BYTES * m * (self.problem.n + self.problem.k)

    def error(self, m: int) -> float:
        """Of the result; NaN where any of it is not finite."""
        with fresh_memory_is_nan():
            out = self.call(m)
        if not bool(torch.isfinite(out).all()):
            return math.nan
        return sampled_error(out, self.x[:m], self.exact)


def forms(scheme: str, shape: Shape, tokens: Sequence[int], facts: DeviceFacts) -> list[Form]:
    """What the cells of a shape need compiled."""
    (usual,) = shape_problems([shape], facts, schemes=(scheme,))
    found: dict[Form, None] = {}
    for variant in VARIANTS[scheme]:
        problem = variant.problem(usual)
        kernel = select_kernel(problem).kernel
        bias = problem.act_dtype if variant.bias else None
        for m in filter(variant.times, tokens):
            found |= dict.fromkeys(kernel.forms(problem, m, bias=bias))
    return list(found)


def measure(setting: Setting, scheme: str, shape: Shape, tokens: Sequence[int]) -> Iterator[Cell]:
    """All cells of a scheme on one shape, tokens by tokens.

    Raises:
        Stopped: there is no time left, or the GPU no longer answers.
    """
    (usual,) = shape_problems([shape], setting.facts, schemes=(scheme,))
    setting.progress(f"{scheme} {shape[0]}x{shape[1]}: making weights")
    made: dict[str, _Made | str] = {}
    for variant in VARIANTS[scheme]:
        most = max(filter(variant.times, tokens), default=0)
        if most:
            try:
                made[variant.name] = _make(setting, variant, variant.problem(usual), most)
            except Exception as error:  # noqa: BLE001  compilers fail in any way
                made[variant.name] = failure(error, setting.device)
    for m in tokens:
        setting.check_deadline()
        setting.progress(f"{scheme} {shape[0]}x{shape[1]} M={m}")
        yield from _tokens_of(setting, usual, made, m)
        setting.release()


def _make(setting: Setting, variant: Variant, problem: LinearProblem, most: int) -> _Made:
    device = setting.device
    kernel: LinearKernel = select_kernel(problem).kernel
    generator = torch.Generator(device).manual_seed(0)
    weight, exact = random_layer(kernel, problem, device, generator)
    copies = copies_of(weight, copies_for(bytes_of(weight), setting.min_bytes))
    width = problem.k + (2 * _BESIDE if variant.strided else 0)
    x = torch.randn(most, width, device=device, generator=generator).to(problem.act_dtype)
    if variant.strided:
        x = x[:, _BESIDE : _BESIDE + problem.k]
    bias = None
    if variant.bias:
        bias = torch.randn(problem.n, device=device, generator=generator).to(problem.act_dtype)
        exact = partial(_with_bias, exact=exact, bias=bias)
    return _Made(variant, problem, kernel, copies, x, bias, exact)


def _with_bias(
    x: torch.Tensor, columns: torch.Tensor, *, exact: Exact, bias: torch.Tensor
) -> torch.Tensor:
    return exact(x, columns) + bias[columns].double()


def _tokens_of(
    setting: Setting, usual: LinearProblem, made: Mapping[str, _Made | str], m: int
) -> list[Cell]:
    """The cells of all variants for ``m`` tokens: each checked, then all timed in turns."""
    variants = VARIANTS[usual.scheme]
    base = variants[0].name
    cells, right = [], []
    for variant in variants:
        if not variant.times(m):
            continue
        cell = blank(usual.scheme, variant.name, base, m, usual.k, usual.n)
        cells.append(cell)
        layer = made[variant.name]
        if isinstance(layer, str):
            cell["skip"] = layer
        elif _checked(cell, layer, m, setting.device):
            right.append((cell, layer))
    setting.fill([(cell, layer.calls(m), layer.moved(m)) for cell, layer in right])
    for cell, layer in right:
        if layer.variant is not variants[0]:
            goal = setting.goal(layer.variant.goal_at(m))
            compare(cell, cells[0], goal, setting.read_tbps)
    return cells


def _checked(cell: Cell, layer: _Made, m: int, device: torch.device) -> bool:
    """Whether the layer's result is right; kernel, error and what is wrong go to the cell."""
    try:
        found = layer.kernel.resolved(layer.problem, m)
        cell["kernel"] = layer.kernel.name
        if found is not None:
            cell |= {"config": in_short(found.config), "origin": found.origin}
        error = layer.error(m)
    except Exception as problem:  # noqa: BLE001  compilers fail in any way
        cell["skip"] = failure(problem, device)
        return False
    return accept(cell, error, MOST_ERROR)
