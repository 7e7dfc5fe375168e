"""``pymllm warmup``: tunes and compiles what a model needs, before it is served."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pymllm.cli.bench import SCHEMES, shapes_of
from pymllm.cli.report import Progress, add_output_options, counted, print_json
from pymllm.cli.run import DTYPE_NAMES
from pymllm.cli.tune import shapes_of_models
from pymllm.text import duration

if TYPE_CHECKING:
    from pymllm.warming import WarmedUp
    from pymllm_kernels import Counts

NOT_WARM = 1
EPILOG = """\
examples:
  pymllm warmup ./model                               tune what is missing, compile the rest
  pymllm warmup ./model --tp 2 --tune off --verify    compile only, then prove it
  pymllm warmup --model llama-3-8b --max-tokens 2048
  pymllm warmup ./model --capability 9.0              compile for a GPU that is not here

Code goes to Triton's cache (TRITON_CACHE_DIR), configurations to pymllm's (PYMLLM_TUNING_DIR): keep both
for the processes that serve.
"""


def add_parser(commands: Any) -> None:
    """Adds the command to the ``pymllm`` parser."""
    parser = commands.add_parser(
        "warmup",
        help="tune and compile everything a model needs, before serving it",
        description="Finds the layers of a checkpoint, tunes what was never tuned on this machine, and"
        " compiles every form of the kernels that any number of tokens can need. A process that"
        " serves afterwards neither tunes nor compiles; --verify proves it.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("checkpoint", metavar="CHECKPOINT_DIR", type=Path, nargs="?")
    which = parser.add_mutually_exclusive_group()
    which.add_argument(
        "--shapes", type=shapes_of, default=(), metavar="NxK,...", help="output x input features"
    )
    which.add_argument(
        "--model", metavar="NAME,...", help="such as llama-3-8b; all: every known model"
    )
    parser.add_argument(
        "--max-tokens", type=int, default=8192, metavar="M",
        help="the most tokens of a call (default: 8192)",
    )  # fmt: skip
    parser.add_argument(
        "--tp", type=int, default=1, metavar="N", help="GPUs that share each layer (default: 1)"
    )
    parser.add_argument(
        "--tune", choices=("off", "missing", "all"),
        help="search for configurations: not, those never searched for here, or all"
        " (default: missing; off with --capability)",
    )  # fmt: skip
    parser.add_argument(
        "--scheme", choices=list(SCHEMES), default="both", help="of --shapes and --model"
    )
    parser.add_argument(
        "--group-size", type=int, default=128, metavar="G",
        help="of --shapes and --model: inputs a scale in W4A16, -1 for all (default: 128)",
    )  # fmt: skip
    parser.add_argument(
        "--dtype", choices=DTYPE_NAMES, help="dtype of activations (default: the checkpoint's)"
    )
    parser.add_argument("--device", help="cuda or cuda:INDEX (default: the current GPU)")
    parser.add_argument(
        "--capability", metavar="X.Y", help="compile for a GPU that need not be here, such as 9.0"
    )
    parser.add_argument(
        "--workers", type=int, metavar="N", help="processes that compile (default: one a core)"
    )
    parser.add_argument(
        "--verify", action="store_true",
        help="then call every layer with every number of tokens in a fresh process, and fail if it"
        " compiles or tunes anything",
    )  # fmt: skip
    add_output_options(parser)
    parser.set_defaults(handler=execute)


def execute(options: argparse.Namespace) -> int:
    """Runs the command."""
    planned = options.capability is not None
    tune = options.tune or ("off" if planned else "missing")
    if planned and (tune != "off" or options.verify or options.device):
        raise ValueError(
            "--capability: found with --tune, --verify or --device, accepted without: they need the GPU"
        )
    with Progress(options.verbose) as progress:
        progress.step("loading torch")
        import torch

        from pymllm import warming
        from pymllm.cli.devices import best_device
        from pymllm_kernels import device_facts, planned_device

        device = None if planned else best_device(options.device)
        if device is not None and device.type != "cuda":
            raise ValueError(
                "device: found a CPU, which compiles and tunes nothing; --capability 9.0 compiles for"
                " a GPU that is not here"
            )
        facts = planned_device(options.capability) if device is None else device_facts(device)
        problems, biases = warming.layers_to_warm(
            options.checkpoint, _shapes(options), facts, parallel=(options.tp,),
            schemes=SCHEMES[options.scheme], group_size=options.group_size,
            dtype=None if options.dtype is None else getattr(torch, options.dtype),
        )  # fmt: skip
        done = warming.warm(
            problems, biases=biases, device=device, max_tokens=options.max_tokens, tune=tune,
            workers=options.workers, progress=progress.step,
        )  # fmt: skip
        counts = None
        if options.verify:
            assert device is not None
            counts = warming.verify(
                problems, device, max_tokens=options.max_tokens, progress=progress.step
            )
    if options.json:
        print_json(_json(done, counts, facts.name))
    else:
        print(_text(done, counts, facts.name, options.max_tokens))
    return NOT_WARM if counts is not None and (counts.compiled or counts.tuned) else 0


def _shapes(options: argparse.Namespace) -> list[tuple[int, int]]:
    if options.model is None:
        return list(options.shapes)
    return shapes_of_models(options.model, (options.tp,))


def _json(done: WarmedUp, counts: Counts | None, device: str) -> dict[str, Any]:
    import dataclasses

    document = {"device": device, **dataclasses.asdict(done), "seconds": round(done.seconds, 2)}
    if counts is not None:
        document["verified"] = dataclasses.asdict(counts)
    return document


def _text(done: WarmedUp, counts: Counts | None, device: str, max_tokens: int) -> str:
    kernels = ", ".join(f"{name} {count}" for name, count in done.kernels.items())
    there = len(done.forms) - done.compiled
    lines = [
        f"{device}: {counted(done.layers, 'different layer')}, 1 to {max_tokens} tokens ({kernels})",
        f"{counted(len(done.forms), 'form')} of the kernels: {done.compiled} compiled now, {there} were there",
        f"{counted(done.tuned, 'configuration')} searched for",
    ]
    lines += [f"not tuned: {layer}: {why}" for layer, why in done.untuned.items()]
    lines.append(f"done in {duration(done.seconds)}")
    if counts is not None:
        verdict = "it is warm" if not (counts.compiled or counts.tuned) else "NOT warm"
        lines.append(
            f"a fresh process that called each with every number of tokens compiled"
            f" {counts.compiled}, tuned {counts.tuned} and loaded {counts.loaded}: {verdict}"
        )
    return "\n".join(lines)
