"""Larger shapes, extreme sizes and repetition, on a GPU."""

from __future__ import annotations

import random

import pytest
import torch
import torch.nn.functional as F

from pymllm_kernels import LinearProblem, device_facts, per_token_quant_int8, select_kernel
from pymllm_kernels.per_token_quant_int8 import reference as quant_reference
from pymllm_kernels.problem import LinearKernel
from pymllm_kernels.testing.inputs import assert_as_accurate_as_torch, make_w4a16
from pymllm_kernels.w4a16 import launch as w4a16_launch
from pymllm_kernels.w4a16.tuning import Form
from pymllm_kernels.w8a8_int8 import launch as w8a8_launch
from pymllm_kernels.w8a8_int8 import reference as w8a8_reference
from pymllm_kernels.w8a8_int8.tuning import choose_config

pytestmark = pytest.mark.gpu

BF16, FP16 = torch.bfloat16, torch.float16
MS = (0, 1, 2, 7, 16, 17, 33, 64, 65, 128, 300, 1000, 4097)
NS = (1, 7, 64, 129, 1000, 2112, 4096)
# (K, group sizes that divide it)
KS = (
    (64, (16, 32, 64, -1)),
    (100, (20, 50, -1)),
    (576, (48, 64, 96, -1)),
    (1000, (8, 40, 125, -1)),
    (2112, (32, 64, 96, -1)),
    (4096, (16, 32, 64, 128, 256, 1024, -1)),
    (7392, (32, 96, 224, -1)),
)


def _combinations(count: int) -> list[object]:
    rng = random.Random(20)
    cases = []
    for index in range(count):
        k, groups = rng.choice(KS)
        # Every M and N of interest at least count / 13 times, the rest at random.
        case = (
            MS[index % len(MS)], NS[index % len(NS)], k, rng.choice(groups), rng.choice((4, 4, 8)),
            rng.random() < 0.5, rng.random() < 0.3, rng.choice((BF16, FP16)),
        )  # fmt: skip
        m, n, k, group, bits, symmetric, act_order, dtype = case
        words = (
            f"M{m}-N{n}-K{k}-g{group}-int{bits}{'' if symmetric else '-asym'}"
            f"{'-act' if act_order else ''}-{str(dtype).removeprefix('torch.')}"
        )
        cases.append(pytest.param(*case, id=f"{index}-{words}"))
    return cases


@pytest.mark.parametrize(
    ("m", "n", "k", "group_size", "bits", "symmetric", "act_order", "dtype"), _combinations(260)
)
def test_w4a16_combination(
    m: int, n: int, k: int, group_size: int, bits: int, symmetric: bool, act_order: bool,
    dtype: torch.dtype,
) -> None:  # fmt: skip
    act_order = act_order and group_size != -1
    layer = make_w4a16(
        n, k, group_size, bits=bits, symmetric=symmetric, act_order=act_order, dtype=dtype,
        device="cuda", seed=m + n + k,
    )  # fmt: skip
    x = torch.randn(m, k, device="cuda").to(dtype)
    bias = torch.randn(n, device="cuda").to(dtype)
    exact = x.double() @ layer.exact.T + bias.double()
    for kernel in _fused_kernels(layer.problem):
        weight = kernel.prepare(layer.problem, layer.words, layer.scale, layer.zero, layer.g_idx)
        actual = kernel.apply(layer.problem, x, weight, bias)
        assert_as_accurate_as_torch(actual, exact, F.linear(x, layer.rounded, bias))


def _fused_kernels(problem: LinearProblem) -> list[LinearKernel]:
    """The kernel that is chosen, and the one for any GPU beside it."""
    chosen = select_kernel(problem)
    assert chosen.kernel.name in ("gluon_hopper_w4a16", "triton_w4a16"), chosen
    anywhere = select_kernel(problem, "triton_w4a16").kernel
    return [chosen.kernel] if chosen.kernel is anywhere else [chosen.kernel, anywhere]


@pytest.mark.parametrize("m", MS)
@pytest.mark.parametrize("n", NS)
def test_w8a8_combination(m: int, n: int) -> None:
    """Activation codes, scales and int32 sums exact, the epilogue rounded once."""
    for k in (64, 1000, 2112, 4096, 7393):
        x = (torch.randn(m, k, device="cuda") * 3).to(BF16)
        weight = torch.randint(-128, 128, (n, k), dtype=torch.int8, device="cuda")
        scale = torch.rand(n, device="cuda") / 100
        bias = torch.randn(n, device="cuda").to(BF16)
        codes, x_scale = per_token_quant_int8(x)
        expected_codes, expected_scale = quant_reference.per_token_quant_int8(x)
        assert torch.equal(codes, expected_codes)
        assert torch.equal(x_scale[:, 0], expected_scale)
        problem = LinearProblem(
            "w8a8_int8",
            n,
            k,
            8,
            -1,
            True,
            False,
            BF16,
            torch.float32,
            device_facts("cuda"),
            "token",
        )
        kernel = select_kernel(problem).kernel
        assert kernel.name in ("gluon_hopper_w8a8_int8", "triton_w8a8_int8")
        actual = kernel.apply(problem, x, kernel.prepare(problem, weight, scale), bias)
        scaled = scale * w8a8_reference.int_matmul(codes, weight).to(torch.float32)
        expected = (x_scale.double() * scaled.double() + bias.double()).float().to(BF16)
        assert torch.equal(actual, expected)


