"""Variants beside their base: limits, wrong results, documents, on a CPU; what a GPU would compile."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from pymllm.bench.roof import Roof
from pymllm.bench.timing import Call, Timing, summarize
from pymllm.bench.variants import host, layers, quantization
from pymllm.bench.variants import run as runs
from pymllm.bench.variants.run import load, run
from pymllm.bench.variants.setting import Setting
from pymllm.bench.variants.values import (
    ROOF,
    SHARE,
    TIME,
    US,
    Goal,
    accept,
    blank,
    compare,
    fill,
    reasons,
    regimes,
)
from pymllm.tuning import shape_problems
from pymllm_kernels import select_kernel
from pymllm_kernels.device import planned_device
from pymllm_kernels.w8a8_int8.providers import TorchIntMm

CPU = torch.device("cpu")
SHAPE = (64, 256)
KEYS = set(blank("w4a16", "fp16", "bf16", 1, 256, 64))


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """A time for each place in the turn: 10, 11, 12 ... us; no roof to measure."""

    def time_of(self: Setting, rotations: Sequence[Sequence[Call]]) -> list[Timing]:
        for calls in rotations:
            for call in calls[:2]:
                call()
        return [summarize([10.0 + i] * 3, len(calls), 1) for i, calls in enumerate(rotations)]

    monkeypatch.setattr(Setting, "time", time_of)
    monkeypatch.setattr(runs, "measure_roof", lambda device: Roof(1.0, 1.0))
    monkeypatch.setattr(runs, "CPU_COPY_BYTES", 2**16)
    monkeypatch.setattr(quantization, "TOKENS", (1, 1024))


def run_parts(*parts: str, **options: Any) -> dict[str, Any]:
    options = {"shapes": [SHAPE], "tokens": [1, 40], **options}
    return run(device=CPU, parts=parts, backend="eager", **options)


def timed(us: float, variant: str = "fp16", m: int = 1, moved: int = 10**6) -> dict[str, Any]:
    cell = blank("w4a16", variant, "bf16", m, 256, 64)
    fill(cell, summarize([us], 1, 1), moved)
    return cell


@pytest.mark.parametrize(
    ("goal", "value", "met"),
    [
        (Goal(TIME, 1.25), 1.25, True),
        (Goal(TIME, 1.2), 1.25, False),
        (Goal(TIME), 1.25, None),
        # Twice the bytes in 1.25 times the time.
        (Goal(SHARE, 1.6), 1.6, True),
        (Goal(SHARE, 1.61), 1.6, False),
        # 2e6 bytes in 20 us are 0.1 TB/s.
        (Goal(ROOF, 0.5), 0.5, True),
        (Goal(ROOF, 0.51), 0.5, False),
        (Goal(US, 20.0), 20.0, True),
        (Goal(US, 19.0), 20.0, False),
    ],
)
def test_what_is_measured_and_met(goal: Goal, value: float, met: bool | None) -> None:
    base, cell = timed(16.0, "bf16"), timed(20.0, moved=2 * 10**6)
    compare(cell, base, goal, read_tbps=0.2)
    assert (cell["base_us"], cell["ratio"]) == (16.0, 1.25)
    assert cell["value"] == pytest.approx(value)
    assert (cell["measure"], cell["wanted"], cell["met"]) == (goal.measure, goal.wanted, met)


def test_without_a_time_there_is_nothing_to_compare() -> None:
    empty = blank("w4a16", "bf16", "bf16", 1, 256, 64)
    for goal in (Goal(TIME, 1.0), Goal(SHARE, 1.0)):
        cell = timed(20.0)
        compare(cell, empty, goal, 1.0)
        assert (cell["ratio"], cell["value"], cell["met"]) == (None, None, None)
    compare(empty, timed(20.0), Goal(US, 1.0), 1.0)
    assert empty["value"] is None


def test_wrong_results_have_no_time() -> None:
    for error, told in ((0.5, "relative error 0.5"), (float("nan"), "relative error nan")):
        cell = blank("w4a16", "fp16", "bf16", 1, 256, 64)
        assert not accept(cell, error, 0.01)
        assert told in cell["skip"]
    assert cell["error"] is None
    assert accept(blank("w4a16", "fp16", "bf16", 1, 256, 64), 0.01, 0.01)


def test_regimes_have_the_mean_and_the_worst() -> None:
    base = timed(10.0, "bf16")
    cells = [base]
    for us, m in ((8.0, 1), (12.5, 16)):
        cells.append(timed(us, m=m))
        compare(cells[-1], base, Goal(TIME, 1.05), 1.0)
    cells.append(timed(20.0, m=64))
    compare(cells[-1], base, Goal(TIME), 1.0)
    cells.append(blank("w4a16", "fp16", "bf16", 512, 256, 64) | {"skip": "broken"})
    few, many = regimes(cells)
    assert (few.variant, few.tokens, few.limit) == ("fp16", [1, 16], "<= 1.05")
    assert few.mean == pytest.approx(1.0)
    assert few.told(few.worst) == "1.25 (64x256, M = 16)"
    assert few.outcome == "not met, 1 of 2 cells"
    assert (many.tokens, many.limit, many.outcome) == ([64], "-", "-")
    assert reasons(cells) == {"w4a16, fp16: broken": 1}
    slow, fast = timed(20.0), timed(16.0)
    for cell in (slow, fast):
        compare(cell, base, Goal(ROOF, 0.04), 1.0)
    (share,) = regimes([slow, fast])
    assert share.worst is slow
    assert (share.limit, share.outcome) == (">= 0.04", "met")


@pytest.mark.parametrize("scheme", layers.VARIANTS)
def test_every_variant_of_a_layer_is_checked_and_timed(scheme: str) -> None:
    document = run_parts(scheme)
    cells = document["cells"]
    assert all(set(cell) == KEYS for cell in cells)
    assert [cell["skip"] for cell in cells] == [None] * len(cells)
    names = [variant.name for variant in layers.VARIANTS[scheme]]
    assert [cell["variant"] for cell in cells if cell["m"] == 1] == names
    many = [cell["variant"] for cell in cells if cell["m"] == 40]
    assert many == [name for name in names if name != "act-order"]
    for cell in cells:
        assert 0 < cell["error"] < 0.01
        base = cell["variant"] == names[0]
        assert (cell["base"], cell["base_us"]) == ((None, None) if base else (names[0], 10.0))
        # The limits are for GPUs.
        assert cell["wanted"] is None
    assert all(found.tokens[0] == 1 for found in regimes(cells))


def test_strided_rows_and_bias_reach_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[tuple[int, bool], int] = {}
    apply = TorchIntMm.apply

    def watched(self: Any, problem: Any, x: torch.Tensor, weight: Any, bias: Any) -> torch.Tensor:
        place = (x.stride(0), bias is not None)
        seen[place] = seen.get(place, 0) + 1
        return apply(self, problem, x, weight, bias)

    monkeypatch.setattr(TorchIntMm, "apply", watched)
    run_parts("w8a8_int8", tokens=[40])
    assert set(seen) == {(256, False), (384, False), (256, True)}


def test_a_kernel_that_is_wrong_or_fails_gets_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    apply = TorchIntMm.apply

    def spoiled(self: Any, problem: Any, x: torch.Tensor, weight: Any, bias: Any) -> torch.Tensor:
        out = apply(self, problem, x, weight, bias)
        if problem.act_dtype == torch.float16:
            out[-1, -1] = float("nan")
        if problem.input_strategy == "tensor":
            raise RuntimeError("out of resource")
        return out

    monkeypatch.setattr(TorchIntMm, "apply", spoiled)
    cells = run_parts("w8a8_int8", tokens=[1])["cells"]
    skips = {cell["variant"]: cell["skip"] for cell in cells if cell["skip"]}
    assert skips.pop("fp16") == "wrong result: relative error nan, accepted up to 0.01"
    assert skips == {
        name: "RuntimeError: out of resource" for name in ("static", "static, zero point")
    }
    assert {cell["variant"] for cell in cells if cell["ratio"]} == {
        "zero points per token", "strided rows of x", "bias",
    }  # fmt: skip


def test_quantization_is_held_to_the_roof_and_to_a_time() -> None:
    cells = run_parts("quantization")["cells"]
    assert {cell["variant"] for cell in cells} == {v.name for v in quantization.VARIANTS}
    measured = {(cell["m"], cell["measure"]) for cell in cells}
    assert measured == {(1, US), (1024, ROOF)}
    first = next(cell for cell in cells if cell["m"] == 1024)
    assert first["value"] == pytest.approx(1024 * (256 * 3 + 4) / 10.0 / 1e6)
    assert all(0 < cell["error"] < 0.02 for cell in cells)
    assert quantization.goal_at(64, 8192).wanted == 3.0
    assert quantization.goal_at(64, 14336).wanted is None
    assert quantization.goal_at(1024, 14336) == Goal(ROOF, 0.8)


def test_host_costs_stand_beside_f_linear() -> None:
    cells = run_parts("host")["cells"]
    assert [cell["skip"] for cell in cells] == [None] * 6
    assert [cell["variant"] for cell in cells[:3]] == [
        "F.linear, eager", "w4a16, eager", "w8a8_int8, eager",
    ]  # fmt: skip
    compiled = cells[3:]
    assert [cell["base"] for cell in compiled] == [None] + ["F.linear, torch.compile"] * 2
    assert all(cell["done_us"] > 0 for cell in cells)
    assert compiled[2]["ratio"] == compiled[2]["median_us"] / compiled[0]["median_us"]


def test_host_costs_of_a_graph_are_those_of_one_call(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, int, bool]] = []

    def host_time(call: Any, count: int, samples: int, *, to_the_end: bool) -> Timing:
        asked.append((call(), count, to_the_end))
        return summarize([64.0 if to_the_end else 32.0] * samples, 1, count)

    monkeypatch.setattr(host, "host_time", host_time)
    gpu = Setting(torch.device("cuda"), 1.0, 1)
    times = host._in_turns(gpu, [lambda: "a", lambda: "b"], host.GRAPH_CALLS)
    each = 32.0 / host.GRAPH_CALLS
    assert [(issued.median_us, done.median_us) for issued, done in times] == [(each, 2 * each)] * 2
    one_round = [(name, host.REPLAYS, end) for name in "ab" for end in (False, True)]
    assert asked == one_round * host.ROUNDS


def test_document(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "variants.json"
    said: list[str] = []
    document = run_parts("w8a8_int8", tokens=[1], progress=said.append, save_to=path)
    assert load(path) == json.loads(json.dumps(document))
    assert document["complete"] and document["stopped"] is None
    assert {cell["part"] for cell in document["cells"]} == {"w8a8_int8"}
    documented = set(runs.__doc__.split("every key is always there")[1].split('"')[1::2])
    assert KEYS <= documented
    assert said[-1] == "w8a8_int8 64x256 M=1"
    stopped = run_parts("w8a8_int8", time_limit_s=0.0, save_to=path)
    assert load(path)["cells"] == [] and "time limit" in stopped["stopped"]
    path.write_text(json.dumps({"format": "pymllm-bench", "version": 1}))
    with pytest.raises(ValueError, match="accepted"):
        load(path)
    with pytest.raises(ValueError, match="parts: found"):
        run_parts("w2a2")


def test_on_hopper_every_variant_has_forms() -> None:
    facts = planned_device("9.0")
    for scheme, variants in layers.VARIANTS.items():
        (usual,) = shape_problems([(4096, 4096)], facts, schemes=(scheme,))
        assert layers.forms(scheme, (4096, 4096), [1], facts)
        for variant in variants:
            kernel = select_kernel(variant.problem(usual)).kernel
            assert kernel.name.startswith("gluon_hopper"), variant.name
            assert kernel.forms(variant.problem(usual), 1)
    # Rows of both lengths have forms of their own, but where the scale is given.
    assert len(set(quantization.forms([4096, 8192]))) == 2 * len(quantization.VARIANTS) - 1
