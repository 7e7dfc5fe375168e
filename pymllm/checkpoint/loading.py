"""Loading a checkpoint's quantized linear layers."""

from __future__ import annotations

from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import torch

from pymllm.checkpoint.planning import LayerPlan, plan_linears
from pymllm.checkpoint.reader import Checkpoint
from pymllm.layers.linear import Linear
from pymllm.quantization.methods.compressed_tensors import CompressedTensorsConfig
from pymllm_kernels import device_facts


def load_linears(
    checkpoint_dir: str | Path,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | str | None = None,
    kernel: str | None = None,
    strict: bool = False,
    names: Collection[str] | None = None,
    progress: Callable[[int, int, str], None] | None = None,
) -> dict[str, Linear]:
    """Load every quantized linear layer of a compressed-tensors checkpoint, ready to run.

    All layers are checked before the first is loaded. Then each is read, converted for its
    kernel and done with before the next: the device holds at most the final layers and the
    packed weight of one.

    Args:
        checkpoint_dir: folder with ``config.json`` and ``model.safetensors``, or shards with
            their index.
        device: where the layers go; CUDA if there is one, else the CPU, if None.
        dtype: dtype of activations that kernels are chosen for (bfloat16, float16, float32);
            what ``config.json`` says, else bfloat16, if None.
        kernel: name of a kernel to force on the layers whose scheme it runs; the other layers
            choose as usual.
        strict: refuse, rather than warn of, layers that the config claims but that are stored
            without quantization.
        names: load only these layers.
        progress: called as ``progress(done, total, name)`` after each layer.

    Returns:
        Layer name -> layer, ordered by name with numbers in numeric order.

    Raises:
        ValueError: a file is missing or damaged, the config describes what cannot be executed,
            a tensor is missing, unexpected, misshapen or of a wrong dtype, or no kernel runs a
            layer; the message names file or layer and tensor, what was found and expected.
    """
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(device)
    layers: dict[str, Linear] = {}
    with Checkpoint(checkpoint_dir) as checkpoint:
        plan = plan_linears(
            checkpoint,
            device_facts(device),
            dtype=dtype,
            kernel=kernel,
            strict=strict,
            names=names,
        )
        for layer_plan in plan.layers:
            layers[layer_plan.name] = _load(checkpoint, plan.config, layer_plan, device)
            if progress is not None:
                progress(len(layers), len(plan.layers), layer_plan.name)
    return layers


def _load(
    checkpoint: Checkpoint,
    config: CompressedTensorsConfig,
    plan: LayerPlan,
    device: torch.device,
) -> Linear:
    layer = plan.build(config, device)
    for suffix in plan.tensors:
        layer.load_tensor(suffix, checkpoint.read(f"{plan.name}.{suffix}"))
    method: Any = layer.quant_method
    for suffix in plan.left_out:
        method.scheme.fill_left_out(layer, suffix)
    method.process_weights_after_loading(layer)
    return layer
