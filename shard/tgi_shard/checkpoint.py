"""A model's safetensors files: validated headers, then tensors as slices of the mapped files. Nothing is copied here.

Strict. `Checkpoint.open` checks every header against its file, `Checkpoint.check` every tensor against what the model
expects, both before anything is allocated; errors are StartError, one sentence naming file and tensor.
Called by models/__init__.py; the layers read through it. The format: an 8-byte little-endian header length, a JSON
header `{name: {dtype, shape, data_offsets}}`, then the bytes of the tensors.
"""

import json
import math
import mmap
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tgi_proto.model_files import open_file, read_file
from torch import Tensor

from .errors import Bug, StartError

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library
MAX_DIMENSIONS = 64  # torch's own
MAX_NAME_CHARS = 500

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}

Progress = Callable[[int, int], None]  # (bytes done, bytes in all)


@dataclass(frozen=True, slots=True)
class Entry:
    """Where one tensor lies."""

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int  # in bytes from the start of the file
    end: int


class Checkpoint:
    """The tensors of one model directory, by name."""

    def __init__(
        self, directory: Path, entries: dict[str, Entry], progress: Progress = lambda done, total: None
    ) -> None:
        self.directory = directory
        self.entries = entries
        self._maps: dict[Path, mmap.mmap] = {}
        self._progress = progress
        self._total_bytes = sum(entry.end - entry.begin for entry in entries.values())
        self._unread = dict(entries)
        self._done_bytes = 0

    @classmethod
    def open(cls, directory: Path, progress: Progress = lambda done, total: None) -> "Checkpoint":
        """Reads and validates the headers of all files. progress: called as tensors are read."""
        entries: dict[str, Entry] = {}
        for file in _files(directory):
            for name, entry in read_header(file).items():
                if name in entries:
                    raise StartError(f"{file}: tensor `{name}` is also in {entries[name].file.name}.")
                entries[name] = entry
        return cls(directory, entries, progress)

    def __contains__(self, name: str) -> bool:
        return name in self.entries

    def check(self, expected: Mapping[str, tuple[int, ...]], ignorable: Sequence[str]) -> None:
        """That there are exactly the expected tensors, in their shapes, besides those whose whole name matches one of
        the `ignorable` regular expressions."""
        for name, shape in expected.items():
            if name not in self.entries:
                missing = [other for other in expected if other not in self.entries]
                more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
                raise StartError(f"{self.directory}: tensor `{name}` of shape {list(shape)} is missing{more}.")
            entry = self.entries[name]
            if entry.shape != shape:
                raise StartError(
                    f"{entry.file}: tensor `{name}` has shape {list(entry.shape)}, but config.json says {list(shape)}."
                )
            if not entry.dtype.is_floating_point:
                raise StartError(f"{entry.file}: tensor `{name}` is {entry.dtype}, expected floating point.")
        patterns = [re.compile(pattern) for pattern in ignorable]
        unused = [
            name
            for name in self.entries
            if name not in expected and not any(pattern.fullmatch(name) for pattern in patterns)
        ]
        if unused:
            more = f" and {len(unused) - 1} more" if len(unused) > 1 else ""
            raise StartError(
                f"{self.entries[unused[0]].file}: tensor `{unused[0]}`{more} would not be used by this model; "
                "config.json and the weights do not belong together."
            )
        self._unread = {name: self.entries[name] for name in expected}
        self._total_bytes = sum(entry.end - entry.begin for entry in self._unread.values())

    def read(self, name: str) -> Tensor:
        """The tensor, as a view of the mapped file: slice it, then copy it. Writing to it does not change the file."""
        entry = self.entries.get(name)
        if entry is None:
            raise Bug(f"Tensor {name!r} was not in the list of expected tensors. This is a bug.")
        if self._unread.pop(name, None):
            self._done_bytes += entry.end - entry.begin
            self._progress(self._done_bytes, self._total_bytes)
        if entry.begin == entry.end:
            return torch.empty(entry.shape, dtype=entry.dtype)
        count = math.prod(entry.shape)
        return torch.frombuffer(self._map(entry.file), dtype=entry.dtype, count=count, offset=entry.begin).view(
            entry.shape
        )

    def release(self) -> None:
        """Takes the pages read so far off this process' account; what is still in use is mapped again when touched."""
        for mapped in self._maps.values():
            mapped.madvise(mmap.MADV_DONTNEED)

    def _map(self, file: Path) -> mmap.mmap:
        if file not in self._maps:
            with file.open("rb") as handle:
                # Private and writable, because torch warns of read-only memory; pages are shared until written.
                self._maps[file] = mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_COPY)
        return self._maps[file]


def _files(directory: Path) -> list[Path]:
    """The files that make up the checkpoint: the index's, or the one file, or all *.safetensors."""
    index = directory / INDEX_FILE
    if (directory / SINGLE_FILE).exists():
        return [directory / SINGLE_FILE]
    if index.exists():
        return _indexed_files(index)
    files = sorted(directory.glob("*.safetensors"))
    if not files:
        raise StartError(f"{directory}: there is no *.safetensors file.")
    return files


