"""The W4A16 kernel for Hopper on a GPU: every configuration, sharing, streams, graphs, repetition."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from pymllm_kernels import device_facts, select_kernel
from pymllm_kernels.common.sharing import HAND_ON
from pymllm_kernels.common.workspace import counters
from pymllm_kernels.testing.inputs import W4A16Layer, assert_as_accurate_as_torch, make_w4a16
from pymllm_kernels.w4a16.api import W4A16Weight
from pymllm_kernels.w4a16.hopper_tuning import HopperConfig, candidates

hopper = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
if not hopper:
    pytest.skip("needs a GPU of capability 9.0", allow_module_level=True)

from pymllm_kernels.w4a16.hopper_launch import form_of, launch

BF16, FP16 = torch.bfloat16, torch.float16
DEVICE = torch.device("cuda", 0)


def prepared(layer: W4A16Layer) -> W4A16Weight:
    choice = select_kernel(layer.problem)
    assert choice.kernel.name == "gluon_hopper_w4a16", choice
    return choice.kernel.prepare(layer.problem, layer.words, layer.scale, layer.zero, layer.g_idx)  # type: ignore[attr-defined, no-any-return]


def configurations(
    m: int, n: int, k: int, weight: W4A16Weight, group_size: int, bits: int = 4
) -> list[HopperConfig]:
    facts = device_facts(DEVICE)
    form = form_of(
        weight.weight.shape[2] * 16 // bits, group_size, weight.scale.dtype, weight.scale.dtype,
        weight.zero is None, bits,
    )  # fmt: skip
    args = (m, n, k, form, facts.multiprocessors, facts.shared_memory)
    return [config for _, config in candidates(*args)]


def run(
    x: torch.Tensor, weight: W4A16Weight, bias: torch.Tensor | None, group_size: int,
    config: HopperConfig | None = None, bits: int = 4,
) -> torch.Tensor:  # fmt: skip
    """The result in memory that was NaN, with NaN beside it that must stay."""
    m, n = x.shape[0], weight.weight.shape[1]
    memory = torch.full((m * n + 4096,), float("nan"), dtype=x.dtype, device=x.device)
    out = memory[2048 : 2048 + m * n].view(m, n)
    launch(
        x, weight.weight, weight.scale, weight.zero, bias, out, group_size=group_size, bits=bits,
        config=config,
    )  # fmt: skip
    assert memory[:2048].isnan().all() and memory[2048 + m * n :].isnan().all()
    return out


@pytest.mark.parametrize(
    ("bits", "group_size", "symmetric", "dtype", "k"),
    [
        (4, 128, True, BF16, 1408),
        (4, 128, False, FP16, 1408),
        (4, 64, False, BF16, 1408),
        (4, 32, True, FP16, 1408),
        (4, 32, True, BF16, 1408),
        (4, -1, False, BF16, 1408),
        (4, 256, True, BF16, 1536),
        (4, 32, False, BF16, 1536),
        (4, 64, True, BF16, 2112),
        (4, 16, False, BF16, 2112),
        (4, 16, True, BF16, 2112),
        (8, 128, True, BF16, 1536),
        (8, 128, True, FP16, 1408),
        (8, 64, False, BF16, 1408),
        (8, 32, False, BF16, 1536),
        (8, 32, False, FP16, 1408),
        (8, -1, False, BF16, 1408),
        (8, 16, False, BF16, 2112),
    ],
    ids=str,
)
def test_every_configuration(
    bits: int, group_size: int, symmetric: bool, dtype: torch.dtype, k: int
) -> None:
    n, m = 400, 200
    layer = make_w4a16(n, k, group_size, bits=bits, symmetric=symmetric, dtype=dtype, device="cuda")
    weight = prepared(layer)
    x = torch.randn(m, k, device="cuda").to(dtype)
    bias = torch.randn(n, device="cuda").to(dtype)
    exact = x.double() @ layer.exact.T + bias.double()
    rounded = F.linear(x, layer.rounded, bias)
    tried = configurations(m, n, k, weight, group_size, bits)
    assert {c.block_m for c in tried} == {8, 16, 32, 64, 128, 256}
    assert {c.consumers for c in tried} == {2, 3, 4}
    for config in tried:
        out = run(x, weight, bias, group_size, config, bits)
        assert_as_accurate_as_torch(out, exact, rounded)
        assert torch.equal(run(x, weight, bias, group_size, config, bits), out), config
    assert not counters(DEVICE).any()


@pytest.mark.parametrize(
    ("bits", "group_size", "symmetric", "dtype", "k"),
    [
        (4, 128, True, BF16, 1408), (4, 32, False, FP16, 1536), (4, -1, False, BF16, 2112),
        (8, 128, True, BF16, 1408), (8, 64, False, FP16, 1408),
    ],
    ids=str,
)  # fmt: skip
def test_tiles_that_are_handed_on(
    bits: int, group_size: int, symmetric: bool, dtype: torch.dtype, k: int
) -> None:
    """More tiles than multiprocessors, whatever their size, the last of them not whole."""
    n = 133 * 256 + 16
    layer = make_w4a16(n, k, group_size, bits=bits, symmetric=symmetric, dtype=dtype, device="cuda")
    weight = prepared(layer)
    bias = torch.randn(n, device="cuda").to(dtype)
    seen = set()
    for m in (3, 50, 300):
        x = torch.randn(m, k, device="cuda").to(dtype)
        exact = x.double() @ layer.exact.T + bias.double()
        rounded = F.linear(x, layer.rounded, bias)
        for config in configurations(m, n, k, weight, group_size, bits):
            if config.share == HAND_ON:
                out = run(x, weight, bias, group_size, config, bits)
                assert_as_accurate_as_torch(out, exact, rounded)
                assert torch.equal(run(x, weight, bias, group_size, config, bits), out), config
                seen.add(config.block_m)
    assert seen >= {8, 16, 32, 64, 128}
    assert not counters(DEVICE).any()


@pytest.mark.parametrize("m", [1, 3, 8, 9, 17, 50, 100, 130, 257])
@pytest.mark.parametrize(("n", "k"), [(16, 64), (1040, 4096), (4096, 4096), (2112, 7168)])
def test_tokens(m: int, n: int, k: int) -> None:
    group_size = 64
    layer = make_w4a16(n, k, group_size, device="cuda", seed=m)
    weight = prepared(layer)
    x = torch.randn(m, k, device="cuda").to(BF16)
    out = run(x, weight, None, group_size)
    assert_as_accurate_as_torch(out, x.double() @ layer.exact.T, F.linear(x, layer.rounded))


@pytest.mark.parametrize("m", [1, 3, 8, 17, 50, 130, 257])
@pytest.mark.parametrize(("n", "k"), [(16, 64), (1040, 4096), (4096, 4096), (2112, 7168)])
def test_tokens_with_weights_of_8_bits(m: int, n: int, k: int) -> None:
    layer = make_w4a16(n, k, 64, bits=8, symmetric=m % 2 == 0, device="cuda", seed=m)
    choice = select_kernel(layer.problem)
    weight = prepared(layer)
    x = torch.randn(m, k, device="cuda").to(BF16)
    out = choice.kernel.apply(layer.problem, x, weight, None)
    assert_as_accurate_as_torch(out, x.double() @ layer.exact.T, F.linear(x, layer.rounded))


def test_activations_in_place_or_copied() -> None:
    layer = make_w4a16(512, 1024, 128, device="cuda")
    weight = prepared(layer)
    base = torch.randn(40, 2064, device="cuda").to(BF16)
    aligned = base[:, 8:1032]
    expected = run(aligned.contiguous(), weight, None, 128)
    assert torch.equal(run(aligned, weight, None, 128), expected)
    odd = base[:, 1:1025]
    assert torch.equal(run(odd, weight, None, 128), run(odd.contiguous(), weight, None, 128))
    transposed = aligned.T.contiguous().T
    assert torch.equal(run(transposed, weight, None, 128), expected)
    one = base[3:4, 8:1032].as_strided((1, 1024), (7, 1))
    assert torch.equal(run(one, weight, None, 128)[0], run(one.clone(), weight, None, 128)[0])


def test_scales_of_another_dtype_are_not_rounded() -> None:
    layer = make_w4a16(512, 1024, 128, dtype=FP16, device="cuda")
    weight = prepared(layer)
    x = torch.randn(300, 1024, device="cuda").to(BF16)
    # As fp16 the scales have 11 significant bits, as bf16 8: rounding them would cost 2**-9.
    out = run(x, weight, None, 128)
    assert_as_accurate_as_torch(out, x.double() @ layer.exact.T, F.linear(x, layer.exact.to(BF16)))


@pytest.mark.parametrize("magnitude", [2.0**-80, 2.0**-10, 2.0**20, 2.0**29])
def test_magnitudes_of_scales(magnitude: float) -> None:
    """Codes are multiplied with their scale times 2**100, and the sums with 2**33 in the end."""
    layer = make_w4a16(256, 1024, 128, device="cuda")
    weight = prepared(layer)
    x = torch.randn(20, 1024, device="cuda").to(BF16)
    larger = weight._replace(scale=weight.scale * magnitude)
    # Powers of two change nothing but the exponent, unless something over- or underflows.
    for config in configurations(20, 256, 1024, weight, 128):
        expected = run(x, weight, None, 128, config) * magnitude
        assert torch.equal(run(x, larger, None, 128, config), expected), config


def test_act_order_is_gathered() -> None:
    layer = make_w4a16(512, 1024, 128, act_order=True, device="cuda")
    kernel = select_kernel(layer.problem).kernel
    assert kernel.name == "gluon_hopper_w4a16"
    weight = kernel.prepare(layer.problem, layer.words, layer.scale, layer.zero, layer.g_idx)
    x = torch.randn(2, 9, 1024, device="cuda").to(BF16)
    out = kernel.apply(layer.problem, x, weight, None)
    assert_as_accurate_as_torch(out, x.double() @ layer.exact.T, F.linear(x, layer.rounded))


@pytest.mark.parametrize("k", [128, 1408, 4096])
@pytest.mark.parametrize("m", [3, 24, 50])
def test_act_order_gives_the_bits_of_gathering_first(m: int, k: int) -> None:
    """Started beside the gathering, in memory that the call before may still be reading."""
    layer = make_w4a16(4112, k, 64, act_order=True, device="cuda")
    weight = prepared(layer)
    perm = weight.input_perm
    assert perm is not None
    base = torch.randn(m, 2 * k + 1, device="cuda").to(BF16)
    for x in (base[:, :k].contiguous(), base[:, 1 : k + 1], base[:, ::2][:, :k]):
        for config in configurations(m, 4112, k, weight, 64):
            expected = run(x[:, perm.long()], weight, None, 64, config)
            for _ in range(20):
                out = torch.full_like(expected, float("nan"))
                launch(x, *weight[:3], None, out, group_size=64, perm=perm, config=config)
                assert torch.equal(out, expected), config
    assert_as_accurate_as_torch(out, x.double() @ layer.exact.T, F.linear(x, layer.rounded))


def test_two_streams_at_once() -> None:
    layer = make_w4a16(4096, 4096, 128, device="cuda")
    weight = prepared(layer)
    xs = [torch.randn(m, 4096, device="cuda").to(BF16) for m in (5, 100)]
    expected = [run(x, weight, None, 128) for x in xs]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in xs]
    outs: list[list[torch.Tensor]] = [[], []]
    for _ in range(200):
        for x, stream, out in zip(xs, streams, outs, strict=True):
            with torch.cuda.stream(stream):
                y = torch.full((x.shape[0], 4096), float("nan"), dtype=BF16, device="cuda")
                launch(x, *weight[:3], None, y, group_size=128)
                out.append(y)
    torch.cuda.synchronize()
    for results, one in zip(outs, expected, strict=True):
        assert all(torch.equal(y, one) for y in results)


@pytest.mark.parametrize("m", [1, 64, 512])
def test_graph(m: int) -> None:
    layer = make_w4a16(4096, 4096, 128, device="cuda")
    kernel = select_kernel(layer.problem).kernel
    weight = kernel.prepare(layer.problem, layer.words, layer.scale, layer.zero, layer.g_idx)
    x = torch.randn(m, 4096, device="cuda").to(BF16)
    kernel.apply(layer.problem, x, weight, None)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = kernel.apply(layer.problem, x, weight, None)
    for seed in range(3):
        torch.manual_seed(seed)
        x.copy_(torch.randn(m, 4096, device="cuda"))
        graph.replay()
        assert torch.equal(out, kernel.apply(layer.problem, x, weight, None))


@pytest.mark.parametrize(
    ("bits", "m", "share", "consumers"),
    [
        (4, 16, 4, 2), (4, 64, 4, 2), (4, 128, 4, 2), (4, 256, 1, 2), (4, 1024, 1, 2), (4, 40, 0, 2),
        (4, 16, 4, 3), (4, 64, 4, 3), (4, 128, 4, 3), (4, 256, 2, 3), (4, 512, 1, 3), (4, 40, 0, 3),
        (8, 16, 4, 2), (8, 64, 4, 2), (8, 128, 4, 2), (8, 1024, 1, 2), (8, 40, 0, 3), (8, 8, 1, 4),
        (4, 16, -1, 2), (4, 16, -1, 4), (4, 64, -1, 3), (4, 128, -1, 2), (4, 256, -1, 2),
        (8, 32, -1, 2),
    ],
)  # fmt: skip
def test_ten_thousand_launches_give_the_same_bits(
    bits: int, m: int, share: int, consumers: int
) -> None:
    """A wgmma register race, or a wrong count of sharers, would show from run to run."""
    n = 133 * 256 if share == HAND_ON else 4096
    layer = make_w4a16(n, 4096, 128, bits=bits, device="cuda")
    weight = prepared(layer)
    x = torch.randn(m, 4096, device="cuda").to(BF16)
    most = 128 if consumers == 3 else 256
    found = configurations(m, n, 4096, weight, 128, bits)
    found = [c for c in found if c.share == share and c.consumers == consumers]
    config = next(c for c in found if c.block_m >= min(m, most))
    first = run(x, weight, None, 128, config, bits)
    differing = torch.zeros((), dtype=torch.int64, device="cuda")
    out = torch.empty_like(first)
    for _ in range(10_000):
        out.fill_(float("nan"))
        launch(x, *weight[:3], None, out, group_size=128, bits=bits, config=config)
        differing += (out != first).any()
    assert differing.item() == 0


def test_a_configuration_that_cannot_share_is_refused() -> None:
    layer = make_w4a16(512, 1024, 128, device="cuda")
    weight = prepared(layer)
    x = torch.randn(8, 1024, device="cuda").to(BF16)
    config = replace(configurations(8, 512, 1024, weight, 128)[0], share=3)
    with pytest.raises(ValueError, match="share=3"):
        run(x, weight, None, 128, config)
