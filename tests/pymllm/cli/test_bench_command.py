"""``pymllm bench``: what it prints, what it saves, what it refuses."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from pymllm.bench.shapes import model_shapes
from pymllm.cli import bench, main
from pymllm.cli.bench_cells import Grid, grids_of, modes_of, summary
from pymllm.cli.report import Progress

SMALL = ("bench", "--device", "cpu", "--shapes", "256x128", "--tokens", "1,4")


def cell(provider: str, m: int, us: float | None, **changed: Any) -> dict[str, Any]:
    return {
        "scheme": "w4a16", "n": 4096, "k": 8192, "group": 128, "dtype": "bfloat16", "m": m,
        "provider": provider, "mode": "graph", "cache": "cold", "median_us": us,
        "roof_us": None if us is None else 5.0, "skip": None if us else "takes K of 32",
        "config": f"tile {8 if m < 16 else 64}" if provider == "ours" and us else None,
        "origin": "shipped", **changed,
    }  # fmt: skip


def document(cells: list[dict[str, Any]]) -> dict[str, Any]:
    gone = {"marlin": {"about": "", "absent": "not installed (pip install vllm)"}}
    return {
        "environment": {"gpu": "Some GPU"},
        "roof": {"read_tbps": 4.23, "bf16_tops": 793.0, "int8_tops": 1586.0},
        "providers": {"ours": {"about": "", "absent": None}, **gone},
        "cells": cells,
        "complete": True,
        "stopped": None,
    }


CELLS = [
    cell("ours", 1, 10.0), cell("cublas_bf16", 1, 30.0), cell("humming", 1, 12.5),
    cell("ours", 64, 40.0), cell("cublas_bf16", 64, 20.0), cell("humming", 64, None),
]  # fmt: skip


def test_table_marks_the_fastest_and_shows_losses() -> None:
    lines = bench.text_of(document(CELLS)).splitlines()
    row = {line.split()[0]: line.split() for line in lines if line[:2].strip().isdecimal()}
    assert row["1"] == ["1", "10.0*", "30.0", "12.5", "50%", "1.25", "3.00"]
    assert row["64"] == ["64", "40.0", "20.0*", "-", "12%", "0.50", "0.50"]


def test_summary_counts_both_sides_and_names_the_worst_loss() -> None:
    text = summary(grids_of(CELLS, "graph", "cold"))
    assert "won 1, lost 1 of 2 cells (0 within 3 %)" in text
    assert "geometric mean 0.79x; against bf16 1.22x" in text  # sqrt(1.25 * 0.5), sqrt(3 * 0.5)
    assert "worst loss 0.50x (4096 x 8192, M = 64, cublas_bf16)" in text


def test_the_path_taken_and_where_bf16_is_faster() -> None:
    cells = [*CELLS, cell("ours", 2, 10.0), cell("cublas_bf16", 2, 10.1)]
    text = bench.text_of(document(cells))
    assert "ours, M = 1, 2: tile 8 (shipped)\nours, M = 64: tile 64 (shipped)" in text
    losses = "w4a16, graph, cold: slower than bf16: 4096 x 8192, M = 64: 40.0 us, bf16 20.0 (0.50x)"
    assert f"{losses}\n\nnot here: marlin" in text
    fast = [one for one in cells if one["m"] < 64]
    assert "slower than bf16: nowhere" in bench.text_of(document(fast))


def test_a_cell_that_ours_lacks_is_told() -> None:
    cells = [cell("ours", 1, None), cell("humming", 1, 5.0)]
    assert summary(grids_of(cells, "graph", "cold")).endswith("no time of ours in 1 cells that others have")  # fmt: skip
    assert summary(grids_of([*CELLS, cell("humming", 128, 9.0)], "graph", "cold")).endswith(
        "no time of ours where others have one: 1"
    )


def test_absent_providers_and_skipped_cells_once_with_the_reason() -> None:
    skips = [cell("humming", m, None) for m in (1, 2, 3)]
    text = bench.text_of(document([*CELLS[:2], *skips]))
    assert text.count("not here: marlin: not installed (pip install vllm)") == 1
    assert text.count("no time in 3 cells: humming, w4a16: takes K of 32") == 1


def test_modes_are_kept_apart() -> None:
    host = cell("ours", 1, 35.0, mode="host", cache="hot", roof_us=None)
    cells = [*CELLS, host]
    assert modes_of(cells) == [("graph", "cold"), ("host", "hot")]
    (grid,) = grids_of(cells, "host", "hot")
    assert grid.us == {"ours": {1: 35.0}}
    assert grid.roof_fraction(1) is None


def test_published_providers_are_added_only_where_nothing_was_measured() -> None:
    (grid,) = grids_of(CELLS, "graph", "cold")
    more = grid.with_published({"humming": {64: 1.0}, "marlin": {1: 8.0, 2: 9.0}})
    assert more.us["humming"] == {1: 12.5}
    assert more.us["marlin"] == {1: 8.0}
    assert (more.published, more.best(1)) == ({"marlin"}, "marlin")


def test_json_and_file_are_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run.json"
    assert main.main([*SMALL, "--json", "--out", str(out)]) == 0
    captured = capsys.readouterr()
    printed = json.loads(captured.out, parse_constant=pytest.fail)
    assert captured.err == ""
    assert printed == json.loads(out.read_text())
    assert {entry["scheme"] for entry in printed["cells"]} == {"w4a16", "w8a8_int8"}
    assert {entry["m"] for entry in printed["cells"]} == {1, 4}


def test_table_of_a_real_run(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ("--scheme", "w4a16", "--providers", "ours,torch_bf16", "--cache", "hot")
    assert main.main([*SMALL, *arguments, "--verbose"]) == 0
    captured = capsys.readouterr()
    assert "W4A16, groups of 128, bf16, 256 x 128" in captured.out
    assert "weights in cache" in captured.out
    assert "of 2 cells" in captured.out
    assert "W8A8" not in captured.out
    assert re.search(r"\[4/4\] w4a16 256x128 torch_bf16 M=4, about \d+ s left", captured.err)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--shapes", "4096"), "found '4096', accepted NxK"),
        (("--model", "gpt-9"), "found 'gpt-9', accepted ['llama-3-8b'"),
        (("--shapes", "8x8", "--model", "qwen3-4b"), "not allowed with"),
        (("--providers", "ours,fastest"), "found ['fastest'], accepted ['ours'"),
        (("--providers", "cublas_bf16"), "none of ['cublas_bf16'] runs on cpu"),
        (("--tokens", "0"), "accepted positive integers"),
        (("--modes", "graph,warm"), "accepted graph, eager, host"),
        (("--out", "/no/such/folder/run.json"), "there is no folder /no/such/folder"),
    ],
)
def test_refusals(
    arguments: tuple[str, ...], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main.main(["bench", "--device", "cpu", *arguments]) == 2
    captured = capsys.readouterr()
    assert words in captured.err
    assert captured.err.count("\n") == 1
    assert captured.out == ""


def test_shapes_with_either_sign_each_once() -> None:
    assert bench.shapes_of("4096x512,64×32,4096X512") == [(4096, 512), (64, 32)]  # noqa: RUF001
    assert (4096, 14336) in model_shapes("llama-3-8b")


def test_countdown_measures_what_is_left(capsys: pytest.CaptureFixture[str]) -> None:
    times = iter([0.0, 60.0, 120.0])
    count = bench.Countdown(Progress(verbose=True), lambda: 10, lambda: next(times))
    for text in ("measuring", "a M=1", "b M=1", "c M=2"):
        count(text)
    assert capsys.readouterr().err.splitlines() == [
        "measuring", "[1/10] a M=1", "[2/10] b M=1, about 9 min left", "[3/10] c M=2, about 8 min left",
    ]  # fmt: skip


def test_interrupted_run_still_shows_what_it_has(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Result:
        document = document(CELLS) | {"complete": False, "stopped": "interrupted"}

    monkeypatch.setattr("pymllm.bench.run.run", lambda **_: Result)
    assert main.main([*SMALL]) == 130
    captured = capsys.readouterr()
    assert "10.0*" in captured.out
    assert "not complete: interrupted" in captured.err


def test_grid_without_anything_has_no_best() -> None:
    grid = Grid("w4a16", 8, 8, 128, "bfloat16")
    assert grid.best(1) is grid.best_other(1) is grid.ratio(1) is None
