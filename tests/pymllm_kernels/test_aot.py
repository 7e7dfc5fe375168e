"""Ahead-of-time compilation, and the linter on what it makes of real kernels."""

import dataclasses
from typing import Any

import pytest

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")

from pymllm_kernels.common.specialization import Specialization
from pymllm_kernels.testing.aot import AotError, CompiledCode, compile_for, idle_barriers
from pymllm_kernels.testing.sass_lint import (
    disassemble,
    lint_cubin,
    sass_statistics,
)

UNFENCED, FENCED, TEMPORARY = 0, 1, 2


@triton.jit
def _codes(words):
    return tl.inline_asm_elementwise(
        """{
        .reg .b32 t;
        lop3.b32 $0, $4, 0x000F000F, 0x43004300, 0xEA;
        shr.u32 t, $4, 4;
        lop3.b32 $1, t, 0x000F000F, 0x43004300, 0xEA;
        shr.u32 t, $4, 8;
        lop3.b32 $2, t, 0x000F000F, 0x43004300, 0xEA;
        shr.u32 t, $4, 12;
        lop3.b32 $3, t, 0x000F000F, 0x43004300, 0xEA;
        }""",
        "=r,=r,=r,=r,r",
        [words],
        dtype=(tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16),
        is_pure=True,
        pack=2,
    )


