"""Linear layers, quantized or not, and how checkpoint tensors get into them."""

from pymllm.layers.linear import (
    ColumnParallelLinear,
    Linear,
    LinearBase,
    MergedLinear,
    RowParallelLinear,
)
from pymllm.layers.quantize_base import (
    LinearMethodBase,
    QuantizeMethodBase,
    UnquantizedLinearMethod,
)

__all__ = [
    "ColumnParallelLinear",
    "Linear",
    "LinearBase",
    "LinearMethodBase",
    "MergedLinear",
    "QuantizeMethodBase",
    "RowParallelLinear",
    "UnquantizedLinearMethod",
]
