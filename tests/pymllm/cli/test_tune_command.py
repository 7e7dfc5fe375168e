"""``pymllm tune``: tunes, shows, exports and imports, on a GPU that is not there."""

from __future__ import annotations

import functools
import importlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import pymllm
import pymllm.tuning
from pymllm.cli.main import main
from pymllm.cli.report import Progress
from pymllm.tuning import shape_problems
from pymllm_kernels import DeviceFacts, select_kernel, tuning
from pymllm_kernels.tuning import store as store_module

BOARD = DeviceFacts("cuda", "Board of the tests", (9, 0), 227 * 1024, 132)


@pytest.fixture(autouse=True)
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty tuning directory, in use."""
    found = tmp_path / "tuning"
    monkeypatch.setattr(store_module, "_told", set())
    tuning.use_directory(found)
    yield found
    tuning.use_directory(None)


class Timed:
    """Runs each configuration in a time of its own."""

    interrupt_after: int | None = None

    def __init__(self, kernel: Any, problem: Any, *, device: Any, most_tokens: int) -> None:
        self.problem = problem

    def prepare(self, config: Any, m: int) -> Any:
        if Timed.interrupt_after is not None:
            Timed.interrupt_after -= 1
            if Timed.interrupt_after < 0:
                raise KeyboardInterrupt
        return lambda: 10.0 + hash((self.problem.n, m, config)) % 1000 / 100


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A made-up Hopper GPU."""
    fake = functools.partial(
        importlib.import_module("pymllm.tuning.tune").tune,
        make_case=Timed, compile_all=lambda forms, facts, progress, failed: None,
    )  # fmt: skip
    monkeypatch.setattr(pymllm.tuning, "tune", fake)
    monkeypatch.setattr("pymllm.cli.devices.best_device", lambda name: torch.device("cuda"))
    monkeypatch.setattr("pymllm.cli.devices.target_device", lambda name: (BOARD, "made up"))
    monkeypatch.setattr("pymllm_kernels.device_facts", lambda device: BOARD)
    monkeypatch.setattr(Timed, "interrupt_after", None)


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, Any, str]:
    """Exit code, the document printed, and what is on stderr."""
    code = main(["tune", *arguments, "--json"])
    found = capsys.readouterr()
    return code, json.loads(found.out), found.err


def configs() -> list[Any]:
    """What a layer runs, with the origin."""
    (problem,) = shape_problems([(4096, 4096)], BOARD, schemes=["w4a16"])
    kernel = select_kernel(problem).kernel
    return [kernel.resolved(problem, m) for m in (1, 16)]


TUNE = ("--shapes", "4096x4096", "--tokens", "1,16")


@pytest.mark.usefixtures("gpu")
def test_tuning_once_is_enough(capsys: pytest.CaptureFixture[str], directory: Path) -> None:
    code, document, _ = run(capsys, *TUNE)
    assert code == 0
    assert document["device"] == BOARD.name
    assert document["store"] == str(directory / "store.json")
    assert document["complete"]
    assert [(t["operation"], t["m"]) for t in document["tuned"]] == [
        ("gluon_hopper_w4a16", 1), ("gluon_hopper_w4a16", 16),
        ("gluon_hopper_w8a8_int8", 1), ("gluon_hopper_w8a8_int8", 16),
    ]  # fmt: skip
    assert {t["config"]["kernel"] for t in document["tuned"]} <= {"tiles", "decode", "fused"}
    assert [r.origin for r in configs()] == ["store", "store"]
    _, document, _ = run(capsys, *TUNE)
    assert (document["tuned"], document["present"]) == ([], 4)
    _, document, _ = run(capsys, *TUNE, "--all", "--scheme", "w8a8")
    assert len(document["tuned"]) == 2
    assert main(["tune", *TUNE, "--all"]) == 0
    text = capsys.readouterr().out
    assert "4096 x 4096" in text
    assert f"4 configurations found for {BOARD.name}" in text


@pytest.mark.usefixtures("gpu")
def test_show(capsys: pytest.CaptureFixture[str], directory: Path) -> None:
    assert run(capsys, "show")[1]["entries"] == []
    run(capsys, *TUNE)
    _, document, _ = run(capsys, "show")
    assert len(document["entries"]) == 4
    assert {entry["from"] for entry in document["entries"]} == {"store"}
    assert {entry["board"] for entry in document["entries"]} == {BOARD.name}
    assert main(["tune", "show"]) == 0
    text = capsys.readouterr().out
    assert str(directory / "store.json") in text
    assert BOARD.name in text


@pytest.mark.usefixtures("gpu")
def test_what_is_exported_and_imported_is_what_runs(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, directory: Path
) -> None:
    run(capsys, *TUNE)
    tuned = configs()
    file, again = tmp_path / "file", tmp_path / "again"
    assert run(capsys, "export", str(file))[1]["entries"] == 4
    # Elsewhere, where nothing is tuned:
    tuning.use_directory(tmp_path / "elsewhere")
    code, document, _ = run(capsys, "import", str(file), "--strict")
    place = tmp_path / "elsewhere" / "lock.json"
    assert (code, document) == (0, {"lock": str(place), "entries": 4, "strict": True})
    for _ in range(2):
        assert [r.config for r in configs()] == [r.config for r in tuned]
        assert [r.origin for r in configs()] == ["pinned", "pinned"]
        (problem,) = shape_problems([(4096, 4096)], BOARD, schemes=["w4a16"])
        with pytest.raises(ValueError, match=r"gluon_hopper_w4a16 4096x4096 .*M<=2: not in the lo"):
            select_kernel(problem).kernel.resolved(problem, 2)
        # As a new process finds it:
        tuning.use_directory(tmp_path / "elsewhere")
    run(capsys, "export", str(again))
    assert again.read_text().replace('"strict": true', '"strict": false') == file.read_text()
    assert main(["tune", *TUNE, "--all"]) == 0
    assert "lock file comes before these results" in capsys.readouterr().err
    assert [r.origin for r in configs()] == ["pinned", "pinned"]
    assert run(capsys, "import", "--remove")[1] == {"removed": str(place)}
    assert [r.origin for r in configs()] == ["store", "store"]


