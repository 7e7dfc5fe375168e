"""Where Triton kernels run."""

from __future__ import annotations

import torch

from pymllm_kernels.problem import LinearProblem

MIN_TRITON_CAPABILITY = (8, 0)


def why_not_triton(problem: LinearProblem) -> str | None:
    """``None`` if a Triton kernel runs on the problem's device and dtypes, else the reason."""
    try:
        from pymllm_kernels.device import interpreting

        interpreted = interpreting()
    except ImportError:
        return "needs Triton, which is not installed (pip install triton)"
    device = problem.device
    if device.type == "cpu" and not interpreted:
        return "needs a GPU, the device is a CPU"
    if device.capability is not None and device.capability < MIN_TRITON_CAPABILITY:
        found = "{}.{}".format(*device.capability)
        return f"needs capability 8.0 (Triton has no tensor-core path below it), found {found}"
    if problem.act_dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return f"takes bf16, fp16 or fp32 activations, found {problem.act_dtype}"
    return None


def why_not_gluon_hopper(problem: LinearProblem) -> str | None:
    """``None`` if the kernels written in Gluon for Hopper run on the problem's device, else the reason."""
    capability = problem.device.capability
    if capability != (9, 0):
        found = "{}.{}".format(*capability) if capability else problem.device.name
        return f"needs capability 9.0 (Hopper's wgmma and copy engine), found {found}"
    try:
        from triton.experimental.gluon.nvidia import hopper  # noqa: F401
    except ImportError:
        return "needs Gluon, which this version of Triton lacks (3.6 and later have it)"
    return None


def device_note(problem: LinearProblem) -> str | None:
    """What a user should know of a device on which the Triton kernels were not measured."""
    device = problem.device
    if device.type == "hip":
        return "AMD GPUs are untested: the portable kernels compile for them"
    if not device.known and device.capability is not None and device.capability >= (8, 0):
        found = "{}.{}".format(*device.capability)
        return (
            f"capability {found} is not yet known: generic kernel, smallest shared memory assumed"
        )
    return None
