"""Writes a checkpoint with the compressed-tensors library itself, one layer a scheme.

``pymllm run`` on it shows that what the library writes is what we run; the records in
``bench/results/run_library_checkpoint_*`` come from it.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from compressed_tensors.compressors import ModelCompressor
from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config
from compressed_tensors.quantization.utils import calculate_qparams
from safetensors.torch import save_file
from torch import nn

INT8_INPUTS = {"num_bits": 8, "strategy": "token", "dynamic": True}


def weights(bits: int = 4, group_size: int | None = 128, symmetric: bool = True) -> dict[str, Any]:
    """Weight arguments of a config group."""
    strategy = "channel" if group_size is None else "group"
    return {
        "num_bits": bits,
        "symmetric": symmetric,
        "strategy": strategy,
        "group_size": group_size,
    }


# name -> (N, K, weights, input activations); K = 2112 and N = 1000 divide little.
LAYERS: dict[str, tuple[int, int, dict[str, Any], dict[str, Any] | None]] = {
    "q_proj": (4096, 4096, weights(), None),
    "k_proj": (1024, 4096, weights(group_size=32, symmetric=False), None),
    "o_proj": (2048, 4096, weights(group_size=None), None),
    "up_proj": (2112, 4096, weights(bits=8), None),
    "down_proj": (4096, 2112, weights(group_size=64), None),
    "gate_proj": (1000, 4096, weights(bits=8, group_size=None), INT8_INPUTS),
}


def main() -> None:
    """Quantizes random layers and saves them as the library does."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory", type=Path)
    directory: Path = parser.parse_args().directory
    directory.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    linears = {name: nn.Linear(k, n, bias=name == "q_proj") for name, (n, k, *_) in LAYERS.items()}
    model = nn.ModuleDict(linears | {"lm_head": nn.Linear(4096, 256, bias=False)})
    model.to(torch.bfloat16)
    groups = {
        f"group_{index}": {"targets": [name], "weights": args, "input_activations": inputs}
        for index, (name, (_, _, args, inputs)) in enumerate(LAYERS.items())
    }
    config = QuantizationConfig(config_groups=groups, ignore=["lm_head"])
    apply_quantization_config(model, config)
    for name in LAYERS:
        module: Any = model[name]
        args = module.quantization_scheme.weights
        grouped = module.weight.unflatten(1, (-1, args.group_size or module.in_features))
        scale, zero = calculate_qparams(grouped.amin(-1), grouped.amax(-1), args)
        module.weight_scale.data = scale
        if hasattr(module, "weight_zero_point"):
            module.weight_zero_point.data = zero
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    save_file(tensors, directory / "model.safetensors")
    (directory / "config.json").write_text(json.dumps({"torch_dtype": "bfloat16"}))
    compressor.update_config(directory)


if __name__ == "__main__":
    main()
