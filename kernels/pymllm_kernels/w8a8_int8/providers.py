"""The ways to run an int8 layer with int8 activations, in order of preference."""

from __future__ import annotations

from typing import Any

import torch

from pymllm_kernels import ops
from pymllm_kernels.common.eager import Prepared, eager_call
from pymllm_kernels.common.forms import Form
from pymllm_kernels.common.support import why_not_gluon_hopper, why_not_triton
from pymllm_kernels.per_token_quant_int8 import api as quant_api
from pymllm_kernels.per_token_quant_int8 import reference as quant_reference
from pymllm_kernels.problem import LinearCall, LinearKernel, LinearProblem, check_call
from pymllm_kernels.w8a8_int8 import api, reference
from pymllm_kernels.w8a8_int8.layout import W8A8Weight, column_sum
from pymllm_kernels.w8a8_int8.tunable import HOPPER, TRITON

SCHEME = "w8a8_int8"


class W8A8Kernel(LinearKernel):
    """Base of the ways to run ``scheme == "w8a8_int8"``."""

    def prepare(
        self,
        problem: LinearProblem,
        weight: torch.Tensor,
        scale: torch.Tensor,
        input_scale: torch.Tensor | None = None,
        input_zero: torch.Tensor | None = None,
    ) -> W8A8Weight:
        """Takes a layer's checkpoint tensors; the int8 weight is used as it is.

        Args:
            problem: what the kernel was chosen for.
            weight: int8 ``[N, K]``.
            scale: floating ``[N]`` or ``[1]``.
            input_scale: floating ``[1]`` for static activations.
            input_zero: int8 or int32 ``[1]`` for static asymmetric activations.
        """
        return W8A8Weight(
            weight,
            scale.to(torch.float32),
            None if problem.input_symmetric else column_sum(weight),
            None if input_scale is None else input_scale.to(torch.float32),
            None if input_zero is None else input_zero.to(torch.int32),
        )

    def apply(
        self,
        problem: LinearProblem,
        x: torch.Tensor,
        weight: W8A8Weight,
        bias: torch.Tensor | None,
    ) -> torch.Tensor:
        """``x [..., K]`` to ``[..., N]``."""
        raise NotImplementedError


class HopperW8A8(W8A8Kernel):
    """Triton quantization of the activation, then the int8 GEMM for Hopper."""

    name = "gluon_hopper_w8a8_int8"
    tunable = HOPPER

    def why_not(self, problem: LinearProblem) -> str | None:
        return (
            _unfit(problem)
            or why_not_triton(problem)
            or why_not_gluon_hopper(problem)
            or _why_not_tma(problem)
        )

    def why(self, problem: LinearProblem) -> str:
        return "int8 wgmma fed by the copy engine, weights read while few tokens are quantized"

    def forms(
        self, problem: LinearProblem, m: int, *, bias: torch.dtype | None = None,
        config: Any = None,
    ) -> list[Form]:  # fmt: skip
        from pymllm_kernels.w8a8_int8 import hopper_launch
        from pymllm_kernels.w8a8_int8.hopper_layer import HopperLayer

        layer = HopperLayer(
            problem.n, problem.k, problem.act_dtype, True, problem.input_strategy == "tensor",
            not problem.input_symmetric, bias,
        )  # fmt: skip
        config = config or self.configured(problem, m)
        return hopper_launch.forms(layer, config, m, problem.device)

    def prepare(
        self,
        problem: LinearProblem,
        weight: torch.Tensor,
        scale: torch.Tensor,
        input_scale: torch.Tensor | None = None,
        input_zero: torch.Tensor | None = None,
    ) -> W8A8Weight:
        weight = weight.contiguous()
        if weight.data_ptr() % 16:
            # A view into a file's bytes: the copy engine reads from multiples of 16.
            weight = weight.clone()
        return super().prepare(problem, weight, scale, input_scale, input_zero)

    def bind(self, problem: LinearProblem, weight: W8A8Weight) -> LinearCall:
        channel = weight.scale.numel() > 1
        return eager_call(self, problem, weight.weight.get_device(), channel).__call__

    def find(
        self,
        problem: LinearProblem,
        x: torch.Tensor,
        weight: W8A8Weight,
        bias: torch.Tensor | None,
    ) -> Prepared:
        """What launches the layer for an ``x [M, K]``, M > 0, on the current device."""
        from pymllm_kernels.w8a8_int8 import hopper_launch

        return hopper_launch.find(x, weight, bias, problem.input_symmetric)

    def apply(
        self,
        problem: LinearProblem,
        x: torch.Tensor,
        weight: W8A8Weight,
        bias: torch.Tensor | None,
    ) -> torch.Tensor:
        check_call(x, weight.weight, bias, problem.n)
        return ops.w8a8_int8_linear(
            x, weight.weight, weight.scale, weight.column_sum, weight.input_scale,
            weight.input_zero, bias, problem.input_symmetric,
        )  # fmt: skip


