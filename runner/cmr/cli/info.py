"""`cmr info FILE`: what a model file holds and what it needs, without reading its weights."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np

import cmr
from cmr.arena import Arena
from cmr.chat import ChatTemplate
from cmr.cli.options import Parser, whole
from cmr.config import read_config
from cmr.errors import CMRError
from cmr.gguf_file import GGUFFile, open_gguf
from cmr.model import MAX_ROWS
from cmr.ops import open_ops
from cmr.stats import size
from cmr.tokenizer import tokenizer_from

UNITS = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def main(argv: Sequence[str]) -> int:
    """Print what is in a file, as text or as JSON."""
    parser = Parser(prog="cmr info", description=__doc__)
    parser.add_argument("file", metavar="FILE")
    parser.add_argument("-c", "--ctx-size", type=whole(1), metavar="N", help="count memory for this context")
    parser.add_argument("--json", action="store_true", help="print one JSON object, with all scalar metadata")
    args = parser.parse(argv)
    with open_gguf(args.file) as file:
        facts = describe(file, args.ctx_size)
    if args.json:
        print(json.dumps(facts, indent=2, ensure_ascii=False))
    else:
        print("\n".join(lines(facts)))
    return 0


def describe(file: GGUFFile, context: int | None = None) -> dict[str, Any]:
    """Collect the facts about an open file; what cannot be read is a sentence under "problem" instead."""
    metadata, tensors = file.metadata, file.tensors.values()
    facts: dict[str, Any] = {
        "file": str(file.path),
        "version": file.version,
        "parts": len(file.files),
        "bytes": file.nbytes,
        "name": metadata.get("general.name"),
        "license": metadata.get("general.license"),
        "architecture": metadata.get("general.architecture"),
        "parameters": sum(int(np.prod(tensor.shape)) for tensor in tensors),
        "weight_bytes": sum(tensor.nbytes for tensor in tensors),
        "tensor_types": _types(file),
    }
    facts["model"] = _attempt(lambda: _sizes(file, context)) if file.tensors else None
    facts["tokenizer"] = (
        _attempt(lambda: _tokenizer(metadata)) if "tokenizer.ggml.model" in metadata else None
    )
    facts["metadata"] = {k: v for k, v in metadata.items() if isinstance(v, (bool, int, float, str))}
    facts["cmr"] = cmr.__version__
    return facts


def _attempt(read: Any) -> dict[str, Any]:
    try:
        return read()
    except CMRError as error:
        return {"problem": str(error)}


def _types(file: GGUFFile) -> dict[str, dict[str, int]]:
    """Count tensors, elements and bytes of each type, the largest first."""
    found: dict[str, dict[str, int]] = {}
    for tensor in file.tensors.values():
        row = found.setdefault(tensor.type_name, {"tensors": 0, "elements": 0, "bytes": 0})
        row["tensors"] += 1
        row["elements"] += int(np.prod(tensor.shape))
        row["bytes"] += tensor.nbytes
    return dict(sorted(found.items(), key=lambda item: -item[1]["bytes"]))


def _sizes(file: GGUFFile, context: int | None) -> dict[str, Any]:
    config = read_config(file, context)
    shapes = [config.kv_shape(layer) for layer in range(config.n_layers)]
    kv_token = sum(2 * heads * (dim + dim_v) for heads, dim, dim_v in shapes)
    context = context or config.n_ctx_train
    activations = Arena(open_ops("portable"), config, MAX_ROWS).nbytes
    attending = [layer for layer, kind in enumerate(config.layer_kinds) if kind == "attention"]
    recurrent = config.n_layers - len(attending)
    states = recurrent * config.delta.state_bytes if config.delta else 0
    return {
        "layers": config.n_layers,
        "width": config.n_embd,
        "heads": _same([config.n_heads[layer] for layer in attending]),
        "kv_heads": _same([config.n_kv_heads[layer] for layer in attending]),
        "head_size": config.head_dim,
        "feed_forward": _same(config.n_ff),
        "experts": config.router
        and {
            "layers": len(config.routed),
            "count": config.router.experts,
            "used": config.router.used,
        },
        "recurrent_layers": recurrent,
        "drafting_layers": config.n_drafting,
        "window": _same(config.window),
        "context_trained": config.n_ctx_train,
        "context": context,
        "kv_bytes_token": kv_token,
        "kv_bytes": kv_token * context,
        "state_bytes": states,
        "activation_bytes": activations,
        "memory_bytes": file.nbytes + kv_token * context + states + activations,
    }


def _same(values: Sequence[int]) -> int | list[int]:
    """One number where all layers agree; 0 where there are none."""
    return list(values) if len(set(values)) > 1 else next(iter(values), 0)


def _tokenizer(metadata: dict[str, Any]) -> dict[str, Any]:
    tokenizer = tokenizer_from(metadata)
    source = metadata.get("tokenizer.chat_template")
    special = {name: getattr(tokenizer, name) for name in ("bos", "eos", "eot", "pad")}
    template = None
    if source is not None:
        template = _attempt(lambda: {"takes_system": ChatTemplate(source).takes_system})
        template["characters"] = len(source)
    return {
        "model": metadata["tokenizer.ggml.model"],
        "pre": metadata.get("tokenizer.ggml.pre"),
        "tokens": tokenizer.n_vocab,
        "special": {
            name: {"id": token, "text": tokenizer.piece(token).decode("utf-8", "replace")}
            for name, token in special.items()
            if token is not None
        },
        "stops": sorted(tokenizer.stop_ids),
        "chat_template": template,
    }


def lines(facts: dict[str, Any]) -> list[str]:
    """Lay the facts out for reading."""
    parts = f" in {facts['parts']} parts" if facts["parts"] > 1 else ""
    rows = [
        ("name", facts["name"]),
        ("license", facts["license"]),
        ("architecture", facts["architecture"]),
        ("file", f"{size(facts['bytes'])}{parts}, GGUF version {facts['version']}"),
    ]
    if facts["parameters"]:
        bits = 8 * facts["weight_bytes"] / facts["parameters"]
        rows.append(("parameters", f"{number(facts['parameters'])}, {bits:.2f} bits each"))
    for name, row in facts["tensor_types"].items():
        rows.append(
            (f"  {name}", f"{row['tensors']} tensors, {number(row['elements'])}, {size(row['bytes'])}")
        )
    rows += _model_rows(facts["model"]) + _tokenizer_rows(facts["tokenizer"])
    return [facts["file"], *(f"  {name:14} {value}" for name, value in rows if value is not None)]


def _model_rows(model: dict[str, Any] | None) -> list[tuple[str, Any]]:
    if model is None:
        return [("model", "none: this file holds no tensors")]
    if "problem" in model:
        return [("model", model["problem"])]
    heads = f"{model['heads']} heads, {model['kv_heads']} for keys and values, of size {model['head_size']}"
    windows = model["window"] if isinstance(model["window"], list) else [model["window"]] * model["layers"]
    if any(windows):
        heads += f"; {sum(map(bool, windows))} layers see a window of {max(windows)} tokens"
    if model["recurrent_layers"]:
        heads += f"; {model['recurrent_layers']} layers are recurrent and keep a state instead"
    states = f"states {size(model['state_bytes'])}, " if model["recurrent_layers"] else ""
    each = f"{model['kv_bytes_token']} bytes each, f16"
    kv = f"{size(model['kv_bytes'])} KV at {model['context']} tokens ({each})"
    return [
        ("layers", f"{model['layers']} of width {model['width']}, feed-forward {model['feed_forward']}"),
        ("experts", _experts(model["experts"])),
        ("attention", heads),
        ("left alone", f"{model['drafting_layers']} blocks that draft" if model["drafting_layers"] else None),
        ("context", f"{model['context_trained']} tokens in training"),
        ("memory", f"{size(model['memory_bytes'])} at most: the file, {kv},"),
        ("", f"{states}{size(model['activation_bytes'])} activations"),
    ]


def _experts(experts: dict[str, int] | None) -> str | None:
    if experts is None:
        return None
    return f"{experts['count']} in each of {experts['layers']} layers, of which a token chooses {experts['used']}"


def _tokenizer_rows(tokenizer: dict[str, Any] | None) -> list[tuple[str, Any]]:
    if tokenizer is None:
        return [("tokenizer", "none in this file")]
    if "problem" in tokenizer:
        return [("tokenizer", tokenizer["problem"])]
    kind = tokenizer["model"] + (f" ({tokenizer['pre']})" if tokenizer["pre"] else "")
    special = ", ".join(f"{name} {row['id']} {row['text']!r}" for name, row in tokenizer["special"].items())
    template = tokenizer["chat_template"]
    if template is None:
        chat = "none"
    elif "problem" in template:
        chat = template["problem"]
    else:
        system = "takes" if template["takes_system"] else "has no place for"
        chat = f"{template['characters']} characters, {system} a system message"
    return [("tokenizer", f"{kind}, {tokenizer['tokens']} tokens; {special}"), ("chat template", chat)]


def number(count: float) -> str:
    """Write a count with three digits and a decimal unit."""
    for unit, letter in UNITS:
        if count >= unit:
            scaled = count / unit
            return f"{scaled:.{0 if scaled >= 100 else 1 if scaled >= 10 else 2}f} {letter}"
    return f"{count:.0f}"
