"""Find register hazards of asynchronous Hopper matrix instructions in SASS.

``wgmma`` with its A operand in registers reads them after it has been issued; nothing may write
them before the ``WARPGROUP.DEPBAR`` that waits for its group.  Some compilers break that rule.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_LINE = re.compile(r"^\s*/\*(?P<address>[0-9a-f]{4,})\*/\s+(?P<body>[^;]*?)\s*;")
_FUNCTION = re.compile(r"^\s*Function\s*:\s*(?P<name>\S+)")
_GUARD = re.compile(r"^@(!?)(U?P(?:T|\d+))\s+")
_REGISTER = re.compile(r"^R(\d+)(?:\.\w+)*$")
_PREDICATE = re.compile(r"^!?U?P(?:T|\d+)$")
_ADDRESS = re.compile(r"\b0x([0-9a-f]+)$")
_SHAPE = re.compile(r"^64x(\d+)x\d+$")
_DEPBAR_COUNT = re.compile(r"^0x([0-9a-f]+)$")

_WGMMA = ("HGMMA", "IGMMA", "QGMMA", "BGMMA")
_WARP_MMA = ("HMMA", "IMMA", "QMMA")
_BRANCHES = ("BRA", "JMP")
_ENDS = ("EXIT", "RET", "BRX", "BRXU", "JMX", "JMXU", "KILL")
# Their first plain register is a source.
_NO_DESTINATION = (
    *("BRA", "BRX", "BRXU", "JMP", "JMX", "JMXU", "CALL", "RET", "EXIT", "KILL", "BAR", "BARRIER"),
    *("WARPSYNC", "NANOSLEEP", "WARPGROUP", "R2P", "R2B", "FCHK", "PLOP3", "ERRBAR", "CCTL"),
    "SETLMEMBASE",
)
_PAIRS = ("DADD", "DMUL", "DFMA", "DMNMX", "FADD2", "FMUL2", "FFMA2", "LEPC", "GETLMEMBASE")
_QUADS = ("IMMA", "QMMA", "OMMA", "DMMA")
# Groups that a DEPBAR may leave in flight are few; older ones are kept as one.
_MAX_GROUPS = 16
_MAX_STATES = 200_000


@dataclass(frozen=True)
class Instruction:
    """One SASS instruction."""

    address: int
    guard: str
    opcode: str
    operands: tuple[str, ...]

    @property
    def base(self) -> str:
        """The opcode without its modifiers."""
        return self.opcode.split(".", 1)[0]

    @property
    def modifiers(self) -> tuple[str, ...]:
        """The modifiers of the opcode."""
        return tuple(self.opcode.split(".")[1:])

    @property
    def is_wgmma(self) -> bool:
        """Whether this is an asynchronous warpgroup matrix instruction."""
        return self.base in _WGMMA

    @property
    def is_depbar(self) -> bool:
        """Whether this waits for warpgroup matrix instructions."""
        return self.base == "WARPGROUP" and "DEPBAR" in self.modifiers

    @property
    def target(self) -> int | None:
        """The address a direct branch goes to."""
        if self.base not in _BRANCHES or not self.operands:
            return None
        match = _ADDRESS.search(self.operands[-1])
        return int(match.group(1), 16) if match else None

    @property
    def is_conditional(self) -> bool:
        """Whether a branch or exit may fall through."""
        return bool(self.guard) or (self.base in _BRANCHES and len(self.operands) > 1)

    def __str__(self) -> str:
        guard = f"@{self.guard} " if self.guard else ""
        return f"{guard}{self.opcode} {', '.join(self.operands)}".rstrip()


@dataclass(frozen=True)
class Hazard:
    """A write to a register that a pending matrix instruction still reads."""

    function: str
    address: int
    instruction: str
    register: int
    pending_address: int
    pending: str

    def __str__(self) -> str:
        return (
            f"{self.function}: /*{self.address:04x}*/ {self.instruction} writes R{self.register}, "
            f"read by pending /*{self.pending_address:04x}*/ {self.pending}"
        )


@dataclass(frozen=True)
class LoopStats:
    """Counts of one innermost loop body."""

    start: int
    end: int
    instructions: int
    wgmma: int
    warp_mma: int
    depbar: int
    ldl: int
    stl: int

    @property
    def serialised(self) -> bool:
        """Whether every matrix instruction is waited for by itself."""
        return self.wgmma > 1 and self.depbar >= self.wgmma


@dataclass(frozen=True)
class SassStats:
    """Counts of a whole disassembly, and of each innermost loop."""

    instructions: int
    hgmma: int
    igmma: int
    qgmma: int
    hmma: int
    imma: int
    qmma: int
    ldl: int
    stl: int
    loops: tuple[LoopStats, ...]

    @property
    def main_loop(self) -> LoopStats | None:
        """The innermost loop with most matrix instructions, None if no loop has any."""
        best = max(self.loops, key=lambda loop: loop.wgmma + loop.warp_mma, default=None)
        return best if best is not None and best.wgmma + best.warp_mma else None


@dataclass(frozen=True)
class _State:
    """Matrix instructions in flight: the group being formed, and the closed ones, oldest first."""

    open: frozenset[int] = frozenset()
    closed: tuple[frozenset[int], ...] = ()

    def issue(self, index: int, closes: bool) -> _State:
        group = self.open | {index}
        if not closes:
            return _State(group, self.closed)
        closed = (*self.closed, group)
        if len(closed) > _MAX_GROUPS:
            closed = (closed[0] | closed[1], *closed[2:])
        return _State(frozenset(), closed)

    def wait(self, groups: int) -> _State:
        return _State(self.open, self.closed[-groups:] if groups else ())

    def pending(self) -> Iterator[int]:
        for group in (*self.closed, self.open):
            yield from group


def destination_registers(instruction: Instruction) -> frozenset[int]:
    """The general registers that the instruction may write."""
    if instruction.guard == "!PT" or instruction.base in _NO_DESTINATION:
        return frozenset()
    if instruction.base.endswith(("SETP", "SETP2")):
        return frozenset()
    for operand in instruction.operands:
        match = _REGISTER.match(operand)
        if match:
            first = int(match.group(1))
            return frozenset(range(first, first + _destination_width(instruction)))
        if not _PREDICATE.match(operand):
            break
    return frozenset()


def wgmma_a_registers(instruction: Instruction) -> frozenset[int]:
    """The registers that a warpgroup matrix instruction reads its A operand from."""
    if not instruction.is_wgmma or len(instruction.operands) < 2:
        return frozenset()
    match = _REGISTER.match(instruction.operands[1])
    if not match:
        return frozenset()
    first = int(match.group(1))
    # 64 rows of 32 bytes over 128 threads, whatever the type.
    return frozenset(range(first, first + 4))


def _destination_width(instruction: Instruction) -> int:
    base, modifiers = instruction.base, instruction.modifiers
    if instruction.is_wgmma:
        shape = next((m for m in map(_SHAPE.match, modifiers) if m), None)
        columns = int(shape.group(1)) if shape else 256
        return max(1, columns // (4 if modifiers[1:2] == ("F16",) else 2))
    if base == "HMMA":
        return 2 if modifiers[1:2] == ("F16",) else 4
    if base in _QUADS:
        return 2 if modifiers[0].startswith("8") and base == "IMMA" else 4
    if base == "CS2R":
        return 1 if "32" in modifiers else 2
    if base in _PAIRS or "WIDE" in modifiers:
        return 2
    if base in ("LDSM", "LDTM"):
        return _matrix_load_width(modifiers)
    if base in ("F2F", "I2F", "F2I", "FRND", "I2I"):
        # The first type is that of the result.
        types = [m for m in modifiers if re.match(r"^[FUS]\d+$", m)]
        return 2 if types and types[0].endswith("64") else 1
    if base.startswith(("LD", "ATOM", "TLD", "TEX", "SULD")) or "64" in modifiers:
        return _access_width(modifiers)
    return 2 if "TRANS64" in modifiers else 1


def _matrix_load_width(modifiers: tuple[str, ...]) -> int:
    counts = [m.removeprefix("x") for m in modifiers[1:]]
    return max([int(c) for c in counts if c.isdigit()], default=1)


def _access_width(modifiers: tuple[str, ...]) -> int:
    for bits, width in (("256", 8), ("128", 4), ("96", 3), ("64", 2)):
        if bits in modifiers or f"B{bits}" in modifiers:
            return width
    return 1


def parse_sass(text: str) -> dict[str, list[Instruction]]:
    """Read the instructions of each function from the output of ``cuobjdump -sass``."""
    functions: dict[str, list[Instruction]] = {}
    name = ""
    for line in text.splitlines():
        header = _FUNCTION.match(line)
        if header:
            name = header.group("name")
            continue
        match = _LINE.match(line)
        if match:
            instruction = _parse_instruction(int(match.group("address"), 16), match.group("body"))
            functions.setdefault(name, []).append(instruction)
    return functions


def _parse_instruction(address: int, body: str) -> Instruction:
    body = body.strip().removeprefix("{").strip()
    guard = ""
    match = _GUARD.match(body)
    if match:
        guard = match.group(1) + match.group(2)
        guard = "" if guard in ("PT", "UPT") else guard
        body = body[match.end() :]
    opcode, _, rest = body.partition(" ")
    operands = tuple(o.strip().removesuffix(".reuse") for o in rest.split(",") if o.strip())
    return Instruction(address, guard, opcode, operands)


class _Walk:
    """Every path through one function, followed once for each state a block is reached in."""

    def __init__(self, name: str, code: list[Instruction]) -> None:
        self.name = name
        self.code = code
        self.index_of: dict[int | None, int] = {i.address: at for at, i in enumerate(code)}
        self.leaders = {self.index_of[i.target] for i in code if i.target in self.index_of}
        self.hazards: dict[tuple[int, int], Hazard] = {}

    def run(self) -> list[Hazard]:
        seen: set[tuple[int, _State]] = set()
        work: list[tuple[int, _State]] = [(0, _State())]
        while work:
            index, state = work.pop()
            while index < len(self.code):
                if index in self.leaders:
                    if (index, state) in seen:
                        break
                    seen.add((index, state))
                    if len(seen) > _MAX_STATES:
                        raise RuntimeError(f"{self.name}: too many states to follow")
                state = self._step(index, state)
                instruction = self.code[index]
                if instruction.target in self.index_of:
                    work.append((self.index_of[instruction.target], state))
                if instruction.base in (*_BRANCHES, *_ENDS) and not instruction.is_conditional:
                    break
                index += 1
        return sorted(self.hazards.values(), key=lambda h: (h.address, h.register))

    def _step(self, index: int, state: _State) -> _State:
        instruction = self.code[index]
        written = destination_registers(instruction)
        if written:
            for pending in state.pending():
                for register in written & wgmma_a_registers(self.code[pending]):
                    self._report(instruction, register, self.code[pending])
        if instruction.is_wgmma:
            return state.issue(index, closes="gsb0" in instruction.operands)
        if instruction.is_depbar and not instruction.guard:
            match = _DEPBAR_COUNT.match(instruction.operands[-1])
            return state.wait(int(match.group(1), 16)) if match else state
        return state

    def _report(self, writer: Instruction, register: int, pending: Instruction) -> None:
        self.hazards[writer.address, register] = Hazard(
            self.name, writer.address, str(writer), register, pending.address, str(pending)
        )


def lint_sass(text: str) -> list[Hazard]:
    """Find each write to an A register of a matrix instruction that may still be in flight.

    Every path is followed, loops until the set of instructions in flight repeats.
    """
    hazards: list[Hazard] = []
    for name, code in parse_sass(text).items():
        hazards += _Walk(name, code).run()
    return hazards


def lint_cubin(cubin: bytes) -> list[Hazard]:
    """`lint_sass` of a cubin."""
    return lint_sass(disassemble(cubin))


def disassemble(cubin: bytes) -> str:
    """Disassemble a cubin with the ``cuobjdump`` that Triton finds (its own, unless overridden)."""
    from triton import knobs

    try:
        tool = knobs.nvidia.cuobjdump.path
    except RuntimeError as error:
        raise RuntimeError(
            "cannot disassemble: Triton found no cuobjdump (TRITON_CUOBJDUMP_PATH names one)"
        ) from error
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(cubin)
        done = subprocess.run(
            [tool, "-sass", str(path)], capture_output=True, text=True, check=False
        )
    if done.returncode:
        raise RuntimeError(f"{tool} -sass failed: {done.stderr.strip() or done.stdout.strip()}")
    return done.stdout


def innermost_loops(code: list[Instruction]) -> list[list[Instruction]]:
    """The bodies of the backward branches that contain no other backward branch."""
    edges = [(i.target, i.address) for i in code if i.target is not None and i.target < i.address]
    bodies = []
    for start, end in edges:
        inner = any((a, b) != (start, end) and start <= a and b <= end for a, b in edges)
        if not inner:
            bodies.append([i for i in code if start <= i.address <= end])
    return bodies


def sass_statistics(text: str) -> SassStats:
    """Count the instructions that tell how well a kernel compiled."""
    functions = parse_sass(text)
    every = [instruction for code in functions.values() for instruction in code]
    loops = [body for code in functions.values() for body in innermost_loops(code)]
    return SassStats(
        instructions=len(every),
        hgmma=_count(every, "HGMMA"),
        igmma=_count(every, "IGMMA"),
        qgmma=_count(every, "QGMMA"),
        hmma=_count(every, "HMMA"),
        imma=_count(every, "IMMA"),
        qmma=_count(every, "QMMA"),
        ldl=_count(every, "LDL"),
        stl=_count(every, "STL"),
        loops=tuple(_loop_statistics(body) for body in loops),
    )


def _loop_statistics(body: list[Instruction]) -> LoopStats:
    return LoopStats(
        start=body[0].address,
        end=body[-1].address,
        instructions=len(body),
        wgmma=_count(body, *_WGMMA),
        warp_mma=_count(body, *_WARP_MMA),
        depbar=sum(instruction.is_depbar for instruction in body),
        ldl=_count(body, "LDL"),
        stl=_count(body, "STL"),
    )


def _count(code: list[Instruction], *bases: str) -> int:
    return sum(instruction.base in bases for instruction in code)