def _indexed_files(index: Path) -> list[Path]:
    try:
        weight_map = json.loads(read_file(index))["weight_map"]
        names = sorted({str(name) for name in weight_map.values()})
    except OSError as error:
        raise StartError(f"{index}: cannot be read: {error.strerror}.") from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise StartError(f"{index}: not an index with a `weight_map`: {error!r}.") from error
    for name in names:
        if Path(name).name != name or not name.endswith(".safetensors") or not is_showable(name):
            raise StartError(f"{index}: `{shown(name)}` is not the name of a file in the same directory.")
        if not (index.parent / name).exists():
            raise StartError(f"{index}: the file `{name}` it names is missing.")
    return [index.parent / name for name in names]


def is_showable(name: str) -> bool:
    """Whether a name out of a file can stand in a one-line message."""
    return name.isprintable() and len(name) <= MAX_NAME_CHARS


def shown(name: str) -> str:
    """`name`, or the beginning of it in Python's spelling."""
    return name if is_showable(name) else repr(name[:60])


def read_header(file: Path) -> dict[str, Entry]:
    """The tensors of one file, every offset checked. Raises StartError."""
    try:
        with open_file(file) as handle:
            size = os.fstat(handle.fileno()).st_size
            length = _header_bytes(file, handle.read(8), size)
            raw = handle.read(length)
    except OSError as error:
        raise StartError(f"{file}: cannot be read: {error.strerror}.") from error
    try:
        header = json.loads(raw, object_pairs_hook=_without_repeats)
        if not isinstance(header, dict):
            raise ValueError("not an object")
    except (ValueError, RecursionError) as error:
        raise StartError(f"{file}: its header is not JSON: {error}.") from error
    header.pop("__metadata__", None)
    entries = {name: _entry(file, name, value, 8 + length) for name, value in header.items()}
    _check_layout(file, entries, 8 + length, size)
    return entries


def _header_bytes(file: Path, prefix: bytes, size: int) -> int:
    """The header's length, by the first 8 bytes of a file of `size` bytes. Raises StartError."""
    length = int.from_bytes(prefix, "little")
    if len(prefix) < 8 or length > size - 8:
        raise StartError(f"{file}: truncated: its header should end at byte {8 + length}, the file has {size}.")
    if length > MAX_HEADER_BYTES:
        raise StartError(f"{file}: its header claims {length} bytes; at most {MAX_HEADER_BYTES} are allowed.")
    return length


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object. One name with two meanings would let two readers see two different models."""
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"`{shown(name)}` comes twice")
        found[name] = value
    return found


def _entry(file: Path, name: str, value: Any, data: int) -> Entry:
    """data: where the tensors' bytes begin in the file."""
    if not is_showable(name):
        raise StartError(f"{file}: a tensor's name is too long or not printable: {shown(name)}.")
    try:
        dtype, shape, (begin, end) = value["dtype"], value["shape"], value["data_offsets"]
    except (KeyError, TypeError, ValueError) as error:
        raise StartError(f"{file}: the header's entry for tensor `{name}` is malformed.") from error
    if not isinstance(shape, list) or not isinstance(dtype, str):
        raise StartError(f"{file}: the header's entry for tensor `{name}` is malformed.")
    if len(shape) > MAX_DIMENSIONS:
        raise StartError(f"{file}: tensor `{name}` has {len(shape)} dimensions; at most {MAX_DIMENSIONS} are possible.")
    if any(type(number) is not int or not 0 <= number < 2**63 for number in [*shape, begin, end]):
        raise StartError(f"{file}: tensor `{name}` has a shape or offsets that are not natural numbers below 2^63.")
    if dtype not in DTYPES:
        raise StartError(f"{file}: tensor `{name}` has dtype {shown(dtype)!r}, which is not supported.")
    expected = math.prod(shape) * DTYPES[dtype].itemsize
    if end - begin != expected:
        raise StartError(f"{file}: tensor `{name}` takes {end - begin} bytes, but its shape and dtype need {expected}.")
    return Entry(file, DTYPES[dtype], tuple(shape), data + begin, data + end)


def _check_layout(file: Path, entries: dict[str, Entry], data: int, size: int) -> None:
    """That the tensors lie one after the other and fill the file."""
    position, previous = data, ""
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].begin, item[1].end)):
        if entry.begin != position:
            what = "overlaps with" if entry.begin < position else "leaves a gap after"
            raise StartError(f"{file}: tensor `{name}` {what} `{previous}`.")
        position, previous = entry.end, name
    if position > size:
        raise StartError(f"{file}: truncated: its tensors end at byte {position}, the file has {size}.")
    if position < size:
        raise StartError(f"{file}: {size - position} bytes after its last tensor belong to none.")
