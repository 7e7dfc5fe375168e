"""Tuning of layers with a timer that is not a GPU."""

from __future__ import annotations

import collections
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import pymllm
from pymllm.tuning import checkpoint_problems, shape_problems, tune
from pymllm.tuning.locking import export_lock
from pymllm.tuning.search import TIE_BAND
from pymllm_kernels import DeviceFacts, LinearProblem, select_kernel, tuning
from pymllm_kernels.tuning import resolve, state
from pymllm_kernels.tuning.store import Store
from pymllm_kernels.w4a16.hopper_tuning import HopperConfig
from pymllm_kernels.w4a16.tunable import HOPPER, HopperTunable

from .conftest import BOARD, FakeGpu

SHAPES = [(4096, 4096), (6144, 4096)]
TOKENS = (1, 16, 100)


def run(problems: list[LinearProblem], gpu: FakeGpu, tokens: Any = TOKENS, **more: Any) -> Any:
    return tune(problems, tokens, make_case=gpu.make_case, compile_all=gpu.compile_all, **more)


def resolved(problem: LinearProblem, m: int) -> Any:
    return select_kernel(problem).kernel.resolved(problem, m)


def test_every_layer_and_bucket_is_tuned_and_used(gpu: FakeGpu, facts: DeviceFacts) -> None:
    problems = shape_problems(SHAPES, facts)
    before = tuning.generation()
    report = run(problems, gpu)
    assert (len(report.results), report.present, report.left) == (12, 0, 0)
    assert not report.failures
    assert {result.m for result in report.results} == {1, 16, 128}
    assert tuning.generation() > before
    for problem in problems:
        for m in (1, 9, 16, 65, 128):
            assert resolved(problem, m).origin == "store"
        assert resolved(problem, 17).origin == "rule"
    # One case a layer: its weights are made once.
    assert gpu.cases == problems
    assert gpu.compiled


def test_the_fastest_wins_unless_the_rule_ties(gpu: FakeGpu, facts: DeviceFacts) -> None:
    (problem,) = shape_problems(SHAPES[:1], facts, schemes=["w4a16"])
    key = HOPPER.key_of(problem)
    first, second, third, *_ = HOPPER.candidates(key, 1, facts)
    gpu.times = {first: 5.0, second: 4.0, third: 4.9}
    (result,) = run([problem], gpu, [1]).results
    assert resolved(problem, 1)[:2] == (second, "store")
    assert result.entry.median_us == 4.0
    assert result.rule_us == 5.0
    assert result.entry.runner_up == HOPPER.to_json(third)
    gpu.times[second] = 5.0 / (1 + TIE_BAND / 2)
    run([problem], gpu, [1], mode="all")
    assert resolved(problem, 1)[:2] == (first, "store")


def test_a_second_run_times_nothing(gpu: FakeGpu, facts: DeviceFacts) -> None:
    problems = shape_problems(SHAPES, facts)
    run(problems, gpu)
    again = FakeGpu()
    report = run(problems, again)
    assert (report.results, report.present, again.prepared, again.compiled) == ([], 12, [], [])
    report = run(problems, again, (1, 16, 100, 101, 5000))
    assert {result.m for result in report.results} == {8192}
    everything = FakeGpu()
    assert len(run(problems, everything, mode="all").results) == 12


