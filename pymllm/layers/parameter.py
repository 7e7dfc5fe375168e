"""How a checkpoint tensor gets into a layer's parameter.

Every parameter that a quantization method registers carries attributes:

* ``weight_loader(param, loaded, shard_id=None)``: puts a checkpoint tensor in its place;
* ``output_dim``, ``input_dim``: dimensions that follow the outputs and the inputs, or absent;
* ``packed_dim``, ``packed_factor``: the dimension along which values share a word, and how many;
* ``load_rule``: a :class:`LoadRule`, what may be loaded into it and where that goes.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch

from pymllm_kernels.common.packing import pack_words, unpack_words, words_per_line

INTEGER_DTYPES = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
FLOAT_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


class DtypeRule(enum.Enum):
    """What happens to a checkpoint tensor whose dtype is not the parameter's.

    ``EXACT``: it is refused. ``ADOPT``: the parameter takes the tensor's dtype, or, when shards
    differ, one that holds both exactly. ``CONVERT``: the tensor is converted.
    """

    EXACT = "exact"
    ADOPT = "adopt"
    CONVERT = "convert"


class Form(NamedTuple):
    """A dtype and shape that a checkpoint tensor may have."""

    dtypes: tuple[torch.dtype, ...]
    shape: tuple[int, ...]

    def __str__(self) -> str:
        names = " or ".join(str(dtype).removeprefix("torch.") for dtype in self.dtypes)
        return f"{names} {list(self.shape)}"


class LoadRule(Protocol):
    """Which tensors a parameter accepts, and where they go.

    ``sizes`` are the outputs of each logical weight of the layer; ``index`` says which of them
    the tensor belongs to, None meaning the whole layer.
    """

    @property
    def dtype_rule(self) -> DtypeRule:
        """What happens to another dtype."""

    def forms(
        self, param: torch.Tensor, sizes: Sequence[int], index: int | None
    ) -> tuple[Form, ...]:
        """Accepted dtypes and shapes, the regular one first."""

    def store(
        self,
        param: torch.Tensor,
        loaded: torch.Tensor,
        sizes: Sequence[int],
        index: int | None,
        first: bool,
    ) -> None:
        """Copy ``loaded``, which has an accepted form, into ``param``; ``first`` says whether
        nothing has been loaded into it yet.

        Raises:
            ValueError: a value contradicts another shard's or the layer; without the place.
        """


def _rows_of(sizes: Sequence[int], index: int | None) -> tuple[int, int]:
    """First output and number of outputs of a shard."""
    if index is None:
        return 0, sum(sizes)
    return sum(sizes[:index]), sizes[index]


def _accepted_dtypes(param: torch.Tensor, rule: DtypeRule) -> tuple[torch.dtype, ...]:
    return (param.dtype,) if rule is DtypeRule.EXACT else FLOAT_DTYPES


@dataclass(frozen=True)
class Rows:
    """A dimension follows the outputs; a shard fills its part of it.

    Attributes:
        output_dim: that dimension.
        dtype_rule: what happens to another dtype.
        squeezable: whether the tensor may lack a last dimension of size 1.
    """

    output_dim: int = 0
    dtype_rule: DtypeRule = DtypeRule.EXACT
    squeezable: bool = False

    def forms(
        self, param: torch.Tensor, sizes: Sequence[int], index: int | None
    ) -> tuple[Form, ...]:
        shape = list(param.shape)
        shape[self.output_dim] = _rows_of(sizes, index)[1]
        dtypes = _accepted_dtypes(param, self.dtype_rule)
        forms = [Form(dtypes, tuple(shape))]
        if self.squeezable and shape[-1] == 1:
            forms.append(Form(dtypes, tuple(shape[:-1])))
        return tuple(forms)

    def store(
        self,
        param: torch.Tensor,
        loaded: torch.Tensor,
        sizes: Sequence[int],
        index: int | None,
        first: bool,
    ) -> None:
        start, count = _rows_of(sizes, index)
        target = param.narrow(self.output_dim, start, count)
        target.copy_(loaded.reshape(target.shape))


@dataclass(frozen=True)
class PerShard:
    """One element for every logical weight, such as a per-tensor scale."""

    dtype_rule: DtypeRule = DtypeRule.ADOPT

    def forms(
        self, param: torch.Tensor, sizes: Sequence[int], index: int | None
    ) -> tuple[Form, ...]:
        dtypes = _accepted_dtypes(param, self.dtype_rule)
        return Form(dtypes, (1,)), Form(dtypes, ())

    def store(
        self,
        param: torch.Tensor,
        loaded: torch.Tensor,
        sizes: Sequence[int],
        index: int | None,
        first: bool,
    ) -> None:
        target = param if index is None else param.narrow(0, index, 1)
        target.copy_(loaded.reshape(1).expand(target.shape))


@dataclass(frozen=True)
class Common:
    """The same for every shard: shards of one layer see the same inputs.

    Attributes:
        dtype_rule: what happens to another dtype.
        squeezable: whether a tensor of shape ``[1]`` may come as a scalar.
    """

    dtype_rule: DtypeRule = DtypeRule.EXACT
    squeezable: bool = True

    def forms(
        self, param: torch.Tensor, sizes: Sequence[int], index: int | None
    ) -> tuple[Form, ...]:
        dtypes = _accepted_dtypes(param, self.dtype_rule)
        forms = [Form(dtypes, tuple(param.shape))]
        if self.squeezable and tuple(param.shape) == (1,):
            forms.append(Form(dtypes, ()))
        return tuple(forms)

    def store(
        self,
        param: torch.Tensor,
        loaded: torch.Tensor,
        sizes: Sequence[int],
        index: int | None,
        first: bool,
    ) -> None:
        values = loaded.reshape(param.shape).to(param.device)
        if not first and not bool((param == values).all()):
            raise ValueError("found values that differ from another shard's, expected equal ones")
        param.copy_(values)


@dataclass(frozen=True)
class GroupIndex(Common):
    """``weight_g_idx [K]``; one that holds -1 was never set and means neighbouring inputs.

    Source: compressed-tensors, activation ordering.
    """

    group_size: int = 1

    def forms(
        self, param: torch.Tensor, sizes: Sequence[int], index: int | None
    ) -> tuple[Form, ...]:
        return (Form((torch.int32, torch.int64), tuple(param.shape)),)

    def store(
        self,
        param: torch.Tensor,
        loaded: torch.Tensor,
        sizes: Sequence[int],
        index: int | None,
        first: bool,
    ) -> None:
        if bool((loaded == -1).any()):
            loaded = torch.arange(len(loaded), device=loaded.device) // self.group_size
        super().store(param, loaded.to(torch.int32), sizes, index, first)


@dataclass(frozen=True)
class StoredShape:
    """``weight_shape [2]``, the (N, K) of the tensor that was packed."""

    k: int
    dtype_rule: DtypeRule = DtypeRule.EXACT

    def forms(
        self, param: torch.Tensor, sizes: Sequence[int], index: int | None
    ) -> tuple[Form, ...]:
        return (Form(INTEGER_DTYPES, (2,)),)

    def store(
        self,
        param: torch.Tensor,
        loaded: torch.Tensor,
        sizes: Sequence[int],
        index: int | None,
        first: bool,
    ) -> None:
        expected = [_rows_of(sizes, index)[1], self.k]
        if loaded.tolist() != expected:
            raise ValueError(f"found values {loaded.tolist()}, expected {expected}")
        param.copy_(torch.tensor([sum(sizes), self.k]))


@dataclass(frozen=True)
class PackedZeroPoints:
    """``weight_zero_point``, packed along the outputs.

    The parameter is int32 ``[sum of words, G]``. Each logical weight is packed apart and starts
    a new word, because the last word of a checkpoint's shard is padded. Releases up to 0.9.3
    stored int8 ``[N, G]`` instead; such a tensor is packed here, which loses nothing.
    """

    bits: int
    dtype_rule: DtypeRule = DtypeRule.EXACT

    def forms(
        self, param: torch.Tensor, sizes: Sequence[int], index: int | None
    ) -> tuple[Form, ...]:
        count, groups = _rows_of(sizes, index)[1], param.shape[1]
        return (
            Form((torch.int32,), (words_per_line(count, self.bits), groups)),
            Form((torch.int8,), (count, groups)),
        )

    def store(
        self,
        param: torch.Tensor,
        loaded: torch.Tensor,
        sizes: Sequence[int],
        index: int | None,
        first: bool,
    ) -> None:
        count = _rows_of(sizes, index)[1]
        codes = raw_zero_points(loaded, self.bits, count)
        shards = range(len(sizes)) if index is None else (index,)
        for shard in shards:
            word = sum(words_per_line(size, self.bits) for size in sizes[:shard])
            mine, codes = codes[:, : sizes[shard]], codes[:, sizes[shard] :]
            words = pack_words(mine.contiguous(), self.bits).T
            param.narrow(0, word, words.shape[0]).copy_(words)


def raw_zero_points(stored: torch.Tensor, bits: int, count: int) -> torch.Tensor:
    """Raw zero points ``[G, count]``, uint8, from packed int32 or from legacy int8 ``[count, G]``.

    Raises:
        ValueError: an int8 value is outside the signed range of ``bits``.
    """
    if stored.dtype != torch.int8:
        # Not .contiguous(): of [1, G] it keeps a stride that cannot be viewed as bytes.
        words = stored.T.clone(memory_format=torch.contiguous_format)
        return unpack_words(words, bits, count)
    half = 1 << (bits - 1)
    raw = stored.T.to(torch.int16) + half
    if bool(((raw < 0) | (raw >= 2 * half)).any()):
        raise ValueError(f"found int8 values outside {-half} .. {half - 1}")
    return raw.to(torch.uint8)


def set_weight_attrs(param: torch.Tensor, attrs: Mapping[str, Any]) -> None:
    """Set attributes on a parameter."""
    for name, value in attrs.items():
        setattr(param, name, value)


def place_of(layer: torch.nn.Module) -> str:
    """How messages name a layer."""
    prefix = getattr(layer, "prefix", "")
    return f"layer {prefix!r}" if prefix else f"a {type(layer).__name__} without a prefix"


def check_form(
    place: str, name: str, dtype: torch.dtype, shape: Sequence[int], forms: Sequence[Form]
) -> None:
    """Check dtype and shape of a checkpoint tensor, which need not have been read.

    Raises:
        ValueError: no form fits; the message names layer, tensor, what was found and expected.
    """
    if any(dtype in form.dtypes and tuple(shape) == form.shape for form in forms):
        return
    expected = ", or ".join(str(form) for form in forms)
    found = Form((dtype,), tuple(shape))
    raise ValueError(f"{place}: {name}: found {found}, expected {expected}")
