"""Keys, conditions and the hash of a kernel's source."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from pymllm_kernels.tuning import BUCKETS, Tunable, bucket, source
from pymllm_kernels.tuning.keys import Conditions, differing
from pymllm_kernels.w4a16 import tunable as w4a16_tunable
from pymllm_kernels.w8a8_int8 import tunable as w8a8_tunable

TUNABLES: list[Tunable] = [
    w4a16_tunable.HOPPER, w4a16_tunable.TRITON, w8a8_tunable.HOPPER, w8a8_tunable.TRITON,
]  # fmt: skip
HERE = Conditions("NVIDIA H200", "9.0", 132, "3.6.0", "0123456789abcdef")


def test_buckets_are_powers_of_two_up_to_8192() -> None:
    assert [bucket(m) for m in (0, 1, 2, 3, 4, 5, 17, 8192, 8193, 10**6)] == [
        1, 1, 2, 4, 4, 8, 32, 8192, 8192, 8192,
    ]  # fmt: skip
    assert sorted({bucket(m) for m in range(1, 9000)}) == list(BUCKETS)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"board": "NVIDIA H100 80GB HBM3"}, "board NVIDIA H100 80GB HBM3 there, NVIDIA H200 here"),
        ({"capability": "10.0"}, "capability 10.0 there, 9.0 here"),
        ({"multiprocessors": 114}, "multiprocessors 114 there, 132 here"),
        ({"triton": "3.5.1"}, "Triton 3.5.1 there, 3.6.0 here"),
        ({"kernel": "ffff"}, "kernel source ffff there, 0123456789abcdef here"),
    ],
)
def test_a_difference_is_named_with_both_values(change: dict[str, object], told: str) -> None:
    assert differing(replace(HERE, **change), HERE) == [told]  # type: ignore[arg-type]
    assert differing(HERE, HERE) == []


def reached_by_triton(root: str) -> set[tuple[str, str]]:
    """The compiled functions that a kernel calls, as Triton finds them: by name among its globals."""
    from triton.runtime.jit import JITFunction

    module, _, name = root.partition(":")
    todo, found = [getattr(importlib.import_module(module), name)], set()
    while todo:
        function = todo.pop()
        place = (function.fn.__module__, function.fn.__name__)
        if place in found or not place[0].startswith("pymllm_kernels"):
            continue
        found.add(place)
        names = (function.fn.__globals__.get(used) for used in function.fn.__code__.co_names)
        todo += [value for value in names if isinstance(value, JITFunction)]
    return found


@pytest.mark.parametrize("tunable", TUNABLES, ids=lambda tunable: str(tunable.operation))
def test_the_hash_covers_every_function_that_triton_compiles_in(tunable: Tunable) -> None:
    pytest.importorskip("triton")
    covered = set(source.source_of(tunable.sources))
    for root in tunable.sources:
        called = reached_by_triton(root)
        assert len(called) > 1
        assert called <= covered


def test_the_hash_is_the_same_in_every_process() -> None:
    code = (
        "from pymllm_kernels.w4a16.tunable import HOPPER\n"
        "from pymllm_kernels.tuning.source import source_hash\n"
        "print(source_hash(HOPPER.sources))"
    )
    found = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONHASHSEED": seed}, capture_output=True, text=True, check=True,
        ).stdout.strip()
        for seed in ("1", "2")
    }  # fmt: skip
    assert found == {source.source_hash(w4a16_tunable.HOPPER.sources)}


KERNEL = '''"""A kernel."""
import triton
from pymllm_kernels.b import helper as renamed

WIDTH = 4


@triton.jit
def inner(x):
    return x + WIDTH


@triton.jit
def kernel(x):
    """What it does."""
    # Why it does.
    return renamed(inner(x))


def unrelated():
    return 1
'''
HELPER = "SCALE = 2\n\n\ndef helper(x):\n    return x * SCALE\n"


def hash_of(root: Path, kernel: str, helper: str, monkeypatch: pytest.MonkeyPatch) -> str:
    (root / "a.py").write_text(kernel)
    (root / "b.py").write_text(helper)
    monkeypatch.setattr(source, "_ROOT", root)
    for cached in (source.source_hash, source._read, source._definitions, source._imports):
        cached.cache_clear()
    try:
        return source.source_hash(("pymllm_kernels.a:kernel",))
    finally:
        for cached in (source.source_hash, source._read, source._definitions, source._imports):
            cached.cache_clear()


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """A folder for a made-up package."""
    root = tmp_path / "pymllm_kernels"
    root.mkdir()
    return root


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("WIDTH = 4", "WIDTH = 8"),
        ("x + WIDTH", "x - WIDTH"),
        ("renamed(inner(x))", "renamed(x)"),
        ("@triton.jit\ndef kernel", "@triton.jit(do_not_specialize=['x'])\ndef kernel"),
        ("SCALE = 2", "SCALE = 3"),
        ("x * SCALE", "x / SCALE"),
    ],
)
def test_every_part_of_the_kernel_counts(
    package: Path, monkeypatch: pytest.MonkeyPatch, old: str, new: str
) -> None:
    before = hash_of(package, KERNEL, HELPER, monkeypatch)
    changed = (text.replace(old, new) for text in (KERNEL, HELPER))
    assert hash_of(package, *changed, monkeypatch) != before


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("# Why it does.", "# Why it really does."),
        ('"""What it does."""', '"""Other words."""'),
        ("return 1", "return 2"),
        ("WIDTH = 4\n", "\n\n\nWIDTH = 4\n"),
    ],
)
def test_comments_docstrings_and_other_functions_do_not(
    package: Path, monkeypatch: pytest.MonkeyPatch, old: str, new: str
) -> None:
    before = hash_of(package, KERNEL, HELPER, monkeypatch)
    assert old in KERNEL
    assert hash_of(package, KERNEL.replace(old, new), HELPER, monkeypatch) == before


def test_a_function_that_is_not_there_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"w4a16\.kernel:gone"):
        source.source_hash(("pymllm_kernels.w4a16.kernel:gone",))


def test_keys_hold_what_changes_the_best_configuration() -> None:
    key = w4a16_tunable.hopper_key
    bf16, fp16 = torch.bfloat16, torch.float16
    keys = {
        key(4096, 4096, 128, bf16, bf16, True),
        key(4096, 4096, 128, bf16, bf16, False),
        key(4096, 4096, 128, bf16, bf16, True, bits=8),
        key(4096, 4096, 128, bf16, fp16, True),
        key(4096, 4096, 128, fp16, fp16, True),
        key(4096, 4096, 64, bf16, bf16, True),
        key(4096, 8192, 128, bf16, bf16, True),
        w8a8_tunable.hopper_key(4096, 4096, bf16, True, False),
        w8a8_tunable.hopper_key(4096, 4096, bf16, False, False),
        w8a8_tunable.hopper_key(4096, 4096, bf16, True, True),
    }
    assert len(keys) == 10
