"""Quantization schemes of a linear layer: its tensors, its kernel, its arithmetic."""

from pymllm.quantization.schemes.common import LinearScheme
from pymllm.quantization.schemes.w8a8_int8 import CompressedTensorsW8A8Int8Scheme
from pymllm.quantization.schemes.wna16 import CompressedTensorsWNA16Scheme

__all__ = ["CompressedTensorsW8A8Int8Scheme", "CompressedTensorsWNA16Scheme", "LinearScheme"]
