"""A store of its own for each test, and a GPU that is not there."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from pymllm.tuning.search import Unfit
from pymllm_kernels import DeviceFacts, LinearKernel, LinearProblem, tuning
from pymllm_kernels.tuning import store as store_module

BOARD = DeviceFacts("cuda", "Board of the tests", (9, 0), 227 * 1024, 132)


@pytest.fixture
def facts() -> DeviceFacts:
    """A Hopper GPU that no table is shipped for."""
    return BOARD


@pytest.fixture(autouse=True)
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty tuning directory, in use."""
    found = tmp_path / "tuning"
    monkeypatch.setattr(store_module, "_told", set())
    tuning.use_directory(found)
    yield found
    tuning.unpin()
    tuning.use_directory(None)


class FakeGpu:
    """Gives each configuration a time of its own, with noise, and counts what is asked."""

    def __init__(self, noise: float = 0.0, seed: int = 0) -> None:
        self.times: dict[Any, float] = {}
        self.unfit: set[Any] = set()
        self.prepared: list[tuple[str, int, Any]] = []
        self.cases: list[LinearProblem] = []
        self.compiled: list[Any] = []
        self._random = random.Random(seed)
        self._noise = noise

    def make_case(
        self, kernel: LinearKernel, problem: LinearProblem, *, device: object, most_tokens: int
    ) -> Any:
        self.cases.append(problem)
        gpu = self

        class Case:
            def prepare(self, config: Any, m: int) -> Callable[[], float]:
                assert m <= most_tokens
                gpu.prepared.append((kernel.name, m, config))
                if config in gpu.unfit:
                    raise Unfit("wrong result")
                # The same in every process: hash() of a dataclass of integers is. Each a power of
                # 1.02, so that none lies on the edge of a band of 3 % from any other, whatever the
                # candidates are: steps of 0.2 from 10 on did, 13.8 from 13.4.
                usual = 10.0 * 1.02 ** (hash((problem.n, problem.k, m, config)) % 35)
                time = gpu.times.get(config, usual)
                return lambda: time * (1 + gpu._random.gauss(0, gpu._noise))

        return Case()

    def compile_all(
        self, forms: Any, facts: DeviceFacts, progress: Callable[[int, int], None],
        failed: Callable[[str], None],
    ) -> None:  # fmt: skip
        self.compiled += forms
        progress(len(forms), len(forms))


@pytest.fixture
def gpu() -> FakeGpu:
    """A quiet one."""
    return FakeGpu()
