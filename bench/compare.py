"""Two saved runs of the harness against each other; refused where it would mean nothing.

python bench/compare.py OLD/run.json NEW/run.json [--providers ours]
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from pymllm.bench.compare import compare
from pymllm.bench.run import load


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    parser.add_argument("--providers", metavar="NAME,...", help="only these")
    parser.add_argument("--show", type=int, default=20, metavar="N", help="cells that differ most")
    options = parser.parse_args()
    names = options.providers.split(",") if options.providers else None
    try:
        found = compare(load(options.old), load(options.new), names)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(
        f"{len(found.ratios)} cells in both, {found.only_old} only old, {found.only_new} only new"
    )
    if not found.ratios:
        return 0
    print(f"median new / old: {found.median_ratio:.4f}")
    for tolerance in (0.03, 0.07):
        print(f"within {tolerance:.0%}: {found.share_within(tolerance):.1%} of cells")
    for key, ratio in found.outside(0.03)[: options.show]:
        scheme, n, k, _, _, m, provider, mode, cache = key
        print(f"  {ratio:6.3f}  {scheme} {n}x{k} M={m} {provider} ({mode}, {cache})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
