"""Write a GGUF of random weights in a real model's shape, for measuring speed.

python tools/random_model.py --shape llama-3.2-1b --type q4_k_m [--vocab VOCABULARY.gguf] -o models/1b.gguf

Without --vocab the file gets a made-up vocabulary of the right size, so nothing else is needed. Blocks are
random bits with scales that keep activations near one; types are mixed over tensors as llama.cpp's quantizer
mixes them.
"""

from __future__ import annotations

import argparse
import math
import os
import struct
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

sys.path[:0] = [str(Path(__file__).parents[1] / "runner"), str(Path(__file__).parent)]

from made_up_vocabulary import made_up_vocabulary  # noqa: E402
from model_shapes import FILE_TYPES, SHAPES, Shape, tensors  # noqa: E402

from cmr.gguf_file import open_gguf  # noqa: E402
from cmr.quants import Format  # noqa: E402

ALIGNMENT = 32
CHUNK_BYTES = 1 << 24


# For each format: where its float16 scale lies and the spread of the integers it multiplies, then, where it
# has one, where the minimum lies and how many scales it is, so that the weights have no mean.
SCALES: dict[str, tuple[int, float, int, float]] = {
    "Q4_0": (0, 4.6, -1, 0),
    "Q4_1": (0, 4.6, 2, -7.5),
    "Q5_0": (0, 9.2, -1, 0),
    "Q5_1": (0, 9.2, 2, -15.5),
    "Q8_0": (0, 74, -1, 0),
    "Q2_K": (80, 14, 82, 1.5),
    "Q3_K": (108, 42, -1, 0),
    "Q4_K": (0, 257, 2, 7.5),
    "Q5_K": (0, 520, 2, 15.5),
    "Q6_K": (208, 1370, -1, 0),
    "IQ4_NL": (0, 71, -1, 0),
    "IQ4_XS": (0, 1310, -1, 0),
}


def rope_factors(shape: Shape, low: float = 1, high: float = 4, trained: int = 8192) -> np.ndarray:
    """Return what Llama 3.1 divides each frequency by, float32 [head_dim / 2]."""
    freq = shape.rope_base ** (-np.arange(0, shape.head_dim, 2) / shape.head_dim)
    turns = trained * freq / (2 * math.pi)
    share = np.clip((turns - low) / (high - low), 0, 1)
    return (1 / (share + (1 - share) / shape.rope_factor)).astype(np.float32)


def random_rows(rng: np.random.Generator, format: Format, rows: int, k: int, spread: float) -> np.ndarray:
    """Return uint8 blocks of `rows` random rows of k weights, whose products with unit inputs spread so."""
    target = spread / math.sqrt(k)
    count = rows * k // format.elements
    raw = np.frombuffer(rng.bytes(count * format.bytes), np.uint8)
    if format.name in ("F32", "F16", "BF16"):
        bits = raw.view(np.uint32 if format.bytes == 4 else np.uint16)
        return _floats(bits, format.name, target).view(np.uint8)
    blocks = raw.reshape(count, format.bytes).copy()
    if format.name == "MXFP4":  # an exponent; the numbers spread by 5.9
        blocks[:, 0] = 128 + math.floor(math.log2(target / 5.9)) + (blocks[:, 0] & 1)
        return blocks
    at, unit, minimum, scales = SCALES[format.name]
    # Signs differ because integers from -8 to 7 have a mean, which would push all activations one way.
    scale = target / unit * (0.5 + rng.random(count, np.float32)) * rng.choice(np.float32([-1, 1]), count)
    blocks[:, at : at + 2] = scale.astype(np.float16).view(np.uint8).reshape(count, 2)
    if minimum >= 0:
        blocks[:, minimum : minimum + 2] = (
            (scale * scales).astype(np.float16).view(np.uint8).reshape(count, 2)
        )
    return blocks


def _floats(bits: np.ndarray, name: str, target: float) -> np.ndarray:
    """Floats of any sign and mantissa and one of two exponents: faster than drawing from a distribution."""
    mantissa, bias = {"F32": (23, 127), "F16": (10, 15), "BF16": (7, 127)}[name]
    exponent = math.floor(math.log2(target)) - 1 + bias
    width = 8 * bits.itemsize
    sign = bits & bits.dtype.type(1 << (width - 1))
    rest = bits & bits.dtype.type((1 << (mantissa + 1)) - 1)
    return sign | (rest + bits.dtype.type(exponent << mantissa))


