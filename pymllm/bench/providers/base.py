"""What the harness asks of everything it times."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from pymllm.bench.roof import W4A16, W8A8
from pymllm.bench.workload import Workload, make_workload

Linear = Callable[[torch.Tensor], torch.Tensor]
"""``x [M, K]`` to ``[M, N]``."""


class Description(NamedTuple):
    """What ran: tile or algorithm, and where that choice comes from.

    Attributes:
        config: text, or ``None`` where the provider does not tell.
        origin: ``"pinned"``, ``"store"``, ``"shipped"``, ``"rule"``, ``"tuned"``,
            ``"heuristic"`` or ``"library"``.
    """

    config: str | None
    origin: str


class Job(NamedTuple):
    """A layer that a run will time, and with how many tokens.

    Attributes:
        scheme: ``"w4a16"`` or ``"w8a8_int8"``.
        n: outputs.
        k: inputs.
        group: inputs a scale, for W4A16.
        dtype: of activations.
        device: where it will run.
        tokens: every M.
    """

    scheme: str
    n: int
    k: int
    group: int
    dtype: torch.dtype
    device: torch.device
    tokens: tuple[int, ...]

    def workload(self) -> Workload:
        """Such a layer, with inputs of one token."""
        return make_workload(
            self.scheme, self.n, self.k, 1, self.device, group=self.group, dtype=self.dtype
        )

    def to_json(self) -> list[Any]:
        """For another process."""
        dtype = str(self.dtype).removeprefix("torch.")
        return [self.scheme, self.n, self.k, self.group, dtype, str(self.device), [*self.tokens]]

    @classmethod
    def from_json(cls, entry: Sequence[Any]) -> Job:
        """What :meth:`to_json` wrote."""
        scheme, n, k, group, dtype, device, tokens = entry
        return cls(scheme, n, k, group, getattr(torch, dtype), torch.device(device), tuple(tokens))


class Provider:
    """One way to run a layer.

    Attributes:
        name: as in the document.
        about: one line for people.
        schemes: the schemes it runs.
        devices: the device types it runs on.
        only_tuned_shapes: whether it is so slow to prepare that few shapes are timed by default.
        limit_s: seconds that preparing one M may take, or ``None``.
    """

    name = ""
    about = ""
    schemes: tuple[str, ...] = (W4A16, W8A8)
    devices: tuple[str, ...] = ("cuda",)
    only_tuned_shapes = False
    limit_s: float | None = None

    def why_absent(self) -> str | None:
        """``None`` if it can be used here, else the reason. Imports as little as possible."""
        return None

    def why_not(self, work: Workload) -> str | None:
        """``None`` if it takes this layer, else the reason."""
        return None

    def why_not_tokens(self, work: Workload, m: int) -> str | None:
        """``None`` if it takes ``m`` tokens, else the reason."""
        return None

    def bytes_a_copy(self, work: Workload) -> int:
        """Bytes of one copy of its weight."""
        return work.weight_bytes

    def configure(self, **options: Any) -> None:
        """Takes the options of a run that concern it.

        Raises:
            ValueError: it has no such option, or not that value.
        """
        if options:
            raise ValueError(f"{self.name}: found options {sorted(options)}, accepted none")

    def warm(self, jobs: Sequence[Job], limit_s: float) -> None:
        """Compiles ahead, side by side, what the jobs need; whatever it leaves, :meth:`prepare` does.

        Raises:
            TimeoutError: it was not done after ``limit_s`` seconds.
        """

    def build(self, work: Workload, copies: int) -> list[Linear]:
        """The layer, ``copies`` times with separate weights in memory."""
        raise NotImplementedError

    def prepare(self, calls: list[Linear], x: torch.Tensor) -> None:
        """Compiles and tunes for this number of tokens."""
        calls[0](x)

    def describe(self, work: Workload, m: int) -> Description:
        """What runs ``m`` tokens; asked after :meth:`build` and :meth:`prepare`."""
        return Description(None, "library")


def missing(module: str, package: str) -> str | None:
    """Why an optional package cannot be used: it is not installed."""
    if importlib.util.find_spec(module) is not None:
        return None
    return f"not installed (pip install {package})"


def clones(tensor: torch.Tensor, copies: int) -> list[torch.Tensor]:
    """The tensor and copies of it, each in memory of its own."""
    return [tensor, *(tensor.clone() for _ in range(copies - 1))]
