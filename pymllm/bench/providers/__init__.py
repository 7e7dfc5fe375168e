"""Everything that is timed, in the order of a run: ours and torch first, what compiles longest last."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pymllm.bench.providers.base import Description, Job, Linear, Provider
from pymllm.bench.providers.gemlite import GemLite
from pymllm.bench.providers.humming import Humming
from pymllm.bench.providers.ours import Ours
from pymllm.bench.providers.torch_native import (
    CublasBf16,
    DequantMatmul,
    IntMm,
    TinyGemm,
    TorchBf16,
)
from pymllm.bench.providers.torchao import TorchAo
from pymllm.bench.providers.vllm import Cutlass, Machete, Marlin, VllmTriton

PHASES: tuple[tuple[Provider, ...], ...] = (
    (Ours(), CublasBf16(), TorchBf16(), DequantMatmul(), TinyGemm(), IntMm()),
    (Marlin(), Machete(), Cutlass(), VllmTriton(), TorchAo()),
    (Humming(),),
    (GemLite(),),
)
"""Whole runs, one after the other: what a later one breaks cannot hurt an earlier one."""

PROVIDERS: tuple[Provider, ...] = tuple(p for phase in PHASES for p in phase)
NAMES = tuple(provider.name for provider in PROVIDERS)
TORCH_AND_OURS = tuple(provider.name for provider in PHASES[0])


def select(names: Sequence[str] | None, device_type: str) -> list[list[Provider]]:
    """The phases with the named providers (all if None) that run on a device type.

    Raises:
        ValueError: a name is not known; the message lists those that are.
    """
    unknown = sorted(set(names or ()) - set(NAMES))
    if unknown:
        raise ValueError(f"providers: found {unknown}, accepted {list(NAMES)}")
    phases = (
        [p for p in phase if (names is None or p.name in names) and device_type in p.devices]
        for phase in PHASES
    )
    return [phase for phase in phases if phase]


def configure(options: Mapping[str, Mapping[str, Any]]) -> None:
    """Gives every provider its options, or its defaults.

    Raises:
        ValueError: a provider is not known, or does not take such an option.
    """
    unknown = sorted(set(options) - set(NAMES))
    if unknown:
        raise ValueError(f"options: found providers {unknown}, accepted {list(NAMES)}")
    for provider in PROVIDERS:
        provider.configure(**options.get(provider.name, {}))


__all__ = [
    "NAMES",
    "PHASES",
    "PROVIDERS",
    "TORCH_AND_OURS",
    "Description",
    "Job",
    "Linear",
    "Provider",
    "configure",
    "select",
]