def test_an_interrupted_run_keeps_what_it_has(
    gpu: FakeGpu, facts: DeviceFacts, directory: Path
) -> None:
    problems = shape_problems(SHAPES, facts)

    def interrupt(text: str) -> None:
        if text.startswith("[6/"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(problems, gpu, progress=interrupt)
    assert len(Store(directory).table) == 5
    report = run(problems, FakeGpu())
    assert (len(report.results), report.present) == (7, 5)


def test_the_time_limit_leaves_the_rest_for_later(gpu: FakeGpu, facts: DeviceFacts) -> None:
    clock = iter(range(10_000))
    report = run(shape_problems(SHAPES, facts), gpu, time_limit_s=8, clock=lambda: next(clock))
    assert report.left > 0
    assert report.results
    assert report.left + len(report.results) == 12


def test_one_candidate_more_is_timed_alone(
    gpu: FakeGpu, facts: DeviceFacts, monkeypatch: pytest.MonkeyPatch
) -> None:
    problems = shape_problems(SHAPES, facts, schemes=["w4a16"])
    run(problems, gpu)
    kept = {p: resolved(p, 1).config for p in problems}
    real = HopperTunable.candidates
    found = HOPPER.candidates(HOPPER.key_of(problems[0]), 1, facts)
    tiles = next(config for config in found if isinstance(config, HopperConfig))
    added = replace(tiles, slots=2, share=1)
    monkeypatch.setattr(
        HopperTunable, "candidates",
        lambda self, key, m, device: [added, *real(self, key, m, device)],
    )  # fmt: skip
    more = FakeGpu()
    more.times[added] = 1000.0
    report = run(problems, more, best=13)
    assert {config for _, _, config in more.prepared} == {added}
    assert len(more.prepared) == len(report.results) == 6
    assert {p: resolved(p, 1).config for p in problems} == kept
    assert run(problems, FakeGpu(), best=13).results == []
    more.times[added] = 0.1
    run(problems, more, best=13, mode="all")
    assert {resolved(p, 1).config for p in problems} == {added}


def test_what_is_measured_under_other_conditions_is_measured_again(
    gpu: FakeGpu, facts: DeviceFacts
) -> None:
    run(shape_problems(SHAPES, facts), gpu)
    for other in (
        replace(facts, name="Another board"),
        replace(facts, multiprocessors=78),
        replace(facts, shared_memory=facts.shared_memory),
    ):
        again = FakeGpu()
        report = run(shape_problems(SHAPES, other), again)
        assert len(report.results) == (0 if other == facts else 12)
    report = run(shape_problems(SHAPES, facts, dtype=torch.float16), FakeGpu())
    assert len(report.results) == 12


def test_wrong_and_failing_candidates_are_told_and_not_used(
    gpu: FakeGpu, facts: DeviceFacts
) -> None:
    (problem,) = shape_problems(SHAPES[:1], facts, schemes=["w4a16"])
    candidates = HOPPER.candidates(HOPPER.key_of(problem), 1, facts)[:12]
    gpu.times = {candidates[0]: 0.1}
    gpu.unfit = {candidates[0]}
    (result,) = run([problem], gpu, [1]).results
    assert resolved(problem, 1).config != candidates[0]
    assert [text.partition(": ")[2] for text in result.unfit] == ["wrong result"]
    gpu.unfit = set(candidates)
    report = run([problem], gpu, [1], mode="all")
    assert list(report.failures.values()) == [
        "no candidate compiles, runs and gives a right result"
    ]


def test_twenty_fresh_tunings_give_the_same_configuration(
    facts: DeviceFacts, tmp_path: Path
) -> None:
    problems = shape_problems(SHAPES, facts)
    chosen: dict[Any, list[str]] = collections.defaultdict(list)
    for seed in range(20):
        store = Store(tmp_path / str(seed))
        report = run(problems, FakeGpu(noise=0.01, seed=seed), store=store)
        for result in report.results:
            chosen[result.key, result.m].append(json.dumps(result.entry.config))
    assert len(chosen) == 12
    counts = [collections.Counter(configs).most_common(1)[0][1] for configs in chosen.values()]
    assert min(counts) >= 19, counts


PROCESS = """
import sys
sys.path.insert(0, sys.argv[1])
from conftest import BOARD, FakeGpu
from pymllm.tuning import shape_problems, tune
from pymllm_kernels import select_kernel
problems = shape_problems([(4096, 4096), (6144, 4096)], BOARD)
gpu = FakeGpu(noise=0.05, seed=int(sys.argv[2]))
print("ready", flush=True)
sys.stdin.readline()
tune(problems, (1, 16), make_case=gpu.make_case, compile_all=gpu.compile_all)
for problem in problems:
    print([select_kernel(problem).kernel.resolved(problem, m)[:2] for m in (1, 16)])
"""


def test_eight_processes_that_tune_at_once_run_the_same(directory: Path) -> None:
    """Noise gives them different winners; the first to store one decides for all."""
    environment = {**os.environ, "PYMLLM_TUNING_DIR": str(directory)}
    here = str(Path(__file__).parent)
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", PROCESS, here, str(seed)], env=environment, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )
        for seed in range(8)
    ]  # fmt: skip
    for worker in workers:
        assert worker.stdout is not None
        assert worker.stdout.readline() == "ready\n"
    for worker in workers:
        assert worker.stdin is not None
        worker.stdin.write("go\n")
        worker.stdin.flush()
    found = [worker.communicate(timeout=300) for worker in workers]
    assert [worker.returncode for worker in workers] == [0] * 8, found
    assert {error for _, error in found} == {""}
    assert len({output for output, _ in found}) == 1
    assert found[0][0].count("'store'") == 8
    assert len(Store(directory).table) == 8


def test_a_lock_file_gives_every_process_the_same(
    gpu: FakeGpu, facts: DeviceFacts, tmp_path: Path
) -> None:
    problems = shape_problems(SHAPES, facts)
    run(problems, gpu)
    chosen = [resolved(p, m).config for p in problems for m in TOKENS]
    assert export_lock(tmp_path / "lock.json", facts) == 12
    run(problems, FakeGpu(noise=0.3, seed=5), mode="all")
    tuning.load_lock(tmp_path / "lock.json", strict=True)
    locked = [resolved(p, m) for p in problems for m in TOKENS]
    assert [r.config for r in locked] == chosen
    assert {r.origin for r in locked} == {"pinned"}
    with pytest.raises(ValueError, match=r"gluon_hopper_w4a16 4096x4096 group 128 bfloat16 M<=2"):
        resolved(problems[0], 2)


