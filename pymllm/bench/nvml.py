"""Clocks, power, temperature and throttling of one NVIDIA GPU, read through NVML in milliseconds."""

from __future__ import annotations

from typing import Any

import torch

# Bits of NVML's clock event reasons that lower a clock.
_REASONS = {
    0x02: "application clocks",
    0x04: "power cap",
    0x08: "hardware slowdown",
    0x20: "thermal",
    0x40: "hardware thermal",
    0x80: "power brake",
}
Facts = dict[str, Any]


class Board:
    """The GPU behind a torch device.

    Raises:
        OSError: NVML or its Python package is not there, or does not know the GPU; the message says which.
    """

    def __init__(self, device: torch.device) -> None:
        try:
            import pynvml
        except ImportError:
            raise OSError("pynvml is not installed (pip install nvidia-ml-py)") from None
        self._nvml = pynvml
        properties: Any = torch.cuda.get_device_properties(device)
        try:
            pynvml.nvmlInit()
            # Its numbering ignores CUDA_VISIBLE_DEVICES; the uuid does not.
            self._handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{properties.uuid}")
        except pynvml.NVMLError as error:
            raise OSError(f"NVML: {error}") from error

    def _told(self, call: str, *arguments: object) -> Any:
        """What a query gives, ``None`` where this GPU or driver does not answer it."""
        try:
            return getattr(self._nvml, call)(*arguments)
        except self._nvml.NVMLError:
            return None

    def driver(self) -> str | None:
        """Version of the driver."""
        version: str | None = self._told("nvmlSystemGetDriverVersion")
        return version

    def at_work(self) -> Facts:
        """``sm_mhz``, ``power_w`` (mean of the last second) and ``throttle``, of this moment.

        ``throttle`` names what holds the clock down, ``""`` if nothing does. Whatever the GPU does not
        tell is ``None``.
        """
        bits = self._told("nvmlDeviceGetCurrentClocksEventReasons", self._handle)
        power = self._told("nvmlDeviceGetPowerUsage", self._handle)
        return {
            "sm_mhz": self._told("nvmlDeviceGetClockInfo", self._handle, self._nvml.NVML_CLOCK_SM),
            "power_w": None if power is None else power / 1e3,
            "throttle": None if bits is None else throttling(bits),
        }

    def facts(self) -> Facts:
        """:meth:`at_work` with ``memory_mhz`` and ``temperature_c``."""
        nvml, handle = self._nvml, self._handle
        return {
            **self.at_work(),
            "memory_mhz": self._told("nvmlDeviceGetClockInfo", handle, nvml.NVML_CLOCK_MEM),
            "temperature_c": self._told(
                "nvmlDeviceGetTemperature", handle, nvml.NVML_TEMPERATURE_GPU
            ),
        }


def throttling(bits: int) -> str:
    """What NVML's bits say holds the clock down, ``""`` if nothing does."""
    return ", ".join(name for bit, name in _REASONS.items() if bits & bit)
