"""What an operation tells the tuner and the lookup about its configurations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from typing import TYPE_CHECKING, Any, ClassVar

from pymllm_kernels.device import DeviceFacts
from pymllm_kernels.tuning.keys import TuningKey

if TYPE_CHECKING:
    from pymllm_kernels.problem import LinearProblem

Config = Any
"""A frozen dataclass of integers and booleans."""

_KERNEL = "kernel"


class Tunable:
    """An operation with configurations to choose from.

    Attributes:
        operation: its name, that of the ``LinearKernel``.
        kernels: the classes of its configurations by the name that stands for each in JSON.
        sources: ``"package.module:function"`` of every kernel it launches, for the hash.
    """

    operation: str = ""
    kernels: ClassVar[Mapping[str, type]] = {}
    sources: tuple[str, ...] = ()

    def key_of(self, problem: LinearProblem) -> TuningKey:
        """The key of a layer."""
        raise NotImplementedError

    def like(self, key: TuningKey) -> TuningKey | None:
        """The key of a layer with almost the same times, whose shipped configurations serve this one."""
        return None

    def rule(self, key: TuningKey, m: int, facts: DeviceFacts) -> Config:
        """The configuration by rule, never measured on this machine.

        Raises:
            ValueError: none is valid.
        """
        raise NotImplementedError

    def candidates(self, key: TuningKey, m: int, facts: DeviceFacts) -> Sequence[Config]:
        """Valid configurations, the likely best first; the first is the rule's."""
        raise NotImplementedError

    def why_invalid(self, config: Config, key: TuningKey, m: int, facts: DeviceFacts) -> str | None:
        """``None`` if ``m`` tokens can be run with this configuration, else the reason."""
        raise NotImplementedError

    def adapt(self, config: Config, key: TuningKey, m: int, facts: DeviceFacts) -> Config:
        """A configuration tuned for the bucket as exactly ``m`` tokens take it."""
        return config

    def borrowed(self, config: Config, key: TuningKey, m: int, facts: DeviceFacts) -> Config:
        """What a layer takes to which the layer of :meth:`like` lends a configuration."""
        return config

    def to_json(self, config: Config) -> dict[str, Any]:
        """The configuration as JSON values, with the name of its class."""
        for name, cls in self.kernels.items():
            if type(config) is cls:
                found: Any = config
                return {_KERNEL: name, **asdict(found)}
        raise ValueError(f"config: found {config!r}, accepted {self._accepted()}")

    def from_json(self, document: Mapping[str, Any]) -> Config:
        """What :meth:`to_json` made.

        Raises:
            ValueError: a field is missing, unknown or of another type.
        """
        given = dict(document)
        name = given.pop(_KERNEL, None)
        cls = self.kernels.get(name) if isinstance(name, str) else None
        if cls is None:
            raise ValueError(f"config: found kernel {name!r}, accepted {list(self.kernels)}")
        expected: dict[str, Any] = {field.name: field.type for field in fields(cls)}
        if given.keys() != expected.keys():
            raise ValueError(f"config: found fields {sorted(given)}, accepted {sorted(expected)}")
        for field, kind in expected.items():
            # Annotations are text; bool is an int, but not the other way round.
            if type(given[field]).__name__ != kind:
                raise ValueError(f"config: {field}: found {given[field]!r}, accepted {kind}")
        return cls(**given)

    def _accepted(self) -> list[str]:
        return [cls.__name__ for cls in self.kernels.values()]
