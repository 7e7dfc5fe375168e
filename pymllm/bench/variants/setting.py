"""Where variants are measured and by which clock."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from pymllm.bench.measure import Stopped, failure, no_progress
from pymllm.bench.timing import REST, Call, Timing, cpu_time, side_by_side
from pymllm.bench.variants.values import Cell, Goal, fill
from pymllm_kernels import DeviceFacts, device_facts


@dataclass(frozen=True)
class Setting:
    """A machine and how long it may be used.

    Attributes:
        device: where everything runs.
        read_tbps: measured read bandwidth, 1e12 bytes/s.
        min_bytes: what the copies of a weight must add up to.
        rest: idle time before replays, as a multiple of the GPU time that they take.
        deadline: ``time.monotonic()`` at which to stop, or ``None``.
        progress: is told what is being done.
    """

    device: torch.device
    read_tbps: float
    min_bytes: int
    rest: float = REST
    deadline: float | None = None
    progress: Callable[[str], None] = no_progress

    @property
    def gpu(self) -> bool:
        """Whether it is one."""
        return self.device.type == "cuda"

    @property
    def facts(self) -> DeviceFacts:
        """What kernels are chosen by."""
        return device_facts(self.device)

    def time(self, rotations: Sequence[Sequence[Call]]) -> list[Timing]:
        """Times of several calls beside each other, each given once for each copy of its weight."""
        clock = partial(side_by_side, rest=self.rest) if self.gpu else _in_a_row
        return clock(rotations)

    def fill(self, entries: Sequence[tuple[Cell, Sequence[Call], int]]) -> None:
        """Times calls beside each other and writes the times, or why there are none, into their cells.

        Args:
            entries: for each a cell, what :meth:`time` takes, and the bytes that a call moves.
        """
        try:
            times = self.time([calls for _, calls, _ in entries])
        except Exception as error:  # noqa: BLE001  compilers fail in any way
            reason = failure(error, self.device)
            for cell, _, _ in entries:
                cell["skip"] = reason
            return
        for (cell, _, moved), timing in zip(entries, times, strict=True):
            fill(cell, timing, moved)

    def goal(self, goal: Goal) -> Goal:
        """What is wanted here: the limits are for GPUs."""
        return goal if self.gpu else goal._replace(wanted=None)

    def check_deadline(self) -> None:
        """Nothing, while there is time.

        Raises:
            Stopped: there is none left.
        """
        if self.deadline is not None and time.monotonic() > self.deadline:
            raise Stopped("the time limit was reached")

    def release(self) -> None:
        """Gives back what graphs held."""
        if self.gpu:
            torch.cuda.empty_cache()


def _in_a_row(rotations: Sequence[Sequence[Call]]) -> list[Timing]:
    return [cpu_time(calls) for calls in rotations]
