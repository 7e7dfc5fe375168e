"""Launches the gathering of activations."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch

from pymllm_kernels.common import cuda
from pymllm_kernels.common.forms import Form
from pymllm_kernels.common.launcher import LoadedKernel, load
from pymllm_kernels.common.specialization import Specialization, pointer_type
from pymllm_kernels.gather_inputs.kernel import gather_inputs_kernel

# A row of up to this many values is put into shared memory, 64 KB, by each of its programs.
_MOST_IN_SHARED = 32768
_PROGRAMS = 2
_BLOCK = 512


class GatherForm(NamedTuple):
    """What a compiled gathering depends on.

    Attributes:
        act: dtype of the activations.
        block: columns of a program.
        row: the power of two that holds a row, 0 where values are loaded one by one.
        even: whether rows are contiguous and on 16 elements.
    """

    act: torch.dtype
    block: int
    row: int
    even: bool


def form_of(act: torch.dtype, k: int, even: bool) -> GatherForm:
    """The form for rows of ``k`` values; others than even ones would spill on their way to shared memory."""
    row = max(1 << (k - 1).bit_length(), 256)
    if even and row <= _MOST_IN_SHARED:
        return GatherForm(act, row // _PROGRAMS, row, even)
    return GatherForm(act, _BLOCK, 0, even)


def specialization(form: GatherForm) -> Specialization:
    """The compiled form."""
    act, block, row, even = form
    pointer = pointer_type(act)
    signature = {
        "x_ptr": pointer, "perm_ptr": "*i32", "out_ptr": pointer,
        "k8": "i32", "stride_xm": "i64", **({} if even else {"stride_xk": "i64"}),
    }  # fmt: skip
    constants = {"BLOCK": block, "ROW": row, **({"stride_xk": 1} if even else {})}
    return Specialization(
        f"gather-inputs-{row or ('long' if even else 'strided')}",
        gather_inputs_kernel,
        signature,
        constants,
        num_warps=8,
        divisible_by_16=("perm_ptr", "out_ptr", *(("x_ptr", "stride_xm") if even else ())),
    )


class PreparedGather:
    """A launch for one shape and strides, but for the addresses."""

    def __init__(
        self, act: torch.dtype, m: int, k: int, strides: tuple[int, int], aligned: bool,
        device: torch.device,
    ) -> None:  # fmt: skip
        """Of ``x [m, k]`` with these strides, ``k`` a multiple of 8, ``aligned`` if on 16 bytes."""
        even = aligned and strides[0] % 16 == 0 and strides[1] == 1
        form = form_of(act, k, even)
        sizes = (k // 8, *(strides[:1] if even else strides))
        self._launch = _kernel(form, device).bind(sizes=sizes)
        self._programs = m * -(-k // form.block)
        self._shape, self._strides = (m, k), (k, 1)

    def __call__(self, x: torch.Tensor, perm: torch.Tensor, stream: int) -> torch.Tensor:
        """``x[:, perm]``, on the current device; a dependent kernel may start at once."""
        out = cuda.empty(self._shape, self._strides, x.dtype)
        addresses = (x.data_ptr(), perm.data_ptr(), out.data_ptr())
        self._launch(self._programs, stream, (), addresses)
        return out


def form(act: torch.dtype, k: int) -> Form:
    """What a call with rows of ``k`` values, contiguous and on 16 elements, needs compiled."""
    return Form(specialization, (form_of(act, k, k % 16 == 0),))


@functools.cache
def _kernel(form: GatherForm, device: torch.device) -> LoadedKernel:
    return load(specialization(form), device)
