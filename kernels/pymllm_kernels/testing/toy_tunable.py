"""A made-up operation on a made-up GPU, for tests of the tuning."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar

from pymllm_kernels.device import DeviceFacts
from pymllm_kernels.tuning import Entry, Place, Tunable, TuningKey, bucket, conditions
from pymllm_kernels.tuning.tunable import Config

H200 = DeviceFacts("cuda", "NVIDIA H200", (9, 0), 227 * 1024, 132)
# No table is shipped for it.
BOARD = DeviceFacts("cuda", "Board of the tests", (9, 0), 227 * 1024, 132)


@dataclass(frozen=True)
class Tile:
    """Configuration of the made-up operation."""

    size: int
    wide: bool = False


class Toy(Tunable):
    """Sizes up to 64 are valid, and at most twice the tokens."""

    operation = "toy"
    kernels: ClassVar = {"tile": Tile}
    sources = ("pymllm_kernels.w4a16.kernel:w4a16_gemm_kernel",)

    def rule(self, key: TuningKey, m: int, facts: DeviceFacts) -> Config:
        return Tile(8)

    def candidates(self, key: TuningKey, m: int, facts: DeviceFacts) -> Sequence[Config]:
        return [Tile(8), Tile(16), Tile(32)]

    def why_invalid(self, config: Config, key: TuningKey, m: int, facts: DeviceFacts) -> str | None:
        tiles = key.n // config.size
        return None if config.size <= 64 else f"{tiles} tiles: size {config.size} is more than 64"

    def adapt(self, config: Config, key: TuningKey, m: int, facts: DeviceFacts) -> Config:
        return Tile(config.size) if config.wide and m % 2 else config


TOY = Toy()
KEY = TuningKey("toy", 4096, 4096, 128, "bfloat16")


def place(m: int, key: TuningKey = KEY, facts: DeviceFacts = BOARD) -> Place:
    """Where a measurement made here and now lies."""
    return Place(conditions(TOY.sources, facts), key, bucket(m))


def entry(config: Tile, median_us: float = 10.0) -> Entry:
    """A result."""
    return Entry(TOY.to_json(config), median_us, "2026-11-26", timings={"00": 10.0, "01": None})


@contextmanager
def one_warning(text: str) -> Iterator[None]:
    """Checks that what is done gives exactly one warning, which contains ``text``."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    told = [str(warning.message) for warning in caught]
    if len(told) != 1 or text not in told[0]:
        raise AssertionError(f"expected one warning with {text!r}, found {told}")
