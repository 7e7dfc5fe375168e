"""The quantization before an int8 GEMM for Hopper, and the memory between the two kernels."""

from __future__ import annotations

import torch

from pymllm_kernels.common import cuda
from pymllm_kernels.common.forms import Form
from pymllm_kernels.per_token_quant_int8 import launch as quant
from pymllm_kernels.w8a8_int8.hopper_layer import HopperLayer

_ALIGNMENT = 256


class Quantization:
    """The launch for one shape and number of tokens, but for the addresses."""

    def __init__(
        self, layer: HopperLayer, m: int, strides: tuple[int, int], x: torch.Tensor, *,
        early: bool, counters: int = 0, parts: int = 0,
    ) -> None:  # fmt: skip
        """Takes what the next kernel needs.

        Args:
            layer: what is run.
            m: tokens.
            strides: of ``x``, elements.
            x: on the current device; of it, the address modulo 16 counts.
            early: whether the next kernel may start beside this one.
            counters: int32 counters that are cleared.
            parts: int32 elements of workspace.
        """
        k = layer.k
        form = quant.form_of(
            layer.act, k, *strides, x.data_ptr(), static=layer.static, zero=layer.zero,
            counters=counters > 0, pdl=early,
        )  # fmt: skip
        taken = (strides[0],) if form.contiguous else strides
        self._launch = quant.loaded(form, x.device).bind(sizes=(k, *taken, k, counters))
        self._programs = quant.programs(form, m, k)
        self._zero, self._shared = layer.zero, parts > 0
        # One allocation for what lives between the two kernels and inside the second.
        self._at_scale = _aligned(m * k)
        self._at_zero = self._at_scale + _aligned(0 if layer.static else 4 * m)
        dynamic_zero = layer.zero and not layer.static
        self._at_counters = self._at_zero + _aligned(4 * m if dynamic_zero else 0)
        self._at_parts = self._at_counters + _aligned(4 * counters)
        self._bytes = self._at_parts + 4 * parts

    def __call__(
        self, x: torch.Tensor, input_scale: torch.Tensor | None, input_zero: torch.Tensor | None,
        stream: int,
    ) -> tuple[torch.Tensor, int, int, tuple[int, ...], tuple[int, ...]]:  # fmt: skip
        """Launches it.

        Returns:
            Memory that is kept until the next kernel is launched (torch hands freed memory out to later
            work only), then what it holds for that kernel, as addresses: the codes, int8 ``[M, K]``,
            contiguous; their scales, fp32; zero points, int32, of a layer whose activations have
            them; the workspace and counters that are 0, if there are parts, of this call alone:
            captured graphs may run beside each other.
        """
        memory = cuda.empty((self._bytes,), (1,), torch.uint8)
        codes = memory.data_ptr()
        scale = codes + self._at_scale if input_scale is None else input_scale.data_ptr()
        zero: tuple[int, ...] = ()
        if self._zero:
            zero = (codes + self._at_zero if input_zero is None else input_zero.data_ptr(),)
        counters: tuple[int, ...] = ()
        parts: tuple[int, ...] = ()
        if self._shared:
            counters = (codes + self._at_counters,)
            parts = (codes + self._at_parts, *counters)
        addresses = (x.data_ptr(), codes, scale, *zero, *counters)
        self._launch(self._programs, stream, (), addresses)
        return memory, codes, scale, zero, parts


def quantization_form(layer: HopperLayer, *, early: bool, counters: int = 0) -> Form:
    """What :class:`Quantization` needs compiled for rows that are contiguous and on 16 elements."""
    form = quant.form_of(
        layer.act, layer.k, layer.k, 1, 0, static=layer.static, zero=layer.zero,
        counters=counters > 0, pdl=early,
    )  # fmt: skip
    return Form(quant.specialization, (form,))


def _aligned(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT
