"""The Hopper int8 GEMM's choice of configuration and its sharing of work, without a GPU."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import pymllm_kernels  # noqa: F401  registers the operators
from pymllm_kernels.common.sharing import STREAM_K, compiled_config
from pymllm_kernels.w8a8_int8.hopper_tuning import (
    HopperConfig,
    Plan,
    candidates,
    choose_config,
    plan_launch,
    why_invalid,
)

SHARED = 227 * 1024
SHAPES = [(8, 16), (400, 1408), (4096, 4096), (4096, 14336), (57344, 8192), (2112, 7168), (8192, 28672)]  # fmt: skip
WEIGHT_FIRST = HopperConfig(16, 128, slots=8, swap=True, consumers=1)


def work_of(config: HopperConfig, plan: Plan, m: int, n: int, k: int) -> tuple[list[int], int]:
    """Steps multiplied of every tile, as ``common.stream_k`` deals them out, and steps of a tile."""
    tiles = -(-m // config.tokens) * -(-n // config.block_n)
    steps = -(-k // config.block_k)
    done = [steps] * plan.whole + [0] * (tiles - plan.whole)
    base, more = divmod((tiles - plan.whole) * steps, plan.programs)
    starts = [p * base + min(p, more) for p in range(plan.programs + 1)]
    for start, end in itertools.pairwise(starts):
        for unit in range(start, end):
            done[plan.whole + unit // steps] += 1
    return done, steps


@pytest.mark.parametrize(("n", "k"), SHAPES)
def test_every_candidate_covers_the_work_once(n: int, k: int) -> None:
    for m in (1, 16, 64, 100, 300, 2000):
        found = list(candidates(m, n, k, 132, SHARED))
        assert any(config.share == 1 for _, config in found)
        for cost, config in found:
            assert cost > 0 and why_invalid(config, SHARED) is None
            plan = plan_launch(config, m, n, k, 132)
            assert plan is not None and 0 < plan.programs <= 132
            done, steps = work_of(config, plan, m, n, k)
            assert set(done) == {steps}
            assert (plan.parts > 0) == (plan.counters > 0) == (config.share != 1)
            # 64 MB a device at most, for the partial sums of tiles that programs share.
            assert 4 * plan.parts <= 64 * 2**20


def test_an_even_share_is_one_part_a_program() -> None:
    plan = plan_launch(replace(WEIGHT_FIRST, share=4), 16, 4096, 4096, 132)
    assert plan == Plan(128, 0, 2 * 128 * 16 * 128, 128, True, True)


def test_what_cannot_be_shared() -> None:
    assert plan_launch(replace(WEIGHT_FIRST, share=3), 16, 4096, 4096, 132) is None  # 32 steps
    assert plan_launch(replace(WEIGHT_FIRST, share=8), 16, 4096, 4096, 132) is None  # 256 programs
    assert plan_launch(replace(WEIGHT_FIRST, share=STREAM_K), 16, 132 * 128, 4096, 132) is None
    for config in (replace(WEIGHT_FIRST, swap=False), replace(WEIGHT_FIRST, ping_pong=True)):
        assert why_invalid(replace(config, share=2), SHARED) is not None


def test_kernels_overlap_for_few_tokens_and_without_waiting_for_each_other() -> None:
    for m, expected in ((1, True), (256, True), (257, False), (4096, False)):
        plan = plan_launch(WEIGHT_FIRST, m, 4096, 4096, 132)
        assert plan is not None and plan.dependent is expected and plan.early is expected
    waiting = plan_launch(replace(WEIGHT_FIRST, meet=True, share=2), 16, 4096, 4096, 132)
    for m, expected in ((64, True), (65, False)):
        plan = plan_launch(replace(WEIGHT_FIRST, share=1), m, 4096, 28672, 132)
        assert plan is not None and plan.dependent is expected
    assert waiting is not None and not waiting.dependent and not waiting.early


def test_the_choice_is_valid_and_the_same_again() -> None:
    for m, (n, k) in itertools.product((1, 3, 17, 65, 129, 511, 9000, 65601), SHAPES):
        for multiprocessors in (132, 114, 78):
            config = choose_config(m, n, k, multiprocessors, SHARED)
            assert config == choose_config(m, n, k, multiprocessors, SHARED)
            if not isinstance(config, HopperConfig):
                assert m <= config.block_m
                continue
            assert plan_launch(config, m, n, k, multiprocessors) is not None
            assert config.tokens >= min(m, 64)


def test_first_weights_are_asked_for_early_for_few_tokens_and_whole_tiles() -> None:
    found = [c for m in (1, 64, 512) for _, c in candidates(m, 4096, 4096, 132, SHARED)]
    assert all((c.early > 0) == (c.tokens <= 64 and c.share == 1) for c in found)
    assert all(c.early <= c.slots for c in found)
    assert {c.early > 0 for c in found} == {False, True}
    # What is compiled knows it, too: of the programs that share a tile only whether there are any.
    assert all(compiled_config(c).early == c.early for c in found)


def test_no_shared_memory() -> None:
    with pytest.raises(ValueError, match="1024 bytes of shared memory"):
        choose_config(1, 4096, 4096, 132, 1024)


def test_operator_without_a_gpu() -> None:
    linear = torch.ops.pymllm_kernels.w8a8_int8_linear
    weight, scale = torch.zeros(24, 32, dtype=torch.int8), torch.ones(24)
    x = torch.zeros(2, 3, 32, dtype=torch.bfloat16)
    with pytest.raises(RuntimeError, match="found CPU tensors"):
        linear(x, weight, scale, None, None, None, None, True)
    with FakeTensorMode() as mode:
        fakes = [mode.from_tensor(tensor) for tensor in (x, weight, scale)]
        out = linear(*fakes, None, None, None, None, True)
    assert out.shape == (2, 3, 24) and out.dtype == torch.bfloat16
