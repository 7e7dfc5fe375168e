"""One compiled form of a kernel: declared by the library, not found out from the arguments of a call."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch

_TRITON_TYPE = {
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float32: "fp32",
    torch.int8: "i8",
    torch.int16: "i16",
    torch.int32: "i32",
}


@dataclass(frozen=True)
class Specialization:
    """What is compiled: a kernel with the types of its arguments and its compile-time values.

    Attributes:
        name: for messages.
        kernel: a ``triton.jit`` or ``gluon.jit`` function.
        signature: Triton type of every argument that is not compiled in.
        constexprs: value of every other argument, absent pointers (``None``) among them.
        num_warps: warps of a program, or of its first partition.
        num_stages: depth of the software pipeline.
        divisible_by_16: arguments that are multiples of 16.
        options: further compiler options.
    """

    name: str
    kernel: Any
    signature: Mapping[str, str]
    constexprs: Mapping[str, Any]
    num_warps: int
    num_stages: int = 3
    divisible_by_16: tuple[str, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)

    def source(self) -> Any:
        """What ``triton.compile`` takes.

        Raises:
            ValueError: arguments of the kernel are missing, unknown, or given twice.
        """
        names = self.kernel.arg_names
        given = {**dict.fromkeys(self.constexprs, "constexpr"), **self.signature}
        both = sorted(set(self.signature) & set(self.constexprs))
        missing = [name for name in names if name not in given]
        unknown = sorted({*given, *self.divisible_by_16} - set(names))
        if both or missing or unknown:
            raise ValueError(
                f"{self.name}: arguments missing: {missing}, unknown: {unknown}, "
                f"typed and constexpr: {both}"
            )
        hash_called_functions(self.kernel)
        return _source_class(self.kernel)(
            self.kernel,
            {name: given[name] for name in names},
            constexprs=dict(self.constexprs),
            attrs={
                (names.index(name),): [["tt.divisibility", 16]] for name in self.divisible_by_16
            },
        )

    def compiler_options(self) -> dict[str, Any]:
        """The options of ``triton.compile``."""
        # Fusion is said aloud: Triton 3.10 changes its default.
        return {
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
            "enable_fp_fusion": True,
            **self.options,
        }


def pointer_type(dtype: torch.dtype) -> str:
    """Triton's type of a pointer to elements of ``dtype``.

    Raises:
        ValueError: kernels do not read this dtype.
    """
    if dtype not in _TRITON_TYPE:
        raise ValueError(f"dtype: found {dtype}, accepted {list(_TRITON_TYPE)}")
    return "*" + _TRITON_TYPE[dtype]


def box_type(dtype: torch.dtype, shape: list[int], layout: Any) -> str:
    """Triton's type of a tensor map whose copies fill ``shape`` in shared memory."""
    return f"tensordesc<{_TRITON_TYPE[dtype]}{shape},{layout!r}>"


def integer_type(*values: int) -> str:
    """``i32``, or ``i64`` where a value does not fit."""
    return "i32" if all(-(2**31) <= value < 2**31 for value in values) else "i64"


def hash_called_functions(function: Any) -> None:
    """Makes the cache key of a ``triton.jit`` function the same in every process.

    Triton 3.6 leaves the constants of a called function out of the caller's key unless something else
    has hashed that function before: what one process has compiled another one might not find. So the
    functions it calls are hashed first, theirs before them.
    """
    from triton.runtime.jit import JITFunction

    if not isinstance(function, JITFunction) or function.hash is not None:
        return
    for name in function.fn.__code__.co_names:
        called = function.fn.__globals__.get(name)
        if isinstance(called, JITFunction) and called is not function:
            hash_called_functions(called)
            _ = called.cache_key  # Hashed where it is asked for.


def _source_class(kernel: Any) -> Any:
    if kernel.is_gluon():
        from triton.experimental.gluon._runtime import GluonASTSource

        return GluonASTSource
    from triton.compiler import ASTSource

    return ASTSource


@dataclass
class Counts:
    """What this process has done so far.

    Attributes:
        compiled: forms compiled.
        loaded: forms read from Triton's cache on disk.
        tuned: configurations searched for by timing.
    """

    compiled: int = 0
    loaded: int = 0
    tuned: int = 0


def nvidia_target(capability: tuple[int, int]) -> Any:
    """Triton's ``GPUTarget`` of a compute capability."""
    from triton.backends.compiler import GPUTarget

    major, minor = capability
    return GPUTarget("cuda", 10 * major + minor, 32)


COUNTS = Counts()


def counters() -> Counts:
    """What this process has compiled, loaded and tuned so far."""
    return replace(COUNTS)


_compiling = threading.Lock()


def compile_specialization(form: Specialization, target: Any) -> Any:
    """Triton's ``CompiledKernel`` for a ``GPUTarget``, from its cache on disk if it is there."""
    import triton
    from triton import knobs

    hits: list[bool] = []
    with _compiling:
        listener = knobs.compilation.listener

        def listen(*, cache_hit: bool, **more: Any) -> None:
            hits.append(cache_hit)
            if listener is not None:
                listener(cache_hit=cache_hit, **more)

        knobs.compilation.listener = listen
        try:
            compiled = triton.compile(form.source(), target=target, options=form.compiler_options())
        finally:
            knobs.compilation.listener = listener
        COUNTS.loaded += sum(hits)
        COUNTS.compiled += len(hits) - sum(hits)
    return compiled
