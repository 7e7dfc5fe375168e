"""``bench/variants.py``: a run on a CPU, its table and file, refusals."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest

from pymllm.bench.roof import Roof
from pymllm.bench.variants import run as runs

ROOT = Path(__file__).parents[2]


@pytest.fixture
def variants(monkeypatch: pytest.MonkeyPatch) -> Any:
    spec = importlib.util.spec_from_file_location("bench_variants", ROOT / "bench" / "variants.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(runs, "measure_roof", lambda device: Roof(1.0, 1.0))
    monkeypatch.setattr(runs, "CPU_COPY_BYTES", 2**16)
    return module


def test_table_and_file(variants: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "variants.json"
    command = ["--out", str(path), "--shapes", "64x256", "--tokens", "1", "--device", "cpu"]
    assert variants.main([*command, "--parts", "w8a8_int8"]) == 0
    text = capsys.readouterr().out
    assert "] w8a8_int8 64x256 M=1\n" in text
    assert sum(line.startswith("w8a8_int8  ") for line in text.splitlines()) == 6
    assert "strided rows of x" in text and "(64x256, M = 1)" in text
    assert text.rstrip().endswith("complete")
    document = runs.load(path)
    assert document["complete"] and len(document["cells"]) == 7


def test_time_limit_and_refusals(variants: Any, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["--shapes", "64x256", "--device", "cpu", "--parts", "w4a16"]
    assert variants.main([*command, "--time-limit", "0"]) == 0
    assert "not complete: the time limit was reached" in capsys.readouterr().out
    assert variants.main(["--parts", "w2a2"]) == 2
    assert variants.main(["--shapes", "64"]) == 2
    assert "variants: error: " in capsys.readouterr().err