def _guarded(m: int, n: int) -> tuple[torch.Tensor, torch.Tensor]:
    """An ``[m, n]`` bf16 view and the memory around it, 4096 elements before and after, all 7."""
    memory = torch.full((m * n + 8192,), 7.0, dtype=BF16, device="cuda")
    return memory[4096 : 4096 + m * n].view(m, n), memory


def test_more_than_2_31_outputs_w4a16() -> None:
    m, n, k = 65601, 32768, 128
    layer = make_w4a16(n, k, 64, symmetric=False, device="cuda")
    kernel = select_kernel(layer.problem).kernel
    weight = kernel.prepare(layer.problem, layer.words, layer.scale, layer.zero, layer.g_idx)
    x = torch.randn(m, k, device="cuda").to(BF16)
    out, memory = _guarded(m, n)
    w4a16_launch.launch(x, *weight, None, out, bits=4, group_size=64)
    for rows in (slice(0, 64), slice(65535, 65537), slice(m - 64, m)):
        exact = x[rows].double() @ layer.exact.T
        assert_as_accurate_as_torch(out[rows], exact, F.linear(x[rows], layer.rounded))
    assert (memory[:4096] == 7).all() and (memory[-4096:] == 7).all()


def test_more_than_2_31_outputs_w8a8() -> None:
    m, n, k = 65601, 32768, 128
    codes = torch.randint(-128, 128, (m, k), dtype=torch.int8, device="cuda")
    weight = torch.randint(-128, 128, (n, k), dtype=torch.int8, device="cuda")
    x_scale, w_scale = torch.rand(m, device="cuda"), torch.rand(n, device="cuda")
    out, memory = _guarded(m, n)
    w8a8_launch.launch(codes, weight, x_scale, w_scale, None, None, None, out)
    for rows in (slice(0, 64), slice(65535, 65537), slice(m - 64, m)):
        acc = w8a8_reference.int_matmul(codes[rows], weight)
        expected = w8a8_reference.epilogue(
            acc, x_scale[rows, None], w_scale, None, None, None, BF16
        )
        assert torch.equal(out[rows], expected)
    assert (memory[:4096] == 7).all() and (memory[-4096:] == 7).all()


def test_more_than_2_31_inputs() -> None:
    """M * K beyond 2**31 through quantization and both GEMMs."""
    m, k, n = 65601, 32768, 16
    x = torch.randn(m, 64, device="cuda").to(BF16).repeat(1, k // 64)
    layer = make_w4a16(n, k, 128, device="cuda")
    kernel = select_kernel(layer.problem).kernel
    weight = kernel.prepare(layer.problem, layer.words, layer.scale, layer.zero, layer.g_idx)
    out = kernel.apply(layer.problem, x, weight, None)
    last = slice(m - 8, m)
    exact = x[last].double() @ layer.exact.T
    assert_as_accurate_as_torch(out[last], exact, F.linear(x[last], layer.rounded))
    transposed = x.T.contiguous().T
    assert torch.equal(kernel.apply(layer.problem, transposed, weight, None)[last], out[last])
    del transposed
    codes, scale = per_token_quant_int8(x)
    expected = quant_reference.per_token_quant_int8(x[last])
    assert torch.equal(codes[last], expected[0]) and torch.equal(scale[last, 0], expected[1])


@pytest.mark.parametrize("group_size", [128, 64, 32, -1])
@pytest.mark.parametrize("m", [16, 32, 64, 128, 1024])
def test_thousand_launches_give_the_same_bits(m: int, group_size: int) -> None:
    """A wgmma register race would show as a result that changes from run to run."""
    layer = make_w4a16(4096, 4096, group_size, device="cuda")
    kernel = select_kernel(layer.problem).kernel
    weight = kernel.prepare(layer.problem, layer.words, layer.scale, layer.zero, layer.g_idx)
    x = torch.randn(m, 4096, device="cuda").to(BF16)
    first = kernel.apply(layer.problem, x, weight, None)
    for _ in range(1000 if m < 1024 else 200):
        assert torch.equal(kernel.apply(layer.problem, x, weight, None), first)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("group_size", [128, 32, -1])
def test_every_w4a16_configuration(bits: int, group_size: int) -> None:
    layer = make_w4a16(520, 1024, group_size, bits=bits, symmetric=False, device="cuda")
    kernel = select_kernel(layer.problem, "triton_w4a16").kernel
    weight = kernel.prepare(layer.problem, layer.words, layer.scale, layer.zero, layer.g_idx)
    x = torch.randn(200, 1024, device="cuda").to(BF16)
    exact = x.double() @ layer.exact.T
    for config in Form(bits, 2, 128, group_size).rule:
        out = torch.empty(200, 520, dtype=BF16, device="cuda")
        w4a16_launch.launch(x, *weight, None, out, bits=bits, group_size=group_size, config=config)
        assert_as_accurate_as_torch(out, exact, F.linear(x, layer.rounded))


def test_int8_configuration_by_alignment() -> None:
    device = device_facts("cuda")
    assert choose_config(4096, 4096, device).block_m == 128
    assert choose_config(4096, 4090, device).block_m == 64
