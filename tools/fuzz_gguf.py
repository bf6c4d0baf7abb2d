"""Open mutated GGUF files: every one must open or give one clear CMRError, quickly and in little memory.

    python tools/fuzz_gguf.py --count 20000 --seed 1

Exit 1 and print the seed and number of each file that did anything else; `--keep FOLDER` keeps those files.
"""

from __future__ import annotations

import argparse
import random
import struct
import sys
import tempfile
import time
import traceback
import tracemalloc
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "runner"), str(ROOT)]

import numpy as np  # noqa: E402
from tests import ggufs  # noqa: E402

from cmr.errors import CMRError  # noqa: E402
from cmr.gguf_file import GGUFFile, open_gguf  # noqa: E402

SLOW_SECONDS = 2.0
MUCH_BYTES = 32 << 20
LONG_MESSAGE = 800
NUMBERS = [0, 1, 2, 3, 4, 7, 8, 9, 12, 13, 31, 32, 33, 255, 256, 2**15, 2**16, 2**31 - 1, 2**31, 2**32 - 1]
NUMBERS += [2**32, 2**40, 2**62, 2**63 - 1, 2**63, 2**64 - 32, 2**64 - 1]

Mutation = Callable[[random.Random, bytearray], None]


class Finding(NamedTuple):
    """A file that misbehaved: which one, how, and its bytes."""

    number: int
    what: str
    data: bytes


