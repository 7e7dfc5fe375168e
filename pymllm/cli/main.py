"""Entry point: parses the command line, runs a command, turns errors into one line."""

from __future__ import annotations

import argparse
import os
import sys
import traceback
import warnings
from collections.abc import Sequence
from typing import Any, NoReturn

from pymllm import __version__
from pymllm.cli import bench, demo, doctor, explain, run, tune, warmup
from pymllm.cli.report import one_line, print_json

OK = 0
FAILED = 1
BAD_INPUT = 2
INTERRUPTED = 130

DESCRIPTION = """\
Quantized linear layers (W4A16, W8A8 int8) from compressed-tensors checkpoints.

  pymllm doctor                    what works on this machine, and what is missing
  pymllm demo                      a small checkpoint, written, loaded and run
  pymllm explain CHECKPOINT_DIR    which kernel would run each layer, and why
  pymllm run CHECKPOINT_DIR        time and error of each layer of a checkpoint
  pymllm tune CHECKPOINT_DIR       the fastest configurations for this GPU, found once
  pymllm warmup CHECKPOINT_DIR     tunes and compiles what it needs, before it is served
  pymllm bench                     our kernels beside torch's and other libraries', on this machine
"""


class UsageError(ValueError):
    """The command line itself is wrong."""


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are exceptions, so that ``--json`` can report them."""

    def __init__(self, **options: Any) -> None:
        # Abbreviated, `--json` would not be seen when an error is reported.
        super().__init__(allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message} (see {self.prog} --help)")


def build_parser() -> Parser:
    """The parser of all commands; each command sets ``handler``."""
    parser = Parser(
        prog="pymllm",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"pymllm {__version__}")
    commands = parser.add_subparsers(
        title="commands", metavar="COMMAND", dest="command", required=True
    )
    for command in (doctor, demo, explain, run, bench, tune, warmup):
        command.add_parser(commands)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command.

    Returns:
        The exit code: 0, 2 on bad input, 1 when something does not work on this machine.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    with warnings.catch_warnings():
        warnings.showwarning = _show_warning
        try:
            parsed = build_parser().parse_args(arguments)
            code = int(parsed.handler(parsed))
            sys.stdout.flush()
            return code
        except BrokenPipeError:
            # The reader of a pipe left early (`| head`): no error; spare the flush at exit, too.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return OK
        except KeyboardInterrupt:
            print("pymllm: interrupted", file=sys.stderr)
            return INTERRUPTED
        except (ValueError, OSError) as error:
            return _report(one_line(error), BAD_INPUT, arguments)
        except Exception as error:  # noqa: BLE001  e.g. a compiler that Triton does not find
            if "--verbose" in arguments:
                traceback.print_exc()
            hint = "pymllm doctor checks this machine, --verbose shows the traceback"
            message = f"{type(error).__name__}: {one_line(error)} ({hint})"
            return _report(message, FAILED, arguments)


def _report(message: str, code: int, arguments: Sequence[str]) -> int:
    print(f"pymllm: error: {message}", file=sys.stderr)
    if "--json" in arguments:
        print_json({"error": message})
    return code


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: object = None,
    line: str | None = None,
) -> None:
    text = f"pymllm: warning: {' '.join(str(message).split())}"
    # On a terminal it takes the place of the line that shows progress.
    print("\r" + text.ljust(79) if sys.stderr.isatty() else text, file=sys.stderr)
