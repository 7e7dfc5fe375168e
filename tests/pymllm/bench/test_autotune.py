"""The search of peers that use Triton's autotuner: which candidates, compiled where."""

import json
import sys
import types

import pytest
import torch

from pymllm.bench import autotune, precompile
from pymllm.bench.providers.base import Job, Provider


class Config:
    def __init__(self, m=16, n=64, k=64, num_warps=4, stages=3):
        self.kwargs = {
            "BLOCK_SIZE_M": m, "BLOCK_SIZE_N": n, "BLOCK_SIZE_K": k, "NUM_STAGES": stages,
        }  # fmt: skip
        self.num_warps, self.num_stages = num_warps, stages

    def all_kwargs(self):
        return {**self.kwargs, "num_warps": self.num_warps}

    def __str__(self):
        return f"{self.kwargs} {self.num_warps}"


class Kernel:
    __name__ = "kernel"

    def __init__(self):
        self.compiled = []

    def run(self, *args, warmup, **meta):
        assert warmup
        if meta["BLOCK_SIZE_M"] == 32:
            raise RuntimeError("does not compile")
        self.compiled.append(meta["BLOCK_SIZE_N"])


class Autotuner:
    """Triton's, as far as a search touches it: a candidate takes 100 us, less the more N and stages."""

    def __init__(self, configs):
        self.configs, self.fn, self.arg_names, self.ran = configs, Kernel(), ["x"], []
        self.base_fn, self.keys, self.cache, self.nargs = self.fn, ["M", "kind"], {}, {"M": 1}

    def prune_configs(self, kwargs):
        return self.configs

    def _bench(self, *args, config, **meta):
        return (self._do_bench, config)

    def run(self, *args, **kwargs):
        self.ran.append(args)
        if "key" not in self.cache:
            found = {c: [100 - c.kwargs["BLOCK_SIZE_N"] / 8 - c.num_stages] for c in self.prune_configs(kwargs)}  # fmt: skip
            self.configs_timings = found
            self.cache["key"] = self.best_config = min(found, key=found.get)


@pytest.fixture(autouse=True)
def triton(monkeypatch):
    # Nothing of it is run: its autotuner is the one above.
    names = ("triton", "triton.runtime", "triton.runtime.autotuner")
    for name in names:
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setattr(Autotuner, "run", Autotuner.run)
    sys.modules["triton.runtime.autotuner"].Autotuner = Autotuner


def variants(stages=(1, 3, 4)):
    return [
        Config(m, n, k, w, s)
        for m in (16, 64, 256) for n in (64, 256) for k in (32, 128) for w in (4, 8) for s in stages
    ]  # fmt: skip


def test_candidates_are_few_the_same_and_fit():
    configs = variants()
    assert not autotune.fits(Config(256, 256, 32, 4))
    assert autotune.fits(Config(128, 128, 64, 4))
    kept = autotune.thinned(configs, 7)
    assert len(kept) == 7
    assert all(autotune.fits(config) for config in kept)
    again = autotune.thinned(configs[::-1], 7)
    assert [str(c) for c in again] == [str(c) for c in kept]
    assert autotune.thinned(configs[:5], 7) == configs[:5]
    plan = autotune.Plan(7, {str(kept[0])})
    assert plan.candidates(configs, "class") == kept[1:]
    # A search needs one candidate at least.
    failed = autotune.Plan(7, {str(configs[0])})
    assert failed.candidates(configs[:1], "class") == configs[:1]


def test_a_sample_has_every_tile_before_it_has_one_twice():
    configs = variants()
    fitting = {autotune.tile(c) for c in configs if autotune.fits(c)}
    kept = autotune.thinned(configs, len(fitting))
    assert {autotune.tile(c) for c in kept} == fitting
    more = autotune.thinned(configs, len(fitting) + 3)
    assert more[: len(fitting)] == kept
    assert len(set(more)) == len(more)


