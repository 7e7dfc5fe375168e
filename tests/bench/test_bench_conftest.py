"""``bench/conftest.py``: what a saved series of pytest-benchmark is compared by."""

from __future__ import annotations

import copy
import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch

from pymllm.bench.roof import Roof

ROOT = Path(__file__).parents[2]


@pytest.fixture
def conftest(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The module, as if on a GPU."""
    path = ROOT / "bench" / "conftest.py"
    spec = importlib.util.spec_from_file_location("bench_conftest", path)
    assert spec is not None and spec.loader is not None
    module: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    board = {"device": "cuda", "gpu": "NVIDIA H200", "capability": "9.0", "l2_bytes": 2**26}
    monkeypatch.setattr(module, "default_device", lambda: torch.device("cuda", 0))
    monkeypatch.setattr(module, "environment", lambda device: dict(board))
    monkeypatch.setattr(module, "clocks", lambda device: {"memory_mhz": 3201})
    monkeypatch.setattr(module, "measure_roof", lambda device: Roof(4.3, 790.0, 900.0))
    return module


def compared(module: Any, old: dict[str, Any], new: dict[str, Any]) -> None:
    saved = {"machine_info": {"pymllm_bench": old}}
    module.pytest_benchmark_compare_machine_info(None, None, {"pymllm_bench": new}, saved)


def test_series_of_one_gpu_are_compared(conftest: Any) -> None:
    facts = conftest._facts("cold")
    compared(conftest, facts, copy.deepcopy(facts))
    # Saved before the rates were measured.
    compared(conftest, {key: facts[key] for key in facts if key != "roof"}, facts)


@pytest.mark.parametrize(
    "place, value, reason",
    [
        (("roof", "bf16_tops"), 500.0, r"measured bf16_tops\): 790 and 500"),
        (("environment", "gpu"), "NVIDIA H100", "NVIDIA H200 and NVIDIA H100"),
        (("environment", "clocks_before"), {"memory_mhz": 2619}, "3201 and 2619"),
        (("method", "cache"), "hot", "cold and hot"),
    ],
)
def test_series_of_different_machines_are_refused(
    conftest: Any, place: tuple[str, str], value: object, reason: str
) -> None:
    old = conftest._facts("cold")
    new = copy.deepcopy(old)
    new[place[0]][place[1]] = value
    with pytest.raises(pytest.UsageError, match=reason):
        compared(conftest, old, new)
    with pytest.raises(pytest.UsageError, match="does not say"):
        conftest.pytest_benchmark_compare_machine_info(None, None, {}, {"machine_info": {}})