def chunks(
    rng: np.random.Generator, shape: Shape, name: str, format: Format, dims: tuple[int, ...], spread: float
) -> Iterator[bytes]:
    """Yield a tensor's bytes in pieces."""
    if name == "rope_freqs.weight":
        yield rope_factors(shape).tobytes()
    elif name.endswith("ssm_a"):  # logarithms of how much is kept: from nearly nothing to nearly all
        yield (-(10 ** rng.uniform(-3, 1, dims))).astype(np.float32).tobytes()
    elif len(dims) == 1 or name.endswith(".bias"):
        centre = 0 if name.endswith(".bias") else 1
        yield (centre + spread * rng.standard_normal(dims)).astype(np.float32).tobytes()
    else:
        *counts, k = dims
        rows = math.prod(counts)
        step = max(1, CHUNK_BYTES // (k // format.elements * format.bytes))
        for start in range(0, rows, step):
            yield random_rows(rng, format, min(step, rows - start), k, spread).tobytes()


def metadata(shape: Shape, name: str, file_type: str, vocabulary: Mapping[str, Any]) -> dict[str, Any]:
    """Return the metadata of a model of this shape with these tokenizer keys."""
    sizes = {
        "block_count": shape.layers,
        "context_length": shape.context,
        "embedding_length": shape.embd,
        "feed_forward_length": shape.ffn,
        "attention.head_count": shape.heads,
        "attention.head_count_kv": shape.kv_heads,
        "attention.key_length": shape.head_dim,
        "attention.value_length": shape.head_dim,
        "attention.layer_norm_rms_epsilon": shape.eps,
        "rope.freq_base": shape.rope_base,
        "rope.dimension_count": shape.rotated or shape.head_dim,
        "vocab_size": shape.vocab,
        **shape.more,
    }
    if shape.experts:
        sizes |= {
            "expert_count": shape.experts,
            "expert_used_count": shape.used,
            "expert_feed_forward_length": shape.ffn,
        }
    if shape.shared:
        sizes["expert_shared_feed_forward_length"] = shape.shared
    if shape.delta:
        sizes |= {
            "ssm.group_count": shape.delta.key_heads,
            "ssm.time_step_rank": shape.delta.heads,
            "ssm.state_size": shape.delta.dim,
            "ssm.inner_size": shape.delta.values,
            "ssm.conv_kernel": shape.delta.window,
        }
    general = {"architecture": shape.arch, "name": f"random {name}", "file_type": FILE_TYPES[file_type][0]}
    return (
        {f"general.{key}": item for key, item in general.items()}
        | {f"{shape.arch}.{key}": item for key, item in sizes.items()}
        | dict(vocabulary)
    )


def _string(text: bytes) -> bytes:
    return struct.pack("<Q", len(text)) + text


def _value(item: Any) -> bytes:
    """A metadata value as GGUF writes it, its type first."""
    if isinstance(item, bool):
        return struct.pack("<I?", 7, item)
    if isinstance(item, int):
        return struct.pack("<II", 4, item)
    if isinstance(item, float):
        return struct.pack("<If", 6, item)
    if isinstance(item, str):
        return struct.pack("<I", 8) + _string(item.encode())
    if isinstance(item, np.ndarray):
        kinds = {
            "uint8": 0,
            "int8": 1,
            "uint16": 2,
            "int16": 3,
            "uint32": 4,
            "int32": 5,
            "float32": 6,
            "bool": 7,
        }
        return struct.pack("<IIQ", 9, kinds[item.dtype.name], len(item)) + item.tobytes()
    return struct.pack("<IIQ", 9, 8, len(item)) + b"".join(map(_string, item))


def write(
    path: Path, shape: Shape, name: str, file_type: str, vocabulary: Mapping[str, Any], seed: int
) -> None:
    """Write the file; the same seed gives the same bytes."""
    rows = tensors(shape, file_type)
    pairs = metadata(shape, name, file_type, vocabulary)
    head = b"GGUF" + struct.pack("<IQQ", 3, len(rows), len(pairs))
    head += b"".join(_string(key.encode()) + _value(item) for key, item in pairs.items())
    offset = 0
    for key, (format, dims, _) in rows.items():
        head += _string(key.encode()) + struct.pack(f"<I{len(dims)}Q", len(dims), *dims[::-1])
        head += struct.pack("<IQ", format.type, offset)
        offset += math.prod(dims) // format.elements * format.bytes
        offset += -offset % ALIGNMENT
    rng = np.random.Generator(np.random.SFC64(seed))
    partial = path.with_name(path.name + ".partial")
    with partial.open("wb") as out:
        out.write(head)
        _pad(out)
        for key, (format, dims, spread) in rows.items():
            for piece in chunks(rng, shape, key, format, dims, spread):
                out.write(piece)
            _pad(out)
        _settle(out)
    partial.replace(path)


def _settle(out: BinaryIO) -> None:
    """Have the file read from disk when it is next used: in large pages, as after a start of the machine.

    What was written piece by piece stays cached in small ones, which are read a third slower.
    """
    out.flush()
    os.fsync(out.fileno())
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(out.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _pad(out: BinaryIO) -> None:
    out.write(bytes(-out.tell() % ALIGNMENT))


def random_model(
    path: Path, shape_name: str, file_type: str, vocab: Path | None = None, seed: int = 1
) -> Path:
    """Write a random model of a named shape and file type, with a vocabulary from a GGUF or a made-up one."""
    shape = SHAPES[shape_name]
    if vocab is None:
        vocabulary = made_up_vocabulary(shape.vocab)
    else:
        found = open_gguf(vocab).metadata
        vocabulary = {key: item for key, item in found.items() if key.startswith("tokenizer.")}
        shape = Shape(**(vars(shape) | {"vocab": len(found["tokenizer.ggml.tokens"])}))
    path.parent.mkdir(parents=True, exist_ok=True)
    write(path, shape, shape_name, file_type, vocabulary, seed)
    return path


def main() -> None:
    """Write the file that the command line asks for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="llama-3.2-1b")
    parser.add_argument("--type", choices=FILE_TYPES, default="q4_k_m", type=str.lower)
    parser.add_argument(
        "--vocab", type=Path, help="a GGUF to copy the tokenizer from (default: a made-up one)"
    )
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("-o", "--output", type=Path, required=True)
    args = parser.parse_args()
    path = random_model(args.output, args.shape, args.type, args.vocab, args.seed)
    print(f"{path}: {path.stat().st_size / 1e6:.0f} MB")


if __name__ == "__main__":
    main()
