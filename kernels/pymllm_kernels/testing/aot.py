"""Compile Triton kernels ahead of time, for any target and without a GPU."""

from __future__ import annotations

import contextlib
import io
import os
import re
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from pymllm_kernels.common.specialization import Specialization

_USED = re.compile(r"Used (\d+) registers")
_SPILLS = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
_BARRIERS = re.compile(r"(%\w+) = ttg\.local_alloc\b.*-> !ttg\.memdesc<(?:\d+x)+i64\b")
_GIVEN_TO_PARTITIONS = re.compile(r"\bttg\.warp_specialize\(([^)]*)\)")
# C75xx are the remarks about wgmma, among them that all of them were serialised.
_MESSAGE = re.compile(r"\(C\d{4}\)|\bwarning\b|\bwgmma\b", re.IGNORECASE)


@dataclass(frozen=True)
class CompiledCode:
    """What the compiler made of a `Specialization` for one target.

    `registers` is per thread.  `messages` are the remarks of ptxas, on serialised wgmma for one.
    """

    target: str
    ttgir: str
    ptx: str | None
    cubin: bytes | None
    amdgcn: str | None
    shared: int
    registers: int
    stack_bytes: int
    spill_store_bytes: int
    spill_load_bytes: int
    messages: tuple[str, ...]

    @property
    def spills(self) -> bool:
        """Whether registers were spilled to local memory."""
        return self.spill_store_bytes + self.spill_load_bytes > 0


def idle_barriers(ttgir: str) -> list[str]:
    """Barriers in shared memory that no partition of a warp-specialized kernel is given.

    After its last use Triton hands the memory of a barrier to others without invalidating it, which PTX
    asks for: on an H200, sums kept there came back as other numbers.
    """
    given = ",".join(_GIVEN_TO_PARTITIONS.findall(ttgir)).replace(" ", "").split(",")
    return [name for name in _BARRIERS.findall(ttgir) if name not in given]


class AotError(RuntimeError):
    """A kernel did not compile."""

    def __init__(self, case: Specialization, target: str, message: str) -> None:
        super().__init__(f"{case.name} does not compile for {target}: {message}")


@dataclass(frozen=True)
class _Resources:
    registers: int
    stack: int
    stores: int
    loads: int
    messages: tuple[str, ...] = ()


def compile_for(case: Specialization, target: str) -> CompiledCode:
    """Compile a case for "sm_90", "gfx942" and the like.

    Raises AotError with the compiler's message.  Triton's cache is not read, so that the log of
    ptxas belongs to the code returned.
    """
    import triton
    from triton import knobs
    from triton.runtime.jit import JITFunction

    if knobs.runtime.interpret or not isinstance(case.kernel, JITFunction):
        raise AotError(
            case,
            target,
            f"need a triton.jit or gluon.jit function, no TRITON_INTERPRET=1, "
            f"got {type(case.kernel).__name__}",
        )
    gpu = _gpu_target(case, target)
    try:
        source = case.source()
    except ValueError as error:
        raise AotError(case, target, str(error)) from None
    stdout = io.StringIO()
    with _captured_stderr() as stderr:
        try:
            with (
                contextlib.redirect_stdout(stdout),
                knobs.compilation.scope(),
                knobs.nvidia.scope(),
            ):
                knobs.compilation.always_compile = True
                knobs.nvidia.dump_ptxas_log = True
                compiled = triton.compile(source, target=gpu, options=case.compiler_options())
        except Exception as error:
            raise AotError(case, target, f"{error!s}\n{stderr.text()}".strip()) from error
    return _compiled_code(target, compiled, stdout.getvalue())


def _compiled_code(target: str, compiled: Any, log: str) -> CompiledCode:
    amdgcn = compiled.asm.get("amdgcn")
    resources = _amd_resources(amdgcn) if amdgcn else _nvidia_resources(log)
    return CompiledCode(
        target=target,
        ttgir=compiled.asm["ttgir"],
        ptx=compiled.asm.get("ptx"),
        cubin=compiled.asm.get("cubin"),
        amdgcn=amdgcn,
        shared=compiled.metadata.shared,
        registers=resources.registers,
        stack_bytes=resources.stack,
        spill_store_bytes=resources.stores,
        spill_load_bytes=resources.loads,
        messages=resources.messages,
    )


def _gpu_target(case: Specialization, target: str) -> Any:
    from triton.backends.compiler import GPUTarget

    if match := re.fullmatch(r"sm_(\d+)", target):
        return GPUTarget("cuda", int(match.group(1)), 32)
    if re.fullmatch(r"gfx9\w+", target):
        return GPUTarget("hip", target, 64)
    if re.fullmatch(r"gfx1\w+", target):
        return GPUTarget("hip", target, 32)
    raise AotError(case, target, 'a target reads "sm_90" or "gfx942"')


def _nvidia_resources(log: str) -> _Resources:
    used = _USED.search(log)
    if used is None:
        raise RuntimeError(f"no resource usage in the log of ptxas: {log!r}")
    spills = [tuple(map(int, match)) for match in _SPILLS.findall(log)]
    stack, stores, loads = (
        (max(column) for column in zip(*spills, strict=True))
        if spills
        else (
            0,
            0,
            0,
        )
    )
    messages = [line.strip() for line in log.splitlines() if _MESSAGE.search(line)]
    return _Resources(int(used.group(1)), stack, stores, loads, tuple(messages))


def _amd_resources(assembly: str) -> _Resources:
    def value(key: str) -> int:
        match = re.search(rf"\.{key}:\s*(\d+)", assembly)
        return int(match.group(1)) if match else 0

    # The assembly counts spilled registers only, each of 4 bytes.
    spilled = 4 * value("vgpr_spill_count")
    return _Resources(value("vgpr_count"), value("private_segment_fixed_size"), spilled, spilled)


class _Capture:
    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    def text(self) -> str:
        size = os.fstat(self._descriptor).st_size
        return os.pread(self._descriptor, size, 0).decode(errors="replace")


@contextlib.contextmanager
def _captured_stderr() -> Iterator[_Capture]:
    """Collect what is written to file descriptor 2: MLIR's diagnostics do not pass Python."""
    sys.stderr.flush()
    saved = os.dup(2)
    with tempfile.TemporaryFile() as file:
        os.dup2(file.fileno(), 2)
        try:
            yield _Capture(file.fileno())
        finally:
            sys.stderr.flush()
            os.dup2(saved, 2)
            os.close(saved)
