"""The ``compressed-tensors`` method: from a checkpoint's config to the method of one layer."""

from __future__ import annotations

from typing import Any

import torch

from pymllm.layers.quantize_base import LinearMethodBase
from pymllm.quantization.format import (
    DEFAULT_PACKED_MODULES_MAPPING,
    LayerScheme,
    QuantArgs,
    QuantBlock,
    class_names_of,
    find_quantization_block,
    parse_block,
    resolve,
)
from pymllm.quantization.format.block import METHOD_NAME
from pymllm.quantization.marlin import (
    GPTQ_MARLIN_MIN_THREAD_K,
    GPTQ_MARLIN_MIN_THREAD_N,
    GPTQ_MARLIN_TILE,
    MARLIN_SUPPORTED_GROUP_SIZES,
    SCALAR_TYPE_UINT4,
    SCALAR_TYPE_UINT4B8,
    get_scale_perms,
    marlin_make_empty_g_idx,
    marlin_make_workspace,
    marlin_permute_scales,
    replace_parameter,
    verify_marlin_supported,
    verify_marlin_supports_shape,
)
from pymllm.quantization.quant_config import QuantizationConfig, register_quantization
from pymllm.quantization.schemes.w8a8_int8 import CompressedTensorsW8A8Int8Scheme
from pymllm.quantization.schemes.wna16 import CompressedTensorsWNA16Scheme

__all__ = [
    "GPTQ_MARLIN_MIN_THREAD_K",
    "GPTQ_MARLIN_MIN_THREAD_N",
    "GPTQ_MARLIN_TILE",
    "MARLIN_SUPPORTED_GROUP_SIZES",
    "SCALAR_TYPE_UINT4",
    "SCALAR_TYPE_UINT4B8",
    "CompressedTensorsConfig",
    "CompressedTensorsLinearMethod",
    "CompressedTensorsW8A8Int8Scheme",
    "CompressedTensorsWNA16Scheme",
    "get_scale_perms",
    "marlin_make_empty_g_idx",
    "marlin_make_workspace",
    "marlin_permute_scales",
    "replace_parameter",
    "verify_marlin_supported",
    "verify_marlin_supports_shape",
]

# What the flat attributes say when no group quantizes anything.
_UNQUANTIZED_WEIGHTS = QuantArgs(num_bits=16, type="float")


