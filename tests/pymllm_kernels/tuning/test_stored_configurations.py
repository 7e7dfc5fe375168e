"""Configurations of the Hopper kernels as tables store them."""

from __future__ import annotations

from typing import Any

import pytest

from pymllm_kernels.device import planned_device
from pymllm_kernels.tuning.keys import TuningKey
from pymllm_kernels.w4a16.tunable import HOPPER as W4A16
from pymllm_kernels.w8a8_int8.tunable import HOPPER as W8A8


@pytest.mark.parametrize(("tunable", "group_size"), [(W4A16, 128), (W8A8, -1)])
def test_stored_configurations_come_back(tunable: Any, group_size: int) -> None:
    key = TuningKey(tunable.operation, 8192, 8192, group_size, "bfloat16", "")
    facts = planned_device("9.0")
    found = tunable.candidates(key, 1, facts)
    names = {type(config).__name__ for config in found}
    assert {type(config) for config in found} == set(tunable.kernels.values())
    assert {"DecodeConfig", "HopperConfig"} <= names
    for config in found:
        assert tunable.from_json(tunable.to_json(config)) == config
        assert tunable.adapt(config, key, 1, facts) == config
        assert tunable.why_invalid(config, key, 1, facts) is None
