"""Variants of our layers beside what they vary: fp16, groups, zero points, 8 bits, strides, bias, host costs.

python bench/variants.py --out FILE.json [--shapes NxK,...] [--tokens M,...] [--time-limit 150]

Everything that can be compiled ahead is compiled on all cores first. A variant and its base are checked
against float64, then timed in turns; quantization alone is held to the memory roof. The file is rewritten
layer by layer; its format is described in pymllm/bench/variants/run.py.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from pymllm.bench.shapes import parse_shape
from pymllm.bench.timing import REST
from pymllm.bench.variants.run import PARTS, SHAPES, TOKENS, run
from pymllm.bench.variants.values import reasons, regimes
from pymllm.cli.bench_cells import microseconds
from pymllm.cli.report import counted, format_table


def listed(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="write every time there")
    shapes = ",".join("{}x{}".format(*shape) for shape in SHAPES)
    parser.add_argument("--shapes", type=listed, metavar="NxK,...", help=f"default: {shapes}")
    tokens = ",".join(map(str, TOKENS))
    parser.add_argument("--tokens", type=listed, metavar="M,...", help=f"default: {tokens}")
    parser.add_argument(
        "--parts", type=listed, default=list(PARTS), metavar="PART,...",
        help=f"default: {','.join(PARTS)}",
    )  # fmt: skip
    parser.add_argument("--device", type=torch.device, help="default: a GPU if there is one")
    parser.add_argument(
        "--rest", type=float, default=REST, metavar="X",
        help="idle time before the replays, as a multiple of the GPU time that they take"
        f" (default: {REST:g})",
    )  # fmt: skip
    parser.add_argument("--time-limit", type=float, metavar="S", help="stop after this, and save")
    return parser.parse_args(argv)


class Talk:
    """One line a step, with the time."""

    def __init__(self) -> None:
        self._began = time.monotonic()

    def __call__(self, text: str) -> None:
        print(f"[{time.monotonic() - self._began:6.1f} s] {text}", flush=True)


def text_of(document: Mapping[str, Any]) -> str:
    """The run for people: how each variant stands, the host's times, what has no time."""
    cells = document["cells"]
    titles = ["part", "variant", "M", "measure", "mean", "worst", "wanted", ""]
    rows = [
        [
            found.part, found.variant, ",".join(map(str, found.tokens)), found.measure,
            f"{found.mean:.2f}", found.told(found.worst), found.limit, found.outcome,
        ]
        for found in regimes(cells)
    ]  # fmt: skip
    parts = [format_table(titles, rows, right=("mean",)) if rows else "nothing was timed"]
    host = [cell for cell in cells if cell["part"] == "host" and cell["skip"] is None]
    if host:
        titles = ["us a call", "to issue", "until done"]
        times = [
            [cell["variant"], *(microseconds(cell[key]) for key in ("median_us", "done_us"))]
            for cell in host
        ]
        parts.append(format_table(titles, times, right=titles[1:]))
    gone = reasons(cells).items()
    parts.append("\n".join(f"no time in {counted(n, 'cell')}: {text}" for text, n in gone))
    parts.append("\n".join(f"{name}: {told}" for name, told in document["measures"].items()))
    compiled, stopped = document["compiled"], document["stopped"]
    parts.append(
        f"{document['environment']['gpu']}, {document['wall_s']} s, {compiled} forms compiled ahead, "
        + ("complete" if document["complete"] else f"not complete: {stopped}")
    )
    return "\n\n".join(part for part in parts if part)


def main(argv: Sequence[str] | None = None) -> int:
    options = arguments(argv)
    try:
        document = run(
            device=options.device,
            shapes=[parse_shape(text) for text in options.shapes] if options.shapes else None,
            tokens=[int(text) for text in options.tokens] if options.tokens else None,
            parts=options.parts,
            rest=options.rest,
            time_limit_s=options.time_limit,
            progress=Talk(),
            save_to=options.out,
        )
    except ValueError as error:
        print(f"variants: error: {error}", file=sys.stderr)
        return 2
    print(text_of(document), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
