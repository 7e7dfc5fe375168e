"""Every kernel compiled ahead of time: it builds, does not spill, and has no wgmma register race."""

from __future__ import annotations

import pytest
import triton

from pymllm_kernels.common import launcher
from pymllm_kernels.common.specialization import Specialization
from pymllm_kernels.testing import sass_lint
from pymllm_kernels.testing.aot import compile_for, idle_barriers
from pymllm_kernels.testing.cases import all_cases

TRITON = tuple(int(part) for part in triton.__version__.split(".")[:2])
OTHER_TARGETS = ["sm_80", "sm_86", "sm_89", "sm_100", "sm_120", "gfx942"]


def _cases(target: str, tokens: tuple[int, ...] = (1, 17, 64, 4096)) -> list[object]:
    return [pytest.param(case, id=case.name) for case in all_cases(target, tokens)]


@pytest.mark.parametrize("case", _cases("sm_90"))
def test_hopper(case: Specialization) -> None:
    """Every kernel and tile on sm_90. fp32 activations run without tensor cores, still no spill."""
    code = compile_for(case, "sm_90")
    assert code.cubin is not None and code.ptx is not None
    # What the launcher will pass is what this version of Triton made the kernel take.
    launcher.expect_parameters(case, launcher.parameter_layout(case), code.ptx)
    if case.kernel.is_gluon() and TRITON >= (3, 8):
        # Its ptxas spills in the tails of warp-specialized kernels where that of 3.6 does not.
        loop = sass_lint.sass_statistics(sass_lint.disassemble(code.cubin)).main_loop
        assert loop is not None and loop.ldl <= 2 and loop.stl <= 2
    else:
        assert not code.spills, (code.spill_store_bytes, code.spill_load_bytes)
    assert sass_lint.lint_cubin(code.cubin) == []
    assert idle_barriers(code.ttgir) == []
    assert not [m for m in code.messages if "C75" in m], code.messages


# One M tail tile and the largest one: what differs between targets is the instruction set.
@pytest.mark.parametrize("target", OTHER_TARGETS)
def test_other_targets(target: str) -> None:
    for case in all_cases(target, (1, 4096)):
        code = compile_for(case, target)
        if target.startswith("gfx"):
            assert code.amdgcn
        else:
            assert code.cubin and code.registers > 0, case.name
