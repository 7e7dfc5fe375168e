"""The quantization of activations alone, held to the memory roof and to a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from pymllm.bench.measure import failure
from pymllm.bench.timing import copies_for
from pymllm.bench.variants.setting import Setting
from pymllm.bench.variants.values import ROOF, US, Cell, Goal, accept, blank, compare
from pymllm_kernels import per_token_quant_int8, per_token_quant_int8_asym, static_quant_int8
from pymllm_kernels.common.forms import Form

PART = "quantization"
TOKENS = (1, 16, 64, 1024, 4096)
MANY, FEW, FEW_INPUTS = 1024, 64, 8192
FILLS_MEMORY, STARTS_QUICKLY = Goal(ROOF, 0.8), Goal(US, 3.0)
# Of normal values rounded to 8 bits over their range.
_MOST_ROUNDED = 0.02
_SCALE = 4.5 / 127


@dataclass(frozen=True)
class Variant:
    """One way to quantize.

    Attributes:
        name: in tables.
        quantize: x and a static scale ``[1]`` to codes, scales and zero points (``None``: there are none).
        dtype: of x.
        static: whether the scale is given.
        zero: whether there are zero points.
    """

    name: str
    quantize: Callable[[torch.Tensor, torch.Tensor], tuple[Any, Any, Any]]
    dtype: torch.dtype = torch.bfloat16
    static: bool = False
    zero: bool = False

    def moved(self, m: int, k: int) -> int:
        """Bytes of a call: x in, codes, scales and zero points out."""
        row = 0 if self.static else 4 + 4 * self.zero
        return m * (k * (self.dtype.itemsize + 1) + row)


def _symmetric(x: torch.Tensor, scale: torch.Tensor) -> tuple[Any, Any, Any]:
    return (*per_token_quant_int8(x), None)


def _asymmetric(x: torch.Tensor, scale: torch.Tensor) -> tuple[Any, Any, Any]:
    return per_token_quant_int8_asym(x)


def _static(x: torch.Tensor, scale: torch.Tensor) -> tuple[Any, Any, Any]:
    return static_quant_int8(x, scale), scale, None


VARIANTS = (
    Variant("per token", _symmetric),
    Variant("per token, fp16", _symmetric, torch.float16),
    Variant("per token, zero points", _asymmetric, zero=True),
    Variant("static", _static, static=True),
)


def goal_at(m: int, k: int) -> Goal:
    """What is measured and wanted of ``[m, k]`` activations."""
    if m >= MANY:
        return FILLS_MEMORY
    return STARTS_QUICKLY if m <= FEW and k <= FEW_INPUTS else Goal(US)


def forms(inputs: Sequence[int]) -> list[Form]:
    """What the cells need compiled."""
    from pymllm_kernels.per_token_quant_int8 import launch

    return [
        Form(
            launch.specialization,
            (launch.form_of(v.dtype, k, k, 1, 0, static=v.static, zero=v.zero),),
        )
        for v in VARIANTS
        for k in inputs
    ]


def measure(setting: Setting, inputs: Sequence[int]) -> Iterator[Cell]:
    """All cells, for rows of so many inputs.

    Raises:
        Stopped: there is no time left, or the GPU no longer answers.
    """
    for k in inputs:
        for m in TOKENS:
            setting.check_deadline()
            setting.progress(f"{PART} K={k} M={m}")
            yield from _cells(setting, m, k)
            setting.release()


def _cells(setting: Setting, m: int, k: int) -> list[Cell]:
    base = VARIANTS[0].name
    cells = [blank(PART, variant.name, base, m, k) for variant in VARIANTS]
    right = []
    for cell, variant in zip(cells, VARIANTS, strict=True):
        try:
            rotation = _rotation(setting, variant, m, k)
            error = _error(rotation[0])
        except Exception as problem:  # noqa: BLE001  compilers fail in any way
            cell["skip"] = failure(problem, setting.device)
            continue
        if accept(cell, error, _MOST_ROUNDED):
            right.append((cell, rotation, variant.moved(m, k)))
    setting.fill(right)
    for cell, _, _ in right:
        compare(cell, cells[0], setting.goal(goal_at(m, k)), setting.read_tbps)
    return cells


@dataclass
class _Rotated:
    """One input of a rotation. It keeps what it gave, so that every call of a graph writes elsewhere."""

    variant: Variant
    x: torch.Tensor
    scale: torch.Tensor
    kept: Any = None

    def __call__(self) -> None:
        self.kept = self.variant.quantize(self.x, self.scale)


def _rotation(setting: Setting, variant: Variant, m: int, k: int) -> list[_Rotated]:
    device = setting.device
    generator = torch.Generator(device).manual_seed(0)
    scale = torch.full((1,), _SCALE, device=device)
    first = torch.randn(m, k, device=device, generator=generator).to(variant.dtype)
    copies = copies_for(variant.moved(m, k), setting.min_bytes)
    return [_Rotated(variant, first.clone(), scale) for _ in range(copies)]


def _error(first: _Rotated) -> float:
    """Of what the codes stand for, against x in fp64."""
    first()
    codes, scale, zero = first.kept
    exact = first.x.double()
    found = (codes.double() - (0 if zero is None else zero.double())) * scale.double()
    return float((found - exact).norm() / exact.norm())
