"""Open GGUF files and map their tensors; nothing here computes with weights."""

from __future__ import annotations

import errno
import io
import math
import mmap
import os
import re
import stat
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from cmr.errors import FileError
from cmr.gguf_header import Header, TensorInfo, quote, read_header
from cmr.quants import FORMATS, UNSUPPORTED, supported_names, type_name

_PART = re.compile(r"(.*)-([0-9]{5})-of-([0-9]{5})\.gguf", re.DOTALL)
_MAX_ELEMENTS = 2**63 - 1
COPIED = 1 << 26  # bytes that are read at a time into memory


class MappedFile:
    """A file mapped read-only: `path`, `nbytes`, and `address`, where its first byte lies in memory.

    The map follows the file: when it shrinks while it is mapped, reading the lost part ends the process. With `copied`
    the map is memory of this process, into which the file was read.
    """

    def __init__(self, path: Path, mapped: mmap.mmap, copied: bool = False) -> None:
        self.path, self.nbytes, self.copied = path, len(mapped), copied
        self.map: mmap.mmap | None = mapped
        self.address: int = np.frombuffer(mapped, np.uint8, 1).__array_interface__["data"][0]

    def advise(self, advice: str, start: int = 0, nbytes: int | None = None) -> None:
        """Tell the kernel how bytes of the map will be used, as in "MADV_RANDOM"; `start` is a whole page.

        Nothing happens where the system does not know the advice, in a copy, or once closed.
        """
        if self.map is not None and not self.copied:
            _advise(self.map, advice, start, self.nbytes - start if nbytes is None else nbytes)

    def view(self, offset: int, nbytes: int) -> np.ndarray:
        """Return a read-only uint8 [nbytes] view of the map at `offset`; raises FileError once closed."""
        if self.map is None:
            raise FileError(f"{self.path} was closed; open it again to read its tensors")
        return np.frombuffer(self.map, np.uint8, nbytes, offset)

    def close(self) -> None:
        """Unmap the file, or leave that to the last array that still looks into it."""
        mapped, self.map = self.map, None
        if mapped is not None:
            with suppress(BufferError):
                mapped.close()


@dataclass(frozen=True, slots=True)
class Tensor:
    """A tensor in a mapped file.

    `type` is ggml's number, `shape` has the innermost (contiguous) dimension last, `offset` is the absolute
    byte in `source`. `nbytes` is 0 for types whose block size is not known. Files with unsupported types open
    and can be listed; `data` and `address` raise FileError for them, so only use of such weights is refused.
    """

    name: str
    type: int
    shape: tuple[int, ...]
    nbytes: int
    offset: int
    source: MappedFile

    @property
    def type_name(self) -> str:
        """The name of the type, "Q4_K" for example."""
        return type_name(self.type)

    @property
    def data(self) -> np.ndarray:
        """The raw blocks: uint8 [nbytes], a read-only view of the map; FileError for unsupported types."""
        if self.type not in FORMATS:
            raise FileError(
                f"tensor {quote(self.name)} in {self.source.path} has the unsupported type {self.type_name}; "
                f"there are: {supported_names()}"
            )
        return self.source.view(self.offset, self.nbytes)

    @property
    def address(self) -> int:
        """The memory address of `data` while the file is open; FileError for unsupported types."""
        return self.data.__array_interface__["data"][0]


class GGUFFile:
    """An open GGUF model: `metadata` and `tensors` of all its parts, in the order of the files.

    `path` is the path that was opened, `version` that of its first part, `files` the mapped parts, `nbytes`
    the bytes of all parts. Scalars in `metadata` are int, float, bool and str, numeric arrays numpy arrays,
    string arrays lists of bytes. Where parts disagree about a key the first part is right.
    """

    def __init__(self, path: Path, parts: list[_Part]) -> None:
        self.path = path
        self.files = [part.file for part in parts]
        self.version = parts[0].header.version
        self.nbytes = sum(file.nbytes for file in self.files)
        self.metadata: dict[str, Any] = {}
        self.tensors: dict[str, Tensor] = {}
        for part in parts:
            self.metadata = part.header.metadata | self.metadata
            for tensor in _tensors(part.file, part.header):
                if tensor.name in self.tensors:
                    raise FileError(f"{part.file.path} is corrupt: it has tensor {quote(tensor.name)} twice")
                self.tensors[tensor.name] = tensor

    def close(self) -> None:
        """Unmap the files; arrays over tensors stay valid until they are dropped, addresses do not."""
        for file in self.files:
            file.close()

    def __enter__(self) -> GGUFFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _Part(NamedTuple):
    file: MappedFile
    header: Header


def open_gguf(path: str | os.PathLike[str], mapped: bool = True) -> GGUFFile:
    """Map the GGUF file at `path` and decode its header; any part of a split model opens the whole model.

    Without `mapped` its bytes are read into memory of this process.
    Raises FileError, and nothing else, whatever the file system says and whatever the bytes of the file are.
    Split files: https://github.com/ggml-org/llama.cpp/tree/master/tools/gguf-split
    """
    path = Path(path)
    opened: list[MappedFile] = []
    try:
        given = _open_part(path, mapped, opened)
        parts = []
        for number, name in enumerate(_part_paths(path, given.header)):
            part = given if name == path else _open_part(name, mapped, opened)
            _check_part(part, number, given.header)
            parts.append(part)
        result = GGUFFile(path, parts)
        _check_tensor_count(result)
        return result
    except BaseException:
        for file in opened:
            file.close()
        raise


