"""The doctor on simulated machines: each missing thing is named, with its fix and exit code."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pymllm.cli import checks, doctor, machine, main, probe
from pymllm.cli.checks import Gpu
from pymllm.cli.report import Progress

H200 = Gpu("NVIDIA H200", (9, 0))
HELP_12_9 = "Allowed values for this option:  'compute_90a','sm_80','sm_90','sm_90a','sm_120'."
HELP_11_4 = "Allowed values for this option:  'compute_80','sm_75','sm_80','sm_86','sm_87'."
LAYERS = {"layers": {"W4A16": ["triton_w4a16", 1.7e-3], "W8A8": ["triton_w8a8_int8", 7e-3]}}
WORKING = {"launch": {"equal": True}, "layers": LAYERS}
CPU_WORKING = {
    "launch": {},
    "layers": {"layers": {"W4A16": ["cpu_int4pack", 1.7e-3], "W8A8": ["torch_int_mm", 7e-3]}},
}


def which(*programs: str) -> Callable[[str], str | None]:
    return lambda name: f"/usr/bin/{name}" if name in programs else None


def facts(tmp_path: Path, gpu: Gpu | None = H200, **changes: Any) -> dict[str, Any]:
    """What the probe says on a machine where everything is there."""
    gpus = [] if gpu is None else [{"name": gpu.name, "capability": gpu.capability}]
    ptxas = {"capability": [9, 0], "path": "/t/ptxas", "version": "12.9", "help": HELP_12_9}
    if gpu is not None and gpu.capability is not None:
        ptxas["capability"] = list(gpu.capability)
    answer: dict[str, Any] = {
        "torch": {"version": "2.11.0", "cuda": "12.8", "hip": None, "gpus": gpus},
        "triton": {"version": "3.6.0", "cache_dir": str(tmp_path / "cache"), "interpret": False},
        "ptxas": [ptxas],
    }
    return {**answer, **changes}


def diagnose(
    tmp_path: Path,
    said: dict[str, Any],
    *,
    driver: machine.Driver | None = None,
    environ: dict[str, str] | None = None,
    programs: tuple[str, ...] = ("gcc",),
    headers: bool = True,
    gpu_answer: dict[str, Any] = WORKING,
    cpu_answer: dict[str, Any] = CPU_WORKING,
) -> doctor.Diagnosis:
    include = tmp_path / "include"
    include.mkdir(exist_ok=True)
    if headers:
        (include / "Python.h").touch()
    gpus = doctor._torch_gpus(said)
    driver = driver or machine.Driver(tuple(gpus), "570.86" if gpus else None)
    found = doctor.check_environment(
        said, driver, environ or {}, which(*programs), include_dir=str(include)
    )
    return doctor.conclude(found, dict.fromkeys(gpus, gpu_answer), cpu_answer)


def by_name(diagnosis: doctor.Diagnosis, name: str) -> checks.Check:
    return next(check for check in diagnosis.checks if check.name == name)


def compiler_failure(blamed: str | None) -> dict[str, Any]:
    error = {"error": "CalledProcessError: Command '['gcc']' returned non-zero exit status 1."}
    return {"launch": error, "layers": error, "blamed": blamed}


def test_all_there_works_and_nothing_is_to_be_fixed(tmp_path: Path) -> None:
    diagnosis = diagnose(tmp_path, facts(tmp_path))
    assert diagnosis.works and diagnosis.first_problem is None
    assert diagnosis.summary == "Works on NVIDIA H200."
    assert {check.status for check in diagnosis.checks} == {"ok"}
    assert by_name(diagnosis, "GPU").found == "NVIDIA H200 (capability 9.0), driver 570.86"
    assert "knows sm_90a" in by_name(diagnosis, "ptxas").found
    assert "W8A8 triton_w8a8_int8 error 7.0e-03" in by_name(diagnosis, "layers on the GPU").found


@pytest.mark.parametrize(
    ("changes", "name", "found", "fix"),
    [
        ({"programs": ()}, "C compiler", "no gcc or clang on PATH", "apt-get install gcc"),
        ({"programs": ("cc",)}, "C compiler", "/usr/bin/cc only", "export CC=cc"),
        ({"environ": {"CC": "icc"}}, "C compiler", "CC='icc' is not a program", "unset CC"),
        ({"headers": False}, "Python headers", "no Python.h in", "apt-get install python3."),
    ],
    ids=["no compiler", "only cc", "CC wrong", "no headers"],
)
def test_one_missing_thing_is_named_first_with_its_fix(
    tmp_path: Path, changes: dict[str, Any], name: str, found: str, fix: str
) -> None:
    answer = compiler_failure("x.c:1:10: fatal error: Python.h: No such file or directory")
    diagnosis = diagnose(tmp_path, facts(tmp_path), gpu_answer=answer, **changes)
    first = diagnosis.first_problem
    assert not diagnosis.works and first is not None
    assert (first.name, first.status) == (name, "missing")
    assert found in first.found and first.fix is not None and first.fix.startswith(fix)
    assert [check.name for check in diagnosis.checks if check.is_problem] == [name]
    assert by_name(diagnosis, "kernel launch").found == f"cannot work before: {name}"
    text = doctor.describe(diagnosis).splitlines()
    assert text[0].startswith(f"Does not work: {name} missing: ") and text[1].startswith("Fix: ")


def test_ptxas_too_old_for_the_gpu(tmp_path: Path) -> None:
    old = {"capability": [9, 0], "path": "/t/ptxas", "version": "11.4", "help": HELP_11_4}
    answer = compiler_failure("ptxas fatal   : Value 'sm_90a' is not defined for option")
    diagnosis = diagnose(tmp_path, facts(tmp_path, ptxas=[old]), gpu_answer=answer)
    first = diagnosis.first_problem
    assert not diagnosis.works and first is not None
    assert first.found == "11.4 (/t/ptxas) does not know sm_90a of NVIDIA H200 (capability 9.0)"
    assert first.fix is not None and "export TRITON_PTXAS_PATH=" in first.fix


def test_fix_names_the_variable_of_the_assembler_that_triton_takes() -> None:
    gpu = Gpu("Thor", (11, 0))
    check = checks.check_ptxas(gpu, "/t/ptxas-blackwell", "12.8", HELP_12_9, needed=True)
    assert check.status == "missing" and "sm_110a" in check.found
    assert check.fix is not None and "TRITON_PTXAS_BLACKWELL_PATH=" in check.fix


def test_cache_directory_that_cannot_be_written(tmp_path: Path) -> None:
    # A file in the place of a directory: refused to root, too.
    (tmp_path / "cache").touch()
    said = facts(tmp_path)
    diagnosis = diagnose(tmp_path, said, gpu_answer=compiler_failure(None))
    first = diagnosis.first_problem
    assert first is not None and first.name == "Triton cache" and first.status == "missing"
    assert first.fix is not None and "TRITON_CACHE_DIR" in first.fix


@pytest.mark.parametrize("writable", [True, False])
def test_kernels_are_compiled_afresh_unless_the_cache_is_the_question(
    tmp_path: Path, writable: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not writable:
        (tmp_path / "cache").touch()
    asked: list[tuple[str, bool]] = []

    def run_child(arguments: list[str], environ: dict[str, str] | None = None) -> dict[str, Any]:
        asked.append((arguments[-1], "TRITON_CACHE_DIR" in (environ or {})))
        return facts(tmp_path) if arguments == ["facts"] else WORKING

    monkeypatch.setattr(probe, "run_child", run_child)
    monkeypatch.setattr(doctor, "find_gpus", lambda *_: machine.Driver((H200,), "570"))
    diagnosis = doctor.examine(Progress())
    assert asked == [("facts", False), ("cuda:0", writable), ("cpu", False)]
    assert diagnosis.works


def test_no_triton_on_a_gpu_machine(tmp_path: Path) -> None:
    said = facts(tmp_path, triton={"error": "ModuleNotFoundError: No module named 'triton'"})
    diagnosis = diagnose(tmp_path, said, gpu_answer=compiler_failure(None))
    first = diagnosis.first_problem
    assert not diagnosis.works and first is not None
    assert (first.name, first.fix) == ("Triton", "pip install 'triton>=3.6,<4'")


def test_cpu_build_of_torch_beside_a_gpu(tmp_path: Path) -> None:
    said = facts(tmp_path, None, torch={"version": "2.11.0+cpu", "cuda": None, "hip": None})
    diagnosis = diagnose(tmp_path, said, driver=machine.Driver((H200,), "570.86"))
    first = diagnosis.first_problem
    assert not diagnosis.works and first is not None and first.name == "torch"
    assert "CPU build: it cannot use the GPU" in first.found
    assert first.fix is not None and "--index-url" in first.fix
    assert by_name(diagnosis, "GPU").status == "ok"


def test_driver_too_old_for_torch(tmp_path: Path) -> None:
    said = facts(tmp_path, None)
    said["torch"]["gpu_error"] = "The NVIDIA driver on your system is too old"
    diagnosis = diagnose(tmp_path, said, driver=machine.Driver((H200,), "470.1"))
    first = diagnosis.first_problem
    assert not diagnosis.works and first is not None and first.name == "GPU"
    assert first.found.endswith("driver 470.1, but torch cannot use it: The NVIDIA driver on your"
                                " system is too old")  # fmt: skip


def test_no_gpu_counts_the_cpu_path_and_only_warns_of_the_rest(tmp_path: Path) -> None:
    said = facts(tmp_path, None, triton={"error": "ModuleNotFoundError"}, ptxas=[])
    diagnosis = diagnose(tmp_path, said, programs=(), headers=False)
    assert diagnosis.works and diagnosis.summary.startswith("Works on the CPU. No GPU")
    statuses = {check.name: check.status for check in diagnosis.checks}
    assert statuses["C compiler"] == statuses["Python headers"] == statuses["Triton"] == "warning"
    assert statuses["GPU"] == statuses["kernel launch"] == "skipped"
    assert statuses["layers on the CPU"] == "ok"


def test_gpu_hidden_on_purpose_is_no_failure(tmp_path: Path) -> None:
    said = facts(tmp_path, None)
    hidden = {"CUDA_VISIBLE_DEVICES": ""}
    diagnosis = diagnose(tmp_path, said, driver=machine.Driver((H200,), "570"), environ=hidden)
    assert diagnosis.works
    assert "hidden by CUDA_VISIBLE_DEVICES=''" in by_name(diagnosis, "GPU").found


@pytest.mark.parametrize(
    ("error", "status", "fix"),
    [
        ("ModuleNotFoundError: No module named 'torch'", "missing", "pip install torch"),
        ("OSError: libcudart.so.12: cannot open", "failed", "pip install --force-reinstall torch"),
    ],
)
def test_nothing_runs_without_torch(tmp_path: Path, error: str, status: str, fix: str) -> None:
    diagnosis = diagnose(tmp_path, facts(tmp_path, None, torch={"error": error}), cpu_answer={})
    assert not diagnosis.works
    assert diagnosis.first_problem == checks.Check("torch", status, error, fix)
    assert by_name(diagnosis, "layers on the CPU").found == "cannot work before: torch"


def test_turing_needs_no_triton(tmp_path: Path) -> None:
    turing = Gpu("Tesla T4", (7, 5))
    torch_layers = {"W4A16": ["torch_w4a16", 1e-3], "W8A8": ["torch_int_mm", 7e-3]}
    answer = {"launch": {}, "layers": {"layers": torch_layers}}
    diagnosis = diagnose(tmp_path, facts(tmp_path, turing), programs=(), gpu_answer=answer)
    assert diagnosis.works and by_name(diagnosis, "C compiler").status == "warning"
    assert "Triton needs 8.0" in by_name(diagnosis, "kernel launch").found


def test_what_does_not_stop_the_kernels_is_only_a_warning(tmp_path: Path) -> None:
    diagnosis = diagnose(tmp_path, facts(tmp_path), programs=())
    assert diagnosis.works and diagnosis.first_problem is None
    assert by_name(diagnosis, "C compiler").found.endswith("; kernels run nonetheless")


def test_unexplained_launch_failure_quotes_the_compiler(tmp_path: Path) -> None:
    answer = compiler_failure("/usr/bin/ld: error: cannot find -l:libcuda.so.1")
    diagnosis = diagnose(tmp_path, facts(tmp_path), gpu_answer=answer)
    first = diagnosis.first_problem
    assert first is not None and (first.name, first.status) == ("kernel launch", "failed")
    assert "cannot find -l:libcuda.so.1" in first.found


@pytest.mark.parametrize("error", [0.2, float("nan")])
def test_wrong_numbers_are_a_failure(tmp_path: Path, error: float) -> None:
    wrong = {"layers": {"W4A16": ["triton_w4a16", error], "W8A8": ["triton_w8a8_int8", 7e-3]}}
    answer = {"launch": {"equal": True}, "layers": wrong}
    diagnosis = diagnose(tmp_path, facts(tmp_path), gpu_answer=answer)
    first = diagnosis.first_problem
    assert not diagnosis.works and first is not None
    assert first.found.startswith("wrong numbers from W4A16: ")


def test_gpus_are_found_through_nvidia_smi_or_proc(tmp_path: Path) -> None:
    listing = "NVIDIA H200, 570.86.15, 9.0\nNVIDIA H200, 570.86.15, 9.0\n"
    driver = machine.find_gpus(which("nvidia-smi"), lambda _: listing, tmp_path)
    assert driver == machine.Driver((H200, H200), "570.86.15")
    information = tmp_path / "proc/driver/nvidia/gpus/0000:01:00.0/information"
    information.parent.mkdir(parents=True)
    information.write_text("Model: \t\t NVIDIA A10\nIRQ: 12\n")
    assert machine.find_gpus(which(), lambda _: None, tmp_path).gpus == (Gpu("NVIDIA A10", None),)
    assert machine.find_gpus(which("nvidia-smi"), lambda _: None, tmp_path / "no").gpus == ()


def test_a_crashed_probe_is_an_answer() -> None:
    crashed = probe.read_answer(-11, "", "Fatal Python error: Segmentation fault\n")
    assert crashed == {
        "error": "the probe crashed (killed by signal 11): Fatal Python error: Segmentation fault"
    }
    blamed = probe.read_answer(0, '{"launch": {}}', "a\nm.c:3:10: fatal error: Python.h: No\nb\n")
    assert blamed["blamed"] == "m.c:3:10: fatal error: Python.h: No"


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("raise OSError('libcudart.so.12: cannot open')", "OSError: libcudart.so.12: cannot open"),
        ("import os; os.abort()", "the probe crashed (killed by signal 6): no output"),
    ],
    ids=["raises", "aborts"],
)
def test_a_torch_that_cannot_be_imported_is_no_traceback(
    tmp_path: Path,
    line: str,
    found: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "torch.py").write_text(line)
    # The child takes over the path.
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert main.main(["doctor"]) == 1
    captured = capsys.readouterr()
    lines = captured.out.splitlines()
    assert lines[:2] == [
        f"Does not work: torch failed: {found}",
        "Fix: pip install --force-reinstall torch",
    ]
    assert captured.err == ""


def test_the_launch_check_compares_with_the_reference(tmp_path: Path) -> None:
    # Triton's interpreter stands in for a GPU.
    code = "import torch; from pymllm.cli import probe; print(probe._launch(torch.randn(3, 50)))"
    environ = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], env=environ, cwd=tmp_path, text=True,
                          capture_output=True, check=False)  # fmt: skip
    assert done.stdout == "{'equal': True}\n", done.stderr


def test_ptxas_help_is_read() -> None:
    assert checks.ptxas_targets(HELP_11_4) == {"sm_75", "sm_80", "sm_86", "sm_87"}
    targets = [checks.ptxas_target(pair) for pair in ((8, 6), (9, 0), (12, 0))]
    assert targets == ["sm_86", "sm_90a", "sm_120a"]


def test_the_command_on_this_machine(capsys: pytest.CaptureFixture[str]) -> None:
    code = main.main(["doctor", "--json"])
    captured = capsys.readouterr()
    report = json.loads(captured.out)
    assert code == (0 if report["ok"] else 1)
    assert captured.err == ""
    checks_by_name = {check["name"]: check for check in report["checks"]}
    assert checks_by_name["Python"]["found"].startswith(".".join(map(str, sys.version_info[:3])))
    assert checks_by_name["layers on the CPU"]["status"] == "ok", checks_by_name
    for check in report["checks"]:
        assert set(check) == {"name", "status", "found", "fix"}
        assert check["status"] in {"ok", "missing", "failed", "warning", "skipped"}
