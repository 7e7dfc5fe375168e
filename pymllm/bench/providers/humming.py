"""Humming: CUDA compiled at run time by NVRTC, with the heuristics it ships."""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import glob
import importlib
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent import futures
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch

from pymllm.bench.providers.base import Description, Job, Linear, Provider, missing
from pymllm.bench.roof import W4A16
from pymllm.bench.workload import CHANNEL, Workload

PACKAGE = "humming-kernels"
_TENSORS = ("weight", "weight_scale", "zero_point", "bias", "weight_scale_2")
_METHOD = {"quant_method": "compressed-tensors", "type": "int", "symmetric": True}


class _Tuned:
    """A layer's configuration, and the one of its kernel for each M."""

    def __init__(self, config: Any) -> None:
        self.config = config
        self._of: dict[int, str] = {}

    def of(self, m: int) -> str:
        """Its configuration for exactly ``m`` tokens, as JSON."""
        if m not in self._of:
            tune: Any = importlib.import_module("humming.tune")
            config = tune.get_heuristics_config(self.config, shape_m=m)
            self._of[m] = json.dumps(config, default=_plain)
        return self._of[m]


class Humming(Provider):
    """One configuration compiled for each M that is timed, not the dozen for all M."""

    name = "humming"
    about = "Humming (CUDA through NVRTC), configuration by its own heuristics"
    limit_s = 120.0

    def __init__(self) -> None:
        self._tuned = _Tuned(None)

    def why_absent(self) -> str | None:
        if reason := missing("humming", PACKAGE):
            return reason
        if "humming" not in sys.modules:
            _find_nvrtc()
        try:
            importlib.import_module("humming.layer")
        except Exception as error:  # noqa: BLE001  whatever stops its import is the reason
            return f"import fails: {type(error).__name__}: {error}"
        return None

    def warm(self, jobs: Sequence[Job], limit_s: float) -> None:
        # Its compiler is a process a kernel: threads that wait for them are enough.
        deadline = time.monotonic() + limit_s
        pool = ThreadPoolExecutor(os.cpu_count())
        try:
            waiting = []
            for job in jobs:
                (call,) = self.build(job.workload(), 1)
                waiting += [pool.submit(_compile, call, job, m) for m in job.tokens]
            # What fails here fails again in its own cell, and is recorded there.
            if futures.wait(waiting, max(0.1, deadline - time.monotonic())).not_done:
                raise TimeoutError(f"compiling took longer than {limit_s:.0f} s")
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

    def build(self, work: Workload, copies: int) -> list[Linear]:
        layer = _layer(work)
        tuned = self._tuned = _Tuned(layer.humming_config)
        found = {name: getattr(layer, name, None) for name in _TENSORS}
        tensors = {name: t.detach() for name, t in found.items() if t is not None}
        return [
            partial(
                _forward,
                tuned=tuned,
                tensors=tensors if i == 0 else {name: t.clone() for name, t in tensors.items()},
                locks=torch.zeros_like(layer.locks),
            )
            for i in range(copies)
        ]

    def describe(self, work: Workload, m: int) -> Description:
        config = json.loads(self._tuned.of(m))
        told = {
            key: config[key]
            for key in ("block_shape", "warp_shape", "num_stages", "use_stream_k", "num_sms")
            if key in config
        }
        text = ", ".join(f"{key}={value}" for key, value in told.items())
        return Description(f"weight dtype {self._tuned.config.b_dtype}, {text}", "heuristic")


def _forward(
    x: torch.Tensor, tuned: _Tuned, tensors: dict[str, torch.Tensor], locks: torch.Tensor
) -> torch.Tensor:
    forward: Any = sys.modules["humming.forward"]
    out: torch.Tensor = forward.humming_forward(
        tuned.config, x, locks=locks, tuning_config=tuned.of(x.shape[0]), **tensors
    )
    return out


def _compile(call: Linear, job: Job, m: int) -> None:
    # Threads start on the first device, with gradients.
    torch.cuda.set_device(job.device)
    with torch.no_grad():
        call(torch.zeros(m, job.k, dtype=job.dtype, device=job.device))


def _layer(work: Workload) -> Any:
    module: Any = importlib.import_module("humming.layer")
    int4 = work.scheme == W4A16
    weight: dict[str, Any] = {
        **_METHOD,
        "format": "pack-quantized" if int4 else "int-quantized",
        "num_bits": 4 if int4 else 8,
        "strategy": "channel" if work.group == CHANNEL else "group",
        "group_size": None if work.group == CHANNEL else work.group,
    }
    inputs = None
    if not int4:
        inputs = {**_METHOD, "format": "int-quantized", "num_bits": 8, "dynamic": True}
    with torch.device(work.device):
        layer = module.HummingLayer(
            shape_n=work.n, shape_k=work.k, weight_config=weight, input_config=inputs,
            torch_dtype=work.dtype,
        )  # fmt: skip
    tensors = {
        "weight_packed" if int4 else "weight": work.words,
        "weight_scale": work.scale,
    }
    if int4:
        tensors["weight_shape"] = torch.tensor([work.n, work.k], device=work.device)
    layer.load_from_tensors(tensors)
    layer.transform()
    return layer


def _find_nvrtc() -> None:
    """Makes the pip packages' NVRTC and headers findable, before the first import.

    Its compiler is a process of its own, which finds NVRTC's second library on the library path
    only. It wants all CUDA headers in one folder, pip may have put them in several.
    """
    roots = [Path(entry, "nvidia", "cu13") for entry in sys.path if entry]
    roots = list(dict.fromkeys(root for root in roots if root.is_dir()))
    folders = [str(root / "lib") for root in roots if glob.glob(str(root / "lib" / "libnvrtc.so*"))]
    if folders:
        old = os.environ.get("LD_LIBRARY_PATH")
        os.environ["LD_LIBRARY_PATH"] = os.pathsep.join([*folders, *([old] if old else [])])
        for name in sorted(glob.glob(f"{folders[0]}/libnvrtc*.so*")):
            if ".alt." not in name:
                with contextlib.suppress(OSError):
                    ctypes.CDLL(name)
    headers = [root for root in roots if (root / "include").is_dir()]
    if len(headers) > 1 and "CUDA_HOME" not in os.environ:
        os.environ["CUDA_HOME"] = str(_merged(headers))


def _merged(roots: list[Path]) -> Path:
    """One folder of links to the headers and libraries of several."""
    home = Path(tempfile.mkdtemp(prefix="cuda-home-"))
    atexit.register(shutil.rmtree, home, ignore_errors=True)
    for part in ("include", "lib"):
        (home / part).mkdir()
        for root in roots:
            for path in sorted((root / part).glob("*")):
                link = home / part / path.name
                if not link.exists():
                    link.symlink_to(path)
    (home / "lib64").symlink_to(home / "lib")
    version = torch.version.cuda or "13.0"
    (home / "version.json").write_text(json.dumps({"cuda": {"version": version}}))
    return home


def _plain(value: Any) -> Any:
    return getattr(value, "value", str(value))
