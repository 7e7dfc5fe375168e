"""The configuration interface every quantization method implements, and its registry."""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    import torch

    from pymllm.layers.quantize_base import QuantizeMethodBase

ConfigT = TypeVar("ConfigT", bound="type[QuantizationConfig]")

# Methods shipped with the package, imported on the first look-up so that reading this module
# costs nothing.
_BUILTIN_MODULES = {"compressed-tensors": "pymllm.quantization.methods.compressed_tensors"}
_registry: dict[str, type[QuantizationConfig]] = {}


class QuantizationConfig(ABC):
    """Base class for quantization configurations.

    One instance is made per model load. It holds what the checkpoint says about its
    quantization and answers, layer by layer, which quantization method applies.
    """

    @abstractmethod
    def get_name(self) -> str:
        """Canonical name of the method, e.g. ``"compressed-tensors"``."""

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        """Activation dtypes the method supports; an empty list means no restriction."""
        return []

    @classmethod
    def get_min_capability(cls) -> int:
        """Smallest CUDA compute capability, as ``10 * major + minor`` (75 is sm_75).

        0 means no restriction.
        """
        return 0

    @staticmethod
    def get_config_filenames() -> list[str]:
        """Files of the checkpoint folder that may hold the configuration, in search order."""
        return ["quantize_config.json"]

    @classmethod
    @abstractmethod
    def from_config(cls, config: dict[str, Any]) -> QuantizationConfig:
        """Build the configuration from the parsed JSON object of the checkpoint.

        Args:
            config: the content of the method's own file, or the ``quantization_config``
                section of ``config.json``.

        Raises:
            ValueError: the object describes something the method does not support.
        """

    @abstractmethod
    def get_quant_method(
        self, layer: torch.nn.Module, prefix: str = ""
    ) -> QuantizeMethodBase | None:
        """Quantization method of one layer, or None for a layer that is not quantized.

        Args:
            layer: the module under construction.
            prefix: its full dotted name in the model, as the checkpoint spells it.
        """


def register_quantization(name: str) -> Callable[[ConfigT], ConfigT]:
    """Class decorator that makes a :class:`QuantizationConfig` known under ``name``.

    Raises:
        TypeError: the decorated object is not a subclass of ``QuantizationConfig``.
        ValueError: another class is registered under ``name`` already.
    """

    def register(cls: ConfigT) -> ConfigT:
        if not (isinstance(cls, type) and issubclass(cls, QuantizationConfig)):
            raise TypeError(
                f"register_quantization({name!r}): found {cls!r}; accepted: a subclass of "
                "QuantizationConfig"
            )
        # A built-in name is taken even while its module has not been imported.
        if cls.__module__ != _BUILTIN_MODULES.get(name, cls.__module__):
            _load_builtin(name)
        known = _registry.setdefault(name, cls)
        if known is not cls:
            raise ValueError(
                f"quantization method {name!r} is already registered by "
                f"{known.__module__}.{known.__qualname__}; "
                f"{cls.__module__}.{cls.__qualname__} needs another name"
            )
        return cls

    return register


def get_quantization_config(name: str) -> type[QuantizationConfig]:
    """Configuration class registered under ``name``.

    Raises:
        ValueError: no such method; the message lists the known ones.
    """
    _load_builtin(name)
    try:
        return _registry[name]
    except KeyError:
        known = ", ".join(repr(method) for method in list_quantization_methods())
        raise ValueError(f"unknown quantization method {name!r}; known: {known}") from None


def list_quantization_methods() -> list[str]:
    """Sorted names of all registered and built-in quantization methods."""
    return sorted(_BUILTIN_MODULES.keys() | _registry.keys())


def _load_builtin(name: str) -> None:
    if name in _BUILTIN_MODULES and name not in _registry:
        importlib.import_module(_BUILTIN_MODULES[name])
