"""What the doctor asks of a child process, so that a crash there is an answer, too.

``python -m pymllm.cli.probe facts | kernels DEVICE`` prints one JSON document as its last line.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

_SIZE = 256
_ROWS = 16
_GROUP = 128


def run_child(
    arguments: Sequence[str], environ: Mapping[str, str] | None = None, timeout: float = 240.0
) -> dict[str, Any]:
    """Runs this module in a fresh interpreter.

    Args:
        arguments: the probe and its arguments.
        environ: variables to set in addition.
        timeout: seconds after which the child is stopped.

    Returns:
        The child's answer, or ``{"error": text}`` if it crashed, hung or said nothing.
    """
    command = [sys.executable, "-m", "pymllm.cli.probe", *arguments]
    path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
    env = {**os.environ, "PYTHONPATH": path, **(environ or {})}
    try:
        done = subprocess.run(
            command, check=False, capture_output=True, text=True, timeout=timeout, env=env
        )
    except subprocess.TimeoutExpired:
        return {"error": f"no answer within {timeout:.0f} s"}
    except OSError as error:
        return {"error": f"cannot start {sys.executable}: {error.strerror or error}"}
    return read_answer(done.returncode, done.stdout, done.stderr)


def read_answer(returncode: int, stdout: str, stderr: str) -> dict[str, Any]:
    """The answer in a child's output; ``blamed`` holds what a compiler said on stderr."""
    lines = stdout.strip().splitlines()
    try:
        answer = json.loads(lines[-1]) if lines else None
    except ValueError:
        answer = None
    if not isinstance(answer, dict):
        said = next((line for line in reversed(stderr.splitlines()) if line.strip()), "no output")
        what = f"killed by signal {-returncode}" if returncode < 0 else f"exit code {returncode}"
        return {"error": f"the probe crashed ({what}): {said.strip()}"}
    blamed = re.search(r"^.*\berror: .*$|^.*\bptxas fatal.*$", stderr, re.MULTILINE)
    return {**answer, "blamed": blamed.group().strip() if blamed else None}


def facts() -> dict[str, Any]:
    """What :mod:`pymllm.cli.doctor` reads: ``torch`` with its GPUs, ``triton`` with its tools."""
    torch_facts = _answer(_torch_facts)
    capabilities = {tuple(gpu["capability"]) for gpu in torch_facts.get("gpus", [])
                    if gpu["capability"]}  # fmt: skip
    triton_facts = _answer(_triton_facts)
    tools = [] if "error" in triton_facts else sorted(capabilities) or [(9, 0)]
    return {
        "torch": torch_facts,
        "triton": triton_facts,
        "ptxas": [{"capability": pair, **_answer(_ptxas, pair)} for pair in tools],
    }


def _answer(function: Callable[..., dict[str, Any]], *arguments: object) -> dict[str, Any]:
    """What a function returns; whatever a damaged installation raises is an answer, too."""
    try:
        return function(*arguments)
    except Exception as error:  # noqa: BLE001
        return {"error": f"{type(error).__name__}: {_first_line(str(error))}"}


def _torch_facts() -> dict[str, Any]:
    import torch

    version = torch.version
    answer: dict[str, Any] = {
        "version": torch.__version__, "cuda": version.cuda, "hip": version.hip,
        "gpus": [], "gpu_error": None,
    }  # fmt: skip
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        available = torch.cuda.is_available()
    if available:
        answer["gpus"] = [_gpu(torch, index) for index in range(torch.cuda.device_count())]
    elif caught:
        answer["gpu_error"] = _first_line(str(caught[0].message))
    return answer


def _triton_facts() -> dict[str, Any]:
    import triton

    return {
        "version": triton.__version__,
        "cache_dir": triton.knobs.cache.dir,
        "interpret": bool(triton.knobs.runtime.interpret),
    }


def _gpu(torch: Any, index: int) -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(index)
    nvidia = torch.version.hip is None
    capability = [properties.major, properties.minor] if nvidia else None
    return {"name": properties.name, "capability": capability}


