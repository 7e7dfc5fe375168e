"""The int8 kernels as the tuner and the lookup see them.

Variants of a key: ``zero`` (activations with a zero point) and ``static`` for the Hopper kernel, whose
configuration also says how the quantization of the activation overlaps with it; none for the plain one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import ClassVar

import torch

from pymllm_kernels.common.sharing import STREAM_K
from pymllm_kernels.device import DeviceFacts
from pymllm_kernels.problem import CHANNEL, LinearProblem
from pymllm_kernels.tuning.keys import TuningKey, dtype_name
from pymllm_kernels.tuning.tunable import Config, Tunable
from pymllm_kernels.w8a8_int8 import (
    hopper_decode_tuning,
    hopper_fused_tuning,
    hopper_tuning,
    tuning,
)
from pymllm_kernels.w8a8_int8.hopper_decode_tuning import DecodeConfig
from pymllm_kernels.w8a8_int8.hopper_fused_tuning import FusedConfig
from pymllm_kernels.w8a8_int8.hopper_tuning import HopperConfig, plan_launch


class HopperTunable(Tunable):
    """``gluon_hopper_w8a8_int8``: the quantization and the GEMM, timed together."""

    operation = "gluon_hopper_w8a8_int8"
    kernels: ClassVar = {
        "tiles": HopperConfig, "decode": DecodeConfig, "fused": FusedConfig,
    }  # fmt: skip
    sources = (
        "pymllm_kernels.w8a8_int8.hopper_decode:w8a8_int8_decode_hopper",
        "pymllm_kernels.w8a8_int8.hopper:w8a8_int8_hopper_kernel",
        "pymllm_kernels.w8a8_int8.hopper_fused:w8a8_int8_fused_hopper",
        "pymllm_kernels.per_token_quant_int8.kernel:per_token_quant_kernel",
        "pymllm_kernels.per_token_quant_int8.kernel:static_quant_kernel",
    )

    def key_of(self, problem: LinearProblem) -> TuningKey:
        return hopper_key(
            problem.n, problem.k, problem.act_dtype, problem.input_symmetric,
            problem.input_strategy == "tensor",
        )  # fmt: skip

    def like(self, key: TuningKey) -> TuningKey | None:
        # The GEMM is the same but for its epilogue.
        like = replace(key, dtype="bfloat16", variant="")
        return None if like == key else like

    def rule(self, key: TuningKey, m: int, facts: DeviceFacts) -> Config:
        return hopper_tuning.choose_config(
            m, key.n, key.k, facts.multiprocessors, facts.shared_memory, key.variant
        )

    def candidates(self, key: TuningKey, m: int, facts: DeviceFacts) -> Sequence[Config]:
        found = hopper_tuning.all_candidates(
            m, key.n, key.k, facts.multiprocessors, facts.shared_memory, key.variant
        )
        return [config for _, config in sorted(found, key=lambda item: item[0])]

    def why_invalid(self, config: Config, key: TuningKey, m: int, facts: DeviceFacts) -> str | None:
        if isinstance(config, DecodeConfig):
            return hopper_decode_tuning.why_invalid(config, m, facts.shared_memory)
        if isinstance(config, FusedConfig):
            return hopper_fused_tuning.why_invalid(config, m, key.k, facts.shared_memory)
        reason = hopper_tuning.why_invalid(config, facts.shared_memory)
        if reason is None and not _planned(config, key, m, facts):
            return f"{config} cannot share the tiles of [{m}, {key.k}] x {key.n}"
        return reason

    def adapt(self, config: Config, key: TuningKey, m: int, facts: DeviceFacts) -> Config:
        if not isinstance(config, HopperConfig):
            return config
        # With as many tiles as multiprocessors or more there is nothing to share.
        if config.share == STREAM_K and not _planned(config, key, m, facts):
            return replace(config, share=1, meet=False)
        return config

    def borrowed(self, config: Config, key: TuningKey, m: int, facts: DeviceFacts) -> Config:
        # The GEMM is the same, but not the time a program takes to quantize the tokens itself.
        other = self.rule(key, m, facts) if isinstance(config, FusedConfig) else config
        return config if isinstance(other, FusedConfig) else other


class TritonTunable(Tunable):
    """``triton_w8a8_int8``: the GEMM alone."""

    operation = "triton_w8a8_int8"
    kernels: ClassVar = {"tiles": tuning.Config}
    sources = ("pymllm_kernels.w8a8_int8.kernel:w8a8_int8_gemm_kernel",)

    def key_of(self, problem: LinearProblem) -> TuningKey:
        return triton_key(problem.n, problem.k, problem.act_dtype)

    def rule(self, key: TuningKey, m: int, facts: DeviceFacts) -> Config:
        return tuning.choose_config(m, key.k, facts)

    def candidates(self, key: TuningKey, m: int, facts: DeviceFacts) -> Sequence[Config]:
        first = self.rule(key, m, facts)
        found = [first]
        for tile in tuning.tiles(key.k):
            if first.block_m <= 2 * tile.block_m <= 4 * first.block_m:
                found += [replace(tile, num_stages=stages) for stages in (4, 3, 2, 5)]
        valid = (c for c in found if self.why_invalid(c, key, m, facts) is None)
        return list(dict.fromkeys(valid))

    def why_invalid(self, config: Config, key: TuningKey, m: int, facts: DeviceFacts) -> str | None:
        return tuning.why_invalid(config, facts)


HOPPER = HopperTunable()
TRITON = TritonTunable()


def hopper_key(n: int, k: int, act_dtype: torch.dtype, symmetric: bool, static: bool) -> TuningKey:
    """The key of a layer of :data:`HOPPER`: are activations without zero point, is their scale given."""
    words = ([] if symmetric else ["zero"]) + (["static"] if static else [])
    return TuningKey(HOPPER.operation, n, k, CHANNEL, dtype_name(act_dtype), " ".join(words))


def triton_key(n: int, k: int, out_dtype: torch.dtype) -> TuningKey:
    """The key of a layer of :data:`TRITON`."""
    return TuningKey(TRITON.operation, n, k, CHANNEL, dtype_name(out_dtype))


def _planned(config: HopperConfig, key: TuningKey, m: int, facts: DeviceFacts) -> bool:
    return plan_launch(config, m, key.n, key.k, facts.multiprocessors) is not None
