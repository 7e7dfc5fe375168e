"""Compiling what calls will need, before they are made: declared forms, in parallel, without a GPU."""

from __future__ import annotations

import concurrent.futures
import functools
import multiprocessing
import os
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

from pymllm_kernels.common.specialization import (
    Specialization,
    compile_specialization,
    nvidia_target,
)
from pymllm_kernels.device import DeviceFacts

# A process takes about 4 s to start; a form 0.2 to 2 s to compile.
_FORMS_A_WORKER = 3


class Form(NamedTuple):
    """A form that can be sent to another process: equal for calls that run the same machine code.

    Attributes:
        specialize: gives the :class:`Specialization`; a function of a module.
        arguments: what it takes.
    """

    specialize: Callable[..., Specialization]
    arguments: tuple[Any, ...]

    def specialization(self) -> Specialization:
        """What is compiled."""
        return self.specialize(*self.arguments)


class FormError(RuntimeError):
    """A form does not compile; the message names it."""


class NotCompiled(Exception):
    """A form that is not in Triton's cache on disk."""


def is_compiled(form: Form, facts: DeviceFacts) -> bool:
    """Whether Triton's cache on disk has a form for a GPU of this capability."""
    import triton

    specialization = form.specialization()
    source = specialization.source()

    def refuse(*_: object, **__: object) -> None:
        raise NotCompiled

    # Triton asks for the code only of what its cache does not have.
    source.make_ir = refuse
    try:
        triton.compile(source, target=_target(facts), options=specialization.compiler_options())
    except NotCompiled:
        return False
    return True


def compile_forms(
    forms: Iterable[Form],
    facts: DeviceFacts,
    progress: Callable[[int, int], None] = lambda done, of: None,
    workers: int | None = None,
    failed: Callable[[str], None] | None = None,
) -> int:
    """Compiles what Triton's cache on disk does not have, by as many processes as there are cores.

    Args:
        forms: what will be needed; equal ones are compiled once.
        facts: the GPU that will run them; it need not be here.
        progress: told how many of how many are done.
        workers: processes; the number of cores if ``None``.
        failed: told of each form that does not compile; the others are compiled nonetheless.

    Returns:
        How many were to be compiled.

    Raises:
        FormError: a form does not compile, and there is no ``failed``.
        RuntimeError: a process ended before its time.
    """
    wanted = [form for form in dict.fromkeys(forms) if not is_compiled(form, facts)]
    progress(0, len(wanted))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    count = min(workers or cores or 1, -(-len(wanted) // _FORMS_A_WORKER))
    if count < 2:
        for done, form in enumerate(wanted, 1):
            _tell_failure(functools.partial(_compile, form, facts), failed)
            progress(done, len(wanted))
        return len(wanted)
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(count, mp_context=context) as pool:
        running = [pool.submit(_compile, form, facts) for form in wanted]
        try:
            for done, one in enumerate(concurrent.futures.as_completed(running), 1):
                _tell_failure(one.result, failed)
                progress(done, len(wanted))
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return len(wanted)


def _tell_failure(compiled: Callable[[], None], failed: Callable[[str], None] | None) -> None:
    try:
        compiled()
    except FormError as error:
        if failed is None:
            raise
        failed(str(error))


def _compile(form: Form, facts: DeviceFacts) -> None:
    specialization = form.specialization()
    try:
        compile_specialization(specialization, _target(facts))
    except Exception as error:
        words = " ".join(str(error).split())[:300]
        raise FormError(f"{specialization.name} does not compile: {words}") from error


def _target(facts: DeviceFacts) -> Any:
    assert facts.capability is not None
    return nvidia_target(facts.capability)


def names_of(forms: Sequence[Form]) -> list[str]:
    """Their names, for reports."""
    return [form.specialization().name for form in forms]
