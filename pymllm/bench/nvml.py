"""Clocks, power, temperature and throttling of one NVIDIA GPU, read through NVML in milliseconds."""

from __future__ import annotations

import ctypes
from typing import Any

import torch

LIBRARY = "libnvidia-ml.so.1"
_SM, _MEMORY = 1, 2
_TEMPERATURE = 0
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
        OSError: the library is not there, or does not know the GPU; the message says which.
    """

    def __init__(self, device: torch.device) -> None:
        self._nvml: Any = ctypes.CDLL(LIBRARY)
        self._demand(self._nvml.nvmlInit_v2(), "nvmlInit")
        # Its numbering ignores CUDA_VISIBLE_DEVICES; the uuid does not.
        properties: Any = torch.cuda.get_device_properties(device)
        self._handle = ctypes.c_void_p()
        name = f"GPU-{properties.uuid}".encode()
        code = self._nvml.nvmlDeviceGetHandleByUUID(name, ctypes.byref(self._handle))
        self._demand(code, "nvmlDeviceGetHandleByUUID")

    def _demand(self, code: int, call: str) -> None:
        if code != 0:
            raise OSError(f"{call}: NVML error {code}")

    def _number(self, call: str, *arguments: int, kind: Any = ctypes.c_uint) -> int | None:
        """What a query writes, ``None`` where this GPU does not answer it."""
        found = kind()
        code = getattr(self._nvml, call)(self._handle, *arguments, ctypes.byref(found))
        return int(found.value) if code == 0 else None

    def driver(self) -> str | None:
        """Version of the driver."""
        text = ctypes.create_string_buffer(96)
        code = self._nvml.nvmlSystemGetDriverVersion(text, len(text))
        return text.value.decode() if code == 0 else None

    def at_work(self) -> Facts:
        """``sm_mhz``, ``power_w`` (mean of the last second) and ``throttle``, of this moment.

        ``throttle`` names what holds the clock down, ``""`` if nothing does. Whatever the GPU does not
        tell is ``None``.
        """
        clock = self._number("nvmlDeviceGetClockInfo", _SM)
        call = "nvmlDeviceGetCurrentClocksThrottleReasons"
        bits = self._number(call, kind=ctypes.c_ulonglong)
        power = self._number("nvmlDeviceGetPowerUsage")
        return {
            "sm_mhz": clock,
            "power_w": None if power is None else power / 1e3,
            "throttle": None if bits is None else throttling(bits),
        }

    def facts(self) -> Facts:
        """:meth:`at_work` with ``memory_mhz`` and ``temperature_c``."""
        return {
            **self.at_work(),
            "memory_mhz": self._number("nvmlDeviceGetClockInfo", _MEMORY),
            "temperature_c": self._number("nvmlDeviceGetTemperature", _TEMPERATURE),
        }


def throttling(bits: int) -> str:
    """What NVML's bits say holds the clock down, ``""`` if nothing does."""
    return ", ".join(name for bit, name in _REASONS.items() if bits & bit)