@pytest.mark.usefixtures("gpu")
def test_a_lock_file_that_is_not_strict(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    run(capsys, *TUNE)
    run(capsys, "export", str(tmp_path / "file"))
    run(capsys, "import", str(tmp_path / "file"))
    (problem,) = shape_problems([(4096, 4096)], BOARD, schemes=["w4a16"])
    assert select_kernel(problem).kernel.resolved(problem, 2).origin == "rule"
    assert [r.origin for r in configs()] == ["pinned", "pinned"]


@pytest.mark.usefixtures("gpu")
def test_interrupted(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Timed, "interrupt_after", 20)
    assert main(["tune", *TUNE]) == 130
    capsys.readouterr()
    monkeypatch.setattr(Timed, "interrupt_after", None)
    _, document, _ = run(capsys, *TUNE)
    assert document["present"] > 0
    assert document["present"] + len(document["tuned"]) == 4


@pytest.mark.usefixtures("gpu")
def test_explain_says_where_configurations_come_from(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    layers = {"model.layers.0.q_proj": (torch.randn(512, 256).to(torch.bfloat16), None)}
    pymllm.save_linears(layers, tmp_path / "model", scheme="W4A16")
    assert main(["explain", str(tmp_path / "model")]) == 0
    text = capsys.readouterr().out
    assert f"store: not tuned; no table is shipped for {BOARD.name}" in text
    assert main(["tune", str(tmp_path / "model"), "--tokens", "1,2,4,64"]) == 0
    capsys.readouterr()
    assert main(["explain", str(tmp_path / "model")]) == 0
    assert "store M 1-4 64, rule M 8-32 128-8192" in capsys.readouterr().out
    assert main(["explain", str(tmp_path / "model"), "--json"]) == 0
    (layer,) = json.loads(capsys.readouterr().out)["layers"]
    found = {c["origin"]: c["m"] for c in layer["configurations"]}
    assert found["store"] == [1, 2, 4, 64]
    assert main(["tune", str(tmp_path / "model"), "--all", "--shapes", "1x1"]) == 2


@pytest.mark.usefixtures("gpu")
def test_a_table_as_it_is_shipped(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, directory: Path
) -> None:
    file = tmp_path / "table.json"
    arguments = (*TUNE, "--shipped-table", str(file))
    assert len(run(capsys, *arguments)[1]["tuned"]) == 4
    assert run(capsys, *arguments)[1]["present"] == 4
    assert '"timings"' not in file.read_text()
    assert not directory.exists()


@pytest.mark.usefixtures("gpu")
def test_shapes_of_models(capsys: pytest.CaptureFixture[str]) -> None:
    code, document, _ = run(
        capsys, "--model", "qwen3-0.6b,llama-3-8b", "--tp", "1,8", "--tokens", "1",
        "--scheme", "w4a16", "--time-limit", "600",
    )  # fmt: skip
    assert code == 0
    shapes = {(tuned["n"], tuned["k"]) for tuned in document["tuned"]}
    # Whole and cut, fused and alone.
    assert {(6144, 4096), (768, 4096), (4096, 1792), (128, 1024), (4096, 1024)} <= shapes


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ((), "0 of CHECKPOINT_DIR, --shapes and --model"),
        (("model", "--shapes", "1x1"), "2 of CHECKPOINT_DIR, --shapes and --model"),
        (("--model", "gpt-9"), "gpt-9"),
        (("--shapes", "4096"), "NxK"),
        (("export",), "FILE: found none"),
        (("import",), "FILE: found none"),
        (("import", "nowhere.json"), "lock file nowhere.json: No such file"),
        (("import", "--remove"), "there is no lock file"),
        (("export", "file"), "nothing is tuned"),
        (("show", "file"), "FILE: not accepted"),
        (("model", "--strict"), "--strict: not accepted"),
        (("model", "--group-size", "64"), "--group-size: not accepted"),
        (("--shapes", "64x64", "--tokens", "0"), "positive integers"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
@pytest.mark.usefixtures("gpu")
def test_bad_input_is_one_line(
    capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], told: str
) -> None:
    code, document, errors = run(capsys, *arguments)
    assert code == 2
    assert told in document["error"]
    assert errors.startswith("pymllm: error: ")


def test_a_cpu_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    code, document, _ = run(capsys, *TUNE, "--device", "cpu")
    assert code == 2
    assert "accepted a GPU" in document["error"]


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(["tune", "--help"])
    assert exit_.value.code == 0
    text = capsys.readouterr().out
    for word in ("export", "import", "show", "--strict", "--tp", "PYMLLM_TUNING_DIR"):
        assert word in text


def test_long_work_is_never_silent(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a terminal a line every five seconds or more, and nothing for short work."""
    monkeypatch.setattr("pymllm.cli.report._SILENCE_S", 5.0)
    now = 0.0
    with Progress(clock=lambda: now) as progress:
        for second in range(31):
            now = float(second)
            progress.step(f"step {second}")
    assert capsys.readouterr().err.split("\n")[:-1] == [f"step {s}" for s in range(5, 31, 5)]