@register_quantization(METHOD_NAME)
class CompressedTensorsConfig(QuantizationConfig):
    """Quantization of one checkpoint in the ``compressed-tensors`` format.

    :meth:`from_config` reads a checkpoint's block, with any number of groups. The constructor
    describes one group that targets every ``Linear``. Either way the flat attributes describe
    the first group; :meth:`resolve` answers for any layer.

    Attributes:
        quant_format: storage format of the first group, e.g. ``"pack-quantized"``.
        ignore: entries of layers that stay unquantized (names, ``re:`` patterns or class
            names), as written. A copy: changing it has no effect.
        weight_bits: bits of a weight code; 16 when the checkpoint has no group.
        group_size: inputs that share a weight scale, as written; None or -1 when a whole
            output channel (or tensor) does.
        weight_strategy: ``"group"``, ``"channel"`` or ``"tensor"``.
        weight_type: ``"int"``.
        weight_dynamic: False.
        symmetric: True when weights have no zero point.
        actorder: ``"group"``, ``"weight"`` or None; the format's aliases are resolved.
        input_bits: bits of an input code, or None when inputs are not quantized.
        input_strategy: ``"token"``, ``"tensor"`` or None.
        input_type: ``"int"`` or None.
        input_dynamic: True when input scales are computed at run time.
        input_symmetric: True when inputs have no zero point.
        packed_modules_mapping: last name component of a fused layer -> those of its shards.
            Engines that fuse other layers may extend it before the layers are built.
    """

    def __init__(
        self,
        *,
        quant_format: str,
        ignore: list[str],
        weight_bits: int,
        group_size: int | None,
        weight_strategy: str | None,
        weight_type: str | None,
        weight_dynamic: bool,
        symmetric: bool,
        actorder: str | None,
        input_bits: int | None,
        input_strategy: str | None,
        input_type: str | None,
        input_dynamic: bool,
        input_symmetric: bool,
    ) -> None:
        """Describe one group, ``group_0``, that targets every ``Linear``.

        The arguments are those of a checkpoint's block and are checked like them; inputs are
        not quantized when ``input_bits`` is None.

        Raises:
            ValueError: a value is outside the format or cannot be executed.
        """
        group: dict[str, Any] = {
            "targets": ["Linear"],
            "weights": {
                "num_bits": weight_bits,
                "type": weight_type,
                "symmetric": symmetric,
                "strategy": weight_strategy,
                "group_size": group_size,
                "dynamic": weight_dynamic,
                "actorder": actorder,
            },
        }
        if input_bits is not None:
            group["input_activations"] = {
                "num_bits": input_bits,
                "type": input_type,
                "symmetric": input_symmetric,
                "strategy": input_strategy,
                "dynamic": input_dynamic,
            }
        raw = {"format": quant_format, "ignore": ignore, "config_groups": {"group_0": group}}
        self._take(parse_block(raw))

    def _take(self, block: QuantBlock) -> None:
        """Set every attribute from a checked block."""
        self._block = block
        first = block.schemes[0] if block.schemes else None
        weights = _UNQUANTIZED_WEIGHTS if first is None else first.weights
        inputs = None if first is None else first.inputs
        self.quant_format: str = first.format if first else block.format or "dense"
        self.ignore: list[str] = list(block.ignore)
        self.weight_bits: int = weights.num_bits
        self.group_size: int | None = weights.group_size
        self.weight_strategy: str | None = weights.strategy if first else None
        self.weight_type: str | None = weights.type if first else None
        self.weight_dynamic: bool = bool(weights.dynamic)
        self.symmetric: bool = weights.symmetric
        self.actorder: str | None = weights.actorder
        self.input_bits: int | None = inputs.num_bits if inputs else None
        self.input_strategy: str | None = inputs.strategy if inputs else None
        self.input_type: str | None = inputs.type if inputs else None
        self.input_dynamic: bool = bool(inputs and inputs.dynamic)
        self.input_symmetric: bool = inputs.symmetric if inputs else True
        self.packed_modules_mapping: dict[str, list[str]] = {
            fused: list(shards) for fused, shards in DEFAULT_PACKED_MODULES_MAPPING.items()
        }

    def get_name(self) -> str:
        """``"compressed-tensors"``."""
        return METHOD_NAME

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        """bfloat16, float16 and float32."""
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        """75: nothing here has been checked on older GPUs.

        Triton kernels start at 80; 75 runs the torch path.
        """
        return 75

    @staticmethod
    def get_config_filenames() -> list[str]:
        """``config.json``, the only file the format puts its block in."""
        return ["config.json"]

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> CompressedTensorsConfig:
        """Read a checkpoint's quantization block.

        Args:
            config: the block, or the whole ``config.json`` that contains it.

        Raises:
            ValueError: the block is malformed, or describes something that cannot be
                executed; the message names group and field.
        """
        raw = config
        if isinstance(config, dict) and "config_groups" not in config:
            raw = find_quantization_block(config) or config
        self = cls.__new__(cls)
        self._take(parse_block(raw))
        return self

    @property
    def schemes(self) -> tuple[LayerScheme, ...]:
        """Schemes of all config groups, in the order of the block."""
        return self._block.schemes

    def resolve(self, prefix: str, layer: torch.nn.Module | None = None) -> LayerScheme | None:
        """Scheme of one layer, or None when it is not quantized; builds nothing.

        Args:
            prefix: the layer's full dotted name as the checkpoint spells it, with the fused
                name for a fused layer.
            layer: the module; only its class matters. None stands for an ``nn.Linear``.

        Raises:
            ValueError: the shards of a fused layer differ; the message names layer and shards.
        """
        names = class_names_of(layer)
        return resolve(self._block, prefix, names, self.packed_modules_mapping)

    def get_quant_method(
        self, layer: torch.nn.Module, prefix: str = ""
    ) -> CompressedTensorsLinearMethod | None:
        """Quantization method of one layer, or None when it is ignored or not targeted.

        Class targets such as ``Linear`` match the module's class and its ``nn.Module``
        parents by name; a layer class that stands for ``nn.Linear`` derives from it or from
        a class called ``LinearBase``.

        Args:
            layer: the module under construction.
            prefix: its full dotted name as the checkpoint spells it.

        Raises:
            ValueError: the shards of a fused layer differ, or the layer is an embedding that
                the checkpoint quantizes.
        """
        scheme = self.resolve(prefix, layer)
        if scheme is None:
            return None
        is_embedding = isinstance(layer, (torch.nn.Embedding, torch.nn.EmbeddingBag))
        if is_embedding:
            raise ValueError(
                f"layer {prefix!r}: found {type(layer).__name__}, quantized by group "
                f"{scheme.group!r}; accepted: linear layers"
            )
        return CompressedTensorsLinearMethod(self, self._signature_of(scheme))

    def _signature_of(self, scheme: LayerScheme) -> str:
        if scheme is self._block.schemes[0]:
            return scheme.signature
        return f"{scheme.signature}:{scheme.group}"


