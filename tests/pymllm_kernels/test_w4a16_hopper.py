"""The Hopper kernel's choice of configuration and its sharing of work, without a GPU."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch

from pymllm_kernels.common.sharing import HAND_ON, STREAM_K
from pymllm_kernels.device import planned_device
from pymllm_kernels.testing.inputs import make_w4a16
from pymllm_kernels.w4a16.hopper_tuning import (
    CODES,
    SUMS,
    WEIGHTS,
    HopperConfig,
    HopperForm,
    Plan,
    candidates,
    choose_config,
    joined,
    plan,
    why_invalid,
)
from pymllm_kernels.w4a16.providers import HopperW4A16
from pymllm_kernels.w4a16.tunable import HOPPER, hopper_key

SHARED = 227 * 1024
FORMS = [
    HopperForm(),
    HopperForm(runs=2, parameter_bytes=3),
    HopperForm(runs=4, parameter_bytes=3, same_dtype=False),
    HopperForm(block_k=64, runs=4),
    HopperForm(bits=8),
    HopperForm(runs=4, parameter_bytes=3, bits=8),
]
SHAPES = [(16, 64), (400, 1408), (4096, 4096), (4096, 14336), (57344, 8192), (2112, 7168)]


def shares(units: int, programs: int) -> list[tuple[int, int]]:
    """Start and end of every program's units, as ``common.stream_k`` deals them out."""
    base, more = divmod(units, programs)
    starts = [p * base + min(p, more) for p in range(programs + 1)]
    return list(itertools.pairwise(starts))


def work_of(grid: Plan) -> list[tuple[int, int, int]]:
    """(tile, first step, last + 1 step) over all programs."""
    tiles = grid.tiles_m * grid.tiles_n
    work = [(tile, 0, grid.steps) for tile in range(grid.whole)]
    for start, end in shares((tiles - grid.whole) * grid.steps, grid.programs):
        while start < end:
            tile, step = divmod(start, grid.steps)
            last = min(grid.steps, step + end - start)
            work.append((grid.whole + tile, step, last))
            start += last - step
    return work


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize(("n", "k"), SHAPES)
def test_every_candidate_covers_the_work_once(form: HopperForm, n: int, k: int) -> None:
    for m in (1, 16, 100, 300, 5000):
        found = list(candidates(m, n, k, form, 132, SHARED))
        assert found and {c.share for _, c in found} >= {1}
        for cost, config in found:
            assert cost > 0 and why_invalid(config, form, SHARED) is None
            grid = plan(config, m, n, k, form, 132)
            assert grid is not None and 0 < grid.programs <= 132
            steps = [0] * (grid.tiles_m * grid.tiles_n)
            for tile, first, last in work_of(grid):
                assert 0 <= first < last <= grid.steps
                steps[tile] += last - first
            assert set(steps) == {grid.steps}
            # 64 MB a device at most, for the partial sums of tiles that programs share.
            assert 4 * grid.part_elements(config) <= 64 * 2**20


def test_an_even_share_is_one_part_a_program() -> None:
    config = HopperConfig(block_m=16, consumers=2, slots=4, span=2, share=4)
    grid = plan(config, 16, 4096, 4096, HopperForm(), 132)
    assert grid == Plan(128, 0, 1, 32, 16)
    assert all(last - first == 4 for _, first, last in work_of(grid))


def test_what_cannot_be_shared() -> None:
    config = HopperConfig(block_m=16, consumers=2, slots=4, span=2, share=5)
    form = HopperForm()
    assert plan(config, 16, 4096, 4096, form, 132) is None  # 16 steps in 5 parts
    assert plan(replace(config, share=8), 16, 4096, 4096, form, 132) is None  # 256 programs
    assert plan(replace(config, share=STREAM_K), 16, 132 * 128, 4096, form, 132) is None


