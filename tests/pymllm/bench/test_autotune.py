"""The search of peers that use Triton's autotuner: which candidates, compiled where."""

import json
import sys
import types

import pytest
import torch

from pymllm.bench import autotune, nvml, precompile
from pymllm.bench.providers.base import Job, Provider


class Config:
    def __init__(self, m=16, n=64, k=64, num_warps=4, stages=3):
        self.kwargs = {"BLOCK_SIZE_M": m, "BLOCK_SIZE_N": n, "BLOCK_SIZE_K": k}
        self.num_warps, self.stages = num_warps, stages

    def all_kwargs(self):
        return {**self.kwargs, "num_warps": self.num_warps}

    def __str__(self):
        return f"{self.kwargs} {self.num_warps} {self.stages}"


class Kernel:
    def __init__(self):
        self.compiled = []

    def run(self, *args, warmup, **meta):
        assert warmup
        if meta["BLOCK_SIZE_M"] == 32:
            raise RuntimeError("does not compile")
        self.compiled.append(meta["BLOCK_SIZE_N"])


class Autotuner:
    def __init__(self, configs):
        self.configs, self.fn, self.arg_names, self.ran = configs, Kernel(), ["x"], []

    def prune_configs(self, kwargs):
        return self.configs

    def _bench(self, *args, config, **meta):
        return (self._do_bench, config)

    def run(self, *args, **kwargs):
        self.ran.append(args)


@pytest.fixture(autouse=True)
def triton(monkeypatch):
    # Nothing of it is run: its autotuner is the one above.
    names = ("triton", "triton.testing", "triton.runtime", "triton.runtime.autotuner")
    for name in names:
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    sys.modules["triton"].testing = sys.modules["triton.testing"]
    monkeypatch.setattr(Autotuner, "run", Autotuner.run)
    sys.modules["triton.runtime.autotuner"].Autotuner = Autotuner


def test_candidates_are_few_the_same_and_fit():
    configs = [Config(m, n, k, w) for m in (16, 64, 256) for n in (64, 256) for k in (32, 128) for w in (4, 8)]  # fmt: skip
    assert not autotune.fits(Config(256, 256, 32, 4))
    assert autotune.fits(Config(128, 128, 64, 4))
    kept = autotune.thinned(configs, 7)
    assert len(kept) == 7
    assert all(autotune.fits(config) for config in kept)
    again = autotune.thinned(configs[::-1], 7)
    assert [str(c) for c in again] == [str(c) for c in kept]
    assert autotune.thinned(configs[:5], 7) == configs[:5]
    failed = {str(kept[0])}
    assert autotune.thinned(configs, 7, failed) == kept[1:]
    # A search needs one candidate at least.
    assert autotune.thinned(configs[:1], 7, {str(configs[0])}) == configs[:1]


def test_searching_ends_where_the_block_ends():
    tuner = Autotuner([Config(n=n) for n in range(10)])
    with autotune.searching(4):
        assert len(tuner.prune_configs({})) == 4
        bench, _ = tuner._bench(config=tuner.configs[0])
        assert callable(bench)
    assert len(tuner.prune_configs({})) == 10
    assert "searching" not in Autotuner._bench.__qualname__


def test_shares_together_compile_every_candidate():
    configs = [Config(m, n) for m in (16, 32) for n in (16, 32, 64, 128)]
    done, failed = [], []
    for index in range(3):
        tuner = Autotuner(configs)
        with autotune.compiling(100, index, 3) as wrong:
            tuner.run("x", grid=(1,), warmup=False)
        assert tuner.ran == []
        done += tuner.fn.compiled
        failed += wrong
    assert sorted(done) == [16, 32, 64, 128]
    assert sorted(failed) == sorted(str(c) for c in configs if c.kwargs["BLOCK_SIZE_M"] == 32)
    tuner.run("y")
    assert tuner.ran == [("y",)]


def processes(monkeypatch, code):
    popen = autotune.subprocess.Popen
    monkeypatch.setattr(autotune.os, "sched_getaffinity", lambda _: {0, 1}, raising=False)
    monkeypatch.setattr(
        autotune.subprocess, "Popen",
        lambda command, **options: popen([sys.executable, "-c", code, command[-1]], **options),
    )  # fmt: skip


def test_processes_report_what_does_not_compile(monkeypatch):
    processes(monkeypatch, "import sys; print('noise'); print('[' + repr(sys.argv[1])[1:-1].split('index')[1][3] + ']')")  # fmt: skip
    assert autotune.compile_side_by_side({"provider": "x"}, 30) == {0, 1}


def test_processes_that_fail_or_hang_are_errors(monkeypatch):
    processes(monkeypatch, "raise SystemExit('no such kernel')")
    with pytest.raises(RuntimeError, match="no such kernel"):
        autotune.compile_side_by_side({}, 30)
    monkeypatch.undo()
    processes(monkeypatch, "import time; time.sleep(60)")
    with pytest.raises(TimeoutError, match="longer than 0 s"):
        autotune.compile_side_by_side({}, 0.2)


def test_a_share_is_compiled_by_the_provider(monkeypatch, capsys):
    class Tuned(Provider):
        name = "tuned"

        def build(self, work, copies):
            self.tuner = Autotuner([Config(n=n) for n in (16, 32, 64)])
            return [lambda x: self.tuner.run(x, grid=(1,), warmup=False)]

        def configure(self, **options):
            assert options == {"depth": 2}

    provider = Tuned()
    job = Job("w4a16", 64, 256, 128, torch.bfloat16, torch.device("cpu"), (1, 4))
    task = {
        "provider": "tuned", "options": {"depth": 2}, "jobs": [job.to_json()], "limit": 10,
        "index": 1, "count": 2,
    }  # fmt: skip
    monkeypatch.setattr(precompile, "PROVIDERS", (provider,))
    monkeypatch.setattr(sys, "argv", ["precompile", json.dumps(task)])
    precompile.main()
    assert json.loads(capsys.readouterr().out) == []
    assert provider.tuner.fn.compiled == [32, 32]


def test_what_holds_a_clock_down():
    assert nvml.throttling(0x1) == ""
    assert nvml.throttling(0x4 | 0x20) == "power cap, thermal"