def _open_part(path: Path, mapped: bool, opened: list[MappedFile]) -> _Part:
    file = MappedFile(path, _bytes(path, mapped), copied=not mapped)
    opened.append(file)
    assert file.map is not None
    return _Part(file, read_header(file.map, file.nbytes, str(path)))


def _bytes(path: Path, mapped: bool) -> mmap.mmap:
    try:
        # Look before opening: to open a pipe is to wait for whoever writes into it.
        mode = os.stat(path).st_mode
        if not stat.S_ISREG(mode):
            kind = "a folder" if stat.S_ISDIR(mode) else "not a regular file"
            raise FileError(f"{path} is {kind}; give the path of a GGUF file")
        with open(path, "rb", buffering=0) as file:
            size = os.fstat(file.fileno()).st_size
            if size == 0:
                raise FileError(f"{path} is empty; give the path of a GGUF file")
            memory = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if mapped else mmap.mmap(-1, size)
            # In pages of 2 MiB bytes come faster and cost fewer look-ups; what the system has in small ones stays so.
            _advise(memory, "MADV_HUGEPAGE", 0, size)
            if not mapped:
                _fill(memory, file)
            return memory
    except FileNotFoundError:
        raise FileError(f"{path} does not exist; give the path of a GGUF file") from None
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise FileError(f"{path} cannot be read: {reason}") from None


def _fill(memory: mmap.mmap, file: io.FileIO) -> None:
    """Read the file into memory of its size."""
    with memoryview(memory) as view:
        done = 0
        while done < len(view):
            if not (got := file.readinto(view[done : done + COPIED])):
                raise OSError(errno.EIO, "it became shorter while it was read")
            done += got


def _advise(memory: mmap.mmap, advice: str, start: int, nbytes: int) -> None:
    """Give advice on a part of a map, where the system knows it."""
    code = getattr(mmap, advice, None)
    if code is not None:
        with suppress(OSError):
            memory.madvise(code, start, nbytes)


def _split_count(header: Header) -> int:
    # Merged files keep the key with a count of 0.
    count = header.metadata.get("split.count", 0)
    return count if type(count) is int and count > 1 else 1


def _part_paths(path: Path, header: Header) -> list[Path]:
    """Return the paths of all parts in order; raises FileError for a wrong name and for missing parts."""
    count = _split_count(header)
    if count == 1:
        return [path]
    name = _PART.fullmatch(path.name)
    if name is None or int(name[3]) != count or not 1 <= int(name[2]) <= count:
        raise FileError(
            f"{path} is one of {count} parts, which need names like NAME-00001-of-{count:05d}.gguf"
        )
    paths = [path.with_name(f"{name[1]}-{number:05d}-of-{name[3]}.gguf") for number in range(1, count + 1)]
    missing = [part.name for part in paths if not os.path.exists(part)]
    if missing:
        shown = ", ".join(missing[:5]) + (f" and {len(missing) - 5} more" if len(missing) > 5 else "")
        raise FileError(f"{path} is one of {count} parts; missing beside it: {shown}")
    return paths


def _is(value: object, number: int) -> bool:
    # What a hostile file says may be an array, whose comparison has no truth value.
    return type(value) is int and value == number


def _check_part(part: _Part, number: int, given: Header) -> None:
    count, expected = _split_count(part.header), _split_count(given)
    said = part.header.metadata.get("split.no", number)
    if count != expected or (count > 1 and not _is(said, number)):
        raise FileError(
            f"{part.file.path} does not belong here: counted from 0 it is part {quote(said)} of {count}, "
            f"but part {number} of {expected} was expected"
        )


def _check_tensor_count(file: GGUFFile) -> None:
    expected = file.metadata.get("split.tensors.count", len(file.tensors))
    if len(file.files) > 1 and not _is(expected, len(file.tensors)):
        raise FileError(
            f"the parts of {file.path} have {len(file.tensors)} tensors together, but say {quote(expected)}; "
            "parts of different models are mixed"
        )


def _tensors(file: MappedFile, header: Header) -> list[Tensor]:
    """Return the checked tensors of one file in the order of its index; raises FileError."""
    tensors = [_tensor(file, header, info) for info in header.tensors]
    previous = None
    for tensor in sorted(tensors, key=lambda tensor: (tensor.offset, tensor.nbytes)):
        if previous is not None and tensor.offset < previous.offset + previous.nbytes:
            raise FileError(
                f"{file.path} is corrupt: the tensors {quote(previous.name)} and {quote(tensor.name)} overlap"
            )
        previous = tensor
    return tensors


def _tensor(file: MappedFile, header: Header, info: TensorInfo) -> Tensor:
    who = f"{file.path} is corrupt: tensor {quote(info.name)}"
    elements = math.prod(info.dims)
    if not 1 <= elements <= _MAX_ELEMENTS:
        raise FileError(f"{who} has the impossible shape {info.dims}")
    format = FORMATS.get(info.type) or UNSUPPORTED.get(info.type)
    if format and info.dims[0] % format.elements:
        raise FileError(
            f"{who} has rows of {info.dims[0]} elements; {format.name} needs multiples of {format.elements}"
        )
    if info.offset % header.alignment:
        raise FileError(f"{who} starts at {info.offset}, which is not aligned to {header.alignment} bytes")
    nbytes = elements // format.elements * format.bytes if format else 0
    offset = header.data_start + info.offset
    if offset + nbytes > file.nbytes:
        raise FileError(
            f"{file.path} is truncated or corrupt: tensor {quote(info.name)} ends at byte {offset + nbytes}, "
            f"the file at {file.nbytes}; download or convert it again"
        )
    return Tensor(info.name, info.type, info.dims[::-1], nbytes, offset, file)
