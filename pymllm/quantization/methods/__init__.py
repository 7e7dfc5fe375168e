"""Quantization methods; importing this package registers them."""

from pymllm.quantization.methods.compressed_tensors import (
    CompressedTensorsConfig,
    CompressedTensorsLinearMethod,
)

__all__ = ["CompressedTensorsConfig", "CompressedTensorsLinearMethod"]
