"""Decode the header of a GGUF file (metadata and tensor index) from its bytes, trusting none of them."""

from __future__ import annotations

import mmap
import struct
from typing import Any, NamedTuple, NoReturn

import numpy as np

from cmr.errors import FileError

MAGIC = b"GGUF"
DEFAULT_ALIGNMENT = 32

# Far above any real model (the largest vocabularies known make 20 MB and 0.8 million strings), and low enough
# that a hostile file costs seconds and megabytes, not hours and gigabytes.
MAX_HEADER_BYTES = 128 << 20
MAX_KEYS = 1 << 16
MAX_TENSORS = 1 << 16
MAX_STRINGS = 1 << 21
MAX_NAME_BYTES = 65535
MAX_DIMS = 4

_U32, _U64, _PAIR = struct.Struct("<I"), struct.Struct("<Q"), struct.Struct("<QQ")
_BOOL, _STRING, _ARRAY = 7, 8, 9
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 10: "Q", 11: "q", 12: "d"}
_UNPACK = {code: struct.Struct("<" + char) for code, char in _SCALARS.items()}
_DTYPES = {code: np.dtype("<" + char) for code, char in _SCALARS.items()}
_ARRAY_HEAD = struct.Struct("<IQ")
_KIND_AND_OFFSET = struct.Struct("<IQ")
_DIMS = {n: struct.Struct(f"<{n}Q") for n in range(1, MAX_DIMS + 1)}

Bytes = bytes | mmap.mmap


def quote(value: object) -> str:
    """Return what a file says as a message shows it: escaped, and of bounded length whatever it is."""
    if isinstance(value, list | np.ndarray):
        return f"an array of {len(value)} items"
    text = repr(value[:80] if isinstance(value, str | bytes) else value)
    return text if len(text) <= 80 else text[:77] + "..."


class TensorInfo(NamedTuple):
    """One row of the tensor index: `dims` innermost first, as in the file; `offset` from the data's start."""

    name: str
    type: int
    dims: tuple[int, ...]
    offset: int


class Header(NamedTuple):
    """A decoded header; `data_start` is the absolute byte at which tensor data begins."""

    version: int
    metadata: dict[str, Any]
    tensors: list[TensorInfo]
    alignment: int
    data_start: int


