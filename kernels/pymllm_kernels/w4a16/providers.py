"""The ways to run a weight-only linear layer, in order of preference."""

from __future__ import annotations

from typing import Any

import torch

from pymllm_kernels import ops
from pymllm_kernels.common.eager import Prepared, eager_call
from pymllm_kernels.common.forms import Form
from pymllm_kernels.common.packing import unpack_words
from pymllm_kernels.common.support import why_not_gluon_hopper, why_not_triton
from pymllm_kernels.common.workspace import reserve_counters
from pymllm_kernels.problem import LinearCall, LinearKernel, LinearProblem, check_call
from pymllm_kernels.tuning import Tunable
from pymllm_kernels.w4a16 import api, reference
from pymllm_kernels.w4a16.api import W4A16Weight
from pymllm_kernels.w4a16.hopper_tuning import CODES
from pymllm_kernels.w4a16.layout import choose_layout
from pymllm_kernels.w4a16.tunable import HOPPER, TRITON, hopper_form

SCHEME = "w4a16"
# Times 2**100 it is no bf16 number: see ``hopper_block``.
_MOST_SCALE = 2.0**28


class W4A16Kernel(LinearKernel):
    """Base of the ways to run ``scheme == "w4a16"``."""

    def prepare(
        self,
        problem: LinearProblem,
        words: torch.Tensor,
        scale: torch.Tensor,
        zero: torch.Tensor | None,
        g_idx: torch.Tensor | None,
    ) -> W4A16Weight:
        """Converts a layer's checkpoint tensors, once.

        Args:
            problem: what the kernel was chosen for.
            words: int32 ``[N, ceil(K * bits / 32)]``.
            scale: floating ``[N, G]``.
            zero: uint8 ``[N, G]`` raw zero points, ``None`` if symmetric.
            g_idx: integer ``[K]``, the group of each input, ``None`` for neighbouring inputs.
        """
        raise NotImplementedError

    def apply(
        self,
        problem: LinearProblem,
        x: torch.Tensor,
        weight: W4A16Weight,
        bias: torch.Tensor | None,
    ) -> torch.Tensor:
        """``x [..., K]`` to ``[..., N]``."""
        raise NotImplementedError


class TritonW4A16(W4A16Kernel):
    """The fused Triton kernel."""

    name = "triton_w4a16"
    tunable: Tunable | None = TRITON

    def why_not(self, problem: LinearProblem) -> str | None:
        if reason := _wrong_scheme(problem) or why_not_triton(problem):
            return reason
        if problem.act_dtype not in api.ACT_DTYPES:
            # Exact fp32 products have no tensor-core path, and torch's sum in another order is up to
            # 2.5 times more accurate than a Triton loop.
            return f"takes bf16 or fp16 activations, found {problem.act_dtype}"
        return None

    def why(self, problem: LinearProblem) -> str:
        return "dequantization fused into the GEMM, any N, K and group size"

    def forms(
        self, problem: LinearProblem, m: int, *, bias: torch.dtype | None = None,
        config: Any = None,
    ) -> list[Form]:  # fmt: skip
        from pymllm_kernels.w4a16 import launch

        return launch.forms(problem, config or self.configured(problem, m), bias)

    def prepare(
        self,
        problem: LinearProblem,
        words: torch.Tensor,
        scale: torch.Tensor,
        zero: torch.Tensor | None,
        g_idx: torch.Tensor | None,
    ) -> W4A16Weight:
        return api.prepare(words, scale, zero, g_idx, bits=problem.weight_bits, k=problem.k)

    def apply(
        self,
        problem: LinearProblem,
        x: torch.Tensor,
        weight: W4A16Weight,
        bias: torch.Tensor | None,
    ) -> torch.Tensor:
        return api.w4a16_gemm(
            x, weight, bias, bits=problem.weight_bits, group_size=problem.group_size
        )


