"""The block formats of GGUF tensors as a table: how many elements share how many bytes."""

from __future__ import annotations

from typing import NamedTuple

from cmr.errors import FileError

# The non-linear levels of IQ4_NL and IQ4_XS: kvalues_iq4nl in ggml's ggml-common.h.
IQ4_LEVELS = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)

# Twice the values of E2M1, the four-bit floats of MXFP4: OCP Microscaling Formats 1.0, doubled as in ggml.
E2M1_DOUBLED = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)


class Format(NamedTuple):
    """A block format: `elements` consecutive weights of a row take `bytes` bytes; `type` is ggml's number."""

    name: str
    type: int
    elements: int
    bytes: int


def _table(*rows: tuple[str, int, int, int]) -> dict[int, Format]:
    return {row[1]: Format(*row) for row in rows}


# Sizes: the block structures of https://github.com/ggml-org/ggml/blob/master/src/ggml-common.h
FORMATS: dict[int, Format] = _table(
    ("F32", 0, 1, 4),
    ("F16", 1, 1, 2),
    ("Q4_0", 2, 32, 18),
    ("Q4_1", 3, 32, 20),
    ("Q5_0", 6, 32, 22),
    ("Q5_1", 7, 32, 24),
    ("Q8_0", 8, 32, 34),
    ("Q2_K", 10, 256, 84),
    ("Q3_K", 11, 256, 110),
    ("Q4_K", 12, 256, 144),
    ("Q5_K", 13, 256, 176),
    ("Q6_K", 14, 256, 210),
    ("IQ4_NL", 20, 32, 18),
    ("IQ4_XS", 23, 256, 136),
    ("BF16", 30, 1, 2),
    ("MXFP4", 39, 32, 17),
)

# Known to ggml, but without kernels here: such files open and can be listed, their weights cannot be used.
UNSUPPORTED: dict[int, Format] = _table(
    ("Q8_K", 15, 256, 292),
    ("IQ2_XXS", 16, 256, 66),
    ("IQ2_XS", 17, 256, 74),
    ("IQ3_XXS", 18, 256, 98),
    ("IQ1_S", 19, 256, 50),
    ("IQ3_S", 21, 256, 110),
    ("IQ2_S", 22, 256, 82),
    ("I8", 24, 1, 1),
    ("I16", 25, 1, 2),
    ("I32", 26, 1, 4),
    ("I64", 27, 1, 8),
    ("F64", 28, 1, 8),
    ("IQ1_M", 29, 256, 56),
    ("TQ1_0", 34, 256, 54),
    ("TQ2_0", 35, 256, 66),
    ("NVFP4", 40, 64, 36),
    ("Q1_0", 41, 128, 18),
)


def format_of(type: int) -> Format:
    """Return the format of ggml's type number; raises FileError when CMR cannot compute with it."""
    found = FORMATS.get(type)
    if found is None:
        raise FileError(f"tensor type {type_name(type)} is not supported; there are: {supported_names()}")
    return found


def format_by_name(name: str) -> Format:
    """Return the format called `name` in any case ("q4_0", "Q4_K"); raises FileError when there is none."""
    for format in FORMATS.values():
        if format.name == name.upper():
            return format
    raise FileError(f"tensor type {name!r} is not supported; there are: {supported_names()}")


def type_name(type: int) -> str:
    """Return the name of ggml's type number, supported or not; "unknown (99)" for foreign ones."""
    found = FORMATS.get(type) or UNSUPPORTED.get(type)
    return found.name if found else f"unknown ({type})"


def supported_names() -> str:
    """Return the names of all supported formats in one line, for messages."""
    return " ".join(format.name for format in FORMATS.values())


def row_bytes(type: int, n: int) -> int:
    """Return the bytes of a row of `n` elements; raises FileError when those do not fill whole blocks."""
    format = format_of(type)
    if n < 0 or n % format.elements:
        raise FileError(f"a row of {n} elements is not made of {format.name} blocks of {format.elements}")
    return n // format.elements * format.bytes
