"""What the choice of launch parameters has in common over the operations."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any, Protocol, TypeVar

from pymllm_kernels.device import DeviceFacts


class TileConfig(Protocol):
    """A frozen dataclass with, among others, these."""

    @property
    def block_m(self) -> int:
        """Tokens of a tile."""

    @property
    def num_stages(self) -> int:
        """Depth of the software pipeline."""


C = TypeVar("C")
T = TypeVar("T", bound=TileConfig)


def why_too_large(config: TileConfig, needed: int, device: DeviceFacts) -> str | None:
    """``None`` if ``needed`` bytes of shared memory are there for a block, else the reason."""
    if device.shared_memory and needed > device.shared_memory:
        return (
            f"{config} needs {needed} bytes of shared memory, {device.name} has "
            f"{device.shared_memory}"
        )
    return None


def first_that_fits(
    rule: Sequence[T],
    m: int,
    why_invalid: Callable[[T], str | None],
    device: DeviceFacts,
    kernel: str,
) -> T:
    """The smallest tile that holds ``m`` tokens; fewer stages, then smaller tiles, to fit the device.

    Args:
        rule: configurations by growing ``block_m``; the last serves all larger ``m``.
        m: number of tokens.
        why_invalid: the kernel's validity rule.
        device: for the message.
        kernel: what to call the kernel in it.

    Raises:
        ValueError: none is valid.
    """
    index = next((i for i, c in enumerate(rule) if m <= c.block_m), len(rule) - 1)
    for config in reversed(rule[: index + 1]):
        for stages in range(config.num_stages, 0, -1):
            dataclass: Any = config
            candidate: T = replace(dataclass, num_stages=stages)
            if why_invalid(candidate) is None:
                return candidate
    raise ValueError(
        f"no configuration of {kernel} fits the shared memory of {device.name} "
        f"({device.shared_memory} bytes)"
    )


def cheapest(found: Iterable[tuple[float, C]], kernel: str, shared_memory: int) -> C:
    """The configuration with the least estimated time.

    Args:
        found: (estimate, valid configuration) pairs.
        kernel: what to call the kernel in the message.
        shared_memory: bytes a block can use, for the message.

    Raises:
        ValueError: there is none.
    """
    best = min(found, key=lambda item: item[0], default=None)
    if best is None:
        raise ValueError(
            f"no configuration of {kernel} fits {shared_memory} bytes of shared memory"
        )
    return best[1]


def in_short(config: Any) -> str:
    """A configuration as ``name=value, ...``."""
    return ", ".join(f"{name}={value}" for name, value in vars(config).items())