class CompressedTensorsLinearMethod(LinearMethodBase):
    """Quantization method of one linear layer: forwards everything to the layer's scheme.

    Attributes:
        quant_config: the configuration it came from.
        scheme: object that creates the weights, prepares them after loading and multiplies.
    """

    def __init__(self, quant_config: CompressedTensorsConfig, signature: str) -> None:
        """Pick the scheme that ``signature`` names.

        Args:
            quant_config: the checkpoint's configuration.
            signature: ``"w4a16"``, ``"w8a16"`` or ``"w8a8"`` for the first config group, or
                the same followed by ``":"`` and a group name for any group.

        Raises:
            ValueError: no group has this signature; the message lists the valid ones.
        """
        valid = {f"{scheme.signature}:{scheme.group}": scheme for scheme in quant_config.schemes}
        if quant_config.schemes:
            first = quant_config.schemes[0]
            valid = {first.signature: first, **valid}
        if signature not in valid:
            accepted = ", ".join(repr(known) for known in valid) or "none, no layer is quantized"
            raise ValueError(f"signature: found {signature!r}; accepted: {accepted}")
        self.quant_config = quant_config
        self.scheme = _build_scheme(valid[signature])

    def create_weights(self, *args: Any, **kwargs: Any) -> None:
        """Register the layer's quantized parameters; arguments as in the base class."""
        self.scheme.create_weights(*args, **kwargs)

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        """Turn loaded tensors into the layout the kernels read; call once per load."""
        self.scheme.process_weights_after_loading(layer)

    def apply(
        self, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Quantized ``x @ W.T + bias``.

        Args:
            layer: module that owns the parameters.
            x: input, shape ``[..., K]``, bfloat16, float16 or float32.
            bias: shape ``[N]``, or None.

        Returns:
            Shape ``[..., N]``, dtype of ``x``.
        """
        return self.scheme.apply(layer, x, bias)


def _build_scheme(
    scheme: LayerScheme,
) -> CompressedTensorsWNA16Scheme | CompressedTensorsW8A8Int8Scheme:
    weights, inputs = scheme.weights, scheme.inputs
    if inputs is None:
        return CompressedTensorsWNA16Scheme(
            weight_bits=weights.num_bits,
            group_size=weights.columns_per_scale,
            symmetric=weights.symmetric,
            actorder=weights.actorder,
        )
    return CompressedTensorsW8A8Int8Scheme(
        weight_bits=weights.num_bits,
        weight_strategy=weights.strategy,
        input_strategy=inputs.strategy,
        input_dynamic=bool(inputs.dynamic),
        input_symmetric=inputs.symmetric,
    )
