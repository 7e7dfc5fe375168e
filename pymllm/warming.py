"""Tuning and compiling what the layers of a model will need, before the first request."""

from __future__ import annotations

import concurrent.futures
import multiprocessing
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from pymllm.checkpoint.reader import Checkpoint
from pymllm.tuning.layers import SCHEMES, checkpoint_problems, shape_problems
from pymllm.tuning.tune import ALL, MISSING, Report
from pymllm.tuning.tune import tune as run_tuning
from pymllm_kernels import Counts, DeviceFacts, LinearProblem, counters, device_facts, select_kernel
from pymllm_kernels.common.forms import Form, compile_forms, names_of
from pymllm_kernels.tuning import BUCKETS

OFF = "off"
TUNE = (OFF, MISSING, ALL)
MAX_TOKENS = 8192
# Up to so many tokens every number may have a configuration of its own. Beyond, between two multiples of
# the smallest tile, only the overlap of two kernels may change, once: the first and the last tell.
_FEW, _TILE = 16, 8
Progress = Callable[[str], None]


@dataclass(frozen=True)
class WarmedUp:
    """What :func:`warmup` did.

    Attributes:
        layers: different layers that were warmed.
        kernels: kernel -> how many of them it runs.
        forms: names of the compiled forms that they need.
        compiled: how many of these were not in the cache.
        tuned: configurations that were searched for.
        untuned: layers and numbers of tokens without a configuration that can run, and why.
        seconds: how long it took.
    """

    layers: int
    kernels: dict[str, int]
    forms: list[str]
    compiled: int
    tuned: int
    untuned: dict[str, str]
    seconds: float


def warmup(
    checkpoint: str | Path | None = None,
    *,
    shapes: Iterable[tuple[int, int]] = (),
    device: torch.device | str = "cuda",
    max_tokens: int = MAX_TOKENS,
    tune: str = MISSING,
    parallel: Sequence[int] = (1,),
    schemes: Sequence[str] = SCHEMES,
    group_size: int = 128,
    dtype: torch.dtype | None = None,
    workers: int | None = None,
    progress: Progress = lambda text: None,
) -> WarmedUp:
    """Tunes and compiles what calls of a model's layers with 1 to ``max_tokens`` tokens can need.

    What was found and compiled is kept on disk (tuning: ``pymllm.tuning``, code: Triton's cache), so
    that a process which serves afterwards neither tunes nor compiles. Rows of activations are taken to
    be contiguous and on 16 elements; others may need a form of their own.

    Args:
        checkpoint: a checkpoint's directory; its layers, also fused as engines run them.
        shapes: (N, K) of further layers.
        device: the GPU.
        max_tokens: the most tokens of a call.
        tune: ``"off"``, ``"missing"`` for what was never tuned on this machine, ``"all"`` for everything.
        parallel: over how many GPUs layers are cut.
        schemes: of ``shapes``.
        group_size: of ``shapes``, inputs that share a scale in W4A16.
        dtype: of activations; the checkpoint's own, for ``shapes`` bf16, if ``None``.
        workers: processes that compile; the number of cores if ``None``.
        progress: told each step.

    Raises:
        ValueError: there is nothing to warm, or an argument or the checkpoint is not as stated.
        RuntimeError: a form does not compile.
    """
    if tune not in TUNE:
        raise ValueError(f"tune: found {tune!r}, accepted {TUNE}")
    facts = device_facts(device)
    problems, biases = layers_to_warm(
        checkpoint, shapes, facts, parallel=parallel, schemes=schemes, group_size=group_size,
        dtype=dtype,
    )  # fmt: skip
    return warm(
        problems, biases=biases, device=device, max_tokens=max_tokens, tune=tune, workers=workers,
        progress=progress,
    )  # fmt: skip


def layers_to_warm(
    checkpoint: str | Path | None,
    shapes: Iterable[tuple[int, int]],
    facts: DeviceFacts,
    *,
    parallel: Sequence[int] = (1,),
    schemes: Sequence[str] = SCHEMES,
    group_size: int = 128,
    dtype: torch.dtype | None = None,
) -> tuple[list[LinearProblem], tuple[torch.dtype | None, ...]]:
    """The different layers of a checkpoint and of shapes, and the dtypes of their biases.

    Raises:
        ValueError: there are none, or the checkpoint is not as its format says.
    """
    problems = shape_problems(
        shapes, facts, schemes=schemes, group_size=group_size, dtype=dtype or torch.bfloat16
    )
    biases: tuple[torch.dtype | None, ...] = (None,)
    if checkpoint is not None:
        problems += checkpoint_problems(checkpoint, facts, dtype=dtype, parallel=parallel)
        with Checkpoint(checkpoint) as opened:
            tensors = [found for module in opened.modules().values() for found in module.items()]
        biases += tuple({info.dtype for name, info in tensors if name == "bias"})
    problems = list(dict.fromkeys(problems))
    if not problems:
        raise ValueError("found no layer to warm, expected a checkpoint or shapes")
    return problems, biases


