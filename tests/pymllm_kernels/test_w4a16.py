"""The W4A16 kernel against fp64, on a GPU or through Triton's interpreter."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from pymllm_kernels import select_kernel, w4a16_gemm
from pymllm_kernels.testing.inputs import W4A16Layer, assert_as_accurate_as_torch, make_w4a16
from pymllm_kernels.w4a16 import api

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32

# (n, k, group_size, bits, symmetric, act_order, dtype)
LAYERS = [
    pytest.param(64, 256, 128, 4, True, False, BF16, id="g128"),
    pytest.param(64, 256, 128, 4, False, False, BF16, id="g128-asym"),
    pytest.param(65, 128, 64, 4, True, False, FP16, id="g64-odd-N"),
    pytest.param(33, 96, 32, 4, False, False, FP16, id="g32-asym-short-block"),
    pytest.param(16, 96, 16, 4, True, False, BF16, id="g16"),
    pytest.param(7, 100, 20, 4, False, False, BF16, id="g20-spans-words"),
    pytest.param(31, 192, 96, 4, True, False, BF16, id="g96"),
    pytest.param(1, 130, -1, 4, True, False, BF16, id="channel-N1"),
    pytest.param(9, 77, -1, 4, False, False, FP16, id="channel-asym-odd-K"),
    pytest.param(20, 2112, 64, 4, True, False, BF16, id="K2112"),
    pytest.param(24, 256, 128, 4, True, True, BF16, id="act-order"),
    pytest.param(24, 192, 24, 4, False, True, FP16, id="act-order-g24-asym"),
    pytest.param(40, 256, 128, 8, True, False, BF16, id="int8-g128"),
    pytest.param(40, 99, -1, 8, False, False, BF16, id="int8-channel-asym"),
    pytest.param(12, 160, 32, 8, False, True, FP16, id="int8-act-order-asym"),
    pytest.param(33, 192, 64, 8, False, False, BF16, id="int8-g64-asym"),
    pytest.param(17, 96, 32, 8, True, False, FP16, id="int8-g32-short-block"),
    pytest.param(7, 100, 20, 8, False, False, BF16, id="int8-g20-asym-spans-words"),
    pytest.param(20, 2112, 16, 8, True, False, BF16, id="int8-g16-K2112"),
]


def run(layer: W4A16Layer, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    kernel = select_kernel(layer.problem, "triton_w4a16").kernel
    weight = kernel.prepare(layer.problem, layer.words, layer.scale, layer.zero, layer.g_idx)
    return kernel.apply(layer.problem, x, weight, bias)


def activations(m: int, k: int, dtype: torch.dtype, device: str) -> torch.Tensor:
    generator = torch.Generator().manual_seed(m * 1000 + k)
    return torch.randn(m, k, generator=generator).to(dtype).to(device)


@pytest.mark.parametrize("m", [0, 1, 17])
@pytest.mark.parametrize(
    ("n", "k", "group_size", "bits", "symmetric", "act_order", "dtype"), LAYERS
)
def test_against_fp64(
    triton_device: str,
    m: int,
    n: int,
    k: int,
    group_size: int,
    bits: int,
    symmetric: bool,
    act_order: bool,
    dtype: torch.dtype,
) -> None:
    layer = make_w4a16(
        n, k, group_size, bits=bits, symmetric=symmetric, act_order=act_order, dtype=dtype,
        device=triton_device,
    )  # fmt: skip
    x = activations(m, k, dtype, triton_device)
    bias = torch.linspace(-1, 1, n, dtype=dtype, device=triton_device)
    actual = run(layer, x, bias)
    assert actual.dtype == dtype
    exact = x.double() @ layer.exact.T + bias.double()
    assert_as_accurate_as_torch(actual, exact, F.linear(x, layer.rounded.to(dtype), bias))


@pytest.mark.parametrize("m", [33, 70, 150])
@pytest.mark.parametrize(("n", "group_size"), [(130, 128), (65, 20), (70, 32)])
def test_every_tile_size(triton_device: str, m: int, n: int, group_size: int) -> None:
    """More tokens than the smaller tiles hold, with tails in M and N and several tiles of each."""
    k = 120 if group_size == 20 else 128
    layer = make_w4a16(n, k, group_size, device=triton_device)
    x = activations(m, k, BF16, triton_device)
    exact = x.double() @ layer.exact.T
    assert_as_accurate_as_torch(run(layer, x), exact, F.linear(x, layer.rounded))


@pytest.mark.parametrize("scale_dtype", [BF16, FP16, FP32])
def test_scales_of_another_dtype_are_not_rounded(
    triton_device: str, scale_dtype: torch.dtype
) -> None:
    layer = make_w4a16(16, 128, 64, dtype=BF16, scale_dtype=scale_dtype, device=triton_device)
    x = activations(8, 128, BF16, triton_device)
    exact = x.double() @ layer.exact.T
    # Exact scales leave only the rounding of the result.
    assert_as_accurate_as_torch(run(layer, x), exact, exact.to(BF16), factor=1.01)


@pytest.mark.parametrize("group_size", [64, 20, -1])
def test_strided_inputs_equal_their_contiguous_copy(triton_device: str, group_size: int) -> None:
    k = 100 if group_size == 20 else 128
    layer = make_w4a16(24, k, group_size, symmetric=False, device=triton_device)
    base = activations(40, 2 * k + 8, BF16, triton_device)
    views = {
        "columns": base[:, 3 : 3 + k],
        "every second row": base[::2, :k],
        "every second column": base[:, : 2 * k : 2],
        "transposed": base[:, :k].T.contiguous().T,
        "one row expanded": base[:1, :k].expand(5, k),
        "3-D": base[:, :k].unflatten(0, (4, 10)),
        "3-D with gaps": base.unflatten(0, (4, 10))[:, :7, 5 : 5 + k],
        "1-D": base[3, :k],
    }
    for name, view in views.items():
        expected = run(layer, view.contiguous())
        assert torch.equal(run(layer, view), expected), name
        assert expected.shape == (*view.shape[:-1], 24)


@pytest.mark.parametrize("dtype", [BF16, FP16, FP32])
@pytest.mark.parametrize(("group_size", "act_order"), [(64, False), (16, True), (-1, False)])
def test_plain_torch_kernel(group_size: int, act_order: bool, dtype: torch.dtype) -> None:
    layer = make_w4a16(24, 128, group_size, symmetric=False, act_order=act_order, dtype=dtype)
    kernel = select_kernel(layer.problem, "torch_w4a16").kernel
    weight = kernel.prepare(layer.problem, layer.words, layer.scale, layer.zero, layer.g_idx)
    x = activations(9, 128, dtype, "cpu").view(3, 3, 128)
    actual = kernel.apply(layer.problem, x, weight, None)
    assert torch.equal(actual, F.linear(x, layer.rounded))


@pytest.mark.parametrize("m", [0, 1, 9])
@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize("group_size", [32, 64, 128, 256])
def test_cpu_int4pack(group_size: int, dtype: torch.dtype, m: int) -> None:
    layer = make_w4a16(48, 2048, group_size, dtype=dtype)
    kernel = select_kernel(layer.problem, "cpu_int4pack").kernel
    weight = kernel.prepare(layer.problem, layer.words, layer.scale, layer.zero, layer.g_idx)
    x = activations(m, 2048, dtype, "cpu")
    bias = torch.linspace(-1, 1, 48, dtype=dtype)
    actual = kernel.apply(layer.problem, x, weight, bias)
    exact = x.double() @ layer.exact.T + bias.double()
    assert_as_accurate_as_torch(actual, exact, F.linear(x, layer.rounded, bias))


def test_bad_rows_stay_alone(triton_device: str) -> None:
    layer = make_w4a16(24, 128, 64, symmetric=False, device=triton_device)
    bias = torch.linspace(-1, 1, 24, dtype=BF16, device=triton_device)
    x = activations(20, 128, BF16, triton_device)
    clean = run(layer, x, bias)
    x[3] = 0
    x[7, 5] = float("nan")
    x[11, 9] = float("inf")
    dirty = run(layer, x, bias)
    assert torch.equal(dirty[3], bias)
    assert dirty[7].isnan().all() and not dirty[11].isfinite().any()
    others = [i for i in range(20) if i not in (3, 7, 11)]
    assert torch.equal(dirty[others], clean[others])


def test_large_fp16_activations_stay_finite(triton_device: str) -> None:
    """1e4 times 15 codes sums beyond fp16 long before the scaled result does."""
    layer = make_w4a16(8, 256, 128, dtype=FP16, device=triton_device)
    x = torch.full((2, 256), 1e4, dtype=FP16, device=triton_device)
    x[:, 1::2] *= -1
    exact = x.double() @ layer.exact.T
    assert exact.abs().max() < 65504
    actual = run(layer, x)
    assert torch.isfinite(actual).all()
    assert_as_accurate_as_torch(actual, exact, exact.to(FP16))


def test_refusals_name_the_argument(triton_device: str) -> None:
    layer = make_w4a16(8, 128, 64, device=triton_device)
    weight = api.prepare(layer.words, layer.scale, None, None, bits=4, k=128)
    x = activations(2, 128, BF16, triton_device)
    bad_bias = torch.zeros(9, device=triton_device)
    for call, message in [
        (lambda: w4a16_gemm(x.float(), weight, group_size=64), "x: found dtype torch.float32"),
        (lambda: w4a16_gemm(x[:, :30], weight, group_size=64), "group_size: found 64"),
        (lambda: w4a16_gemm(x.repeat(1, 2), weight, group_size=64), "x: found 256 inputs"),
        (lambda: w4a16_gemm(x, weight, bad_bias, group_size=64), r"bias: found shape \(9,\)"),
        (lambda: w4a16_gemm(x, weight, group_size=32), "group_size: found 32"),
        (lambda: w4a16_gemm(x, weight, bits=3, group_size=64), "bits: found 3"),
    ]:
        with pytest.raises(ValueError, match=message):
            call()
