"""Build GGUF files in memory, byte by byte, well formed or not, and blocks of weights in every format."""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from cmr.quants import FORMATS, format_by_name

CODES = {
    "u8": (0, "<B"),
    "i8": (1, "<b"),
    "u16": (2, "<H"),
    "i16": (3, "<h"),
    "u32": (4, "<I"),
    "i32": (5, "<i"),
    "f32": (6, "<f"),
    "bool": (7, "<B"),
    "u64": (10, "<Q"),
    "i64": (11, "<q"),
    "f64": (12, "<d"),
}
STRING, ARRAY = 8, 9


class Typed(NamedTuple):
    """A scalar with a wire type by name: Typed("u64", 3)."""

    kind: str
    value: Any


class Raw(NamedTuple):
    """A metadata value as a type number and the bytes that follow it."""

    code: int
    bytes: bytes


class Blocks(NamedTuple):
    """A tensor as bytes: a format's name or ggml's number, the shape with the innermost last, the bytes."""

    type: str | int
    shape: tuple[int, ...]
    bytes: bytes


def string(text: str | bytes) -> bytes:
    """Encode a length-prefixed string."""
    raw = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(raw)) + raw


def value(item: Any) -> bytes:
    """Encode a metadata value with its type: numpy arrays by dtype, int as u32, i32 or u64, float as f32."""
    if isinstance(item, Raw):
        return struct.pack("<I", item.code) + item.bytes
    if isinstance(item, Typed):
        code, layout = CODES[item.kind]
        return struct.pack("<I", code) + struct.pack(layout, item.value)
    if isinstance(item, str):
        return struct.pack("<I", STRING) + string(item)
    if isinstance(item, np.ndarray):
        kind = "bool" if item.dtype == bool else f"{item.dtype.kind}{8 * item.dtype.itemsize}"
        return struct.pack("<IIQ", ARRAY, CODES[kind][0], len(item)) + item.tobytes()
    if isinstance(item, list | tuple):
        return struct.pack("<IIQ", ARRAY, STRING, len(item)) + b"".join(map(string, item))
    return value(Typed(_scalar_kind(item), item))


def _scalar_kind(item: bool | int | float) -> str:
    if isinstance(item, bool):
        return "bool"
    if isinstance(item, float):
        return "f32"
    if item < 0:
        return "i32"
    return "u32" if item < 1 << 32 else "u64"


def tensor(item: np.ndarray | Blocks) -> Blocks:
    """Turn a float32, float16 or integer array into Blocks; Blocks stay as they are."""
    if isinstance(item, Blocks):
        return item
    names = {"float32": 0, "float16": 1, "int8": 24, "int16": 25, "int32": 26, "int64": 27, "float64": 28}
    return Blocks(names[item.dtype.name], item.shape, np.ascontiguousarray(item).tobytes())


def type_number(type: str | int) -> int:
    """Return ggml's number of a format's name."""
    return type if isinstance(type, int) else format_by_name(type).type


def gguf_bytes(
    metadata: Mapping[str, Any] | Sequence[tuple[str | bytes, Any]] = (),
    tensors: Mapping[str, np.ndarray | Blocks] | Sequence[tuple[str | bytes, np.ndarray | Blocks]] = (),
    version: int = 3,
    alignment: int = 32,
    offsets: Mapping[str, int] | None = None,
) -> bytes:
    """Return the bytes of a GGUF file; sequences of pairs allow repeated names, `offsets` wrong places.

    `alignment` says how the data are laid out; put general.alignment into `metadata` where it is not 32.
    """
    pairs = list(metadata.items() if isinstance(metadata, Mapping) else metadata)
    named = list(tensors.items() if isinstance(tensors, Mapping) else tensors)
    head = b"GGUF" + struct.pack("<IQQ", version, len(named), len(pairs))
    head += b"".join(string(key) + value(item) for key, item in pairs)
    data = b""
    for name, item in named:
        blocks = tensor(item)
        place = (offsets or {}).get(name, len(data)) if isinstance(name, str) else len(data)
        shape = blocks.shape[::-1]
        head += string(name) + struct.pack(f"<I{len(shape)}Q", len(shape), *shape)
        head += struct.pack("<IQ", type_number(blocks.type), place)
        data += blocks.bytes + bytes(-len(blocks.bytes) % alignment)
    return head + bytes(-len(head) % alignment) + data if named else head


