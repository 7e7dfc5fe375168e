"""Linear layers that a checkpoint may store quantized, alone or several in one weight."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from pymllm.layers.loading import DeviceMove, TensorLoader
from pymllm.layers.parameter import DtypeRule, Rows, set_weight_attrs
from pymllm.layers.quantize_base import LinearMethodBase, UnquantizedLinearMethod
from pymllm.quantization.format.matching import DEFAULT_PACKED_MODULES_MAPPING

if TYPE_CHECKING:
    from pymllm.quantization.quant_config import QuantizationConfig


class LinearBase(TensorLoader, nn.Module):
    """``y = x @ W.T + bias``; how ``W`` is stored is the quantization method's business.

    Attributes:
        in_features: K.
        out_features: N, of all logical outputs together.
        input_size_per_partition: K on this rank.
        output_partition_sizes: outputs of each logical weight on this rank.
        params_dtype: dtype of floating parameters and of the expected activations.
        prefix: the layer's full dotted name, for messages and for finding its scheme.
        quant_method: what creates the weights and multiplies.
        kernel_name: name of a kernel to force, or None; read when the weights are processed.
        bias: ``[N]``, or None.
    """

    kernel_name: str | None = None

    def __init__(
        self,
        in_features: int,
        output_sizes: Sequence[int],
        bias: bool = True,
        *,
        params_dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        quant_config: QuantizationConfig | None = None,
        quant_method: LinearMethodBase | None = None,
        prefix: str = "",
    ) -> None:
        """Create the layer with uninitialised parameters.

        Args:
            in_features: K.
            output_sizes: outputs of each logical weight.
            bias: whether there is a bias.
            params_dtype: dtype of floating parameters; torch's default dtype if None.
            device: where the parameters are; torch's default device if None.
            quant_config: the checkpoint's quantization; it is asked for this layer's method.
            quant_method: the method itself, instead of ``quant_config``.
            prefix: the layer's full dotted name as the checkpoint spells it.

        Raises:
            ValueError: a size is not positive, both quantization arguments are given, or the
                method cannot store a layer of this shape.
        """
        super().__init__()
        self.prefix = prefix
        _check_sizes(prefix, in_features, output_sizes)
        if quant_config is not None and quant_method is not None:
            raise ValueError(
                f"layer {prefix!r}: found quant_config and quant_method, expected one of them"
            )
        self.in_features = in_features
        self.out_features = sum(output_sizes)
        self.input_size_per_partition = in_features
        self.output_partition_sizes = list(output_sizes)
        self.params_dtype = params_dtype or torch.get_default_dtype()
        method = quant_method
        if quant_config is not None:
            method = quant_config.get_quant_method(self, prefix)  # type: ignore[assignment]
        self.quant_method: LinearMethodBase = method or UnquantizedLinearMethod()
        with torch.device(device if device is not None else torch.get_default_device()):
            self.quant_method.create_weights(
                self,
                self.input_size_per_partition,
                self.output_partition_sizes,
                self.in_features,
                self.out_features,
                self.params_dtype,
                weight_loader=self.weight_loader,
            )
            self._create_bias(bias)

    @property
    def is_quantized(self) -> bool:
        """Whether the weight is stored in a quantized form."""
        return not isinstance(self.quant_method, UnquantizedLinearMethod)

    def _create_bias(self, wanted: bool) -> None:
        if not wanted:
            self.register_parameter("bias", None)
            return
        values = torch.empty(self.out_features, dtype=self.params_dtype)
        self.bias = nn.Parameter(values, requires_grad=False)
        # F.linear wants the weight's dtype; the quantized kernels add a bias of any dtype in fp32.
        rule = Rows(0, DtypeRule.ADOPT if self.is_quantized else DtypeRule.CONVERT)
        attrs = {"output_dim": 0, "load_rule": rule, "weight_loader": self.weight_loader}
        set_weight_attrs(self.bias, attrs)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``x [..., K]`` to ``[..., N]`` in the dtype of ``x``.

        Raises:
            ValueError: dtype or number of inputs of ``x`` does not fit; names the layer.
        """
        # `self.bias` goes through nn.Module.__getattr__, 0.6 us. A bias that somebody replaced, as
        # parametrizations do, is found by it alone.
        own = self._parameters
        bias = own["bias"] if "bias" in own else self.bias  # noqa: SIM401
        return self.quant_method.apply(self, x, bias)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
        # What .to(), .half(), .cuda() ... go through. Quantized tensors follow the device only:
        # casting a scale would change the weights.
        if not self.is_quantized:
            return super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        move = DeviceMove.plan(self, fn)
        stored = {id(p) for name, p in self._parameters.items() if name != "bias"}

        def keep_dtype(tensor: torch.Tensor) -> torch.Tensor:
            moved = fn(tensor)
            if id(tensor) in stored and moved.dtype != tensor.dtype:
                return tensor.to(moved.device)
            return moved

        super()._apply(keep_dtype, recurse)  # type: ignore[no-untyped-call]
        if move is not None:
            move.finish()
        return self

    def extra_repr(self) -> str:
        """Sizes, and the kernel once it has been chosen."""
        text = f"in_features={self.in_features}, out_features={self.out_features}"
        text += f", bias={self.bias is not None}"
        choice = getattr(self, "kernel_choice", None)
        return text if choice is None else f"{text}, kernel={choice.kernel.name}"


