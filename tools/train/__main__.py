"""Train, continue, export or evaluate a model: `python -m tools.train tiny --texts TEXTS --run RUN`."""

import argparse
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from tools.train import evaluate
from tools.train.corpus import read_sources
from tools.train.export import write_gguf
from tools.train.model import SHAPES, Llama, Shape
from tools.train.rows import Rows
from tools.train.train import Plan, Run, train
from tools.train.vocabulary import Vocabulary, train_vocabulary

PLANS = {
    "tiny": Plan(),
    "nano": Plan(steps=240, decay=120, growth=((0.0, 1.0),), stages=((0.0, 256), (0.9, 512))),
    "test": Plan(steps=4, decay=2, batch=128),
}

CHANGES = ("steps", "decay", "batch", "lr", "seed")


def main(argv=None):
    """Run the command line."""
    args = _arguments(argv)
    torch.set_num_threads(args.threads)
    run_folder = Path(args.run)
    vocabulary, sources = prepare(Path(args.texts), run_folder, SHAPES[args.model].vocab)
    if not args.only_export:
        _train(args, run_folder, vocabulary, sources)
    state = torch.load(run_folder / args.model / "checkpoint.pt", map_location="cpu", weights_only=False)
    shape = Shape(**state["shape"])
    weights = state["average"] if args.average else state["model"]
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    for kind in args.types.split(","):
        write_gguf(out / f"{args.model}-{kind}.gguf", shape, weights, vocabulary, kind, args.model)
    model = Llama(shape)
    model.load_state_dict(weights)
    figures = evaluate.report(model.eval(), vocabulary, Path(args.texts) / args.held_out)
    report = {"step": state["step"]} | figures
    (run_folder / args.model / "report.json").write_text(json.dumps(report, indent=1))
    print(json.dumps(report, indent=1))


def _arguments(argv):
    p = argparse.ArgumentParser(prog="python -m tools.train", description=__doc__)
    p.add_argument("model", choices=sorted(SHAPES))
    p.add_argument("--texts", required=True, help="folder of the training texts")
    p.add_argument("--run", required=True, help="folder for the vocabulary, tokens, checkpoints and logs")
    p.add_argument("--out", default="models", help="folder for the GGUF files")
    p.add_argument("--types", default="q8_0", help="types to write: f32, f16, q8_0, separated by commas")
    p.add_argument("--held-out", default="tinystories-val-0.8MB.txt", help="text for the held-out loss")
    p.add_argument("--device", default="cpu", help="cpu or cuda (bf16)")
    p.add_argument(
        "--bf16", action="store_true", help="products in bf16 on the CPU too, faster where it has them"
    )
    p.add_argument("--threads", type=int, default=2)
    p.add_argument("--no-compile", action="store_true", help="no torch.compile (it needs a C++ compiler)")
    p.add_argument(
        "--from",
        dest="start",
        help="GGUF whose weights to begin with; of several, separated by commas, their mean",
    )
    p.add_argument("--teacher", help="GGUF of the same vocabulary to learn from beside the text")
    p.add_argument("--average", action="store_true", help="export the moving average of the weights")
    p.add_argument("--only-export", action="store_true", help="export and evaluate the last checkpoint")
    for name in CHANGES:
        p.add_argument(f"--{name}", type=float if name == "lr" else int, help="default: the model's plan")
    return p.parse_args(argv)


def _train(args, run_folder, vocabulary, sources):
    changes = {name: getattr(args, name) for name in CHANGES if getattr(args, name) is not None}
    plan = replace(PLANS[args.model], **changes)
    rows = Rows(vocabulary, sources, plan.seed)
    run = Run(run_folder / args.model, SHAPES[args.model], plan, rows, args.device, args.teacher, args.bf16)
    if args.start:
        run.start_from(args.start.split(","))
    run.resume()
    if not args.no_compile:
        run.compile()
    length = min(256, run.shape.context)
    held_out = evaluate.held_out_rows(Path(args.texts) / args.held_out, vocabulary, length)
    train(run, lambda r: evaluate.loss(r.model, held_out[:24].to(args.device)))


def prepare(texts, run_folder, size):
    """Return (vocabulary, {source: token arrays}), made once and kept in `run_folder`."""
    run_folder.mkdir(parents=True, exist_ok=True)
    model_file, token_file = run_folder / "vocabulary.model", run_folder / "tokens.npz"
    if not model_file.exists() or not token_file.exists():
        sources = read_sources(texts)
        if not model_file.exists():
            model_file.write_bytes(_vocabulary(sources, size))
        encode = Vocabulary(model_file.read_bytes()).encode
        encoded = {name: [np.array(encode(d), np.uint16) for d in docs] for name, docs in sources.items()}
        np.savez(token_file, **{name: _joined(docs) for name, docs in encoded.items()})
    arrays = np.load(token_file)
    return Vocabulary(model_file.read_bytes()), {name: _split(arrays[name]) for name in arrays.files}


def _vocabulary(sources, size):
    """Return the family's vocabulary where it has `size` pieces, else a new one: the bundled models share it."""
    family = Path(__file__).with_name("vocabulary.model").read_bytes()
    return family if len(Vocabulary(family)) == size else train_vocabulary(vocabulary_texts(sources), size)


def vocabulary_texts(sources):
    """Return the texts the vocabulary is made from: mostly simple stories, and lines with all of ASCII."""
    symbols = ["0 1 2 3 4 5 6 7 8 9 + - = * / < > | @ # $ % & ~ ^ _ \\ ` ' ; : ( ) [ ] ? ! , ."]
    symbols.append('{"a": ["b", "c"], "d": 1}')
    stories = sources["stories"] * 2 + sources["simple"] + sources["tales"][::3] + sources["classics"][::40]
    return stories + symbols * 20


END = np.uint16(65535)


def _joined(docs):
    return np.concatenate([np.append(d, END) for d in docs]) if docs else np.zeros(0, np.uint16)


def _split(tokens):
    return [d for d in np.split(tokens, np.flatnonzero(tokens == END) + 1) if len(d) > 1 for d in [d[:-1]]]


if __name__ == "__main__":
    main()
