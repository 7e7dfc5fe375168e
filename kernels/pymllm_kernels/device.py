"""What the kernels need to know of a device, read on first use and never at import."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

KIB = 1024

# Shared memory one block can opt in to, bytes (CUDA C++ Programming Guide, "Compute Capabilities").
_SHARED_MEMORY = {
    (8, 0): 163 * KIB,
    (8, 6): 99 * KIB,
    (8, 7): 163 * KIB,
    (8, 9): 99 * KIB,
    (9, 0): 227 * KIB,
    (10, 0): 227 * KIB,
    (10, 3): 227 * KIB,
    (11, 0): 227 * KIB,
    (12, 0): 99 * KIB,
    (12, 1): 99 * KIB,
}
# The smallest opt-in limit since sm_80: a tile that fits it runs on a capability not yet known.
_SHARED_MEMORY_UNKNOWN = 99 * KIB
_SHARED_MEMORY_HIP = 64 * KIB
# Of a planned device, where the launch parameters depend on it: the H100 SXM and the H200.
_MULTIPROCESSORS = {(9, 0): 132}


@dataclass(frozen=True)
class DeviceFacts:
    """A device as the selection and the launch parameters see it.

    Attributes:
        type: ``"cuda"`` (NVIDIA), ``"hip"`` (AMD) or ``"cpu"``.
        name: the board's name, or a description of a planned device.
        capability: CUDA compute capability, ``None`` off NVIDIA.
        shared_memory: bytes of shared memory one block can use, 0 on a CPU.
        multiprocessors: number of SMs or compute units, 0 when unknown.
    """

    type: str
    name: str
    capability: tuple[int, int] | None
    shared_memory: int
    multiprocessors: int

    @property
    def known(self) -> bool:
        """Whether this capability is one the library's tables list."""
        return self.capability is None or self.capability in _SHARED_MEMORY


CPU = DeviceFacts("cpu", "CPU", None, 0, 0)


def planned_device(capability: str) -> DeviceFacts:
    """Facts of a GPU that is not here, for planning: ``"9.0"`` or ``"cpu"``.

    Raises:
        ValueError: the text is not ``MAJOR.MINOR`` nor ``cpu``.
    """
    if capability == "cpu":
        return CPU
    major, dot, minor = capability.partition(".")
    if not (dot and major.isdecimal() and minor.isdecimal()):
        raise ValueError(
            f"capability: found {capability!r}, accepted MAJOR.MINOR such as 9.0, or cpu"
        )
    pair = (int(major), int(minor))
    shared = _SHARED_MEMORY.get(pair, _SHARED_MEMORY_UNKNOWN if pair >= (8, 0) else 48 * KIB)
    return DeviceFacts(
        "cuda", f"a GPU of capability {capability}", pair, shared, _MULTIPROCESSORS.get(pair, 0)
    )


def device_facts(device: torch.device | str) -> DeviceFacts:
    """Facts of a torch device; a CUDA device without an index is the current one."""
    device = torch.device(device)
    if device.type == "cpu":
        return CPU
    if device.type != "cuda":
        raise ValueError(f"device: found {device}, accepted a CPU or a CUDA (NVIDIA or AMD) device")
    index = torch.cuda.current_device() if device.index is None else device.index
    return _gpu_facts(index)


@functools.cache
def _gpu_facts(index: int) -> DeviceFacts:
    properties = torch.cuda.get_device_properties(index)
    units = properties.multi_processor_count
    if torch.version.hip is not None:
        return DeviceFacts("hip", properties.name, None, _SHARED_MEMORY_HIP, units)
    capability = (properties.major, properties.minor)
    listed = _SHARED_MEMORY.get(capability, _SHARED_MEMORY_UNKNOWN)
    # Not every torch release exposes what the driver says.
    shared = getattr(properties, "shared_memory_per_block_optin", listed)
    return DeviceFacts("cuda", properties.name, capability, shared, units)


def interpreting() -> bool:
    """Whether Triton runs kernels through its CPU interpreter (``TRITON_INTERPRET=1``)."""
    import triton

    return bool(triton.knobs.runtime.interpret)