def read_header(buffer: Bytes, size: int, source: str) -> Header:
    """Decode the header of a GGUF file of version 2 or 3.

    `buffer` holds the `size` bytes of the file called `source` in messages. Scalars become int, float, bool
    and str, numeric arrays numpy arrays, and string arrays lists of bytes, since tokens need not be UTF-8.
    Raises FileError for what the format description does not allow, for nested arrays, and for sizes beyond
    the limits of this module. Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
    """
    _check_magic(buffer[:24], source)
    cursor = _Cursor(buffer, size, source)
    version = _check_version(cursor)
    n_tensors, n_keys = cursor.take(_PAIR, "the counts of tensors and keys")
    cursor.check_count(n_keys, 13, MAX_KEYS, "metadata keys")
    cursor.check_count(n_tensors, 33, MAX_TENSORS, "tensors")
    metadata: dict[str, Any] = {}
    for _ in range(n_keys):
        key = cursor.name("a metadata key")
        if key in metadata:
            cursor.fail(f"has the metadata key {quote(key)} twice")
        (code,) = cursor.take(_U32, f"the type of {quote(key)}")
        metadata[key] = cursor.value(code, key)
    tensors = [_tensor_info(cursor) for _ in range(n_tensors)]
    alignment = _alignment(metadata, cursor)
    return Header(version, metadata, tensors, alignment, -(-cursor.at // alignment) * alignment)


def _check_magic(start: bytes, source: str) -> None:
    if start[:4] == MAGIC:
        return
    if start[:4] == MAGIC[::-1]:
        raise FileError(f"{source} is a big-endian GGUF file; only little-endian ones are supported")
    if start.startswith(b"version https://git-lfs"):
        raise FileError(f"{source} is a Git LFS pointer, not the model itself; fetch it with `git lfs pull`")
    raise FileError(f"{source} is not a GGUF file: it begins with {start[:4]!r}")


def _check_version(cursor: _Cursor) -> int:
    (version,) = cursor.take(_U32, "the version")
    if version in (2, 3):
        return version
    if version and version & 0xFFFF == 0:
        cursor.fail("is a big-endian GGUF file; only little-endian ones are supported")
    hint = "; convert the model again with a current converter" if version == 1 else ""
    cursor.fail(f"is a GGUF file of version {version}; versions 2 and 3 are supported{hint}")


def _tensor_info(cursor: _Cursor) -> TensorInfo:
    name = cursor.name("a tensor name")
    (n_dims,) = cursor.take(_U32, f"the dimensions of tensor {quote(name)}")
    if not 1 <= n_dims <= MAX_DIMS:
        cursor.fail(f"has tensor {quote(name)} with {n_dims} dimensions; 1 to {MAX_DIMS} are possible")
    dims = cursor.take(_DIMS[n_dims], f"the dimensions of tensor {quote(name)}")
    kind, offset = cursor.take(_KIND_AND_OFFSET, f"the type and offset of tensor {quote(name)}")
    return TensorInfo(name, kind, dims, offset)


def _alignment(metadata: dict[str, Any], cursor: _Cursor) -> int:
    value = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
    if type(value) is not int or not 1 <= value <= 1 << 30 or value & (value - 1):
        cursor.fail(f"has general.alignment {quote(value)}; a power of two is needed")
    return value


class _Cursor:
    """A position in a header; reads are checked against the bytes that remain before they allocate."""

    def __init__(self, buffer: Bytes, size: int, source: str) -> None:
        self.buffer, self.source, self.at = buffer, source, len(MAGIC)
        self.whole = size <= MAX_HEADER_BYTES
        self.end = min(size, MAX_HEADER_BYTES)
        self.strings_left = MAX_STRINGS

    def fail(self, what: str) -> NoReturn:
        """Raise FileError: the name of the file, then `what` is wrong with it."""
        raise FileError(f"{self.source} {what}")

    def need(self, count: int, what: str) -> None:
        """Fail unless `count` more bytes are there."""
        if count <= self.end - self.at:
            return
        if self.whole:
            self.fail(f"is truncated or corrupt: {what} would go past the end of the file at byte {self.end}")
        self.fail(f"is corrupt: {what} would go past {self.end >> 20} MiB, the longest header allowed")

    def check_count(self, count: int, item_bytes: int, limit: int, what: str) -> None:
        """Fail when `count` items of at least `item_bytes` each cannot be there, or exceed `limit`."""
        if count > limit:
            self.fail(f"is corrupt: it claims {count} {what}; {limit} are possible")
        self.need(count * item_bytes, f"{count} {what}")

    def take(self, layout: struct.Struct, what: str) -> tuple:
        """Return the values of `layout` at the cursor and move past them."""
        self.need(layout.size, what)
        values = layout.unpack_from(self.buffer, self.at)
        self.at += layout.size
        return values

    def text(self, what: str, limit: int | None = None) -> str:
        """Return a length-prefixed UTF-8 string."""
        (length,) = self.take(_U64, f"the length of {what}")
        if limit is not None and length > limit:
            self.fail(f"is corrupt: {what} has {length} bytes; {limit} are possible")
        self.need(length, what)
        raw = self.buffer[self.at : self.at + length]
        self.at += length
        try:
            return raw.decode()
        except UnicodeDecodeError:
            self.fail(f"is corrupt: {what} is not UTF-8: {quote(raw[:40])}")

    def name(self, what: str) -> str:
        """Return a metadata key or a tensor name."""
        return self.text(what, MAX_NAME_BYTES)

    def value(self, code: int, key: str) -> Any:
        """Return the metadata value of type `code` at the cursor."""
        if code in _UNPACK:
            return self.take(_UNPACK[code], f"the value of {quote(key)}")[0]
        if code == _STRING:
            return self.text(f"the value of {quote(key)}")
        if code == _BOOL:
            (value,) = self.take(_UNPACK[0], f"the value of {quote(key)}")
            if value > 1:
                self.fail(f"is corrupt: {quote(key)} is a truth value of {value}; 0 and 1 are possible")
            return bool(value)
        if code == _ARRAY:
            return self.array(key)
        self.fail(f"is corrupt: {quote(key)} has the unknown value type {code}")

    def array(self, key: str) -> np.ndarray | list[bytes]:
        """Return the array at the cursor: numpy for numbers and truth values, list of bytes for strings."""
        code, count = self.take(_ARRAY_HEAD, f"the array {quote(key)}")
        if code == _STRING:
            return self.strings(count, key)
        if code == _ARRAY:
            self.fail(f"has an array of arrays in {quote(key)}; only arrays of plain values are supported")
        dtype = _DTYPES[0] if code == _BOOL else _DTYPES.get(code)
        if dtype is None:
            self.fail(f"is corrupt: the array {quote(key)} has the unknown item type {code}")
        self.need(count * dtype.itemsize, f"the array {quote(key)} of {count} items")
        # A copy: the bytes in the file are unaligned, and metadata must outlive the mapping.
        values = np.frombuffer(self.buffer, dtype, count, self.at).copy() if count else np.empty(0, dtype)
        self.at += values.nbytes
        if code != _BOOL:
            return values
        if count and values.max() > 1:
            self.fail(f"is corrupt: {quote(key)} has a truth value of {values.max()}; 0 and 1 are possible")
        return values.view(bool)

    def strings(self, count: int, key: str) -> list[bytes]:
        """Return `count` length-prefixed strings undecoded: the hot loop of opening a file."""
        self.check_count(count, 8, self.strings_left, f"strings in {quote(key)}")
        self.strings_left -= count
        buffer, unpack, end, at = self.buffer, _U64.unpack_from, self.end, self.at
        found: list[bytes] = []
        append = found.append
        try:
            for _ in range(count):
                (length,) = unpack(buffer, at)
                at += 8
                stop = at + length
                if stop > end:
                    break
                append(buffer[at:stop])
                at = stop
        except struct.error:
            at = end
        self.at = min(at, end)
        if len(found) < count:
            self.need(self.end - self.at + 1, f"string {len(found)} of {count} in {quote(key)}")
        return found
