"""Warm-up: every form that any number of tokens can need, compiled before; none compiled twice."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

import pymllm
from pymllm import warming
from pymllm.cli.main import main
from pymllm_kernels import Counts, LinearProblem, planned_device, select_kernel

BF16 = torch.bfloat16
HOPPER = planned_device("9.0")
AMPERE = planned_device("8.0")


def problem(scheme: str, n: int, k: int, device: Any = HOPPER, **more: Any) -> LinearProblem:
    if scheme == "w4a16":
        return LinearProblem(
            scheme,
            n,
            k,
            more.pop("bits", 4),
            more.pop("group", 128),
            True,
            False,
            BF16,
            BF16,
            device,
        )
    return LinearProblem(
        scheme, n, k, 8, -1, True, False, BF16, torch.float32, device, more.pop("inputs", "token"),
        more.pop("symmetric", True),
    )  # fmt: skip


PROBLEMS = [
    problem("w4a16", 4096, 4096),
    problem("w4a16", 10240, 8192),
    problem("w4a16", 2112, 7168, group=64),
    problem("w4a16", 1000, 4096, bits=8),
    problem("w4a16", 4096, 4096, AMPERE),
    problem("w8a8_int8", 4096, 14336),
    # The quantization overlaps up to 2**20 activations: 1000 tokens, no multiple of 8.
    problem("w8a8_int8", 4096, 1040),
    problem("w8a8_int8", 4096, 4096, inputs="tensor", symmetric=False),
    problem("w8a8_int8", 999, 4090),
]


@pytest.mark.parametrize("layer", PROBLEMS, ids=lambda p: f"{p.scheme}-{p.n}x{p.k}")
def test_no_number_of_tokens_needs_another_form(layer: LinearProblem) -> None:
    kernel = select_kernel(layer).kernel
    found = set(warming.forms_of(layer, 1100, (None, BF16)))
    every = {
        form
        for m in range(1, 1101)
        for bias in (None, BF16)
        for form in kernel.forms(layer, m, bias=bias)
    }
    assert found == every


def test_forms_do_not_depend_on_the_layers_size() -> None:
    """Layers of other sizes share what is compiled, and most forms serve several tokens."""
    small, large = (set(warming.forms_of(problem("w4a16", n, 4096), 512)) for n in (4096, 8192))
    assert small & large


def warm_in_a_process(cache: Path, *options: str) -> dict[str, Any]:
    environment = {**os.environ, "TRITON_CACHE_DIR": str(cache), "PYMLLM_TUNING_DIR": str(cache)}
    command = [
        sys.executable, "-m", "pymllm", "warmup", "--capability", "9.0", "--max-tokens", "8", "--json",
        *options,
    ]  # fmt: skip
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_the_command_compiles_for_a_gpu_that_is_not_here(tmp_path: Path) -> None:
    first, again = (
        warm_in_a_process(tmp_path, "--shapes", "4096x4096", "--scheme", "w8a8") for _ in range(2)
    )
    assert first["compiled"] == len(first["forms"]) > 0
    assert again["compiled"] == 0 and again["forms"] == first["forms"]
    assert first["kernels"] == {"gluon_hopper_w8a8_int8": 1} and first["tuned"] == 0


@pytest.fixture
def not_compiled(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What would have been compiled."""
    asked: list[Any] = []

    def compile_forms(forms: Any, facts: Any, told: Any, workers: Any) -> int:
        asked.extend(forms)
        told(0, len(asked))
        told(len(asked), len(asked))
        return len(asked)

    monkeypatch.setattr(warming, "compile_forms", compile_forms)
    return asked


def test_a_checkpoint_is_warmed_with_its_biases_and_fused_layers(
    tmp_path: Path, not_compiled: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    torch.manual_seed(0)
    heads = {name: torch.nn.Linear(256, 128, bias=True, dtype=BF16) for name in "qkv"}
    layers = {f"layers.0.attn.{name}_proj": head for name, head in heads.items()}
    pymllm.save_linears(layers, tmp_path / "model", scheme="W4A16", group_size=128)
    assert (
        main(["warmup", str(tmp_path / "model"), "--capability", "9.0", "--max-tokens", "9"]) == 0
    )
    text = capsys.readouterr().out
    # q, k and v alike, and all three as one layer.
    assert "2 different layers, 1 to 9 tokens (gluon_hopper_w4a16 2)" in text
    biases = {form.specialization().constexprs.get("bias_ptr", "there") for form in not_compiled}
    assert biases == {None, "there"}


def test_progress_is_told(not_compiled: list[Any]) -> None:
    told: list[str] = []
    warming.warm([PROBLEMS[0]], max_tokens=4, progress=told.append)
    assert told[0] == "[1/1] forms of w4a16 4096x4096"
    assert told[-1] == f"compiled {len(not_compiled)} of {len(not_compiled)} forms"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"max_tokens": 0, "shapes": [(64, 64)]}, "max_tokens: found 0"),
        ({"tune": "yes", "shapes": [(64, 64)]}, "tune: found 'yes'"),
        ({}, "found no layer to warm"),
    ],
)
def test_bad_input_is_named(arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        pymllm.warmup(device="cpu", **{"tune": "off", **arguments})


def test_a_cpu_has_nothing_to_compile() -> None:
    done = pymllm.warmup(shapes=[(128, 256)], device="cpu", tune="off", max_tokens=4)
    assert done.compiled == 0 and done.forms == []
    assert set(done.kernels) == {"cpu_int4pack", "torch_int_mm"}


@pytest.mark.parametrize(
    "options",
    [
        ["--shapes", "64x64", "--capability", "9.0", "--tune", "all"],
        ["--shapes", "64x64", "--capability", "9.0", "--verify"],
        ["--shapes", "64x64", "--model", "llama-3-8b"],
        ["--capability", "9.0"],
        ["nowhere", "--capability", "9.0"],
    ],
)
def test_the_command_refuses_what_makes_no_sense(
    options: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["warmup", *options, "--json"]) == 2
    assert json.loads(capsys.readouterr().out)["error"]


def test_help_names_both_caches(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["warmup", "--help"])
    assert ended.value.code == 0
    text = capsys.readouterr().out
    assert "TRITON_CACHE_DIR" in text and "PYMLLM_TUNING_DIR" in text


def test_verdict(not_compiled: list[Any]) -> None:
    from pymllm.cli.warmup import _text

    done = warming.warm([PROBLEMS[0]], max_tokens=4)
    assert "it is warm" in _text(done, Counts(0, 9, 0), "a GPU", 4)
    assert "compiled 1, tuned 0 and loaded 8: NOT warm" in _text(done, Counts(1, 8, 0), "a GPU", 4)


@pytest.mark.gpu
@pytest.mark.parametrize("scheme", ["w4a16", "w8a8_int8"])
def test_a_fresh_process_neither_compiles_nor_tunes(scheme: str) -> None:
    from pymllm_kernels import device_facts

    facts = device_facts("cuda")
    layers = [problem(scheme, 1024, 2048, facts), problem(scheme, 1000, 2000, facts, group=16)]
    warming.warm(layers, max_tokens=700)
    counted = warming.verify(layers, "cuda", max_tokens=700)
    assert (counted.compiled, counted.tuned) == (0, 0)
    assert counted.loaded > 0
