"""A full run on one GPU, written after every layer so that a killed run leaves what it has.

python bench/h200_run.py --out DIR [--providers ours,cublas_bf16] [--time-limit 480]

The most telling cells come first: ours and torch's on every layer, then vLLM's and torchao's if they are
there, Humming, and GemLite on its two layers.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

from pymllm.bench.providers import NAMES
from pymllm.bench.providers.gemlite import AUTOTUNES, CANDIDATES
from pymllm.bench.run import run
from pymllm.bench.shapes import TUNED_SHAPES, parse_shape
from pymllm.bench.timing import REST
from pymllm.bench.workload import SCHEMES


def listed(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument("--providers", type=listed, help=f"of {', '.join(NAMES)}; default: all")
    parser.add_argument("--shapes", type=listed, metavar="NxK,...")
    parser.add_argument("--tokens", type=listed, metavar="M,...")
    parser.add_argument("--schemes", type=listed, default=list(SCHEMES))
    parser.add_argument("--modes", type=listed, default=["graph", "host"])
    parser.add_argument("--caches", type=listed, default=["cold"])
    parser.add_argument("--tune-all", action="store_true", help="GemLite on every shape")
    parser.add_argument("--gemlite-autotune", choices=AUTOTUNES, default="fast")
    parser.add_argument(
        "--gemlite-candidates", type=int, default=CANDIDATES, metavar="N",
        help=f"the most that max tries of a class of M (default: {CANDIDATES})",
    )  # fmt: skip
    parser.add_argument(
        "--rest", type=float, default=REST, metavar="X",
        help="idle time before the replays of a call, as a multiple of the GPU time that they take"
        f" (default: {REST:g})",
    )  # fmt: skip
    parser.add_argument("--time-limit", type=float, metavar="S")
    return parser.parse_args()


class Talk:
    """One line a layer and provider, with the time."""

    def __init__(self) -> None:
        self._began = time.monotonic()
        self._last = ""

    def __call__(self, text: str) -> None:
        what = text.partition(" M=")[0]
        if what != self._last:
            print(f"[{time.monotonic() - self._began:6.1f} s] {what}", flush=True)
            self._last = what


def summary(document: dict[str, Any]) -> str:
    lines = [
        f"{document['wall_s']} s, complete: {document['complete']} {document['stopped'] or ''}"
    ]
    lines.append("roof: " + ", ".join(f"{k} {v:.4g}" for k, v in document["roof"].items() if v))
    lines.append(f"clocks: {document['environment']['clocks_before']}")
    for name, facts in document["providers"].items():
        cells = [c for c in document["cells"] if c["provider"] == name]
        timed = [c for c in cells if c["median_us"] and c["mode"] != "host"]
        if facts["absent"]:
            lines.append(f"{name}: absent: {facts['absent']}")
            continue
        if facts.get("warm_s", 0) > 1:
            lines.append(f"{name}: compiled ahead for {facts['warm_s']} s {facts['warm'] or ''}")
        fractions = [c["roof_fraction"] for c in timed]
        spread = [c["high_us"] / c["low_us"] - 1 for c in timed]
        text = f"{name}: {len(timed)} times"
        if timed:
            text += f", median {median(fractions):.2f} of the roof, spread {median(spread):.3f}"
        lines.append(text)
        slowed = [c for c in timed if c["throttle"]]
        if slowed:
            clocks = sorted(c["sm_mhz"] for c in slowed)
            lines.append(
                f"  {len(slowed)} of them under {', '.join(sorted({c['throttle'] for c in slowed}))},"
                f" {clocks[0]} to {clocks[-1]} MHz"
            )
        reasons = {c["skip"] for c in cells if c["skip"]}
        lines += [f"  skipped: {reason}" for reason in sorted(reasons)[:4]]
        host = [
            f"M={c['m']} {c['median_us']:.1f}"
            for c in cells
            if c["mode"] == "host" and not c["skip"]
        ]
        lines += [f"  host us: {', '.join(host)}"] if host else []
    return "\n".join(lines)


def main() -> int:
    options = arguments()
    result = run(
        shapes=[parse_shape(text) for text in options.shapes] if options.shapes else None,
        tokens=[int(text) for text in options.tokens] if options.tokens else None,
        schemes=options.schemes,
        providers=options.providers,
        modes=options.modes,
        caches=options.caches,
        tuned_shapes=None if options.tune_all else TUNED_SHAPES,
        rest=options.rest,
        options={
            "gemlite": {
                "autotune": options.gemlite_autotune,
                "candidates": options.gemlite_candidates,
            }
        },
        time_limit_s=options.time_limit,
        progress=Talk(),
        save_to=options.out / "run.json",
    )
    print(summary(result.document), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
