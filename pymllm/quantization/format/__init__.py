"""Reading ``compressed-tensors`` quantization configs, without building anything."""

from pymllm.quantization.format.arguments import QuantArgs, parse_arguments
from pymllm.quantization.format.block import QuantBlock, find_quantization_block, parse_block
from pymllm.quantization.format.matching import (
    DEFAULT_PACKED_MODULES_MAPPING,
    class_names_of,
    resolve,
)
from pymllm.quantization.format.scheme import LayerScheme, parse_group

__all__ = [
    "DEFAULT_PACKED_MODULES_MAPPING",
    "LayerScheme",
    "QuantArgs",
    "QuantBlock",
    "class_names_of",
    "find_quantization_block",
    "parse_arguments",
    "parse_block",
    "parse_group",
    "resolve",
]
