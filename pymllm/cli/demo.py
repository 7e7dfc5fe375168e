"""``pymllm demo``: writes a small checkpoint of both schemes, loads it and runs it."""

from __future__ import annotations

import argparse
import contextlib
import json
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pymllm.cli.report import Progress
from pymllm.cli.run import add_common_options, measure_layers, show, sorted_layers

if TYPE_CHECKING:
    import torch

EPILOG = """\
examples:
  pymllm demo
  pymllm demo --device cpu --tokens 1,64 --keep ./demo-checkpoint
"""

# (hidden, intermediate) of a block: a CPU is to finish in seconds, a GPU to have something to do.
CPU_SIZES = (1024, 2048)
GPU_SIZES = (4096, 14336)
SEED = 0


def add_parser(commands: Any) -> None:
    """Adds the command to the ``pymllm`` parser."""
    parser = commands.add_parser(
        "demo",
        help="write a small checkpoint of both schemes, load it and run it",
        description="Writes a small compressed-tensors checkpoint with random W4A16 and W8A8"
        " layers, loads it the way a model would be loaded, runs it on the best device here, and"
        " prints kernel, time and error of each layer.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--keep", type=Path, metavar="DIR", help="write the checkpoint there and keep it"
    )
    add_common_options(parser)
    parser.set_defaults(handler=execute)


def execute(options: argparse.Namespace) -> int:
    """Runs the command."""
    with Progress(options.verbose) as progress, _directory(options.keep) as directory:
        progress.step("importing torch")
        from pymllm.checkpoint.planning import plan_linears
        from pymllm.checkpoint.reader import Checkpoint
        from pymllm.cli.devices import best_device
        from pymllm_kernels import device_facts

        device = best_device(options.device)
        progress.step(f"writing a checkpoint to {directory}")
        write_checkpoint(directory, GPU_SIZES if device.type == "cuda" else CPU_SIZES)
        with Checkpoint(directory) as checkpoint:
            plan = plan_linears(checkpoint, device_facts(device))
            reports = measure_layers(
                checkpoint, plan, sorted_layers(plan), device, options.tokens, progress
            )
    place = "a temporary checkpoint" if options.keep is None else str(directory)
    show(place, reports, device, as_json=options.json)
    if options.keep is not None and not options.json:
        print(f"\nThe checkpoint is kept: pymllm explain {directory}, pymllm run {directory}")
    return 0


@contextlib.contextmanager
def _directory(keep: Path | None) -> Iterator[Path]:
    if keep is not None:
        yield keep
        return
    with tempfile.TemporaryDirectory(prefix="pymllm-demo-") as name:
        yield Path(name) / "checkpoint"


def write_checkpoint(directory: Path, sizes: tuple[int, int]) -> None:
    """Writes three blocks: W4A16 symmetric, W4A16 with zero points, W8A8; in two shards.

    Args:
        directory: a folder that is new or empty.
        sizes: hidden and intermediate size.

    Raises:
        ValueError: the folder is not empty.
    """
    import torch

    import pymllm

    if directory.exists() and any(directory.iterdir()):
        raise ValueError(f"{directory}: found files there, expected a new or an empty folder")
    directory.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(SEED)
    blocks = [_random_block(number, sizes, generator) for number in range(3)]
    schemes = {**dict.fromkeys(blocks[0], "W4A16"), **dict.fromkeys(blocks[2], "W8A8")}
    with tempfile.TemporaryDirectory(dir=directory) as parts:
        named, rest = Path(parts, "named"), Path(parts, "rest")
        pymllm.save_linears({**blocks[0], **blocks[2]}, named, scheme=schemes)
        pymllm.save_linears(blocks[1], rest, scheme="W4A16", symmetric=False)
        _join([named, rest], directory)


def _random_block(
    number: int, sizes: tuple[int, int], generator: torch.Generator
) -> dict[str, tuple[torch.Tensor, torch.Tensor | None]]:
    """Layer name -> weight and bias of some projections of a transformer block."""
    import torch

    hidden, intermediate = sizes
    block = {}
    for name, n, k in (
        ("self_attn.q_proj", hidden, hidden),
        ("self_attn.o_proj", hidden, hidden),
        ("mlp.gate_proj", intermediate, hidden),
        ("mlp.down_proj", hidden, intermediate),
    ):
        weight = (torch.randn(n, k, generator=generator) / k**0.5).to(torch.bfloat16)
        bias = torch.randn(n, generator=generator).to(torch.bfloat16)
        block[f"model.layers.{number}.{name}"] = (weight, bias if name.endswith("q_proj") else None)
    return block


def _join(parts: Sequence[Path], directory: Path) -> None:
    """Makes one sharded checkpoint of several.

    Only the last part may target a class: its target serves what no exact name of the others does.
    """
    from pymllm.checkpoint.reader import CONFIG_NAME, INDEX_NAME, WEIGHTS_NAME, read_header

    groups: list[object] = []
    weight_map: dict[str, str] = {}
    config: dict[str, Any] = {}
    for number, part in enumerate(parts, 1):
        shard = f"model-{number:05d}-of-{len(parts):05d}.safetensors"
        weight_map |= dict.fromkeys(read_header(part / WEIGHTS_NAME), shard)
        (part / WEIGHTS_NAME).rename(directory / shard)
        config = json.loads((part / CONFIG_NAME).read_text(encoding="utf-8"))
        groups += config["quantization_config"]["config_groups"].values()
    config["quantization_config"]["format"] = "mixed-precision"
    config["quantization_config"]["config_groups"] = {
        f"group_{number}": group for number, group in enumerate(groups)
    }
    for name, content in ((INDEX_NAME, {"weight_map": weight_map}), (CONFIG_NAME, config)):
        (directory / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
