"""Opening a checkpoint folder: its configuration, its files' headers, its tensors on demand.

A safetensors file is an 8-byte little-endian header length, that many bytes of JSON (tensor name
-> dtype, shape, byte range; ``__metadata__`` beside them), then the tensors' bytes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open

CONFIG_NAME = "config.json"
WEIGHTS_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"

_DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "U16": torch.uint16,
    "I32": torch.int32,
    "U32": torch.uint32,
    "I64": torch.int64,
    "U64": torch.uint64,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
# safetensors' own limit; a length beyond it is garbage, not a header.
_MAX_HEADER_BYTES = 100_000_000


class TensorInfo(NamedTuple):
    """A tensor as its file's header describes it.

    Attributes:
        dtype: torch dtype.
        shape: sizes.
        file: the file that holds it.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    file: Path


class Checkpoint:
    """A checkpoint folder: headers are read when it is opened, tensors when asked for.

    Use it as a context manager: files opened by :meth:`read` stay open until it is left.

    Attributes:
        directory: the folder.
        config: parsed ``config.json``.
        tensors: tensor name -> what its file's header says, in the files' order.
    """

    def __init__(self, directory: str | Path) -> None:
        """Read the configuration and all headers.

        Raises:
            ValueError: a file is missing, truncated or damaged, or the index contradicts the
                files; the message names the file.
        """
        self.directory = Path(directory)
        if not self.directory.is_dir():
            raise ValueError(f"checkpoint {self.directory}: found no such directory")
        self.config: dict[str, Any] = _read_object(self.directory / CONFIG_NAME)
        self.tensors = _list_tensors(self.directory)
        self._files: dict[Path, Any] = {}
        self._stack = ExitStack()

    def __enter__(self) -> Checkpoint:  # noqa: PYI034  typing.Self needs Python 3.11
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close all files; tensors already read stay valid."""
        self._files.clear()
        self._stack.close()

    def read(self, name: str) -> torch.Tensor:
        """One tensor, on the CPU, mapped from its file where the platform allows.

        Raises:
            ValueError: there is no such tensor, or its file cannot be read.
        """
        if name not in self.tensors:
            raise ValueError(f"checkpoint {self.directory}: found no tensor {name!r}")
        path = self.tensors[name].file
        try:
            if path not in self._files:
                self._files[path] = self._stack.enter_context(safe_open(path, framework="pt"))
            tensor: torch.Tensor = self._files[path].get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path}: cannot read tensor {name!r}: {error}") from None
        return tensor

    def modules(self) -> dict[str, dict[str, TensorInfo]]:
        """Module name -> tensor suffix (``weight_packed``, ``bias``, ...) -> description."""
        grouped: dict[str, dict[str, TensorInfo]] = {}
        for name, info in self.tensors.items():
            module, _, suffix = name.rpartition(".")
            grouped.setdefault(module, {})[suffix] = info
        return grouped

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Every tensor with its name."""
        for name in self.tensors:
            yield name, self.read(name)


def _list_tensors(directory: Path) -> dict[str, TensorInfo]:
    index_path = directory / INDEX_NAME
    if index_path.exists():
        return _list_sharded(directory, index_path)
    single = directory / WEIGHTS_NAME
    if not single.exists():
        found = sorted(path.name for path in directory.glob("*.safetensors"))
        if len(found) != 1:
            raise ValueError(
                f"{single}: found no such file and no {INDEX_NAME}"
                + (f" beside {found}" if found else "")
            )
        single = directory / found[0]
    return read_header(single)


def _list_sharded(directory: Path, index_path: Path) -> dict[str, TensorInfo]:
    weight_map = _read_object(index_path).get("weight_map")
    if not isinstance(weight_map, Mapping) or not all(
        isinstance(file, str) for file in weight_map.values()
    ):
        raise ValueError(f"{index_path}: weight_map: expected an object of tensor name -> file")
    headers = {}
    for file in dict.fromkeys(weight_map.values()):
        if Path(file).name != file or not (directory / file).is_file():
            raise ValueError(f"{index_path}: names the file {file!r}, which is not beside it")
        headers[file] = read_header(directory / file)
    tensors: dict[str, TensorInfo] = {}
    for name, file in weight_map.items():
        if name not in headers[file]:
            raise ValueError(f"{index_path}: names tensor {name!r} in {file}, which lacks it")
    for file, header in headers.items():
        for name, info in header.items():
            if name in weight_map:
                tensors[name] = headers[weight_map[name]][name]
            elif name in tensors:
                raise ValueError(
                    f"{directory / file}: holds tensor {name!r}, as another file does, and "
                    f"{INDEX_NAME} does not say which counts"
                )
            else:
                tensors[name] = info
    return tensors


def read_header(path: Path) -> dict[str, TensorInfo]:
    """Names, dtypes and shapes of a safetensors file, without its tensors.

    Raises:
        ValueError: the file is missing, truncated or damaged; the message names it.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(size - 8, _MAX_HEADER_BYTES):
                raise ValueError(
                    f"{path}: found {size} bytes, too few for its header: truncated or damaged"
                )
            raw = file.read(length)
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror}") from None
    try:
        header = json.loads(raw)
        header.pop("__metadata__", None)
        return {
            name: _entry(path, name, entry, size - 8 - length) for name, entry in header.items()
        }
    except (UnicodeDecodeError, json.JSONDecodeError, AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: header is damaged: {error}") from None


def _entry(path: Path, name: str, entry: Mapping[str, Any], payload: int) -> TensorInfo:
    shape = tuple(int(size) for size in entry["shape"])
    start, end = entry["data_offsets"]
    if entry["dtype"] not in _DTYPES:
        raise ValueError(f"{path}: tensor {name!r}: dtype {entry['dtype']!r} is not supported")
    dtype = _DTYPES[entry["dtype"]]
    if not 0 <= start <= end or end - start != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"{path}: header is damaged: tensor {name!r}: {dict(entry)}")
    if end > payload:
        raise ValueError(
            f"{path}: found {payload} bytes of tensors, but {name!r} ends at {end}: truncated"
        )
    return TensorInfo(dtype, shape, path)


def _read_object(path: Path) -> dict[str, Any]:
    try:
        with path.open(encoding="utf-8") as file:
            value = json.load(file)
    except FileNotFoundError:
        raise ValueError(f"{path}: found no such file") from None
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror}") from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(  # noqa: TRY004  the file is wrong, not an argument
            f"{path}: found {type(value).__name__}, expected a JSON object"
        )
    return value