@triton.jit
def _register_operand_kernel(
    x_ptr, w_ptr, out_ptr, K, FORM: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    SLICE: tl.constexpr = BLOCK_K // 4
    rn = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    rm = tl.arange(0, BLOCK_M)
    rk = tl.arange(0, SLICE)
    w_ptrs = w_ptr + rn[:, None] * SLICE + rk[None, :]
    x_ptrs = x_ptr + rm[None, :] * K + rk[:, None]
    # Without it ptxas serialises every wgmma, which hides the hazard.
    tl.assume(K > 0)
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for _ in tl.range(0, K, BLOCK_K):
        w0, w1, w2, w3 = _codes(tl.load(w_ptrs))
        into = tl.zeros((BLOCK_N, BLOCK_M), tl.float32) if FORM == 2 else acc
        into = tl.dot(w0, tl.load(x_ptrs), into)
        into = tl.dot(w1, tl.load(x_ptrs + SLICE), into)
        into = tl.dot(w2, tl.load(x_ptrs + 2 * SLICE), into)
        into = tl.dot(w3, tl.load(x_ptrs + 3 * SLICE), into)
        if FORM == 0:
            acc = into
        elif FORM == 1:
            acc = tl.inline_asm_elementwise(
                "", "=f,0", [into], dtype=tl.float32, is_pure=True, pack=1
            )
        else:
            acc += into * 0.5
        w_ptrs += BLOCK_N * SLICE
        x_ptrs += BLOCK_K
    tl.store(out_ptr + rm[None, :] * 4096 + rn[:, None], acc)


@triton.jit
def _copy_kernel(x_ptr, skip_ptr, out_ptr, n, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + at, mask=at < n)
    if skip_ptr is not None:
        x += tl.load(skip_ptr + at, mask=at < n)
    tl.store(out_ptr + at, x, mask=at < n)


@triton.jit
def _mismatched_dot_kernel(out_ptr, BLOCK: tl.constexpr):
    a = tl.zeros((BLOCK, BLOCK), tl.float16)
    b = tl.zeros((2 * BLOCK, BLOCK), tl.float16)
    at = tl.arange(0, BLOCK)
    tl.store(out_ptr + at[:, None] * BLOCK + at[None, :], tl.dot(a, b))


@triton.jit
def _wrong_assembly_kernel(out_ptr, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    y = tl.inline_asm_elementwise(
        "no.such.instruction $0, $1;", "=r,r", [at], dtype=tl.int32, is_pure=True, pack=1
    )
    tl.store(out_ptr + at, y)


def register_operand_case(form: int) -> Specialization:
    return Specialization(
        name=f"register operand, form {form}",
        kernel=_register_operand_kernel,
        signature={"x_ptr": "*bf16", "w_ptr": "*u16", "out_ptr": "*fp32", "K": "i32"},
        constexprs={"FORM": form, "BLOCK_M": 16, "BLOCK_N": 128, "BLOCK_K": 256},
        num_warps=4,
        num_stages=3,
        divisible_by_16=("x_ptr", "w_ptr", "out_ptr", "K"),
    )


COPY = Specialization(
    name="copy",
    kernel=_copy_kernel,
    signature={"x_ptr": "*bf16", "out_ptr": "*bf16", "n": "i32"},
    constexprs={"skip_ptr": None, "BLOCK": 1024},
    num_warps=4,
    num_stages=1,
    divisible_by_16=("x_ptr", "out_ptr", "n"),
)


def compiled(form: int) -> CompiledCode:
    return compile_for(register_operand_case(form), "sm_90")


def hazards(code: CompiledCode) -> int:
    assert code.cubin is not None
    loop = sass_statistics(disassemble(code.cubin)).main_loop
    assert loop is not None
    assert loop.wgmma == 32, "the weight no longer reaches wgmma as written"
    assert not loop.serialised
    return len(lint_cubin(code.cubin))


def test_the_linter_finds_the_race_of_older_compilers() -> None:
    version = tuple(map(int, triton.__version__.split(".")[:2]))
    if version >= (3, 8):
        pytest.skip(f"Triton {triton.__version__} compiles this kernel without the race")
    assert hazards(compiled(UNFENCED)) > 0


@pytest.mark.parametrize("form", [FENCED, TEMPORARY])
def test_a_use_of_the_accumulator_in_every_step_removes_the_race(form: int) -> None:
    assert hazards(compiled(form)) == 0


def test_resources_come_from_ptxas() -> None:
    code = compiled(TEMPORARY)
    assert 64 <= code.registers <= 255
    assert code.shared > 16 * 1024
    assert not code.spills
    assert "warp_group_dot" in code.ttgir
    assert code.ptx is not None
    assert ".target sm_90a" in code.ptx


def test_spills_are_reported() -> None:
    case = dataclasses.replace(register_operand_case(TEMPORARY), options={"maxnreg": 64})
    code = compile_for(case, "sm_90")
    assert code.registers <= 64
    assert code.spills
    assert code.spill_store_bytes > 0


def test_remarks_of_ptxas_are_kept() -> None:
    case = dataclasses.replace(register_operand_case(FENCED), options={"maxnreg": 64})
    assert any("wgmma" in message for message in compile_for(case, "sm_90").messages)


@pytest.mark.parametrize("target", ["sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120"])
def test_nvidia_targets(target: str) -> None:
    code = compile_for(COPY, target)
    assert code.cubin
    assert code.registers > 0
    assert code.amdgcn is None


@pytest.mark.parametrize("target", ["gfx942", "gfx950"])
def test_amd_targets(target: str) -> None:
    code = compile_for(COPY, target)
    assert code.cubin is None
    assert code.amdgcn
    assert code.registers > 0


def test_divisibility_widens_accesses() -> None:
    scalar = compile_for(dataclasses.replace(COPY, divisible_by_16=()), "sm_90")
    assert scalar.ptx is not None
    assert "ld.global.v4" not in scalar.ptx
    wide = compile_for(COPY, "sm_90")
    assert wide.ptx is not None
    assert "ld.global.v4" in wide.ptx


@pytest.mark.parametrize(
    ("kernel", "expected"),
    [(_mismatched_dot_kernel, ""), (_wrong_assembly_kernel, "known instruction")],
)
def test_errors_name_case_target_and_reason(kernel: Any, expected: str) -> None:
    case = Specialization("broken", kernel, {"out_ptr": "*fp32"}, {"BLOCK": 32}, 4, 1)
    with pytest.raises(AotError, match=r"broken does not compile for sm_90: .+") as caught:
        compile_for(case, "sm_90")
    assert expected in str(caught.value)


def test_arguments_are_checked() -> None:
    case = dataclasses.replace(COPY, constexprs={"BLOCK": 1024, "N": 4}, divisible_by_16=("y",))
    with pytest.raises(AotError, match=r"missing: \['skip_ptr'\], unknown: \['N', 'y'\]"):
        compile_for(case, "sm_90")
    with pytest.raises(AotError, match="a target reads"):
        compile_for(COPY, "hopper")


def test_the_interpreter_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(AotError, match="TRITON_INTERPRET"):
        compile_for(COPY, "sm_90")


_BARRIER = (
    "{} = ttg.local_alloc : () -> !ttg.memdesc<{}xi64, #shared2, #smem, mutable> loc(#loc1)\n"
)


def test_barriers_that_no_partition_is_given_are_found() -> None:
    slots = "%slots = ttg.local_alloc : () -> !ttg.memdesc<4x64x128xi8, #shared, #smem, mutable>\n"
    barriers = "".join(_BARRIER.format(*each) for each in (("%full", "4x1"), ("%full_2", 1)))
    parted = (
        "ttg.warp_specialize(%desc, %slots, {}) attributes {{requestedRegisters = array<i32: 24>}}"
    )
    assert idle_barriers(slots + barriers + parted.format("%full, %full_2")) == []
    # The name of one is the beginning of the other's.
    assert idle_barriers(slots + barriers + parted.format("%full_2")) == ["%full"]
    assert idle_barriers(slots + barriers) == ["%full", "%full_2"]
    assert idle_barriers(slots) == []
