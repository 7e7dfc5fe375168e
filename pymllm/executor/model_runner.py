"""Filling a model's parameters from a checkpoint and getting its layers ready to run."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pymllm.checkpoint.planning import KV_CACHE_TENSOR, optional_tensors
from pymllm.checkpoint.reader import Checkpoint
from pymllm.layers.linear import LinearBase
from pymllm.layers.parameter import FLOAT_DTYPES, Form, check_form
from pymllm.quantization.format import DEFAULT_PACKED_MODULES_MAPPING, find_quantization_block


@dataclass(frozen=True)
class _Slot:
    """Where a checkpoint tensor goes."""

    module: nn.Module
    path: str
    suffix: str
    shard: str | None


class ModelRunner:
    """Loads a model whose linear layers may be quantized.

    The model's parameters keep their names; layers that merge several checkpoint layers are
    filled shard by shard, by their ``shard_names`` or by ``packed_modules_mapping`` of the model
    (``qkv_proj``, ``gate_up_proj`` by default).
    """

    def __init__(self, model: nn.Module) -> None:
        """Take the model; nothing is changed before :meth:`load_weights`."""
        self.model = model

    def load_weights(self, source: str | Path | Iterable[tuple[str, torch.Tensor]]) -> None:
        """Load every tensor, then process every layer that has a ``quant_method``, once.

        Scales of a kv-cache are skipped where the model has no parameter for them. Names,
        dtypes and shapes of a checkpoint folder are checked before anything is read.

        Args:
            source: a checkpoint folder, or pairs of tensor name and tensor.

        Raises:
            ValueError: a tensor is missing, unexpected, misshapen or of a wrong dtype; the
                message names module, tensor, what was found and what was expected.
        """
        loading = _Loading(self.model)
        if isinstance(source, (str, Path)):
            with Checkpoint(source) as checkpoint:
                block = find_quantization_block(checkpoint.config) or {}
                loading.optional = optional_tensors(block.get("version"))
                for name, info in checkpoint.tensors.items():
                    loading.check(name, info.dtype, info.shape)
                loading.check_complete(checkpoint.tensors)
                loading.load(checkpoint)
        else:
            loading.load(source)
        for module in self.model.modules():
            method = getattr(module, "quant_method", None)
            if method is not None:
                method.process_weights_after_loading(module)


class _Loading:
    """One pass over a checkpoint."""

    def __init__(self, model: nn.Module) -> None:
        self.optional: frozenset[str] = frozenset()
        self._modules = dict(model.named_modules(remove_duplicate=False))
        self._fused = self._find_fused(model)
        self._owners: dict[int, list[tuple[nn.Module, str]]] = {}
        for module in self._modules.values():
            for name, tensor in _own_tensors(module):
                self._owners.setdefault(id(tensor), []).append((module, name))

    def _find_fused(self, model: nn.Module) -> dict[str, tuple[str, str]]:
        """Checkpoint path of a shard -> path of the module it is part of, name of the shard."""
        mapping: Mapping[str, Sequence[str]] = getattr(
            model, "packed_modules_mapping", DEFAULT_PACKED_MODULES_MAPPING
        )
        fused = {}
        for path, module in self._modules.items():
            parent, dot, leaf = path.rpartition(".")
            shards = getattr(module, "shard_names", ()) or mapping.get(leaf, ())
            for shard in shards:
                fused[parent + dot + shard] = (path, shard)
        return fused

    def _slot(self, name: str) -> _Slot | None:
        """Where a tensor goes; None if it is to be skipped.

        Raises:
            ValueError: the model has no place for it.
        """
        path, _, suffix = name.rpartition(".")
        module = self._modules.get(path)
        if module is not None and _tensor_of(module, suffix) is not None:
            return _Slot(module, path, suffix, None)
        if KV_CACHE_TENSOR.search(name):
            return None
        if isinstance(module, LinearBase):
            return _Slot(module, path, suffix, None)
        if path in self._fused:
            fused_path, shard = self._fused[path]
            return _Slot(self._modules[fused_path], fused_path, suffix, shard)
        what = "expected no such tensor" if module is not None else "expected no such module"
        raise ValueError(f"module {path!r}: {suffix}: found an unexpected tensor, {what}")

    def check(self, name: str, dtype: torch.dtype, shape: Sequence[int]) -> None:
        """Check that a tensor has a place and fits it, without reading it."""
        slot = self._slot(name)
        if slot is None:
            return
        if isinstance(slot.module, LinearBase):
            slot.module.check_tensor(slot.suffix, dtype, shape, slot.shard)
            return
        target = _tensor_of(slot.module, slot.suffix)
        if target is None:
            raise ValueError(
                f"module {slot.path!r}: {slot.suffix}: found an unexpected tensor, "
                "expected no such tensor"
            )
        if not hasattr(target, "weight_loader"):
            _check_plain(slot, target, dtype, shape)

    def load(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Load all tensors, then check that nothing is missing."""
        seen = []
        for name, tensor in tensors:
            seen.append(name)
            self.check(name, tensor.dtype, tensor.shape)
            slot = self._slot(name)
            if slot is not None:
                self._load_one(slot, tensor)
        self.check_complete(seen)
        for path, module in self._modules.items():
            if isinstance(module, LinearBase):
                self._fill(path, module)

    def _load_one(self, slot: _Slot, loaded: torch.Tensor) -> None:
        if isinstance(slot.module, LinearBase):
            slot.module.load_tensor(slot.suffix, loaded, slot.shard)
            return
        target: Any = _tensor_of(slot.module, slot.suffix)
        if hasattr(target, "weight_loader"):
            shard = () if slot.shard is None else (slot.shard,)
            target.weight_loader(target, loaded, *shard)
            return
        if target.is_meta:
            real: torch.Tensor = torch.empty_like(target, device=loaded.device)
            if isinstance(target, nn.Parameter):
                real = nn.Parameter(real, requires_grad=target.requires_grad)
            for module, name in self._owners.pop(id(target)):
                setattr(module, name, real)
                self._owners.setdefault(id(real), []).append((module, name))
            target = real
        with torch.no_grad():
            target.copy_(loaded)

    def check_complete(self, names: Iterable[str]) -> None:
        """Check that a checkpoint with these tensor names leaves no parameter empty.

        Raises:
            ValueError: one is missing.
        """
        given: dict[tuple[str, str], set[str | None]] = {}
        for name in names:
            slot = self._slot(name)
            if slot is not None:
                given.setdefault((slot.path, slot.suffix), set()).add(slot.shard)
        filled = {
            id(_tensor_of(self._modules[path], suffix))
            for path, suffix in given
            if _tensor_of(self._modules[path], suffix) is not None
        }
        for path, module in self._modules.items():
            for suffix, tensor in _own_tensors(module):
                shards = given.get((path, suffix), set())
                if isinstance(module, LinearBase) and None not in shards:
                    self._check_linear(path, module, suffix, shards, id(tensor) in filled)
                elif id(tensor) not in filled:
                    raise _missing(path, suffix)

    def _check_linear(
        self, path: str, module: LinearBase, suffix: str, shards: set[str | None], tied: bool
    ) -> None:
        if suffix in self.optional:
            return
        if not shards and not tied:
            raise _missing(path, suffix)
        lacking = [shard for shard in module.shard_names if shard not in shards]
        if shards and lacking:
            raise _missing(path, f"{suffix} of {lacking[0]}")

    def _fill(self, path: str, module: LinearBase) -> None:
        """Values that old releases left out because they say nothing."""
        for suffix, index in module.missing_tensors():
            if suffix in self.optional:
                method: Any = module.quant_method
                method.scheme.fill_left_out(module, suffix, index)


def _own_tensors(module: nn.Module) -> list[tuple[str, torch.Tensor]]:
    """Parameters and persistent buffers of a module itself."""
    kept = [
        (name, buffer)
        for name, buffer in module._buffers.items()
        if name not in module._non_persistent_buffers_set
    ]
    return [(name, t) for name, t in (*module._parameters.items(), *kept) if t is not None]


def _tensor_of(module: nn.Module, name: str) -> torch.Tensor | None:
    return dict(_own_tensors(module)).get(name)


def _check_plain(
    slot: _Slot, target: torch.Tensor, dtype: torch.dtype, shape: Sequence[int]
) -> None:
    """A plain parameter takes its own shape; floating dtypes are converted, others are not."""
    dtypes: tuple[torch.dtype, ...] = (target.dtype,)
    if target.dtype in FLOAT_DTYPES:
        dtypes = (target.dtype, *(kept for kept in FLOAT_DTYPES if kept != target.dtype))
    form = Form(dtypes, tuple(target.shape))
    check_form(f"module {slot.path!r}", slot.suffix, dtype, shape, [form])


def _missing(path: str, tensor: str) -> ValueError:
    return ValueError(f"module {path!r}: {tensor}: found none, expected one")
