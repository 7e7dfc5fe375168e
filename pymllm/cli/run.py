"""``pymllm run``: loads a checkpoint's linear layers and reports kernel, time and error of each."""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pymllm.cli.report import (
    Progress,
    add_output_options,
    choice_as_json,
    counted,
    format_table,
    kernels_told,
    natural_key,
    print_json,
    scheme_label,
)

if TYPE_CHECKING:
    import torch

    from pymllm.checkpoint.planning import CheckpointPlan, LayerPlan
    from pymllm.checkpoint.reader import Checkpoint
    from pymllm.quantization.format import LayerScheme
    from pymllm_kernels import KernelChoice

DTYPE_NAMES = ("bfloat16", "float16", "float32")
DEFAULT_TOKENS = (1, 16, 256)
EPILOG = r"""
examples:
  pymllm run ./model --layers 'layers\.0\.' --tokens 1,64
  pymllm run ./model --device cpu --limit 4 --json
  pymllm run ./model --kernel torch_w4a16       force a kernel, e.g. to compare with it
"""
TIMING_NOTE = (
    "time: median of repeated calls, eager, inputs and weight warm in cache; an impression, not a"
    " benchmark"
)
ERROR_NOTE = (
    "error: relative Frobenius error against x @ W.T in fp64, W dequantized from the checkpoint;"
    " x is not quantized there, so that W8A8 errors include the rounding of x to int8"
)
_NAMES_SHOWN = 4


@dataclass(frozen=True)
class Result:
    """One call: how long it took, how far from exact it was, and where its configuration comes from."""

    tokens: int
    milliseconds: float
    relative_error: float
    origin: str | None
    configuration: str | None


@dataclass(frozen=True)
class LayerReport:
    """A layer, the kernel it was loaded for, and what was measured."""

    plan: LayerPlan
    scheme: LayerScheme | None
    choice: KernelChoice
    results: tuple[Result, ...]

    def as_json(self) -> dict[str, Any]:
        """The report as JSON values."""
        return {
            "name": self.plan.name,
            "scheme": scheme_label(self.scheme),
            "n": self.plan.out_features,
            "k": self.plan.in_features,
            **choice_as_json(self.choice),
            "results": [asdict(result) for result in self.results],
        }


def token_counts(text: str) -> tuple[int, ...]:
    """``1,16,256`` as numbers, each at least 1."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise argparse.ArgumentTypeError(
            f"found {text!r}, accepted positive integers and commas, such as 1,16,256"
        )
    return tuple(int(part) for part in parts)


def positive(text: str) -> int:
    """A positive integer."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"found {text!r}, accepted a positive integer")
    return int(text)


def add_common_options(parser: argparse.ArgumentParser) -> None:
    """Adds what ``demo`` and ``run`` share."""
    parser.add_argument("--device", help="cpu, cuda or cuda:INDEX (default: a GPU if there is one)")
    parser.add_argument(
        "--tokens", type=token_counts, default=DEFAULT_TOKENS, metavar="M,M,...",
        help="rows of the input to run (default: 1,16,256)",
    )  # fmt: skip
    add_output_options(parser)