def _ptxas(capability: tuple[int, int]) -> dict[str, Any]:
    """The assembler Triton takes for a capability: since 3.6 it brings more than one."""
    from triton.backends.nvidia import compiler

    if hasattr(compiler, "get_ptxas"):
        tool = compiler.get_ptxas(capability[0] * 10 + capability[1])
    else:
        import triton

        tool = triton.knobs.nvidia.ptxas
    command = [tool.path, "--help"]
    told = subprocess.run(command, check=False, capture_output=True, text=True, timeout=30)
    return {"path": tool.path, "version": tool.version, "help": told.stdout}


def kernels(device: str) -> dict[str, Any]:
    """Launches the smallest Triton kernel, then runs one small layer of each scheme."""
    import torch

    from pymllm_kernels import device_facts

    where = device_facts(device)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(_ROWS, _SIZE, generator=generator).to(device)
    answer: dict[str, Any] = {"launch": {}}
    if where.type != "cpu" and (where.capability is None or where.capability >= (8, 0)):
        answer["launch"] = _answer(_launch, x)
    return {**answer, "layers": _answer(_layers, x.to(torch.bfloat16), generator, where)}


def _launch(x: Any) -> dict[str, Any]:
    import torch

    from pymllm_kernels import per_token_quant_int8
    from pymllm_kernels.per_token_quant_int8 import reference

    codes, scales = per_token_quant_int8(x)
    expected_codes, expected_scales = reference.per_token_quant_int8(x.cpu())
    equal = torch.equal(codes.cpu(), expected_codes)
    return {"equal": equal and torch.equal(scales.cpu().view(-1), expected_scales)}


def _layers(x: Any, generator: Any, where: Any) -> dict[str, Any]:
    """``layers: {scheme: (kernel, relative error against fp64)}`` of a 256 x 256 layer on ``x``'s device."""
    import torch

    from pymllm_kernels import LinearProblem, select_kernel

    def problem(scheme: str, bits: int, group: int, strategy: str | None) -> LinearProblem:
        return LinearProblem(
            scheme, _SIZE, _SIZE, bits, group, True, False, x.dtype, x.dtype, where, strategy
        )

    def random(low: int, high: int, *shape: int) -> torch.Tensor:
        return torch.randint(low, high, shape, generator=generator)

    answers = {}
    codes = random(0, 16, _SIZE, _SIZE)
    shifts = 4 * torch.arange(8)
    words = (codes.view(_SIZE, -1, 8) << shifts).sum(-1).to(torch.int32)
    scale = (torch.rand(_SIZE, _SIZE // _GROUP, generator=generator) / 64 + 0.01).to(x.dtype)
    exact = (codes - 8).double() * scale.double().repeat_interleave(_GROUP, dim=1)
    wna16 = problem("w4a16", 4, _GROUP, None)
    answers["W4A16"] = _layer_error(wna16, (words, scale, None, None), x, exact, select_kernel)

    weight = random(-128, 128, _SIZE, _SIZE).to(torch.int8)
    row_scale = torch.rand(_SIZE, generator=generator) / 64 + 0.01
    exact = weight.double() * row_scale.double()[:, None]
    w8a8 = problem("w8a8_int8", 8, -1, "token")
    answers["W8A8"] = _layer_error(w8a8, (weight, row_scale), x, exact, select_kernel)
    return {"layers": answers}


def _layer_error(
    problem: Any, tensors: tuple[Any, ...], x: Any, weight: Any, select: Any
) -> tuple[str, float]:
    kernel = select(problem).kernel
    on_device = [None if tensor is None else tensor.to(x.device) for tensor in tensors]
    prepared = kernel.prepare(problem, *on_device)
    y = kernel.apply(problem, x, prepared, None).cpu().double()
    expected = x.cpu().double() @ weight.T
    return kernel.name, float((y - expected).norm() / expected.norm())


def _first_line(text: str) -> str:
    return next((line.strip() for line in text.splitlines() if line.strip()), "no message")


def main(arguments: Sequence[str]) -> None:
    """Prints the answer of one probe."""
    probe, *rest = arguments
    answer = _answer(facts if probe == "facts" else kernels, *rest)
    sys.stdout.flush()
    print("\n" + json.dumps(answer))


if __name__ == "__main__":
    main(sys.argv[1:])
