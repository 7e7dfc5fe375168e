"""The rule's configuration of the W4A16 kernel for Hopper against a search, on a GPU of capability 9.0.

python bench/search.py --out FILE [--shapes NxK,...] [--tokens M,...] [--best 10]

For every layer the configurations with the least estimated time are timed (CUDA graph, rotated
weights) and compared with the one that the rule takes. The default layers are further ones than
those the rule's costs were fitted on.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import json
import multiprocessing
import os
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from pymllm.bench.environment import environment
from pymllm.bench.shapes import Shape, parse_shape
from pymllm.bench.timing import cold_bytes, copies_for, graph_time
from pymllm_kernels.device import device_facts
from pymllm_kernels.w4a16.hopper_decode_tuning import DecodeConfig
from pymllm_kernels.w4a16.hopper_launch import compiled_config, form_of, launch
from pymllm_kernels.w4a16.hopper_tuning import HopperConfig, HopperForm, all_candidates
from pymllm_kernels.w4a16.layout import SlicedInt4, choose_layout

BF16 = torch.bfloat16
# Experts, grouped-query and fused projections, and a K that is no multiple of 128.
LAYERS = (
    "1024x4096,2048x2048,3072x8192,5120x5120,13824x5120,5120x13824,7168x2048,"
    "2112x7168,4096x2112,18432x7168,2048x768,1536x4096"
)
TOKENS = "1,4,16,32,64,128,256,512,1024,4096"

Weight = tuple[torch.Tensor, torch.Tensor]
Config = HopperConfig | DecodeConfig
Job = tuple[Config, int, int]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, metavar="FILE")
    parser.add_argument("--shapes", default=LAYERS, metavar="NxK,...")
    parser.add_argument("--tokens", default=TOKENS, metavar="M,...")
    parser.add_argument("--best", type=int, default=10, help="configurations timed a cell")
    return parser.parse_args()


def group_of(k: int) -> int:
    return 128 if k % 128 == 0 else 64


def form(k: int) -> HopperForm:
    group = group_of(k)
    return form_of(choose_layout(4, k, group).block_k, group, BF16, BF16, True)


def weight_of(n: int, k: int) -> Weight:
    layout = choose_layout(4, k, group_of(k))
    assert isinstance(layout, SlicedInt4)
    packed = torch.randint(-(2**15), 2**15, layout.shape(n, k), device="cuda").to(torch.int16)
    scale = (torch.rand(k // group_of(k), n, device="cuda") * 0.01 + 0.002).to(BF16)
    return packed, scale


def call(x: torch.Tensor, weight: Weight, config: Config, group: int) -> torch.Tensor:
    out = torch.empty(x.shape[0], weight[1].shape[1], dtype=BF16, device="cuda")
    launch(x, *weight, None, None, out, group_size=group, config=config)
    return out


def compile_one(job: Job) -> None:
    """Runs a form once: Triton's disk cache keeps it for the process that measures."""
    config, n, k = job
    call(torch.zeros(8, k, dtype=BF16, device="cuda"), weight_of(n, k), config, group_of(k))
    torch.cuda.synchronize()


def compile_all(chosen: dict[tuple[int, Shape], list[tuple[float, Config]]]) -> int:
    jobs: dict[tuple[Config, int], Job] = {}
    for (_, (_, k)), found in chosen.items():
        for _, config in found:
            one = compiled_config(config) if isinstance(config, HopperConfig) else config
            jobs.setdefault((one, form(k).block_k), (one, 1024, 2048 if k % 128 == 0 else 2112))
    context = multiprocessing.get_context("spawn")
    workers = min(14, os.cpu_count() or 1)
    with concurrent.futures.ProcessPoolExecutor(workers, mp_context=context) as pool:
        list(pool.map(compile_one, jobs.values()))
    return len(jobs)


def measure(
    m: int, weights: list[Weight], k: int, found: list[tuple[float, Config]]
) -> list[dict[str, Any]]:
    x = torch.randn(m, k, device="cuda").to(BF16)
    cells = []
    for estimate, config in found:
        calls = [lambda w=w, c=config: call(x, w, c, group_of(k)) for w in weights]
        timing = graph_time(calls)
        cells.append(
            {
                "config": asdict(config),
                "median_us": round(timing.median_us, 2),
                "estimate_us": round(estimate, 2),
            }
        )
    return cells


def main() -> int:
    options = arguments()
    device = torch.device("cuda", torch.cuda.current_device())
    facts = device_facts(device)
    shapes = [parse_shape(text) for text in options.shapes.split(",")]
    tokens = [int(text) for text in options.tokens.split(",")]
    chosen = {}
    for n, k in shapes:
        for m in tokens:
            every = all_candidates(m, n, k, form(k), facts.multiprocessors, facts.shared_memory)
            chosen[m, (n, k)] = sorted(every, key=lambda item: item[0])[: options.best]
    began = time.monotonic()
    print(f"compiled {compile_all(chosen)} forms in {time.monotonic() - began:.0f} s", flush=True)
    document: dict[str, Any] = {"environment": environment(device), "cells": []}
    losses = []
    for n, k in shapes:
        copies = copies_for(n * k // 2, cold_bytes(document["environment"]["l2_bytes"]))
        weights = [weight_of(n, k) for _ in range(copies)]
        for m in tokens:
            cells = measure(m, weights, k, chosen[m, (n, k)])
            best = min(cells, key=lambda cell: cell["median_us"])
            loss = cells[0]["median_us"] / best["median_us"] - 1
            losses.append(loss)
            document["cells"].append(
                {"n": n, "k": k, "m": m, "loss": round(loss, 4), "tried": cells}
            )
            print(
                f"[{time.monotonic() - began:5.0f} s] {n}x{k} M={m}: rule {cells[0]['median_us']:.1f} us,"
                f" best {best['median_us']:.1f} us, {loss:.1%} behind",
                flush=True,
            )
            options.out.write_text(json.dumps(document, indent=1))
        del weights
    within = sum(loss <= 0.10 for loss in losses) / len(losses)
    print(f"{within:.1%} of {len(losses)} cells within 10 % of the best, worst {max(losses):.1%}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
