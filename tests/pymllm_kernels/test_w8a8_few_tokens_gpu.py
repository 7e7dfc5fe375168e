"""The int8 kernels for few tokens on a GPU of capability 9.0."""

from __future__ import annotations

import itertools

import pytest
import torch

from pymllm_kernels import device_facts
from pymllm_kernels.testing.int8_layer import Int8Layer, int8_inputs, make_int8_layer
from pymllm_kernels.w8a8_int8 import hopper_decode_tuning, hopper_fused_tuning
from pymllm_kernels.w8a8_int8.hopper_decode_tuning import DecodeConfig
from pymllm_kernels.w8a8_int8.hopper_fused_tuning import FusedConfig
from pymllm_kernels.w8a8_int8.tunable import HOPPER

hopper = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
if not hopper:
    pytest.skip("needs a GPU of capability 9.0", allow_module_level=True)

from pymllm_kernels.w8a8_int8.hopper_launch import launch_linear

BF16, FP16 = torch.bfloat16, torch.float16
CONFIGS = (*hopper_decode_tuning.CONFIGS, *hopper_fused_tuning.CONFIGS)
Config = DecodeConfig | FusedConfig


def run(layer: Int8Layer, x: torch.Tensor, config: Config) -> torch.Tensor:
    """The result in memory that was NaN, with NaN beside it that must stay."""
    m, n = x.shape[0], layer.problem.n
    memory = torch.full((m * n + 4096,), float("nan"), dtype=x.dtype, device=x.device)
    out = memory[2048 : 2048 + m * n].view(m, n)
    w = layer.weight
    launch_linear(
        x, w.weight, w.scale, w.column_sum, w.input_scale, w.input_zero, layer.bias, out,
        symmetric=layer.problem.input_symmetric, config=config,
    )  # fmt: skip
    assert memory[:2048].isnan().all() and memory[2048 + m * n :].isnan().all()
    return out


def takes(config: Config, layer: Int8Layer, m: int = 1) -> bool:
    key = HOPPER.key_of(layer.problem)
    return HOPPER.why_invalid(config, key, m, device_facts("cuda")) is None


@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
@pytest.mark.parametrize(
    ("symmetric", "static"), list(itertools.product([True, False], [False, True]))
)
def test_every_configuration(symmetric: bool, static: bool, dtype: torch.dtype) -> None:
    # 33 row blocks and a half; 10 blocks of K and a bit for up to 16 warps.
    n, k = 536, 1296
    for bias in (False, True):
        layer = make_int8_layer(n, k, symmetric=symmetric, static=static, bias=bias, dtype=dtype)
        for m in (1, 2, 7, 8, 9, 16):
            x = int8_inputs(m, k, dtype)
            exact = layer.exact(x)
            for config in CONFIGS:
                if takes(config, layer, m):
                    assert torch.equal(run(layer, x, config), exact), (m, config)


@pytest.mark.parametrize("config", CONFIGS, ids=str)
@pytest.mark.parametrize(
    ("n", "k"), [(8, 16), (16, 4096), (4096, 4096), (10240, 2048), (57344, 1024), (2112, 28672)]
)
def test_shares_of_rows(n: int, k: int, config: Config) -> None:
    """Half a row block, one, several passes or tiles, and programs with one more than others."""
    layer = make_int8_layer(n, k)
    for m in {1, config.block_m}:
        if not takes(config, layer, m):
            continue
        x = int8_inputs(m, k)
        assert torch.equal(run(layer, x, config), layer.exact(x))


def test_rows_of_a_larger_tensor() -> None:
    layer = make_int8_layer(512, 1024)
    base = int8_inputs(17, 2056)
    for config in CONFIGS:
        rows = base[17 - config.block_m :]
        for x in (rows[:, 8:1032], rows[:, 1:1025], rows[:, 0:2048:2], rows[:, 4:1028]):
            assert torch.equal(run(layer, x, config), layer.exact(x)), config


@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
@pytest.mark.parametrize("symmetric", [True, False])
def test_extreme_rows(symmetric: bool, dtype: torch.dtype) -> None:
    """Zeros, one value, values of one sign, tiny and large ones, ties."""
    k = 1040
    layer = make_int8_layer(264, k, symmetric=symmetric, dtype=dtype)
    x = int8_inputs(8, k, dtype)
    x[0] = 0
    x[1] = 0
    x[1, 77] = 3
    x[2] = x[2].abs()
    x[3] = -x[3].abs()
    x[4] = (x[4].float() * torch.finfo(dtype).smallest_normal).to(dtype)
    x[5] = (x[5].float() * (torch.finfo(dtype).max / 16)).to(dtype)
    # absmax 127: halves are ties.
    x[6] = (torch.arange(k, device="cuda") % 255 - 127).to(dtype) / 2
    x[6, 0] = 127
    exact = layer.exact(x)
    for config in CONFIGS:
        if not takes(config, layer):
            continue
        for row in range(0, 8, min(config.block_m, 8)):
            rows = slice(row, row + config.block_m)
            assert torch.equal(run(layer, x[rows], config), exact[rows]), (config, row)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_row_that_is_not_finite(bad: float, symmetric: bool) -> None:
    layer = make_int8_layer(264, 1040, symmetric=symmetric, bias=True)
    for config in CONFIGS:
        if takes(config, layer):
            x = int8_inputs(config.block_m, 1040)
            x[-1, 500] = bad
            out = run(layer, x, config)
            assert out[-1].isnan().all() and out[:-1].isfinite().all(), config


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_ten_thousand_launches_give_the_same_bits(config: Config) -> None:
    layer = make_int8_layer(4096, 4096)
    w = layer.weight
    x = int8_inputs(config.block_m, 4096)
    first = run(layer, x, config)
    differing = torch.zeros((), dtype=torch.int64, device="cuda")
    out = torch.empty_like(first)
    for _ in range(10_000):
        out.fill_(float("nan"))
        launch_linear(
            x, w.weight, w.scale, None, None, None, None, out, symmetric=True, config=config
        )
        differing += (out != first).any()
    assert differing.item() == 0


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_more_tokens_than_a_configuration_takes_are_refused(config: Config) -> None:
    layer = make_int8_layer(512, 1024)
    m = config.block_m
    with pytest.raises(ValueError, match=f"up to {m} tokens, found {m + 1}"):
        run(layer, int8_inputs(m + 1, 1024), config)
