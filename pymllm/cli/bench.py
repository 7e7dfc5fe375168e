"""``pymllm bench``: times our kernels, torch's and the peers installed here, as a table."""

from __future__ import annotations

import argparse
import contextlib
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pymllm.cli.bench_cells import (
    OURS,
    Grid,
    absent,
    grids_of,
    microseconds,
    modes_of,
    paths_of,
    skipped,
    slower_than_bf16,
    summary,
)
from pymllm.cli.report import (
    Progress,
    add_output_options,
    counted,
    format_table,
    print_json,
)
from pymllm.cli.run import token_counts
from pymllm.text import duration

if TYPE_CHECKING:
    from pymllm.bench.providers import Provider
    from pymllm.bench.shapes import Shape

INTERRUPTED = 130
SCHEMES = {"w4a16": ("w4a16",), "w8a8": ("w8a8_int8",), "both": ("w4a16", "w8a8_int8")}
EPILOG = """\
examples:
  pymllm bench --shapes 4096x4096,4096x14336 --tokens 1,16,256
  pymllm bench --model llama-3-8b --scheme w4a16 --providers ours,cublas_bf16,tinygemm
  pymllm bench --out run.json                   all of it, for bench/report.py

Without options: the standard shapes (small ones on a CPU), both schemes, everything that is installed.
docs/performance.md says how it is measured.
"""
MODES = ("graph", "eager", "host")
HOW = {
    "graph": "GPU time by CUDA-graph replay",
    "eager": "eager calls, launches included",
    "host": "host time to issue a call",
    "cpu": "wall clock",
    "cold": "weights not in cache",
    "hot": "weights in cache",
}


def add_parser(commands: Any) -> None:
    """Adds the command to the ``pymllm`` parser."""
    parser = commands.add_parser(
        "bench",
        help="time of our kernels beside torch's and installed peers'",
        description="Times quantized linear layers on this machine, checks every result against"
        " fp64 first, and compares with the least time that the measured memory and arithmetic"
        " rates allow (the roof).",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    which = parser.add_mutually_exclusive_group()
    which.add_argument(
        "--shapes", type=shapes_of, metavar="NxK,...", help="output x input features"
    )
    which.add_argument("--model", help="shapes of a model's layers, such as llama-3-8b")
    parser.add_argument("--tokens", type=token_counts, metavar="M,M,...", help="rows of the input")
    parser.add_argument("--scheme", choices=list(SCHEMES), default="both", help="default: both")
    parser.add_argument(
        "--providers", default="all", metavar="NAME,...",
        help="ours, cublas_bf16, tinygemm, humming, ... (default: all)",
    )  # fmt: skip
    parser.add_argument(
        "--cache", choices=("cold", "hot"), default="cold",
        help="weights come from memory, as in a model, or from the cache (default: cold)",
    )  # fmt: skip
    parser.add_argument(
        "--modes", type=modes_list, default=("graph",), metavar="MODE,...",
        help="graph: GPU time; eager: with launches; host: time to issue a call, on the first shape"
        " and M up to 16 (default: graph; a CPU has its wall clock only)",
    )  # fmt: skip
    parser.add_argument("--device", help="cpu, cuda or cuda:INDEX (default: a GPU if there is one)")
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="save the run there, too")
    add_output_options(parser, "print the run as one JSON document")
    parser.set_defaults(handler=execute)


def shapes_of(text: str) -> list[Shape]:
    """``4096x4096,4096x14336`` as pairs of N and K, in order, each once."""
    from pymllm.bench.shapes import parse_shape

    try:
        return list(dict.fromkeys(parse_shape(part) for part in text.split(",")))
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def modes_list(text: str) -> tuple[str, ...]:
    """``graph,host`` as names, each known."""
    names = tuple(dict.fromkeys(_names(text)))
    if not names or not set(names) <= set(MODES):
        raise argparse.ArgumentTypeError(f"found {text!r}, accepted {', '.join(MODES)}")
    return names


def execute(options: argparse.Namespace) -> int:
    """Runs the command."""
    with Progress(options.verbose) as progress:
        progress.step("loading torch")
        import pymllm.bench.shapes as known
        from pymllm.bench.providers import select
        from pymllm.bench.run import run
        from pymllm.cli.devices import best_device

        device = best_device(options.device)
        gpu = device.type == "cuda"
        names = None if options.providers == "all" else _names(options.providers)
        # Before minutes of measuring: a wrong name is an error now.
        phases = select(names, device.type)
        if not phases:
            raise ValueError(f"providers: none of {names} runs on {device.type}")
        if options.out is not None and not options.out.absolute().parent.is_dir():
            raise ValueError(f"out: there is no folder {options.out.absolute().parent}")
        shapes = options.shapes or (known.model_shapes(options.model) if options.model else None)
        shapes = shapes or list(known.SHAPES if gpu else known.CPU_SHAPES)
        tokens = options.tokens or (known.TOKENS if gpu else known.CPU_TOKENS)
        schemes = SCHEMES[options.scheme]
        providers = [provider for phase in phases for provider in phase]
        countdown = Countdown(
            progress, lambda: _steps(providers, schemes) * len(shapes) * len(tokens)
        )
        document = run(
            device=device, shapes=shapes, tokens=tokens, schemes=schemes, providers=names,
            modes=options.modes, caches=(options.cache,), progress=countdown, save_to=options.out,
            # A peer that tunes for minutes a shape is left out of most, unless asked for by name.
            tuned_shapes=known.TUNED_SHAPES if names is None else None,
        ).document  # fmt: skip
    if options.json:
        print_json(document)
    else:
        print(text_of(document))
    if not document["complete"]:
        print(f"pymllm: warning: not complete: {document['stopped']}", file=sys.stderr)
    return INTERRUPTED if document["stopped"] == "interrupted" else 0


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _steps(providers: Sequence[Provider], schemes: Sequence[str]) -> int:
    """Steps that one shape and M takes, of providers that are there."""
    there = []
    for provider in providers:
        # A peer may fail in any way; the run names the reason.
        with contextlib.suppress(Exception):
            there += [provider] if provider.why_absent() is None else []
    return sum(scheme in provider.schemes for provider in there for scheme in schemes)


