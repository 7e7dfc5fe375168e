"""Where the configurations of a layer come from, over all numbers of tokens."""

from __future__ import annotations

from typing import Any, NamedTuple

from pymllm_kernels import LinearKernel, LinearProblem
from pymllm_kernels.tuning import BUCKETS


class Origin(NamedTuple):
    """Buckets of M that have their configuration from one place.

    Attributes:
        origin: ``"pinned"``, ``"store"``, ``"shipped"`` or ``"rule"``.
        reason: of the rule, why there is nothing better; else empty, times being different for each.
        buckets: the buckets of M.
    """

    origin: str
    reason: str
    buckets: tuple[int, ...]

    def as_json(self) -> dict[str, Any]:
        """As JSON values."""
        return {"origin": self.origin, "reason": self.reason or None, "m": list(self.buckets)}


def origins_of(kernel: LinearKernel, problem: LinearProblem) -> list[Origin]:
    """The origins of a layer's configurations, most frequent first; none if it has none to choose.

    Raises:
        ValueError: what is pinned cannot run, or is not in a strict lock file.
    """
    found: dict[tuple[str, str], list[int]] = {}
    for m in BUCKETS:
        resolved = kernel.resolved(problem, m)
        if resolved is None:
            return []
        reason = resolved.reason if resolved.origin == "rule" else ""
        found.setdefault((resolved.origin, reason), []).append(m)
    ordered = sorted(found.items(), key=lambda item: -len(item[1]))
    return [Origin(origin, reason, tuple(buckets)) for (origin, reason), buckets in ordered]


def origin_label(origins: list[Origin]) -> str:
    """``rule``, or ``store M 1-64, rule M 128-8192`` where there are several; empty without any."""
    ordered = sorted(origins, key=lambda origin: origin.buckets)
    if len(ordered) < 2:
        return "".join(origin.origin for origin in ordered)
    return ", ".join(f"{origin.origin} M {_spans(origin.buckets)}" for origin in ordered)


def _spans(buckets: tuple[int, ...]) -> str:
    """Neighbouring buckets as ranges of M: ``1-64, 256``."""
    runs: list[list[int]] = []
    for m in buckets:
        if runs and m == 2 * runs[-1][1]:
            runs[-1][1] = m
        else:
            runs.append([m, m])
    return " ".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)
