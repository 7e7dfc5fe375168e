"""GemLite through its public functions, autotuned."""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch

from pymllm.bench.autotune import Plan, compile_side_by_side, first_round, searching
from pymllm.bench.providers.base import Description, Job, Linear, Provider, clones, missing
from pymllm.bench.roof import W4A16
from pymllm.bench.workload import Workload

PACKAGE = "gemlite"
AUTOTUNES = ("fast", "max")
# Its exhaustive lists have 120 to 1,760 candidates a class of M, of 56 to 205 tiles.
CANDIDATES = 128


class GemLite(Provider):
    """Pure Triton, tuned for every class of M on first use."""

    name = "gemlite"
    about = "GemLite (Triton), autotuned over its own default list (fast)"
    only_tuned_shapes = True
    limit_s = 100.0

    def __init__(self) -> None:
        self._autotune, self._plan = "fast", Plan(CANDIDATES)
        self._applied = False
        self._found: dict[int, str] = {}

    def configure(self, **options: Any) -> None:
        """``autotune``: "fast" or "max"; ``candidates``: the most of a class that "max" samples."""
        found = {"autotune": "fast", "candidates": CANDIDATES, **options}
        autotune, candidates = found.pop("autotune"), found.pop("candidates")
        if found or autotune not in AUTOTUNES or candidates < 1:
            raise ValueError(
                f"gemlite: found {options}, accepted autotune of {AUTOTUNES}, candidates > 0"
            )
        self._applied = self._applied and autotune == self._autotune
        self._autotune, self._plan = autotune, Plan(candidates)
        self.about = type(self).about
        if autotune == "max":
            self.about = (
                "GemLite (Triton), autotuned over its own exhaustive list (max): at most"
                f" {candidates} candidates a class, then the best tiles in all their variants"
            )

    def warm(self, jobs: Sequence[Job], limit_s: float) -> None:
        if self._autotune != "max" or not jobs:
            return
        deadline = time.monotonic() + limit_s
        task = {
            "provider": self.name,
            "options": {"autotune": "max", "candidates": self._plan.limit},
            "jobs": [job.to_json() for job in jobs],
        }
        compile_side_by_side(task, self._plan, limit_s)
        for job in jobs:
            work = job.workload()
            (call,) = self.build(work, 1)
            for m in job.tokens:
                if time.monotonic() > deadline:
                    raise TimeoutError(f"searching took longer than {limit_s:.0f} s")
                x = torch.randn(m, job.k, dtype=job.dtype, device=job.device)
                first_round(self._plan, partial(call, x))
        compile_side_by_side(task, self._plan, deadline - time.monotonic())

    def prepare(self, calls: list[Linear], x: torch.Tensor) -> None:
        if self._autotune != "max":
            calls[0](x)
            return
        with searching(self._plan) as searched:
            calls[0](x)
        self._found[x.shape[0]] = "; ".join(str(tuner.best_config) for tuner in searched.values())

    def why_absent(self) -> str | None:
        return missing("gemlite", PACKAGE)

    def why_not(self, work: Workload) -> str | None:
        return None if work.k % 32 == 0 else f"takes K a multiple of 32, found {work.k}"

    def build(self, work: Workload, copies: int) -> list[Linear]:
        gemlite: Any = __import__("gemlite")
        if not self._applied:
            gemlite.set_autotune(self._autotune)
            if self._autotune == "max":
                # Tiles that it ships for a GPU go before any search.
                gemlite.reset_config()
            self._applied = True
        self._found.clear()
        layer = _int4(gemlite, work) if work.scheme == W4A16 else _int8(gemlite, work)
        meta = layer.get_meta_args()
        weight, scale, *rest = [tensor.detach() for tensor in layer.get_tensor_args()]
        pairs = zip(clones(weight, copies), clones(scale, copies), strict=True)
        return [
            partial(
                _forward, function=gemlite.forward_functional, tensors=[*pair, *rest], meta=meta
            )
            for pair in pairs
        ]

    def describe(self, work: Workload, m: int) -> Description:
        found = self._found.get(m)
        return Description(f"autotune {self._autotune}{f': {found}' if found else ''}", "tuned")


def _forward(x: torch.Tensor, function: Any, tensors: list[torch.Tensor], meta: Any) -> Any:
    return function(x, None, tensors, meta)


def _int4(gemlite: Any, work: Workload) -> Any:
    kind = _dtype(gemlite, work)
    layer = gemlite.GemLiteLinear(
        4, group_size=work.group, in_features=work.k, out_features=work.n,
        input_dtype=kind, output_dtype=kind,
    )  # fmt: skip
    # An integer zero point: (code - 8) * scale without a tensor of zero points to read.
    layer.pack(work.codes().contiguous(), work.scale, 8, None)
    return layer


def _int8(gemlite: Any, work: Workload) -> Any:
    maker = gemlite.helper.A8W8_int8_dynamic(device=str(work.device), dtype=work.dtype)
    return maker.from_weights(work.words, scales=work.scale)


def _dtype(gemlite: Any, work: Workload) -> Any:
    return gemlite.DType.BF16 if work.dtype == torch.bfloat16 else gemlite.DType.FP16
