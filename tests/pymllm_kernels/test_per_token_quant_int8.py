"""Activation quantization: codes and scales equal to the fp32 formula, bit for bit."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from pymllm_kernels import per_token_quant_int8, per_token_quant_int8_asym, static_quant_int8
from pymllm_kernels.per_token_quant_int8 import launch as launches
from pymllm_kernels.per_token_quant_int8 import reference

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
SIZES = [(1, 1), (3, 17), (5, 1025), (2, 5137), (3, 8193), (70, 64)]


def launch(x: torch.Tensor, symmetric: bool = True) -> tuple[torch.Tensor, ...]:
    """The Triton kernel itself, which the operator replaces by the reference on a CPU."""
    m = x.shape[0]
    codes = torch.empty(x.shape, dtype=torch.int8, device=x.device)
    scale = torch.empty(m, dtype=torch.float32, device=x.device)
    zero = None if symmetric else torch.empty(m, dtype=torch.int32, device=x.device)
    launches.launch_dynamic(x, codes, scale, zero)
    return (codes, scale) if zero is None else (codes, scale, zero)


def rows(m: int, k: int, dtype: torch.dtype, device: str) -> torch.Tensor:
    generator = torch.Generator().manual_seed(m + k)
    x = torch.randn(m, k, generator=generator) * torch.logspace(-6, 3, m)[:, None]
    return x.to(dtype).to(device)


def assert_bit_equal(actual: tuple[torch.Tensor, ...], expected: tuple[torch.Tensor, ...]) -> None:
    for name, a, e in zip(("codes", "scale", "zero"), actual, expected, strict=False):
        assert a.dtype == e.dtype and a.shape == e.shape, name
        same = (a == e) | (a.isnan() & e.isnan() if a.is_floating_point() else False)
        assert bool(same.all()), f"{name}: {int((~same).sum())} differ of {a.numel()}"


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("m", "k"), SIZES)
def test_equal_to_the_formula(
    triton_device: str, m: int, k: int, dtype: torch.dtype, symmetric: bool
) -> None:
    x = rows(m, k, dtype, triton_device)
    formula = reference.per_token_quant_int8 if symmetric else reference.per_token_quant_int8_asym
    assert_bit_equal(launch(x, symmetric), formula(x))


def test_ties_go_to_even(triton_device: str) -> None:
    x = torch.tensor([[127, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 126.5, -127]], device=triton_device)
    codes, scale = launch(x)
    assert scale.item() == 1.0
    assert codes.tolist() == [[127, 0, 2, 2, 0, -2, -2, 126, -127]]


def test_product_is_rounded_before_rint(triton_device: str) -> None:
    """x * (127 / absmax) lands on ties only after its own rounding; a fused add would miss them."""
    generator = torch.Generator().manual_seed(1)
    x = torch.rand(64, 512, generator=generator).to(triton_device)
    x[:, 0] = torch.linspace(1, 2, 64)
    absmax = x.abs().amax(1, keepdim=True)
    # Values one fp32 step around every tie of the row.
    ties = (torch.arange(1, 257, device=triton_device) % 127 + 0.5) * absmax / 127
    x[:, 1:257] = torch.nextafter(ties, ties * 2)
    x[:, 257:512] = torch.nextafter(ties, ties * 0)[:, :255]
    x = torch.minimum(x, absmax)
    assert_bit_equal(launch(x), reference.per_token_quant_int8(x))


@pytest.mark.parametrize("symmetric", [True, False])
def test_edge_rows(triton_device: str, symmetric: bool) -> None:
    x = rows(8, 100, torch.float32, triton_device)
    x[0] = 0
    x[1, 3] = float("nan")
    x[2, 4] = float("inf")
    x[3] = 1e-42  # 127 / absmax overflows
    x[3, ::2] *= -1
    x[4] = 5.0
    x[5] = 0
    x[5, 7] = -3.0
    clean = launch(rows(8, 100, torch.float32, triton_device), symmetric)
    actual = launch(x, symmetric)
    formula = reference.per_token_quant_int8 if symmetric else reference.per_token_quant_int8_asym
    assert_bit_equal(actual, formula(x))
    codes, scale = actual[:2]
    assert scale[0] == 0 and not codes[0].any()
    assert scale[1].isnan() and scale[2].isinf()
    assert torch.equal(codes[6:], clean[0][6:]) and torch.equal(scale[6:], clean[1][6:])
    if symmetric:
        assert codes[3].tolist() == [-127, 127] * 50
        assert codes[5, 7] == -127
    else:
        assert actual[2][0] == 0 and actual[2].abs().max() <= 128


@pytest.mark.parametrize("zero", [None, 0, -128, 100])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_static(triton_device: str, dtype: torch.dtype, zero: int | None) -> None:
    x = torch.randn(9, 1025, generator=torch.Generator().manual_seed(0)).to(dtype)
    x[0, :3] = torch.tensor([float("nan"), float("inf"), float("-inf")])
    x = x.to(triton_device)
    scale = torch.tensor([0.0173], device=triton_device)
    point = None if zero is None else torch.tensor([zero], dtype=torch.int32, device=triton_device)
    codes = torch.empty(x.shape, dtype=torch.int8, device=triton_device)
    launches.launch_static(x, codes, scale, point)
    assert torch.equal(codes, reference.static_quant_int8(x, scale, point))
    assert codes[0, :3].tolist() == [zero or 0, 127, -128]


@pytest.mark.parametrize("zero", [None, 3])
@pytest.mark.parametrize(
    "scale", [0.1, 1 / 3, 0.0078125, 2.0**-89, 2.0**-110, 2.0**110, 0.0, -0.5, 1e-44]
)
def test_static_quotients_near_ties(triton_device: str, scale: float, zero: int | None) -> None:
    """Where codes change, and the neighbours of those values in fp32: one wrong rounding shows."""
    edges = (torch.arange(-300, 300) + 0.5) * torch.tensor(scale)
    up, down = (torch.nextafter(edges, torch.full_like(edges, to)) for to in (3e38, -3e38))
    x = torch.stack([edges, up, down, edges.to(torch.bfloat16).float(), edges / 2]).to(
        triton_device
    )
    given = torch.tensor([scale], device=triton_device)
    point = None if zero is None else torch.tensor([zero], dtype=torch.int32, device=triton_device)
    codes = torch.empty(x.shape, dtype=torch.int8, device=triton_device)
    launches.launch_static(x, codes, given, point)
    assert torch.equal(codes, reference.static_quant_int8(x, given, point))


@pytest.mark.parametrize("symmetric", [True, False])
def test_strided_rows_are_read_in_place(triton_device: str, symmetric: bool) -> None:
    base = rows(20, 300, torch.bfloat16, triton_device)
    for view in (
        base[:, 5:105],
        base[::3, :64],
        base[:, ::2],
        base[:, :40].T,
        base[:1].expand(4, 300),
    ):
        assert_bit_equal(launch(view, symmetric), launch(view.contiguous(), symmetric))


def test_operator_shapes_and_meaning() -> None:
    """The public functions, on a CPU: leading dimensions, empty inputs and dequantization error."""
    x = torch.randn(2, 3, 40, generator=torch.Generator().manual_seed(3))
    codes, scale = per_token_quant_int8(x)
    assert codes.shape == x.shape and scale.shape == (2, 3, 1)
    assert ((codes * scale - x).abs() <= scale * 0.5001).all()
    codes, scale, zero = per_token_quant_int8_asym(x + 3)
    assert zero.shape == (2, 3, 1) and zero.dtype == torch.int32
    assert (((codes - zero) * scale - (x + 3)).abs() <= scale * 1.0001).all()
    assert static_quant_int8(x, torch.tensor([0.1])).shape == x.shape
    assert per_token_quant_int8(x[:0])[0].shape == (0, 3, 40)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: per_token_quant_int8(torch.tensor(1.0)), "x: found a scalar"),
        (
            lambda: per_token_quant_int8(torch.ones(2, 2, dtype=torch.int8)),
            "x: found dtype torch.int8",
        ),
        (lambda: static_quant_int8(torch.ones(2, 2), torch.ones(3)), r"scale: found .*\(3,\)"),
        (
            lambda: static_quant_int8(torch.ones(2, 2), torch.ones(1), torch.ones(1)),
            "zero: found torch.float32",
        ),
    ],
)
def test_refusals(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
