"""What a tuned configuration is for, and what it was measured on."""

from __future__ import annotations

import functools
from dataclasses import dataclass, fields

import torch

from pymllm_kernels.device import DeviceFacts
from pymllm_kernels.tuning.source import source_hash

MAX_BUCKET = 8192


@dataclass(frozen=True)
class TuningKey:
    """A layer as the choice of a configuration sees it; the bucket of M is kept beside it.

    Attributes:
        operation: the kernel, such as ``"gluon_hopper_w4a16"``.
        n: output features.
        k: input features.
        group_size: inputs that share a scale, -1 for one scale a row.
        dtype: of activations, such as ``"bfloat16"``.
        variant: words, parted by blanks, for what else changes the best configuration; each operation
            has its own.
    """

    operation: str
    n: int
    k: int
    group_size: int
    dtype: str
    variant: str = ""

    def told(self, m: int | None = None) -> str:
        """In words, with the bucket of M."""
        group = "" if self.group_size == -1 else f" group {self.group_size}"
        variant = f" {self.variant}" if self.variant else ""
        tokens = "" if m is None else f" M<={m}" if m < MAX_BUCKET else f" M>{m // 2}"
        return f"{self.operation} {self.n}x{self.k}{group} {self.dtype}{variant}{tokens}"


@dataclass(frozen=True)
class Conditions:
    """What a measurement holds for; one made under others is not used.

    Attributes:
        board: the GPU's name.
        capability: ``"9.0"``, or the device's type where it has none.
        multiprocessors: SMs or compute units.
        triton: version of Triton.
        kernel: hash of the source of all functions the kernel is built of.
    """

    board: str
    capability: str
    multiprocessors: int
    triton: str
    kernel: str


_TOLD = {
    "board": "board",
    "capability": "capability",
    "multiprocessors": "multiprocessors",
    "triton": "Triton",
    "kernel": "kernel source",
}


def bucket(m: int) -> int:
    """The power of two, at most 8192, under which ``m`` tokens are tuned: the next from ``m`` up."""
    return min(1 << max(m - 1, 0).bit_length(), MAX_BUCKET)


BUCKETS = tuple(1 << i for i in range(MAX_BUCKET.bit_length()))


def dtype_name(dtype: torch.dtype) -> str:
    """``torch.bfloat16`` as ``"bfloat16"``."""
    return str(dtype).removeprefix("torch.")


@functools.lru_cache(maxsize=64)
def conditions(sources: tuple[str, ...], facts: DeviceFacts) -> Conditions:
    """The conditions of a kernel here; imports Triton for its version.

    Args:
        sources: the kernel's functions, as :func:`source_hash` takes them.
        facts: the device.
    """
    import triton

    capability = "{}.{}".format(*facts.capability) if facts.capability else facts.type
    return Conditions(
        facts.name, capability, facts.multiprocessors, triton.__version__, source_hash(sources)
    )


def differing(there: Conditions, here: Conditions) -> list[str]:
    """The fields that differ, each with both values."""
    return [
        f"{_TOLD[field.name]} {getattr(there, field.name)} there, {getattr(here, field.name)} here"
        for field in fields(Conditions)
        if getattr(there, field.name) != getattr(here, field.name)
    ]
