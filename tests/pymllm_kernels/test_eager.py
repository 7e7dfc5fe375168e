"""Calls that look their launch up, with a launch that only notes what it gets."""

from __future__ import annotations

import copy
import dataclasses
import pickle
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from pymllm_kernels import LinearProblem, WrongInputsError, planned_device
from pymllm_kernels.common import eager
from pymllm_kernels.problem import BoundCall
from pymllm_kernels.tuning import state

BF16 = torch.bfloat16
N, K = 48, 64
PROBLEM = LinearProblem(
    "w4a16", N, K, 4, 32, True, False, BF16, BF16, planned_device("9.0")
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Applied:
    """Stands for a kernel: its ``apply`` says that it ran."""

    def apply(self, problem: LinearProblem, x: torch.Tensor, weight: Any, bias: Any) -> Any:
        return "applied"


class Launches:
    """Finds launches and keeps what they get."""

    def __init__(self) -> None:
        self.found: list[tuple[tuple[int, ...], tuple[int, ...]]] = []
        self.launched: list[tuple[Any, ...]] = []

    def find(self, x: torch.Tensor, weight: Any, bias: Any) -> Any:
        self.found.append((tuple(x.shape), x.stride()))
        return None if x.stride(-1) != 1 else self

    def __call__(self, x: Any, weight: Any, bias: Any, out: Any, stream: int) -> None:
        assert stream == 5
        self.launched.append((x, weight, bias, out))


@pytest.fixture
def launches() -> Launches:
    return Launches()


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, launches: Launches) -> Iterator[eager.EagerCall]:
    monkeypatch.setattr(eager.cuda, "current_device", lambda: -1)
    monkeypatch.setattr(eager.cuda, "raw_stream", lambda index: 5)
    monkeypatch.setattr(
        eager.cuda, "empty", lambda shape, strides, dtype: torch.empty(shape, dtype=dtype)
    )
    yield eager.EagerCall(BoundCall(Applied(), PROBLEM), launches.find, -1)


WEIGHT = (torch.empty(1), torch.empty(1))


@pytest.mark.parametrize("lead", [(), (1,), (7,), (2, 3), (1, 1, 5)])
def test_a_shape_is_looked_for_once(
    call: eager.EagerCall, launches: Launches, lead: tuple[int, ...]
) -> None:
    for _ in range(3):
        x = torch.randn(*lead, K).to(BF16)
        out = call(x, WEIGHT, None)
        assert (out.shape, out.dtype, out.is_contiguous()) == ((*lead, N), BF16, True)
        got, weight, bias, to = launches.launched[-1]
        assert got is x and weight is WEIGHT and bias is None and to is out
    rows = torch.Size(lead).numel()
    assert launches.found == [((rows, K), (K, 1))]


def test_what_looks_different_is_looked_for_again(
    call: eager.EagerCall, launches: Launches
) -> None:
    wide = torch.randn(9, 2 * K + 8).to(BF16)
    bias = torch.empty(N)
    for x in (wide[:4, :K], wide[:4, 1 : K + 1], wide[:5, :K], wide[:4, :K].contiguous()):
        for given in (None, bias, bias.to(BF16)):
            for _ in range(2):
                call(x, WEIGHT, given)
                assert launches.launched[-1][0] is x and launches.launched[-1][2] is given
    assert len(launches.found) == 4 * 3
    state.generation += 1
    call(wide[:4, :K], WEIGHT, None)
    assert len(launches.found) == 4 * 3 + 1


def test_every_thread_has_its_own_launch(call: eager.EagerCall, launches: Launches) -> None:
    x = torch.empty(3, K, dtype=BF16)
    threads = [threading.Thread(target=call, args=(x, WEIGHT, None)) for _ in range(3)]
    for thread in threads:
        thread.start()
        thread.join()
    # Numbers of threads that ended are given again.
    assert 1 <= len(launches.found) <= 3 and len(launches.launched) == 3
    held = threading.Event()
    waiting = threading.Thread(target=held.wait)
    waiting.start()
    before = len(launches.found)
    call(x, WEIGHT, None)
    held.set()
    waiting.join()
    assert len(launches.found) == before + 1


@pytest.mark.parametrize(
    "x",
    [
        torch.empty(0, K, dtype=BF16),
        torch.empty(4, 2 * K, dtype=BF16)[:, ::2],
        torch.empty(4, 6, K, dtype=BF16)[:, ::2],
        torch.empty(2, K, dtype=BF16).requires_grad_(),
        torch.nn.Parameter(torch.empty(2, K, dtype=BF16)),
    ],
    ids=["no tokens", "gaps", "gaps in 3-D", "autograd", "parameter"],
)
def test_what_cannot_be_launched_at_once_is_applied(
    call: eager.EagerCall, launches: Launches, x: torch.Tensor
) -> None:
    for _ in range(2):
        assert call(x, WEIGHT, None) == "applied"  # type: ignore[comparison-overlap]
    assert launches.launched == []


@pytest.mark.parametrize(
    "bias",
    [
        torch.empty(N + 1), torch.empty(1, N), torch.empty(2 * N)[::2], torch.empty(()),
        torch.empty(N, dtype=torch.float64), torch.empty(N, dtype=torch.int8),
    ],
)  # fmt: skip
def test_odd_biases_are_left_to_apply(call: eager.EagerCall, bias: torch.Tensor) -> None:
    x = torch.empty(2, K, dtype=BF16)
    call(x, WEIGHT, torch.empty(N))
    assert call(x, WEIGHT, bias) == "applied"  # type: ignore[comparison-overlap]


def test_another_device_is_left_to_apply(
    call: eager.EagerCall, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = torch.empty(2, K, dtype=BF16)
    assert isinstance(call(x, WEIGHT, None), torch.Tensor)
    monkeypatch.setattr(eager.cuda, "current_device", lambda: 1)
    assert call(x, WEIGHT, None) == "applied"  # type: ignore[comparison-overlap]


@pytest.mark.parametrize("shape", [(), (K + 1,), (3, K - 1), (2, 2, 2 * K)])
def test_wrong_inputs(call: eager.EagerCall, shape: tuple[int, ...]) -> None:
    with pytest.raises(WrongInputsError, match=rf"x: found .*, expected \[..., {K}\]"):
        call(torch.empty(shape, dtype=BF16), WEIGHT, None)


def test_what_is_known_is_bounded(call: eager.EagerCall, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(eager, "_MOST_KNOWN", 4)
    for m in range(1, 12):
        assert call(torch.empty(m, K, dtype=BF16), WEIGHT, None).shape == (m, N)
        assert len(call._known) <= 4


def test_copies_share_what_is_known_and_pickles_do_not(call: eager.EagerCall) -> None:
    call(torch.empty(2, K, dtype=BF16), WEIGHT, None)
    bound = {BF16: call.__call__}
    assert copy.deepcopy(bound)[BF16].__self__ is call  # type: ignore[attr-defined]
    plain = eager.EagerCall(BoundCall(Applied(), PROBLEM), print, -1)  # type: ignore[arg-type]
    again = pickle.loads(pickle.dumps(plain.__call__)).__self__
    assert (again._index, again._n, again._k, again._known) == (-1, N, K, {})
