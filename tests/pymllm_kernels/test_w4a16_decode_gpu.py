"""The W4A16 kernel for few tokens on a GPU of capability 9.0."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from pymllm_kernels import select_kernel
from pymllm_kernels.testing.inputs import W4A16Layer, assert_as_accurate_as_torch, make_w4a16
from pymllm_kernels.w4a16.api import W4A16Weight
from pymllm_kernels.w4a16.hopper_decode_tuning import CONFIGS, DecodeConfig, why_invalid

hopper = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
if not hopper:
    pytest.skip("needs a GPU of capability 9.0", allow_module_level=True)

from pymllm_kernels.w4a16.hopper_decode_launch import PreparedDecode
from pymllm_kernels.w4a16.hopper_launch import find, form_of, launch

BF16, FP16 = torch.bfloat16, torch.float16


def prepared(layer: W4A16Layer) -> W4A16Weight:
    kernel = select_kernel(layer.problem).kernel
    assert kernel.name == "gluon_hopper_w4a16"
    return kernel.prepare(layer.problem, layer.words, layer.scale, layer.zero, layer.g_idx)  # type: ignore[attr-defined, no-any-return]


def valid(m: int, weight: W4A16Weight, group_size: int) -> list[DecodeConfig]:
    scale = weight.scale.dtype
    form = form_of(4 * weight.weight.shape[2], group_size, scale, scale, weight.zero is None)
    k = 128 * weight.weight.shape[0]
    return [config for config in CONFIGS if why_invalid(config, m, k, form, 227 * 1024) is None]


def run(
    x: torch.Tensor, weight: W4A16Weight, bias: torch.Tensor | None, group_size: int,
    config: DecodeConfig,
) -> torch.Tensor:  # fmt: skip
    """The result in memory that was NaN, with NaN beside it that must stay."""
    m, n = x.shape[0], weight.weight.shape[1]
    memory = torch.full((m * n + 4096,), float("nan"), dtype=x.dtype, device=x.device)
    out = memory[2048 : 2048 + m * n].view(m, n)
    launch(
        x, weight.weight, weight.scale, weight.zero, bias, out, group_size=group_size, config=config
    )
    assert memory[:2048].isnan().all() and memory[2048 + m * n :].isnan().all()
    return out


@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group_size", [128, 64, 32, 256, -1])
def test_every_configuration(group_size: int, symmetric: bool, dtype: torch.dtype) -> None:
    # One row block, or two for the last of the programs; 11 or 12 blocks of K for 2 to 16 warps.
    n, k = 16 * (132 + 31), 1536 if group_size == 256 else 1408
    layer = make_w4a16(n, k, group_size, symmetric=symmetric, dtype=dtype, device="cuda")
    weight = prepared(layer)
    bias = torch.randn(n, device="cuda").to(dtype)
    for m in (1, 5, 8, 9, 16):
        x = torch.randn(m, k, device="cuda").to(dtype)
        exact = x.double() @ layer.exact.T + bias.double()
        rounded = F.linear(x, layer.rounded, bias)
        for config in valid(m, weight, group_size):
            out = run(x, weight, bias, group_size, config)
            assert_as_accurate_as_torch(out, exact, rounded)
            assert torch.equal(run(x, weight, bias, group_size, config), out), config


@pytest.mark.parametrize("config", CONFIGS, ids=str)
@pytest.mark.parametrize(
    ("n", "k"),
    [(16, 128), (16, 4096), (528, 1408), (10240, 2048), (28672, 640), (43056, 384), (57344, 1024)],
)
def test_shares_of_row_blocks(n: int, k: int, config: DecodeConfig) -> None:
    """One row block, several passes, and programs with one row block more than others."""
    layer = make_w4a16(n, k, 128, device="cuda")
    weight = prepared(layer)
    x = torch.randn(1 if config.keep else config.block_m - 1, k, device="cuda").to(BF16)
    out = run(x, weight, None, 128, config)
    assert_as_accurate_as_torch(out, x.double() @ layer.exact.T, F.linear(x, layer.rounded))


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_inputs_that_end_inside_a_block(config: DecodeConfig) -> None:
    k = 3192 if config.keep else 5112
    layer = make_w4a16(272, k, -1, device="cuda")
    weight = prepared(layer)
    assert weight.weight.shape[2] == 32
    x = torch.randn(1 if config.keep else 3, k, device="cuda").to(BF16)
    out = run(x, weight, None, -1, config)
    assert_as_accurate_as_torch(out, x.double() @ layer.exact.T, F.linear(x, layer.rounded))


def test_rows_of_a_larger_tensor() -> None:
    layer = make_w4a16(512, 1024, 128, device="cuda")
    weight = prepared(layer)
    base = torch.randn(16, 2056, device="cuda").to(BF16)
    for config in valid(16, weight, 128):
        for x in (base[:, 8:1032], base[:, 1:1025], base[:, :1024].T.contiguous().T):
            expected = run(x.contiguous(), weight, None, 128, config)
            assert torch.equal(run(x, weight, None, 128, config), expected)


@pytest.mark.parametrize("config", CONFIGS, ids=str)
@pytest.mark.parametrize("symmetric", [True, False])
def test_act_order_gives_the_bits_of_gathering_first(config: DecodeConfig, symmetric: bool) -> None:
    layer = make_w4a16(4096, 1408, 128, symmetric=symmetric, act_order=True, device="cuda")
    weight = prepared(layer)
    if config not in valid(1, weight, 128):
        pytest.skip("another kind of layer")
    perm = weight.input_perm
    assert perm is not None
    base = torch.randn(16, 2 * 1408 + 1, device="cuda").to(BF16)
    # One token that is kept, in a row and on 16 bytes, is gathered by the kernel itself.
    for m in (1,) if config.keep else (1, 2, config.block_m):
        for x in (base[:m, :1408].contiguous(), base[:m, 1:1409], base[:m, ::2][:, :1408]):
            expected = run(x[:, perm.long()], weight, None, 128, config)
            out = torch.full((m, 4096), float("nan"), dtype=BF16, device="cuda")
            # Again and again, in memory that the one before has just read.
            for _ in range(50):
                launch(
                    x, *weight[:3], None, out.fill_(float("nan")), group_size=128, perm=perm,
                    config=config,
                )  # fmt: skip
                assert torch.equal(out, expected)
    assert_as_accurate_as_torch(out, x.double() @ layer.exact.T, F.linear(x, layer.rounded))


def gathers_in_one_launch(
    x: torch.Tensor, weight: W4A16Weight, perm: torch.Tensor, group_size: int, config: DecodeConfig
) -> bool:
    found = find(x, weight._replace(input_perm=perm), None, group_size, config=config)
    return isinstance(found, PreparedDecode)


@pytest.mark.parametrize(
    ("k", "group_size", "symmetric", "dtype"),
    [
        (128, 32, True, BF16), (256, 128, True, BF16), (1408, 64, False, FP16), (2048, 32, False, BF16),
        (2176, 128, True, FP16), (4096, 128, False, BF16), (4096, 2048, True, BF16),
        (5112, -1, False, FP16), (8192, 64, True, BF16), (14336, 128, True, BF16),
        (16384, 32, True, FP16), (16384, 128, False, BF16), (16512, 128, True, BF16),
    ],
)  # fmt: skip
def test_one_token_in_act_order(
    k: int, group_size: int, symmetric: bool, dtype: torch.dtype
) -> None:
    """Put in order by the kernel itself, and by another where the token is too long or not in a row."""
    n = 16 * (132 + 31)
    layer = make_w4a16(n, k, group_size, symmetric=symmetric, dtype=dtype, device="cuda")
    weight = prepared(layer)
    perm = torch.randperm(k, device="cuda").to(torch.int32)
    bias = torch.randn(n, device="cuda").to(dtype)
    # Every third: all are compiled for one kind of layer in other tests. None keeps a token this long.
    few = [c for c in valid(1, weight, group_size) if c.block_m == 8]
    configs = [c for c in few if c.keep][::3] or few[::3]
    assert configs[0].keep == (k <= 8192)
    for start, step in ((8, 1), (9, 1), (8, 2)):
        # What lies beside the token must not be read as part of it.
        wide = torch.full((2 * k + 24,), float("nan"), dtype=dtype, device="cuda")
        x = wide[start : start + step * k : step].unsqueeze(0)
        x.copy_(torch.randn(1, k))
        ordered = x[:, perm.long()]
        exact = ordered.double() @ layer.exact.T + bias.double()
        rounded = F.linear(ordered, layer.rounded, bias)
        for config in configs if (start, step) == (8, 1) else configs[:1]:
            itself = (start, step) == (8, 1) and config.keep
            assert gathers_in_one_launch(x, weight, perm, group_size, config) == itself
            out = torch.empty(1, n, dtype=dtype, device="cuda")
            for _ in range(3):
                launch(
                    x, *weight[:3], bias, out.fill_(float("nan")), group_size=group_size, perm=perm,
                    config=config,
                )  # fmt: skip
                assert torch.equal(out, run(ordered, weight, bias, group_size, config)), config
            assert_as_accurate_as_torch(out, exact, rounded)


@pytest.mark.parametrize("config", [c for c in CONFIGS if c.keep], ids=str)
@pytest.mark.parametrize(("n", "k"), [(16, 4096), (528, 1408), (28672, 640), (57344, 1024)])
def test_one_token_in_act_order_of_shares_of_row_blocks(
    n: int, k: int, config: DecodeConfig
) -> None:
    """Sums of the warps take the memory that the token was in before it was in order, again and again."""
    layer = make_w4a16(n, k, 128, device="cuda")
    weight = prepared(layer)
    perm = torch.randperm(k, device="cuda").to(torch.int32)
    x = torch.randn(1, k, device="cuda").to(BF16)
    ordered = x[:, perm.long()]
    assert gathers_in_one_launch(x, weight, perm, 128, config)
    expected = run(ordered, weight, None, 128, config)
    out = torch.empty_like(expected)
    differing = torch.zeros((), dtype=torch.int64, device="cuda")
    for _ in range(500):
        out.fill_(float("nan"))
        launch(x, *weight[:3], None, out, group_size=128, perm=perm, config=config)
        differing += (out != expected).any()
    assert differing.item() == 0
    assert_as_accurate_as_torch(
        out, ordered.double() @ layer.exact.T, F.linear(ordered, layer.rounded)
    )


def test_act_order_in_a_graph_of_changing_activations() -> None:
    """Each call gathers into memory that the call before it may still be reading."""
    layer = make_w4a16(28672, 4096, 128, act_order=True, device="cuda")
    weight = prepared(layer)
    xs = torch.randn(8, 8, 4096, device="cuda").to(BF16)
    config = valid(8, weight, 128)[0]
    perm = weight.input_perm
    assert perm is not None
    outs = torch.empty(8, 8, 28672, dtype=BF16, device="cuda")

    def calls() -> None:
        for x, out in zip(xs, outs, strict=True):
            launch(x, *weight[:3], None, out, group_size=128, perm=perm, config=config)

    calls()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        calls()
    for _ in range(20):
        xs.normal_()
        outs.fill_(float("nan"))
        graph.replay()
        for x, out in zip(xs, outs, strict=True):
            assert torch.equal(run(x[:, perm.long()], weight, None, 128, config), out)


@pytest.mark.parametrize("magnitude", [2.0**-40, 2.0**-10, 2.0**20, 2.0**50])
def test_magnitudes(magnitude: float) -> None:
    layer = make_w4a16(256, 2048, 128, device="cuda")
    weight = prepared(layer)
    x = torch.randn(4, 2048, device="cuda").to(BF16)
    # Powers of two change nothing but the exponent, unless something over- or underflows.
    for config in valid(4, weight, 128):
        expected = run(x, weight, None, 128, config) * magnitude
        assert torch.equal(run(x * magnitude, weight, None, 128, config), expected)


def test_activations_of_one_sign() -> None:
    """The sum of x over a group is then large beside the result."""
    for symmetric in (True, False):
        layer = make_w4a16(512, 4096, 128, symmetric=symmetric, device="cuda")
        weight = prepared(layer)
        x = (torch.rand(8, 4096, device="cuda") + 1).to(BF16)
        for config in valid(8, weight, 128):
            out = run(x, weight, None, 128, config)
            exact = x.double() @ layer.exact.T
            assert_as_accurate_as_torch(out, exact, F.linear(x, layer.rounded))


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_ten_thousand_launches_give_the_same_bits(config: DecodeConfig) -> None:
    layer = make_w4a16(4096, 4096, 128, device="cuda")
    weight = prepared(layer)
    x = torch.randn(1 if config.keep else config.block_m, 4096, device="cuda").to(BF16)
    first = run(x, weight, None, 128, config)
    differing = torch.zeros((), dtype=torch.int64, device="cuda")
    out = torch.empty_like(first)
    for _ in range(10_000):
        out.fill_(float("nan"))
        launch(x, *weight[:3], None, out, group_size=128, config=config)
        differing += (out != first).any()
    assert differing.item() == 0


def test_more_tokens_than_a_configuration_takes_are_refused() -> None:
    layer = make_w4a16(512, 1024, 128, device="cuda")
    weight = prepared(layer)
    x = torch.randn(9, 1024, device="cuda").to(BF16)
    with pytest.raises(ValueError, match="up to 8 tokens, found 9"):
        run(x, weight, None, 128, DecodeConfig(8, rows=4))