def test_the_shipped_table_counts_as_there(
    gpu: FakeGpu, facts: DeviceFacts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Written as the package ships it, without the times of all candidates; resumed, it does the rest."""
    problems = shape_problems(SHAPES, facts)
    monkeypatch.setattr(state, "TABLES", tmp_path)
    path = state.table_path(facts.name)
    store = Store(path.parent, name=path.name)
    run(problems[:2], gpu, store=store, keep_timings=False)
    report = run(problems, gpu, store=store, keep_timings=False)
    assert (len(report.results), report.present) == (6, 6)
    assert '"timings"' not in path.read_text()
    state.shipped.cache_clear()
    try:
        assert resolved(problems[0], 1).origin == "shipped"
        again = FakeGpu()
        assert (run(problems, again).present, again.prepared) == (12, [])
        assert len(run(problems, again, mode="all").results) == 12
        assert resolved(problems[0], 1).origin == "store"
    finally:
        state.shipped.cache_clear()


def test_layers_without_a_choice_are_named(gpu: FakeGpu) -> None:
    cpu = DeviceFacts("cpu", "CPU", None, 0, 0)
    report = run(shape_problems([(64, 100), (64, 128)], cpu, schemes=["w8a8_int8"]), gpu)
    assert report.untunable == {
        "w8a8_int8 64x100": "torch_int_mm",
        "w8a8_int8 64x128": "torch_int_mm",
    }


@pytest.mark.parametrize("bad", [{"mode": "some"}, {"best": 0}, {"tokens": [0]}])
def test_bad_arguments(gpu: FakeGpu, bad: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="accepted"):
        run([], gpu, **bad)


def test_progress_tells_how_much_is_left(gpu: FakeGpu, facts: DeviceFacts) -> None:
    told: list[str] = []
    run(shape_problems(SHAPES, facts), gpu, progress=told.append)
    assert told[0] == "12 entries to tune, 0 are there"
    assert told[1].startswith("compiled ")
    assert told[2].startswith("[1/12] gluon_hopper_w4a16 4096x4096 group 128 bfloat16 M<=1")
    assert all("left" in text for text in told[3:])


def test_nothing_is_measured_by_a_call(gpu: FakeGpu, facts: DeviceFacts, directory: Path) -> None:
    (problem,) = shape_problems(SHAPES[:1], facts, schemes=["w4a16"])
    for m in range(1, 200):
        resolve(HOPPER, HOPPER.key_of(problem), m, facts)
    assert not directory.exists()
    assert gpu.prepared == []


def test_shapes_of_a_checkpoint(tmp_path: Path) -> None:
    """Two blocks of equal shapes, grouped-query attention, hidden size 512, intermediate size 1024."""
    sizes = {
        "self_attn.q_proj": (512, 512), "self_attn.k_proj": (128, 512),
        "self_attn.v_proj": (128, 512), "self_attn.o_proj": (512, 512),
        "mlp.gate_proj": (1024, 512), "mlp.up_proj": (1024, 512), "mlp.down_proj": (512, 1024),
    }  # fmt: skip
    layers = {
        f"model.layers.{i}.{name}": (torch.randn(*size).to(torch.bfloat16), None)
        for i in range(2)
        for name, size in sizes.items()
    }
    pymllm.save_linears(layers, tmp_path / "model", scheme="W4A16")
    whole = {(512, 512), (128, 512), (1024, 512), (512, 1024), (768, 512), (2048, 512)}
    halves = {(256, 512), (64, 512), (512, 256), (512, 512), (384, 512), (1024, 512)}
    for parallel, expected in (((1,), whole), ((2,), halves), ((1, 2), whole | halves)):
        found = checkpoint_problems(tmp_path / "model", BOARD, parallel=parallel)
        assert len(found) == len(expected)
        assert {(p.n, p.k) for p in found} == expected
        assert {(p.scheme, p.group_size, p.act_dtype) for p in found} == {
            ("w4a16", 128, torch.bfloat16)
        }


def test_schemes_and_groups() -> None:
    with pytest.raises(ValueError, match="w2a2"):
        shape_problems(SHAPES, BOARD, schemes=["w2a2"])
    found = shape_problems([(4096, 4160)], BOARD)
    assert [problem.scheme for problem in found] == ["w8a8_int8"]
    found = shape_problems([(4096, 4160)], BOARD, group_size=-1)
    assert [problem.group_size for problem in found] == [-1, -1]