class Countdown:
    """Takes the harness's progress, and adds how far it is and how long the rest may take.

    Args:
        progress: where it is shown.
        total: the number of steps, asked at the first step.
    """

    def __init__(
        self,
        progress: Progress,
        total: Callable[[], int],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._progress, self._count, self._clock = progress, total, clock
        self._done, self._total, self._began = 0, 0, 0.0

    def __call__(self, text: str) -> None:
        """Shows a step; those that name an M are counted."""
        if " M=" not in text:
            self._progress.step(text)
            return
        if not self._total:
            self._total, self._began = self._count(), self._clock()
        left = ""
        if self._done:
            seconds = (self._clock() - self._began) / self._done * (self._total - self._done)
            left = f", about {duration(max(seconds, 0.0))} left"
        self._done += 1
        self._progress.step(f"[{self._done}/{max(self._total, self._done)}] {text}{left}")


def text_of(document: Mapping[str, Any]) -> str:
    """The run for people: machine, a table a shape, one summary a scheme, what is missing."""
    cells, roof = document["cells"], document["roof"]
    ceilings = (
        f"reads {roof['read_tbps']:.3g} TB/s, bf16 {roof['bf16_tops']:.3g} TFLOP/s,"
        f" int8 {roof['int8_tops']:.3g} TOP/s (measured)"
    )
    parts = [f"{document['environment']['gpu']}: {ceilings}"]
    summaries = []
    for mode, cache in modes_of(cells):
        grids = grids_of(cells, mode, cache)
        how = f"{HOW.get(mode, mode)}, {HOW.get(cache, cache)}"
        parts.append(f"microseconds a call, * the fastest, - no time; {how}, median")
        parts += [
            "\n".join([f"{grid.label}, {grid.shape}", table(grid), *_paths(cells, grid)])
            for grid in grids
        ]
        for scheme in dict.fromkeys(grid.scheme for grid in grids):
            chosen = [grid for grid in grids if grid.scheme == scheme]
            summaries.append(f"{scheme}, {mode}, {cache}: {summary(chosen)}")
            if any(grid.speed_up(m) for grid in chosen for m in grid.tokens):
                losses = slower_than_bf16(chosen) or ["nowhere"]
                summaries.append(
                    f"{scheme}, {mode}, {cache}: slower than bf16: {'; '.join(losses)}"
                )
    parts.append("\n".join(summaries) or "nothing was timed")
    gone = absent(document)
    lines = [f"not here: {name}: {reason}" for name, reason in gone.items()]
    lines += [
        f"no time in {counted(count, 'cell')}: {reason}"
        for reason, count in skipped(cells, gone).items()
    ]
    return "\n\n".join([*parts, "\n".join(lines)] if lines else parts)


def _paths(cells: Sequence[Mapping[str, Any]], grid: Grid) -> list[str]:
    """Which kernel and configuration ours took, a line for neighbouring M with the same."""
    return [
        f"ours, M = {', '.join(map(str, tokens))}: {path}" for tokens, path in paths_of(cells, grid)
    ]


def table(grid: Grid) -> str:
    """Rows M, columns providers; then how ours stands to the roof and to the others."""
    roof, best, plain = "ours/roof", "best other/ours", "bf16/ours"
    titles = ["M", *grid.providers]
    titles += [roof, best, plain] if OURS in grid.us else []
    rows = []
    for m in grid.tokens:
        fastest = grid.best(m)
        times = [
            microseconds(grid.time(name, m)) + ("*" if name == fastest else " ")
            for name in grid.providers
        ]
        share, ratio, speed_up = grid.roof_fraction(m), grid.ratio(m), grid.speed_up(m)
        standing = [
            "-" if share is None else f"{share:.0%}",
            "-" if ratio is None else f"{ratio:.2f}",
            "-" if speed_up is None else f"{speed_up:.2f}",
        ]
        rows.append([str(m), *times, *(standing if OURS in grid.us else [])])
    return format_table(titles, rows, right=titles)