def test_the_second_round_tries_the_best_tiles_in_all_variants():
    # One candidate a tile in the first round; N decides, then the stages.
    configs = [Config(n=n, stages=s) for n in range(16, 176, 16) for s in (1, 3, 4)]
    tuner, plan = Autotuner(configs), autotune.Plan(10)
    autotune.first_round(plan, lambda: tuner.run("x", kind=3))
    assert list(plan.tiles) == ["kernel [1, 3]"]
    assert tuner.cache == {}
    with autotune.searching(plan) as searched:
        tuner.run("x", kind=3)
    assert searched == {"kernel [1, 3]": tuner}
    assert len(tuner.configs_timings) == 3 * autotune.BEST_TILES
    assert (tuner.best_config.kwargs["BLOCK_SIZE_N"], tuner.best_config.num_stages) == (160, 4)
    # Another class of calls is sampled anew.
    tuner.cache.clear()
    with autotune.searching(plan):
        tuner.run("x", kind=2)
    assert len({autotune.tile(c) for c in tuner.configs_timings}) == 10
    again = autotune.Plan.from_json(json.loads(json.dumps(plan.to_json())))
    assert again == plan


def test_searching_ends_where_the_block_ends():
    tuner = Autotuner([Config(n=n) for n in range(10)])
    with autotune.searching(autotune.Plan(4)):
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
        with autotune.compiling(autotune.Plan(100), index, 3) as wrong:
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
    plan = autotune.Plan(3, {"known"})
    autotune.compile_side_by_side({"provider": "x"}, plan, 30)
    assert plan.failed == {"known", 0, 1}


def test_processes_that_fail_or_hang_are_errors(monkeypatch):
    processes(monkeypatch, "raise SystemExit('no such kernel')")
    with pytest.raises(RuntimeError, match="no such kernel"):
        autotune.compile_side_by_side({}, autotune.Plan(1), 30)
    monkeypatch.undo()
    processes(monkeypatch, "import time; time.sleep(60)")
    with pytest.raises(TimeoutError, match="longer than 0 s"):
        autotune.compile_side_by_side({}, autotune.Plan(1), 0.2)


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
        "provider": "tuned", "options": {"depth": 2}, "jobs": [job.to_json()], "plan": [10, [], {}],
        "index": 1, "count": 2,
    }  # fmt: skip
    monkeypatch.setattr(precompile, "PROVIDERS", (provider,))
    monkeypatch.setattr(sys, "argv", ["precompile", json.dumps(task)])
    precompile.main()
    assert json.loads(capsys.readouterr().out) == []
    assert provider.tuner.fn.compiled == [32, 32]


class Cuda:
    """A GPU on which a call takes 0.01 ms, or as long as is said; the host 0.1 ms."""

    def __init__(self, monkeypatch, call_ms=0.01):
        self.now, self.call_ms, self.busy = 0.0, call_ms, []
        for name in ("synchronize", "_sleep", "Event"):
            monkeypatch.setattr(autotune.torch.cuda, name, getattr(self, name), raising=False)
        monkeypatch.setattr(torch, "empty", lambda *a, **k: torch.zeros(8))

    def synchronize(self):
        pass

    def _sleep(self, cycles):
        self.busy.append(cycles)

    def call(self):
        autotune.time.sleep(1e-4)
        self.now += self.call_ms

    def Event(self, enable_timing):
        cuda = self

        class Event:
            def record(self):
                self.at = cuda.now

            def synchronize(self):
                pass

            def elapsed_time(self, end):
                return end.at - self.at

        return Event()


def test_a_candidate_is_timed_behind_work_that_hides_the_host(monkeypatch):
    cuda = Cuda(monkeypatch)
    times = autotune.cold_ms(cuda.call)
    assert times == pytest.approx([0.01] * autotune.SAMPLES)
    assert len(cuda.busy) == autotune.SAMPLES
    # 0.1 ms of the host are at least 0.2 million cycles.
    assert min(cuda.busy) > 2e5


def test_a_slow_candidate_is_timed_seldom(monkeypatch):
    cuda = Cuda(monkeypatch, 4.0)
    assert len(autotune.cold_ms(cuda.call)) == 7
    cuda.call_ms = 400.0
    assert len(autotune.cold_ms(cuda.call)) == autotune.LEAST_SAMPLES
