"""Triton kernels for quantized linear layers, and the choice among them.

Importing this package touches neither a GPU nor Triton.
"""

from pymllm_kernels import ops as _ops  # noqa: F401  registers the torch operators
from pymllm_kernels.common.specialization import Counts, counters
from pymllm_kernels.device import DeviceFacts, device_facts, planned_device
from pymllm_kernels.per_token_quant_int8.api import (
    per_token_quant_int8,
    per_token_quant_int8_asym,
    static_quant_int8,
)
from pymllm_kernels.problem import CHANNEL, LinearKernel, LinearProblem, WrongInputsError
from pymllm_kernels.selection import KernelChoice, Refusal, kernel_names, select_kernel
from pymllm_kernels.w4a16.api import W4A16Weight, w4a16_gemm
from pymllm_kernels.w8a8_int8.api import w8a8_int8_gemm
from pymllm_kernels.w8a8_int8.layout import W8A8Weight

__all__ = [
    "CHANNEL",
    "Counts",
    "DeviceFacts",
    "KernelChoice",
    "LinearKernel",
    "LinearProblem",
    "Refusal",
    "W4A16Weight",
    "W8A8Weight",
    "WrongInputsError",
    "counters",
    "device_facts",
    "kernel_names",
    "per_token_quant_int8",
    "per_token_quant_int8_asym",
    "planned_device",
    "select_kernel",
    "static_quant_int8",
    "w4a16_gemm",
    "w8a8_int8_gemm",
]
