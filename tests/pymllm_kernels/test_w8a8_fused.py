"""The choice and the validity of the int8 kernel that quantizes up to 8 tokens itself, without a GPU."""

from __future__ import annotations

import pytest

from pymllm_kernels.device import planned_device
from pymllm_kernels.tuning.keys import TuningKey
from pymllm_kernels.w8a8_int8.hopper_fused_tuning import (
    CHUNK,
    CONFIGS,
    FusedConfig,
    candidates,
    chunks_of,
    why_invalid,
)
from pymllm_kernels.w8a8_int8.hopper_tuning import choose_config
from pymllm_kernels.w8a8_int8.tunable import HOPPER

SHARED = 227 * 1024


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_the_ring_takes_what_the_codes_leave(config: FusedConfig) -> None:
    for k in (16, 2048, 2064, 4096, 8192, 14336):
        if why_invalid(config, 1, k, SHARED) is not None:
            continue
        step = max(config.block_n, 64) * config.block_k
        assert 8 * CHUNK * chunks_of(k) + config.slots(k, SHARED) * step < SHARED
        assert k <= CHUNK * chunks_of(k) < k + CHUNK
    for n in (8, 16, 2112, 57344):
        # All of them run at once.
        assert 1 <= config.programs(n, 132) <= min(132, -(-n // config.block_n))


def test_candidates_hold_the_tokens_and_no_more() -> None:
    for m, block_m in ((1, 1), (2, 2), (3, 4), (4, 4), (5, 8), (8, 8)):
        found = list(candidates(m, 4096, 4096, 132, SHARED))
        assert {config.block_m for _, config in found} == {block_m}
        for cost, config in found:
            assert cost > 0 and why_invalid(config, m, 4096, SHARED) is None
    assert not list(candidates(9, 4096, 4096, 132, SHARED))
    # The registers hold 8 tokens of 4096 values or 2 of 16384, the shared memory codes of 20480.
    for m, most in ((1, 20480), (2, 16384), (4, 8192), (8, 4096)):
        assert list(candidates(m, 4096, most, 132, SHARED))
        assert not list(candidates(m, 4096, most + 16, 132, SHARED))


@pytest.mark.parametrize("variant", ["", "zero", "static", "zero static"])
def test_every_kind_of_activation(variant: str) -> None:
    key = TuningKey(HOPPER.operation, 4096, 4096, -1, "bfloat16", variant)
    found = HOPPER.candidates(key, 1, planned_device("9.0"))
    assert any(isinstance(config, FusedConfig) for config in found)
    for config in found:
        assert HOPPER.why_invalid(config, key, 1, planned_device("9.0")) is None
        assert HOPPER.from_json(HOPPER.to_json(config)) == config


def test_what_cannot_be_run() -> None:
    config = CONFIGS[0]
    assert "up to 1 tokens, found 2" in str(why_invalid(config, 2, 4096, SHARED))
    assert "is none of" in str(why_invalid(FusedConfig(1, 96, 128), 1, 4096, SHARED))
    assert "K up to 32768, found 32784" in str(why_invalid(config, 1, 32784, SHARED))
    assert "bytes of shared memory for K = 4096" in str(why_invalid(config, 1, 4096, 64 * 1024))


@pytest.mark.parametrize(
    ("m", "n", "k"), [(1, 4096, 4096), (2, 6144, 4096), (1, 28672, 4096), (1, 8192, 8192)]
)
def test_is_chosen(m: int, n: int, k: int) -> None:
    assert isinstance(choose_config(m, n, k, 132, SHARED), FusedConfig)
