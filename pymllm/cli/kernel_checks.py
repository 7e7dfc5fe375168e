"""The doctor's checks of kernels that ran: functions of the probe's answers."""

from __future__ import annotations

from collections.abc import Mapping

from pymllm.cli.checks import FAILED, OK, SKIPPED, Check, Gpu

# W4A16 rounds to bf16 only, W8A8 also rounds activations to 8 bits.
LAYER_TOLERANCE = {"W4A16": 0.01, "W8A8": 0.03}


def check_launch(gpu: Gpu | None, result: Mapping[str, object], blocked_by: str | None) -> Check:
    """A small Triton kernel, compiled afresh and launched, gives the reference's numbers.

    Args:
        gpu: where, or ``None`` without one.
        result: the probe's answer: ``equal`` or ``error``.
        blocked_by: name of a check that failed before, which explains an error.
    """
    name = "kernel launch"
    if gpu is None:
        return Check(name, SKIPPED, "needs a GPU")
    if not gpu.uses_triton:
        return Check(name, SKIPPED, f"{gpu}: Triton needs 8.0, torch's own matmuls are used")
    error = result.get("error", None if result else "no answer")
    if error is None and result.get("equal"):
        return Check(name, OK, f"per_token_quant_int8 compiled and right on {gpu}")
    if error is None:
        return Check(
            name,
            FAILED,
            f"per_token_quant_int8 differs from its reference on {gpu}",
            "pip install --upgrade torch triton, then report it if it stays",
        )
    if blocked_by is not None:
        return Check(name, SKIPPED, f"cannot work before: {blocked_by}")
    return Check(name, FAILED, f"on {gpu}: {error}", "pip install --upgrade torch triton")


def check_layers(place: str, result: Mapping[str, object], blocked_by: str | None = None) -> Check:
    """One small layer of each scheme is as close to fp64 as its scheme allows.

    Args:
        place: ``CPU`` or the GPU's name.
        result: the probe's answer: ``layers``, ``{scheme: [kernel, error]}``, or ``error``.
        blocked_by: name of a check that failed before, which explains an error.
    """
    name = "layers on the CPU" if place == "CPU" else "layers on the GPU"
    layers = result.get("layers")
    if not isinstance(layers, Mapping):
        if blocked_by is not None:
            return Check(name, SKIPPED, f"cannot work before: {blocked_by}")
        error = str(result.get("error", "no answer"))
        package = "pymllm" if "No module named 'pymllm" in error else "torch"
        return Check(name, FAILED, error, f"pip install --force-reinstall {package}")
    parts = [f"{scheme} {kernel} error {error:.1e}" for scheme, (kernel, error) in layers.items()]
    # Not `error >= limit`: NaN must fail.
    bad = [s for s, (_, error) in layers.items() if not error < LAYER_TOLERANCE[s]]
    if bad:
        fix = "pip install --upgrade torch triton, then report it if it stays"
        return Check(name, FAILED, f"wrong numbers from {', '.join(bad)}: {'; '.join(parts)}", fix)
    return Check(name, OK, "; ".join(parts))