def seeds() -> list[bytes]:
    """Return small well-formed files: all value types, many tensor types, other alignments, a split model."""
    rng = np.random.default_rng(0)
    scalars = {f"x.{kind}": ggufs.Typed(kind, 1) for kind in ggufs.CODES}
    arrays = {
        f"a.{kind}": np.arange(5).astype(kind[0] + str(int(kind[1:]) // 8)) for kind in scalars_of_numbers()
    }
    vocabulary = {
        "general.architecture": "llama",
        "tokenizer.ggml.tokens": [b"<s>", b"", "é".encode(), b"\xff", *[b"t%d" % i for i in range(40)]],
        "tokenizer.ggml.merges": [b"a b", b"c d"],
        "tokenizer.ggml.scores": np.zeros(44, np.float32),
        "x.flags": np.array([True, False]),
    }
    every = {
        f"t.{name}": ggufs.random_tensor(rng, name, 2, 256) for name in ("F32", "F16", "Q4_0", "Q6_K", "BF16")
    }
    every["t.other"] = ggufs.Blocks(16, (1, 256), bytes(66))
    every["t.unknown"] = ggufs.Blocks(77, (3,), bytes(3))
    counts = {"split.count": ggufs.Typed("u16", 2), "split.tensors.count": ggufs.Typed("i32", 2)}
    split = {"split.no": ggufs.Typed("u16", 0)} | counts
    return [
        ggufs.gguf_bytes(scalars | arrays | vocabulary, every),
        ggufs.gguf_bytes(vocabulary, version=2),
        ggufs.gguf_bytes(
            {"general.alignment": 64} | scalars, {"w": np.ones((2, 3, 4, 5), np.float32)}, alignment=64
        ),
        ggufs.gguf_bytes(split, {"w": np.ones(3, np.float32)}),
        ggufs.gguf_bytes(),
    ]


def scalars_of_numbers() -> list[str]:
    """Return the names of the wire types that are numbers."""
    return [kind for kind in ggufs.CODES if kind != "bool"]


def flip(r: random.Random, data: bytearray) -> None:
    """Flip a few bits."""
    for _ in range(r.choice([1, 1, 2, 8])):
        data[r.randrange(len(data))] ^= 1 << r.randrange(8)


def number(r: random.Random, data: bytearray) -> None:
    """Put an extreme number somewhere."""
    width = r.choice([1, 4, 8, 8])
    at = r.randrange(len(data))
    data[at : at + width] = struct.pack("<Q", r.choice(NUMBERS))[:width]


def aimed_number(r: random.Random, data: bytearray) -> None:
    """Put an extreme number where a string, an array or an index entry is described."""
    places = [at for at in range(4, len(data) - 8) if data[at] and not any(data[at + 1 : at + 4])]
    at = r.choice(places or [4])
    data[at : at + 8] = struct.pack("<Q", r.choice(NUMBERS))[: r.choice([4, 8])]


def cut(r: random.Random, data: bytearray) -> None:
    """Cut the end off."""
    del data[r.randrange(len(data)) :]


def remove(r: random.Random, data: bytearray) -> None:
    """Remove some bytes from the middle."""
    at = r.randrange(len(data))
    del data[at : at + r.choice([1, 4, 8, 20])]


def insert(r: random.Random, data: bytearray) -> None:
    """Insert random bytes."""
    at = r.randrange(len(data))
    data[at:at] = r.randbytes(r.choice([1, 4, 8, 40]))


def repeat(r: random.Random, data: bytearray) -> None:
    """Write a piece of the file over another place: repeated keys and tensors, shifted fields."""
    size = r.choice([4, 8, 16, 40])
    source, target = r.randrange(len(data)), r.randrange(len(data))
    data[target : target + size] = data[source : source + size]


def rubbish(r: random.Random, data: bytearray) -> None:
    """Keep the magic and the version, and replace what follows."""
    data[8:] = r.randbytes(r.randrange(200))


MUTATIONS: list[Mutation] = [flip, number, aimed_number, aimed_number, cut, remove, insert, repeat, rubbish]


def mutants(count: int, seed: int) -> Iterator[tuple[int, bytes]]:
    """Yield `count` numbered mutants, each of them a function of the seed and its number alone."""
    originals = seeds()
    for i in range(count):
        r = random.Random(f"{seed}/{i}")
        data = bytearray(r.choice(originals))
        for _ in range(r.choice([1, 1, 1, 2, 3])):
            r.choice(MUTATIONS)(r, data)
            if not data:
                break
        yield i, bytes(data)


def use(file: GGUFFile) -> None:
    """Look at all there is in an open file, as `cmr info` and a model would."""
    for tensor in file.tensors.values():
        tensor.type_name.encode()
        try:
            data = tensor.data
        except CMRError:
            continue
        if len(data) != tensor.nbytes or tensor.address - tensor.source.address != tensor.offset:
            raise RuntimeError(f"wrong view of {tensor.name!r}")
        int(data[0]), int(data[-1])
    for key, value in file.metadata.items():
        key.encode(), len(repr(value))


def attempt(path: Path) -> str:
    """Open a file and use it; return "opened", "refused", or what went wrong."""
    before = time.process_time()
    try:
        with open_gguf(path) as file:
            use(file)
        result = "opened"
    except CMRError as error:
        message = str(error)
        fine = 0 < len(message) - len(str(path)) < LONG_MESSAGE and message.isprintable()
        result = "refused" if fine else f"a poor message: {message[:LONG_MESSAGE]!r}"
    except Exception:
        result = traceback.format_exc()
    seconds = time.process_time() - before
    return f"{seconds:.1f} s" if seconds > SLOW_SECONDS else result


def fuzz(
    count: int, seed: int, folder: Path, measure_memory: bool = True
) -> tuple[Counter[str], list[Finding]]:
    """Open `count` mutants written into `folder`; count those that open and are refused, list the others."""
    tally: Counter[str] = Counter()
    findings = []
    path, _ = ggufs.write_split(
        folder, "mutant", 2, {}, {"w": np.ones(3, np.float32), "v": np.ones(5, np.float32)}
    )
    if measure_memory:
        tracemalloc.start()
    for i, data in mutants(count, seed):
        path.write_bytes(data)
        if measure_memory:
            tracemalloc.reset_peak()
            before = tracemalloc.get_traced_memory()[0]
        result = attempt(path)
        if measure_memory and tracemalloc.get_traced_memory()[1] - before > MUCH_BYTES:
            result = f"{(tracemalloc.get_traced_memory()[1] - before) >> 20} MiB"
        if result in ("opened", "refused"):
            tally[result] += 1
        else:
            findings.append(Finding(i, result, data))
    if measure_memory:
        tracemalloc.stop()
    return tally, findings


def main() -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--count", type=int, default=20000, help="how many mutants to open (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=1, help="which mutants these are (default: %(default)s)")
    parser.add_argument("--keep", type=Path, help="a folder for the files that misbehave")
    options = parser.parse_args()
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        tally, findings = fuzz(options.count, options.seed, Path(folder))
    for finding in findings:
        print(f"--seed {options.seed}, number {finding.number}: {finding.what}")
        if options.keep:
            options.keep.mkdir(parents=True, exist_ok=True)
            (options.keep / f"{options.seed}-{finding.number}.gguf").write_bytes(finding.data)
    seconds = time.perf_counter() - started
    print(
        f"{options.count} files in {seconds:.0f} s: {tally['opened']} opened, {tally['refused']} refused, "
        f"{len(findings)} misbehaved"
    )
    return 1 if findings else 0


if __name__ == "__main__":
    sys.exit(main())
