"""One process of :func:`pymllm.bench.autotune.compile_side_by_side`.

``python -m pymllm.bench.precompile TASK``; ``TASK`` is JSON: ``{"provider": name, "options": {...},
"jobs": [[scheme, n, k, group, dtype, device, [m, ...]], ...], "plan": [limit, failed, tiles], "index": int,
"count": int}``. The last line printed is the JSON list of candidates that do not compile.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import torch

from pymllm.bench.autotune import Plan, compiling
from pymllm.bench.providers import PROVIDERS
from pymllm.bench.providers.base import Job, Provider


def compile_share(
    provider: Provider, jobs: list[Job], plan: Plan, index: int, count: int
) -> list[str]:
    """Compiles every ``count``-th candidate of all calls; returns those that do not compile."""
    with torch.no_grad(), compiling(plan, index, count) as failed:
        for job in jobs:
            work = job.workload()
            (call,) = provider.build(work, 1)
            for m in job.tokens:
                call(work.inputs.new_zeros(m, work.k))
            del work, call
    return failed


def main() -> None:
    """Does the task of the command line."""
    task: dict[str, Any] = json.loads(sys.argv[1])
    provider = next(p for p in PROVIDERS if p.name == task["provider"])
    provider.configure(**task["options"])
    jobs = [Job.from_json(entry) for entry in task["jobs"]]
    plan = Plan.from_json(task["plan"])
    print(json.dumps(compile_share(provider, jobs, plan, task["index"], task["count"])))


if __name__ == "__main__":
    main()
