"""Launches the gathering of activations."""

from __future__ import annotations

import functools

import torch

from pymllm_kernels.common.forms import Form
from pymllm_kernels.common.launcher import LoadedKernel, load
from pymllm_kernels.common.specialization import Specialization, pointer_type
from pymllm_kernels.gather_inputs.kernel import gather_inputs_kernel

# A few programs a row: their latency is what counts.
_BLOCK = 512


def specialization(act: torch.dtype) -> Specialization:
    """The compiled form for activations of a dtype."""
    pointer = pointer_type(act)
    return Specialization(
        "gather-inputs",
        gather_inputs_kernel,
        {
            "x_ptr": pointer, "perm_ptr": "*i32", "out_ptr": pointer,
            "k8": "i32", "stride_xm": "i64", "stride_xk": "i64",
        },
        {"BLOCK": _BLOCK},
        num_warps=8,
        divisible_by_16=("perm_ptr", "out_ptr"),
    )  # fmt: skip


class PreparedGather:
    """A launch for one shape and strides, but for the addresses."""

    def __init__(
        self, act: torch.dtype, m: int, k: int, strides: tuple[int, int], device: torch.device
    ) -> None:
        """Of ``x [m, k]`` with these strides, ``k`` a multiple of 8."""
        self._kernel = _kernel(act, device)
        self._programs = m * -(-k // _BLOCK)
        self._sizes = (k // 8, *strides)
        self._shape = (m, k)

    def __call__(self, x: torch.Tensor, perm: torch.Tensor, stream: int) -> torch.Tensor:
        """``x[:, perm]``, on the current device; a dependent kernel may start at once."""
        out = x.new_empty(self._shape)
        addresses = (x.data_ptr(), perm.data_ptr(), out.data_ptr())
        self._kernel.launch(self._programs, stream, (), (*addresses, *self._sizes))
        return out


def form(act: torch.dtype) -> Form:
    """What a call needs compiled."""
    return Form(specialization, (act,))


@functools.cache
def _kernel(act: torch.dtype, device: torch.device) -> LoadedKernel:
    return load(specialization(act), device)