class Linear(LinearBase):
    """One linear layer, held whole."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        params_dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        quant_config: QuantizationConfig | None = None,
        quant_method: LinearMethodBase | None = None,
        prefix: str = "",
    ) -> None:
        """See :class:`LinearBase`; ``out_features`` is N."""
        super().__init__(
            in_features,
            [out_features],
            bias,
            params_dtype=params_dtype,
            device=device,
            quant_config=quant_config,
            quant_method=quant_method,
            prefix=prefix,
        )


class MergedLinear(LinearBase):
    """Several linear layers over the same inputs in one weight, such as q, k and v.

    Attributes:
        shard_names: names of the logical weights as checkpoints spell them, or empty.
    """

    def __init__(
        self,
        in_features: int,
        output_sizes: Sequence[int],
        bias: bool = True,
        *,
        shard_names: Sequence[str] | None = None,
        params_dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        quant_config: QuantizationConfig | None = None,
        quant_method: LinearMethodBase | None = None,
        prefix: str = "",
    ) -> None:
        """See :class:`LinearBase`.

        Args:
            in_features: K.
            output_sizes: outputs of each logical weight.
            bias: whether there is a bias.
            shard_names: last name component of each logical weight; if None, what the
                configuration's ``packed_modules_mapping`` says of the last component of
                ``prefix``.
            params_dtype: see the base class.
            device: see the base class.
            quant_config: see the base class.
            quant_method: see the base class.
            prefix: see the base class; ends in the fused name.
        """
        super().__init__(
            in_features,
            output_sizes,
            bias,
            params_dtype=params_dtype,
            device=device,
            quant_config=quant_config,
            quant_method=quant_method,
            prefix=prefix,
        )
        if shard_names is None:
            mapping = getattr(quant_config, "packed_modules_mapping", None)
            mapping = DEFAULT_PACKED_MODULES_MAPPING if mapping is None else mapping
            shard_names = mapping.get(prefix.rpartition(".")[2], ())
        self.shard_names = tuple(shard_names)
        if self.shard_names and len(self.shard_names) != len(output_sizes):
            raise ValueError(
                f"layer {prefix!r}: output_sizes: found {len(output_sizes)}, "
                f"expected one for each of {list(self.shard_names)}"
            )


class _ParallelLinear(Linear):
    """A linear layer that ranks may share; one rank for now."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        tp_size: int = 1,
        tp_rank: int = 0,
        **kwargs: Any,
    ) -> None:
        """See :class:`Linear`; ``tp_size`` ranks share the layer, this one is ``tp_rank``.

        Raises:
            ValueError: ``tp_size`` is not 1.
        """
        _check_one_rank(kwargs.get("prefix", ""), tp_size, tp_rank)
        super().__init__(in_features, out_features, bias, **kwargs)
        self.tp_size, self.tp_rank = tp_size, tp_rank


class ColumnParallelLinear(_ParallelLinear):
    """A linear layer whose outputs may be split over ranks; one rank for now."""


class RowParallelLinear(_ParallelLinear):
    """A linear layer whose inputs may be split over ranks; one rank for now."""


def _check_sizes(prefix: str, in_features: int, output_sizes: Sequence[int]) -> None:
    if not output_sizes:
        raise ValueError(f"layer {prefix!r}: output_sizes: found none, expected at least one")
    sizes = [("in_features", in_features), *(("out_features", size) for size in output_sizes)]
    for name, size in sizes:
        if size < 1:
            raise ValueError(f"layer {prefix!r}: {name}: found {size}, expected at least 1")


def _check_one_rank(prefix: str, tp_size: int, tp_rank: int) -> None:
    if (tp_size, tp_rank) != (1, 0):
        raise ValueError(
            f"layer {prefix!r}: found tp_size {tp_size} and tp_rank {tp_rank}, expected 1 and 0: "
            "tensor parallelism is not yet supported"
        )