def add_parser(commands: Any) -> None:
    """Adds the command to the ``pymllm`` parser."""
    parser = commands.add_parser(
        "run",
        help="time and error of each quantized layer of a checkpoint",
        description="Loads the quantized linear layers of a compressed-tensors checkpoint, runs"
        " each on random inputs, and prints its kernel, time and error against fp64.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("checkpoint", metavar="CHECKPOINT_DIR", type=Path)
    parser.add_argument(
        "--dtype", choices=DTYPE_NAMES, help="dtype of activations (default: the checkpoint's)"
    )
    parser.add_argument(
        "--kernel", metavar="NAME",
        help="force this kernel on the layers of its scheme (names: pymllm explain)",
    )  # fmt: skip
    parser.add_argument("--layers", metavar="REGEX", help="only layers whose name contains this")
    parser.add_argument("--limit", metavar="N", type=positive, help="only the first N of them")
    add_common_options(parser)
    parser.set_defaults(handler=execute)


def execute(options: argparse.Namespace) -> int:
    """Runs the command."""
    with Progress(options.verbose) as progress:
        progress.step(f"reading {options.checkpoint}")
        from pymllm.checkpoint.planning import plan_linears
        from pymllm.checkpoint.reader import Checkpoint
        from pymllm.cli.devices import best_device
        from pymllm_kernels import device_facts

        device = best_device(options.device)
        with Checkpoint(options.checkpoint) as checkpoint:
            plan = plan_linears(
                checkpoint,
                device_facts(device),
                dtype=options.dtype,
                kernel=options.kernel,
                names=matching_names(checkpoint, options.layers),
            )
            layers = sorted_layers(plan)[: options.limit]
            if not layers:
                raise ValueError(f"{options.checkpoint}: found no quantized linear layer to run")
            reports = measure_layers(
                checkpoint, plan, layers, device, options.tokens, progress, kernel=options.kernel
            )
    show(str(options.checkpoint), reports, device, as_json=options.json)
    return 0


def matching_names(checkpoint: Checkpoint, pattern: str | None) -> set[str] | None:
    """Names of the quantized layers that contain ``pattern``, ``None`` without a pattern.

    Raises:
        ValueError: it is not a regular expression, or matches nothing.
    """
    if pattern is None:
        return None
    try:
        regex = re.compile(pattern)
    except re.error as error:
        raise ValueError(f"layers: {pattern!r} is not a regular expression: {error}") from None
    names = []
    for name, tensors in checkpoint.modules().items():
        weight = tensors.get("weight_packed") or tensors.get("weight")
        if weight is not None and not weight.dtype.is_floating_point:
            names.append(name)
    matching = {name for name in names if regex.search(name)}
    if not matching:
        some = ", ".join(names[:_NAMES_SHOWN]) + (", ..." if len(names) > _NAMES_SHOWN else "")
        raise ValueError(
            f"layers: {pattern!r} is in none of the names of {len(names)} quantized layers ({some})"
        )
    return matching


def sorted_layers(plan: CheckpointPlan) -> list[LayerPlan]:
    """The layers with their numbers in order; files list 10 before 2, and shards as they like."""
    return sorted(plan.layers, key=lambda layer: natural_key(layer.name))


def measure_layers(
    checkpoint: Checkpoint,
    plan: CheckpointPlan,
    layers: Sequence[LayerPlan],
    device: torch.device,
    tokens: Sequence[int],
    progress: Progress,
    *,
    kernel: str | None = None,
) -> list[LayerReport]:
    """Loads layers through the public function and measures each."""
    import pymllm

    progress.step(f"loading {counted(len(layers), 'layer')} to {device}")
    loaded = pymllm.load_linears(
        checkpoint.directory,
        device=device,
        dtype=layers[0].params_dtype,
        kernel=kernel,
        names={layer.name for layer in layers},
        progress=lambda done, total, name: progress.step(f"loaded {done}/{total}: {name}"),
    )
    reports = []
    for number, layer in enumerate(layers, 1):
        progress.step(f"[{number}/{len(layers)}] {layer.name}")
        scheme = plan.config.resolve(layer.name)
        tensors = {suffix: checkpoint.read(f"{layer.name}.{suffix}") for suffix in layer.tensors}
        call: Any = loaded.pop(layer.name)
        results = _results(layer, call, tensors, scheme, device, tokens)
        reports.append(LayerReport(layer, scheme, call.kernel_choice, results))
    return reports


def _results(
    plan: LayerPlan,
    layer: torch.nn.Module,
    tensors: Mapping[str, torch.Tensor],
    scheme: LayerScheme | None,
    device: torch.device,
    tokens: Sequence[int],
) -> tuple[Result, ...]:
    import torch

    from pymllm.cli.measure import median_milliseconds, relative_error
    from pymllm.cli.reference import exact_output
    from pymllm_kernels.common.launch import in_short

    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(max(tokens), plan.in_features, generator=generator)
    rows = rows.to(device, plan.params_dtype)
    # Every row is quantized by itself, so that the rows of all calls share one reference.
    expected = exact_output(rows, tensors, scheme)
    results = []
    with torch.inference_mode():
        for count in tokens:
            x = rows[:count]
            error = relative_error(layer(x), expected[:count])
            resolved = plan.choice.kernel.resolved(plan.problem, count)
            told = (
                (None, None) if resolved is None else (resolved.origin, in_short(resolved.config))
            )
            results.append(Result(count, median_milliseconds(layer, x), error, *told))
    return tuple(results)


def show(
    place: str, reports: Sequence[LayerReport], device: torch.device, *, as_json: bool
) -> None:
    """Prints the reports, at least one; ``place`` says what was run."""
    board = reports[0].plan.problem.device.name
    dtype = str(reports[0].plan.params_dtype).removeprefix("torch.")
    notes = [TIMING_NOTE, ERROR_NOTE]
    if as_json:
        print_json(
            {
                "checkpoint": place,
                "device": str(device),
                "device_name": board,
                "dtype": dtype,
                "layers": [report.as_json() for report in reports],
                "notes": notes,
            }
        )
        return
    print(f"{place}: {counted(len(reports), 'layer')} on {device} ({board}), x in {dtype}\n")
    print(_table(reports))
    told = ((scheme_label(report.scheme), str(report.choice)) for report in reports)
    print("\n".join(["", *kernels_told(told), "", *notes]))


def _table(reports: Sequence[LayerReport]) -> str:
    rows: list[tuple[object, ...]] = []
    for report in reports:
        plan = report.plan
        shape, kernel = f"{plan.out_features} x {plan.in_features}", report.choice.kernel.name
        head: tuple[object, ...] = (plan.name, scheme_label(report.scheme), shape, kernel)
        for result in report.results:
            duration, error = f"{result.milliseconds:.3f}", f"{result.relative_error:.1e}"
            rows.append((*head, result.tokens, duration, error, result.origin))
            head = (None,) * len(head)
    titles: tuple[str, ...] = (
        "layer", "scheme", "N x K", "kernel", "M", "ms", "error", "configuration",
    )  # fmt: skip
    if all(row[-1] is None for row in rows):
        titles, rows = titles[:-1], [row[:-1] for row in rows]
    return format_table(titles, rows, right=("M", "ms", "error"))
