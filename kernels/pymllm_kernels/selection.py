"""Which kernel runs a layer, and why the others do not."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from pymllm_kernels.common.support import device_note
from pymllm_kernels.problem import LinearKernel, LinearProblem
from pymllm_kernels.w4a16.providers import PROVIDERS as W4A16_PROVIDERS
from pymllm_kernels.w8a8_int8.providers import PROVIDERS as W8A8_PROVIDERS

_BY_SCHEME: dict[str, tuple[LinearKernel, ...]] = {
    "w4a16": W4A16_PROVIDERS,
    "w8a8_int8": W8A8_PROVIDERS,
}
CANDIDATES: tuple[LinearKernel, ...] = (*W4A16_PROVIDERS, *W8A8_PROVIDERS)
"""Every kernel in order of preference; the first that can run a problem is its choice."""


class Refusal(NamedTuple):
    """A kernel that was not taken, and why."""

    kernel: str
    reason: str


@dataclass(frozen=True)
class KernelChoice:
    """The outcome of :func:`select_kernel`.

    Attributes:
        kernel: the kernel that runs the layer.
        reason: why it is this one.
        refusals: the candidates of the same scheme before and after it, each with its reason.
        note: what to know of the device, or ``None``.
    """

    kernel: LinearKernel
    reason: str
    refusals: tuple[Refusal, ...]
    note: str | None = None

    def __str__(self) -> str:
        lines = [f"{self.kernel.name}: {self.reason}"]
        lines += [f"  not {refusal.kernel}: {refusal.reason}" for refusal in self.refusals]
        if self.note:
            lines.append(f"  note: {self.note}")
        return "\n".join(lines)


def kernel_names(scheme: str | None = None) -> list[str]:
    """Names of the candidates, of one scheme if given, in order of preference."""
    if scheme is None:
        return [candidate.name for candidate in CANDIDATES]
    if scheme not in _BY_SCHEME:
        raise ValueError(f"scheme: found {scheme!r}, accepted {list(_BY_SCHEME)}")
    return [candidate.name for candidate in _BY_SCHEME[scheme]]


def select_kernel(problem: LinearProblem, kernel: str | None = None) -> KernelChoice:
    """The kernel for a problem: the first candidate that can run it, or the one asked for.

    Args:
        problem: what is to run, and where.
        kernel: name of a kernel to force.

    Raises:
        ValueError: no candidate can run the problem (the message lists every refusal), the forced
            kernel cannot, or no kernel has that name.
    """
    names = kernel_names(problem.scheme)
    if kernel is not None and kernel not in names:
        raise ValueError(f"kernel: found {kernel!r}, accepted for {problem.scheme}: {names}")
    taken: LinearKernel | None = None
    refusals = []
    for candidate in _BY_SCHEME[problem.scheme]:
        reason = candidate.why_not(problem)
        if reason is None and kernel not in (None, candidate.name):
            reason = f"{kernel} was asked for"
        if reason is None and taken is not None:
            reason = f"{taken.name} comes before it"
        if reason is None:
            taken = candidate
        else:
            refusals.append(Refusal(candidate.name, reason))
    if taken is None:
        what = "no kernel can run" if kernel is None else f"kernel {kernel!r} cannot run"
        listed = "; ".join(f"{refusal.kernel}: {refusal.reason}" for refusal in refusals)
        raise ValueError(f"{what} {problem}: {listed}")
    reason = "asked for by name" if kernel is not None else taken.why(problem)
    note = device_note(problem) if taken.name.startswith("triton") else None
    return KernelChoice(taken, reason, tuple(refusals), note)
