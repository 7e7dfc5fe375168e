"""The int8 GEMM: exact accumulators, fp32 epilogue rounded once."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from pymllm_kernels import LinearProblem, device_facts, select_kernel, w8a8_int8_gemm
from pymllm_kernels.w8a8_int8 import launch, reference, tuning

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


@dataclasses.dataclass
class Case:
    codes: torch.Tensor
    weight: torch.Tensor
    x_scale: torch.Tensor
    w_scale: torch.Tensor
    bias: torch.Tensor
    x_zero: torch.Tensor
    column_sum: torch.Tensor


def make(m: int, n: int, k: int, device: str) -> Case:
    g = torch.Generator().manual_seed(m + 10 * n + 100 * k)
    codes = torch.randint(-128, 128, (m, k), dtype=torch.int8, generator=g)
    weight = torch.randint(-128, 128, (n, k), dtype=torch.int8, generator=g)
    tensors = (
        codes, weight, torch.rand(m, 1, generator=g) / 100, torch.rand(n, generator=g) / 100,
        torch.randn(n, generator=g),
        torch.randint(-128, 128, (m, 1), dtype=torch.int32, generator=g),
        weight.sum(1, dtype=torch.int32),
    )  # fmt: skip
    return Case(*(tensor.to(device) for tensor in tensors))


SIZES = [(1, 1, 1), (1, 64, 128), (17, 7, 99), (33, 130, 256), (70, 65, 129), (150, 130, 64)]


@pytest.mark.parametrize(("m", "n", "k"), SIZES)
def test_accumulators_are_exact(triton_device: str, m: int, n: int, k: int) -> None:
    """Unit scales and fp32 output show the int32 sums themselves (all below 2**24 here)."""
    case = make(m, n, k, triton_device)
    one = torch.ones(1, device=triton_device)
    out = w8a8_int8_gemm(case.codes, case.weight, one, one, out_dtype=FP32)
    assert torch.equal(out.to(torch.int64), reference.int_matmul(case.codes, case.weight).long())
    corrected = w8a8_int8_gemm(
        case.codes, case.weight, one.expand(m, 1).contiguous(), one, out_dtype=FP32,
        x_zero=case.x_zero, w_column_sum=case.column_sum,
    )  # fmt: skip
    exact = (case.codes.double() - case.x_zero) @ case.weight.double().T
    assert torch.equal(corrected.double(), exact)


def test_extreme_codes_and_long_k(triton_device: str) -> None:
    """Sums near 2**31: -128 * -128 over K = 65536, the longest K accepted."""
    k = 65536
    codes = torch.full((2, k), -128, dtype=torch.int8, device=triton_device)
    weight = torch.full((3, k), -128, dtype=torch.int8, device=triton_device)
    one = torch.ones(1, device=triton_device)
    out = w8a8_int8_gemm(codes, weight, one, one, out_dtype=FP32)
    assert (out == 2.0**30).all()


@pytest.mark.parametrize("zero_point", [False, True])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("out_dtype", [BF16, FP16, FP32], ids=str)
@pytest.mark.parametrize(("m", "n", "k"), [(5, 70, 300), (40, 33, 128), (130, 20, 64)])
def test_epilogue_is_rounded_once(
    triton_device: str, m: int, n: int, k: int, out_dtype: torch.dtype, with_bias: bool,
    zero_point: bool,
) -> None:  # fmt: skip
    case = make(m, n, k, triton_device)
    bias = case.bias if with_bias else None
    extra = {"x_zero": case.x_zero, "w_column_sum": case.column_sum} if zero_point else {}
    actual = w8a8_int8_gemm(
        case.codes, case.weight, case.x_scale, case.w_scale, out_dtype=out_dtype, bias=bias, **extra
    )
    # fp32 products as the kernel forms them; fp64 makes the fma of the bias exact before rounding.
    acc = reference.int_matmul(case.codes, case.weight)
    if zero_point:
        acc = acc - case.x_zero * case.column_sum
    scaled = case.w_scale * acc.to(FP32)
    expected = case.x_scale * scaled
    if with_bias:
        unfused = (expected + case.bias).to(out_dtype)
        expected = (case.x_scale.double() * scaled.double() + case.bias.double()).to(FP32)
    equal = actual == expected.to(out_dtype)
    if with_bias and triton_device == "cpu":
        # The interpreter of Triton 3.6 computes fma as a product and a sum, each rounded.
        equal |= actual == unfused
    assert equal.all()


def test_zero_rows_give_exactly_the_bias(triton_device: str) -> None:
    case = make(20, 24, 64, triton_device)
    x_scale = case.x_scale.clone()
    x_scale[4], x_scale[5] = 0, float("nan")
    case.codes[4:6] = 0
    bias = case.bias.to(BF16)
    out = w8a8_int8_gemm(case.codes, case.weight, x_scale, case.w_scale, out_dtype=BF16, bias=bias)
    assert torch.equal(out[4], bias)
    assert out[5].isnan().all()
    assert out[:4].isfinite().all() and out[6:].isfinite().all()


@pytest.mark.parametrize(
    "config", [*tuning._RULE, dataclasses.replace(tuning._RULE[0], swap=False)]
)
def test_every_configuration_gives_the_same_bits(triton_device: str, config: tuning.Config) -> None:
    case = make(150, 130, 200, triton_device)
    outs = []
    for chosen in (config, tuning._RULE[-1]):
        out = torch.empty(150, 130, device=triton_device)
        launch.launch(
            case.codes, case.weight, case.x_scale, case.w_scale, case.x_zero, case.column_sum,
            case.bias, out, config=chosen,
        )  # fmt: skip
        outs.append(out)
    assert torch.equal(*outs)


def test_strided_codes(triton_device: str) -> None:
    case = make(20, 24, 128, triton_device)
    wide = torch.zeros(40, 300, dtype=torch.int8, device=triton_device)
    wide[::2, 3:131] = case.codes
    for view in (wide[::2, 3:131], case.codes.T.contiguous().T, case.codes.unflatten(0, (4, 5))):
        scale = case.x_scale.view(*view.shape[:-1], 1)
        out = w8a8_int8_gemm(view, case.weight, scale, case.w_scale, out_dtype=BF16)
        expected = w8a8_int8_gemm(
            case.codes, case.weight, case.x_scale, case.w_scale, out_dtype=BF16
        )
        assert torch.equal(out.reshape(20, 24), expected)


@pytest.mark.parametrize("m", [0, 1, 5, 40])
@pytest.mark.parametrize(
    ("strategy", "symmetric", "per_tensor_weight"),
    [
        ("token", True, False),
        ("token", False, False),
        ("tensor", True, True),
        ("tensor", False, False),
    ],
)
def test_every_kernel_agrees(
    triton_device: str, m: int, strategy: str, symmetric: bool, per_tensor_weight: bool
) -> None:
    """The whole call, activation quantization included, by each kernel that runs here."""
    n, k = 48, 96
    case = make(max(m, 1), n, k, triton_device)
    facts = device_facts(triton_device)
    problem = LinearProblem(
        "w8a8_int8", n, k, 8, -1, True, False, FP32, FP32, facts, strategy, symmetric
    )
    x = torch.randn(m, k, generator=torch.Generator().manual_seed(m)).to(triton_device)
    static = strategy == "tensor"
    scale = case.w_scale[:1] if per_tensor_weight else case.w_scale
    outs = {}
    for name in ("triton_w8a8_int8", "torch_int_mm", "torch_w8a8_int8"):
        chosen = select_kernel(problem, name).kernel
        weight = chosen.prepare(
            problem, case.weight, scale,
            torch.tensor([0.03], device=triton_device) if static else None,
            torch.tensor([7], dtype=torch.int8, device=triton_device)
            if static and not symmetric else None,
        )  # fmt: skip
        assert weight.weight.data_ptr() == case.weight.data_ptr()
        outs[name] = chosen.apply(problem, x, weight, case.bias)
        assert outs[name].shape == (m, n)
    exact = outs["torch_w8a8_int8"]
    assert torch.equal(outs["torch_int_mm"], exact)
    # The kernel's fma rounds the bias in once, torch twice: at most one fp32 step apart.
    assert torch.allclose(outs["triton_w8a8_int8"], exact, rtol=3e-7, atol=3e-7)


def test_refusals_name_the_argument(triton_device: str) -> None:
    case = make(4, 8, 32, triton_device)
    xs, ws = case.x_scale, case.w_scale
    long = torch.zeros(1, 65537, dtype=torch.int8, device=triton_device)
    for call, message in [
        (lambda: w8a8_int8_gemm(case.codes.int(), case.weight, xs, ws, out_dtype=BF16), "codes: found dtype"),
        (lambda: w8a8_int8_gemm(case.codes[:, :9], case.weight, xs, ws, out_dtype=BF16), "codes: found 9 inputs"),
        (lambda: w8a8_int8_gemm(case.codes, case.weight, xs[:2], ws, out_dtype=BF16), "x_scale: found shape"),
        (lambda: w8a8_int8_gemm(case.codes, case.weight, xs, ws[:3], out_dtype=BF16), "w_scale: found shape"),
        (lambda: w8a8_int8_gemm(case.codes, case.weight, xs, ws.half(), out_dtype=BF16), "w_scale: found dtype"),
        (lambda: w8a8_int8_gemm(case.codes, case.weight, xs, ws, out_dtype=torch.int8), "out_dtype: found"),
        (lambda: w8a8_int8_gemm(case.codes, case.weight, xs, ws, out_dtype=BF16, bias=ws[:2]), "bias: found shape"),
        (lambda: w8a8_int8_gemm(case.codes, case.weight, xs, ws, out_dtype=BF16, x_zero=case.x_zero), "w_column_sum"),
        (lambda: w8a8_int8_gemm(long, long, xs[:1], ws[:1], out_dtype=BF16), "found 65537 inputs"),
    ]:  # fmt: skip
        with pytest.raises(ValueError, match=message):
            call()
