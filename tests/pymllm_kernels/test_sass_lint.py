"""The SASS linter on hand-written code."""

import pytest

from pymllm_kernels.testing.sass_lint import (
    destination_registers,
    lint_sass,
    parse_sass,
    sass_statistics,
)

RS = "HGMMA.64x16x16.F32.BF16 R24, R40, gdesc[UR8], R24"
SS = "HGMMA.64x16x16.F32.BF16 R24, gdesc[UR8], R24, gsb0"
WAIT = "WARPGROUP.DEPBAR.LE gsb0, 0x{}"


def sass(*lines: str, name: str = "kernel") -> str:
    """Instructions, 16 bytes apart, as cuobjdump prints them."""
    text = [f"\t\tFunction : {name}", '\t.headerflags\t@"EF_CUDA_SM90"']
    for i, line in enumerate(lines):
        text.append(
            f"        /*{16 * i:04x}*/                   {line} ;   /* 0x0000000000000000 */"
        )
        text.append(f"{' ' * 60}/* 0x000fc000078e0000 */")
    return "\n".join(text)


def registers(*lines: str) -> list[int]:
    return [hazard.register for hazard in lint_sass(sass(*lines))]


def written(line: str) -> list[int]:
    ((instruction,),) = parse_sass(sass(line)).values()
    return sorted(destination_registers(instruction))


def test_a_loop_that_waits_before_its_back_edge_is_clean() -> None:
    loop = ("LOP3.LUT R40, R5, 0xf, RZ, 0xc0, !PT", f"{RS}, gsb0", WAIT.format(0), "@P0 BRA 0x0")
    assert registers(*loop, "EXIT") == []


def test_a_write_in_the_next_iteration_is_a_hazard() -> None:
    loop = ("LOP3.LUT R40, R5, 0xf, RZ, 0xc0, !PT", f"{RS}, gsb0", "@P0 BRA 0x0", WAIT.format(0))
    (hazard,) = lint_sass(sass(*loop, "EXIT", name="decode"))
    assert (hazard.function, hazard.address, hazard.register) == ("decode", 0, 40)
    assert hazard.pending_address == 0x10
    assert "R40" in str(hazard)


def test_straight_line_code_is_linted() -> None:
    assert registers(RS, "MOV R43, R2", "EXIT") == [43]
    assert registers(f"{RS}, gsb0", WAIT.format(0), "MOV R43, R2", "EXIT") == []


def test_a_wait_leaves_the_last_groups_in_flight() -> None:
    older = "HGMMA.64x16x16.F32.BF16 R24, R40, gdesc[UR8], R24, gsb0"
    newer = "HGMMA.64x16x16.F32.BF16 R32, R44, gdesc[UR8], R32, gsb0"
    code = (older, newer, WAIT.format(1))
    assert registers(*code, "MOV R40, R2", "EXIT") == []
    assert registers(*code, "MOV R44, R2", "EXIT") == [44]
    assert registers(older, newer, WAIT.format(2), "MOV R40, R2", "EXIT") == [40]


def test_a_wait_covers_closed_groups_only() -> None:
    assert registers(RS, WAIT.format(0), "MOV R40, R2", "EXIT") == [40]


def test_instructions_of_one_group_are_pending_together() -> None:
    second = "HGMMA.64x16x16.F32.BF16 R24, R44, gdesc[UR12], R24, gsb0"
    assert registers(RS, second, "MOV R41, R2", "MOV R44, R2", "EXIT") == [41, 44]


@pytest.mark.parametrize("write", ["@P0 MOV R40, R2", "@!P6 MOV R40, R2", "@UP0 MOV R40, R2"])
def test_predicated_writes_count(write: str) -> None:
    assert registers(RS, write, "EXIT") == [40]


def test_what_does_not_write_is_no_hazard() -> None:
    reads = (
        "STG.E desc[UR4][R40.64], R41",
        "ISETP.GE.AND P0, PT, R40, R41, PT",
        "@!PT MOV R40, R2",
    )
    assert registers(RS, *reads, "BAR.SYNC R40", "R2UR UR4, R40", "EXIT") == []


def test_operands_in_shared_memory_have_no_hazard() -> None:
    assert registers(SS, "MOV R40, R2", "@P0 BRA 0x0", "EXIT") == []


def test_a_matrix_instruction_may_be_the_writer() -> None:
    wide = "HGMMA.64x64x16.F32.BF16 R16, gdesc[UR8], R16, gsb0"
    assert registers(f"{RS}, gsb0", wide, "EXIT") == [40, 41, 42, 43]


