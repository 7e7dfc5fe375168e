"""The frozen description of a linear layer that a kernel is chosen for, and what a kernel is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from pymllm_kernels.common.forms import Form
from pymllm_kernels.common.launch import in_short
from pymllm_kernels.device import DeviceFacts
from pymllm_kernels.ops import BIAS_DTYPES
from pymllm_kernels.tuning.resolving import Resolved, config_for, resolve
from pymllm_kernels.tuning.tunable import Tunable

CHANNEL = -1
# x [..., K], what a kernel's prepare made, bias [N] or None -> [..., N].
LinearCall = Callable[[torch.Tensor, Any, "torch.Tensor | None"], torch.Tensor]


class WrongInputsError(ValueError):
    """An activation has another number of inputs than the layer."""


@dataclass(frozen=True)
class LinearProblem:
    """``y[M, N] = x[M, K] @ W[N, K].T + bias`` with quantized ``W``; M is not part of it.

    Attributes:
        scheme: ``"w4a16"`` (weights of 4 or 8 bits, 16-bit activations) or ``"w8a8_int8"``.
        n: output features.
        k: input features.
        weight_bits: bits of a weight code.
        group_size: inputs that share a scale, ``-1`` for one scale a row; for ``w8a8_int8`` always
            ``-1`` (a per-tensor scale is passed as a ``[1]`` tensor).
        symmetric: whether the weights have no zero point.
        act_order: whether groups are given by a ``g_idx`` rather than by neighbouring inputs.
        act_dtype: dtype of ``x`` and ``y``.
        scale_dtype: dtype of the weight scales as stored.
        device: where it is to run.
        input_strategy: ``None`` for 16-bit activations, else ``"token"`` (dynamic) or ``"tensor"``
            (static).
        input_symmetric: whether quantized activations have no zero point.
    """

    scheme: str
    n: int
    k: int
    weight_bits: int
    group_size: int
    symmetric: bool
    act_order: bool
    act_dtype: torch.dtype
    scale_dtype: torch.dtype
    device: DeviceFacts
    input_strategy: str | None = None
    input_symmetric: bool = True

    @property
    def groups(self) -> int:
        """Scale columns of the layer."""
        return 1 if self.group_size == CHANNEL else self.k // self.group_size


class LinearKernel:
    """One way to run a :class:`LinearProblem`; each scheme adds its ``prepare`` and ``apply``.

    Attributes:
        name: as in reports.
        tunable: its configurations, ``None`` where there are none to choose from.
    """

    name = ""
    tunable: Tunable | None = None

    def why_not(self, problem: LinearProblem) -> str | None:
        """``None`` if this kernel runs the problem, else the reason it cannot."""
        raise NotImplementedError

    def why(self, problem: LinearProblem) -> str:
        """What makes this kernel the choice where it can run."""
        raise NotImplementedError

    def bind(self, problem: LinearProblem, weight: Any) -> LinearCall:
        """``apply`` of one layer, for many calls.

        Args:
            problem: the layer; every call's ``x`` has its dtype.
            weight: what ``prepare`` made; a call may have another of its kind on its device.

        Returns:
            What raises a :class:`WrongInputsError` where ``x`` is not ``[..., K]``.
        """
        return BoundCall(self, problem).__call__

    def resolved(self, problem: LinearProblem, m: int) -> Resolved | None:
        """Launch parameters for ``m`` tokens and their origin; ``None`` where there are none to choose.

        Raises:
            ValueError: what is pinned cannot run, or is not in a strict lock file.
        """
        if self.tunable is None:
            return None
        return resolve(self.tunable, self.tunable.key_of(problem), m, problem.device)

    def forms(
        self, problem: LinearProblem, m: int, *, bias: torch.dtype | None = None,
        config: Any = None,
    ) -> list[Form]:  # fmt: skip
        """What a call with ``m`` rows, each contiguous and on 16 elements, needs compiled.

        Args:
            problem: the layer.
            m: number of tokens.
            bias: dtype of the bias, ``None`` for none.
            config: of the tunable; as resolved for the call if ``None``.
        """
        return []

    def configured(self, problem: LinearProblem, m: int) -> Any:
        """The configuration of :meth:`resolved`, kept until something changes."""
        assert self.tunable is not None
        return config_for(self.tunable, self.tunable.key_of(problem), m, problem.device)

    def configuration(self, problem: LinearProblem, m: int) -> str | None:
        """:meth:`resolved` in short."""
        found = self.resolved(problem, m)
        return None if found is None else f"{in_short(found.config)} ({found.origin})"


@dataclass(frozen=True)
class BoundCall:
    """``apply`` of a kernel for one problem.

    Attributes:
        kernel: what multiplies.
        problem: what it was chosen for.
    """

    kernel: Any
    problem: LinearProblem

    def __call__(self, x: torch.Tensor, weight: Any, bias: torch.Tensor | None) -> torch.Tensor:
        """``x [..., K]`` to ``[..., N]``.

        Raises:
            WrongInputsError: ``x`` has not K inputs.
        """
        k = self.problem.k
        if x.dim() == 0 or x.shape[-1] != k:
            raise WrongInputsError(f"x: found {list(x.shape)}, expected [..., {k}]")
        out: torch.Tensor = self.kernel.apply(self.problem, x, weight, bias)
        return out


def check_call(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, n: int) -> None:
    """What a kernel checks of every call beyond the dtype and number of inputs of ``x``.

    Raises:
        ValueError: ``x`` is not where the weight is, or ``bias`` is not ``[N]`` there, in bf16, fp16 or
            fp32.
    """
    if x.get_device() != weight.get_device():
        raise ValueError(f"x: found on {x.device}, but the weight is on {weight.device}")
    if bias is not None:
        if bias.shape != (n,):
            raise ValueError(f"bias: found shape {tuple(bias.shape)}, expected ({n},)")
        if bias.dtype not in BIAS_DTYPES:
            raise ValueError(f"bias: found {bias.dtype}, accepted {BIAS_DTYPES}")
        if bias.get_device() != x.get_device():
            raise ValueError(f"bias: found on {bias.device}, but x is on {x.device}")
