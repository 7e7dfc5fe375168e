"""``pymllm tune``: finds configurations by timing, and keeps, shows, exports and imports them."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pymllm.cli.bench import SCHEMES, shapes_of
from pymllm.cli.report import Progress, add_output_options, counted, format_table, print_json
from pymllm.cli.run import DTYPE_NAMES, positive, token_counts
from pymllm.text import duration

if TYPE_CHECKING:
    from pymllm.bench.shapes import Shape
    from pymllm.tuning import Report
    from pymllm_kernels import DeviceFacts, LinearProblem
    from pymllm_kernels.tuning.store import Store

DESCRIPTION = """\
Times the likely configurations of each layer and number of tokens on the GPU here, and keeps the
choice: later runs use it. Nothing is ever tuned on a user's call. What is there is not timed again;
interrupted, the same command goes on where it was.

  pymllm tune ./model                   the layers of a checkpoint
  pymllm tune --shapes 4096x4096,...    layers of these outputs x inputs
  pymllm tune --model llama-3-8b        layers of known models; "all" for every one
  pymllm tune show                      what is tuned, for which GPU
  pymllm tune export FILE               everything tuned for the GPU here, as a lock file
  pymllm tune import FILE               use exactly that, before everything else
  pymllm tune import --remove           no longer
"""
EPILOG = """\
examples:
  pymllm tune ./model --tp 2 --tokens 1,2,4,8,16,32,64
  pymllm tune --shapes 4096x4096 --scheme w4a16 --group-size 64 --dtype float16
  pymllm tune import lock.json --strict         a layer that is not in it is an error