def test_code_after_an_unconditional_branch_is_reached_by_branches_only() -> None:
    after_exit = (f"{RS}, gsb0", "EXIT", "MOV R40, R2", "EXIT")
    assert registers(*after_exit) == []
    forward = (f"{RS}, gsb0", "@P0 BRA 0x30", WAIT.format(0), "MOV R40, R2", "EXIT")
    assert registers(*forward) == [40]


def test_a_branch_on_a_predicate_operand_falls_through() -> None:
    assert registers(f"{RS}, gsb0", "BRA.U UP0, 0x30", "MOV R40, R2", "EXIT") == [40]


def test_functions_are_linted_apart() -> None:
    assert lint_sass(sass(RS, name="a") + "\n" + sass("MOV R40, R2", "EXIT", name="b")) == []


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("MOV R8, R2", [8]),
        ("MOV RZ, R2", []),
        ("IMAD.WIDE.U32 R8, R2, 0x2, R4", [8, 9]),
        ("IADD3 R8, P0, R2, UR4, RZ", [8]),
        ("LOP3.LUT P0, R8, R2, 0x1, RZ, 0xc0, !PT", [8]),
        ("SHFL.BFLY PT, R8, R2, 0x1, 0x1f", [8]),
        ("SHF.R.U64 R8, R2, 0x1, R3", [8]),
        ("CS2R R8, SRZ", [8, 9]),
        ("CS2R.32 R8, SR_CLOCKLO", [8]),
        ("LDS.U16 R8, [R2]", [8]),
        ("LDS.64 R8, [R2]", [8, 9]),
        ("LDG.E.128 R8, desc[UR4][R2.64]", [8, 9, 10, 11]),
        ("LDC.64 R8, c[0x0][0x210]", [8, 9]),
        ("LDSM.16.M88 R8, [R2]", [8]),
        ("LDSM.16.M88.2 R8, [R2]", [8, 9]),
        ("LDSM.16.MT88.4 R8, [R2+UR5]", [8, 9, 10, 11]),
        ("ATOMG.E.ADD.STRONG.GPU PT, R8, desc[UR4][R2.64], R5", [8]),
        ("F2F.F64.F32 R8, R2", [8, 9]),
        ("F2F.F32.F64 R8, R2", [8]),
        ("DADD R8, R2, R4", [8, 9]),
        ("HMMA.16816.F32.BF16 R8, R12, R16, R8", [8, 9, 10, 11]),
        ("HMMA.16816.F16 R8, R12, R16, R8", [8, 9]),
        ("IMMA.16832.S8.S8 R8, R12.ROW, R16.COL, R8", [8, 9, 10, 11]),
        ("HGMMA.64x8x16.F32 R8, gdesc[UR4], R8", [8, 9, 10, 11]),
        ("HGMMA.64x16x16.F16 R8, gdesc[UR4], R8", [8, 9, 10, 11]),
        ("IGMMA.64x8x32.S8.S8 R8, gdesc[UR4], R8", [8, 9, 10, 11]),
        ("R2UR UR4, R8", []),
        ("LDGSTS.E.BYPASS.128 [R8], desc[UR4][R2.64], P0", []),
        ("LDGSTS.E.BYPASS.128 [R8+0x400], desc[UR4][R2.64+0x80]", []),
        ("STS.128 [R8], R4", []),
        ("FSETP.GT.AND P0, PT, R8, R9, PT", []),
    ],
)
def test_destination_registers(line: str, expected: list[int]) -> None:
    assert written(line) == expected


def test_statistics_describe_the_innermost_loop() -> None:
    loop = ("LDL R1, [R9]", f"{RS}, gsb0", WAIT.format(0), f"{RS}, gsb0", WAIT.format(0))
    text = sass("STL [R9], R1", *loop, "@P0 BRA 0x10", "@P1 BRA 0x0", "EXIT", "BRA 0x90")
    stats = sass_statistics(text)
    assert (stats.hgmma, stats.igmma, stats.hmma, stats.ldl, stats.stl) == (2, 0, 0, 1, 1)
    (body,) = stats.loops
    assert (body.start, body.end, body.instructions) == (0x10, 0x60, 6)
    assert (body.wgmma, body.depbar, body.ldl, body.stl) == (2, 2, 1, 0)
    assert body.serialised
    assert stats.main_loop == body
