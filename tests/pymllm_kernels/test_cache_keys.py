"""Triton's cache keys of our kernels: what one process compiles, every other one finds."""

from __future__ import annotations

import collections
import subprocess
import sys

import pytest

pytest.importorskip("triton")

from pymllm_kernels.tuning.source import source_of
from pymllm_kernels.w4a16 import tunable as w4a16
from pymllm_kernels.w8a8_int8 import tunable as w8a8

_KEYS = """
import sys
from pymllm_kernels.testing.cases import all_cases

kernels = {case.kernel: case for case in all_cases("sm_90", (1, 64))}
ordered = sorted(kernels.values(), key=lambda case: case.kernel.__name__, reverse="backwards" in sys.argv)
for case in ordered:
    case.source()
print(sorted((case.kernel.__name__, case.kernel.cache_key) for case in ordered))
"""


def test_keys_do_not_depend_on_what_was_compiled_before() -> None:
    found = [
        subprocess.run(
            [sys.executable, "-c", _KEYS, order], check=True, capture_output=True, text=True
        ).stdout
        for order in ("forwards", "backwards")
    ]
    assert found[0] == found[1] and "w4a16_gemm_hopper" in found[0]


@pytest.mark.parametrize(
    "tunable", [w4a16.HOPPER, w4a16.TRITON, w8a8.HOPPER, w8a8.TRITON], ids=lambda t: t.operation
)
def test_constants_of_a_kernel_have_names_of_their_own(tunable: w4a16.HopperTunable) -> None:
    """Triton orders those of one name by their modules' addresses, another order every time."""
    names = collections.Counter(
        name for (_, name), text in source_of(tunable.sources).items() if "constexpr(" in text
    )
    assert not [name for name, count in names.items() if count > 1]
