"""Blocks as files, one a block: checked when read, put there in one move, the least used removed first."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from cmr import PluginError
from cmr_plugins.prefix_cache.tree import Node, block_name

MAGIC = b"CMR-KV-1"
HEAD = len(MAGIC) + 16 + 4 + 8  # then the tokens, a digest of all that, the data, a digest of that
DIGEST = 16
MOST_TOKENS = 1024  # in a block
ABANDONED = 600  # seconds after which a half-written file has no writer any more


class Known(NamedTuple):
    """What the head of a file says."""

    name: bytes
    parent: bytes
    tokens: np.ndarray
    size: int


class Damage(Exception):
    """Why a file gives no block: corrupted, gone or unreadable."""


class Folder:
    """The files of one key below `root`, and the limit in bytes for those of all keys together.

    There are no locks: a file appears whole or not at all, and what is written twice is the same.
    """

    def __init__(self, root: Path, key: bytes, parts: dict[str, str], limit: int) -> None:
        self.root, self.path, self.limit = root, root / key.hex(), limit
        self.key = json.dumps(parts).encode()
        self.unwritten, self.trouble = 0, ""
        self.seen: set[str] = set()
        self.stamp = -1
        try:
            root.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise PluginError(f"prefix-cache: the folder {root} cannot be made: {error.strerror}") from None

    # -- reading --

    def changes(self) -> tuple[list[Known], list[bytes], list[bytes]]:
        """Return the files that came since the last look, the names that went, and those damaged."""
        try:
            stamp = self.path.stat().st_mtime_ns
            if stamp == self.stamp:
                return [], [], []
            names = {file[:-3] for file in os.listdir(self.path) if file.endswith(".kv")}
        except OSError:
            stamp, names = -1, set()
        came, damaged = [], []
        for text in sorted(names - self.seen):
            try:
                came.append(self._known(text))
            except Damage as damage:
                if damage.args[0] == "corrupted":
                    damaged.append(_name(text))
        gone = [_name(text) for text in self.seen - names]
        self.stamp, self.seen = stamp, names
        return came, gone, damaged

    def read(self, node: Node, size: int) -> np.ndarray:
        """Return a block's KV, uint8 [size]; Damage says why not. What is corrupted is removed."""
        file = self._file(node.name)
        try:
            with file.open("rb") as stream:
                known, _ = _head(stream.read(HEAD + node.tokens.nbytes + DIGEST))
                data = np.empty(size, np.uint8)
                sound = known.size == size == stream.readinto(memoryview(data))
                digest = stream.read(DIGEST + 1)
        except (Damage, OSError) as error:
            raise self._damage(file, error) from None
        same = known.parent == node.parent and np.array_equal(known.tokens, node.tokens)
        if not sound or not same or digest != _digest(data):
            raise self._damage(file, Damage("corrupted"))
        return data

    def _known(self, text: str) -> Known:
        file = self.path / f"{text}.kv"
        try:
            with file.open("rb") as stream:
                begin = stream.read(HEAD + 4 * MOST_TOKENS + DIGEST)
                known, length = _head(begin)
                if known.name.hex() != text or os.fstat(stream.fileno()).st_size != length:
                    raise Damage("corrupted")
                return known
        except (Damage, OSError) as error:
            raise self._damage(file, error) from None

    def _damage(self, file: Path, error: Exception) -> Damage:
        if isinstance(error, FileNotFoundError):
            return Damage("gone")
        if isinstance(error, OSError):
            self.trouble = f"{error.strerror}"
            return Damage("unreadable")
        with contextlib.suppress(OSError):
            file.unlink()
        return error if isinstance(error, Damage) else Damage("corrupted")

    def other_keys(self) -> Iterator[dict[str, str]]:
        """Yield what the other keys with files here depend on."""
        for file in self.root.glob("*/key.json"):
            try:
                parts = json.loads(file.read_text("utf-8"))
                if file.parent != self.path and isinstance(parts, dict):
                    yield parts
            except (OSError, ValueError):
                continue

    # -- writing --

    def write(self, node: Node, data: np.ndarray) -> bool:
        """Store a block; return whether that worked. A full or read-only disk costs only the storing."""
        file = self._file(node.name)
        draft = file.with_suffix(f".{os.getpid()}.tmp")
        head = _packed(node, len(data))
        try:
            self.path.mkdir(exist_ok=True)
            if not (self.path / "key.json").exists():
                self._put(self.path / "key.json", draft, self.key)
            self._put(file, draft, head, memoryview(data), _digest(data))
        except OSError as error:
            self.unwritten += 1
            self.trouble = error.strerror or str(error)
            with contextlib.suppress(OSError):
                draft.unlink()
            return False
        self.seen.add(node.name.hex())
        return True

    def _put(self, file: Path, draft: Path, *parts: bytes | memoryview) -> None:
        with draft.open("wb") as stream:
            for part in parts:
                stream.write(part)
        draft.replace(file)

    def make_room(self, size: int, using: set[bytes]) -> int:
        """Remove the least used files of all keys, but none of `using`, until `size` more bytes fit.

        Returns how many bytes may be written, which is less where there is nothing left to remove.
        """
        files, total = self._files()
        total += 0 if (self.path / "key.json").exists() else len(self.key)
        spared = {f"{name.hex()}.kv" for name in using}
        for _, length, path in sorted(files):
            if total + size <= self.limit:
                break
            if path.name in spared and path.parent == self.path:
                continue
            with contextlib.suppress(OSError):
                path.unlink()
                total -= length
        return self.limit - total

    def _files(self) -> tuple[list[tuple[int, int, Path]], int]:
        """What may be removed, as (time of last use, bytes, path), and the bytes of all files there are."""
        files, total = [], 0
        for entry in _entries(self.root):
            try:
                stat = entry.stat()
            except OSError:
                continue
            total += stat.st_size
            left = entry.name.endswith(".tmp") and time.time() - stat.st_mtime > ABANDONED
            if left or entry.name.endswith(".kv"):
                files.append((0 if left else stat.st_mtime_ns, stat.st_size, Path(entry.path)))
        return files, total

    def touch(self, nodes: list[Node]) -> None:
        """Count files of blocks, given from the root on, as used now, the first of them last."""
        now = time.time_ns()
        for later, node in enumerate(reversed(nodes)):
            if node.on_disk:
                with contextlib.suppress(OSError):
                    os.utime(self._file(node.name), ns=(now + later, now + later))

    def nbytes(self) -> int:
        """Return the bytes of all files of all keys."""
        return self._files()[1]

    def _file(self, name: bytes) -> Path:
        return self.path / f"{name.hex()}.kv"


