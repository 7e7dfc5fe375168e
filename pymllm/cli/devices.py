"""Which device a command runs on or plans for."""

from __future__ import annotations

import torch

from pymllm_kernels import DeviceFacts, device_facts, planned_device


def target_device(capability: str | None) -> tuple[DeviceFacts, str]:
    """The device to plan for, and how it came to be that one."""
    if capability is not None:
        return planned_device(capability), "as asked"
    if torch.cuda.is_available():
        return device_facts("cuda"), "the GPU here"
    return planned_device("cpu"), "there is no GPU here; --capability 9.0 plans for one"


def best_device(name: str | None) -> torch.device:
    """The device to run on: the one named, else a GPU if torch can use one, else the CPU.

    Raises:
        ValueError: there is no such device here.
    """
    here = torch.cuda.is_available()
    try:
        device = torch.device(name or ("cuda" if here else "cpu"))
    except RuntimeError:
        raise ValueError(f"device: found {name!r}, accepted cpu, cuda or cuda:INDEX") from None
    if device.type == "cpu":
        return device
    if device.type != "cuda":
        raise ValueError(f"device: found {name!r}, accepted cpu, cuda or cuda:INDEX")
    if not here:
        raise ValueError(f"device: found {name!r}, but torch can use no GPU here (pymllm doctor)")
    index = torch.cuda.current_device() if device.index is None else device.index
    if index >= torch.cuda.device_count():
        raise ValueError(f"device: found {name!r}, but there are {torch.cuda.device_count()} GPUs")
    return torch.device("cuda", index)