class TritonW8A8(W8A8Kernel):
    """Triton quantization of the activation, then the Triton int8 GEMM."""

    name = "triton_w8a8_int8"
    tunable = TRITON

    def why_not(self, problem: LinearProblem) -> str | None:
        return _unfit(problem) or why_not_triton(problem)

    def why(self, problem: LinearProblem) -> str:
        return "int8 tensor cores, scales, zero points and bias in the epilogue"

    def forms(
        self, problem: LinearProblem, m: int, *, bias: torch.dtype | None = None,
        config: Any = None,
    ) -> list[Form]:  # fmt: skip
        from pymllm_kernels.w8a8_int8 import launch

        return launch.forms(problem, config or self.configured(problem, m), bias)

    def apply(
        self,
        problem: LinearProblem,
        x: torch.Tensor,
        weight: W8A8Weight,
        bias: torch.Tensor | None,
    ) -> torch.Tensor:
        zero = None
        if weight.input_scale is not None:
            scale, zero = weight.input_scale, weight.input_zero
            codes = quant_api.static_quant_int8(x, scale, zero)
        elif problem.input_symmetric:
            codes, scale = quant_api.per_token_quant_int8(x)
        else:
            codes, scale, zero = quant_api.per_token_quant_int8_asym(x)
        return api.w8a8_int8_gemm(
            codes, weight.weight, scale, weight.scale,
            out_dtype=x.dtype, x_zero=zero, w_column_sum=weight.column_sum, bias=bias,
        )  # fmt: skip


class _TorchQuantized(W8A8Kernel):
    """Quantization and epilogue in plain torch around some int8 matmul."""

    def apply(
        self,
        problem: LinearProblem,
        x: torch.Tensor,
        weight: W8A8Weight,
        bias: torch.Tensor | None,
    ) -> torch.Tensor:
        rows = x.reshape(-1, problem.k)
        zero = None
        if weight.input_scale is not None:
            scale, zero = weight.input_scale, weight.input_zero
            codes = quant_reference.static_quant_int8(rows, scale, zero)
        elif problem.input_symmetric:
            codes, scale = quant_reference.per_token_quant_int8(rows)
            scale = scale[:, None]
        else:
            codes, scale, zero = quant_reference.per_token_quant_int8_asym(rows)
            scale, zero = scale[:, None], zero[:, None]
        acc = self.matmul(codes, weight.weight)
        out = reference.epilogue(acc, scale, weight.scale, zero, weight.column_sum, bias, x.dtype)
        return out.view(*x.shape[:-1], problem.n)

    def matmul(self, codes: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """int32 ``[M, N]`` = int8 ``codes [M, K] @ weight [N, K].T``."""
        raise NotImplementedError


class TorchIntMm(_TorchQuantized):
    """``torch._int_mm``: integer tensor cores through cuBLAS, or the CPU's int8 instructions."""

    name = "torch_int_mm"
    # cuBLAS refuses fewer rows than this.
    min_rows = 32

    def why_not(self, problem: LinearProblem) -> str | None:
        if reason := _unfit(problem):
            return reason
        device = problem.device
        if device.type == "hip":
            return "not checked on AMD GPUs"
        if device.type == "cpu":
            return None
        if device.capability is not None and device.capability < (7, 5):
            return "needs capability 7.5 (int8 tensor cores), found {}.{}".format(
                *device.capability
            )
        for name, size in (("N", problem.n), ("K", problem.k)):
            if size % 8:
                return f"cuBLAS takes {name} a multiple of 8, found {size}"
        return None

    def why(self, problem: LinearProblem) -> str:
        return "torch's own int8 matmul, quantization and epilogue in plain torch"

    def matmul(self, codes: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        rows = codes.shape[0]
        if codes.device.type == "cuda" and rows < self.min_rows:
            codes = torch.nn.functional.pad(codes, (0, 0, 0, self.min_rows - rows))
        return torch._int_mm(codes, weight.T)[:rows]


class TorchW8A8(_TorchQuantized):
    """Plain torch with an exact fp64 product: right everywhere, fast nowhere."""

    name = "torch_w8a8_int8"

    def why_not(self, problem: LinearProblem) -> str | None:
        return _unfit(problem)

    def why(self, problem: LinearProblem) -> str:
        return "plain torch, exact integer product through fp64"

    def matmul(self, codes: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return reference.int_matmul(codes, weight)


def _unfit(problem: LinearProblem) -> str | None:
    if problem.scheme != SCHEME:
        return f"runs {SCHEME}, found {problem.scheme}"
    if problem.k > api.MAX_K:
        return f"takes K up to {api.MAX_K} (int32 sums), found {problem.k}"
    return None


def _why_not_tma(problem: LinearProblem) -> str | None:
    """Why the layer's tensors are not what the copy engine takes: rows of a multiple of 16 bytes."""
    if problem.act_dtype not in (torch.bfloat16, torch.float16):
        return f"takes bf16 or fp16 activations, found {problem.act_dtype}"
    if problem.k % 16:
        return f"copies codes in 16 bytes: takes K a multiple of 16, found {problem.k}"
    if problem.n % 8:
        return f"copies outputs in 16 bytes: takes N a multiple of 8, found {problem.n}"
    return None


PROVIDERS: tuple[W8A8Kernel, ...] = (HopperW8A8(), TritonW8A8(), TorchIntMm(), TorchW8A8())
