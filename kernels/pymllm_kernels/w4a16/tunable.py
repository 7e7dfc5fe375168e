"""The weight-only kernels as the tuner and the lookup see them.

Variants of a key: ``bits=8``, ``zero`` (zero points), ``scale=DTYPE`` (scales in another dtype than the
activations) and ``act-order`` for the Hopper kernels; ``bits=8`` and ``spans`` (slices that span groups) for the
plain one.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import replace
from typing import ClassVar

import torch

from pymllm_kernels.common.sharing import even_runs
from pymllm_kernels.device import DeviceFacts
from pymllm_kernels.problem import CHANNEL, LinearProblem
from pymllm_kernels.tuning.keys import TuningKey, dtype_name
from pymllm_kernels.tuning.tunable import Config, Tunable
from pymllm_kernels.w4a16 import hopper_decode_tuning, hopper_tuning, tuning
from pymllm_kernels.w4a16.hopper_decode_tuning import DecodeConfig
from pymllm_kernels.w4a16.hopper_tuning import HopperConfig, HopperForm
from pymllm_kernels.w4a16.layout import choose_layout


class HopperTunable(Tunable):
    """``gluon_hopper_w4a16``."""

    operation = "gluon_hopper_w4a16"
    kernels: ClassVar = {"tiles": HopperConfig, "decode": DecodeConfig}
    sources = (
        "pymllm_kernels.w4a16.hopper:w4a16_gemm_hopper",
        "pymllm_kernels.w4a16.hopper_decode:w4a16_decode_hopper",
    )

    def key_of(self, problem: LinearProblem) -> TuningKey:
        return hopper_key(
            problem.n, problem.k, problem.group_size, problem.act_dtype, problem.scale_dtype,
            problem.symmetric, problem.weight_bits, problem.act_order,
        )  # fmt: skip

    def like(self, key: TuningKey) -> TuningKey | None:
        # fp16, zero points and one scale a row were 1 to 3 % off; smaller groups need other tiles.
        group = 128 if key.group_size == CHANNEL or key.group_size % 128 == 0 else key.group_size
        words = [word for word in key.variant.split() if word not in ("zero", "act-order")]
        like = replace(key, group_size=group, dtype="bfloat16", variant=" ".join(words))
        return None if like == key else like

    def rule(self, key: TuningKey, m: int, facts: DeviceFacts) -> Config:
        return hopper_tuning.choose_config(
            m, key.n, key.k, hopper_form(key), facts.multiprocessors, facts.shared_memory
        )

    def candidates(self, key: TuningKey, m: int, facts: DeviceFacts) -> Sequence[Config]:
        found = hopper_tuning.all_candidates(
            m, key.n, key.k, hopper_form(key), facts.multiprocessors, facts.shared_memory
        )
        return [config for _, config in sorted(found, key=lambda item: item[0])]

    def why_invalid(self, config: Config, key: TuningKey, m: int, facts: DeviceFacts) -> str | None:
        form = hopper_form(key)
        if isinstance(config, DecodeConfig):
            return hopper_decode_tuning.why_invalid(config, m, key.k, form, facts.shared_memory)
        reason = hopper_tuning.why_invalid(config, form, facts.shared_memory)
        if reason is None and not self._planned(config, key, m, facts):
            return f"{config} cannot share the tiles of [{m}, {key.k}] x {key.n}"
        return reason

    def adapt(self, config: Config, key: TuningKey, m: int, facts: DeviceFacts) -> Config:
        if isinstance(config, DecodeConfig):
            return config
        # Even runs of steps are of fewer tiles than multiprocessors or of more; whole rounds of tiles
        # leave nothing to share.
        for share in even_runs(config.share):
            other = replace(config, share=share)
            if self.why_invalid(other, key, m, facts) is None:
                return other
        return config

    def borrowed(self, config: Config, key: TuningKey, m: int, facts: DeviceFacts) -> Config:
        form = hopper_form(key)
        if not form.act_order or m > 1:
            return config
        if isinstance(config, DecodeConfig):
            kept = replace(config, keep=True)
            if self.why_invalid(kept, key, m, facts) is None:
                return kept
        # One token may be put in order by the kernel that multiplies it, without a launch before it.
        return self.rule(key, m, facts)

    def _planned(self, config: Config, key: TuningKey, m: int, facts: DeviceFacts) -> bool:
        form, units = hopper_form(key), facts.multiprocessors
        return hopper_tuning.plan(config, m, key.n, key.k, form, units) is not None


class TritonTunable(Tunable):
    """``triton_w4a16``."""

    operation = "triton_w4a16"
    kernels: ClassVar = {"tiles": tuning.Config}
    sources = ("pymllm_kernels.w4a16.kernel:w4a16_gemm_kernel",)

    def key_of(self, problem: LinearProblem) -> TuningKey:
        layout = choose_layout(problem.weight_bits, problem.k, problem.group_size)
        spans = problem.groups > 1 and problem.group_size % layout.slice_k != 0
        return triton_key(
            problem.weight_bits, problem.n, problem.k, problem.group_size, problem.act_dtype, spans
        )

    def rule(self, key: TuningKey, m: int, facts: DeviceFacts) -> Config:
        return tuning.choose_config(m, triton_form(key), facts)

    def candidates(self, key: TuningKey, m: int, facts: DeviceFacts) -> Sequence[Config]:
        first = self.rule(key, m, facts)
        found = [first]
        for tile in triton_form(key).rule:
            if first.block_m <= 2 * tile.block_m <= 4 * first.block_m:
                found += [replace(tile, num_stages=stages) for stages in (4, 3, 2, 5)]
        valid = (c for c in found if self.why_invalid(c, key, m, facts) is None)
        return list(dict.fromkeys(valid))

    def why_invalid(self, config: Config, key: TuningKey, m: int, facts: DeviceFacts) -> str | None:
        return tuning.why_invalid(config, triton_form(key), facts)


HOPPER = HopperTunable()
TRITON = TritonTunable()


def hopper_key(
    n: int,
    k: int,
    group_size: int,
    act_dtype: torch.dtype,
    scale_dtype: torch.dtype,
    symmetric: bool,
    bits: int = 4,
    act_order: bool = False,
) -> TuningKey:
    """The key of a layer of :data:`HOPPER`."""
    words = ["bits=8"] if bits == 8 else []
    if not symmetric:
        words.append("zero")
    if act_order:
        words.append("act-order")
    if scale_dtype != act_dtype:
        words.append(f"scale={dtype_name(scale_dtype)}")
    return TuningKey(HOPPER.operation, n, k, group_size, dtype_name(act_dtype), " ".join(words))


@functools.lru_cache(maxsize=4096)
def hopper_form(key: TuningKey) -> HopperForm:
    """The form of a layer of :data:`HOPPER`."""
    from pymllm_kernels.w4a16.hopper_launch import form_of

    act: torch.dtype = getattr(torch, key.dtype)
    words = key.variant.split()
    scales = [word.partition("=")[2] for word in words if word.startswith("scale=")]
    scale = getattr(torch, scales[0]) if scales else act
    bits = 8 if "bits=8" in words else 4
    block_k = choose_layout(bits, key.k, key.group_size).block_k
    symmetric, act_order = "zero" not in words, "act-order" in words
    return form_of(block_k, key.group_size, act, scale, symmetric, bits, act_order)


def triton_key(
    bits: int, n: int, k: int, group_size: int, act_dtype: torch.dtype, spans: bool
) -> TuningKey:
    """The key of a layer of :data:`TRITON`; ``spans``: it has a group index."""
    words = (["bits=8"] if bits == 8 else []) + (["spans"] if spans else [])
    return TuningKey(TRITON.operation, n, k, group_size, dtype_name(act_dtype), " ".join(words))


@functools.lru_cache(maxsize=4096)
def triton_form(key: TuningKey) -> tuning.Form:
    """The form of a layer of :data:`TRITON`."""
    words = key.variant.split()
    bits = 8 if "bits=8" in words else 4
    block_k = choose_layout(bits, key.k, key.group_size).block_k
    return tuning.Form(bits, block_k, key.group_size, "spans" in words)
