"""A program: a little of everything that the kernels of this process compute, saved as arrays by name.

Arguments: a folder for what it needs, the file to write, and "products" where only products of a few formats are
wanted. test_variants compares what variants write.
"""

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
from tests.cmr.kernels.cases import columns_of
from tests.ggufs import random_tensor, write_gguf
from tests.models import RECIPES, write_model

from cmr.gguf_file import open_gguf
from cmr.kvcache import AttnRule
from cmr.model import open_model
from cmr.ops.cpu import CpuOps
from cmr.ops.kernels.emit import TARGET
from cmr.ops.kernels.rows import ACTIVATIONS
from cmr.ops.pack import GROUPED, PACKED
from cmr.ops.records import Segment
from cmr.quants import FORMATS

RNG = np.random.default_rng(0)
FEW = ("Q4_K", "Q6_K", "Q8_0", "IQ4_NL")


def floats(*shape):
    return RNG.standard_normal(shape).astype(np.float32)


def filled(ops, values):
    buffer = ops.buffer(*values.shape)
    buffer.array[:] = values
    return buffer


def products(ops, folder, few):
    """Every format through matrix-vector and matrix-matrix kernels, bare and finished."""
    names = [layout.name for layout in FORMATS.values()]
    blocks = {name: random_tensor(RNG, name, 70, columns_of(name)[-1], 0.05) for name in names}
    tensors = open_gguf(write_gguf(folder / "blocks.gguf", {}, blocks)).tensors
    for name in names:
        rng = np.random.default_rng(0)
        matrix = ops.matrix(tensors[name])
        for n, n_prompt in [(1, 0), (7, 0), (7, 7)]:
            x, before, bias = (
                rng.standard_normal(shape).astype(np.float32) for shape in ((n, matrix.cols), (n, 70), (70,))
            )
            if few and name not in FEW:
                continue
            bare, finished = ops.buffer(n, 70), filled(ops, before)
            ops.project(filled(ops, x), n, n_prompt, [(matrix, None)], bare)
            ops.project(filled(ops, x), n, n_prompt, [(matrix, bias)], finished, add=True, scale=0.3)
            yield f"product {name} {n} {n_prompt}", bare.array
            yield f"finished {name} {n} {n_prompt}", finished.array


def gates(ops, folder, few):
    blocks = {"w": random_tensor(RNG, "F32", 80, 64, 0.1)}
    matrix = open_gguf(write_gguf(folder / "gates.gguf", {}, blocks)).tensors["w"]
    gate, up = ((ops.matrix(matrix, rows=rows), None) for rows in ((0, 40), (40, 80)))
    for act in ACTIVATIONS:
        out = ops.buffer(9, 40)
        ops.glu(filled(ops, 3 * floats(9, 64)), 9, 4, gate, up, act, out)
        yield f"gate {act}", out.array


def rows(ops, folder, few):
    for kind in ("rms", "layer"):
        x, norm = filled(ops, floats(5, 300)), ops.norm_of(floats(300), floats(300), 1e-5, kind)
        out = filled(ops, floats(5, 300))
        ops.norm(x, 5, norm, x)
        ops.add_norm(x, 5, norm, out, 0.5)
        yield f"norm {kind}", np.concatenate([x.array, out.array])
    for pairing in ("neox", "norm"):
        x, table = filled(ops, floats(5, 300)), ops.rope_table(0.7 ** np.arange(23), 64)
        ops.rope(x, 5, np.array([0, 1, 17, 40, 63], np.int32), 9, 5, 56, table, pairing)
        yield f"rope {pairing}", x.array
    x = filled(ops, 40 * floats(5, 300))
    ops.finish_logits(x, 5, 1.1, 30.0)
    yield "cap", x.array


def attention(ops, folder, few):
    rules = [AttnRule(), AttnRule(window=70, sinks=3), AttnRule(softcap=5.0, scale=0.2)]
    rules.append(AttnRule(sink_logits=np.float32([-1, 2, 0.5, 4])))
    for heads, groups, dim in [(4, 2, 64), (3, 1, 80), (2, 2, 20)]:
        for dtype in (np.float16, np.float32):
            k, v = (np.zeros((groups, 640, dim), dtype) for _ in "kv")
            positions = np.zeros(640, np.int32)
            new = floats(600, groups, dim), floats(600, groups, dim)
            ops.kv_store(Segment(k, v, positions, 3), *new, np.arange(3, 603, dtype=np.int32))
            positions[:3] = range(3)
            yield f"stored {heads} {dim} {dtype.__name__}", k
            for number, rule in enumerate(rules):
                for n, prompt in [(1, False), (5, False), (66, True)]:
                    q, out = floats(n, heads, dim), np.zeros((n, heads, dim), np.float32)
                    q_pos = np.arange(603 - n, 603, dtype=np.int32)
                    ops.attend(q, q_pos, [Segment(k, v, positions, 603)], rule, out, prompt)
                    yield f"attention {heads} {dim} {dtype.__name__} {number} {n} {prompt}", out


def packed(ops, folder, few):
    """Quantized keys and values, rotated, and keys with scales for each channel."""
    x, q = floats(96, 2, 64), floats(70, 4, 64)
    sizes = PACKED | GROUPED
    pairs = ("IQ4_NL", "Q5_1"), ("Q4_0", "Q8_0"), ("Q8_0", "Q4_0"), ("Q5_1", "IQ4_NL"), ("Q2C", "Q2")
    for k_type, v_type in pairs:
        k, v = (np.zeros((2, 96, 2 * sizes[type]), np.uint8) for type in (k_type, v_type))
        segment = Segment(k, v, np.zeros(96, np.int32), 0, k_type, v_type, turned_k=True, turned_v=True)
        ops.kv_store(segment, x, x, np.arange(96, dtype=np.int32))
        segment.used = 96
        yield f"stored {k_type}", k
        yield f"stored {v_type} beside {k_type}", v
        for n, prompt in [(1, False), (70, True)]:
            out = np.zeros((n, 4, 64), np.float32)
            ops.attend(q[:n], np.arange(96 - n, 96, dtype=np.int32), [segment], AttnRule(), out, prompt)
            yield f"attention {k_type} {n}", out


def models(ops, folder, few):
    made = [("F32", "llama"), ("F16", "gemma3"), ("Q8_0", "qwen3"), ("Q4_0", "llama"), ("F32", "gpt-oss")]
    made += [("F32", "qwen35"), ("F32", "qwen3next-odd")]
    for number, (type, name) in enumerate(made):
        path = write_model(folder / f"{number}.gguf", replace(RECIPES[name], type=type))
        model = open_model(path, threads=2)
        yield f"model {type} {name}", model.logits(np.arange(5, 45)).copy()
        model.close()


def main(folder, out, wanted="all"):
    ops, few = CpuOps(2), wanted == "products"
    parts = (products,) if few else (products, gates, rows, attention, packed, models)
    arrays = {name: array.copy() for part in parts for name, array in part(ops, Path(folder), few)}
    ops.close()
    np.savez(out, variant=np.array(TARGET.variant), **arrays)


if __name__ == "__main__":
    main(*sys.argv[1:])
