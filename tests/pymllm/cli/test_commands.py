"""``demo``, ``run`` and ``explain`` on real checkpoints, and errors of every command."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import pymllm
from pymllm.checkpoint.reader import Checkpoint
from pymllm.cli import main, measure, run

LAYERS = [f"model.layers.{i}.mlp.down_proj" for i in range(3)]
HEADS = ["model.layers.0.q_proj", "model.layers.10.q_proj", "model.layers.2.q_proj"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """bf16: three W4A16 and three W8A8 layers, an embedding and an ignored head."""
    directory = tmp_path_factory.mktemp("cli") / "model"
    generator = torch.Generator().manual_seed(0)
    weights = {name: torch.randn(48, 256, generator=generator) for name in LAYERS}
    weights |= {name: torch.randn(32, 64, generator=generator) for name in HEADS}
    scheme = {**dict.fromkeys(LAYERS, "W4A16"), **dict.fromkeys(HEADS, "W8A8")}
    pymllm.save_linears(weights, directory, scheme=scheme, dtype=torch.bfloat16)
    tensors = load_file(directory / "model.safetensors")
    plain = {"model.embed_tokens.weight": torch.rand(9, 4), "lm_head.weight": torch.rand(9, 4)}
    save_file({**tensors, **plain, "model.layers.0.norm.weight": torch.rand(4)},
              directory / "model.safetensors")  # fmt: skip
    return directory


@pytest.fixture(autouse=True)
def few_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "_CPU_SECONDS", 0.0)


Json = Callable[..., dict[str, Any]]


@pytest.fixture
def document(capsys: pytest.CaptureFixture[str]) -> Json:
    """Runs a command with ``--json``; nothing but the document may come out."""

    def call(*arguments: str, code: int = 0) -> dict[str, Any]:
        assert main.main([*arguments, "--json"]) == code
        captured = capsys.readouterr()
        assert captured.err == "" or code
        answer = json.loads(captured.out, parse_constant=pytest.fail)
        assert isinstance(answer, dict)
        return answer

    return call


def test_demo_runs_every_scheme_and_leaves_nothing(document: Json, tmp_path: Path,
                                                   monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    answer = document("demo", "--device", "cpu", "--tokens", "1,5")
    assert (answer["device"], answer["dtype"]) == ("cpu", "bfloat16")
    schemes = {layer["scheme"]: layer for layer in answer["layers"]}
    assert len(answer["layers"]) == 12
    assert list(schemes) == ["W4A16 g128 sym", "W4A16 g128 asym", "W8A8 channel dynamic"]
    for layer in answer["layers"]:
        assert [result["tokens"] for result in layer["results"]] == [1, 5]
        for result in layer["results"]:
            # bf16 rounding is about 2e-3; int8 activations of normal inputs about 8e-3 on top.
            low, high = (4e-3, 1.5e-2) if "W8A8" in layer["scheme"] else (5e-4, 3e-3)
            assert low < result["relative_error"] < high, layer
            assert result["milliseconds"] > 0
    assert schemes["W8A8 channel dynamic"]["kernel"] == "torch_int_mm"
    assert "torch_w8a8_int8" in {r["kernel"] for r in layer["refusals"]}
    assert any("not a benchmark" in note for note in answer["notes"])
    assert list(tmp_path.iterdir()) == []


def test_demo_keeps_a_checkpoint_that_the_other_commands_read(
    document: Json, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kept = tmp_path / "kept"
    assert main.main(["demo", "--device", "cpu", "--tokens", "1", "--keep", str(kept)]) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"{kept}: 12 layers on cpu (CPU), x in bfloat16\n")
    assert f"pymllm explain {kept}" in out
    files = {"config.json", "model.safetensors.index.json"}
    files |= {f"model-0000{i}-of-00002.safetensors" for i in (1, 2)}
    assert {path.name for path in kept.iterdir()} == files
    planned = document("explain", str(kept), "--capability", "cpu")
    loaded = pymllm.load_linears(kept, device="cpu")
    for layer in planned["layers"]:
        choice = loaded[layer["name"]].kernel_choice
        assert (layer["kernel"], layer["reason"]) == (choice.kernel.name, choice.reason)
    assert "expected a new or an empty folder" in document(
        "demo", "--device", "cpu", "--keep", str(kept), code=2
    )["error"]  # fmt: skip


def test_run_is_exact_where_arithmetic_is_fp32(document: Json, tmp_path: Path) -> None:
    pymllm.save_linears({"a": torch.rand(48, 256) - 0.5, "b": torch.rand(3, 128)}, tmp_path)
    answer = document("run", str(tmp_path), "--device", "cpu", "--kernel", "torch_w4a16",
                      "--layers", "^a$", "--tokens", "3")  # fmt: skip
    assert answer["dtype"] == "float32" and answer["checkpoint"] == str(tmp_path)
    (layer,) = answer["layers"]
    assert (layer["name"], layer["n"], layer["k"]) == ("a", 48, 256)
    assert (layer["kernel"], layer["reason"]) == ("torch_w4a16", "asked for by name")
    # The weight is dequantized to fp32 (2**-24), then summed in it.
    assert layer["results"][0]["relative_error"] < 1e-6


def test_forced_kernel_leaves_other_schemes_alone(document: Json, model: Path) -> None:
    answer = document("run", str(model), "--device", "cpu", "--kernel", "torch_w4a16",
                      "--tokens", "1")  # fmt: skip
    kernels = {(layer["scheme"].split()[0], layer["kernel"]) for layer in answer["layers"]}
    assert kernels == {("W4A16", "torch_w4a16"), ("W8A8", "torch_int_mm")}


def test_run_takes_layers_in_order_of_their_numbers(document: Json, model: Path) -> None:
    answer = document("run", str(model), "--device", "cpu", "--layers", "q_proj$",
                      "--limit", "2", "--dtype", "float16", "--tokens", "2")  # fmt: skip
    assert [layer["name"] for layer in answer["layers"]] == [HEADS[0], HEADS[2]]
    assert answer["dtype"] == "float16"


def test_run_prints_a_table_and_footnotes(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--device", "cpu", "--layers", "layers.0..*down", "--tokens", "1,2"]
    assert main.main(["run", str(model), *options]) == 0
    captured = capsys.readouterr()
    lines = captured.out.splitlines()
    assert lines[0] == f"{model}: 1 layer on cpu (CPU), x in bfloat16"
    assert lines[2].split() == ["layer", "scheme", "N", "x", "K", "kernel", "M", "ms", "error"]
    first = ["model.layers.0.mlp.down_proj", "W4A16", "g128", "sym", "48", "x", "256"]
    first += ["cpu_int4pack", "1"]
    assert lines[4].split()[: len(first)] == first
    assert lines[5].split()[0] == "2" and len(lines[5].split()) == 3
    assert "    not triton_w4a16: needs a GPU, the device is a CPU" in lines
    assert lines[-2].startswith("time: ") and lines[-1].startswith("error: ")
    assert captured.err == ""


def test_explain_groups_layers_and_gives_every_reason(
    model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main.main(["explain", str(model), "--capability", "9.0"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"{model}: 6 quantized linear layers"
    assert lines[1].startswith("planned for a GPU of capability 9.0 (as asked), ")
    cells = [line.split("  ") for line in lines]
    assert ["model.layers.{0..2}.mlp.down_proj x3", "W4A16 g128 sym"] in [c[:2] for c in cells]
    assert any(c[0] == "model.layers.{0,2,10}.q_proj x3" for c in cells)
    reason = "int8 wgmma fed by the copy engine, weights read while few tokens are quantized"
    assert f"  gluon_hopper_w8a8_int8: {reason}" in lines
    assert "    not torch_int_mm: gluon_hopper_w8a8_int8 comes before it" in lines
    assert lines[-1] == "Not quantized, 2 weight matrices: lm_head, model.embed_tokens"


def test_explain_lists_each_layer_on_demand(
    model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main.main(["explain", str(model), "--capability", "cpu", "--all"]) == 0
    names = [line.split()[0] for line in capsys.readouterr().out.splitlines() if "x" in line]
    assert [name for name in names if name in {*LAYERS, *HEADS}] == [
        LAYERS[0], HEADS[0], LAYERS[1], LAYERS[2], HEADS[2], HEADS[1],
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("capability", "w4a16", "w8a8", "note"),
    [
        ("9.0", "gluon_hopper_w4a16", "gluon_hopper_w8a8_int8", None),
        ("8.6", "triton_w4a16", "triton_w8a8_int8", None),
        ("7.5", "torch_w4a16", "torch_int_mm", None),
        ("7.0", "torch_w4a16", "torch_w8a8_int8", None),
        ("13.0", "triton_w4a16", "triton_w8a8_int8", "capability 13.0 is not yet known"),
        ("cpu", "cpu_int4pack", "torch_int_mm", None),
    ],
)
def test_explain_plans_for_devices_that_are_not_here(
    document: Json, model: Path, capability: str, w4a16: str, w8a8: str, note: str | None
) -> None:
    answer = document("explain", str(model), "--capability", capability, "--dtype", "bfloat16")
    expected = None if capability == "cpu" else capability
    assert answer["device"]["capability"] == expected and answer["device"]["chosen"] == "as asked"
    assert {(layer["scheme"].split()[0], layer["kernel"]) for layer in answer["layers"]} == {
        ("W4A16", w4a16), ("W8A8", w8a8),
    }  # fmt: skip
    for layer in answer["layers"]:
        assert len(layer["refusals"]) >= 2 and all(r["reason"] for r in layer["refusals"])
        assert layer["note"] is None if note is None else layer["note"].startswith(note)
    assert answer["unquantized"] == ["lm_head", "model.embed_tokens"]


def test_explain_reads_no_weights(
    document: Json, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = Checkpoint.read

    def only_shapes(self: Checkpoint, name: str) -> torch.Tensor:
        assert name.endswith(".weight_shape"), name
        return read(self, name)

    monkeypatch.setattr(Checkpoint, "read", only_shapes)
    assert len(document("explain", str(model))["layers"]) == 6


def test_explain_says_how_it_chose_the_device(document: Json, model: Path) -> None:
    device = document("explain", str(model))["device"]
    here = torch.cuda.is_available()
    assert device["type"] == ("cuda" if here else "cpu")
    assert ("the GPU here" if here else "no GPU here") in device["chosen"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "MODEL", "--kernel", "foo"], "kernel: found 'foo'"),
        (["run", "MODEL", "--kernel", "triton_w4a16", "--device", "cpu"], "needs a GPU"),
        (
            ["run", "MODEL", "--layers", "zzz"],
            "'zzz' is in none of the names of 6 quantized layers (model.layers",
        ),
        (["run", "MODEL", "--layers", "("], "is not a regular expression"),
        (["run", "MODEL", "--layers", "norm"], "'norm' is in none of the names of 6"),
        (["run", "MODEL", "--device", "tpu"], "device: found 'tpu'"),
        (["run", "MODEL", "--device", "cuda:99"], "device: found 'cuda:99'"),
        (["run", "MODEL", "--tokens", "1,x"], "argument --tokens: found '1,x'"),
        (["run", "MODEL", "--limit", "0"], "argument --limit: found '0'"),
        (["run", "NOWHERE"], "no such directory"),
        (["explain", "MODEL", "--capability", "new"], "capability: found 'new'"),
        (["explain", "EMPTY"], "config.json: found no such file"),
        (["explain"], "required: CHECKPOINT_DIR"),
        (["run", "MODEL", "--dev", "cpu"], "unrecognized arguments: --dev"),
        (["frobnicate"], "invalid choice: 'frobnicate'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input_is_one_line_and_exit_code_2(
    arguments: list[str], message: str, model: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    places = {"MODEL": model, "NOWHERE": tmp_path / "nowhere", "EMPTY": tmp_path}
    arguments = [str(places.get(argument, argument)) for argument in arguments]
    assert main.main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("pymllm: error: ") and captured.err.count("\n") == 1
    assert message in captured.err
    assert main.main([*arguments, "--json"]) == 2
    captured = capsys.readouterr()
    answer = json.loads(captured.out)
    assert list(answer) == ["error"] and f"pymllm: error: {answer['error']}\n" == captured.err


def test_damaged_config_names_the_field(model: Path, tmp_path: Path, document: Json) -> None:
    config = json.loads((model / "config.json").read_text())
    config["quantization_config"]["config_groups"]["group_0"]["weights"]["num_bits"] = 3
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").symlink_to(model / "model.safetensors")
    error = document("explain", str(tmp_path), code=2)["error"]
    assert "group 'group_0': weights.num_bits: found 3" in error


def test_warnings_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pymllm.save_linears({"a": torch.rand(16, 128)}, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    save_file({**tensors, "router.weight": torch.rand(8, 128)}, tmp_path / "model.safetensors")
    assert main.main(["explain", str(tmp_path)]) == 0
    captured = capsys.readouterr()
    assert captured.err.startswith("pymllm: warning: ") and "router" in captured.err
    assert captured.err.count("\n") == 1
    assert captured.out.endswith("Not quantized, 1 weight matrix: router\n")


def test_what_fails_on_this_machine_points_to_the_doctor(
    model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> float:
        raise RuntimeError("Failed to find C compiler.")

    monkeypatch.setattr(measure, "median_milliseconds", fail)
    arguments = ["run", str(model), "--device", "cpu"]
    assert main.main(arguments) == 1
    error = capsys.readouterr().err
    assert error.startswith(
        "pymllm: error: RuntimeError: Failed to find C compiler. (pymllm doctor"
    )
    assert error.count("\n") == 1
    assert main.main([*arguments, "--verbose"]) == 1
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_run_on_a_gpu_takes_it_and_its_kernels(document: Json, model: Path) -> None:
    answer = document("run", str(model), "--tokens", "1,16,300")
    assert answer["device"] == "cuda:0"
    planned = document("explain", str(model))["layers"]
    chosen = {layer["name"]: layer["kernel"] for layer in answer["layers"]}
    assert chosen == {layer["name"]: layer["kernel"] for layer in planned}
    for layer in answer["layers"]:
        for result in layer["results"]:
            limit = 1.5e-2 if "W8A8" in layer["scheme"] else 3e-3
            assert 0 < result["relative_error"] < limit, layer
            assert 0 < result["milliseconds"] < 100, layer


@pytest.mark.parametrize("text", ["1", "1,16,256", " 2 , 3"])
def test_token_counts(text: str) -> None:
    assert run.token_counts(text) == tuple(int(part) for part in text.split(","))


def python(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], cwd=cwd, text=True, capture_output=True,
                          check=False, timeout=60)  # fmt: skip


def test_module_runs_from_any_directory(tmp_path: Path) -> None:
    done = python("-m", "pymllm", "--version", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (0, f"pymllm {pymllm.__version__}\n")
    done = python("-m", "pymllm", cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.startswith("pymllm: error: ")


def test_help_comes_without_torch_and_with_an_example(tmp_path: Path) -> None:
    code = (
        "import sys\n"
        "from pymllm.cli.main import main\n"
        "for command in ([], ['demo'], ['run'], ['explain'], ['doctor']):\n"
        "    try: main([*command, '--help'])\n"
        "    except SystemExit as stop: assert stop.code == 0\n"
        "assert not {'torch', 'triton', 'safetensors'} & set(sys.modules)\n"
    )
    done = python("-c", code, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for command in ("demo", "run ./model", "explain ./model", "doctor"):
        assert f"\n  pymllm {command}" in done.stdout


def test_a_pipe_closed_early_is_no_error(model: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pymllm", "explain", str(model), "--json"]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=tmp_path
    )
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait(60) == 0
    process.stderr.close()
