"""The choice and the validity of the kernel for few tokens on Hopper, without a GPU."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from pymllm_kernels.w4a16.hopper_decode_tuning import (
    CONFIGS,
    DecodeConfig,
    candidates,
    why_invalid,
)
from pymllm_kernels.w4a16.hopper_tuning import HopperForm

SHARED = 227 * 1024
FORM = HopperForm()


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_a_configuration_is_what_the_kernel_takes(config: DecodeConfig) -> None:
    assert config.tiles * 8 == config.block_m
    assert config.rows * config.tiles <= config.places < 2 * config.rows * config.tiles
    assert math.log2(config.places).is_integer() and config.places <= 16
    assert config.warps in (8, 16) and config.warps % config.row_warps == 0
    assert config.registers in (128, 256) and config.mix <= config.rows
    for n in (16, 2112, 4096, 57344):
        programs = config.programs(n, 132)
        assert 1 <= programs <= n // 16
        # All of them run at once.
        assert programs * config.warps * config.registers <= 132 * 16 * 128


@pytest.mark.parametrize("form", [FORM, HopperForm(runs=2, parameter_bytes=3), HopperForm(runs=4)])
def test_candidates(form: HopperForm) -> None:
    for m in (1, 8, 9, 16):
        found = list(candidates(m, 4096, 4096, form, 132, SHARED))
        for cost, config in found:
            assert cost > 0 and why_invalid(config, m, 4096, form, SHARED) is None
            # Eight tokens more than needed are never faster.
            assert config.block_m - m < 8
            assert m == 1 or not config.keep
    assert {config.keep for _, config in candidates(1, 4096, 4096, form, 132, SHARED)} == {
        True,
        False,
    }
    assert not list(candidates(17, 4096, 4096, form, 132, SHARED))


def test_passes_and_steps() -> None:
    # 13 or 14 row blocks a program, 32 blocks of K.
    assert DecodeConfig(8, rows=4).steps(28672, 4096, 132) == (4, 4 * 2)
    assert DecodeConfig(8, rows=4, row_warps=4).steps(28672, 4096, 132) == (1, 8)
    wide = DecodeConfig(8, rows=7, row_warps=2, warps=8, registers=256)
    assert wide.steps(28672, 4096, 132) == (1, 8)
    assert wide.steps(57344, 8192, 132) == (2, 2 * 16)
    # Two programs a multiprocessor; a row block for some of them; a last block of K that is not full.
    assert DecodeConfig(8, rows=3, warps=8).steps(6144, 4096, 132) == (1, 4)
    assert DecodeConfig(8, rows=2).steps(528, 4104, 132) == (1, 3)


def test_what_is_kept() -> None:
    """One token, as long as every multiprocessor keeps no more than 8,192 values."""
    four, two_programs = DecodeConfig(8, 4, keep=True), DecodeConfig(8, 4, warps=8, keep=True)
    assert two_programs.together == 2
    rows = [four.row(k) for k in (128, 2048, 2056, 4096, 7168, 8192)]
    assert rows == [2048, 2048, 4096, 4096, 8192, 8192]
    assert why_invalid(four, 1, 8192, FORM, SHARED) is None
    assert "up to 8192 values, found K = 8200" in str(why_invalid(four, 1, 8200, FORM, SHARED))
    assert "up to 4096 values, found K = 4104" in str(
        why_invalid(two_programs, 1, 4104, FORM, SHARED)
    )
    assert "up to 1 tokens, found 2" in str(why_invalid(four, 2, 4096, FORM, SHARED))
    for config in CONFIGS:
        # Whole steps of all warps; tiles of 16 tokens are not for one.
        assert config.row(8) % (128 * config.warps // config.row_warps) == 0
        assert not config.keep or config.block_m == 8


def test_act_order_costs_a_kept_token_no_launch() -> None:
    ordered = replace(FORM, act_order=True)
    for m in (1, 2):
        plain = {c: us for us, c in candidates(m, 4096, 4096, FORM, 132, SHARED)}
        found = {c: us for us, c in candidates(m, 4096, 4096, ordered, 132, SHARED)}
        assert found.keys() == plain.keys()
        for config, us in found.items():
            assert (us - plain[config] > 1) == (not config.keep)


def test_what_cannot_be_run() -> None:
    four, five = DecodeConfig(8, rows=4), DecodeConfig(8, rows=5)
    assert why_invalid(four, 8, 4096, FORM, SHARED) is None
    assert "up to 8 tokens, found 9" in str(why_invalid(four, 9, 4096, FORM, SHARED))
    assert "found 64" in str(why_invalid(four, 1, 4096, HopperForm(block_k=64), SHARED))
    assert "found 2" in str(why_invalid(four, 1, 4096, HopperForm(runs=2), SHARED))
    assert why_invalid(five, 1, 4096, HopperForm(parameter_bytes=3), SHARED) is not None
    assert "is none of" in str(why_invalid(DecodeConfig(8, rows=6), 1, 4096, FORM, SHARED))
    assert "32768 bytes" in str(why_invalid(four, 1, 4096, FORM, 32 * 1024 - 1))
