"""``bench/report.py``: tables, published figures, documents, refusals, plots."""

from __future__ import annotations

import copy
import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

from pymllm.bench.timing import summarize
from pymllm.bench.variants.values import SHARE, US, Goal, blank, compare, fill

ROOT = Path(__file__).parents[2]
TIMES = {
    # M: ours, bf16, humming, roof
    1: {"ours": 8.0, "cublas_bf16": 24.0, "humming": 10.0, "roof": 4.0},
    64: {"ours": 20.0, "cublas_bf16": 16.0, "humming": 25.0, "roof": 8.0},
    1024: {"cublas_bf16": 100.0, "humming": 110.0, "roof": 90.0},
}
GONE = "not installed (pip install vllm)"


@pytest.fixture(scope="module")
def report() -> Any:
    spec = importlib.util.spec_from_file_location("bench_report", ROOT / "bench" / "report.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def cell(
    scheme: str, m: int, provider: str, us: float | None, roof: float | None
) -> dict[str, Any]:
    return {
        "scheme": scheme, "n": 4096, "k": 8192, "m": m, "group": 128 if scheme == "w4a16" else -1,
        "dtype": "bfloat16", "provider": provider, "mode": "graph", "cache": "cold",
        "skip": None if us else "wrong result", "median_us": us, "roof_us": roof,
        "low_us": us and us * 0.99, "high_us": us and us * 1.02,
        "config": f"tile {m}" if provider == "ours" and us else None, "origin": "rule",
    }  # fmt: skip


def a_run() -> dict[str, Any]:
    cells = [
        cell(scheme, m, name, us, row["roof"])
        for scheme in ("w4a16", "w8a8_int8")
        for m, row in TIMES.items()
        for name, us in row.items()
        if name != "roof"
    ]
    cells.append(cell("w4a16", 1024, "ours", None, None))
    clocks = {"sm_mhz": 1980.0, "memory_mhz": 3201.0, "temperature_c": 41.0, "power_w": 300.0}
    return {
        "format": "pymllm-bench", "version": 1,
        "environment": {
            "device": "cuda", "gpu": "NVIDIA H200", "capability": "9.0", "driver": "580.1",
            "versions": {"torch": "2.11.0"}, "commit": "abc",
            "clocks_before": clocks, "clocks_after": None,
        },
        "roof": {"read_tbps": 4.23, "bf16_tops": 793.0, "int_mm_tops": 954.0, "int8_tops": 1586.0},
        "method": {"cache": "cold", "min_copy_bytes": 1}, "command": "pymllm bench --out run.json",
        "date": "2026-01-31T12:00:00+00:00", "wall_s": 200.4, "complete": True, "stopped": None,
        "providers": {
            **{name: {"about": "", "absent": None} for name in ("ours", "cublas_bf16", "humming")},
            "marlin": {"about": "", "absent": GONE},
        },
        "cells": cells,
    }  # fmt: skip


def written(path: Path, run: Any) -> str:
    path.write_text(json.dumps(run))
    return str(path)


@pytest.fixture
def run_file(tmp_path: Path) -> str:
    return written(tmp_path / "run.json", a_run())


def published(tmp_path: Path, **us: float) -> str:
    entry = {"kind": "w4a16", "N": 4096, "K": 8192, "M": 1, "us": us, "gemm_us": {}}
    return written(tmp_path / "peers.json", [entry])