def file_bytes(tokens: int, data: int) -> int:
    """Return the bytes of a file of so many tokens and bytes of KV."""
    return HEAD + 4 * tokens + DIGEST + data + DIGEST


def _packed(node: Node, size: int) -> bytes:
    head = MAGIC + node.parent + len(node.tokens).to_bytes(4, "little") + size.to_bytes(8, "little")
    head += node.tokens.astype("<i4").tobytes()
    return head + _digest(head)


def _head(begin: bytes) -> tuple[Known, int]:
    """Read the head of a file; return what it says and how long the file must be, or raise Damage."""
    count = int.from_bytes(begin[HEAD - 12 : HEAD - 8], "little")
    end = HEAD + 4 * count
    sound = begin.startswith(MAGIC) and 0 < end + DIGEST <= len(begin)
    if not sound or _digest(begin[:end]) != begin[end : end + DIGEST]:
        raise Damage("corrupted")
    parent, size = begin[len(MAGIC) : len(MAGIC) + 16], int.from_bytes(begin[HEAD - 8 : HEAD], "little")
    tokens = np.frombuffer(begin[HEAD:end], "<i4").astype(np.int32)
    return Known(block_name(parent, tokens), parent, tokens, size), file_bytes(count, size)


def _digest(data: bytes | np.ndarray) -> bytes:
    return hashlib.blake2b(data, digest_size=DIGEST).digest()


def _name(text: str) -> bytes:
    """The name in a file's name; no block has that of a file that is called otherwise."""
    try:
        return bytes.fromhex(text)
    except ValueError:
        return b""


def _entries(root: Path) -> Iterator[os.DirEntry[str]]:
    """All files of all keys."""
    try:
        with os.scandir(root) as folders:
            paths = [folder.path for folder in folders if folder.is_dir()]
    except OSError:
        return
    for path in paths:
        with contextlib.suppress(OSError), os.scandir(path) as files:
            yield from list(files)