def write_gguf(path: Path, *args: Any, **options: Any) -> Path:
    """Write what `gguf_bytes` returns to `path`, and return the path."""
    path.write_bytes(gguf_bytes(*args, **options))
    return path


def write_split(
    folder: Path,
    stem: str,
    count: int,
    metadata: Mapping[str, Any],
    tensors: Mapping[str, np.ndarray | Blocks],
) -> list[Path]:
    """Write a model in `count` parts, named and keyed as split models are, and return their paths."""
    names = list(tensors)
    paths = []
    for number in range(count):
        keys = {
            "split.no": Typed("u16", number),
            "split.count": Typed("u16", count),
            "split.tensors.count": Typed("i32", len(names)),
        }
        part = {name: tensors[name] for name in names[number::count]}
        path = folder / f"{stem}-{number + 1:05d}-of-{count:05d}.gguf"
        paths.append(write_gguf(path, (dict(metadata) if number == 0 else {}) | keys, part))
    return paths


# Where the float16 scales lie in a block of each format, so that random blocks can have sensible ones.
SCALES_AT = {
    "Q4_0": [0],
    "Q4_1": [0, 2],
    "Q5_0": [0],
    "Q5_1": [0, 2],
    "Q8_0": [0],
    "Q2_K": [80, 82],
    "Q3_K": [108],
    "Q4_K": [0, 2],
    "Q5_K": [0, 2],
    "Q6_K": [208],
    "IQ4_NL": [0],
    "IQ4_XS": [0],
    "MXFP4": [],
}


def random_blocks(
    rng: np.random.Generator, type: str | int, rows: int, k: int, scale: float = 0.01
) -> np.ndarray:
    """Return uint8 [rows, row bytes] of random weights: any bits, but finite, and scales up to `scale`."""
    layout = FORMATS[type_number(type)]
    n = rows * k // layout.elements
    if layout.name == "F32":
        return (rng.standard_normal((rows, k)) * scale).astype(np.float32).view(np.uint8)
    if layout.name == "F16":
        return (rng.standard_normal((rows, k)) * scale).astype(np.float16).view(np.uint8)
    if layout.name == "BF16":
        floats = (rng.standard_normal((rows, k)) * scale).astype(np.float32)
        return (floats.view(np.uint32) >> 16).astype(np.uint16).view(np.uint8)
    blocks = rng.integers(0, 256, (n, layout.bytes), np.uint8)
    set_scales(layout.name, blocks, lambda: rng.uniform(-scale, scale, n))
    return blocks.reshape(rows, -1)


def set_scales(type: str, blocks: np.ndarray, draw: Callable[[], Any]) -> None:
    """Write the scales that draw() gives into blocks, uint8 [n, bytes]; MXFP4 has powers of two near them."""
    if type == "MXFP4":
        with np.errstate(divide="ignore"):
            blocks[:, 0] = np.clip(np.rint(128 + np.log2(abs(draw()))), 0, 255)
    for at in SCALES_AT[type]:
        blocks[:, at : at + 2] = np.float16(draw()).reshape(-1, 1).view(np.uint8)


def random_tensor(
    rng: np.random.Generator, type: str | int, rows: int, k: int, scale: float = 0.01
) -> Blocks:
    """Return a [rows, k] tensor of `random_blocks`."""
    return Blocks(type, (rows, k), random_blocks(rng, type, rows, k, scale).tobytes())