class HopperW4A16(TritonW4A16):
    """The fused kernel for Hopper; it reads the weights as ``TritonW4A16`` packs them."""

    name = "gluon_hopper_w4a16"
    tunable = HOPPER

    def why_not(self, problem: LinearProblem) -> str | None:
        return super().why_not(problem) or why_not_gluon_hopper(problem) or _why_not_tma(problem)

    def why(self, problem: LinearProblem) -> str:
        why = "dequantization between the copy engine and wgmma, one kernel"
        if problem.act_order:
            why += (
                ", after one that gathers activations (a single token of up to 8192 values itself)"
            )
        return why

    def forms(
        self, problem: LinearProblem, m: int, *, bias: torch.dtype | None = None,
        config: Any = None,
    ) -> list[Form]:  # fmt: skip
        from pymllm_kernels.w4a16 import hopper_launch

        block_k = choose_layout(problem.weight_bits, problem.k, problem.group_size).block_k
        layer = hopper_launch.HopperLayer(
            problem.n, problem.k, block_k, problem.group_size, problem.act_dtype,
            problem.scale_dtype, not problem.symmetric, bias, problem.act_order, problem.weight_bits,
        )  # fmt: skip
        return hopper_launch.forms(layer, config or self.configured(problem, m))

    def prepare(
        self,
        problem: LinearProblem,
        words: torch.Tensor,
        scale: torch.Tensor,
        zero: torch.Tensor | None,
        g_idx: torch.Tensor | None,
    ) -> W4A16Weight:
        """See the base class.

        Raises:
            ValueError: a scale is beyond what the kernel multiplies codes with.
        """
        # Where any tile has scales on codes, those of most tokens do.
        form = hopper_form(HOPPER.key_of(problem))
        if form.scale(256) == CODES and scale.numel():
            most = float(scale.abs().max())
            if most >= _MOST_SCALE:
                raise ValueError(f"scale: found up to {most:.3g}, accepted below {_MOST_SCALE:.3g}")
        if words.device.type == "cuda":
            reserve_counters(words.device)
        return super().prepare(problem, words, scale, zero, g_idx)

    def bind(self, problem: LinearProblem, weight: W4A16Weight) -> LinearCall:
        return eager_call(self, problem, weight.weight.get_device()).__call__

    def find(
        self,
        problem: LinearProblem,
        x: torch.Tensor,
        weight: W4A16Weight,
        bias: torch.Tensor | None,
    ) -> Prepared | None:
        """What launches the layer for an ``x [M, K]``, M > 0, on the current device.

        ``None`` if such an ``x`` has to be copied first.
        """
        from pymllm_kernels.w4a16 import hopper_launch

        return hopper_launch.find(x, weight, bias, problem.group_size, problem.weight_bits)

    def apply(
        self,
        problem: LinearProblem,
        x: torch.Tensor,
        weight: W4A16Weight,
        bias: torch.Tensor | None,
    ) -> torch.Tensor:
        check_call(x, weight.weight, bias, problem.n)
        return ops.w4a16_gemm_hopper(
            x, weight.weight, weight.scale, weight.zero, weight.input_perm, bias,
            problem.group_size, problem.weight_bits,
        )  # fmt: skip


