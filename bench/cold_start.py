"""Time from `python` to the first output of a model's layers: nothing cached, and after `pymllm warmup`.

python bench/cold_start.py --out FILE [--model llama-3-8b] [--layers 32] [--max-tokens 8192]

Three processes, with a cache of their own that is empty at first: the layers called with 1, 16 and 512
tokens (cold); `pymllm warmup --tune off`; the same layers again in a new process (warm). Making the
weights, which stands for reading them, is timed apart.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

TOKENS = (1, 16, 512)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the figures there, too")
    parser.add_argument("--model", default="llama-3-8b")
    parser.add_argument("--layers", type=int, default=32, help="decoder layers (default: 32)")
    parser.add_argument("--max-tokens", type=int, default=8192, metavar="M")
    parser.add_argument("--process", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


def one_process(model: str, layers: int) -> dict[str, Any]:
    """What a user's process does, with the seconds of each part."""
    clock = [("start", time.perf_counter())]

    def lap(name: str) -> None:
        clock.append((name, time.perf_counter()))

    import torch

    lap("import torch")
    torch.zeros(1, device="cuda")
    torch.cuda.synchronize()
    lap("CUDA context")
    from pymllm.bench.providers.ours import make_layer
    from pymllm.bench.shapes import model_shapes
    from pymllm.bench.workload import make_workload
    from pymllm_kernels import counters

    lap("import pymllm")
    device = torch.device("cuda", 0)
    shapes = [(n, k) for n, k in model_shapes(model)]
    made = [
        make_layer(make_workload(scheme, n, k, 1, device))
        for scheme in ("w4a16", "w8a8_int8")
        for n, k in shapes
    ]
    inputs = [
        {m: torch.randn(m, layer.in_features, device=device, dtype=torch.bfloat16) for m in TOKENS}
        for layer in made
    ]
    torch.cuda.synchronize()
    lap("weights")
    calls = 0
    with torch.no_grad():
        for m in TOKENS:
            for _ in range(layers):
                for layer, x in zip(made, inputs, strict=True):
                    layer(x[m])
                    calls += 1
            if m == TOKENS[0]:
                torch.cuda.synchronize()
                lap("first outputs")
    torch.cuda.synchronize()
    lap("further outputs")
    parts = {name: round(at - clock[i][1], 3) for i, (name, at) in enumerate(clock[1:])}
    counted = counters()
    return {
        "seconds": parts,
        # Beside what any program with these weights needs.
        "added_s": round(parts["import pymllm"] + parts["first outputs"], 3),
        "calls": calls,
        "compiled": counted.compiled,
        "loaded": counted.loaded,
    }


def run(command: list[str], environment: dict[str, str]) -> tuple[str, float]:
    began = time.perf_counter()
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return done.stdout, time.perf_counter() - began


def measure(options: argparse.Namespace, folder: str) -> dict[str, Any]:
    environment = {
        **os.environ,
        "TRITON_CACHE_DIR": str(Path(folder, "triton")),
        "PYMLLM_TUNING_DIR": str(Path(folder, "tuning")),
    }
    own = [
        sys.executable, __file__, "--process", "--model", options.model,
        "--layers", str(options.layers),
    ]  # fmt: skip
    warm_up = [
        sys.executable, "-m", "pymllm", "warmup", "--model", options.model, "--tune", "off",
        "--max-tokens", str(options.max_tokens), "--json",
    ]  # fmt: skip
    found: dict[str, Any] = {"model": options.model, "layers": options.layers, "tokens": TOKENS}
    for name, command in (("cold", own), ("warm-up", warm_up), ("warm", own)):
        text, seconds = run(command, environment)
        found[name] = {"wall_s": round(seconds, 2), **json.loads(text)}
        print(f"{name}: {seconds:.1f} s {json.dumps(found[name])}", flush=True)
    return found


def main() -> int:
    options = arguments()
    if options.process:
        print(json.dumps(one_process(options.model, options.layers)))
        return 0
    import torch

    from pymllm.bench.environment import environment

    with tempfile.TemporaryDirectory() as folder:
        found = measure(options, folder)
    found["environment"] = environment(torch.device("cuda", 0))
    if options.out:
        options.out.write_text(json.dumps(found, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
