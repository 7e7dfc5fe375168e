"""What all schemes share: the choice of a kernel, the processed state of a layer, the call."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from pymllm.layers.parameter import FLOAT_DTYPES, Form, LoadRule, place_of, set_weight_attrs
from pymllm_kernels import (
    DeviceFacts,
    KernelChoice,
    LinearProblem,
    WrongInputsError,
    device_facts,
    select_kernel,
)


class LinearScheme(ABC):
    """How the linear layers of one config group are stored and computed.

    A layer goes through two states. ``create_weights`` gives it the checkpoint's tensors as
    parameters. ``process_weights_after_loading`` replaces them by what a kernel reads and sets

    * ``layer.problem``: the ``LinearProblem`` the kernel was chosen for;
    * ``layer.kernel_choice``: the ``KernelChoice``, with the reasons;
    * ``layer.calls``: what multiplies, for every dtype of ``x`` the kernel takes.

    ``layer.kernel_name``, if set before, names the kernel to use.
    """

    @abstractmethod
    def problem_of(self, layer: nn.Module, device: DeviceFacts | None = None) -> LinearProblem:
        """The problem of a layer that has not been processed, on ``device`` or where it is."""

    @abstractmethod
    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Choose the kernel and replace the loaded tensors by what it reads."""

    @abstractmethod
    def weight_of(self, layer: nn.Module) -> Any:
        """The prepared weight that the kernel's ``apply`` takes."""

    @abstractmethod
    def stray_forms(self, layer: nn.Module, name: str, index: int | None) -> Sequence[Form]:
        """Forms in which a tensor without use here is tolerated; empty if it is not."""

    @abstractmethod
    def check_stray(
        self, layer: nn.Module, name: str, loaded: torch.Tensor, index: int | None
    ) -> None:
        """Check that a tolerated tensor has values without effect.

        Raises:
            ValueError: it would change the layer's output; the message leaves out the place.
        """

    def apply(
        self, layer: nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        """``x @ W.T + bias`` by the layer's kernel.

        Args:
            layer: a processed layer.
            x: ``[..., K]``, bfloat16, float16 or float32; nothing is cast for the kernel.
            bias: ``[N]``, floating, or None.

        Returns:
            ``[..., N]`` in the dtype of ``x``.

        Raises:
            ValueError: dtype or number of inputs of ``x`` does not fit, or the layer has not
                been processed; the message names the layer, what was found and expected.
        """
        owner: Any = layer
        call = owner.calls.get(x.dtype)
        if call is None:
            raise _bad_input(layer, x)
        try:
            return call(x, self.weight_of(layer), bias)  # type: ignore[no-any-return]
        except WrongInputsError:
            raise _bad_input(layer, x) from None

    def choice_after_move(self, layer: nn.Module, device: torch.device) -> KernelChoice:
        """The kernel that would run a processed layer on another device.

        Raises:
            ValueError: what the layer holds was prepared for a kernel that does not run there.
        """
        owner: Any = layer
        problem = dataclasses.replace(owner.problem, device=device_facts(device))
        return choose_kernel(layer, problem, owner.kernel_name)

    def finish_move(self, layer: nn.Module, choice: KernelChoice) -> None:
        """Take over ``choice`` after the tensors have moved."""
        owner: Any = layer
        device = self.weight_of(layer)[0].device
        problem = dataclasses.replace(owner.problem, device=device_facts(device))
        self.set_kernel(layer, problem, choice)

    def set_kernel(self, layer: nn.Module, problem: LinearProblem, choice: KernelChoice) -> None:
        """Store the choice for a layer's prepared weight, and a call for every dtype it takes."""
        owner: Any = layer
        owner.problem = problem
        owner.kernel_choice = choice
        weight, kernel = self.weight_of(layer), choice.kernel
        variants = (dataclasses.replace(problem, act_dtype=dtype) for dtype in FLOAT_DTYPES)
        owner.calls = {
            variant.act_dtype: kernel.bind(variant, weight)
            for variant in variants
            if variant == problem or kernel.why_not(variant) is None
        }


def start_layer(
    layer: nn.Module,
    params_dtype: torch.dtype,
    input_size: int,
    output_sizes: Sequence[int],
    params: Mapping[str, tuple[torch.Tensor, LoadRule, Mapping[str, int]]],
    extra: Mapping[str, Any],
) -> None:
    """Register a scheme's parameters and the attributes it reads later.

    Args:
        layer: any module.
        params_dtype: expected dtype of activations.
        input_size: K.
        output_sizes: outputs of each logical weight.
        params: name -> values, loading rule, dimension attributes.
        extra: further attributes for every parameter.
    """
    owner: Any = layer
    if params_dtype not in FLOAT_DTYPES:
        raise ValueError(
            f"{place_of(layer)}: params_dtype: found {params_dtype}, accepted {FLOAT_DTYPES}"
        )
    for name, (values, rule, dims) in params.items():
        param = nn.Parameter(values, requires_grad=False)
        set_weight_attrs(param, {"load_rule": rule, **dims, **extra})
        layer.register_parameter(name, param)
    owner.params_dtype = params_dtype
    owner.input_size_per_partition = input_size
    owner.output_partition_sizes = list(output_sizes)
    owner.kernel_name = getattr(layer, "kernel_name", None)
    owner.kernel_choice = owner.problem = None
    owner.calls = {}


def is_processed(layer: nn.Module) -> bool:
    """Whether the layer already holds what a kernel reads."""
    return getattr(layer, "kernel_choice", None) is not None


def require_loaded(layer: nn.Module) -> None:
    """Check that no parameter is left on the meta device.

    Raises:
        ValueError: one is; the message names layer and tensor.
    """
    for name, param in layer._parameters.items():
        if param is not None and param.is_meta:
            raise ValueError(
                f"{place_of(layer)}: {name}: found it on the meta device, expected a loaded tensor"
            )


def choose_kernel(layer: nn.Module, problem: LinearProblem, kernel: str | None) -> KernelChoice:
    """``select_kernel``, naming the layer in its errors."""
    try:
        return select_kernel(problem, kernel)
    except ValueError as error:
        raise ValueError(f"{place_of(layer)}: {error}") from None


def install(
    layer: nn.Module, stored: Sequence[str], prepared: Mapping[str, torch.Tensor | None]
) -> None:
    """Drop the checkpoint's parameters ``stored`` and register the prepared ones.

    The tensors are used as they are. A None is registered as an absent parameter.
    """
    for name in stored:
        layer._parameters.pop(name, None)
    for name, values in prepared.items():
        param = None if values is None else nn.Parameter(values.detach(), requires_grad=False)
        layer.register_parameter(name, param)


def _bad_input(layer: nn.Module, x: torch.Tensor) -> ValueError:
    owner: Any = layer
    place = place_of(layer)
    if owner.problem is None:
        return ValueError(
            f"{place}: found weights that are not processed, expected a call of "
            "process_weights_after_loading after loading"
        )
    kernel, problem = owner.kernel_choice.kernel, owner.problem
    accepted = " or ".join(str(dtype) for dtype in owner.calls)
    why = ""
    if x.dtype in FLOAT_DTYPES and x.dtype not in owner.calls:
        refused = kernel.why_not(dataclasses.replace(problem, act_dtype=x.dtype))
        why = f" ({kernel.name} {refused})"
    return ValueError(
        f"{place}: x: found {x.dtype} {list(x.shape)}, expected {accepted} [..., {problem.k}]{why}"
    )
