"""The choice and the validity of the kernel for few tokens on Hopper, without a GPU."""

from __future__ import annotations

import math

import pytest

from pymllm_kernels.device import planned_device
from pymllm_kernels.tuning.keys import TuningKey
from pymllm_kernels.w4a16.hopper_decode_tuning import (
    CONFIGS,
    DecodeConfig,
    candidates,
    why_invalid,
)
from pymllm_kernels.w4a16.hopper_tuning import HopperConfig, HopperForm, choose_config
from pymllm_kernels.w4a16.tunable import HOPPER

SHARED = 227 * 1024
FORM = HopperForm()


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_a_configuration_is_what_the_kernel_takes(config: DecodeConfig) -> None:
    assert config.tiles * 8 == config.block_m
    assert config.rows * config.tiles <= config.places < 2 * config.rows * config.tiles
    assert math.log2(config.places).is_integer() and config.places <= 8
    assert config.warps in (8, 16)
    for n in (16, 2112, 4096, 57344):
        programs = config.programs(n, 132)
        assert 1 <= programs <= n // 16
        # All of them run at once.
        assert programs * config.warps <= 132 * 16


@pytest.mark.parametrize("form", [FORM, HopperForm(runs=2, parameter_bytes=3), HopperForm(runs=4)])
def test_candidates(form: HopperForm) -> None:
    for m in (1, 8, 9, 16):
        found = list(candidates(m, 4096, 4096, form, 132, SHARED))
        for cost, config in found:
            assert cost > 0 and why_invalid(config, m, form, SHARED) is None
            # Eight tokens more than needed are never faster.
            assert config.block_m - m < 8
    assert list(candidates(1, 4096, 4096, form, 132, SHARED))
    assert not list(candidates(17, 4096, 4096, form, 132, SHARED))


def test_what_cannot_be_run() -> None:
    four, five = DecodeConfig(8, rows=4), DecodeConfig(8, rows=5)
    assert why_invalid(four, 8, FORM, SHARED) is None
    assert "up to 8 tokens, found 9" in str(why_invalid(four, 9, FORM, SHARED))
    assert "found 64" in str(why_invalid(four, 1, HopperForm(block_k=64), SHARED))
    assert "found 2" in str(why_invalid(four, 1, HopperForm(runs=2), SHARED))
    assert why_invalid(five, 1, HopperForm(parameter_bytes=3), SHARED) is not None
    assert "is none of" in str(why_invalid(DecodeConfig(8, rows=6), 1, FORM, SHARED))
    assert "32768 bytes" in str(why_invalid(four, 1, FORM, 32 * 1024 - 1))


@pytest.mark.parametrize(
    ("m", "n", "k", "rows", "warps"),
    [
        (1, 6144, 4096, 3, 16),
        (1, 8192, 8192, 4, 16),
        (8, 10240, 8192, 5, 16),
        (16, 4096, 4096, 2, 16),
        (16, 6144, 4096, 2, 8),
    ],
)
def test_the_choice_where_it_was_measured(m: int, n: int, k: int, rows: int, warps: int) -> None:
    config = choose_config(m, n, k, FORM, 132, SHARED)
    assert isinstance(config, DecodeConfig)
    assert (config.rows, config.warps) == (rows, warps)


@pytest.mark.parametrize(
    ("m", "n", "k"), [(1, 57344, 8192), (1, 28672, 4096), (16, 8192, 28672), (32, 4096, 4096)]
)
def test_tiles_where_they_were_faster(m: int, n: int, k: int) -> None:
    assert isinstance(choose_config(m, n, k, FORM, 132, SHARED), HopperConfig)


def test_stored_configurations_come_back() -> None:
    key = TuningKey(HOPPER.operation, 8192, 8192, 128, "bfloat16", "")
    facts = planned_device("9.0")
    found = HOPPER.candidates(key, 1, facts)
    assert {type(config) for config in found} == {DecodeConfig, HopperConfig}
    for config in found:
        assert HOPPER.from_json(HOPPER.to_json(config)) == config
        assert HOPPER.adapt(config, key, 1, facts) == config
        assert HOPPER.why_invalid(config, key, 1, facts) is None