class CpuInt4Pack(W4A16Kernel):
    """torch's fused int4 CPU operator, ``_weight_int4pack_mm_for_cpu``."""

    name = "cpu_int4pack"
    group_sizes = (32, 64, 128, 256)

    def why_not(self, problem: LinearProblem) -> str | None:
        if reason := _wrong_scheme(problem):
            return reason
        if problem.device.type != "cpu":
            return f"runs on a CPU, the device is {problem.device.name}"
        if problem.weight_bits != 4:
            return f"takes weights of 4 bits, found {problem.weight_bits}"
        if problem.act_dtype not in api.ACT_DTYPES:
            return f"rounds products to 16 bits, found {problem.act_dtype} activations"
        if not problem.symmetric:
            return "takes zero points only folded into 16-bit offsets, which rounds them"
        if problem.group_size not in self.group_sizes:
            return f"takes group sizes {self.group_sizes}, found {problem.group_size}"
        if problem.act_order:
            return "takes neighbouring inputs as groups, found act-order"
        if problem.scale_dtype != problem.act_dtype:
            return f"takes scales in the activations' dtype, found {problem.scale_dtype}"
        if problem.n % 16:
            return f"takes N a multiple of 16, found {problem.n}"
        return None

    def why(self, problem: LinearProblem) -> str:
        return "torch's own fused int4 operator for CPUs"

    def prepare(
        self,
        problem: LinearProblem,
        words: torch.Tensor,
        scale: torch.Tensor,
        zero: torch.Tensor | None,
        g_idx: torch.Tensor | None,
    ) -> W4A16Weight:
        codes = unpack_words(words, 4, problem.k).to(torch.int32)
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
        # [G, N, 2]: the scale, and the value of code 8, which is zero for symmetric weights.
        scales = torch.stack((scale.T, torch.zeros_like(scale.T)), dim=-1).contiguous()
        return W4A16Weight(packed, scales)

    def apply(
        self,
        problem: LinearProblem,
        x: torch.Tensor,
        weight: W4A16Weight,
        bias: torch.Tensor | None,
    ) -> torch.Tensor:
        rows = x.reshape(-1, problem.k).contiguous()
        out: torch.Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(
            rows, weight.weight, problem.group_size, weight.scale
        )
        if bias is not None:
            out = out + bias.to(out.dtype)
        return out.view(*x.shape[:-1], problem.n)


class TorchW4A16(W4A16Kernel):
    """Dequantize and multiply in plain torch: right everywhere, fast nowhere."""

    name = "torch_w4a16"

    def why_not(self, problem: LinearProblem) -> str | None:
        return _wrong_scheme(problem)

    def why(self, problem: LinearProblem) -> str:
        return "plain torch, dequantizes the weight at every call"

    def prepare(
        self,
        problem: LinearProblem,
        words: torch.Tensor,
        scale: torch.Tensor,
        zero: torch.Tensor | None,
        g_idx: torch.Tensor | None,
    ) -> W4A16Weight:
        return W4A16Weight(words, scale, zero, None if g_idx is None else g_idx.to(torch.int32))

    def apply(
        self,
        problem: LinearProblem,
        x: torch.Tensor,
        weight: W4A16Weight,
        bias: torch.Tensor | None,
    ) -> torch.Tensor:
        # torch's matmul sums in another order for other strides: a view then differs from its copy.
        return reference.linear(
            x.contiguous(), weight.weight, weight.scale, weight.zero, weight.group_index, bias,
            problem.weight_bits,
        )  # fmt: skip


def _wrong_scheme(problem: LinearProblem) -> str | None:
    return None if problem.scheme == SCHEME else f"runs {SCHEME}, found {problem.scheme}"


def _why_not_tma(problem: LinearProblem) -> str | None:
    """Why the layer's tensors are not what the copy engine and the kernel's loop take."""
    if problem.scale_dtype not in api.ACT_DTYPES:
        return f"takes scales in bf16 or fp16, found {problem.scale_dtype}"
    if problem.n % 16:
        return f"copies rows of scales in 16 bytes: takes N a multiple of 16, found {problem.n}"
    if problem.k % 8:
        return f"copies activations in 16 bytes: takes K a multiple of 8, found {problem.k}"
    group = problem.group_size
    block_k = choose_layout(problem.weight_bits, problem.k, group).block_k
    if group != -1 and group % block_k and group not in (block_k // 2, block_k // 4):
        return (
            f"takes group sizes {block_k // 4}, {block_k // 2} and multiples of {block_k} "
            f"at K = {problem.k}, found {group}"
        )
    return None


PROVIDERS: tuple[W4A16Kernel, ...] = (
    HopperW4A16(),
    TritonW4A16(),
    CpuInt4Pack(),
    TorchW4A16(),
)