def warm(
    problems: Sequence[LinearProblem],
    *,
    biases: Sequence[torch.dtype | None] = (None,),
    device: torch.device | str | None = None,
    max_tokens: int = MAX_TOKENS,
    tune: str = OFF,
    workers: int | None = None,
    progress: Progress = lambda text: None,
) -> WarmedUp:
    """:func:`warmup` of layers that are known; with ``tune="off"`` no GPU is needed.

    Args:
        problems: the layers, of one device.
        biases: dtypes of biases, ``None`` for no bias.
        device: the GPU that tunes.
        max_tokens: see :func:`warmup`.
        tune: see :func:`warmup`.
        workers: see :func:`warmup`.
        progress: see :func:`warmup`.
    """
    if max_tokens < 1:
        raise ValueError(f"max_tokens: found {max_tokens}, accepted 1 or more")
    began = time.monotonic()
    tuned = Report()
    if tune != OFF:
        assert device is not None
        tokens = [m for m in BUCKETS if m < 2 * max_tokens]
        tuned = run_tuning(problems, tokens, mode=tune, device=device, progress=progress)
    kernels: dict[str, int] = {}
    forms: dict[Form, None] = {}
    for done, problem in enumerate(problems):
        progress(f"[{done + 1}/{len(problems)}] forms of {problem.scheme} {problem.n}x{problem.k}")
        name = select_kernel(problem).kernel.name
        kernels[name] = kernels.get(name, 0) + 1
        forms |= dict.fromkeys(forms_of(problem, max_tokens, biases))
    compiled = 0
    if forms:
        compiling = time.monotonic()

        def told(done: int, of: int) -> None:
            left = (time.monotonic() - compiling) / done * (of - done) if done else 0.0
            progress(
                f"compiled {done} of {of} forms" + (f", about {left:.0f} s left" if left else "")
            )

        compiled = compile_forms(forms, problems[0].device, told, workers)
    return WarmedUp(
        len(problems), kernels, names_of(list(forms)), compiled, len(tuned.results),
        tuned.failures, time.monotonic() - began,
    )  # fmt: skip


def forms_of(
    problem: LinearProblem, max_tokens: int, biases: Sequence[torch.dtype | None] = (None,)
) -> list[Form]:
    """The forms that calls of a layer with 1 to ``max_tokens`` tokens need."""
    kernel = select_kernel(problem).kernel
    found: dict[Form, None] = {}
    tokens = {*range(1, min(_FEW, max_tokens) + 1)}
    for first in range(1, max_tokens + 1, _TILE):
        tokens |= {first, min(first + _TILE - 1, max_tokens)}
    for m in sorted(tokens):
        for bias in biases:
            found |= dict.fromkeys(kernel.forms(problem, m, bias=bias))
    return list(found)


def verify(
    problems: Sequence[LinearProblem],
    device: torch.device | str,
    *,
    max_tokens: int = MAX_TOKENS,
    progress: Progress = lambda text: None,
) -> Counts:
    """What a fresh process compiles and tunes when it calls these layers with every number of tokens.

    Args:
        problems: the layers, called one after the other in the same process.
        device: the GPU.
        max_tokens: the most tokens of a call.
        progress: told each step.

    Returns:
        The counts of that process: 0 compiled and 0 tuned after :func:`warmup`.
    """
    context = multiprocessing.get_context("spawn")
    counted = Counts()
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=context) as pool:
        for done, problem in enumerate(problems):
            what = f"{problem.scheme} {problem.n}x{problem.k} with 1 to {max_tokens} tokens"
            progress(f"[{done + 1}/{len(problems)}] calling {what}")
            counted = pool.submit(_sweep, problem, str(device), max_tokens).result()
    return counted


def _sweep(problem: LinearProblem, place: str, max_tokens: int) -> Counts:
    """Calls a layer with every number of tokens; what this process has counted so far."""
    from pymllm.tuning.cases import GpuCase

    device = torch.device(place)
    if device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    torch.cuda.set_device(device)
    kernel = select_kernel(problem).kernel
    if kernel.tunable is not None:
        case = GpuCase(kernel, problem, device, max_tokens, copies=1)
        with torch.no_grad():
            for m in range(1, max_tokens + 1):
                case.call(m)
        torch.cuda.synchronize()
    return counters()