def test_a_tile_is_handed_on_to_the_next_program_and_no_further() -> None:
    """Every program begins at most one tile that it does not end, and ends at most one of another's."""
    config = HopperConfig(block_m=16, consumers=2, slots=4, span=2, share=HAND_ON)
    for n in (133 * 128, 200 * 128, 263 * 128, 1000 * 128):
        grid = plan(config, 16, n, 4096, HopperForm(), 132)
        assert grid is not None and grid.programs == 132
        dealt = grid.tiles_n - grid.whole
        assert 132 < dealt < 264 and grid.whole % 132 == 0
        # A part for each of them: no more than two a program.
        assert grid.part_elements(config) == dealt * 16 * 128
        begun: dict[int, int] = {}
        for program, (start, end) in enumerate(shares(dealt * grid.steps, 132)):
            if start % grid.steps:
                assert begun.pop(start // grid.steps) == program - 1
            if end % grid.steps:
                begun[end // grid.steps] = program
        assert not begun
    for n in (128, 132 * 128, 264 * 128):
        assert plan(config, 16, n, 4096, HopperForm(), 132) is None
    assert plan(replace(config, share=STREAM_K), 16, 133 * 128, 4096, HopperForm(), 132) is None


def test_another_number_of_tiles_is_shared_in_another_way() -> None:
    """Tuned for the bucket of M: even runs stay even runs, whole rounds are whole tiles."""
    tiles = HopperConfig(block_m=64, consumers=2, slots=4, span=2, meet=True, out_parts=2)
    key = hopper_key(4096, 4096, 128, torch.bfloat16, torch.bfloat16, True)
    h200 = planned_device("9.0")
    for m, share in ((64, STREAM_K), (300, HAND_ON), (264 * 2, HAND_ON)):
        for tuned in (STREAM_K, HAND_ON):
            taken = HOPPER.adapt(replace(tiles, share=tuned), key, m, h200)
            assert taken == replace(tiles, share=share)
    whole = HOPPER.adapt(replace(tiles, share=STREAM_K), replace(key, n=132 * 128), 64, h200)
    assert whole == replace(tiles, share=1)


@pytest.mark.parametrize(
    ("m", "n", "k", "block_m", "consumers", "share"),
    [
        (1, 28672, 4096, 8, 4, 1),
        (16, 8192, 28672, 16, 4, 4),
        (32, 28672, 4096, 32, 4, 1),
        (128, 4096, 4096, 32, 2, 1),
        (1024, 28672, 4096, 256, 2, 1),
    ],
)
def test_the_choice_of_tiles_where_it_was_measured(
    m: int, n: int, k: int, block_m: int, consumers: int, share: int
) -> None:
    found = candidates(m, n, k, HopperForm(), 132, SHARED)
    _, config = min(found, key=lambda item: item[0])
    assert (config.block_m, config.consumers, config.share) == (block_m, consumers, share)


def test_what_scales_multiply() -> None:
    """Codes where a product of one is exact before it is rounded; scales of another dtype are never rounded."""
    tokens = (8, 16, 32, 64, 128, 256)
    symmetric = [HopperForm().scale(m) for m in tokens]
    assert symmetric == [SUMS, CODES, CODES, CODES, CODES, CODES]
    assert {HopperForm(runs=4).scale(m) for m in tokens} == {CODES}
    for other in (HopperForm(parameter_bytes=3), HopperForm(bf16=False), HopperForm(bits=8)):
        assert [other.scale(m) for m in tokens] == [SUMS, SUMS, SUMS, WEIGHTS, WEIGHTS, WEIGHTS]
        assert {replace(other, runs=2).scale(m) for m in tokens} == {WEIGHTS}
    mixed = HopperForm(same_dtype=False)
    assert {mixed.scale(m) for m in tokens} == {SUMS}
    for m in (32, 128, 4096):
        config = choose_config(m, 4096, 4096, mixed, 132, SHARED)
        assert isinstance(config, HopperConfig) and config.block_m <= 128


def test_no_shared_memory() -> None:
    with pytest.raises(ValueError, match="1024 bytes of shared memory"):
        choose_config(1, 4096, 4096, HopperForm(), 132, 1024)


def test_three_consumers_fill_the_gpu_where_two_and_four_do_not() -> None:
    config = choose_config(512, 6144, 4096, HopperForm(), 132, SHARED)
    assert isinstance(config, HopperConfig) and (config.block_m, config.block_n) == (128, 192)
    grid = plan(config, 512, 6144, 4096, HopperForm(), 132)
    assert grid is not None and grid.programs == 128


def test_what_a_program_stores_alone_goes_by_tma_from_32_tokens_on() -> None:
    for m, n in ((16, 4096), (64, 4096), (512, 6144)):
        for _, c in candidates(m, n, 4096, HopperForm(), 132, SHARED):
            full = (c.block_m, c.consumers) == (64, 4)
            ways = (1,) if full else (1, STREAM_K, HAND_ON)
            assert (c.out_parts > 0) == (c.block_m >= 128 or (c.block_m >= 32 and c.share in ways))
            assert c.block_m % max(c.out_parts, 1) == 0 and c.block_m // max(c.out_parts, 1) >= 8


def test_slices_of_an_operand() -> None:
    """As measured; groups that a block does not hold once have operands of their own."""
    found = [c for _, c in candidates(512, 6144, 4096, HopperForm(), 132, SHARED)]
    operands = {(c.block_m, c.consumers): joined(c, HopperForm()) for c in found}
    assert operands == {
        (8, 2): 2, (8, 3): 2, (8, 4): 2, (16, 2): 4, (16, 3): 4, (16, 4): 4, (32, 2): 4, (32, 3): 4,
        (32, 4): 4, (64, 2): 4, (64, 3): 4, (64, 4): 4, (128, 2): 2, (128, 3): 4, (256, 2): 2,
    }  # fmt: skip
    assert joined(HopperConfig(64, 2, slots=4), HopperForm(parameter_bytes=3)) == 2
    tile = HopperConfig(block_m=32, consumers=2, slots=4)
    for runs, most in ((1, 4), (2, 2), (4, 1)):
        assert joined(tile, HopperForm(runs=runs)) == 4
        assert joined(tile, HopperForm(runs=runs, same_dtype=False)) == most


def test_what_is_compiled_is_what_the_form_says() -> None:
    pytest.importorskip("triton")
    from pymllm_kernels.w4a16.hopper_launch import HopperLayer, specialization

    tile = HopperConfig(block_m=32, consumers=2, slots=4)
    bf16, fp16 = torch.bfloat16, torch.float16
    for group, act, scale, operands, multiplied in (
        (128, bf16, bf16, 4, CODES), (64, bf16, bf16, 4, CODES), (32, fp16, fp16, 4, WEIGHTS),
        (128, bf16, fp16, 4, SUMS), (64, bf16, fp16, 2, SUMS), (32, bf16, fp16, 1, SUMS),
    ):  # fmt: skip
        layer = HopperLayer(4096, 4096, 128, group, act, scale, False, None)
        constants = specialization(layer, tile).constexprs
        assert (constants["JOIN"], constants["SCALE"]) == (operands, multiplied)


def test_what_registers_do_not_hold() -> None:
    # 256 tokens are 128 accumulators a thread; three consumers have 160 registers each.
    config = HopperConfig(block_m=256, consumers=3, slots=2)
    assert "180 registers of 160" in (why_invalid(config, HopperForm(), SHARED) or "")
    four = HopperConfig(block_m=64, consumers=4, slots=6)
    assert why_invalid(four, HopperForm(runs=4), SHARED) is None
    # Two sets of accumulators, and two blocks of weights, were seen to spill.
    sums = HopperForm(same_dtype=False)
    assert "116 registers of 112" in (why_invalid(four, sums, SHARED) or "")
    assert "116 registers" in (why_invalid(replace(four, span=2), HopperForm(), SHARED) or "")
    two = HopperConfig(block_m=64, consumers=2, slots=4, span=2)
    assert why_invalid(two, sums, SHARED) is None
    assert "one group a block" in (why_invalid(two, replace(sums, runs=2), SHARED) or "")


def test_scales_that_codes_cannot_be_multiplied_with_are_refused() -> None:
    layer = make_w4a16(16, 128, 64)
    problem = layer.problem
    kernel = HopperW4A16()
    scale = layer.scale.clone()
    for last, refused in ((2.0**28, True), (-(2.0**28), True), (2.0**27, False)):
        scale[-1, -1] = last
        if refused:
            with pytest.raises(ValueError, match=r"scale: found up to 2.68e\+08, accepted below"):
                kernel.prepare(problem, layer.words, scale, None, None)
        else:
            assert kernel.prepare(problem, layer.words, scale, None, None).scale[-1, -1] == last
    # These multiply weights.
    other = make_w4a16(16, 128, 64, symmetric=False)
    other.scale[0, 0] = 2.0**100
    kernel.prepare(other.problem, other.words, other.scale, other.zero, None)
