"""int8 weights with int8 activations (``int-quantized``, ``naive-quantized``)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from pymllm.layers.parameter import Common, DtypeRule, Form, PerShard, Rows, place_of
from pymllm.quantization.schemes.common import (
    LinearScheme,
    choose_kernel,
    install,
    is_processed,
    require_loaded,
    start_layer,
)
from pymllm_kernels import CHANNEL, DeviceFacts, LinearProblem, W8A8Weight, device_facts

_STORED = ("weight", "weight_scale", "weight_zero_point", "input_scale", "input_zero_point")


class CompressedTensorsW8A8Int8Scheme(LinearScheme):
    """int8 weights, symmetric; activations quantized to int8 at run time.

    Attributes:
        weight_bits: 8.
        weight_strategy: ``"channel"`` (a scale per output) or ``"tensor"`` (one scale).
        input_strategy: ``"token"`` (a scale per row of x, computed) or ``"tensor"`` (stored).
        input_dynamic: whether input scales are computed; True with ``"token"`` only.
        input_symmetric: whether inputs have no zero point.
    """

    def __init__(
        self,
        *,
        weight_bits: int,
        weight_strategy: str = "channel",
        input_strategy: str = "token",
        input_dynamic: bool = True,
        input_symmetric: bool = True,
    ) -> None:
        """Check and keep the arguments.

        Raises:
            ValueError: a value, or the combination, is outside the scheme.
        """
        if weight_bits != 8:
            raise ValueError(f"weight_bits: found {weight_bits!r}, accepted 8")
        if weight_strategy not in ("channel", "tensor"):
            raise ValueError(
                f"weight_strategy: found {weight_strategy!r}, accepted 'channel' or 'tensor'"
            )
        if (input_strategy, input_dynamic) not in (("token", True), ("tensor", False)):
            raise ValueError(
                f"input_strategy and input_dynamic: found {input_strategy!r} and {input_dynamic}, "
                "accepted 'token' and True, or 'tensor' and False"
            )
        self.weight_bits = weight_bits
        self.weight_strategy = weight_strategy
        self.input_strategy = input_strategy
        self.input_dynamic = input_dynamic
        self.input_symmetric = input_symmetric

    def create_weights(
        self,
        layer: nn.Module,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """Register the checkpoint's tensors.

        ``weight`` int8 ``[N, K]``; ``weight_scale`` ``[N, 1]``, or per tensor one element for
        each logical weight; for static inputs ``input_scale`` ``[1]`` and, if asymmetric,
        ``input_zero_point`` int8 ``[1]``.
        """
        n, k = sum(output_partition_sizes), input_size_per_partition
        per_output = self.weight_strategy == "channel"
        scale_shape = (n, 1) if per_output else (len(output_partition_sizes),)
        params: dict[str, Any] = {
            "weight": (
                torch.empty(n, k, dtype=torch.int8),
                Rows(0),
                {"output_dim": 0, "input_dim": 1},
            ),
            "weight_scale": (
                torch.empty(scale_shape, dtype=params_dtype),
                Rows(0, DtypeRule.ADOPT, squeezable=True) if per_output else PerShard(),
                {"output_dim": 0} if per_output else {},
            ),
        }
        if not self.input_dynamic:
            scale = torch.empty(1, dtype=params_dtype)
            params["input_scale"] = (scale, Common(DtypeRule.ADOPT), {})
            if not self.input_symmetric:
                params["input_zero_point"] = (torch.empty(1, dtype=torch.int8), Common(), {})
        start_layer(layer, params_dtype, k, output_partition_sizes, params, extra_weight_attrs)

    def problem_of(self, layer: nn.Module, device: DeviceFacts | None = None) -> LinearProblem:
        """The problem of a layer that has not been processed, on ``device`` or where it is."""
        owner: Any = layer
        return LinearProblem(
            scheme="w8a8_int8",
            n=sum(owner.output_partition_sizes),
            k=owner.input_size_per_partition,
            weight_bits=8,
            group_size=CHANNEL,
            symmetric=True,
            act_order=False,
            act_dtype=owner.params_dtype,
            scale_dtype=owner.weight_scale.dtype,
            device=device or device_facts(owner.weight.device),
            input_strategy=self.input_strategy,
            input_symmetric=self.input_symmetric,
        )

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Choose the kernel; the int8 weight is used in place. A second call does nothing.

        Raises:
            ValueError: there are weight zero points other than 0, or no kernel runs the layer;
                the message names the layer.
        """
        if is_processed(layer):
            return
        require_loaded(layer)
        owner: Any = layer
        stray = layer._parameters.get("weight_zero_point")
        if stray is not None:
            try:
                self.check_stray(layer, "weight_zero_point", stray.data, None)
            except ValueError as error:
                raise ValueError(f"{place_of(layer)}: weight_zero_point: {error}") from None
        problem = self.problem_of(layer)
        choice = choose_kernel(layer, problem, owner.kernel_name)
        kernel: Any = choice.kernel
        weight = kernel.prepare(
            problem,
            owner.weight.data,
            self._scale_of(layer),
            _data(layer, "input_scale"),
            _data(layer, "input_zero_point"),
        )
        prepared = {
            "weight": weight.weight,
            "weight_scale": weight.scale,
            "weight_column_sum": weight.column_sum,
            "input_scale": weight.input_scale,
            "input_zero_point": weight.input_zero,
        }
        install(layer, _STORED, prepared)
        self.set_kernel(layer, problem, choice)

    def weight_of(self, layer: nn.Module) -> W8A8Weight:
        """The prepared weight that the kernel's ``apply`` takes."""
        params: Any = layer._parameters
        return W8A8Weight(
            params["weight"],
            params["weight_scale"],
            params["weight_column_sum"],
            params["input_scale"],
            params["input_zero_point"],
        )

    def stray_forms(self, layer: nn.Module, name: str, index: int | None) -> Sequence[Form]:
        """Zero points of the symmetric weight, shaped like its scale."""
        owner: Any = layer
        if name != "weight_zero_point":
            return ()
        if self.weight_strategy == "tensor":
            return Form((torch.int8,), (1,)), Form((torch.int8,), ())
        sizes = owner.output_partition_sizes
        count = sum(sizes) if index is None else sizes[index]
        return Form((torch.int8,), (count, 1)), Form((torch.int8,), (count,))

    def check_stray(
        self, layer: nn.Module, name: str, loaded: torch.Tensor, index: int | None
    ) -> None:
        """Accept weight zero points that are all 0.

        Raises:
            ValueError: one is not.
        """
        if bool((loaded != 0).any()):
            raise ValueError(
                "found zero points other than 0, expected none: the weights are symmetric"
            )

    def _scale_of(self, layer: nn.Module) -> torch.Tensor:
        """Weight scales ``[N]``, or ``[1]`` where the whole layer has one."""
        owner: Any = layer
        scale: torch.Tensor = owner.weight_scale.data.reshape(-1)
        sizes = owner.output_partition_sizes
        if self.weight_strategy == "channel" or len(sizes) == 1:
            return scale
        counts = torch.tensor(sizes, device=scale.device)
        return scale.repeat_interleave(counts)


def _data(layer: nn.Module, name: str) -> torch.Tensor | None:
    param = layer._parameters.get(name)
    return None if param is None else param.data
