"""The choice and the validity of the int8 kernel for few tokens on Hopper, without a GPU."""

from __future__ import annotations

import pytest

from pymllm_kernels.w8a8_int8.hopper_decode_tuning import (
    CONFIGS,
    DecodeConfig,
    candidates,
    why_invalid,
)
from pymllm_kernels.w8a8_int8.hopper_tuning import HopperConfig, choose_config

SHARED = 227 * 1024


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_a_configuration_is_what_the_kernel_takes(config: DecodeConfig) -> None:
    assert config.rows * config.tiles <= config.places < 2 * config.rows * config.tiles
    assert config.block_m in (8, 16)
    for n in (8, 16, 2112, 4096, 57344):
        programs = config.programs(n, 132)
        # All of them run at once.
        assert 1 <= programs <= min(132, -(-n // 16))


def test_candidates() -> None:
    for m, most in ((1, {8}), (8, {8}), (9, {16}), (16, {16})):
        found = list(candidates(m, 4096, 4096, 132, SHARED))
        for cost, config in found:
            assert cost > 0 and why_invalid(config, m, SHARED) is None
        assert {config.block_m for _, config in found} == most
    assert not list(candidates(17, 4096, 4096, 132, SHARED))


def test_what_cannot_be_run() -> None:
    config = CONFIGS[0]
    assert "up to 8 tokens, found 9" in str(why_invalid(config, 9, SHARED))
    assert "is none of" in str(why_invalid(DecodeConfig(8, rows=7), 1, SHARED))
    assert "bytes of shared memory" in str(why_invalid(config, 1, 1024))


@pytest.mark.parametrize(
    ("m", "n", "k"), [(4, 1024, 4096), (8, 1024, 1024), (8, 2048, 2048), (16, 1024, 4096)]
)
def test_small_layers(m: int, n: int, k: int) -> None:
    assert isinstance(choose_config(m, n, k, 132, SHARED), DecodeConfig)


@pytest.mark.parametrize(("m", "n", "k"), [(8, 8192, 8192), (16, 57344, 8192), (16, 28672, 4096)])
def test_large_layers(m: int, n: int, k: int) -> None:
    assert isinstance(choose_config(m, n, k, 132, SHARED), HopperConfig)
