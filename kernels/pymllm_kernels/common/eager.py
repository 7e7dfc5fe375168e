"""Calls of a layer with little work on the host: what a call launches is looked up, not found again."""

from __future__ import annotations

import functools
from collections.abc import Callable
from threading import get_ident
from typing import Any, NamedTuple, Protocol

import torch

from pymllm_kernels.common import cuda
from pymllm_kernels.ops import BIAS_DTYPES, direct
from pymllm_kernels.problem import BoundCall, LinearProblem
from pymllm_kernels.tuning import state

# One a shape, strides and alignment of x; a server that meets more starts anew.
_MOST_KNOWN = 16384


class Prepared(Protocol):
    """The launches of a layer for one number of tokens, but for the addresses."""

    def __call__(
        self, x: torch.Tensor, weight: Any, bias: torch.Tensor | None, out: torch.Tensor,
        stream: int,
    ) -> None:  # fmt: skip
        """Launches on the current device; of ``x`` and ``out`` only the addresses are read."""


Find = Callable[[torch.Tensor, Any, "torch.Tensor | None"], "Prepared | None"]


class _Known(NamedTuple):
    launch: Callable[..., None]
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class EagerCall:
    """``apply`` of the layers of one problem, on a CUDA device.

    A call whose ``x`` looks like one before it takes its launch from a dictionary. Any other, and one
    that torch listens to, goes through ``apply``.
    """

    def __init__(self, apply: BoundCall, find: Find, index: int) -> None:
        """Takes both ways.

        Args:
            apply: checks and runs any call.
            find: what launches a layer for an ``x [M, K]``, M > 0, on the current device in this
                thread, or ``None`` if such an ``x`` has to be copied first.
            index: number of the device that the layers are on.
        """
        self._apply, self._find, self._index = apply, find, index
        self._n, self._k = apply.problem.n, apply.problem.k
        self._known: dict[tuple[object, ...], _Known] = {}

    def __call__(self, x: torch.Tensor, weight: Any, bias: torch.Tensor | None) -> torch.Tensor:
        """``x [..., K]`` to ``[..., N]``."""
        # Asked first: torch.compile takes what follows out of its graph.
        if direct(x):
            index = x.get_device()
            if cuda.current_device() == index == self._index and (
                bias is None or self._takes(bias, index)
            ):
                kind = None if bias is None else bias.dtype
                key = (
                    x.shape, x.stride(), x.data_ptr() % 16, kind, state.generation, get_ident()
                )  # fmt: skip
                known = self._known.get(key) or self._learn(key, x, weight, bias)
                if known is not None:
                    launch, shape, strides = known
                    out = cuda.empty(shape, strides, x.dtype)
                    launch(x, weight, bias, out, cuda.raw_stream(index))
                    return out
        return self._apply(x, weight, bias)

    def __deepcopy__(self, memo: object) -> EagerCall:
        # What is known holds for copies of a layer.
        return self

    def __reduce__(self) -> tuple[object, ...]:
        return EagerCall, (self._apply, self._find, self._index)

    def _takes(self, bias: torch.Tensor, index: int) -> bool:
        return (
            bias.dim() == 1
            and bias.shape[0] == self._n
            and bias.stride(0) == 1
            and bias.dtype in BIAS_DTYPES
            and bias.get_device() == index
        )

    def _learn(
        self, key: tuple[object, ...], x: torch.Tensor, weight: Any, bias: torch.Tensor | None
    ) -> _Known | None:
        if x.dim() == 0 or x.shape[-1] != self._k or x.numel() == 0:
            return None
        if x.dim() != 2 and not x.is_contiguous():
            return None
        launch = self._find(x if x.dim() == 2 else x.view(-1, x.shape[-1]), weight, bias)
        if launch is None:
            return None
        shape = (*x.shape[:-1], self._n)
        if len(self._known) >= _MOST_KNOWN:
            self._known.clear()
        strides = torch.empty(shape, device="meta").stride()
        # A bound method: calling an object takes 0.1 us more.
        known = self._known[key] = _Known(launch.__call__, shape, strides)
        return known


@functools.lru_cache(maxsize=4096)
def eager_call(kernel: Any, problem: LinearProblem, index: int, kind: object = None) -> EagerCall:
    """The call of a kernel that has ``find``: layers of one problem share what is known.

    Args:
        kernel: what multiplies.
        problem: what it was chosen for.
        index: number of the device that the layers are on.
        kind: what else of a layer's weight its launches depend on.
    """
    return EagerCall(BoundCall(kernel, problem), functools.partial(kernel.find, problem), index)
