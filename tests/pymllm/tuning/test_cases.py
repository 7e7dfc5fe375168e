"""What may win: a result that is complete and right. On a CPU, with kernels in plain torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from pymllm.tuning import cases, shape_problems
from pymllm.tuning.cases import GpuCase
from pymllm.tuning.search import Unfit
from pymllm_kernels import DeviceFacts, LinearProblem, tuning
from pymllm_kernels.testing.toy_tunable import Tile, Toy
from pymllm_kernels.tuning import TuningKey
from pymllm_kernels.w4a16.providers import TorchW4A16
from pymllm_kernels.w8a8_int8.providers import TorchW8A8

CPU = torch.device("cpu")
FACTS = DeviceFacts("cpu", "CPU", None, 0, 0)
RULE, SAME, ONE_WRONG, UNWRITTEN, FAILING = (Tile(size) for size in (8, 16, 24, 32, 40))


class ToyLinear(Toy):
    """Configurations of the kernels below."""

    def key_of(self, problem: LinearProblem) -> TuningKey:
        return TuningKey("toy", problem.n, problem.k, problem.group_size, "bfloat16")


TOY = ToyLinear()


def spoiled(out: torch.Tensor, problem: LinearProblem, m: int) -> torch.Tensor:
    """What a kernel with the pinned configuration leaves of a right result."""
    config = tuning.resolve(TOY, TOY.key_of(problem), m, FACTS).config
    if config == ONE_WRONG:
        out = out.clone()
        # A block of K left out of one output.
        out[m - 1, -1] += 1.0
    if config == UNWRITTEN:
        fresh = out.new_empty(out.shape)
        fresh[:, 1:] = out[:, 1:]
        return fresh
    if config == FAILING:
        raise RuntimeError("out of resource: shared memory")
    return out


class W4A16(TorchW4A16):
    tunable = TOY

    def apply(self, problem: LinearProblem, x: torch.Tensor, *args: Any) -> torch.Tensor:
        return spoiled(super().apply(problem, x, *args), problem, x.shape[0])


class W8A8(TorchW8A8):
    tunable = TOY

    def apply(self, problem: LinearProblem, x: torch.Tensor, *args: Any) -> torch.Tensor:
        return spoiled(super().apply(problem, x, *args), problem, x.shape[0])


w4a16, w8a8 = shape_problems([(96, 256)], FACTS)
PROBLEMS = {
    "w4a16": w4a16,
    "w4a16 zero": replace(w4a16, symmetric=False),
    "w4a16 8 bits": replace(w4a16, weight_bits=8),
    "w4a16 fp16 scales": replace(w4a16, scale_dtype=torch.float16),
    "w4a16 channel": replace(w4a16, group_size=-1),
    "w8a8": w8a8,
    "w8a8 zero": replace(w8a8, input_symmetric=False),
    "w8a8 static": replace(w8a8, input_strategy="tensor"),
    "w8a8 static zero": replace(w8a8, input_strategy="tensor", input_symmetric=False),
}


@pytest.fixture(autouse=True)
def no_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    """There are none on a CPU."""

    def sample(calls: list[Callable[[], object]]) -> Callable[[], float]:
        for call in calls:
            call()
        return lambda: 1.0

    monkeypatch.setattr(cases, "_graph_sample", sample)
    monkeypatch.setattr(cases, "_calls_of_a_graph", len)


@pytest.mark.parametrize("name", PROBLEMS)
def test_only_complete_and_right_results_may_win(name: str) -> None:
    problem = PROBLEMS[name]
    kernel = W4A16() if problem.scheme == "w4a16" else W8A8()
    case = GpuCase(kernel, problem, CPU, 7, copies=2)
    for m in (7, 1):
        for config in (RULE, SAME):
            assert case.prepare(config, m)() == 1.0
        for config, told in (
            (ONE_WRONG, r"wrong result: [01][.0-9]* from the rule's"),
            (UNWRITTEN, "wrong result: nan"),
            (FAILING, "RuntimeError: out of resource: shared memory"),
        ):
            with pytest.raises(Unfit, match=told):
                case.prepare(config, m)
    # Nothing stays pinned.
    assert tuning.resolve(TOY, TOY.key_of(problem), 1, FACTS).origin == "rule"
    assert not torch.are_deterministic_algorithms_enabled()


def test_a_wrong_rule_is_not_a_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Toy, "rule", lambda *_: UNWRITTEN)
    case = GpuCase(W4A16(), w4a16, CPU, 7, copies=1)
    with pytest.raises(Unfit, match="rule's own result is wrong: relative error nan"):
        case.prepare(SAME, 7)


def test_every_copy_of_the_weight_is_its_own() -> None:
    case = GpuCase(W4A16(), w4a16, CPU, 1, copies=3)
    addresses = {weight.weight.data_ptr() for weight in case._weights}
    assert len(addresses) == 3