Results lie in $PYMLLM_TUNING_DIR, else in pymllm/tuning of the user's cache.
"""
ACTIONS = ("export", "import", "show")
_SHOWN_FAILURES = 10


def add_parser(commands: Any) -> None:
    """Adds the command to the ``pymllm`` parser."""
    parser = commands.add_parser(
        "tune",
        help="find the fastest configurations for this GPU, once",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "what", nargs="?", metavar="CHECKPOINT_DIR",
        help="a checkpoint (./show for a folder of that name), or export, import, show",
    )  # fmt: skip
    parser.add_argument("file", nargs="?", type=Path, metavar="FILE", help="of export and import")
    layers = parser.add_argument_group("which layers")
    layers.add_argument("--shapes", type=shapes_of, metavar="NxK,...")
    layers.add_argument(
        "--model", metavar="NAME,...", help="such as llama-3-8b; all: every known model"
    )
    layers.add_argument(
        "--tokens", type=token_counts, metavar="M,M,...",
        help="each stands for the next power of two (default: all of them up to 8192)",
    )  # fmt: skip
    layers.add_argument(
        "--tp", type=token_counts, default=(1,), metavar="N,N,...",
        help="GPUs over which a checkpoint's or model's layers are cut, such as 1,2 (default: 1)",
    )  # fmt: skip
    layers.add_argument("--scheme", choices=list(SCHEMES), help="default: both")
    layers.add_argument(
        "--group-size", type=int, metavar="G",
        help="inputs a scale of w4a16, -1 for all (default: 128)",
    )  # fmt: skip
    layers.add_argument(
        "--dtype", choices=DTYPE_NAMES[:2],
        help="of activations (default: bfloat16, or the checkpoint's)",
    )  # fmt: skip
    how = parser.add_argument_group("how")
    how.add_argument("--all", action="store_true", help="time again what is there, too")
    how.add_argument(
        "--best", type=positive, metavar="N", help="candidates timed, the likely best (default: 12)"
    )
    how.add_argument(
        "--time-limit", type=positive, metavar="SECONDS", help="begin nothing further after that"
    )
    how.add_argument("--device", help="cuda or cuda:INDEX (default: the GPU here)")
    how.add_argument(
        "--shipped-table", type=Path, metavar="FILE",
        help="write FILE, in the form of the tables in this package, rather than the user's store",
    )  # fmt: skip
    lock = parser.add_argument_group("import")
    lock.add_argument(
        "--strict", action="store_true", help="a layer that is not in the file is an error"
    )
    lock.add_argument("--remove", action="store_true", help="remove the imported file")
    add_output_options(parser)
    parser.set_defaults(handler=execute)


def execute(options: argparse.Namespace) -> int:
    """Runs the command."""
    if options.what in ACTIONS:
        return _ACTIONS[options.what](options)
    _refuse(options, "strict", "remove", "file")
    with Progress(options.verbose) as progress:
        progress.step("loading torch")
        from pymllm.cli.devices import best_device
        from pymllm.tuning import tune
        from pymllm.tuning.tune import ALL, BEST, MISSING
        from pymllm_kernels import device_facts
        from pymllm_kernels.tuning import BUCKETS, state

        device = best_device(options.device or "cuda")
        if device.type != "cuda":
            raise ValueError(
                f"device: found {device}, accepted a GPU: timings of others say nothing"
            )
        facts = device_facts(device)
        problems = problems_of(options, facts)
        store = None if options.shipped_table is None else _table_store(options.shipped_table)
        report = tune(
            problems, options.tokens or BUCKETS, mode=ALL if options.all else MISSING, device=device,
            best=options.best or BEST, time_limit_s=options.time_limit, progress=progress.step,
            store=store, keep_timings=store is None,
        )  # fmt: skip
        path = (store or state.store()).path
    told = {"device": facts.name, "store": None if path is None else str(path)}
    if options.json:
        print_json({**told, **_report_json(report)})
    else:
        print(text_of(report, facts, path))
        if store is None and state.lock() is not None:
            print("pymllm: warning: an imported lock file comes before these results "
                  "(pymllm tune import --remove)", file=sys.stderr)  # fmt: skip
    return 0 if not report.failures else 1


def problems_of(options: argparse.Namespace, facts: DeviceFacts) -> list[LinearProblem]:
    """The layers that the command line asks for.

    Raises:
        ValueError: it asks for none, or in two ways.
    """
    import torch

    from pymllm.tuning import checkpoint_problems, shape_problems

    asked = [name for name in ("what", "shapes", "model") if getattr(options, name) is not None]
    if len(asked) != 1:
        raise ValueError(
            f"found {len(asked)} of CHECKPOINT_DIR, --shapes and --model, accepted one of them "
            "(or export, import, show: see pymllm tune --help)"
        )
    if options.what is not None:
        for name in ("scheme", "group_size"):
            _refuse(options, name)
        return checkpoint_problems(options.what, facts, dtype=options.dtype, parallel=options.tp)
    shapes = options.shapes or shapes_of_models(options.model, options.tp)
    return shape_problems(
        shapes, facts,
        schemes=SCHEMES[options.scheme or "both"],
        group_size=options.group_size or 128,
        dtype=getattr(torch, options.dtype or "bfloat16"),
    )  # fmt: skip


def shapes_of_models(names: str, parallel: Sequence[int]) -> list[Shape]:
    """The shapes of ``llama-3-8b,qwen3-8b`` or of ``all`` models, fused and not, cut as asked.

    Raises:
        ValueError: a model is not known, or cannot be cut so.
    """
    from pymllm.bench.shapes import model_shapes, popular_shapes

    if names == "all":
        return popular_shapes(parallel)
    found = [
        shape
        for degree in parallel
        for name in names.split(",")
        for shape in model_shapes(name.strip(), None, degree)
    ]
    return list(dict.fromkeys(found))


def _table_store(path: Path) -> Store:
    from pymllm_kernels.tuning.store import Store

    return Store(path.absolute().parent, name=path.name)


def _refuse(options: argparse.Namespace, *names: str) -> None:
    for name in names:
        if getattr(options, name) not in (None, False):
            option = "FILE" if name == "file" else f"--{name.replace('_', '-')}"
            raise ValueError(f"{option}: not accepted here (see pymllm tune --help)")


def _report_json(report: Report) -> dict[str, Any]:
    return {
        "tuned": [result.as_json() for result in report.results],
        "present": report.present,
        "failures": report.failures,
        "untunable": report.untunable,
        "left": report.left,
        "complete": not report.left and not report.failures,
        "seconds": round(report.seconds, 1),
    }


def text_of(report: Report, facts: DeviceFacts, path: Path | None) -> str:
    """The report for people."""
    lines = []
    if report.results:
        rows = []
        for result in report.results:
            key, us, rule = result.key, result.entry.median_us, result.rule_us
            gain = "-" if rule is None else f"{rule / us:.2f}"
            group = "" if key.group_size == -1 else str(key.group_size)
            rows.append(
                (key.operation, f"{key.n} x {key.k}", group, f"{key.dtype} {key.variant}".strip(),
                 result.m, f"{us:.1f}", gain)
            )  # fmt: skip
        titles = ("kernel", "N x K", "group", "dtype", "M up to", "us", "rule/us")
        lines += [format_table(titles, rows, right=("group", "M up to", "us", "rule/us")), ""]
    lines.append(
        f"{counted(len(report.results), 'configuration')} found for {facts.name} in"
        f" {duration(report.seconds)}, {report.present} were there; kept in {path or 'memory'}"
    )
    if report.left:
        lines.append(f"{report.left} left: the time was over; the same command goes on")
    for layer, kernel in report.untunable.items():
        lines.append(f"{layer}: {kernel} has nothing to tune")
    for layer, reason in list(report.failures.items())[:_SHOWN_FAILURES]:
        lines.append(f"{layer}: not tuned: {reason}")
    unfit = sum(len(result.unfit) for result in report.results)
    if unfit:
        lines.append(f"{unfit} candidates do not run or are wrong (--json names them)")
    return "\n".join(lines)


def _facts(options: argparse.Namespace) -> DeviceFacts:
    from pymllm.cli.devices import best_device
    from pymllm_kernels import device_facts

    return device_facts(best_device(options.device))


def _export(options: argparse.Namespace) -> int:
    from pymllm.tuning.locking import export_lock

    _refuse(options, "strict", "remove", "shapes", "model")
    if options.file is None:
        raise ValueError("FILE: found none, expected where to write the lock file")
    count = export_lock(options.file, _facts(options))
    if options.json:
        print_json({"file": str(options.file), "entries": count})
    else:
        print(
            f"{count} entries in {options.file}; pymllm tune import uses them, on this GPU or alike"
        )
    return 0


def _import(options: argparse.Namespace) -> int:
    from pymllm.tuning.locking import import_lock, remove_lock

    _refuse(options, "shapes", "model")
    if options.remove:
        _refuse(options, "strict", "file")
        place = remove_lock()
        document: dict[str, Any] = {"removed": str(place)}
        text = f"removed {place}"
    else:
        if options.file is None:
            raise ValueError("FILE: found none, expected a file that pymllm tune export wrote")
        place, table = import_lock(options.file, strict=options.strict)
        document = {"lock": str(place), "entries": len(table), "strict": options.strict}
        text = f"{len(table)} entries are pinned by {place}"
        text += "; other layers are an error" if options.strict else ""
    if options.json:
        print_json(document)
    else:
        print(text)
    return 0


def _show(options: argparse.Namespace) -> int:
    from dataclasses import asdict

    from pymllm_kernels.tuning import state

    _refuse(options, "strict", "remove", "shapes", "model", "file")
    facts, lock, store = _facts(options), state.lock(), state.store()
    tables = {
        "lock": lock[1] if lock else None, "store": store.table, "shipped": state.shipped(facts.name),
    }  # fmt: skip
    places = {
        "lock": str(lock[0]) if lock else None,
        "store": None if store.path is None else str(store.path),
        "shipped": str(state.table_path(facts.name)) if tables["shipped"] else None,
    }
    groups: dict[tuple[str, ...], int] = {}
    entries = []
    for origin, table in tables.items():
        for place, entry in table.items() if table else ():
            here = asdict(place.conditions)
            head = (origin, place.key.operation, *map(str, here.values()))
            groups[head] = groups.get(head, 0) + 1
            found = {k: v for k, v in asdict(entry).items() if k != "timings"}
            entries.append({"from": origin, **asdict(place.key), "m": place.m, **here, **found})
    if options.json:
        strict = lock is not None and lock[1].strict
        print_json({"files": places, "strict": strict, "entries": entries})
        return 0
    print("\n".join(f"{name}: {place or 'none'}" for name, place in places.items()))
    if groups:
        titles = ("from", "kernel", "board", "capability", "SMs", "Triton", "source", "entries")
        rows = [(*head, count) for head, count in groups.items()]
        print("\n" + format_table(titles, rows, right=("entries", "SMs")))
    return 0


_ACTIONS: Mapping[str, Callable[[argparse.Namespace], int]] = {
    "export": _export,
    "import": _import,
    "show": _show,
}
