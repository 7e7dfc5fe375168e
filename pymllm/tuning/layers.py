"""The layers to tune for: those of a checkpoint, of known models, or of given shapes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from pymllm_kernels import CHANNEL, DeviceFacts, LinearProblem

SCHEMES = ("w4a16", "w8a8_int8")
# Projections that are cut along their outputs, and those that are often run as one layer.
_FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
_BY_OUTPUTS = frozenset(name for names in _FUSED for name in names)
_BY_INPUTS = frozenset(("o_proj", "down_proj"))


def shape_problems(
    shapes: Iterable[tuple[int, int]],
    facts: DeviceFacts,
    *,
    schemes: Sequence[str] = SCHEMES,
    group_size: int = 128,
    dtype: torch.dtype = torch.bfloat16,
) -> list[LinearProblem]:
    """Layers of the given shapes in each scheme, symmetric, activations quantized per token.

    Args:
        shapes: (N, K) each; where K is no multiple of the group there is no W4A16 layer.
        facts: where they run.
        schemes: of ``SCHEMES``.
        group_size: inputs that share a scale in W4A16, -1 for all.
        dtype: of activations and scales.

    Raises:
        ValueError: a scheme is not known.
    """
    unknown = [scheme for scheme in schemes if scheme not in SCHEMES]
    if unknown:
        raise ValueError(f"schemes: found {unknown}, accepted {list(SCHEMES)}")
    return [
        _problem(scheme, n, k, facts, group_size, dtype)
        for n, k in shapes
        for scheme in schemes
        if scheme != "w4a16" or group_size == CHANNEL or k % group_size == 0
    ]


def checkpoint_problems(
    directory: str | Path,
    facts: DeviceFacts,
    *,
    dtype: torch.dtype | str | None = None,
    parallel: Sequence[int] = (1,),
) -> list[LinearProblem]:
    """The different quantized layers of a checkpoint, each also as part of q/k/v or gate/up as one.

    Args:
        directory: of the checkpoint.
        facts: where they run.
        dtype: of activations; the checkpoint's own if ``None``.
        parallel: over how many GPUs layers are cut: outputs of q/k/v and gate/up, inputs of o and
            down; others, and those that cannot be cut evenly, stay whole.

    Raises:
        ValueError: the checkpoint is not as its format says, or no kernel runs a layer.
    """
    from pymllm.checkpoint.planning import plan_linears
    from pymllm.checkpoint.reader import Checkpoint

    with Checkpoint(directory) as checkpoint:
        plan = plan_linears(checkpoint, facts, dtype=dtype)
    named = {layer.name: layer.problem for layer in plan.layers}
    named |= _fused(named)
    found: dict[LinearProblem, None] = {}
    for degree in parallel:
        for name, problem in named.items():
            found.setdefault(_cut(name, problem, degree))
    return list(found)


def _problem(
    scheme: str, n: int, k: int, facts: DeviceFacts, group_size: int, dtype: torch.dtype
) -> LinearProblem:
    if scheme == "w4a16":
        return LinearProblem(scheme, n, k, 4, group_size, True, False, dtype, dtype, facts)
    return LinearProblem(
        scheme, n, k, 8, CHANNEL, True, False, dtype, torch.float32, facts, input_strategy="token"
    )


def _fused(named: dict[str, LinearProblem]) -> dict[str, LinearProblem]:
    """q/k/v and gate/up as one layer, where all are there and differ in their outputs only."""
    found = {}
    for name, first in named.items():
        parent, _, leaf = name.rpartition(".")
        for leaves in _FUSED:
            if leaf != leaves[0]:
                continue
            parts = [named.get(f"{parent}.{other}") for other in leaves]
            together = {replace(part, n=0) for part in parts if part is not None}
            if None not in parts and len(together) == 1:
                outputs = sum(part.n for part in parts if part is not None)
                found[f"{parent}.{leaf} fused"] = replace(first, n=outputs)
    return found


def _cut(name: str, problem: LinearProblem, degree: int) -> LinearProblem:
    """One GPU's part of a layer."""
    leaf = name.rpartition(".")[2].removesuffix(" fused")
    if leaf in _BY_OUTPUTS and problem.n % degree == 0:
        return replace(problem, n=problem.n // degree)
    if leaf in _BY_INPUTS and problem.k % degree == 0:
        inputs = problem.k // degree
        if problem.group_size == CHANNEL or inputs % problem.group_size == 0:
            return replace(problem, k=inputs)
    return problem
