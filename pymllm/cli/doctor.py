"""``pymllm doctor``: what works on this machine, and the one thing that is missing."""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import sysconfig
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from pymllm.cli import checks, kernel_checks, probe
from pymllm.cli.checks import Check, Gpu
from pymllm.cli.machine import Driver, find_gpus, hidden_by, stdout_of
from pymllm.cli.report import Progress, add_output_options, format_table, print_json

BROKEN = 1

EPILOG = """\
example:
  pymllm doctor            exit code 0 when the best device here works, 1 when it does not
  pymllm doctor --json     the same for a script
"""


@dataclass(frozen=True)
class Diagnosis:
    """The checks and what follows from them.

    Attributes:
        works: whether the best device here runs both schemes.
        device: that device.
        summary: one sentence.
        checks: every check, in the order in which they depend on each other.
    """

    works: bool
    device: str
    summary: str
    checks: tuple[Check, ...]

    @property
    def first_problem(self) -> Check | None:
        """The check to fix first."""
        return next((check for check in self.checks if check.is_problem), None)


def add_parser(commands: Any) -> None:
    """Adds the command to the ``pymllm`` parser."""
    parser = commands.add_parser(
        "doctor",
        help="what works on this machine, and what is missing",
        description="Checks what the library needs, compiles and launches a small kernel if there"
        " is a GPU, and names the one missing thing first.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_output_options(parser)
    parser.set_defaults(handler=execute)


def execute(options: argparse.Namespace) -> int:
    """Runs the command."""
    with Progress(options.verbose) as progress:
        diagnosis = examine(progress)
    if options.json:
        first = diagnosis.first_problem
        print_json(
            {
                "ok": diagnosis.works,
                "device": diagnosis.device,
                "summary": diagnosis.summary,
                "first_problem": None if first is None else asdict(first),
                "checks": [asdict(check) for check in diagnosis.checks],
            }
        )
    else:
        print(describe(diagnosis))
    return 0 if diagnosis.works else BROKEN


def examine(progress: Progress) -> Diagnosis:
    """Probes this machine."""
    progress.step("looking for GPUs, torch and Triton")
    driver = find_gpus(shutil.which, stdout_of)
    facts = probe.run_child(["facts"])
    torch_gpus = _torch_gpus(facts)
    found = check_environment(facts, driver, os.environ, shutil.which)
    # An empty cache: what was compiled earlier must not hide a missing compiler. But a cache that
    # cannot be written is to be tried as it is.
    fresh = not any(check.name == checks.CACHE and check.is_problem for check in found)
    answers = {}
    for index, gpu in enumerate(torch_gpus):
        if gpu not in answers:
            progress.step(f"compiling and launching kernels on cuda:{index}, {gpu.name}")
            answers[gpu] = _run_on_gpu(index, fresh)
    cpu: Mapping[str, Any] = {}
    if "version" in facts.get("torch", {}):
        progress.step("running layers on the CPU")
        cpu = probe.run_child(["kernels", "cpu"])
    return conclude(found, answers, cpu)


def check_environment(
    facts: Mapping[str, Any],
    driver: Driver,
    environ: Mapping[str, str],
    which: Callable[[str], str | None],
    include_dir: str | None = None,
) -> list[Check]:
    """Everything that can be said before a kernel runs."""
    torch, triton = facts.get("torch", {}), facts.get("triton", {})
    torch_gpus = _torch_gpus(facts)
    hidden = hidden_by(environ)
    here = torch_gpus or (list(driver.gpus) if hidden is None else [])
    needed = any(gpu.uses_triton for gpu in here)
    version, cuda, hip = (torch.get(key) for key in ("version", "cuda", "hip"))
    error = torch.get("error") or facts.get("error")
    found = [
        checks.check_python(sys.version_info[:3], sys.executable),
        checks.check_torch(version, cuda, hip, error, bool(here)),
        checks.check_gpu(
            driver.gpus, driver.version, torch_gpus, torch.get("gpu_error"), hidden,
            torch_usable=cuda is not None or hip is not None,
        ),
        checks.check_triton(
            triton.get("version"), triton.get("error") or facts.get("error"),
            bool(triton.get("interpret")), needed,
        ),
        checks.check_compiler(environ, which, needed),
        checks.check_headers(include_dir or _include_dir(), sys.version_info[:3], needed),
    ]  # fmt: skip
    if triton.get("version") and hip is None:
        for tool in facts.get("ptxas", []):
            gpu = next((g for g in torch_gpus if g.capability == tuple(tool["capability"])), None)
            told = (
                tool.get("path"),
                tool.get("version"),
                tool.get("help") or tool.get("error", ""),
            )
            found.append(checks.check_ptxas(gpu, *told, needed and gpu is not None))
    found.append(checks.check_cache(triton.get("cache_dir"), needed))
    return found


def conclude(
    found: Sequence[Check], gpus: Mapping[Gpu, Mapping[str, Any]], cpu: Mapping[str, Any]
) -> Diagnosis:
    """Adds the checks that ran kernels, and says what follows.

    Args:
        found: the checks of the environment.
        gpus: the kernel probe's answer for each GPU that torch can use.
        cpu: the kernel probe's answer for the CPU, empty if it was not run.
    """
    blocker = next((check.name for check in found if check.is_problem), None)
    on_gpu = []
    for gpu, answer in gpus.items():
        on_gpu.append(kernel_checks.check_launch(gpu, _part(answer, "launch"), blocker))
        stuck = blocker or (on_gpu[-1].name if on_gpu[-1].is_problem else None)
        on_gpu.append(kernel_checks.check_layers(gpu.name, _part(answer, "layers"), stuck))
    on_cpu = kernel_checks.check_layers("CPU", _part(cpu, "layers"), blocker)
    if not gpus:
        on_gpu = [kernel_checks.check_launch(None, {}, None)]
        works = on_cpu.status == checks.OK and blocker is None
    else:
        layers = on_gpu[1::2]
        launches = on_gpu[::2]
        fine = all(c.status == checks.OK for c in layers)
        works = fine and all(not g.uses_triton or c.status == checks.OK
                             for g, c in zip(gpus, launches, strict=True))  # fmt: skip
    if works:
        found, on_cpu = [_demoted(check) for check in found], _demoted(on_cpu)
    every = (*found, *on_gpu, on_cpu)
    device = ", ".join(gpu.name for gpu in gpus) or "CPU"
    return Diagnosis(works, device, _summary(works, device, every), every)


def describe(diagnosis: Diagnosis) -> str:
    """The report as text: the verdict, the first fix, then every check."""
    lines = [diagnosis.summary]
    first = diagnosis.first_problem
    if first is not None and first.fix:
        lines.append(f"Fix: {first.fix}")
    rows = [(check.name, check.status, check.found) for check in diagnosis.checks]
    lines += ["", format_table(("check", "status", "found"), rows)]
    others = [check for check in diagnosis.checks if check.fix and check is not first]
    if others:
        lines += ["", *(f"{check.name}: {check.fix}" for check in others)]
    return "\n".join(lines)


def _summary(works: bool, device: str, every: Sequence[Check]) -> str:
    if works and device == "CPU":
        return "Works on the CPU. No GPU can be used here."
    if works:
        return f"Works on {device}."
    first = next(check for check in every if check.is_problem)
    return f"Does not work: {first.name} {first.status}: {first.found}"


def _demoted(check: Check) -> Check:
    """A problem that did not keep the kernels from running."""
    if not check.is_problem:
        return check
    found = f"{check.found}; kernels run nonetheless"
    return replace(check, status=checks.WARNING, found=found)


def _part(answer: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """One part of the kernel probe's answer; an error of the whole is an error of the part."""
    part = dict(answer.get(key) or {})
    if "error" in answer:
        part["error"] = answer["error"]
    if "error" in part and answer.get("blamed"):
        part["error"] += f": {answer['blamed']}"
    return part


def _run_on_gpu(index: int, fresh_cache: bool) -> dict[str, Any]:
    arguments = ["kernels", f"cuda:{index}"]
    if not fresh_cache:
        return probe.run_child(arguments)
    try:
        with tempfile.TemporaryDirectory() as cache:
            return probe.run_child(arguments, {"TRITON_CACHE_DIR": cache})
    except OSError:
        return probe.run_child(arguments)


def _torch_gpus(facts: Mapping[str, Any]) -> list[Gpu]:
    listed = [(gpu["name"], gpu["capability"]) for gpu in facts.get("torch", {}).get("gpus", [])]
    return [Gpu(name, None if pair is None else (pair[0], pair[1])) for name, pair in listed]


def _include_dir() -> str:
    # Debian's own scheme points to /usr/local; Triton compiles with the prefix scheme instead.
    scheme = sysconfig.get_default_scheme()
    scheme = "posix_prefix" if scheme == "posix_local" else scheme
    return sysconfig.get_paths(scheme=scheme)["include"]
