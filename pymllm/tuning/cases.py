"""One layer on a GPU, run with any of its configurations as a user's call would run: checked, then timed."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any, Protocol

import torch

from pymllm.bench import timing
from pymllm.tuning.search import Config, Sample, Unfit
from pymllm_kernels import LinearKernel, LinearProblem, W8A8Weight
from pymllm_kernels.tuning.state import pinned_for_now
from pymllm_kernels.w4a16 import reference as w4a16_reference
from pymllm_kernels.w8a8_int8.providers import TorchW8A8

# Two right results differ by the rounding of the output and of the order of sums: an element of 470
# million by up to 0.03 of the outputs' size in bf16. One that misses a block of K is off by all of it.
_MOST_APART = 0.1
# Of what is compared with the exact result: 0.002 by the rounding of weights and outputs.
_MOST_ERROR = 0.01
_SAMPLED = 256
_ROWS_AT_A_TIME = 512
_REPLAYS = 3

Exact = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""Rows of x ``[R, K]`` and output features ``[C]`` to fp64 ``[R, C]``."""


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
        make = _w4a16_layer if problem.scheme == "w4a16" else _w8a8_layer
        weight, self._exact = make(self._kernel, problem, device, generator)
        size = sum(t.numel() * t.element_size() for t in weight if t is not None)
        if copies is None:
            l2_bytes = torch.cuda.get_device_properties(device).L2_cache_size
            copies = timing.copies_for(size, timing.cold_bytes(l2_bytes))
        self._weights = [weight]
        for _ in range(copies - 1):
            self._weights.append(type(weight)(*(None if t is None else t.clone() for t in weight)))
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
                with _fresh_memory_is_nan():
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
        with pinned_for_now(self._tunable, self._key, config, m), _fresh_memory_is_nan():
            out = self.call(m)
        rows, columns = _spread(m, out.device), _spread(self._problem.n, out.device)
        exact = self._exact(self._x[rows], columns)
        error = float((out[rows][:, columns].to(torch.float64) - exact).norm() / exact.norm())
        if not error <= _MOST_ERROR:
            raise Unfit(f"the rule's own result is wrong: relative error {error:.3g}")
        return out


@contextmanager
def _fresh_memory_is_nan() -> Iterator[None]:
    before = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warn_only)


def _spread(count: int, device: torch.device) -> torch.Tensor:
    """Some indices up to ``count``, over all of it, the last among them."""
    return torch.linspace(0, count - 1, min(count, _SAMPLED), device=device).round().long()


def _apart(found: torch.Tensor, expected: torch.Tensor) -> str | None:
    """Where two results differ by more than rounding, ``None`` if nowhere."""
    some = expected[:: max(1, expected.shape[0] // _SAMPLED)]
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


def _w4a16_layer(
    kernel: Any, problem: LinearProblem, device: torch.device, generator: torch.Generator
) -> tuple[Any, Exact]:
    n, k, bits = problem.n, problem.k, problem.weight_bits
    shape = (n, -(-k * bits // 32))
    words = torch.randint(
        -(2**31), 2**31, shape, dtype=torch.int32, device=device, generator=generator
    )
    spread = torch.rand(n, problem.groups, device=device, generator=generator) + 0.5
    # Outputs near 1 whatever the size.
    scale = (spread / (k**0.5 * 2 ** (bits - 2))).to(problem.scale_dtype)
    zero = None
    if not problem.symmetric:
        zero = torch.randint(
            0, 2**bits, scale.shape, dtype=torch.uint8, device=device, generator=generator
        )

    def exact(x: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
        return w4a16_reference.linear(
            x.double(), words[columns], scale[columns].double(),
            None if zero is None else zero[columns], None, None, bits,
        )  # fmt: skip

    return kernel.prepare(problem, words, scale, zero, None), exact


def _w8a8_layer(
    kernel: Any, problem: LinearProblem, device: torch.device, generator: torch.Generator
) -> tuple[Any, Exact]:
    n, k = problem.n, problem.k
    codes = torch.randint(-127, 128, (n, k), dtype=torch.int8, device=device, generator=generator)
    scale = (torch.rand(n, device=device, generator=generator) + 0.5) / (k**0.5 * 64)
    input_scale = input_zero = None
    if problem.input_strategy == "tensor":
        input_scale = torch.full((1,), 4 / 127, device=device)
        if not problem.input_symmetric:
            input_zero = torch.full((1,), 3, dtype=torch.int32, device=device)
    weight = kernel.prepare(problem, codes, scale, input_scale, input_zero)
    plain: Any = TorchW8A8()

    def exact(x: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
        sums = None if weight.column_sum is None else weight.column_sum[columns]
        part = W8A8Weight(
            weight.weight[columns], weight.scale[columns], sums, weight.input_scale,
            weight.input_zero,
        )  # fmt: skip
        found: torch.Tensor = plain.apply(replace(problem, n=columns.numel()), x, part, None)
        return found.double()

    return weight, exact
