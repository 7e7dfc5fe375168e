"""``pymllm explain``: which kernel would run each layer of a checkpoint, and why."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pymllm.cli.report import (
    Progress,
    add_output_options,
    choice_as_json,
    compact_names,
    counted,
    format_table,
    kernels_told,
    natural_key,
    print_json,
    scheme_label,
    shape_of_name,
)
from pymllm.cli.run import DTYPE_NAMES, sorted_layers

if TYPE_CHECKING:
    from pymllm.checkpoint.planning import CheckpointPlan, LayerPlan
    from pymllm.checkpoint.reader import Checkpoint
    from pymllm_kernels import DeviceFacts

EPILOG = """\
examples:
  pymllm explain ./model                       for the GPU here, else for the CPU
  pymllm explain ./model --capability 8.6      for a GPU that is not here
  pymllm explain ./model --all --json
"""


def add_parser(commands: Any) -> None:
    """Adds the command to the ``pymllm`` parser."""
    parser = commands.add_parser(
        "explain",
        help="which kernel would run each layer of a checkpoint, and why",
        description="Plans a checkpoint from its config.json and safetensors headers: no GPU is"
        " needed and no weight is read.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("checkpoint", metavar="CHECKPOINT_DIR", type=Path)
    parser.add_argument(
        "--capability", metavar="X.Y|cpu",
        help="compute capability to plan for, such as 9.0, or cpu (default: the GPU here, else cpu)",
    )  # fmt: skip
    parser.add_argument(
        "--dtype", choices=DTYPE_NAMES, help="dtype of activations (default: the checkpoint's)"
    )
    parser.add_argument("--all", action="store_true", help="list every layer by itself")
    add_output_options(parser)
    parser.set_defaults(handler=execute)


def execute(options: argparse.Namespace) -> int:
    """Runs the command."""
    with Progress(options.verbose) as progress:
        progress.step(f"reading {options.checkpoint}")
        from pymllm.checkpoint.planning import plan_linears
        from pymllm.checkpoint.reader import Checkpoint
        from pymllm.cli.devices import target_device

        device, origin = target_device(options.capability)
        with Checkpoint(options.checkpoint) as checkpoint:
            plan = plan_linears(checkpoint, device, dtype=options.dtype)
            unquantized = unquantized_names(checkpoint, plan)
    if options.json:
        print_json(
            {
                "checkpoint": str(options.checkpoint),
                "device": _device_json(device, origin),
                "layers": [_layer_json(plan, layer) for layer in sorted_layers(plan)],
                "unquantized": unquantized,
            }
        )
        return 0
    print(f"{options.checkpoint}: {counted(len(plan.layers), 'quantized linear layer')}")
    print(f"planned for {device.name} ({origin}){_dtype_told(plan)}\n")
    print(describe(plan, unquantized, each=options.all))
    return 0


def unquantized_names(checkpoint: Checkpoint, plan: CheckpointPlan) -> list[str]:
    """Modules with a weight matrix that stays as it is: ignored, not targeted, embeddings."""
    planned = {layer.name for layer in plan.layers}
    names = [
        name
        for name, tensors in checkpoint.modules().items()
        if name not in planned and "weight" in tensors and len(tensors["weight"].shape) == 2
    ]
    return sorted(names, key=natural_key)


def describe(plan: CheckpointPlan, unquantized: Sequence[str], *, each: bool) -> str:
    """The plan as text: the table, the reasons, what is not quantized."""
    from pymllm.tuning.origins import origin_label, origins_of

    groups: dict[tuple[object, ...], list[LayerPlan]] = {}
    origins = {layer.name: origins_of(layer.choice.kernel, layer.problem) for layer in plan.layers}
    labels = {layer.name: scheme_label(plan.config.resolve(layer.name)) for layer in plan.layers}
    for layer in sorted_layers(plan):
        key = layer.name if each else shape_of_name(layer.name)
        choice = str(layer.choice)
        groups.setdefault((key, layer.problem, labels[layer.name], choice), []).append(layer)
    rows = []
    for members in groups.values():
        first = members[0]
        names = compact_names([layer.name for layer in members])
        shape = f"{first.out_features} x {first.in_features}"
        origin = origin_label(origins[first.name])
        rows.append((names, labels[first.name], shape, first.choice.kernel.name, origin))
    lines = []
    if rows:
        told = ((labels[layer.name], str(layer.choice)) for layer in sorted_layers(plan))
        titles = ("layer", "scheme", "N x K", "kernel", "configuration")
        lines = [format_table(titles, rows), "", *kernels_told(told), ""]
        reasons = dict.fromkeys(o.reason for found in origins.values() for o in found if o.reason)
        lines += [f"Configurations by rule: {reason}" for reason in reasons]
        lines += [""] if reasons else []
    return "\n".join([*lines, _unquantized_told(unquantized, each)])


def _unquantized_told(names: Sequence[str], each: bool) -> str:
    if not names:
        return "Not quantized: nothing."
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(name if each else shape_of_name(name), []).append(name)
    shown = ", ".join(compact_names(members) for members in groups.values())
    matrices = "1 weight matrix" if len(names) == 1 else f"{len(names)} weight matrices"
    return f"Not quantized, {matrices}: {shown}"


def _dtype_told(plan: CheckpointPlan) -> str:
    dtypes = {str(layer.params_dtype).removeprefix("torch.") for layer in plan.layers}
    return f", activations in {', '.join(sorted(dtypes))}" if dtypes else ""


def _layer_json(plan: CheckpointPlan, layer: LayerPlan) -> dict[str, Any]:
    from pymllm.tuning.origins import origins_of

    problem = layer.problem
    return {
        "name": layer.name,
        "scheme": scheme_label(plan.config.resolve(layer.name)),
        "n": layer.out_features,
        "k": layer.in_features,
        "weight_bits": problem.weight_bits,
        "group_size": problem.group_size,
        "symmetric": problem.symmetric,
        "act_order": problem.act_order,
        "dtype": str(layer.params_dtype).removeprefix("torch."),
        **choice_as_json(layer.choice),
        "configurations": [origin.as_json() for origin in origins_of(layer.choice.kernel, problem)],
    }


def _device_json(device: DeviceFacts, origin: str) -> dict[str, Any]:
    capability = device.capability
    return {
        "type": device.type,
        "name": device.name,
        "capability": None if capability is None else "{}.{}".format(*capability),
        "chosen": origin,
    }