def test_tables_have_the_numbers_the_best_and_the_losses(
    report: Any, run_file: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert report.main([run_file]) == 0
    lines = capsys.readouterr().out.splitlines()
    head = lines.index("#### N × K = 4096 × 8192")  # noqa: RUF001
    assert lines[head + 2] == (
        "| M | ours | cublas_bf16 | humming | roof | ours, of the roof | best other / ours |"
        " bf16 / ours |"
    )
    assert lines[head + 4] == "| 1 | **8.0** | 24.0 | 10.0 | 4.0 | 50% | 1.25 | 3.00 |"
    assert lines[head + 5] == "| 64 | 20.0 | **16.0** | 25.0 | 8.0 | 40% | 0.80 | 0.80 |"
    assert lines[head + 6] == "| 1024 | – | **100.0** | 110.0 | 90.0 | – | – | – |"  # noqa: RUF001


def test_paths_and_where_not_quantizing_is_faster(report: Any, run_file: str) -> None:
    text = report.tables(report.load([Path(run_file)]))["paths"].replace("×", "x")  # noqa: RUF001
    assert "| w4a16, 4096 x 8192, M = 64 | 20.0 | 16.0 | `tile 64 (rule)` |" in text
    assert "* w4a16, 4096 x 8192, M = 64: 20.0 us, bf16 16.0 (0.80x)" in text
    assert "M = 1:" not in text


def test_summary_and_what_is_missing(
    report: Any, run_file: str, capsys: pytest.CaptureFixture[str]
) -> None:
    report.main([run_file])
    text = capsys.readouterr().out
    assert "won 1, lost 1 of 2 cells" in text
    assert "worst loss 0.80x (4096 × 8192, M = 64, cublas_bf16)" in text  # noqa: RUF001
    assert f"* marlin: not here: {GONE}" in text
    assert "* ours, w4a16: wrong result (1 cell)" in text
    assert "1980 MHz SM, 3201 MHz memory" in text
    assert "`pymllm bench --out run.json`" in text
    assert "within 3.0% of the median in nine cells of ten" in text


@pytest.mark.parametrize(
    ("place", "name", "value", "words"),
    [
        ("environment", "gpu", "NVIDIA L4", "different gpu: NVIDIA H200 and NVIDIA L4"),
        ("method", "cache", "hot", "different cache state (cache): cold and hot"),
    ],
)
def test_runs_that_do_not_belong_together_are_refused(
    report: Any, run_file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    place: str, name: str, value: str, words: str,
) -> None:  # fmt: skip
    other = a_run()
    other[place][name] = value
    assert report.main([run_file, written(tmp_path / "other.json", other)]) == 2
    captured = capsys.readouterr()
    assert words in captured.err
    assert captured.out == ""


def test_runs_are_joined_and_the_last_counts(
    report: Any, run_file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = copy.deepcopy(a_run())
    other["cells"] = [cell("w4a16", 1, "ours", 7.0, 4.0), cell("w4a16", 1, "marlin", 6.0, 4.0)]
    # It did not work there: its time from the other run stays.
    other["cells"].append(cell("w4a16", 1, "humming", None, 4.0))
    other["providers"]["marlin"]["absent"] = None
    assert report.main([run_file, written(tmp_path / "other.json", other)]) == 0
    captured = capsys.readouterr()
    assert "| 1 | 7.0 | 24.0 | 10.0 | **6.0** |" in captured.out
    assert "marlin: not here" not in captured.out
    assert "in several runs, the last counts: 2 cells" in captured.err


@pytest.mark.parametrize("text", ["[]", "{", '{"format": "pymllm-bench", "version": 99}'])
def test_other_files_are_refused(
    report: Any, tmp_path: Path, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "bad.json"
    path.write_text(text)
    assert report.main([str(path)]) == 2
    assert "bad.json" in capsys.readouterr().err


def test_a_mode_that_is_not_there_is_refused(
    report: Any, run_file: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert report.main([run_file, "--mode", "eager"]) == 2
    assert "the runs have [('graph', 'cold')]" in capsys.readouterr().err


def test_published_check_counts_and_lists(
    report: Any, run_file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    peers = published(tmp_path, cublas_bf16=23.0, humming=8.0, machete=9.0, ours=1.0)
    assert report.main([run_file, "--check-published", peers, "--tolerance", "0.07"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("1 of 2 cells agree within 7 % (50.0%); 2 published cells not")
    assert "| cublas_bf16 | 1 | 1 | 100.0% | 1.04 | 1.04 | 1.04 |" in lines
    assert "| humming | 1 | 0 | 0.0% | 1.25 | 1.25 | 1.25 |" in lines
    assert lines[-1] == "| humming | w4a16 | 4096 × 8192 | 1 | 8.0 | 10.0 | 1.25 |  |"  # noqa: RUF001
    assert report.main([run_file, "--check-published", peers, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["cells"], found["within"], found["not_measured"]) == (2, 1, 2)
    assert found["providers"] == {
        "cublas_bf16": {"cells": 1, "within": 1},
        "humming": {"cells": 1, "within": 0},
    }
    (far,) = found["outside"]
    assert (far["provider"], far["m"], far["ratio"]) == ("humming", 1, 1.25)
    assert report.main([run_file, "--json"]) == 2


def test_published_check_hints_at_the_clock(report: Any) -> None:
    from report_agreement import hint

    slow = cell("w4a16", 1024, "cublas_bf16", 115.0, 90.0)
    slow |= {"sm_mhz": 1500, "power_w": 690.0, "throttle": "power cap", "copies": 4}
    assert hint(slow, 100.0, 1980) == "1500 MHz of 1980: up to 1.32; power cap at 690 W"
    # A low clock does not explain that something was faster.
    assert hint(slow, 130.0, 1980) == ""
    short = cell("w4a16", 1, "humming", 10.0, 2.0) | {"copies": 8}
    assert hint(short, 12.0, 0) == "graph of 80 µs: its launch counts"
    # More tokens in less time: then the published time was not the kernel's best.
    quick = cell("w8a8_int8", 4, "int_mm", 36.0, 4.0)
    published = {1: 30.0, 4: 43.8, 16: 39.5, 32: 36.2, 64: 38.3}
    assert hint(quick, 43.8, 0, published) == "published with 36.2 µs at M = 32"
    assert hint(quick, 43.8, 0, {1: 30.0, 4: 43.8, 16: 43.5}) == ""
    slower = cell("w8a8_int8", 4, "int_mm", 50.0, 4.0)
    assert hint(slower, 43.8, 0, published) == ""


def test_published_check_fills_a_document(report: Any, run_file: str, tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("<!-- tables: agreement -->\nold\n<!-- /tables -->\n")
    assert report.main([run_file, "--update", str(page)]) == 0
    assert "old" in page.read_text()
    peers = published(tmp_path, humming=8.0)
    assert report.main([run_file, "--update", str(page), "--check-published", peers]) == 0
    assert "0 of 1 cells agree" in page.read_text()


def test_published_providers_are_marked(
    report: Any, run_file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    peers = published(tmp_path, cublas_bf16=24.5, humming=1.0, machete=6.4)
    assert report.main([run_file, "--published", peers]) == 0
    text = capsys.readouterr().out
    assert "| M | ours | cublas_bf16 | humming | machete† |" in text
    assert "| 1 | 8.0 | 24.0 | 10.0 | **6.4** | 4.0 | 50% | 0.80 | 3.00 |" in text
    assert "published ones included" in text
    assert "† published: peers.json" in text


def test_published_figures_of_another_machine_are_refused(
    report: Any, run_file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert report.main([run_file, "--published", published(tmp_path, cublas_bf16=48.0)]) == 2
    assert "its bf16 takes 2.00 times as long" in capsys.readouterr().err
    assert report.main([run_file, "--published", run_file]) == 2
    assert "not a file of published figures" in capsys.readouterr().err


def variants_file(tmp_path: Path) -> str:
    base, slow = (blank("w4a16", name, "bf16", 16, 4096, 4096) for name in ("bf16", "8 bits"))
    broken = blank("w4a16", "fp16", "bf16", 16, 4096, 4096) | {"skip": "out of resource"}
    quick = blank("quantization", "static", "per token", 64, 4096)
    host = [
        blank("host", f"{name}, eager", "F.linear, eager", 1, 4096, 4096)
        for name in ("F.linear", "w4a16")
    ]
    for known, us, moved in ((base, 8.0, 10**7), (slow, 20.0, 2 * 10**7), (quick, 2.5, 10**6)):
        fill(known, summarize([us], 1, 1), moved)
    for known, us in zip(host, (16.0, 20.0), strict=True):
        fill(known, summarize([us], 1, 1))
        known["done_us"] = 2 * us
    compare(slow, base, Goal(SHARE, 0.85), 4.0)
    compare(quick, quick, Goal(US, 3.0), 4.0)
    compare(host[1], host[0], Goal(), 4.0)
    document = {
        "format": "pymllm-variants", "version": 1, "complete": False, "stopped": "interrupted",
        "environment": a_run()["environment"], "command": "variants.py --out v.json",
        "date": "2026-01-31T12:00:00+00:00", "wall_s": 99.6,
        "cells": [base, slow, broken, quick, *host],
    }  # fmt: skip
    return written(tmp_path / "variants.json", document)


def test_variants_stand_beside_what_is_wanted(
    report: Any, run_file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = variants_file(tmp_path)
    assert report.main(["--variants", path]) == 0
    text = capsys.readouterr().out.replace("×", "x").replace("–", "-")  # noqa: RUF001
    lines = text.splitlines()
    assert (
        "| w4a16: 8 bits | bf16 | 16 | share of the memory roof / the base's | 0.80 |"
        " 0.80 (4096 x 4096, M = 16) | ≥ 0.85 | not met, 1 of 1 cells |" in lines
    )
    assert (
        "| quantization: static | per token | 64 | µs | 2.50 | 2.50 (K = 4096, M = 64) |"
        " ≤ 3.00 µs | met |" in lines
    )
    assert "| host: w4a16, eager | F.linear, eager | 1 | time / the base's | 1.25 |" in text
    assert "| w4a16, eager, 4096 x 4096, M = 1 | 20.0 | 40.0 |" in lines
    assert "* w4a16, fp16: out of resource (1 cell)" in lines
    assert "100 s, commit abc, `variants.py --out v.json`; not complete: interrupted." in lines[-1]
    page = tmp_path / "page.md"
    page.write_text("<!-- tables: variants -->\nold\n<!-- /tables -->\n")
    assert report.main([run_file, "--update", str(page)]) == 0
    assert "old" in page.read_text()
    assert report.main(["--variants", path, "--update", str(page)]) == 0
    assert "w4a16: 8 bits" in page.read_text() and "old" not in page.read_text()
    assert report.main([run_file, "--variants", path]) == 0
    assert "## Variants\n\n| variant |" in capsys.readouterr().out


def test_variants_of_several_files_are_joined(
    report: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The last that has a time, one of each; runs of two machines are not."""
    first = variants_file(tmp_path)
    later = json.loads(Path(first).read_text())
    slow, broken, host = later["cells"][1], later["cells"][2], later["cells"][5]
    slow["value"] = 0.9
    later["cells"] = [slow, broken, host | {"skip": "out of memory", "value": None}]
    again = written(tmp_path / "again.json", later | {"command": "variants.py --again"})
    assert report.main(["--variants", first, again]) == 0
    text = capsys.readouterr().out
    assert text.count("w4a16: 8 bits") == 1 and "| 0.90 |" in text and "| 0.80 |" not in text
    assert "| 1.25 |" in text and "out of resource (1 cell)" in text
    assert "--out v.json" in text and text.rstrip().endswith(
        "`variants.py --again`; not complete: interrupted."
    )
    later["environment"] = {**later["environment"], "gpu": "NVIDIA H20"}
    other = written(tmp_path / "other.json", later)
    assert report.main(["--variants", first, other]) == 2
    assert "NVIDIA H20" in capsys.readouterr().err


def test_without_a_run_there_are_only_variants(
    report: Any, run_file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert report.main([]) == 2
    assert report.main(["--variants", variants_file(tmp_path), "--out", str(tmp_path)]) == 2
    assert capsys.readouterr().err.count("needs a RUN.json") == 2
    assert report.main(["--variants", run_file]) == 2
    assert "pymllm-variants" in capsys.readouterr().err


def test_update_fills_blocks_twice_alike(report: Any, run_file: str, tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("a\n<!-- tables: w4a16 -->\nold\n<!-- /tables -->\nb\n<!-- tables: other -->\nkept\n<!-- /tables -->\n")  # fmt: skip
    assert report.main([run_file, "--update", str(page)]) == 0
    once = page.read_text()
    assert once.startswith("a\n<!-- tables: w4a16 -->\nW4A16, groups of 128")
    assert "**8.0**" in once and "old" not in once and "\nb\n" in once and "kept" in once
    assert report.main([run_file, "--update", str(page)]) == 0
    assert page.read_text() == once


def test_the_page_of_this_repository_can_be_filled(
    report: Any, run_file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "performance.md"
    page.write_text((ROOT / "docs" / "performance.md").read_text())
    beside = ["--check-published", published(tmp_path, humming=8.0)]
    beside += ["--variants", variants_file(tmp_path)]
    assert report.main([run_file, "--update", str(page), *beside]) == 0
    assert "left" not in capsys.readouterr().err


def test_a_block_that_is_not_closed_is_refused(report: Any, run_file: str, tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("<!-- tables: w4a16 -->\nold\n")
    assert report.main([run_file, "--update", str(page)]) == 2
    assert page.read_text() == "<!-- tables: w4a16 -->\nold\n"


def test_plots_are_small_and_show_what_is_there(
    report: Any, run_file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("matplotlib", reason="plots need matplotlib (pip install '.[bench]')")
    import report_plots

    figures = []
    save = report_plots._save
    monkeypatch.setattr(
        report_plots, "_save", lambda figure, path: (figures.append(figure), save(figure, path))
    )
    assert report.main([run_file, "--out", str(tmp_path / "plots")]) == 0
    names = {f"{s}_{p}.png" for s in ("w4a16", "w8a8_int8") for p in ("time", "roof", "speedup", "heatmap")}  # fmt: skip
    found = {path.name: path.stat().st_size for path in (tmp_path / "plots").iterdir()}
    assert found.keys() == names
    assert max(found.values()) <= 150_000
    time, _, speedup, heat = figures[:4]
    lines = {tuple(line.get_xydata()[:, 1]) for line in time.axes[0].lines}
    # ours stops where it has no time: the cell is absent, not zero.
    assert lines == {(8.0, 20.0), (24.0, 16.0, 100.0), (10.0, 25.0, 110.0), (4.0, 8.0, 90.0)}
    assert (3.0, 0.8) in {tuple(line.get_xydata()[:, 1]) for line in speedup.axes[0].lines}
    texts = [text.get_text() for text in heat.axes[0].texts]
    assert texts == ["1.25", "humming", "0.80", "bf16"]
    head = " ".join(text.get_text() for text in heat.texts)
    assert "ours is faster (1 cells)" in head and "ours is slower (1 cells)" in head


def test_equal_ratios_have_equally_strong_colours(report: Any) -> None:
    pytest.importorskip("matplotlib", reason="plots need matplotlib (pip install '.[bench]')")
    import report_plots

    assert len({style for style in report_plots.STYLES.values()}) >= len(report_plots.STYLES) - 2
    lost, even, won = (report_plots.LOST_WON(x) for x in (0.0, 0.5, 1.0))
    assert min(even[:3]) > 0.99
    assert lost[0] > lost[2] and won[2] > won[0]
