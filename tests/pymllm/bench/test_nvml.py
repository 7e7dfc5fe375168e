"""Clocks and power through NVML, as its package answers, and where it is not there."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from pymllm.bench import environment, nvml

GPU = torch.device("cuda", 0)


class NVMLError(Exception):
    pass


class Driver(SimpleNamespace):
    """The package ``pynvml`` on a machine with one GPU."""

    NVMLError = NVMLError
    NVML_CLOCK_SM, NVML_CLOCK_MEM, NVML_TEMPERATURE_GPU = 1, 2, 0
    uuid = "GPU-1234"

    def nvmlInit(self) -> None:
        pass

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:
        if uuid != self.uuid:
            raise NVMLError("Not Found")
        return "handle"

    def nvmlSystemGetDriverVersion(self) -> str:
        return "580.1"

    def nvmlDeviceGetClockInfo(self, handle: str, kind: int) -> int:
        return {1: 1980, 2: 3201}[kind]

    def nvmlDeviceGetPowerUsage(self, handle: str) -> int:
        return 123_456

    def nvmlDeviceGetCurrentClocksEventReasons(self, handle: str) -> int:
        return 0x4 | 0x20

    def nvmlDeviceGetTemperature(self, handle: str, sensor: int) -> int:
        raise NVMLError("Not Supported")


@pytest.fixture(autouse=True)
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    properties = SimpleNamespace(uuid="1234")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    environment.board.cache_clear()
    yield
    environment.board.cache_clear()


def there(monkeypatch: pytest.MonkeyPatch, driver: Any) -> tuple[nvml.Board | None, str | None]:
    monkeypatch.setitem(sys.modules, "pynvml", driver)
    return environment.board(GPU)


def test_what_the_board_tells(monkeypatch: pytest.MonkeyPatch) -> None:
    board, reason = there(monkeypatch, Driver())
    assert board is not None and reason is None
    assert board.driver() == "580.1"
    at_work = {"sm_mhz": 1980, "power_w": 123.456, "throttle": "power cap, thermal"}
    assert board.at_work() == at_work
    # What this GPU does not answer is not known; the rest is.
    assert board.facts() == {**at_work, "memory_mhz": 3201, "temperature_c": None}


def test_without_the_package_or_the_gpu_there_are_no_readings(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert there(monkeypatch, None) == (
        None, "pynvml is not installed (pip install nvidia-ml-py)",
    )  # fmt: skip
    environment.board.cache_clear()
    assert there(monkeypatch, Driver(uuid="GPU-5678")) == (None, "NVML: Not Found")


def test_the_package_has_what_is_asked_of_it() -> None:
    pynvml = pytest.importorskip("pynvml", reason="needs nvidia-ml-py (pip install '.[bench]')")
    for name in vars(Driver):
        assert name.startswith("_") or name == "uuid" or hasattr(pynvml, name), name


def test_what_holds_a_clock_down() -> None:
    assert nvml.throttling(0x1) == ""
    assert nvml.throttling(0x4 | 0x20) == "power cap, thermal"
