"""Putting checkpoint tensors into a layer, and moving a layer that is ready to run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from pymllm.layers.parameter import (
    DtypeRule,
    Form,
    LoadRule,
    check_form,
    place_of,
    set_weight_attrs,
)


class TensorLoader:
    """The loading half of a linear layer; mixed into an ``nn.Module``.

    A *shard* is one of the logical weights of a merged layer. ``shard_id`` is its number or
    its name; None means that the tensor covers the whole layer.
    """

    output_partition_sizes: list[int]
    shard_names: tuple[str, ...] = ()

    def weight_loader(
        self, param: torch.Tensor, loaded: torch.Tensor, shard_id: int | str | None = None
    ) -> None:
        """Copy a checkpoint tensor into the place of ``param`` it belongs to.

        Args:
            param: a parameter of this layer that has a ``load_rule``.
            loaded: the checkpoint tensor, on any device.
            shard_id: number or name of a logical weight, or None for the whole layer.

        Raises:
            ValueError: dtype, shape or values do not fit; the message names layer, tensor,
                what was found and what was expected.
        """
        module = self._module()
        name = _name_of(module, param)
        rule: LoadRule = _rule_of(module, name, param)
        index = self.shard_index(shard_id)
        sizes = self.output_partition_sizes
        forms = rule.forms(param, sizes, index)
        check_form(place_of(module), name, loaded.dtype, loaded.shape, forms)
        done = self.loaded_shards.setdefault(name, set())
        first = not done or index is None
        target = _fit(module, name, param, rule, loaded, first)
        try:
            with torch.no_grad():
                rule.store(target, loaded, sizes, index, first)
        except ValueError as error:
            raise ValueError(f"{place_of(module)}: {name}: {error}") from None
        done.update(range(len(sizes)) if index is None else (index,))

    def load_tensor(
        self, name: str, loaded: torch.Tensor, shard_id: int | str | None = None
    ) -> None:
        """Load a checkpoint tensor by its name in the layer, e.g. ``weight_scale``.

        A tensor that the layer's scheme has no use for is accepted where its values are without
        effect (symmetric zero points, groups of neighbouring inputs).

        Raises:
            ValueError: as :meth:`weight_loader`, or the layer has no such tensor.
        """
        module = self._module()
        param: Any = module._parameters.get(name)
        if param is not None:
            _rule_of(module, name, param)
            param.weight_loader(param, loaded, shard_id)
            return
        self.check_tensor(name, loaded.dtype, loaded.shape, shard_id)
        try:
            _scheme_of(module).check_stray(module, name, loaded, self.shard_index(shard_id))
        except ValueError as error:
            raise ValueError(f"{place_of(module)}: {name}: {error}") from None

    def check_tensor(
        self,
        name: str,
        dtype: torch.dtype,
        shape: Sequence[int],
        shard_id: int | str | None = None,
    ) -> None:
        """Check that a tensor of this name, dtype and shape belongs here, without reading it.

        Raises:
            ValueError: it does not; the message names layer, tensor, found and expected.
        """
        module = self._module()
        index = self.shard_index(shard_id)
        param = module._parameters.get(name)
        forms: Sequence[Form] = ()
        if param is not None:
            rule = _rule_of(module, name, param)
            forms = rule.forms(param, self.output_partition_sizes, index)
        elif (scheme := _scheme_of(module)) is not None:
            forms = scheme.stray_forms(module, name, index)
        if not forms:
            known = [name for name, value in module._parameters.items() if value is not None]
            found = Form((dtype,), tuple(shape))
            raise ValueError(
                f"{place_of(module)}: {name}: found an unexpected tensor {found}, "
                f"expected only {known}"
            )
        check_form(place_of(module), name, dtype, shape, forms)

    def missing_tensors(self) -> list[tuple[str, int]]:
        """Parameter name and shard number of everything that has not been loaded yet."""
        return [
            (name, index)
            for name, param in self._module()._parameters.items()
            if param is not None and getattr(param, "load_rule", None) is not None
            for index in range(len(self.output_partition_sizes))
            if index not in self.loaded_shards.get(name, ())
        ]

    @property
    def loaded_shards(self) -> dict[str, set[int]]:
        """Parameter name -> numbers of the shards loaded so far."""
        shards: dict[str, set[int]] = self.__dict__.setdefault("_loaded_shards", {})
        return shards

    def shard_index(self, shard_id: int | str | None) -> int | None:
        """Number of a shard given by number or name (``q`` stands for ``q_proj``).

        Raises:
            ValueError: the layer has no such shard.
        """
        if shard_id is None or (shard_id == 0 and len(self.output_partition_sizes) == 1):
            return None
        if isinstance(shard_id, str):
            for index, name in enumerate(self.shard_names):
                if shard_id in (name, name.removesuffix("_proj")):
                    return index
        elif 0 <= shard_id < len(self.output_partition_sizes):
            return shard_id
        accepted = [*range(len(self.output_partition_sizes)), *self.shard_names]
        raise ValueError(
            f"{place_of(self._module())}: shard_id: found {shard_id!r}, accepted {accepted}"
        )

    def _module(self) -> nn.Module:
        assert isinstance(self, nn.Module)
        return self


@dataclass
class DeviceMove:
    """A processed layer changing device: checked before anything moves, finished after."""

    layer: nn.Module
    choice: Any

    @staticmethod
    def plan(layer: nn.Module, fn: Callable[[torch.Tensor], torch.Tensor]) -> DeviceMove | None:
        """What has to be done if ``fn`` moves the layer; None if nothing.

        Raises:
            ValueError: the layer cannot run there as it has been prepared.
        """
        scheme = _scheme_of(layer)
        if getattr(layer, "kernel_choice", None) is None or scheme is None:
            return None
        old = next(p.device for p in layer._parameters.values() if p is not None)
        new = fn(torch.empty(0, dtype=torch.int8, device=old)).device
        if new == old or "meta" in (new.type, old.type):
            return None
        return DeviceMove(layer, scheme.choice_after_move(layer, new))

    def finish(self) -> None:
        """Make the moved layer run with the kernel chosen for its new device."""
        _scheme_of(self.layer).finish_move(self.layer, self.choice)


def _scheme_of(layer: nn.Module) -> Any:
    return getattr(getattr(layer, "quant_method", None), "scheme", None)


def _name_of(layer: nn.Module, param: torch.Tensor) -> str:
    for name, candidate in layer._parameters.items():
        if candidate is param:
            return name
    raise ValueError(
        f"{place_of(layer)}: found a parameter of another layer, "
        f"expected one of {list(layer._parameters)}"
    )


def _rule_of(layer: nn.Module, name: str, param: torch.Tensor) -> LoadRule:
    rule: LoadRule | None = getattr(param, "load_rule", None)
    if rule is None:
        raise ValueError(
            f"{place_of(layer)}: {name}: found weights already processed for a kernel, "
            "expected a layer that has not been: tensors are loaded once"
        )
    return rule


def _fit(
    layer: nn.Module,
    name: str,
    param: torch.Tensor,
    rule: LoadRule,
    loaded: torch.Tensor,
    first: bool,
) -> torch.Tensor:
    """The tensor to copy into: off the meta device, and in a dtype that rounds nothing."""
    dtype = param.dtype
    if rule.dtype_rule is DtypeRule.ADOPT:
        dtype = loaded.dtype if first else torch.promote_types(dtype, loaded.dtype)
    if param.is_meta:
        real = torch.empty_like(param, dtype=dtype, device=loaded.device)
        replacement = nn.Parameter(real, requires_grad=False)
        set_weight_attrs(replacement, vars(param))
        layer.register_parameter(name, replacement)
        return replacement.data
    if dtype != param.dtype:
        # Nothing to convert before the first shard: only the memory's dtype changes.
        param.data = torch.empty_like(param, dtype=dtype) if first else param.data.to(dtype)
    return param.data
