"""Layer shapes worth timing: the standard eight, those of known models, small ones for CPUs."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import NamedTuple


class Layer(NamedTuple):
    """A linear layer of a model: its name and ``[n, k]``."""

    name: str
    n: int
    k: int


Shape = tuple[int, int]

SHAPES: tuple[Shape, ...] = (
    (4096, 4096),
    (6144, 4096),
    (4096, 14336),
    (8192, 8192),
    (10240, 8192),
    (28672, 4096),
    (8192, 28672),
    (57344, 8192),
)
"""(N, K): projections of 8B and 70B Llamas, alone and fused."""

TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
CPU_SHAPES: tuple[Shape, ...] = ((1024, 1024), (3072, 1024), (1024, 3072))
CPU_TOKENS = (1, 16, 128)
TUNED_SHAPES: tuple[Shape, ...] = ((4096, 4096), (28672, 4096))
"""Where peers that tune for minutes a shape are timed unless asked for more."""


class _Config(NamedTuple):
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_size: int


# hidden_size, intermediate_size, num_attention_heads, num_key_value_heads, head_dim of config.json
_MODELS = {
    "llama-3-8b": _Config(4096, 14336, 32, 8, 128),
    "llama-3-70b": _Config(8192, 28672, 64, 8, 128),
    "qwen3-8b": _Config(4096, 12288, 32, 8, 128),
    "qwen3-32b": _Config(5120, 25600, 64, 8, 128),
    "qwen3-14b": _Config(5120, 17408, 40, 8, 128),
    "qwen3-4b": _Config(2560, 9728, 32, 8, 128),
    "mistral-7b": _Config(4096, 14336, 32, 8, 128),
    "mistral-small-24b": _Config(5120, 32768, 32, 8, 128),
    "gemma-3-27b": _Config(5376, 21504, 32, 16, 128),
    "gemma-3-12b": _Config(3840, 15360, 16, 8, 256),
    "gemma-2-9b": _Config(3584, 14336, 16, 8, 256),
    "gemma-2-27b": _Config(4608, 36864, 32, 16, 128),
    "qwen3-1.7b": _Config(2048, 6144, 16, 8, 128),
    "qwen3-0.6b": _Config(1024, 3072, 16, 8, 128),
    "gemma-3-4b": _Config(2560, 10240, 8, 4, 256),
    "mistral-nemo-12b": _Config(5120, 14336, 32, 8, 128),
    "gemma-2-2b": _Config(2304, 9216, 8, 4, 256),
    "gemma-3-1b": _Config(1152, 6912, 4, 1, 256),
}
MODELS = tuple(_MODELS)
"""Known models, those whose shapes are tuned first in front."""
PARALLEL = (1, 2, 4, 8)
"""Over how many GPUs a layer is usually cut (tensor parallelism)."""


def model_layers(name: str, fused: bool | None = None, parallel: int = 1) -> list[Layer]:
    """Linear layers of one block, as one GPU has them.

    Args:
        name: one of ``MODELS``.
        fused: q/k/v and gate/up as one layer each (True), one by one (False), or both (None).
        parallel: GPUs that share each layer: outputs of q/k/v and gate/up are cut, inputs of the
            others; with fewer key heads than GPUs each has a whole one.

    Raises:
        ValueError: the model is not known (the message lists those that are), or cannot be cut so.
    """
    if name not in _MODELS:
        raise ValueError(f"model: found {name!r}, accepted {list(MODELS)}")
    c = _MODELS[name]
    if parallel < 1 or c.heads % parallel or c.intermediate % parallel:
        raise ValueError(
            f"parallel: found {parallel}, accepted divisors of {c.heads} heads and"
            f" {c.intermediate} intermediate features ({name})"
        )
    q, kv = c.heads // parallel * c.head_size, max(c.kv_heads // parallel, 1) * c.head_size
    c = c._replace(intermediate=c.intermediate // parallel)
    together = [
        Layer("qkv_proj", q + 2 * kv, c.hidden),
        Layer("gate_up_proj", 2 * c.intermediate, c.hidden),
    ]
    alone = [
        Layer("q_proj", q, c.hidden),
        Layer("k_proj, v_proj", kv, c.hidden),
        Layer("gate_proj, up_proj", c.intermediate, c.hidden),
    ]
    outputs = [Layer("o_proj", c.hidden, q), Layer("down_proj", c.hidden, c.intermediate)]
    if fused is None:
        return [*together, *outputs, *alone]
    return [*(together if fused else alone), *outputs]


def model_shapes(name: str, fused: bool | None = True, parallel: int = 1) -> list[Shape]:
    """The different (N, K) of a model, in the order of :func:`model_layers`."""
    return list(dict.fromkeys((layer.n, layer.k) for layer in model_layers(name, fused, parallel)))


def popular_shapes(parallel: Sequence[int] = PARALLEL) -> list[Shape]:
    """The different (N, K) of all models, fused and not, the most used first: whole layers, then cut."""
    found = []
    for degree in parallel:
        for name in MODELS:
            # A model with fewer heads than GPUs is not cut so far.
            with contextlib.suppress(ValueError):
                found += model_shapes(name, None, degree)
    return list(dict.fromkeys(found))


def parse_shape(text: str) -> Shape:
    """``4096x4096`` (or with a multiplication sign) as (N, K).

    Raises:
        ValueError: it is not two positive integers.
    """
    parts = text.lower().replace("×", "x").split("x")  # noqa: RUF001  the sign people copy
    if len(parts) != 2 or not all(part.strip().isdecimal() and int(part) for part in parts):
        raise ValueError(f"shape: found {text!r}, accepted NxK such as 4096x4096")
    return int(parts[0]), int(parts[1])
