"""What a quantization method does for a layer, and the method of layers that have none."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, cast

import torch
import torch.nn.functional as F

from pymllm.layers.parameter import DtypeRule, Rows, place_of, set_weight_attrs


class QuantizeMethodBase(ABC):
    """How the weights of one layer are stored and used."""

    @abstractmethod
    def create_weights(self, layer: torch.nn.Module, *args: Any, **kwargs: Any) -> None:
        """Register the parameters that a checkpoint fills."""

    @abstractmethod
    def apply(self, layer: torch.nn.Module, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Compute the layer's output."""

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:  # noqa: B027
        """Turn the loaded parameters into what :meth:`apply` reads; nothing by default.

        Called once, after every checkpoint tensor of the layer is in its parameters.
        """


class LinearMethodBase(QuantizeMethodBase):
    """A quantization method of linear layers."""

    @abstractmethod
    def create_weights(
        self,
        layer: torch.nn.Module,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """Register the layer's parameters, uninitialised, on torch's default device.

        Args:
            layer: the module that will own them.
            input_size_per_partition: K, input features on this rank.
            output_partition_sizes: output features of each logical weight on this rank: one
                entry for a plain layer, several for a merged one.
            input_size: input features of the whole layer.
            output_size: output features of the whole layer.
            params_dtype: dtype of floating parameters and of activations.
            **extra_weight_attrs: attributes to set on every parameter, e.g. ``weight_loader``.
        """

    @abstractmethod
    def apply(
        self, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        """``x @ W.T + bias``.

        Args:
            layer: the module that owns the parameters.
            x: ``[..., K]``, floating.
            bias: ``[N]``, or None.

        Returns:
            ``[..., N]`` in the dtype of ``x``.
        """


class UnquantizedLinearMethod(LinearMethodBase):
    """A plain ``weight [N, K]`` in ``params_dtype``.

    A floating checkpoint tensor of another dtype is converted to it, as model loaders do.
    """

    def create_weights(
        self,
        layer: torch.nn.Module,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        shape = (sum(output_partition_sizes), input_size_per_partition)
        weight = torch.nn.Parameter(torch.empty(shape, dtype=params_dtype), requires_grad=False)
        rule = Rows(output_dim=0, dtype_rule=DtypeRule.CONVERT)
        attrs = {"output_dim": 0, "input_dim": 1, "load_rule": rule, **extra_weight_attrs}
        set_weight_attrs(weight, attrs)
        layer.register_parameter("weight", weight)

    def apply(
        self, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        """``x @ W.T + bias`` in plain torch.

        Raises:
            ValueError: dtype or number of inputs of ``x`` is not the weight's.
        """
        weight = cast(torch.Tensor, layer.weight)
        if x.dtype != weight.dtype or x.shape[-1:] != weight.shape[1:]:
            raise ValueError(
                f"{place_of(layer)}: x: found {x.dtype} {list(x.shape)}, "
                f"expected {weight.dtype} [..., {weight.shape[1]}]"
            )
        return F.linear(x, weight, bias)
