"""One layer on a GPU, run with any of its configurations as a user's call would run: checked, then timed."""

from __future__ import annotations

import statistics
from functools import partial
from typing import Any, Protocol

import torch

from pymllm.bench import timing
from pymllm.bench.random_layer import (
    MOST_ERROR,
    SAMPLED,
    bytes_of,
    copies_of,
    fresh_memory_is_nan,
    random_layer,
    sampled_error,
)
from pymllm.tuning.search import Config, Sample, Unfit
from pymllm_kernels import LinearKernel, LinearProblem
from pymllm_kernels.tuning.state import pinned_for_now

# Two right results differ by the rounding of the output and of the order of sums: an element of 470
# million by up to 0.03 of the outputs' size in bf16. One that misses a block of K is off by all of it.
_MOST_APART = 0.1
_ROWS_AT_A_TIME = 512
_REPLAYS = 3


class Case(Protocol):
    """A layer that the search can run."""

    def prepare(self, config: Config, m: int) -> Sample:
        """Compiles a configuration, checks its result for ``m`` tokens, gives what measures it.

        Raises:
            Unfit: it does not compile, does not run, or gives a wrong result.
        """


class GpuCase:
    """A layer with random weights, in as many copies as keep them out of the cache.

    Args:
        kernel: one that has something to tune.
        problem: the layer.
        device: a GPU.
        most_tokens: the largest number of tokens that will be asked for.
        copies: of the weight; ``None`` for what the cache asks for.
    """

    def __init__(
        self, kernel: LinearKernel, problem: LinearProblem, device: torch.device, most_tokens: int,
        copies: int | None = None,
    ) -> None:  # fmt: skip
        assert kernel.tunable is not None
        self._kernel: Any = kernel
        self._problem, self._tunable = problem, kernel.tunable
        self._key = kernel.tunable.key_of(problem)
        generator = torch.Generator(device).manual_seed(0)
        weight, self._exact = random_layer(kernel, problem, device, generator)
        if copies is None:
            l2_bytes = torch.cuda.get_device_properties(device).L2_cache_size
            copies = timing.copies_for(bytes_of(weight), timing.cold_bytes(l2_bytes))
        self._weights = copies_of(weight, copies)
        x = torch.randn(most_tokens, problem.k, device=device, generator=generator)
        self._x = x.to(problem.act_dtype)
        self._expected: tuple[int, torch.Tensor] | None = None
        self._calls = 0

    def prepare(self, config: Config, m: int) -> Sample:
        """See :class:`Case`."""
        try:
            if self._expected is None or self._expected[0] != m:
                self._expected, self._calls = None, 0
                # Of the graphs before, which hold on to their outputs.
                torch.cuda.empty_cache()
                self._expected = (m, self._by_rule(m))
            with pinned_for_now(self._tunable, self._key, config, m):
                with fresh_memory_is_nan():
                    found = self.call(m)
                wrong = _apart(found, self._expected[1])
                if wrong is not None:
                    raise Unfit(wrong)
                x = self._x[:m]
                calls: list[timing.Call] = [partial(self._apply, x, w) for w in self._weights]
                # The same for all candidates: a graph of more calls would hide more of its launch.
                self._calls = self._calls or _calls_of_a_graph(calls)
                return _graph_sample([calls[i % len(calls)] for i in range(self._calls)])
        except Unfit:
            raise
        except Exception as error:
            if self._x.device.type == "cuda":
                # A GPU that is lost raises here again, and the search ends.
                torch.cuda.synchronize()
            raise Unfit(f"{type(error).__name__}: {' '.join(str(error).split())[:200]}") from error

    def call(self, m: int) -> torch.Tensor:
        """``[m, N]``, as any call of the layer."""
        return self._apply(self._x[:m], self._weights[0])

    def _apply(self, x: torch.Tensor, weight: Any) -> torch.Tensor:
        out: torch.Tensor = self._kernel.apply(self._problem, x, weight, None)
        return out

    def _by_rule(self, m: int) -> torch.Tensor:
        """The rule's result, compared with the exact one in some rows and columns.

        Raises:
            Unfit: it is wrong, so that nothing can be compared with it.
        """
        config = self._tunable.rule(self._key, m, self._problem.device)
        with pinned_for_now(self._tunable, self._key, config, m), fresh_memory_is_nan():
            out = self.call(m)
        error = sampled_error(out, self._x[:m], self._exact)
        if not error <= MOST_ERROR:
            raise Unfit(f"the rule's own result is wrong: relative error {error:.3g}")
        return out


def _apart(found: torch.Tensor, expected: torch.Tensor) -> str | None:
    """Where two results differ by more than rounding, ``None`` if nowhere."""
    some = expected[:: max(1, expected.shape[0] // SAMPLED)]
    size = float(some.float().square().mean().sqrt())
    for start in range(0, expected.shape[0], _ROWS_AT_A_TIME):
        rows = slice(start, start + _ROWS_AT_A_TIME)
        most = float((found[rows].float() - expected[rows].float()).abs().max())
        # NaN fails this comparison, too.
        if not most <= _MOST_APART * size:
            return f"wrong result: {most:.3g} from the rule's, the outputs' size is {size:.3g}"
    return None


def _calls_of_a_graph(calls: list[timing.Call]) -> int:
    """How many calls a graph is to hold, one of each copy of the weight, fewer if they are long."""
    return timing.plan_calls(len(calls), timing.pilot_time(calls))[1]


def _graph_sample(calls: list[timing.Call]) -> Sample:
    """What replays a graph of some calls; it is captured once. Each call was made before, or one like it."""
    graph = timing.capture(calls)
    timing.replay(graph, 1)

    def sample() -> float:
        return statistics.median(timing.replay(graph, _REPLAYS)) / len(calls)

    return sample
