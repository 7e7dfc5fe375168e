"""An int8 layer on a GPU with random weights, and its exact result."""

from __future__ import annotations

import dataclasses

import torch

from pymllm_kernels import LinearProblem, device_facts, select_kernel
from pymllm_kernels.per_token_quant_int8 import reference as quant
from pymllm_kernels.w8a8_int8 import reference
from pymllm_kernels.w8a8_int8.layout import W8A8Weight
from pymllm_kernels.w8a8_int8.providers import W8A8Kernel


@dataclasses.dataclass
class Int8Layer:
    """A layer as a user has it.

    Attributes:
        problem: what it is.
        kernel: the one that is selected for it.
        weight: prepared.
        bias: of ``[N]`` or none.
    """

    problem: LinearProblem
    kernel: W8A8Kernel
    weight: W8A8Weight
    bias: torch.Tensor | None

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self.kernel.apply(self.problem, x, self.weight, self.bias)

    def exact(self, x: torch.Tensor) -> torch.Tensor:
        """The exact integers, the fp32 epilogue rounded once."""
        rows, zero = x.reshape(-1, x.shape[-1]), None
        if self.weight.input_scale is not None:
            scale, zero = self.weight.input_scale, self.weight.input_zero
            codes = quant.static_quant_int8(rows, scale, zero)
        elif self.problem.input_symmetric:
            codes, scale = quant.per_token_quant_int8(rows)
            scale = scale[:, None]
        else:
            codes, scale, zero = quant.per_token_quant_int8_asym(rows)
            scale, zero = scale[:, None], zero[:, None]
        acc = reference.int_matmul(codes, self.weight.weight)
        if zero is not None:
            assert self.weight.column_sum is not None
            acc = acc - zero * self.weight.column_sum
        out = (self.weight.scale * acc.float()).double() * scale.double()
        # fp64 makes the one rounding of the multiply-add exact.
        out = out if self.bias is None else out + self.bias.double()
        return out.float().to(x.dtype).view(*x.shape[:-1], self.problem.n)


def make_int8_layer(
    n: int, k: int, *, symmetric: bool = True, static: bool = False, bias: bool = False,
    dtype: torch.dtype = torch.bfloat16,
) -> Int8Layer:  # fmt: skip
    """A layer of N = n, K = k on the current GPU, whose activations are quantized as said."""
    strategy = "tensor" if static else "token"
    problem = LinearProblem(
        "w8a8_int8", n, k, 8, -1, True, False, dtype, torch.float32, device_facts("cuda"),
        strategy, symmetric,
    )  # fmt: skip
    kernel = select_kernel(problem).kernel
    assert isinstance(kernel, W8A8Kernel)
    g = torch.Generator(device="cuda").manual_seed(n + k)
    codes = torch.randint(-128, 128, (n, k), dtype=torch.int8, device="cuda", generator=g)
    scale = torch.rand(n, device="cuda", generator=g) * 1e-3
    zero = None if symmetric else torch.tensor([3], dtype=torch.int8, device="cuda")
    weight = kernel.prepare(
        problem, codes, scale, torch.tensor([0.03], device="cuda") if static else None,
        zero if static else None,
    )  # fmt: skip
    extra = torch.randn(n, device="cuda", generator=g).to(dtype) if bias else None
    return Int8Layer(problem, kernel, weight, extra)


def int8_inputs(m: int, k: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """Normal activations ``[m, k]`` on the current GPU."""
    return (torch.randn(m, k, device="cuda") * 2).to(dtype)
